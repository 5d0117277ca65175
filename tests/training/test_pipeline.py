"""Augmentation of batches on the device."""

import pytest

from flowaug.training import finetune

QUICK = ["--cpu", "--workers", "0", "--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--steps", "2"]


@pytest.mark.parametrize("data", [["--batch-size", "7"], ["--images-per-class", "3", "--batch-size", "29"]])
def test_a_training_with_odd_batches_mixes(data, tmp_path):
    finetune.main([*QUICK, *data, "--mixup", "0.8", "--cutmix", "1", "--output", str(tmp_path)])
    assert (tmp_path / "model.safetensors").is_file()
