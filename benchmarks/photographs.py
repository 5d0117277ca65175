"""Make a small colour data set of ten photographs, a class each: random crops as files for ``--data-dir``.

    pip install scikit-image scikit-learn
    python benchmarks/photographs.py runs/photographs    # 2,500 images at 32×32, three seconds

200 crops of 40 to 64 pixels of each to train on and 50 to test on, which are of other columns of the photograph.
"""

import argparse
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

PHOTOGRAPHS = {  # a package, its folder of images, and the names of those with colours
    "skimage": (
        "data",
        "astronaut.png chelsea.png coffee.png hubble_deep_field.jpg motorcycle_left.png retina.jpg rocket.jpg ihc.png",
    ),
    "sklearn": ("datasets/images", "flower.jpg china.jpg"),
}
SHORTER_SIDE = 512
EIGHTHS = {"train": ((0, 3), (4, 6), (7, 8)), "val": ((3, 4), (6, 7))}  # a photograph's columns, by split
CROPS = {"train": 200, "val": 50}


def photographs() -> Iterator[Path]:
    """The files of the installed packages.

    Raises:
        SystemExit: if a package or one of its images is missing, naming it.
    """
    for package, (folder, names) in PHOTOGRAPHS.items():
        found = find_spec(package)
        if found is None:
            raise SystemExit(f"{package} holds some of the photographs: pip install scikit-image scikit-learn")
        for name in names.split():
            path = Path(found.origin).parent / folder / name
            if not path.is_file():
                raise SystemExit(f"{path} is missing; scikit-image 0.26 and scikit-learn 1.9 have them all")
            yield path


def read(path: Path) -> Image.Image:
    """In colour, its shorter side 512 pixels if it was longer."""
    image = Image.open(path).convert("RGB")
    factor = SHORTER_SIDE / min(image.size)
    return image if factor >= 1 else image.resize([round(side * factor) for side in image.size], Image.LANCZOS)


def crop(image: Image.Image, split: str, rng: np.random.Generator) -> Image.Image:
    """A random square of the split's columns, at 32×32."""
    eighth = image.width / 8
    runs = np.array(EIGHTHS[split]) * eighth
    widths = runs[:, 1] - runs[:, 0]
    begin, end = runs[rng.choice(len(runs), p=widths / widths.sum())]
    side = int(rng.integers(40, min(64, int(eighth)) + 1))
    first = math.ceil(begin)
    left = int(rng.integers(first, max(int(end - side), first) + 1))
    top = int(rng.integers(0, image.height - side + 1))
    return image.crop((left, top, left + side, top + side)).resize((32, 32), Image.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write train/<photograph>/*.png and val/<photograph>/*.png")
    folder = parser.parse_args().folder
    rng = np.random.default_rng(0)
    for path in tqdm(list(photographs()), desc="photographs"):
        image = read(path)
        for split, crops in CROPS.items():
            of_class = folder / split / path.stem
            of_class.mkdir(parents=True, exist_ok=True)
            for i in range(crops):
                crop(image, split, rng).save(of_class / f"{i}.png")


if __name__ == "__main__":
    main()
