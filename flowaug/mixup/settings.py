"""Settings of flow mixup: the defaults, which had the highest accuracy (docs/gains.md), and an option for them."""

import argparse
import ast
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


class FlowAugAction(argparse.Action):
    """The option ``--flow-aug flow=FOLDER KEY=VALUE ...``: the flow stays text, other values are Python literals.

    timm's ParseKwargs would read a folder ``2024`` as a number, ``None`` as no flow, and refuse some paths.
    """

    def __call__(self, parser, namespace, values: Any, option_string=None) -> None:
        """Store the pairs as a dictionary; end the program with a message if they are no pairs or name no flow."""
        parts = [text.partition("=") for text in values]
        given = {key: text if key == "flow" else _literal(text) for key, _, text in parts}
        if not given.get("flow") or not all(key and mark for key, mark, _ in parts):
            parser.error(f"{option_string} is {' '.join(values)!r}; expected flow=FOLDER and KEY=VALUE pairs (p=0.5)")
        setattr(namespace, self.dest, given)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
