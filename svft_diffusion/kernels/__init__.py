"""Fast, exact forward and backward passes of one adapted layer in training; needs nothing but torch.

A planner chooses the strategy from the shape of the layer, the number of tokens and the core; `adapted_linear` and
`adapted_convolution` run it. The definition they are held to is ``y = (W + U M V^T) x + b``.
"""

from svft_diffusion.kernels.convolution import adapted_convolution
from svft_diffusion.kernels.linear import adapted_linear, rebuild_weight
from svft_diffusion.kernels.planner import Strategy, plan_convolution, plan_linear

__all__ = [
    "Strategy",
    "adapted_convolution",
    "adapted_linear",
    "plan_convolution",
    "plan_linear",
    "rebuild_weight",
]
