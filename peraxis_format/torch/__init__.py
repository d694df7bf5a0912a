"""The loader puts deltas into live torch models. It needs torch; numba makes it fast on the CPU, Triton on the GPU.

This module's interface is stable.

apply_          turns a model into the fine-tune, in place
VariantSwitch   holds many variants of one model and changes between them, one at a time
serve           runs many variants of one model in one batch, over one base
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError:
    message = "peraxis_format.torch needs the package torch, which is not installed: pip install 'peraxis[torch]'"
    raise ModuleNotFoundError(message, name="torch") from None

from peraxis_format.errors import DeviceError, LiveModelError
from peraxis_format.torch.place.digests import forget_digests
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
    "forget_digests",
    "place",
    "serve",
    "whole",
]
