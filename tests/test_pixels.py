import math

import pytest
import torch

from flowaug.pixels import bits_per_dim, dequantise, quantise, reduce_levels


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


ALL = torch.arange(256) / 255


@pytest.mark.parametrize("bits", range(1, 9))
def test_fewer_bits_are_the_leading_ones_as_in_the_papers(bits):
    levels = 2**bits
    got = (reduce_levels(ALL, levels) * (levels - 1)).round().long()
    assert got.tolist() == [value >> (8 - bits) for value in range(256)]  # every level gets as many values
    noisy = dequantise(ALL.repeat(50), levels, torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantise(noisy, levels), reduce_levels(ALL, levels).repeat(50))


@pytest.mark.parametrize("levels", [2, 16, 17, 32, 128, 256])
def test_an_image_with_these_levels_stays_as_it_is(levels):
    x = torch.arange(levels) / (levels - 1)
    torch.testing.assert_close(reduce_levels(x, levels), x)
    stored = (x * 255).round() / 255  # in an 8-bit file
    torch.testing.assert_close(reduce_levels(stored, levels), x)


@pytest.mark.parametrize("levels", [1, 0, 2.5])
def test_invalid_levels_are_reported(levels):
    with pytest.raises(ValueError, match="expected an integer of at least 2"):
        quantise(torch.zeros(1), levels)
