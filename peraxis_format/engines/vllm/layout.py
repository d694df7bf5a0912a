"""All code that depends on vLLM's names: its classes, and the places of checkpoint tensors in its layers.

    vLLM layer                    checkpoint tensor                          piece of rank r of n
    QKVParallelLinear             q_proj, k_proj, v_proj, or one fused       heads; k and v heads may be repeated
    MergedColumnParallelLinear    gate_proj, up_proj, or one fused           rows [r, r + 1) / n of each
    ColumnParallelLinear          itself                                     rows [r, r + 1) / n
    RowParallelLinear             itself                                     columns [r, r + 1) / n; the bias whole
    VocabParallelEmbedding        itself, without the padding rows           rows of the vocabulary
    any other layer               itself                                     whole

Names are looked up when this module is imported; a missing one is a LiveModelError. This was checked with vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from peraxis_format.errors import LiveModelError
from peraxis_format.manifest import Manifest
from peraxis_format.torch import FUSED, ShardView

__all__ = [
    "AsyncModelRunnerOutput",
    "DefaultModelLoader",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "LinearBase",
    "Placed",
    "RequestStatus",
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
    "keep_unpacked",
    "placed_tensors",
    "plain_tensors",
    "planned_scheduler",
    "register_engine",
    "refuse_uncovered",
    "register_loader",
    "replace_scheduler",
    "tensor_group",
    "views",
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
_Column: Any = _name(_LINEAR, "ColumnParallelLinear")
_Merged: Any = _name(_LINEAR, "MergedColumnParallelLinear")
_QKV: Any = _name(_LINEAR, "QKVParallelLinear")
_Row: Any = _name(_LINEAR, "RowParallelLinear")
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


# --- places of checkpoint tensors ------------------------------------------------------------------------

_Box: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A piece of a checkpoint tensor in a layer of this rank.

    box: of the checkpoint tensor. rows: [begin, end) of the layer's parameter.
    """

    module: nn.Module
    parameter: str
    rows: tuple[int, int]
    box: _Box

    @property
    def view(self) -> Tensor:
        """The live storage, as a plain tensor of the box's shape."""
        tensor = plain(getattr(self.module, self.parameter))
        return tensor[self.rows[0] : self.rows[1]] if tensor.ndim else tensor


def plain(tensor: Tensor) -> Tensor:
    """The same storage without vLLM's parameter class."""
    return tensor.detach().as_subclass(Tensor)


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under each of its names, as plain tensors."""
    return {name: plain(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}


def views(model: nn.Module, manifest: Manifest) -> dict[str, tuple[ShardView, ...]]:
    """The live storages of this rank for each name in a manifest; names that the model lacks are left out."""
    found = placed_tensors(model, manifest)
    return {name: tuple(ShardView(p.box, p.view) for p in places) for name, places in found.items()}


def placed_tensors(model: nn.Module, manifest: Manifest) -> dict[str, tuple[Placed, ...]]:
    """The pieces in the layers of this rank for each name in a manifest; names that the model lacks are left out."""
    live: dict[str, list[Placed]] = {}
    packed = getattr(model, "packed_modules_mapping", None) or FUSED
    for owner, module in model.named_modules():
        for name, piece in _pieces(owner, module, packed):
            live.setdefault(name, []).append(piece)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    rename = (lambda name: name) if mapper is None else mapper.get_rename_mapper().map_name
    names = [*(entry.name for entry in manifest.modules), *(alias for _, alias in manifest.tied)]
    found = {name: live.get(rename(name) or "") for name in names}
    return {name: tuple(pieces) for name, pieces in found.items() if pieces}


def refuse_uncovered(model: nn.Module, manifest: Manifest) -> None:
    """Raise LiveModelError if a linear, an embedding or lm_head has a tensor that the fine-tune does not have.

    A manifest names every tensor (SPEC 3.7), so the layer would still use the base's weights.
    """
    pieces = [piece for found in placed_tensors(model, manifest).values() for piece in found]
    covered = {getattr(piece.module, piece.parameter).data_ptr() for piece in pieces}
    for owner, module in model.named_modules():
        if not isinstance(module, LinearBase | VocabParallelEmbedding):
            continue
        for parameter, tensor in module._parameters.items():
            if tensor is not None and tensor.numel() and tensor.data_ptr() not in covered:
                raise LiveModelError(f"the fine-tune has nothing for {owner}.{parameter}, which the model uses")


def _pieces(owner: str, module: nn.Module, packed: Any) -> Iterator[tuple[str, Placed]]:
    """(name, piece) for each checkpoint tensor in a layer's own parameters."""
    for parameter, tensor in module._parameters.items():
        if tensor is None or not tensor.numel():
            continue
        prefix, _, word = owner.rpartition(".")
        members = list(packed.get(word, ())) if isinstance(module, _QKV | _Merged) else []
        segments = _segments(module, tensor)
        if len(members) != len(segments):
            name, at = f"{owner}.{parameter}" if owner else parameter, 0
            for full, begin, rows in segments:
                yield name, Placed(module, parameter, rows, _box(module, parameter, tensor, at + begin, rows))
                at += full
            continue
        for member, (_, begin, rows) in zip(members, segments, strict=True):
            name = f"{prefix}.{member}.{parameter}" if prefix else f"{member}.{parameter}"
            yield name, Placed(module, parameter, rows, _box(module, parameter, tensor, begin, rows))


_Segment: TypeAlias = tuple[int, int, tuple[int, int]]  # rows in the checkpoint, first row here, rows of the parameter


def _segments(module: Any, tensor: Tensor) -> list[_Segment]:
    """The ranges of rows of a layer's parameter, in order."""
    rank = int(getattr(module, "tp_rank", 0))
    count = tensor.shape[0] if tensor.ndim else 1
    if isinstance(module, VocabParallelEmbedding):
        indices = module.shard_indices
        begin, end = int(indices.org_vocab_start_index), int(indices.org_vocab_end_index)
        return [(end, begin, (0, end - begin))]
    if isinstance(module, _QKV):
        key_rank = rank // module.num_kv_head_replicas
        sizes = [
            (module.total_num_heads, module.num_heads, module.head_size, rank),
            (module.total_num_kv_heads, module.num_kv_heads, module.head_size, key_rank),
            (module.total_num_kv_heads, module.num_kv_heads, module.v_head_size, key_rank),
        ]
        return _stacked([(total * size, own * size, at) for total, own, size, at in sizes])
    if isinstance(module, _Merged):
        return _stacked([(size, size // module.tp_size, rank) for size in module.output_sizes])
    if isinstance(module, _Column):
        return [(module.output_size, rank * count, (0, count))]
    return [(count, 0, (0, count))]


def _stacked(sizes: Sequence[tuple[int, int, int]]) -> list[_Segment]:
    """Consecutive segments, from (rows in the checkpoint, rows here, index of the piece)."""
    found, at = [], 0
    for full, own, piece in sizes:
        found.append((full, piece * own, (at, at + own)))
        at += own
    return found


def _box(module: Any, parameter: str, tensor: Tensor, begin: int, rows: tuple[int, int]) -> _Box:
    if not tensor.ndim:
        return ()
    rest = [(0, size) for size in tensor.shape[1:]]
    if isinstance(module, _Row) and parameter == "weight":
        width = tensor.shape[1]
        rest[0] = (module.tp_rank * width, (module.tp_rank + 1) * width)
    return ((begin, begin + rows[1] - rows[0]), *rest)
