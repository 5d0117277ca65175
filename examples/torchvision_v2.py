"""Flow mixup in a torchvision v2 pipeline: v2 transforms per image, then flow mixup and v2's MixUp per batch.

Run it with::

    python examples/torchvision_v2.py

Flow mixup needs hard labels, and MixUp and CutMix return soft labels, so flow mixup comes first. Call it in the main
process, so that there is one random generator: in the collate function if ``num_workers=0``, as here, otherwise in the
training loop.
"""

import torch
import torch.nn.functional as F
from digits import accuracy, digits, small_network
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from flowaug import FlowMixupTransform
from flowaug.data import load_dataset


def training_loader() -> DataLoader:
    data = load_dataset("digits")
    data.transform = v2.Compose(
        [v2.ToImage(), v2.RandomAffine(5, translate=(0.1, 0.1)), v2.ToDtype(torch.float32, scale=True)]
    )
    flow_mixup = FlowMixupTransform.from_pretrained("digits")
    mixup = v2.MixUp(alpha=0.2, num_classes=10)

    def collate(samples):
        x, y = default_collate(samples)
        return mixup(*flow_mixup(x, y))

    return DataLoader(data, batch_size=64, shuffle=True, collate_fn=collate)


def main(epochs: int = 10) -> float:
    network = small_network()
    loader = training_loader()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)

    for _ in range(epochs):
        network.train()
        for x, y in loader:
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return accuracy(network, *digits("val"))


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
