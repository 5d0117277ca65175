"""The folder of a trained flow: checkpoint, moments, metrics, pictures and model card."""

import json
from pathlib import Path
from typing import Any

import yaml

from flowaug.data import ImageDataset
from flowaug.data.wds.dataset import StreamDataset
from flowaug.evaluation.pictures import draw_flow
from flowaug.files import markdown_table, markdown_text, pack, write_atomic, write_text
from flowaug.flows.checkpoint import save_flow
from flowaug.flows.flow import Flow
from flowaug.flows.passes import ImageTable
from flowaug.latents.moments import ClassMoments
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.settings import MIXUP_DEFAULTS
from flowaug.training.logs import MetricsLog

MOMENTS = "moments.safetensors"


def write_flow_folder(
    folder: Path,
    flow: Flow,
    pca: ClasswisePCA,
    moments: ClassMoments,
    dataset: ImageDataset | StreamDataset,
    train: ImageTable,
    val: ImageTable,
    options: dict[str, Any],
    log: MetricsLog,
) -> None:
    """Write checkpoint, moments, metrics, pictures and model card of a trained flow.

    Args:
        folder: the output folder.
        flow: the averaged flow.
        pca: its class principal components.
        moments: class moments of the training images' latents.
        dataset: the training data set (for names).
        train: training images.
        val: validation images, which the pictures show.
        options: options of the training.
        log: metrics of the run.
    """
    facts = {"class_names": list(dataset.class_names), "mixup": MIXUP_DEFAULTS}
    save_flow(flow, folder, pca, **facts, recipe=options, data=dataset.fingerprint())
    write_atomic(folder / MOMENTS, pack(moments.tensors()))
    summary = log.finish(train_images=len(train), val_images=len(val))
    log.plot(["bits_per_dim", "nf_acc"], f"{dataset.name}: flow on the validation set")
    draw_flow(flow, pca, val, folder)
    write_text(folder / "README.md", model_card(flow, pca, dataset.name, options, summary))


def model_card(flow: Flow, pca: ClasswisePCA, dataset: str, options: dict[str, Any], summary: dict[str, Any]) -> str:
    """Return the model card of a flow as markdown: what it is, its metrics, its options and how to use it."""
    parameters = sum(p.numel() for p in flow.parameters())
    metrics = markdown_table(("metric", "value"), ((name, _show(value)) for name, value in summary.items()))
    facts = {"library_name": "flowaug", "model_name": f"Flow for {dataset}", "tags": ["normalizing-flow"]}
    return f"""---
{yaml.safe_dump(facts, default_style='"', width=10**9).strip()}
---

# Flow for {markdown_text(dataset)}

A conditional normalizing flow `{flow.config["architecture"]}` ({parameters / 1e6:.2f} M parameters) for images of shape
{tuple(flow.event_shape)} and {flow.config["num_classes"]} classes, with {pca.rank} principal components per class,
trained by [flowaug](https://pypi.org/project/flowaug/).

```python
from flowaug import FlowMixupTransform

flow_mixup = FlowMixupTransform.from_pretrained("path/to/this/folder")
x, y = flow_mixup(x, y)  # x in [0, 1] or uint8, y integer labels
```

## Metrics on the validation set

{metrics}

`samples.png` shows samples of every class, `augmented.png` validation images before and after flow mixup.

## Options of the training

```json
{json.dumps(options, indent=2)}
```
"""


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
