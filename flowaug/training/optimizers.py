"""The optimisers of ``train_flow.py``."""

import torch
from timm.optim import Muon
from torch import nn

from flowaug.flows.networks import Linear, ScaledConv2d

OPTIMIZERS = ("adamax", "muon")
ADAM_SHARE = 0.3  # of Muon's learning rate, for the parameters that Adam takes beside it


def flow_optimizer(flow: nn.Module, opt: str, lr: float) -> torch.optim.Optimizer:
    """Optimiser of all parameters of a flow.

    Args:
        flow: the flow.
        opt: "adamax" (Kingma & Ba 2015, Section 7.1), as in MEF; or "muon" (Jordan et al. 2024), timm's: momentum made
            orthogonal for the weights of the conditioners' layers, and Adam with Nesterov's momentum for all else, as
            the parameters of the bijections themselves are no maps between features.
        lr: learning rate.
    """
    if opt == "adamax":
        return torch.optim.Adamax(flow.parameters(), lr=lr)
    weights = [module.weight for module in flow.modules() if isinstance(module, ScaledConv2d | Linear)]
    taken = set(map(id, weights))
    others = [p for p in flow.parameters() if id(p) not in taken]
    groups = [{"params": weights}, {"params": others, "use_fallback": True}]
    return Muon(groups, lr=lr, nesterov=True, fallback_lr_scale=ADAM_SHARE)
