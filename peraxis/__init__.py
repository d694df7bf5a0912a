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
    from peraxis_format import PxdError, __version__, open
    from peraxis_format.torch import VariantSwitch, apply_, serve
    from peraxis_tools.apply import apply
    from peraxis_tools.compress import compress
    from peraxis_tools.convert import convert
    from peraxis_tools.diff import diff
    from peraxis_tools.errors import ToolError
    from peraxis_tools.evaluate import evaluate
    from peraxis_tools.extract import extract
    from peraxis_tools.inspect import inspect
    from peraxis_tools.load import PxdForCausalLM, load, load_model
    from peraxis_tools.merge import merge, merge_parts
    from peraxis_tools.publish import publish
    from peraxis_tools.pull import pull
    from peraxis_tools.signatures import sign
    from peraxis_tools.split import split
    from peraxis_tools.verify import verify

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
    "PxdError",
    "ToolError",
    "__version__",
]

# Name -> (module, name in that module).
_HOMES: Final[Mapping[str, tuple[str, str]]] = {
    **{name: (f"peraxis_tools.{name}", name) for name in ("compress", "inspect", "verify", "apply", "diff", "merge")},
    **{name: (f"peraxis_tools.{name}", name) for name in ("split", "convert", "evaluate")},
    **{name: (f"peraxis_tools.{name}", name) for name in ("publish", "pull", "extract")},
    **{name: ("peraxis_format.torch", name) for name in ("apply_", "VariantSwitch", "serve")},
    **{name: ("peraxis_format", name) for name in ("open", "PxdError", "__version__")},
    **{name: ("peraxis_tools.load", name) for name in ("load", "load_model", "PxdForCausalLM")},
    "sign": ("peraxis_tools.signatures", "sign"),
    "merge_parts": ("peraxis_tools.merge", "merge_parts"),
    "ToolError": ("peraxis_tools.errors", "ToolError"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
