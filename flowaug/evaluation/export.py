"""Write augmented or generated data sets to disk, as an image folder or as webdataset shards."""

import io
import json
import reprlib
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
INVALID = '/\\:*?"<>|'  # in names of files on some system
MAX_NAME = 200  # bytes; file systems allow 255


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
    """Write ``copies`` augmented copies of every image as PNG, each at its own size.

    The random choices depend only on the seed, the copy and the index of the image. An interrupted export therefore
    continues where it stopped and writes the same files, and copies can be added later. Existing files are kept.

    Args:
        transform: flow mixup for uint8 images; its generator is reset for each chunk.
        dataset: the images; their transform is not applied.
        folder: output folder. An image folder is written to ``folder/split/class/*.png``, shards to
            ``folder/split-COPY-CHUNK.tar``.
        copies: number of augmented copies of each image.
        originals: also write the original images, as copy 0.
        layout: "folder", or "webdataset" (shards with ``.png`` and ``.cls``, the class number).
        split: "train" or "val", used in the names.
        seed: seed of the augmentation.
        settings: additional settings that must be the same when an export continues, for example the name of the flow.

    Returns:
        The number of ``images`` written and ``kept``, and the counts of the transform.

    Raises:
        ValueError: if the layout is unknown, there is nothing to write, two class names give the same folder name, or
            the folder contains another export.
    """
    if copies < 0 or (copies == 0 and not originals):
        raise ValueError(
            f"copies is {copies}; expected at least 1, or 0 with originals=True to write only the original images"
        )

    manifest = {"data": dataset.fingerprint(), "split": split, "layout": layout, "seed": seed, **(settings or {})}
    writer = _create_writer(folder, manifest, dataset.class_names, dataset.targets, layout, split)
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
    """Write a labelled data set of images sampled from the class Gaussians as PNG, cycling over the classes.

    As with :func:`export`, an interrupted run continues where it stopped and writes the same files.

    Args:
        flow: a trained flow for images.
        per_class: number of images per class.
        folder: output folder, with the layout of :func:`export`.
        temperature: factor of the covariance.
        gaussians: full class covariances (:func:`flowaug.evaluation.sampling.rfcm`) to sample from; None for the
            flow's own diagonal ones.
        layout: "folder" or "webdataset".
        split: "train" or "val", used in the names.
        seed: seed of the samples.
        settings: additional settings that must be the same when a run continues, for example the name of the flow.

    Returns:
        The number of ``images`` written and ``kept``.

    Raises:
        ValueError: if the layout is unknown, ``per_class`` is less than 1, the temperature is negative, two class names
            give the same folder name, or the folder contains another export.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; expected at least 1 image per class")

    labels = torch.arange(flow.gaussians.num_classes).repeat(per_class)
    sample(flow, labels[:1], temperature, seed, gaussians)  # runs the checks before anything is written
    names = flow.class_names or [f"{k:06d}" for k in range(flow.gaussians.num_classes)]  # sorted by label

    manifest = {"generated": per_class, "temperature": temperature, "split": split, "layout": layout, "seed": seed}
    writer = _create_writer(folder, {**manifest, **(settings or {})}, names, labels.numpy(), layout, split)
    draw = partial(sample, flow.freeze(), temperature=temperature, seed=seed, gaussians=gaussians)
    return _write(
        writer, chunks(len(labels), range(1, 2)), lambda chunk: _draw_chunk(draw, labels, chunk), "generating"
    )


def _draw_chunk(draw: Callable[..., Tensor], labels: Tensor, chunk: Chunk) -> dict[int, Image.Image]:
    images = draw(labels[chunk.start : chunk.stop], chunk=chunk.start // CHUNK)
    return dict(zip(chunk.indices, map(to_image, images), strict=True))


def _create_writer(
    folder: Path, manifest: dict, class_names: Sequence[str], targets: np.ndarray, layout: str, split: str
) -> "FolderWriter | ShardWriter":
    """Write or check the manifest of the folder and return a writer."""
    if layout not in FORMATS:
        raise ValueError(f"layout is {layout!r}; expected one of {FORMATS}")
    if split != _file_name(split):
        raise ValueError(f"split is {split!r}; expected a name without {INVALID}, such as train or val")
    _check_name(split, "split")
    names = _folder_names(class_names)
    _check_manifest(folder, manifest, class_names)
    if layout == "webdataset":
        return ShardWriter(folder, split, targets)
    return FolderWriter(folder, split, names, targets)


def _write(writer, parts: list[Chunk], render: Callable[[Chunk], dict[int, Image.Image]], what: str) -> dict:
    """Write the missing images of each chunk; complete chunks are not rendered."""
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
    """Writer of one PNG per image, ``folder/split/class/INDEX-COPY.png``.

    Args:
        folder: output folder.
        split: "train" or "val".
        names: folder name of each class.
        targets: labels of all images.
    """

    def __init__(self, folder: Path, split: str, names: list[str], targets: np.ndarray):
        self.root = folder / split
        self.names = names
        self.targets = targets

    def path(self, copy: int, index: int) -> Path:
        """Return the path of an image."""
        return self.root / self.names[self.targets[index]] / f"{index:07d}-{copy}.png"

    def missing(self, chunk: Chunk) -> list[int]:
        """Return the indices of the images of a chunk that do not exist yet."""
        return [i for i in chunk.indices if not self.path(chunk.copy, i).is_file()]

    def write(self, chunk: Chunk, images: dict[int, Image.Image], missing: list[int]) -> None:
        """Write the missing images, each atomically."""
        for i in missing:
            write_atomic(self.path(chunk.copy, i), _png(images[i]))


class ShardWriter:
    """Writer of one shard per chunk, ``folder/split-COPY-CHUNK.tar``.

    Shards are written atomically, so an interrupted one does not exist and is written again.

    Args:
        folder: output folder.
        split: "train" or "val".
        targets: labels of all images.
    """

    def __init__(self, folder: Path, split: str, targets: np.ndarray):
        self.folder = folder
        self.split = split
        self.targets = targets

    def path(self, chunk: Chunk) -> Path:
        """Return the path of the shard of a chunk."""
        return self.folder / f"{self.split}-{chunk.copy:02d}-{chunk.start // CHUNK:06d}.tar"

    def missing(self, chunk: Chunk) -> list[int]:
        """Return all indices of the chunk, or none if its shard exists."""
        return [] if self.path(chunk).is_file() else list(chunk.indices)

    def write(self, chunk: Chunk, images: dict[int, Image.Image], missing: list[int]) -> None:
        """Write the shard, without dates and owners, so that equal exports give equal files."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as shard:
            for i in missing:
                key = f"{chunk.copy:02d}-{i:07d}"
                for suffix, data in (("png", _png(images[i])), ("cls", str(self.targets[i]).encode())):
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(data)
                    shard.addfile(entry, io.BytesIO(data))
        write_atomic(self.path(chunk), buffer.getvalue())


