"""What ``finetune.py`` says before a training and after it."""

import argparse

from flowaug.shardlists import is_shards


def could_move_first(args: argparse.Namespace) -> bool:
    """Whether ``--flow-aug-copies`` is left out but possible: shards are a stream and cannot be copied."""
    return args.flow_aug_copies is None and not is_shards(args.dataset, args.data_dir)


def describe_order(args: argparse.Namespace) -> str:
    """What to know before a training whose flow gets images that ``--aa`` has changed; "" if there is nothing."""
    if not args.aa or args.flow_aug_copies:
        return ""
    text = "the flow gets images that --aa has changed: train it with the same --aa"
    return text + (", or let it move them first, in --flow-aug-copies N" if could_move_first(args) else "")


def describe_weights(args: argparse.Namespace) -> str:
    """Which share of the images flow mixup is asked to change, and by how many weights each."""
    weights = "a weight for each class axis" if args.flow_aug_per_axis else "one weight for all class axes"
    return f"p = {args.flow_aug_p:g}, {weights}"


def describe_mixing(counts: dict[str, int], can_move_first: bool) -> str:
    """One sentence on what `FlowMixupTransform.counts` come to, and a way out where the guard refused much."""
    seen, drawn = counts["seen"], sum(counts.values()) - counts["seen"]
    text = f"flow mixup changed {counts['augmented'] / max(seen, 1):.0%} of the images"
    if 4 * counts["refused"] <= drawn:
        return text
    sooner = "move them before --aa changes them (--flow-aug-copies N) or " if can_move_first else ""
    return (
        f"{text}; {counts['refused'] / drawn:.0%} of those drawn went back as they came, as no likely image of "
        f"their class came of them; {sooner}train the flow for longer"
    )


def describe_results(args: argparse.Namespace, summary: dict) -> str:
    """What a finished training says: accuracy, what the flow did, and where everything is."""
    top1, top5, images = (summary[name] for name in ("top1", "top5", "images"))
    mixing = [describe_mixing(summary["flow_aug"], could_move_first(args))] if "flow_aug" in summary else []
    pictures = "curves.png" + (", augmented.png (before/after)" if mixing else "")
    lines = [
        f"test accuracy {top1:.4f} (top-5 {top5:.4f}) on {images} images",
        *mixing,
        f"outputs in {args.output}: metrics.json, {pictures}",
        f"load it by timm.create_model('local-dir:{args.output}', pretrained=True)",
    ]
    return "\n".join(lines)
