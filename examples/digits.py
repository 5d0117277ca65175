"""Code shared by the examples: scikit-learn's digits as tensors, a small network and its accuracy."""

import torch
from torch import Tensor, nn

from flowaug.data import load_dataset, stack_images


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the images (N, 1, 8, 8) in [0, 1] and labels (N,) of ``"train"`` (1438 images) or ``"val"`` (359)."""
    data = load_dataset("digits", split=split)
    return stack_images(data, (8, 8), 1).float() / 255, torch.as_tensor(data.targets)


def small_network() -> nn.Module:
    """Return a network with two convolutions and always the same initial weights."""
    torch.manual_seed(0)
    first = (nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))

    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 10))


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy of the network, a fraction."""
    return (network.eval()(x).argmax(1) == y).float().mean().item()
