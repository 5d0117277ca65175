"""Augmented copies of a data set, and generated ones, on disk: an image folder or webdataset shards."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from flowaug.data import ImageDataset
from flowaug.evaluation.sampling import sample
from flowaug.files import write_atomic, write_json
from flowaug.flows.flow import Flow
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.offline import CHUNK, Chunk, augmented, chunks, to_image
from flowaug.mixup.transform import FlowMixupTransform

FORMATS = ("folder", "webdataset")
MANIFEST = "export.json"


def export(
    transform: FlowMixupTransform,
    dataset: ImageDataset,
    folder: Path,
    *,
    copies: int = 1,
    originals: bool = False,
    layout: str = "folder",
    split: str = "train",
    seed: int = 0,
    settings: dict | None = None,
) -> dict:
    """Write ``copies`` augmented copies of every image, at its own size, as PNG.

    The random choices depend on the seed, the copy and the position of the image alone, so an interrupted export goes
    on where it stopped and ends in the same files, and more copies can be added later. Files that are there are kept.

    Args:
        transform: the augmentation, for uint8 images; its generator is set anew for each chunk.
        dataset: the images; its transform is not applied.
        folder: where to. An image folder becomes ``folder/split/class/*.png``, shards ``folder/split-COPY-CHUNK.tar``.
        copies: augmented copies of each image.
        originals: write the images themselves too, as copy 0.
        layout: "folder" or "webdataset" (PNG and class number, ``.png`` and ``.cls``).
        split: "train" or "val", for the names.
        seed: seed of the augmentation.
        settings: further facts that must agree when an export goes on, for example the flow's name.

    Returns:
        ``images`` written now, ``kept`` from before, and the transform's counts.

    Raises:
        ValueError: unknown layout, nothing to write, class names that clash as folders, or a folder that holds another
            export.
    """
    if copies < 0 or (copies == 0 and not originals):
        raise ValueError(f"copies is {copies}; expected at least 1, or 0 with originals=True to write the images alone")
    facts = {"data": dataset.fingerprint(), "split": split, "layout": layout, "seed": seed, **(settings or {})}
    writer = _open(folder, facts, dataset.class_names, dataset.targets, layout, split)
    parts = chunks(len(dataset), range(0 if originals else 1, copies + 1))
    counts = _write(writer, parts, lambda chunk: augmented(transform, dataset, chunk, seed), "exporting")
    return {**counts, **transform.counts}


def generate(
    flow: Flow,
    per_class: int,
    folder: Path,
    *,
    temperature: float = 1.0,
    gaussians: ClasswisePCA | None = None,
    layout: str = "folder",
    split: str = "train",
    seed: int = 0,
    settings: dict | None = None,
) -> dict:
    """Write a labelled data set drawn from the class Gaussians, as PNG, the classes taking turns.

    Like :func:`export` it goes on where it stopped and ends in the same files.

    Args:
        flow: a trained flow of images.
        per_class: images of each class.
        folder: where to, laid out as by :func:`export`.
        temperature: scales the covariance.
        gaussians: full class covariances to draw from (``flowaug.generation.rfcm``); None for the flow's own.
        layout: "folder" or "webdataset".
        split: "train" or "val", for the names.
        seed: seed of the draws.
        settings: further facts that must agree when it goes on, for example which flow and which covariance.

    Returns:
        ``images`` written now and ``kept`` from before.

    Raises:
        ValueError: unknown layout, no image, a negative temperature, class names that clash as folders, or a folder
            that holds another export.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; expected at least 1 image of each class")
    labels = torch.arange(flow.gaussians.num_classes).repeat(per_class)
    sample(flow, labels[:1], temperature, seed, gaussians)  # its checks, before anything is written
    names = flow.class_names or [f"{k:06d}" for k in range(flow.gaussians.num_classes)]  # folders sort by label
    facts = {"generated": per_class, "temperature": temperature, "split": split, "layout": layout, "seed": seed}
    writer = _open(folder, {**facts, **(settings or {})}, names, labels.numpy(), layout, split)
    draw = partial(sample, flow.freeze(), temperature=temperature, seed=seed, gaussians=gaussians)
    return _write(writer, chunks(len(labels), range(1, 2)), lambda chunk: _drawn(draw, labels, chunk), "generating")


def _drawn(draw: Callable[..., Tensor], labels: Tensor, chunk: Chunk) -> dict[int, Image.Image]:
    images = draw(labels[chunk.start : chunk.stop], chunk=chunk.start // CHUNK)
    return dict(zip(chunk.indices, map(to_image, images), strict=True))


def _open(
    folder: Path, facts: dict, class_names: Sequence[str], targets: np.ndarray, layout: str, split: str
) -> "FolderWriter | ShardWriter":
    """Claim the folder for these facts and return what writes to it."""
    if layout not in FORMATS:
        raise ValueError(f"layout is {layout!r}; expected one of {FORMATS}")
    names = _folder_names(class_names)
    _claim(folder, facts, class_names)
    return {"folder": FolderWriter, "webdataset": ShardWriter}[layout](folder, split, names, targets)


def _write(writer, parts: list[Chunk], render: Callable[[Chunk], dict[int, Image.Image]], what: str) -> dict:
    """Write what is missing of each chunk; a chunk that is whole is not rendered."""
    written = 0
    with tqdm(total=len(parts) * CHUNK, desc=what, unit=" images", leave=False, delay=2) as bar:
        for chunk in parts:
            if missing := writer.missing(chunk):
                writer.write(chunk, render(chunk), missing)
            written += len(missing)
            bar.update(CHUNK)
    total = sum(len(chunk.indices) for chunk in parts)
    return {"images": written, "kept": total - written}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class FolderWriter:
    """One PNG per image in ``folder/split/class``."""

    def __init__(self, folder: Path, split: str, names: list[str], targets: np.ndarray):
        self.root, self.names, self.targets = folder / split, names, targets

    def path(self, copy: int, index: int) -> Path:
        """Where an image goes."""
        return self.root / self.names[self.targets[index]] / f"{index:07d}-{copy}.png"

    def missing(self, chunk: Chunk) -> list[int]:
        """Positions of the images that are not there yet."""
        return [i for i in chunk.indices if not self.path(chunk.copy, i).is_file()]

    def write(self, chunk: Chunk, images: dict[int, Image.Image], missing: list[int]) -> None:
        """Write the missing ones, each complete or not at all."""
        for i in missing:
            write_atomic(self.path(chunk.copy, i), _png(images[i]))


class ShardWriter:
    """One tar per chunk; a shard that was interrupted is not there and is written anew."""

    def __init__(self, folder: Path, split: str, names: list[str], targets: np.ndarray):
        self.folder, self.split, self.targets = folder, split, targets

    def path(self, chunk: Chunk) -> Path:
        """Where a chunk goes."""
        return self.folder / f"{self.split}-{chunk.copy:02d}-{chunk.start // CHUNK:06d}.tar"

    def missing(self, chunk: Chunk) -> list[int]:
        """All positions of the chunk, or none."""
        return [] if self.path(chunk).is_file() else list(chunk.indices)

    def write(self, chunk: Chunk, images: dict[int, Image.Image], missing: list[int]) -> None:
        """Write the shard as a whole, with neither dates nor owners, so that equal exports are equal files."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as shard:
            for i in missing:
                key = f"{chunk.copy:02d}-{i:07d}"
                for suffix, data in (("png", _png(images[i])), ("cls", str(self.targets[i]).encode())):
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(data)
                    shard.addfile(entry, io.BytesIO(data))
        write_atomic(self.path(chunk), buffer.getvalue())


def _folder_names(class_names: Sequence[str]) -> list[str]:
    """Class names with what cannot stand in a file name replaced."""
    names = ["".join("_" if c in '/\\:*?"<>|' else c for c in name) for name in class_names]
    if len(set(names)) < len(names):
        raise ValueError(f"some class names are the same as folder names: {sorted(names)}; rename the classes")
    return names


def _claim(folder: Path, facts: dict, class_names: Sequence[str]) -> None:
    """Write the manifest, or check that the folder holds a part of this very export."""
    path, facts = folder / MANIFEST, json.loads(json.dumps(facts))
    if not path.is_file():
        write_json(path, {**facts, "class_names": list(class_names)})
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for key, value in facts.items():
        if found.get(key) != value:
            raise ValueError(
                f"{folder} holds another export: its {key} is {found.get(key)!r}, not {value!r}; "
                "choose another folder or delete this one"
            )
