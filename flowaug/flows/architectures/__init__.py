"""Flow architectures: functions that build a bijection from events to latent vectors."""

from flowaug.flows.architectures.glow import glow_base, glow_small, glow_tiny
from flowaug.flows.architectures.jet import jet_base, jet_small, jet_tiny
from flowaug.flows.architectures.mef import mef_base, mef_small, mef_tiny
from flowaug.flows.architectures.vector import vector_base, vector_small, vector_tiny

__all__ = [
    "glow_base",
    "glow_small",
    "glow_tiny",
    "jet_base",
    "jet_small",
    "jet_tiny",
    "mef_base",
    "mef_small",
    "mef_tiny",
    "vector_base",
    "vector_small",
    "vector_tiny",
]
