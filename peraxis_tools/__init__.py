"""The tools of peraxis as a library: each verb of the command line is a function with a typed result.

    import peraxis_tools

    peraxis_tools.compress("base", "fine-tuned", "delta.pxd", calibration="c4")
    model = peraxis_tools.load_model("base", "delta.pxd")
    model, tokenizer = peraxis_tools.load("me/delta")

A verb has the name of its module and is imported at its first use. So importing this package is cheap, and
`peraxis_tools.inspect` is always the function.
"""

from __future__ import annotations

import sys

# This module is imported before Ctrl-C is handled (interrupts.py), so only type checkers import `typing` and `types`.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from peraxis_format import __version__
    from peraxis_tools.apply import apply
    from peraxis_tools.compress import compress
    from peraxis_tools.diff import diff
    from peraxis_tools.evaluate import evaluate
    from peraxis_tools.inspect import inspect
    from peraxis_tools.load import PxdForCausalLM, load, load_model
    from peraxis_tools.merge import merge
    from peraxis_tools.verify import verify
else:
    ModuleType = type(sys)

__all__ = [
    "__version__",
    "PxdForCausalLM",
    "apply",
    "compress",
    "diff",
    "evaluate",
    "inspect",
    "load",
    "load_model",
    "merge",
    "verify",
]

_HOMES = {name: f"peraxis_tools.{name}" for name in __all__[1:]} | {
    "load_model": "peraxis_tools.load",
    "PxdForCausalLM": "peraxis_tools.load",
    "__version__": "peraxis_format",
}


class _Package(ModuleType):
    """Keeps the import system from replacing a verb's function by its module."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        import importlib

        function = getattr(importlib.import_module(_HOMES[name]), name)
        super().__setattr__(name, function)
        return function


sys.modules[__name__].__class__ = _Package
