"""The loader: deltas into live torch models. Needs torch; numba makes the CPU fast, Triton the GPU.

apply_          a delta into a model, in place, once
VariantSwitch   many variants of one model, one at a time
serve           many variants of one model, in one batch, over one base
"""

from peraxis_format.torch.apply import Applied, apply_
from peraxis_format.torch.errors import DeviceError, LiveModelError
from peraxis_format.torch.finder import FUSED
from peraxis_format.torch.parts import Part, Shard, chunk, whole
from peraxis_format.torch.placement import place
from peraxis_format.torch.reports import Swap, SwapError, Variant
from peraxis_format.torch.serve import Served, serve
from peraxis_format.torch.switch import VariantSwitch

__all__ = [
    "FUSED",
    "Applied",
    "DeviceError",
    "LiveModelError",
    "Part",
    "Served",
    "Shard",
    "Swap",
    "SwapError",
    "Variant",
    "VariantSwitch",
    "apply_",
    "chunk",
    "place",
    "serve",
    "whole",
]
