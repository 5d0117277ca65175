"""Create a small colour data set for ``--data-dir``: random crops of ten photographs, each of which is a class.

    pip install scikit-image scikit-learn
    python benchmarks/photographs.py runs/photographs    # 2,500 images at 32×32, three seconds

Of each photograph there are 200 crops for training and 50 for validation, with sides of 40 to 64 pixels. Training and
validation crops come from different columns of the photograph.
"""

import argparse
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

PHOTOGRAPHS = {  # package: its folder of images, and the names of the colour photographs
    "skimage": (
        "data",
        "astronaut.png chelsea.png coffee.png hubble_deep_field.jpg motorcycle_left.png retina.jpg rocket.jpg ihc.png",
    ),
    "sklearn": ("datasets/images", "flower.jpg china.jpg"),
}
SHORTER_SIDE = 512  # pixels
EIGHTHS = {"train": ((0, 3), (4, 6), (7, 8)), "val": ((3, 4), (6, 7))}  # ranges of columns, in eighths of the width
CROPS = {"train": 200, "val": 50}  # per photograph


def photographs() -> Iterator[Path]:
    """Yield the paths of the photographs in the installed packages.

    Raises:
        SystemExit: a package or one of its images is missing.
    """
    for package, (folder, names) in PHOTOGRAPHS.items():
        found = find_spec(package)
        if found is None:
            raise SystemExit(f"package {package} is missing; pip install scikit-image scikit-learn")
        for name in names.split():
            path = Path(found.origin).parent / folder / name
            if not path.is_file():
                raise SystemExit(f"{path} is missing; install scikit-image 0.26 and scikit-learn 1.9")
            yield path


def read(path: Path) -> Image.Image:
    """Read a photograph as RGB, reduced to a shorter side of at most 512 pixels."""
    image = Image.open(path).convert("RGB")
    factor = SHORTER_SIDE / min(image.size)
    return image if factor >= 1 else image.resize([round(side * factor) for side in image.size], Image.LANCZOS)


def crop(image: Image.Image, split: str, rng: np.random.Generator) -> Image.Image:
    """Return a random square from the columns of a split, resized to 32×32."""
    eighth = image.width / 8
    ranges = np.array(EIGHTHS[split]) * eighth
    widths = ranges[:, 1] - ranges[:, 0]
    begin, end = ranges[rng.choice(len(ranges), p=widths / widths.sum())]

    side = int(rng.integers(40, min(64, int(eighth)) + 1))
    first = math.ceil(begin)
    left = int(rng.integers(first, max(int(end - side), first) + 1))
    top = int(rng.integers(0, image.height - side + 1))
    return image.crop((left, top, left + side, top + side)).resize((32, 32), Image.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder, for train/<photograph>/*.png and val/…")
    folder = parser.parse_args().folder
    rng = np.random.default_rng(0)
    for path in tqdm(list(photographs()), desc="photographs"):
        image = read(path)
        for split, crops in CROPS.items():
            class_folder = folder / split / path.stem
            class_folder.mkdir(parents=True, exist_ok=True)
            for i in range(crops):
                crop(image, split, rng).save(class_folder / f"{i}.png")


if __name__ == "__main__":
    main()
