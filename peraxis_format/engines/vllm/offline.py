"""Swaps and exact updates of an offline `LLM`, in one call each."""

from __future__ import annotations

from typing import Any, Final
from weakref import WeakKeyDictionary

from peraxis_format.engines.vllm.source import open_delta
from peraxis_format.engines.vllm.transfer import CALL_WORKER, Calls, changing, staging
from peraxis_format.errors import LiveModelError

__all__ = ["BASE_VERSION", "remove", "update", "use"]

BASE_VERSION: Final = "base"
_STAGED: Final[WeakKeyDictionary[Any, dict[str, str]]] = WeakKeyDictionary()  # LLM -> delta -> content ID
_BASE: Final[WeakKeyDictionary[Any, str]] = WeakKeyDictionary()  # LLM -> the version of its weights without a variant


def use(llm: Any, delta: str | None) -> str:
    """Swap the whole model of an `LLM` to a fine-tune, or back to the base with None. Returns the weight version.

    The first use of a delta stages it. Raises the engine's error, which quotes the cause; the model is then unchanged.
    """
    staged = _STAGED.setdefault(llm, {})
    if delta is not None and delta not in staged:
        with open_delta(delta) as file:
            content_id = file.content_id
        _call(llm, staging({"add": {delta: delta}}))
        staged[delta] = content_id
    version = _BASE.get(llm, BASE_VERSION) if delta is None else staged[delta]
    _write(llm, {"variant": delta}, version)
    return version


def update(llm: Any, path: str) -> str:
    """Apply one exact update, or an anchor, to the whole model of an `LLM`, permanently. Returns the version.

    Staged deltas have to be removed before. Raises the engine's error, which quotes the cause; the model is then
    unchanged.
    """
    with open_delta(path) as file:
        version = file.content_id
    _call(llm, staging({"update": path}))
    _write(llm, {"update": version}, version)
    _BASE[llm] = version
    return version


def _write(llm: Any, info: dict[str, Any], version: str) -> None:
    _call(llm, changing(info))
    llm.update_weight_version(version)
    if not llm.reset_prefix_cache():
        raise LiveModelError("running requests use the prefix cache; finish them before the next `generate`")


def remove(llm: Any, delta: str) -> None:
    """Free a delta that `use` staged and that is not in use."""
    staged = _STAGED.get(llm, {})
    if delta not in staged:
        raise LiveModelError(f"{delta}: not staged; `use` stages it")
    _call(llm, staging({"remove": [delta]}))
    del staged[delta]


def _call(llm: Any, calls: Calls) -> None:
    errors = [error for error in llm.collective_rpc(CALL_WORKER, args=(calls,)) if error is not None]
    if errors:
        raise LiveModelError(errors[0])
