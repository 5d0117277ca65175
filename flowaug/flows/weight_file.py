"""Weight files of checkpoints: read and checked before anything of the size that they claim is allocated."""

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from flowaug.flows.bijections.linear import PLUConv1x1
from flowaug.flows.flow import Flow
from flowaug.flows.registry import create_flow
from flowaug.flows.sources import CONFIG
from flowaug.latents.gaussians import check_parameters

AGAIN = "copy the whole folder again or train the flow again"
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
DTYPES = {torch.float32: FLOATS, torch.float64: FLOATS, torch.int64: {"I64"}, torch.bool: {"BOOL"}}
LARGEST = 1e10  # of an entry; trained flows stay below 1e3, and products of larger ones overflow float32
PROBED = 2**11  # entries of class means that are decoded: 16 means of 128 dimensions, one of an image of 32×32×3
COUNTS = ("steps", "couplings", "depth", "layers", "blocks", "num_levels")  # at least one tensor for each
# what a constructor raises for values that do not suit it
BUILD_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
)


class _LargerFlowError(ValueError):
    """The config describes more than the weight file holds."""


class Entry(NamedTuple):
    """Data type and shape of a tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """Read names, data types and shapes of the tensors in a safetensors file, without the tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a complete safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the checkpoint is incomplete, {AGAIN}")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: Entry(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): it is truncated, damaged or from another save; "
            f"{AGAIN}"
        ) from error


def read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """Read the tensors of a file whose header was checked.

    Args:
        path: safetensors file.
        digest: its SHA-256.

    Raises:
        ValueError: if the file has another digest or cannot be read.
    """
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(
            f"{path} ({len(data)} bytes) does not match the digest in {CONFIG}: it is truncated, damaged or from "
            f"another save; {AGAIN}"
        )
    try:
        return load_bytes(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a data type that torch does not have
        raise ValueError(f"{path} is not a readable safetensors file ({error}); {AGAIN}") from error


def build_flow(path: Path, config: Mapping[str, Any], header: Mapping[str, Entry]) -> Flow:
    """Build a flow without values, on the meta device, and compare it with the header of its weight file.

    Args:
        path: the weight file, for error messages.
        config: checked content of ``config.json``.
        header: the header of the weight file.

    Raises:
        ValueError: if the sizes in the config do not fit the file.
    """
    _check_sizes(path, config, header)
    try:
        with _bounded(path, header):
            flow = _create(config)
    except _LargerFlowError:
        raise
    except BUILD_ERRORS as error:
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{path.parent / CONFIG}: {config['architecture']} cannot be built with event_shape "
            f"{config['event_shape']} and overrides {config['overrides']} ({reason}); {AGAIN}"
        ) from error
    _compare(path, config["architecture"], flow, header)
    return flow


def _create(config: Mapping[str, Any]) -> Flow:
    names = ("num_classes", "grey_levels")
    arguments = {"event_shape": tuple(config["event_shape"]), **{name: config[name] for name in names}}
    try:
        with torch.device("meta"):
            flow = create_flow(config["architecture"], **arguments, **config["overrides"])
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
    else:
        if {name for name, _ in flow.named_buffers()} <= set(flow.state_dict()):
            return flow
    # a registered architecture that reads values in its constructor, or keeps buffers that are not saved
    return create_flow(config["architecture"], **arguments, **config["overrides"])


def _check_sizes(path: Path, config: Mapping[str, Any], header: Mapping[str, Entry]) -> None:
    expected = (config["num_classes"], math.prod(config["event_shape"]))
    found = header["gaussians.mean"].shape if "gaussians.mean" in header else None
    if found != expected:
        raise ValueError(
            f"{path} holds {'no class means' if found is None else f'class means of shape {found}'}, expected "
            f"{expected}, as num_classes is {config['num_classes']} and event_shape {config['event_shape']} in "
            f"{CONFIG}: the two files do not belong together; {AGAIN}"
        )

    elements = sum(math.prod(entry.shape) for entry in header.values())
    for name, value in config["overrides"].items():
        limit = len(header) if name in COUNTS else elements
        numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int | float)]
        if not all(abs(n) <= limit for n in numbers):
            raise ValueError(
                f"{path.parent / CONFIG}: overrides.{name} is {value}, expected at most {limit}: {path.name} holds "
                f"{len(header)} tensors with {elements} entries; the two files do not belong together; {AGAIN}"
            )


