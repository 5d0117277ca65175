"""flowaug: same-label mixup in the latent space of a conditional normalizing flow."""

from importlib import import_module
from typing import TYPE_CHECKING

from flowaug import _renamed

if TYPE_CHECKING:
    from flowaug.flows.checkpoint import list_pretrained, load_flow, load_pca, save_flow
    from flowaug.flows.flow import Flow
    from flowaug.flows.registry import create_flow, list_flows, register_flow
    from flowaug.latents.gaussians import ClassGaussians, GaussianParameters
    from flowaug.latents.moments import ClassMoments
    from flowaug.latents.pca import ClasswisePCA
    from flowaug.mixup.mixing import mix_latents
    from flowaug.mixup.plan import MixPlan
    from flowaug.mixup.transform import FlowMixupTransform

__version__ = "0.1.0"
_renamed.install()
__all__ = [
    "ClassGaussians",
    "ClassMoments",
    "ClasswisePCA",
    "Flow",
    "FlowMixupTransform",
    "GaussianParameters",
    "MixPlan",
    "create_flow",
    "list_flows",
    "list_pretrained",
    "load_flow",
    "load_pca",
    "mix_latents",
    "register_flow",
    "save_flow",
]

# Imported on first use: a command sets up its threads before torch is imported, and this package comes before both.
_MODULES = {
    "flows.checkpoint": ("list_pretrained", "load_flow", "load_pca", "save_flow"),
    "flows.flow": ("Flow",),
    "flows.registry": ("create_flow", "list_flows", "register_flow"),
    "latents.gaussians": ("ClassGaussians", "GaussianParameters"),
    "latents.moments": ("ClassMoments",),
    "latents.pca": ("ClasswisePCA",),
    "mixup.mixing": ("mix_latents",),
    "mixup.plan": ("MixPlan",),
    "mixup.transform": ("FlowMixupTransform",),
}
_PACKAGES = ("files", "flows", "latents", "mixup", "pixels")  # attributes too, without an import of their own


def __getattr__(name: str) -> object:
    """Import the modules of the public names, and return the attribute."""
    if name not in (*__all__, *_PACKAGES):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for path, names in _MODULES.items():
        module = import_module(f"{__name__}.{path}")
        globals().update({each: getattr(module, each) for each in names})
    return globals()[name]


def __dir__() -> list[str]:
    """Return the public names too, before they are imported."""
    return sorted({*globals(), *__all__})
