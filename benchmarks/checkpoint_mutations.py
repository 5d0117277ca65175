"""Mutations of checkpoints, for mutated_checkpoints.py: accidental damage, and what a forger might write."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from flowaug.flows.checkpoint import CONFIG, PCA, WEIGHTS

WORDS = ("", "x", "digits", "hf-hub:attacker/repository", "../..", "\ud800", "\0", "a\nb", "<b>", "7")
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    17,
    1000,
    10**9,
    10**40,
    0.5,
    -1e300,
    1e400,
    [],
    {},
    *WORDS,
)
RESERVED = ("pretrained", "checkpoint", "num_classes", "event_shape", "seed", "name", "grey_levels", "policy")
NUMBERS = (float("nan"), float("inf"), -1.0, 0.0, 1e-40, 1e4, 1e30, 3e38)


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of every entry of nested JSON."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _nodes(value[key])


def _flip(data: bytes, rng: random.Random, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _mutate_json(text: bytes, rng: random.Random) -> bytes:
    """Change one entry of a JSON object: its value, its name, or whether it is there."""
    config = json.loads(text)
    container, key = rng.choice(list(_nodes(config)))
    action = rng.choice(("value", "value", "value", "drop", "rename", "add", "reserved"))
    if action == "drop":
        del container[key]
    elif action == "value" or not isinstance(container, dict):
        container[key] = rng.choice(VALUES)
    elif action == "rename":
        container[key + "x"] = container.pop(key)
    elif action == "add":
        container[f"new{rng.randrange(9)}"] = rng.choice(VALUES)
    else:
        config.get("overrides", config)[rng.choice(RESERVED)] = rng.choice(VALUES)
    return json.dumps(config).encode()


def mutate_config(folder: Path, rng: random.Random) -> None:
    """Change one key or value of ``config.json``."""
    path = folder / CONFIG
    path.write_bytes(_mutate_json(path.read_bytes(), rng))


def mutate_config_bytes(folder: Path, rng: random.Random) -> None:
    """Flip bits of ``config.json``, cut it, or replace it."""
    data = (folder / CONFIG).read_bytes()
    choices = [_flip(data, rng, 1), _flip(data, rng, 3), data[: rng.randrange(len(data))]]
    choices += [b"[" * 100_000, b"", b"null", b"\xff\xfe", b'{"a":' * 50_000]
    (folder / CONFIG).write_bytes(rng.choice(choices[:3] if rng.random() < 0.7 else choices))


def _target(folder: Path, rng: random.Random) -> Path:
    return folder / rng.choice((WEIGHTS, PCA))


def mutate_bytes(folder: Path, rng: random.Random) -> None:
    """Flip bits of a safetensors file, cut it, lengthen it, or put a file of another kind in its place."""
    path = _target(folder, rng)
    data = path.read_bytes()
    action = rng.randrange(6)
    if action == 0:
        path.unlink()
    elif action == 1:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif action == 2:
        path.write_bytes(rng.choice([b"", b"\x80\x04N.", b"PK\x03\x04" + data, b"\xff" * 64, data + data[:99]]))
    elif action == 3:
        with path.open("r+b") as file:
            file.truncate(2**36)  # sparse
    else:
        path.write_bytes(_flip(data, rng, rng.choice((1, 1, 8))))
    if action != 3:
        _forge(folder, rng)


def mutate_header(folder: Path, rng: random.Random) -> None:
    """Change the JSON header of a safetensors file, or the number of its bytes."""
    path = _target(folder, rng)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    header = _mutate_json(header, rng) if rng.random() < 0.7 else _flip(header, rng, 1)
    stated = rng.choice((0, 1, length, 2**40, 2**64 - 1)) if rng.random() < 0.15 else len(header)
    path.write_bytes(stated.to_bytes(8, "little") + header + data[8 + length :])
    _forge(folder, rng)


def mutate_tensors(folder: Path, rng: random.Random) -> None:
    """Change values, data type, shape or name of one tensor."""
    path = _target(folder, rng)
    tensors = load(path.read_bytes())
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    action = rng.randrange(8)
    if action == 0:
        tensors[name + "x"] = tensor
    elif action == 1:
        dtype = rng.choice((torch.bool, torch.int8, torch.int64, torch.float16, torch.float64, torch.bfloat16))
        tensors[name] = tensor.to(dtype)
    elif action == 2:
        tensors[name] = rng.choice((tensor.flatten(), tensor[None], tensor[:0], torch.cat([tensor, tensor])))
    elif action == 3:
        tensors[name] = tensor * rng.choice((-1, 0, 3))
    elif action == 4:
        tensors[name] = tensor.flatten()[torch.randperm(tensor.numel())].view_as(tensor)
    elif action != 5:
        entries = tensor.flatten().clone()
        where = slice(None) if action == 6 else rng.randrange(len(entries))
        entries[where] = rng.choice(NUMBERS) if tensor.is_floating_point() else rng.choice((-1, 0, 5, 2**62))
        tensors[name] = entries.view_as(tensor)
    path.write_bytes(save({key: value.contiguous() for key, value in tensors.items()}))
    _forge(folder, rng)


def _forge(folder: Path, rng: random.Random) -> None:
    """Make the digests in ``config.json`` right, in four of five cases."""
    if rng.random() < 0.2:
        return
    config = json.loads((folder / CONFIG).read_bytes())
    for name in config["sha256"]:
        if (folder / name).is_file():
            config["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "config.json, keys and values": mutate_config,
    "config.json, bytes": mutate_config_bytes,
    "safetensors, bytes": mutate_bytes,
    "safetensors, header": mutate_header,
    "safetensors, tensors": mutate_tensors,
}
