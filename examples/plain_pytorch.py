"""Flow mixup in a plain PyTorch loop: one line before the loop, one line in it.

Run it with::

    python examples/plain_pytorch.py
"""

import torch
import torch.nn.functional as F
from digits import accuracy, digits, small_network
from torch.utils.data import DataLoader, TensorDataset

from flowaug import FlowMixupTransform


def main(epochs: int = 10) -> float:
    flow_mixup = FlowMixupTransform.from_pretrained("digits")

    network = small_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    loader = DataLoader(TensorDataset(*digits("train")), batch_size=64, shuffle=True)

    for _ in range(epochs):
        network.train()
        for x, y in loader:
            x, y = flow_mixup(x, y)  # on a GPU: call flow_mixup.to(device) before the loop
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    print(flow_mixup)
    return accuracy(network, *digits("val"))


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