def _file_name(name: str) -> str:
    return "".join("_" if c in INVALID else c for c in name)


def _check_name(name: str, what: str) -> None:
    """Check that a name is that of a file or folder inside the one that it is put in."""
    encodable = "\0" not in name and not any("\ud800" <= c <= "\udfff" for c in name)
    size = len(name.encode()) if encodable else 0
    if not encodable or not name.strip(". ") or size > MAX_NAME:
        raise ValueError(
            f"{what} is {reprlib.repr(name)} and cannot be that of a folder; expected 1 to {MAX_NAME} bytes of UTF-8 "
            "that are not dots and spaces only; rename it, or give other class names"
        )


def _folder_names(class_names: Sequence[str]) -> list[str]:
    """Return the class names with characters that are invalid in file names replaced by underscores."""
    names = [_file_name(name) for name in class_names]
    for label, name in enumerate(names):
        _check_name(name, f"the name of class {label}")
    if len(set(names)) < len(names):
        raise ValueError(f"some classes have the same folder name: {sorted(names)}; rename the classes")
    return names


def _check_manifest(folder: Path, manifest: dict, class_names: Sequence[str]) -> None:
    """Write the manifest, or check that an existing one belongs to the same export."""
    path = folder / MANIFEST
    manifest = json.loads(json.dumps(manifest))  # as read from a file: tuples become lists
    if not path.is_file():
        write_json(path, {**manifest, "class_names": list(class_names)})
        return

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged ({found}); delete {folder} or choose another folder")
    for key, value in manifest.items():
        if found.get(key) != value:
            raise ValueError(
                f"{folder} holds another export: its {key} is {found.get(key)!r}, not {value!r}; "
                "choose another folder or delete this one"
            )
