"""peraxis: small differences of full fine-tunes to a shared base. This module's interface is stable.

    import peraxis

    peraxis.compress("org/base", "org/fine-tuned", "delta.pxd", calibration="c4")
    with peraxis.open("delta.pxd") as delta:                      # reads the header alone
        print(delta)
    model, tokenizer = peraxis.load("me/delta")                   # a transformers model; its manifest names the base

A name is imported at its first use, so importing this package loads at most numpy. docs/api.md lists signatures.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from peraxis_format import ArgumentError, BackendError, CheckpointError, DeltaFile, PxdError, __version__, open
    from peraxis_format.errors import LiveModelError, TornError
    from peraxis_format.torch import (
        Applied,
        Served,
        Shard,
        Swap,
        SwapError,
        Variant,
        VariantSwitch,
        apply_,
        forget_digests,
        serve,
    )
    from peraxis_format.torch.updates import (
        Follower,
        Poll,
        Published,
        ShardedUpdateWriter,
        UpdateError,
        UpdateWriter,
        follow,
    )
    from peraxis_format.torch.updates.callback import PublishUpdates
    from peraxis_tools.apply import ApplyResult, apply
    from peraxis_tools.chain import ChainLog, UpdateResult, compact, log, update
    from peraxis_tools.compress import CompressOptions, CompressResult, compress
    from peraxis_tools.convert import convert
    from peraxis_tools.deltas.signatures import SignResult, sign
    from peraxis_tools.diff import DiffResult, diff
    from peraxis_tools.errors import CheckFailedError, ToolError
    from peraxis_tools.evaluate import EvaluateResult, evaluate
    from peraxis_tools.extract import ExtractResult, extract
    from peraxis_tools.inspect import InspectResult, inspect
    from peraxis_tools.load import PxdForCausalLM, load, load_model
    from peraxis_tools.merge import MergeResult, Mixture, merge, merge_parts
    from peraxis_tools.publish import PublishResult, publish
    from peraxis_tools.pull import PullResult, pull
    from peraxis_tools.split import SplitResult, split
    from peraxis_tools.verify import VerifyResult, verify

# In the usual order of use: make and read a file, get weights from it, work with several, publish it.
__all__ = [
    "compress",
    "open",
    "inspect",
    "verify",
    "apply",
    "load",
    "load_model",
    "PxdForCausalLM",
    "apply_",
    "VariantSwitch",
    "serve",
    "forget_digests",
    "update",
    "compact",
    "log",
    "UpdateWriter",
    "ShardedUpdateWriter",
    "PublishUpdates",
    "follow",
    "diff",
    "merge",
    "merge_parts",
    "split",
    "convert",
    "evaluate",
    "sign",
    "publish",
    "pull",
    "extract",
    "DeltaFile",
    "CompressOptions",
    "Mixture",
    "Shard",
    "Variant",
    "Swap",
    "Served",
    "Follower",
    "Poll",
    "Published",
    "Applied",
    "ApplyResult",
    "ChainLog",
    "CompressResult",
    "DiffResult",
    "EvaluateResult",
    "ExtractResult",
    "InspectResult",
    "MergeResult",
    "PublishResult",
    "PullResult",
    "SignResult",
    "SplitResult",
    "UpdateResult",
    "VerifyResult",
    "PxdError",
    "ToolError",
    "CheckFailedError",
    "CheckpointError",
    "LiveModelError",
    "SwapError",
    "UpdateError",
    "TornError",
    "BackendError",
    "ArgumentError",
    "__version__",
]

# Module -> the names that it gives.
_MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "peraxis_format": (
        "open",
        "DeltaFile",
        "PxdError",
        "CheckpointError",
        "BackendError",
        "ArgumentError",
        "__version__",
    ),
    "peraxis_format.errors": ("LiveModelError", "TornError"),
    "peraxis_format.torch": (
        "apply_",
        "VariantSwitch",
        "serve",
        "Served",
        "Shard",
        "Swap",
        "SwapError",
        "Applied",
        "Variant",
        "forget_digests",
    ),
    "peraxis_format.torch.updates": (
        "UpdateWriter",
        "ShardedUpdateWriter",
        "follow",
        "Follower",
        "Poll",
        "Published",
        "UpdateError",
    ),
    "peraxis_format.torch.updates.callback": ("PublishUpdates",),
    "peraxis_tools.apply": ("apply", "ApplyResult"),
    "peraxis_tools.chain": ("update", "compact", "log", "ChainLog", "UpdateResult"),
    "peraxis_tools.compress": ("compress", "CompressOptions", "CompressResult"),
    "peraxis_tools.convert": ("convert",),
    "peraxis_tools.diff": ("diff", "DiffResult"),
    "peraxis_tools.errors": ("ToolError", "CheckFailedError"),
    "peraxis_tools.evaluate": ("evaluate", "EvaluateResult"),
    "peraxis_tools.extract": ("extract", "ExtractResult"),
    "peraxis_tools.inspect": ("inspect", "InspectResult"),
    "peraxis_tools.load": ("load", "load_model", "PxdForCausalLM"),
    "peraxis_tools.merge": ("merge", "merge_parts", "MergeResult", "Mixture"),
    "peraxis_tools.publish": ("publish", "PublishResult"),
    "peraxis_tools.pull": ("pull", "PullResult"),
    "peraxis_tools.deltas.signatures": ("sign", "SignResult"),
    "peraxis_tools.split": ("split", "SplitResult"),
    "peraxis_tools.verify": ("verify", "VerifyResult"),
}
_HOMES: Final[Mapping[str, str]] = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
