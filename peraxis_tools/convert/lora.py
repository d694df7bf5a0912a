"""Convert a .pxd to a LoRA adapter for PEFT: the truncated singular value decomposition of each delta.

    D ~ B A      B [d_out, r] = U_r sqrt(S_r)      A [r, d_in] = sqrt(S_r) V_r^T      error = ||D - B A|| / ||D||

A matrix of signs has a nearly flat spectrum, so a small rank approximates it poorly; the report has the error of each
module. Tensors with the encoding `full` (norms, embeddings) are stored whole through `modules_to_save`, biases through
`bias`. Exact updates need the base: matrices are decomposed, and other tensors are stored whole. Factors are F32.
routes.py decides for each tensor.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import peraxis_format as pxd
from peraxis_tools.checkpoints.checkpoint import Checkpoint, open_checkpoint
from peraxis_tools.checkpoints.tensor_files import save_tensors
from peraxis_tools.convert.experts import ExpertFactors, fused_factors, wrapper_keys
from peraxis_tools.convert.lowrank import DenseRows, ExactRows, low_rank, whole_spectrum
from peraxis_tools.convert.routes import Route, RouteKind, routes_of
from peraxis_tools.convert.targets import LayerKind, ParameterPlace, targets_of
from peraxis_tools.deltas.factors import module_sum
from peraxis_tools.deltas.parts import refuse_part
from peraxis_tools.deltas.rebuild import rebuild
from peraxis_tools.deltas.rows import base_rows, delta_rows, row_blocks
from peraxis_tools.deltas.unpacked import has_exact, unpacked
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Progress, watched
from peraxis_tools.display.shown import counted
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs.folders import atomic_folder
from peraxis_tools.outputs.rules import claim_folder
from peraxis_tools.process.optional import require

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LeftOut", "LoraModule", "LoraResult", "to_lora"]

_PREFIX: Final = "base_model.model."
_LINEAR_NAMES: Final = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """One adapted module: its rank, and ||D - BA|| / ||D||."""

    name: str
    rank: int
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A tensor that the adapter does not contain, and the reason. unmeasured: why its change is in no figure, if so."""

    name: str
    reason: str
    unmeasured: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraResult:
    """The result of `to_lora`.

    error: relative, by root of sums of squares, over all known deltas; a tensor that is left out counts as lost. Exact
    tensors are included if the base was given. uncounted: exact tensors that are left out and not in `error`.
    """

    path: Path
    content_id: str
    error: float
    bytes: int
    modules: tuple[LoraModule, ...]
    saved_whole: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    biases: tuple[str, ...] = ()
    uncounted: int = 0


@dataclass(slots=True)
class _Adapter:
    delta: pxd.DeltaFile
    base: Checkpoint | None
    routes: Mapping[str, Route]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    experts: dict[ParameterPlace, list[ExpertFactors]] = field(default_factory=dict)
    kinds: set[LayerKind] = field(default_factory=set)
    modules: list[LoraModule] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    square_error: float = 0.0
    square_norm: float = 0.0


def to_lora(
    path: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = None,
) -> LoraResult:
    """Write a PEFT folder. Pass rank (for all modules), or max_error: each module gets the least rank below it.

    A module whose factors, which are binary32, cannot be that close gets its full rank, and a note says so.
    base: a folder, a file or a hub id. It gives tensors that PEFT needs beside the delta (the bias of a norm that is
    saved whole), and the size of exact changes. Raises ToolError if nothing can be adapted, PxdError, CheckpointError,
    OSError.
    """
    require("a LoRA adapter", "torch")
    if (rank is None) == (max_error is None):
        raise ToolError("pass either rank (--rank) or max_error (--max-error)")
    output = Path(output)
    with ExitStack() as stack:
        stack.enter_context(claim_folder(output, overwrite=overwrite, inputs=(path, base)))
        opened = stack.enter_context(pxd.open(path))
        refuse_part(opened.manifest, path)
        if base is None and has_exact(opened.manifest):
            raise ToolError(f"{path}: has exact updates, whose deltas need the base; pass the base (--base)")
        checkpoint = None if base is None else stack.enter_context(open_checkpoint(base))
        if checkpoint is not None:
            pxd.check_base(opened.manifest, checkpoint.tensors)
        delta = unpacked(opened, None if checkpoint is None else checkpoint.tensors)
        targets = targets_of(delta, checkpoint)
        entries = {entry.name: entry for entry in delta.manifest.modules}
        held = () if checkpoint is None else checkpoint.tensors
        adapter = _Adapter(delta, checkpoint, routes_of(entries, targets, held))
        step = stack.enter_context(watched(progress, "convert", delta.data_size))
        for entry in delta.manifest.modules:
            if entry.name in adapter.routes:
                _add(adapter, entry, rank, max_error)
            step(delta.payload_bytes(entry.name))
        if not adapter.modules:
            reasons = sorted({item.reason for item in adapter.left_out})
            why = f": each {'; or '.join(reasons)}" if reasons else ""
            raise ToolError(f"{path}: has no matrix that a LoRA adapter can represent{why}")
        _fuse_experts(adapter)
        _save(adapter, output, _config(adapter, delta.manifest, targets.task), overwrite=overwrite)
        _note_missed(adapter.modules, max_error)
        return LoraResult(
            path=output,
            content_id=delta.content_id,
            error=math.sqrt(adapter.square_error / adapter.square_norm) if adapter.square_norm else 0.0,
            bytes=sum(file.stat().st_size for file in output.glob("adapter_*")),
            modules=tuple(adapter.modules),
            saved_whole=tuple(adapter.whole),
            left_out=tuple(adapter.left_out),
            biases=tuple(adapter.biases),
            uncounted=sum(item.unmeasured is not None for item in adapter.left_out),
        )


