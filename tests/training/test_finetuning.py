import itertools

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, AugmentOp

from flowaug.training.classifier import create_classifier, create_optimizer, create_schedule
from flowaug.training.weights import read_checkpoint
from tests.conftest import finetune_options


def options(*argv):
    return finetune_options(*argv, "--cpu", *([] if "--checkpoint" in argv else ["--no-pretrained"]))


def rates(chosen, steps, per_epoch=1):
    optimizer = create_optimizer(torch.nn.Linear(2, 2), chosen.training, chosen.schedule)
    scheduler, seen = create_schedule(optimizer, chosen.schedule, steps), []
    for step in range(steps):
        scheduler.step(step // per_epoch * per_epoch if chosen.schedule.sched_on_epochs else step)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_cosine_over_epochs_is_that_of_the_eva02_recipe():
    chosen = options("--opt", "sgd", "--lr", "1e-5", "--warmup-ratio", "0", "--sched-on-epochs")
    assert rates(chosen, 30, per_epoch=10)[::10] == pytest.approx([1e-5, 0.75e-5, 0.25e-5])


def test_warm_restarts_return_to_a_lower_peak():
    chosen = options("--lr", "1", "--warmup-ratio", "0", "--lr-cycles", "3", "--lr-cycle-decay", "0.5")
    seen = rates(chosen, 30)
    assert [seen[i] for i in (0, 10, 20)] == pytest.approx([1, 0.5, 0.25])
    assert seen[9] < 0.1
    assert all(a > b for a, b in itertools.pairwise(seen[:10]))


def test_step_schedule_lowers_the_rate_after_each_share():
    chosen = options(
        "--lr", "1", "--warmup-ratio", "0", "--sched", "step", "--decay-ratio", "0.4", "--decay-rate", "0.1"
    )
    assert [rates(chosen, 10)[i] for i in (3, 4, 8)] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize("name", _RAND_INCREASING_TRANSFORMS)
def test_pillow_takes_the_strongest_of_every_operation_of_timms_randaugment(name):
    image = AugmentOp(name, prob=1.0, magnitude=10)(Image.new("RGB", (8, 8), "grey"))
    assert image.size == (8, 8)


def test_layer_decay_lowers_the_rate_towards_the_input():
    chosen = options("--model", "test_vit", "--layer-decay", "0.5")
    scales = [
        g["lr_scale"]
        for g in create_optimizer(timm.create_model("test_vit"), chosen.training, chosen.schedule).param_groups
    ]
    assert max(scales) == 1
    assert min(scales) < 0.1


@pytest.mark.parametrize(("model", "size", "side"), [("test_vit", 64, 64), ("test_resnet", 48, 48)])
def test_image_size_reaches_the_models_that_have_one(model, size, side):
    _, config = create_classifier(options("--model", model, "--img-size", str(size)).classifier, 3, 1)
    assert (config.input_size, len(config.mean)) == ((1, side, side), 1)


def test_drop_rates_and_further_arguments_reach_the_constructor():
    chosen = options("--model", "test_vit", "--drop-path", "0.5", "--model-kwargs", "depth=2", "reg_tokens=0")
    model, _ = create_classifier(chosen.classifier, 3, 3)
    assert len(model.blocks) == 2
    assert model.reg_token is None
    assert model.blocks[-1].drop_path1.drop_prob == 0.5


def trained(num_classes=1000, in_chans=3):
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=num_classes, in_chans=in_chans).state_dict()


def test_checkpoint_of_other_classes_keeps_the_body_and_adapts_the_stem(tmp_path):
    save_file(trained(), tmp_path / "w.safetensors")
    model, _ = create_classifier(options("--checkpoint", str(tmp_path / "w.safetensors")).classifier, 3, 1)
    body = {k: v for k, v in model.state_dict().items() if k != "conv1.0.weight" and not k.startswith("fc.")}
    assert all(torch.equal(v, trained()[k]) for k, v in body.items())
    stem = next(k for k, v in trained().items() if v.ndim == 4)
    assert torch.allclose(model.state_dict()[stem], trained()[stem].sum(1, keepdim=True))
    assert model.num_classes == 3


def test_checkpoint_of_the_same_classes_comes_whole(tmp_path):
    torch.save({"state_dict": trained(3, 1)}, tmp_path / "w.pth")
    model, _ = create_classifier(options("--checkpoint", str(tmp_path / "w.pth")).classifier, 3, 1)
    assert all(torch.equal(v, trained(3, 1)[k]) for k, v in model.state_dict().items())


def test_names_of_another_code_base_are_matched_by_order(tmp_path):
    renamed = {f"layer_{i}": v for i, v in enumerate(trained().values())}
    torch.save(renamed, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth", "test_resnet")
    assert all(torch.equal(v, trained()[k]) for k, v in found.items())
    del renamed["layer_3"]
    torch.save(renamed, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="belongs to another architecture"):
        read_checkpoint(tmp_path / "w.pth", "test_resnet")


MISFITS = [
    ("test_vit2", {}, r"w.safetensors does not fit 'test_vit', it is of another architecture"),
    ("test_vit", {"in_chans": 1}, r"'test_vit' for images of 1 channel, the data has 3"),
    ("test_vit", {"in_chans": 4}, r"'test_vit' for images of 4 channels, the data has 3"),
    ("test_vit", {"depth": 2}, r"another architecture \(Missing key\(s\)"),
    ("test_vit", {"embed_dim": 32}, "another architecture"),
]


@pytest.mark.parametrize(("name", "changes", "message"), MISFITS)
def test_weights_that_do_not_fit_are_one_sentence(tmp_path, name, changes, message):
    save_file(timm.create_model(name, num_classes=3, **changes).state_dict(), tmp_path / "w.safetensors")
    chosen = options("--model", "test_vit", "--checkpoint", str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=message) as error:
        create_classifier(chosen.classifier, 3, 3)
    assert "\n" not in str(error.value)


def test_weights_in_a_pth_tar_are_read(tmp_path):
    torch.save({"state_dict": trained(3, 1)}, tmp_path / "w.pth.tar")
    assert read_checkpoint(tmp_path / "w.pth.tar", "test_resnet").keys() == trained(3, 1).keys()


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"x": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no weights that can be read safely"):
        read_checkpoint(tmp_path / "w.pth", "test_resnet")
    assert "unpickled" not in capsys.readouterr().out


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        create_classifier(options("--checkpoint", str(tmp_path / "none.pth")).classifier, 3, 1)


def test_weights_that_cannot_be_fetched_end_with_the_way_out(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"test_vit cannot be downloaded \(We couldn't connect .*--no-pretrained"):
        create_classifier(options("--model", "test_vit").classifier, 3, 1)
