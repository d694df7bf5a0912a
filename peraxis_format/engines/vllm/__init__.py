"""peraxis in vLLM: start from base + delta, swap the whole model, serve many fine-tunes in one batch.

    cold start      vllm serve BASE --load-format peraxis --model-loader-extra-config '{"delta": "legal.pxd"}'
    live swap       VLLM_PLUGINS=peraxis vllm serve BASE --load-format peraxis \\
                        --weight-transfer-config '{"backend": "peraxis"}'
    one batch       vllm serve BASE --worker-cls peraxis_format.engines.vllm.worker.PeraxisWorker --enforce-eager \\
                        --enable-lora --lora-modules legal=legal.pxd medical=medical.pxd

vLLM finds the plug-in by its entry points, in every process. docs/engines.md compares the three ways. From Python:

    from peraxis_format.engines.vllm import use

    llm = LLM("BASE", load_format="peraxis", weight_transfer_config={"backend": "peraxis"})
    use(llm, "legal.pxd");  use(llm, None)
"""

from __future__ import annotations

from typing import Any

__all__ = ["endpoints", "register", "remove", "update", "use"]


def register() -> None:
    """The entry point `vllm.general_plugins`. vLLM may call it several times in one process."""
    from peraxis_format.engines.vllm.loader import PeraxisModelLoader
    from peraxis_format.engines.vllm.names import add_worker_method, register_engine, register_loader, replace_scheduler
    from peraxis_format.engines.vllm.scheduler import maker
    from peraxis_format.engines.vllm.transfer import CALL_WORKER, call_worker

    register_loader("peraxis", PeraxisModelLoader)
    register_engine("peraxis", "peraxis_format.engines.vllm.transfer", "PeraxisWeightTransferEngine")
    replace_scheduler(maker)
    add_worker_method(CALL_WORKER, call_worker)


def endpoints() -> Any:
    """The entry point `vllm.endpoint_plugins`: routes under /v1/peraxis, added if VLLM_PLUGINS names peraxis."""
    from peraxis_format.engines.vllm.routes import PeraxisEndpoints

    return PeraxisEndpoints()


def use(llm: Any, delta: str | None) -> str:
    """Swap the whole model of an `LLM` to a fine-tune, or back to the base with None. Returns the weight version.

    The first use of a delta stages it. Raises the engine's error, which quotes the cause; the model is then unchanged.
    """
    from peraxis_format.engines.vllm.offline import use as used

    return used(llm, delta)


def update(llm: Any, path: str) -> str:
    """Apply one exact update, or an anchor, to the whole model of an `LLM`, permanently. Returns the version.

    Staged deltas have to be removed before. Raises the engine's error, which quotes the cause; the model is then
    unchanged.
    """
    from peraxis_format.engines.vllm.offline import update as updated

    return updated(llm, path)


def remove(llm: Any, delta: str) -> None:
    """Free a delta that `use` staged and that is not in use."""
    from peraxis_format.engines.vllm.offline import remove as removed

    removed(llm, delta)