def _note_missed(modules: Sequence[LoraModule], max_error: float | None) -> None:
    """Note the modules above the bound: below about 1e-6 the rounding of binary32 is larger, whatever the rank."""
    missed = [module for module in modules if max_error is not None and module.error > max_error]
    if missed:
        worst = max(missed, key=lambda module: module.error)
        note(
            f"{counted(len(missed), 'module')} above max_error (--max-error), up to {worst.error:.4g} ({worst.name}): "
            "the factors are binary32, whose rounding is larger than this bound"
        )


def _save(adapter: _Adapter, output: Path, config: Mapping[str, Any], *, overwrite: bool) -> None:
    with atomic_folder(output, overwrite=overwrite) as folder:
        save_tensors(adapter.tensors, folder / "adapter_model.safetensors", output)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        # safetensors makes the file readable for its owner alone.
        shutil.copymode(folder / "adapter_config.json", folder / "adapter_model.safetensors")


def _add(adapter: _Adapter, entry: pxd.ModuleEntry, rank: int | None, max_error: float | None) -> None:
    """Add one changed module to the adapter, or count it as lost."""
    route = adapter.routes[entry.name]
    place = route.place
    if route.kind is RouteKind.LEAVE or place is None:
        unmeasured = _unmeasured(adapter, entry)
        adapter.left_out.append(LeftOut(name=entry.name, reason=route.reason, unmeasured=unmeasured))
        lost = _square(adapter, entry) if unmeasured is None else 0.0
        adapter.square_error += lost
        adapter.square_norm += lost
        return
    if route.kind is RouteKind.ADAPT:
        _decompose(adapter, entry, place, _matrix(adapter, entry), rank, max_error)
        return
    adapter.square_norm += _square(adapter, entry) if _unmeasured(adapter, entry) is None else 0.0
    if route.kind is RouteKind.WHOLE:
        adapter.whole.append(entry.name)
        if place.layer not in adapter.layers:
            adapter.layers.append(place.layer)
            for parameter, name in route.parts:
                adapter.tensors[f"{_PREFIX}{place.layer}.{parameter}"] = _tensor(adapter, name)
        return
    layer = place.layer
    if any(other.kind is RouteKind.WHOLE and other.place and other.place.layer == layer for other in _routes(adapter)):
        adapter.whole.append(entry.name)
        return
    adapted = any(r.kind is RouteKind.ADAPT and r.place and r.place.layer == layer for r in _routes(adapter))
    adapter.biases.append(entry.name)
    adapter.tensors[f"{_PREFIX}{layer}.{'base_layer.' if adapted else ''}bias"] = _tensor(adapter, entry.name)


def _matrix(adapter: _Adapter, entry: pxd.ModuleEntry) -> DenseRows:
    """The delta of a matrix by rows: its components, or the difference of an exact update and the base."""
    module = adapter.delta.load(entry.name)
    if entry.encoding is not pxd.Encoding.EXACT or adapter.base is None:
        return module_sum(module)
    return ExactRows(module, base_rows(adapter.base.tensors, entry))


def _routes(adapter: _Adapter) -> Collection[Route]:
    return adapter.routes.values()


def _tensor(adapter: _Adapter, name: str) -> Tensor:
    """A tensor of the fine-tune with the encoding `full`, or the base's."""
    from peraxis_format.ops.tensors import from_storage

    entry = adapter.delta.entry(name)
    if entry.encoding is pxd.Encoding.FULL:
        return from_storage(np.array(adapter.delta.load(name).full), entry.dtype)
    if adapter.base is None:
        raise ToolError(f"{name}: needs the base; pass base (--base)")
    return from_storage(rebuild(adapter.delta, adapter.base.tensors, name), entry.dtype)


