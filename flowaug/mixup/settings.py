"""Default settings of flow mixup. They had the highest accuracy on held-out images (docs/gains.md)."""

from typing import Any

FEW_IMAGES = 250  # images per class, on average; chosen from measurements with 20, 100 and 500
MIXUP_DEFAULTS: dict[str, Any] = {
    "p": 0.5,
    "alpha": 0.3,
    "per_axis": None,  # chosen by has_few_images
    "rescaled": True,
}


def has_few_images(images: int, num_classes: int) -> bool:
    """Return whether to draw one mixing weight per principal component instead of one per image.

    With few images per class this creates more variants of each image. With many images, one weight per image
    preserves labels better.

    Args:
        images: number of training images.
        num_classes: number of classes K.
    """
    return images < FEW_IMAGES * num_classes
