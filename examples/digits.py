"""What the examples share: the embedded digits as tensors, a small network and its accuracy."""

import torch
from torch import Tensor, nn

from flowaug.data import load_dataset, stack_images


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,) of "train" (1438) or "val" (359)."""
    data = load_dataset("digits", split=split)
    return stack_images(data, (8, 8), 1).float() / 255, torch.as_tensor(data.targets)


def small_network() -> nn.Module:
    """A network of two convolutions, always with the same first weights."""
    torch.manual_seed(0)
    first = (nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 10))


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images that the network gets right."""
    return (network.eval()(x).argmax(1) == y).float().mean().item()
