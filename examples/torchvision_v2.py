"""Flow mixup in a torchvision v2 pipeline: v2 transforms per image, flow mixup and then v2's MixUp per batch.

    python examples/torchvision_v2.py

Flow mixup needs hard labels, MixUp and CutMix make soft ones: keep this order. Call it where the batch is in this
process (here, with ``num_workers=0``, in the collate function; else in the loop), so that there is one generator.
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
    flow_mixup, mixup = FlowMixupTransform.from_pretrained("digits"), v2.MixUp(alpha=0.2, num_classes=10)

    def collate(samples):
        return mixup(*flow_mixup(*default_collate(samples)))

    return DataLoader(data, batch_size=64, shuffle=True, collate_fn=collate)


def main(epochs: int = 10) -> float:
    network, loader = small_network(), training_loader()
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
