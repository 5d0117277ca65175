"""timm's Mixup and CutMix on batches of any size."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup

from flowaug.mixup.timm_mixup import mix_any_batch


def mixed(alphas, count, seed=2):
    """Images of a constant each with labels 0, 1, ..., mixed by Mixup and CutMix of these alphas."""
    np.random.seed(seed)  # noqa: NPY002  the generator that timm draws from
    x = torch.arange(count).float()[:, None, None, None].expand(count, 1, 16, 16).clone()
    mixup = Mixup(*alphas, label_smoothing=0.0, num_classes=count)
    return mix_any_batch(mixup, x, torch.arange(count))


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_any_number_of_images_is_mixed_with_the_opposite_ones(alphas, count):
    x, y = mixed(alphas, count)
    assert x.shape == (count, 1, 16, 16)
    torch.testing.assert_close(y.sum(1), torch.ones(count))
    partner = torch.arange(count).flip(0)
    share = y[0, 0].item() if count > 1 else 1.0
    assert count == 1 or 0 < share < 1
    for i in range(count):
        expected = torch.zeros(count)
        expected[i] += share
        expected[partner[i]] += 1 - share
        torch.testing.assert_close(y[i], expected)
        mean = share * i + (1 - share) * partner[i].item()  # the label's share is that of the pixels
        assert x[i].mean().item() == pytest.approx(mean, abs=1e-5)
