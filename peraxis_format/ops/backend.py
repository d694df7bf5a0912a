"""Choose the backend of an operation: one table, one environment variable, one log line.

An operation has a reference (the last backend of its row) and others, which give the same bits if SPEC requires it, and
otherwise stay within a stated bound. A row lists backends, the best first, each with the size from which it is chosen.
Below it the reference finishes before a compiler is imported.

    PERAXIS_BACKEND=numpy|numba|torch|triton    all operations that have this backend use it, the others their reference
    PERAXIS_LOG=debug                           one line on stderr for each choice (logger "peraxis")
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Final, Literal, TypeAlias

from peraxis_format.arguments import did_you_mean
from peraxis_format.errors import BackendError
from peraxis_format.ops.compiling import tell_compiling

__all__ = ["Operation", "available", "choose"]

_BACKENDS: Final = ("numpy", "numba", "torch", "triton")
# fmt: off
Operation: TypeAlias = Literal[
    "rebuild",
    "rebuild_tensor",
    "rebuild_transfer",
    "signed_matmul",
    "delta_sums",
    "sign_search",
    "mask_compare",
    "merge_rows",
    "exact",
]
_log: Final = logging.getLogger("peraxis")

_NEVER: Final = sys.maxsize  # only on request: Triton's interpreter on the CPU
_Row: TypeAlias = tuple[tuple[str, int], ...]
# Sizes are weights of the operands; of mask_compare bytes of a mask.
_TABLE: Final[Mapping[Operation, Mapping[str, _Row]]] = {
    "rebuild": {"cpu": (("numba", 1 << 20), ("numpy", 0))},
    "rebuild_tensor": {"cpu": (("numba", 1 << 18), ("torch", 0)), "cuda": (("torch", 0),)},
    "rebuild_transfer": {
        "cpu": (("numba", 1 << 20), ("triton", _NEVER), ("numpy", 0)),
        "cuda": (("triton", 0),),
    },
    "signed_matmul": {
        "cpu": (("numba", 1 << 18), ("triton", _NEVER), ("torch", 0)),
        "cuda": (("triton", 0), ("torch", 0)),
    },
    "delta_sums": {"cpu": (("numba", 0), ("numpy", 0))},
    "sign_search": {
        "cpu": (("numba", 0), ("triton", _NEVER), ("torch", 0)),
        "cuda": (("triton", 0), ("torch", 0)),
    },
    "mask_compare": {"cpu": (("numba", 1 << 16), ("numpy", 0))},
    "merge_rows": {"cpu": (("numba", 1 << 16), ("numpy", 0))},
    "exact": {"cpu": (("numba", 1 << 14), ("numpy", 0))},
}


def available(backend: str, device: str = "cpu") -> bool:
    """Whether a backend can run on a device ("cpu" or "cuda") of this machine.

    Triton runs on the CPU only in its interpreter (TRITON_INTERPRET=1). Raises BackendError for an unknown backend.
    """
    if backend not in _BACKENDS:
        hint = did_you_mean(backend, _BACKENDS)
        raise BackendError(f"backend {backend!r} is unknown; use one of {', '.join(_BACKENDS)}{hint}")
    if backend in ("numpy", "numba"):
        return device == "cpu" and (backend == "numpy" or (sys.byteorder == "little" and _installed("numba")))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _installed(backend) and (backend == "torch" or device == "cuda" or interpreted)


def choose(operation: Operation, size: int, device: str = "cpu", backend: str | None = None) -> str:
    """The backend for an operation on `size` weights.

    device: "cpu" or "cuda", a torch device's type. backend: the one to use. Raises BackendError if it is unknown, if
    the operation does not have it, or if it cannot run here.
    """
    _configure()
    row = _TABLE[operation].get(device, (("torch", 0),))
    names = [name for name, _ in row]
    forced = os.environ.get("PERAXIS_BACKEND") or None
    if backend is not None:
        chosen = _checked(operation, backend, device, names, "backend")
    elif forced is not None:
        everywhere = {name for each in _TABLE[operation].values() for name, _ in each}
        known = forced in everywhere or forced not in _BACKENDS
        chosen = _checked(operation, forced, device, names, "PERAXIS_BACKEND") if known else names[-1]
    else:
        chosen = next((name for name, least in row if size >= least and available(name, device)), names[-1])
    if chosen == "numba":
        tell_compiling()
    _log.debug("%s: %s (size %d, device %s)", operation, chosen, size, device)
    return chosen


def _checked(operation: Operation, backend: str, device: str, names: list[str], option: str) -> str:
    if backend in _BACKENDS and not _installed(backend):
        raise BackendError(f'{option}="{backend}" needs {backend}, which is not installed: pip install {backend}')
    if backend not in names:
        available(backend, device)  # raises for an unknown one
        raise BackendError(f'{option}="{backend}": {operation} on device {device} has {", ".join(names)}')
    if not available(backend, device):
        needed = "weights on a CUDA device" if backend == "triton" else "a little-endian machine"
        raise BackendError(f'{option}="{backend}" needs {needed}; use "{names[-1]}"')
    return backend


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _configure() -> None:
    """Set the logger to the level of PERAXIS_LOG and send it to stderr. Raises BackendError for an unknown level."""
    level = os.environ.get("PERAXIS_LOG", "").upper()
    if not level:
        return
    if level not in logging.getLevelNamesMapping():
        hint = did_you_mean(level, logging.getLevelNamesMapping()).lower()
        raise BackendError(f"PERAXIS_LOG={level.lower()} is not a level; use debug, info, warning or error{hint}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(level)