def _unmeasured(adapter: _Adapter, entry: pxd.ModuleEntry) -> str | None:
    """Why a module's change has no size, as an attribute of the tensor; None if it has one."""
    if entry.components:
        return None
    if entry.base is None:
        return "new"
    if entry.base.shape != entry.shape:
        return "of another shape than in the base"
    if not (entry.dtype.is_float and entry.base.dtype.is_float):
        return "of no floating-point type"
    return "known only with --base" if adapter.base is None else None


def _square(adapter: _Adapter, entry: pxd.ModuleEntry) -> float:
    """The square norm of a module's change, which has a size (`_unmeasured`)."""
    if entry.components:
        module = adapter.delta.load(entry.name)
        blocks = (delta_rows(module, rows, None) for rows in row_blocks(module.covered))
        return math.fsum(float(np.square(block, dtype=np.float64).sum()) for block in blocks)
    if adapter.base is None or entry.base is None:
        raise pxd.ShapeError(f"{entry.name}: has no base tensor")
    full = pxd.to_float32(np.array(adapter.delta.load(entry.name).full), entry.dtype)
    array = adapter.base.tensors.read(entry.name)
    pxd.check_base_bytes(entry, array)
    before = pxd.to_float32(array, entry.base.dtype)
    return float(np.square(full - before, dtype=np.float64).sum())


def _decompose(
    adapter: _Adapter,
    entry: pxd.ModuleEntry,
    place: ParameterPlace,
    terms: DenseRows,
    rank: int | None,
    max_error: float | None,
) -> None:
    import torch

    if rank is not None and rank < min(terms.shape) // 4:
        found = low_rank(terms, rank)
    else:
        found = whole_spectrum(terms, rank, max_error)
    adapter.square_error += found.square_error
    adapter.square_norm += found.square_norm
    error = math.sqrt(found.square_error / found.square_norm) if found.square_norm else 0.0
    adapter.modules.append(LoraModule(name=entry.name, rank=found.left.shape[1], error=error))
    if place.kind is LayerKind.EXPERTS:
        whole = replace(place, index=0, first=0)
        part = ExpertFactors(index=place.index, first=place.first, left=found.left, right=found.right)
        adapter.experts.setdefault(whole, []).append(part)
        return
    if place.kind is LayerKind.PARAMETER:
        adapter.parameters[f"{place.layer}.weight"] = found.left.shape[1]
    else:
        adapter.ranks[place.layer] = found.left.shape[1]
    adapter.kinds.add(place.kind)
    b, a = torch.from_numpy(found.left), torch.from_numpy(found.right)
    layer = f"{_PREFIX}{place.layer}"
    if place.kind in (LayerKind.LINEAR, LayerKind.PARAMETER):
        adapter.tensors[f"{layer}.lora_A.weight"] = a.contiguous()
        adapter.tensors[f"{layer}.lora_B.weight"] = b.contiguous()
        return
    # An embedding [rows, width] and a Conv1D [d_in, d_out] are transposed linear weights: D^T = A^T B^T.
    names = ("lora_embedding_A", "lora_embedding_B") if place.kind is LayerKind.EMBEDDING else _LINEAR_NAMES
    adapter.tensors[f"{layer}.{names[0]}"] = b.t().contiguous()
    adapter.tensors[f"{layer}.{names[1]}"] = a.t().contiguous()


def _fuse_experts(adapter: _Adapter) -> None:
    """Assemble the factors of fused experts for each parameter."""
    import torch

    layers: dict[str, list[str]] = {}
    for place in adapter.experts:
        layers.setdefault(place.layer, []).append(place.parameter)
    order = {place.layer: place.siblings for place in adapter.experts}
    keys = wrapper_keys({layer: sorted(names, key=order[layer].index) for layer, names in layers.items()})
    for place, parts in adapter.experts.items():
        experts, d_out, d_in = place.stack
        a, b, rank = fused_factors(parts, (experts, d_out, d_in))
        adapter.parameters[f"{place.layer}.{place.parameter}"] = rank
        key = f"{_PREFIX}{keys[place.layer, place.parameter]}"
        adapter.tensors[f"{key}.lora_A.weight"] = torch.from_numpy(a)
        adapter.tensors[f"{key}.lora_B.weight"] = torch.from_numpy(b)


def _config(adapter: _Adapter, manifest: pxd.Manifest, task: str | None) -> dict[str, Any]:
    """The content of adapter_config.json: full names, and alpha = r everywhere, so that the scaling is 1."""
    ranks = adapter.ranks | adapter.parameters
    common = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": manifest.base.id,
        "revision": manifest.base.revision,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(adapter.ranks),
        **({"target_parameters": sorted(adapter.parameters)} if adapter.parameters else {}),
        "modules_to_save": adapter.layers or None,
        "bias": "all" if adapter.biases else "none",
        "fan_in_fan_out": adapter.kinds == {LayerKind.CONV1D},
        "inference_mode": True,
        "lora_dropout": 0.0,
    }