@contextmanager
def _bounded(path: Path, header: Mapping[str, Entry]) -> Iterator[None]:
    """Refuse to build more or larger parameters than a file holds."""
    left = [len(header), sum(math.prod(entry.shape) for entry in header.values())]
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is None or threading.get_ident() != thread:
            return
        left[0] -= 1
        left[1] -= parameter.numel()
        if min(left) < 0:
            raise _LargerFlowError(
                f"{path.parent / CONFIG} describes a larger flow than {path.name} with {len(header)} tensors: the two "
                f"files do not belong together; {AGAIN}"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _compare(path: Path, architecture: str, flow: Flow, header: Mapping[str, Entry]) -> None:
    expected = flow.state_dict()
    faults = [f"{name} is missing" for name in expected if name not in header]
    faults += [f"{name} is not part of the flow" for name in header if name not in expected]
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        entry = header.get(name)
        if entry is not None and entry.shape != shape:
            faults.append(f"{name} has shape {entry.shape}, expected {shape}")
        elif entry is not None and entry.dtype not in DTYPES.get(tensor.dtype, set()):
            faults.append(f"{name} has data type {entry.dtype}, expected {tensor.dtype}")
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ValueError(
            f"the weights in {path} do not fit the architecture {architecture}: {faults[0][:200]}{more}; they are from "
            "another version of flowaug or another architecture; train the flow again"
        )


def fill(path: Path, flow: Flow, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into a flow made by :func:`build_flow` and check their values.

    Args:
        path: the weight file, for error messages.
        flow: the flow; changed in place.
        tensors: the tensors of the file.

    Raises:
        ValueError: if a value is not finite or too large, a variance is not positive, an order is no permutation, or
            the flow maps to values that are not finite.
    """
    if flow.gaussians.mean.is_meta:
        flow.to_empty(device="cpu")
    flow.load_state_dict(tensors)
    flow.eval().requires_grad_(False)

    for name, tensor in flow.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.abs().max() <= LARGEST:
            raise ValueError(
                f"{path}: {name} has entries that are not finite or beyond ±{LARGEST:.0e}, expected the weights of a "
                f"trained flow; {AGAIN}"
            )
    try:
        check_parameters(flow.gaussians.mean, flow.gaussians.variance)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {AGAIN}") from error
    for name, module in flow.named_modules():
        _check_order(path, name, module)
    _probe(path, flow)


def _check_order(path: Path, name: str, module: nn.Module) -> None:
    """Check the buffers of the layers that permute."""
    order, restore = getattr(module, "order", None), getattr(module, "restore", None)
    if not isinstance(order, Tensor):
        return
    positions = torch.arange(len(order))
    good = torch.equal(order.sort().values, positions)
    if good and isinstance(restore, Tensor):
        good = torch.equal(order[restore.clamp(0, len(order) - 1)], positions)
    if good and isinstance(module, PLUConv1x1):
        good = bool((module.sign.abs() == 1).all())
    if not good:
        raise ValueError(
            f"{path}: {name}.order, restore or sign is {order.tolist()[:8]}…, expected a permutation of 0 to "
            f"{len(order) - 1}, its inverse, and signs of ±1; {AGAIN}"
        )


@torch.no_grad()
def _probe(path: Path, flow: Flow) -> None:
    """Check that a random event and some class means are mapped to finite values."""
    event = torch.rand(1, *flow.event_shape, generator=torch.Generator().manual_seed(0))
    count = max(1, PROBED // flow.dim)
    means = flow.gaussians.mean[:: math.ceil(flow.gaussians.num_classes / count)]
    try:
        latent, ladj = flow.encode(event)
        results = (latent, ladj, flow.gaussians.log_joint(latent), flow.decode(means))
        finite = all(bool(torch.isfinite(result).all()) for result in results)
    except RuntimeError:  # a linear solver without a solution
        finite = False
    if not finite:
        raise ValueError(
            f"{path}: the flow maps a random event or a class mean to values that are not finite, so its weights are "
            f"damaged or its training diverged; {AGAIN}"
        )
