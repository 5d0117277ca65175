import math

import pytest
import torch

from flowaug.pixels import bits_per_dim, dequantise, quantise


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_dequantise_noise_stays_within_the_cell(levels):
    x = torch.randint(0, levels, (1000,)) / (levels - 1)
    noisy = dequantise(x, levels, torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantise(noisy, levels), x)
    assert (noisy - x).abs().max() > 0.49 / (levels - 1)


def test_bits_per_dim_of_the_uniform_density_is_log2_of_the_levels():
    volume = (256 / 255) ** 3  # dequantised images fill [−½, 255½]/255 in each dimension
    assert bits_per_dim(torch.tensor(-math.log(volume)), 3, 256).item() == pytest.approx(8, abs=1e-6)


def test_dequantise_uses_the_generator_and_not_the_global_rng():
    before = torch.get_rng_state()
    a, b = (dequantise(torch.zeros(9), 256, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("levels", [1, 0, 2.5])
def test_invalid_levels_are_reported(levels):
    with pytest.raises(ValueError, match="expected an integer of at least 2"):
        quantise(torch.zeros(1), levels)
