"""All code that imports from vLLM: its classes, its hooks, and the questions to its configuration.

Names are looked up when this module is imported; a missing one is a LiveModelError. This was checked with vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional

from peraxis_format.errors import LiveModelError

__all__ = [
    "AsyncModelRunnerOutput",
    "ColumnParallelLinear",
    "DefaultModelLoader",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "LinearBase",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "RequestStatus",
    "RowParallelLinear",
    "Scheduler",
    "VocabParallelEmbedding",
    "WeightTransferEngine",
    "WeightTransferInitInfo",
    "WeightTransferUpdateInfo",
    "adapter_not_found",
    "add_worker_method",
    "all_reduce",
    "caches_prefixes",
    "drop_packed",
    "is_eager",
    "is_one_host",
    "is_v2_runner",
    "keep_unpacked",
    "planned_scheduler",
    "register_engine",
    "register_loader",
    "replace_scheduler",
    "samples_in_shards",
    "speculates",
    "tensor_group",
    "worker_class",
]

_TESTED: Final = "0.32"
_UNPACKED_FLAG: Final = "_cpu_skip_gemm_dispatch"
_PLANNED: Final = "peraxis_planned"


def _name(module: str, name: str) -> Any:
    """Look up `vllm.<module>.<name>`. Raises LiveModelError if this vLLM does not have it."""
    try:
        return getattr(import_module(f"vllm.{module}"), name)
    except (ImportError, AttributeError):
        version = getattr(import_module("vllm"), "__version__", "of an unknown version")
        raise LiveModelError(
            f"vLLM {version} has no vllm.{module}.{name}, which peraxis needs; use vLLM {_TESTED}"
        ) from None


_LINEAR: Final = "model_executor.layers.linear"
_VOCAB: Final = "model_executor.layers.vocab_parallel_embedding"
_TRANSFER: Final = "distributed.weight_transfer.base"

DefaultModelLoader: Any = _name("model_executor.model_loader.default_loader", "DefaultModelLoader")
LinearBase: Any = _name(_LINEAR, "LinearBase")
VocabParallelEmbedding: Any = _name(_VOCAB, "VocabParallelEmbedding")
WeightTransferEngine: Any = _name(_TRANSFER, "WeightTransferEngine")
WeightTransferInitInfo: Any = _name(_TRANSFER, "WeightTransferInitInfo")
WeightTransferUpdateInfo: Any = _name(_TRANSFER, "WeightTransferUpdateInfo")
AsyncModelRunnerOutput: Any = _name("v1.outputs", "AsyncModelRunnerOutput")
EngineCoreOutput: Any = _name("v1.engine", "EngineCoreOutput")
EngineCoreOutputs: Any = _name("v1.engine", "EngineCoreOutputs")
RequestStatus: Any = _name("v1.request", "RequestStatus")
Scheduler: Any = _name("v1.core.sched.scheduler", "Scheduler")
ColumnParallelLinear: Any = _name(_LINEAR, "ColumnParallelLinear")
MergedColumnParallelLinear: Any = _name(_LINEAR, "MergedColumnParallelLinear")
QKVParallelLinear: Any = _name(_LINEAR, "QKVParallelLinear")
RowParallelLinear: Any = _name(_LINEAR, "RowParallelLinear")
_platform: Any = _name("platforms", "current_platform")
_SchedulerConfig: Any = _name("config.scheduler", "SchedulerConfig")
_tensor_group: Any = _name("distributed.parallel_state", "get_tp_group")
_all_reduce: Any = _name("distributed", "tensor_model_parallel_all_reduce")


# --- the engine's own hooks ------------------------------------------------------------------------------


def register_loader(load_format: str, loader: Any) -> None:
    """Make `--load-format <load_format>` use a loader. Further calls have no effect."""
    known = _name("model_executor.model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER")
    if load_format not in known:
        _name("model_executor.model_loader", "register_model_loader")(load_format)(loader)


def register_engine(backend: str, module: str, name: str) -> None:
    """Make `--weight-transfer-config '{"backend": ...}'` use an engine. Further calls have no effect."""
    factory = _name("distributed.weight_transfer.factory", "WeightTransferEngineFactory")
    if backend not in factory._registry:
        factory.register_engine(backend, module, name)


def replace_scheduler(maker: Callable[[Any], Callable[..., Any]]) -> None:
    """Let engines call `maker(planned)` instead of the planned scheduler class. It has an effect once per process."""
    planned = _SchedulerConfig.get_scheduler_cls
    if hasattr(planned, _PLANNED):
        return

    def get_scheduler_cls(self: Any) -> Any:
        return maker(planned(self))

    setattr(get_scheduler_cls, _PLANNED, planned)
    _SchedulerConfig.get_scheduler_cls = get_scheduler_cls


def planned_scheduler(config: Any) -> Any:
    """The scheduler class that a SchedulerConfig plans; None if `replace_scheduler` was not called."""
    planned = getattr(_SchedulerConfig.get_scheduler_cls, _PLANNED, None)
    return None if planned is None else planned(config)


def add_worker_method(name: str, method: Callable[..., Any]) -> None:
    """Let `collective_rpc(name, ...)` call this function of a worker."""
    setattr(_name("v1.worker.worker_base", "WorkerBase"), name, method)


def adapter_not_found(name: str, path: str) -> Exception:
    """The error that vLLM's server answers with 404."""
    error: Exception = _name("exceptions", "LoRAAdapterNotFoundError")(name, path)
    return error


