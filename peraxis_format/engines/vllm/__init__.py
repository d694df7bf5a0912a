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

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peraxis_format.engines.vllm.offline import remove, update, use

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


def __getattr__(name: str) -> Any:
    """Import the functions for an offline `LLM` at their first use, because they need torch."""
    if name not in ("remove", "update", "use"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("peraxis_format.engines.vllm.offline"), name)
