"""flowaug: same-label mixup in the latent space of a conditional normalizing flow."""

from flowaug.checkpoint import list_pretrained, load_flow, load_pca, save_flow
from flowaug.flow import Flow
from flowaug.gaussians import ClassGaussians, GaussianParameters
from flowaug.mixup import MixPlan, mix_latents
from flowaug.models import create_flow, list_flows, register_flow
from flowaug.moments import ClassMoments
from flowaug.pca import ClasswisePCA
from flowaug.transform import FlowMixupTransform

__version__ = "0.1.0"
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
