"""The loader: deltas into live torch models. Needs torch; numba makes the CPU fast, Triton the GPU.

apply_          a delta into a model, in place, once
VariantSwitch   many variants of one model, one at a time
serve           many variants of one model, in one batch, over one base
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError:
    message = "peraxis_format.torch needs the package torch, which is not installed: pip install 'peraxis[torch]'"
    raise ModuleNotFoundError(message, name="torch") from None

from peraxis_format.errors import DeviceError, LiveModelError
from peraxis_format.torch.place.finder import FUSED
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.shards import Shard, ShardView, chunk, whole
from peraxis_format.torch.serve.api import Served, serve
from peraxis_format.torch.swap.apply import Applied, apply_
from peraxis_format.torch.swap.reports import Swap, SwapError, Variant
from peraxis_format.torch.swap.switch import VariantSwitch

__all__ = [
    "FUSED",
    "Applied",
    "DeviceError",
    "LiveModelError",
    "ShardView",
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
