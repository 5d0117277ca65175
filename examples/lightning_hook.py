"""Flow mixup as a hook of a ``LightningModule``: training batches are augmented on the device.

Run it with::

    pip install lightning
    python examples/lightning_hook.py
"""

import torch
import torch.nn.functional as F
from digits import accuracy, digits, small_network
from torch.utils.data import DataLoader, TensorDataset

from flowaug import FlowMixupTransform


class FlowMixupHook:
    """Mixin that augments training batches.

    List it before ``LightningModule`` in the bases of your module, and set ``self.flow_mixup``.
    """

    flow_mixup: FlowMixupTransform

    def on_after_batch_transfer(self, batch, dataloader_idx: int):
        """Augment a training batch of images (B, C, H, W) and labels (B,); return other batches unchanged."""
        if not self.trainer.training:
            return batch

        x, y = batch
        return self.flow_mixup.to(x.device)(x, y)


def create_module():
    from lightning import LightningModule

    class Classifier(FlowMixupHook, LightningModule):
        def __init__(self):
            super().__init__()
            self.network = small_network()
            self.flow_mixup = FlowMixupTransform.from_pretrained("digits")

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.network(x), y)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=2e-3)

    return Classifier()


def main(epochs: int = 10) -> float:
    from lightning import Trainer

    module = create_module()
    loader = DataLoader(TensorDataset(*digits("train")), batch_size=64, shuffle=True)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **quiet).fit(module, loader)

    print(module.flow_mixup)
    return accuracy(module.network, *digits("val"))


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
