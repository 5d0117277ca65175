"""What a training leaves for people and machines: metrics, pictures, the folder of a flow and its model card."""

import json
from pathlib import Path

from flowaug.evaluation.pictures import draw_flow
from flowaug.files import pack, write_atomic
from flowaug.flows.checkpoint import save_flow
from flowaug.flows.flow import Flow
from flowaug.flows.passes import ImageTable
from flowaug.latents.moments import ClassMoments
from flowaug.latents.pca import ClasswisePCA
from flowaug.training.logs import MetricsLog

MOMENTS = "moments.safetensors"


def write_flow_folder(
    folder: Path,
    flow: Flow,
    pca: ClasswisePCA,
    moments: ClassMoments,
    dataset,
    train: ImageTable,
    val: ImageTable,
    recipe: dict,
    log: MetricsLog,
) -> None:
    """Write checkpoint, moments, metrics, pictures and card of a trained flow.

    Args:
        folder: where to.
        flow: the averaged flow.
        pca: its class axes.
        moments: class moments of the training images' latents.
        dataset: the training data set (for names).
        train: training images.
        val: validation images, which the pictures show.
        recipe: options that made the flow.
        log: the numbers of the run.
    """
    save_flow(flow, folder, pca, class_names=list(dataset.class_names), recipe=recipe, data=dataset.fingerprint())
    write_atomic(folder / MOMENTS, pack(moments.tensors()))
    summary = log.finish(train_images=len(train), val_images=len(val))
    log.plot(["bits_per_dim", "nf_acc"], f"{dataset.name}: flow on the val split")
    draw_flow(flow, pca, val, folder)
    write_atomic(folder / "README.md", model_card(flow, pca, dataset.name, recipe, summary).encode())


def model_card(flow: Flow, pca: ClasswisePCA, dataset: str, recipe: dict, summary: dict) -> str:
    """Model card of a flow as markdown: what it is, its numbers, its recipe and how to use it."""
    parameters = sum(p.numel() for p in flow.parameters())
    rows = "\n".join(f"| {k} | {_show(v)} |" for k, v in summary.items())
    return f"""# Flow for {dataset}

A conditional normalizing flow `{flow.config["architecture"]}` ({parameters / 1e6:.2f} M parameters) for images of shape
{tuple(flow.event_shape)}, {flow.config["num_classes"]} classes, with {pca.rank} principal axes per class, made by
`train_flow.py` of [flowaug](https://pypi.org/project/flowaug/).

```python
from flowaug import FlowMixupTransform

flow_mixup = FlowMixupTransform.from_pretrained("path/to/this/folder")
x, y = flow_mixup(x, y)  # x in [0, 1] or uint8, y integer labels
```

## Measured on the val split

| | |
|---|---|
{rows}

`samples.png` shows draws from the class Gaussians, `augmented.png` images of the val split mixed with training images.

## Recipe

```json
{json.dumps(recipe, indent=2)}
```
"""


def _show(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