def worker_class() -> Any:
    """The worker class of this platform: CPU or CUDA."""
    return _name("v1.worker.cpu_worker", "CPUWorker") if _is_cpu() else _name("v1.worker.gpu_worker", "Worker")


def _is_cpu() -> bool:
    """Whether this vLLM runs on the CPU."""
    return bool(_platform.is_cpu())


def is_eager(config: Any) -> bool:
    """Whether a VllmConfig runs the model's Python code at each step, without compiling or capturing it."""
    return bool(config.model_config.enforce_eager)


def caches_prefixes(config: Any) -> bool:
    """Whether a VllmConfig keeps keys and values of prompts for later requests."""
    return bool(config.cache_config.enable_prefix_caching)


def is_v2_runner(config: Any) -> bool:
    """Whether a VllmConfig runs Model Runner V2 and not V1."""
    return bool(config.use_v2_model_runner)


def speculates(config: Any) -> bool:
    """Whether a VllmConfig proposes tokens and checks them, so that a request has several rows of logits."""
    return config.speculative_config is not None


def samples_in_shards(config: Any) -> bool:
    """Whether a VllmConfig sorts the rows of logits by the rank that samples them."""
    return bool(config.parallel_config.enable_batch_sharded_sampling)


def is_one_host(config: Any) -> bool:
    """Whether all ranks of a VllmConfig run on the host of the API server."""
    parallel = config.parallel_config
    return bool(parallel.nnodes == 1 and parallel.distributed_executor_backend in (None, "mp", "uni"))


def tensor_group() -> tuple[Any, int]:
    """The torch.distributed group of the tensor-parallel ranks, and their number."""
    group = _tensor_group()
    return group.device_group, group.world_size


def all_reduce(value: Tensor) -> Tensor:
    """The sum over the tensor-parallel ranks."""
    reduced: Tensor = _all_reduce(value)
    return reduced


# --- the CPU's packed weights ----------------------------------------------------------------------------


def keep_unpacked(model: nn.Module) -> None:
    """Make linears on the CPU keep `weight` and multiply with it. Call this before loading.

    By default vLLM packs it for oneDNN, multiplies with the packed copy and empties `weight`. An embedding always keeps
    its weight. Without packing, products are slower: 1.2 times at 64 rows, 1.9 to 2.5 times at one row.
    """
    if not _is_cpu():
        return
    method = _name(_LINEAR, "UnquantizedLinearMethod").process_weights_after_loading
    if _UNPACKED_FLAG not in method.__code__.co_consts:
        raise LiveModelError(f"this vLLM always packs linear weights on the CPU; use vLLM {_TESTED}")
    for module in model.modules():
        if isinstance(module, LinearBase):
            setattr(module, _UNPACKED_FLAG, True)


def drop_packed(model: nn.Module) -> None:
    """Make embeddings and lm_head on the CPU multiply with their weight. Call this when weights were written.

    vLLM multiplies with a packed copy, which still has the old weights. The bits of a product are the same. One of
    lm_head takes 1.8 times as long for one row and 1.2 times for 32; but packing it again would take a third of a swap.
    """
    if not _is_cpu():
        return
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.cpu_linear = functional.linear
