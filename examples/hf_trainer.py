"""Flow mixup as the data collator of a Hugging Face ``Trainer``.

Run it with::

    pip install transformers
    python examples/hf_trainer.py
"""

import tempfile

import torch
import torch.nn.functional as F
from digits import accuracy, digits, small_network
from torch import nn

from flowaug import FlowMixupTransform


class FlowMixupCollator:
    """Data collator that stacks samples and augments the batch.

    The ``Trainer`` also uses its collator for evaluation. ``create_trainer`` shows how to avoid that.

    Args:
        flow_mixup: the augmentation.
    """

    def __init__(self, flow_mixup: FlowMixupTransform):
        self.flow_mixup = flow_mixup

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return the augmented batch of samples with ``pixel_values`` (C, H, W) and ``labels``."""
        x = torch.stack([row["pixel_values"] for row in rows])
        y = torch.tensor([int(row["labels"]) for row in rows])
        x, y = self.flow_mixup(x, y)
        return {"pixel_values": x, "labels": y}


class Classifier(nn.Module):
    """Model with the interface of the ``Trainer``: takes the batch by keyword, returns loss and logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixel_values, labels=None):
        """Return the loss and the logits (B, K) of images (B, C, H, W)."""
        logits = self.network(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def rows(split: str) -> list[dict]:
    return [{"pixel_values": x, "labels": y} for x, y in zip(*digits(split), strict=True)]


def create_trainer(model: nn.Module, output: str, epochs: int):
    from transformers import Trainer, TrainingArguments, default_data_collator

    class FlowTrainer(Trainer):
        def get_eval_dataloader(self, *arguments, **keywords):
            # evaluation images must not be augmented
            training, self.data_collator = self.data_collator, default_data_collator
            try:
                return super().get_eval_dataloader(*arguments, **keywords)
            finally:
                self.data_collator = training

    options = TrainingArguments(
        output_dir=output,
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    collator = FlowMixupCollator(FlowMixupTransform.from_pretrained("digits"))
    train, val = rows("train"), rows("val")

    return FlowTrainer(model, options, data_collator=collator, train_dataset=train, eval_dataset=val)


def main(epochs: int = 10) -> float:
    model = Classifier(small_network())
    with tempfile.TemporaryDirectory() as output:
        trainer = create_trainer(model, output, epochs)
        trainer.train()
        trainer.evaluate()
    print(trainer.data_collator.flow_mixup)
    return accuracy(model.network, *digits("val"))


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
