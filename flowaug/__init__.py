"""flowaug: same-label mixup in the latent space of a conditional normalizing flow."""

from flowaug import _renamed
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
