"""A .pxd -> a LoRA adapter as PEFT loads it: each delta's truncated singular value decomposition.

    D ~ B A      B [d_out, r] = U_r sqrt(S_r)      A [r, d_in] = sqrt(S_r) V_r^T      error = ||D - B A|| / ||D||

A matrix of signs has a nearly flat spectrum, so that a small rank keeps little of it: the error is reported for each
module and is the point of this conversion's report. Exact tensors (norms, exact embeddings) go in whole, through
`modules_to_save`. Factors are F32. Which tensors LoRA cannot carry is reported, with the reason.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peraxis_format as pxd
from peraxis_tools.apply import to_torch
from peraxis_tools.convert.lowrank import LowRank, low_rank
from peraxis_tools.delta_parts import refuse_part
from peraxis_tools.errors import ToolError
from peraxis_tools.folders import atomic_folder
from peraxis_tools.kinds import kind_of
from peraxis_tools.merge.factors import Terms, module_terms
from peraxis_tools.outputs import claim_folder
from peraxis_tools.rows import delta_rows, row_blocks
from peraxis_tools.tensor_files import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LeftOut", "LoraModule", "LoraResult", "to_lora"]

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """One adapted module: its rank, and ||D - BA|| / ||D||."""

    name: str
    rank: int
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A tensor that the adapter does not carry, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraResult:
    """error: over all sign modules, by root of sums of squares; one that is left out counts as lost."""

    folder: Path
    content_id: str
    error: float
    bytes: int
    modules: tuple[LoraModule, ...]
    saved_whole: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(slots=True)
class _Adapter:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[LoraModule] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    square_error: float = 0.0
    square_norm: float = 0.0


def to_lora(
    path: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> LoraResult:
    """Write a PEFT folder. Either rank (for every module), or max_error: the least rank of each that stays below it.

    Raises ToolError where nothing can be adapted, PxdError, OSError.
    """
    if (rank is None) == (max_error is None):
        raise ToolError("pass either a rank or a largest error")
    output = Path(output)
    adapter = _Adapter()
    with claim_folder(output, overwrite=overwrite, inputs=(path,)), pxd.open(path) as delta:
        refuse_part(delta.manifest, path)
        tied = _tied(delta)
        for entry in delta.manifest.modules:
            _add(adapter, delta, entry, rank, max_error, tied=entry.name in tied)
            begin, end = delta.span(entry.name)
            (progress or (lambda _: None))(end - begin)
        if not adapter.modules:
            raise ToolError(f"{path}: holds no matrix that a LoRA adapter could carry")
        with atomic_folder(output, overwrite=overwrite) as folder:
            save_tensors(adapter.tensors, folder / "adapter_model.safetensors", output)
            config = _config(adapter, delta.manifest)
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            # safetensors lets nobody but its writer read the file.
            shutil.copymode(folder / "adapter_config.json", folder / "adapter_model.safetensors")
        return LoraResult(
            folder=output,
            content_id=delta.content_id,
            error=math.sqrt(adapter.square_error / adapter.square_norm) if adapter.square_norm else 0.0,
            bytes=sum(file.stat().st_size for file in output.glob("adapter_*")),
            modules=tuple(adapter.modules),
            saved_whole=tuple(adapter.whole),
            left_out=tuple(adapter.left_out),
        )


def _tied(delta: pxd.DeltaFile) -> set[str]:
    """Modules that another parameter shares: by the manifest, or by the configuration where the head is not stored."""
    tied = {name for name, _ in delta.manifest.tied}
    kinds = {entry.name: kind_of(entry.name, entry.shape) for entry in delta.manifest.modules}
    if any(asset.path == "config.json" for asset in delta.manifest.assets) and "lm_head" not in kinds.values():
        try:
            config = json.loads(delta.asset("config.json"))
        except ValueError:
            config = None
        if isinstance(config, dict) and config.get("tie_word_embeddings"):
            tied |= {name for name, kind in kinds.items() if kind == "embedding"}
    return tied


def _add(
    adapter: _Adapter,
    delta: pxd.DeltaFile,
    entry: pxd.ModuleEntry,
    rank: int | None,
    max_error: float | None,
    *,
    tied: bool,
) -> None:
    module, _, kind = entry.name.rpartition(".")
    if entry.encoding is pxd.Encoding.SAME and not entry.tensors():
        return
    reason = _cannot(entry, kind, tied=tied)
    if reason is not None:
        adapter.left_out.append(LeftOut(name=entry.name, reason=reason))
        if entry.components:
            lost = math.fsum(
                float(np.square(block, dtype=np.float64).sum()) for block in _dense_blocks(delta.load(entry.name))
            )
            adapter.square_error += lost
            adapter.square_norm += lost
    elif entry.encoding is pxd.Encoding.FULL:
        full = delta.load(entry.name).full
        adapter.tensors[f"{_PREFIX}{entry.name}"] = to_torch(np.array(full), entry.dtype)
        adapter.whole.append(module)
    else:
        _decompose(adapter, entry, module, module_terms(delta.load(entry.name)), rank, max_error)


def _dense_blocks(module: pxd.ModuleDelta) -> Iterator[Any]:
    return (delta_rows(module, rows, None) for rows in row_blocks(module.covered))


def _cannot(entry: pxd.ModuleEntry, kind: str, *, tied: bool) -> str | None:
    if kind != "weight":
        return "only weights can be adapted"
    if tied:
        return "is tied, and PEFT would adapt one of the two alone"
    if entry.encoding is pxd.Encoding.EXACT:
        return "is an exact update, whose delta depends on the base"
    if entry.encoding is pxd.Encoding.FULL:
        same_shape = entry.base is not None and entry.base.shape == entry.shape
        return None if same_shape else "has another shape than in the base, or is new"
    if len(entry.shape) != 2:
        return "is a stack of matrices"
    if entry.tensors()[-1][0].endswith(".tail"):
        return "has more rows than in the base"
    return None


def _decompose(
    adapter: _Adapter, entry: pxd.ModuleEntry, module: str, terms: Terms, rank: int | None, max_error: float | None
) -> None:
    import torch

    if rank is not None and rank < min(terms.shape) // 4:
        found = low_rank(terms, rank)
    else:
        found = _whole_spectrum(terms, rank, max_error)
    adapter.square_error += found.square_error
    adapter.square_norm += found.square_norm
    error = math.sqrt(found.square_error / found.square_norm) if found.square_norm else 0.0
    adapter.modules.append(LoraModule(name=entry.name, rank=found.left.shape[1], error=error))
    b, a = torch.from_numpy(found.left), torch.from_numpy(found.right)
    if kind_of(entry.name, entry.shape) == "embedding":
        # PEFT's embeddings look rows up: delta = (B A)^T with A [r, rows] and B [width, r].
        adapter.tensors[f"{_PREFIX}{module}.lora_embedding_A"] = b.t().contiguous()
        adapter.tensors[f"{_PREFIX}{module}.lora_embedding_B"] = a.t().contiguous()
    else:
        adapter.tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.contiguous()
        adapter.tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.contiguous()


def _whole_spectrum(terms: Terms, rank: int | None, max_error: float | None) -> LowRank:
    """All singular values of the dense matrix: for a large share of them, or a rank that follows from the error."""
    import torch

    matrix = torch.from_numpy(terms.dense(slice(0, terms.shape[0]), threads=None))
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    square = s.double().square()
    if rank is None:
        kept = torch.cumsum(square, 0) / square.sum().clamp_min(torch.finfo(torch.float64).tiny)
        wanted = 1.0 - (max_error or 0.0) ** 2
        rank = int(torch.searchsorted(kept, torch.tensor(wanted, dtype=torch.float64))) + 1
    r = min(rank, min(matrix.shape))
    root = s[:r].clamp_min(0.0).sqrt()
    left, right = u[:, :r] * root, root[:, None] * vt[:r]
    norm, lost = (float(torch.linalg.vector_norm(m, dtype=torch.float64)) for m in (matrix, matrix - left @ right))
    return LowRank(left=left.numpy(), right=right.numpy(), square_norm=norm**2, square_error=lost**2)


def _config(adapter: _Adapter, manifest: pxd.Manifest) -> dict[str, Any]:
    """adapter_config.json: names in full, and alpha = r everywhere, so that the scaling is 1."""
    ranks = {module.name.rpartition(".")[0]: module.rank for module in adapter.modules}
    common = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": manifest.base.id,
        "revision": manifest.base.revision,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": adapter.whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
    }
