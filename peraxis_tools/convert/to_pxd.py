"""Convert a `.pt` delta of another project and its base to one .pxd, bound to that base.

Signs are copied bit by bit. Scales are converted so that the weights equal those of the project's own merge
(layouts.py): bit for bit on a BF16 or F16 base; on an F32 base each scale is rounded to F16 (relative error at most
2^-11), and the error is reported. Full parameters are cast to the base's dtype, as loading them into the base model
would do. Tensors that are not in the file are the base's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import peraxis_format as pxd
from peraxis_tools.checkpoints.checkpoint import Checkpoint, is_delta, open_checkpoint
from peraxis_tools.checkpoints.kinds import execution_key
from peraxis_tools.convert.layouts import Layout, TorchDelta, component_of, read_torch_delta
from peraxis_tools.deltas.module_counts import count_encodings
from peraxis_tools.deltas.whole_tensors import note_whole
from peraxis_tools.display.progress import Progress, watched
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs.rules import claim_delta

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ToPxdResult", "to_pxd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToPxdResult:
    """The result of `to_pxd`.

    encodings: modules by encoding. scale_error: the largest relative difference of a written scale to the source's.
    merges: whether applying it gives the weights of the project's own merge bit for bit. cast: parameters that changed
    dtype.
    """

    path: Path
    content_id: str
    layout: str
    bytes: int
    encodings: dict[str, int]
    scale_error: float
    merges: bool
    cast: tuple[str, ...]


@dataclass(slots=True)
class _Counts:
    scale_error: float = 0.0
    merges: bool = True
    cast: tuple[str, ...] = ()


def to_pxd(
    source: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    layout: Layout | None = None,
    axis: pxd.Axis | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = None,
) -> ToPxdResult:
    """Convert; layout None recognises it. name: the name of the fine-tuned checkpoint (default: the file's name).

    axis: row or col, for modules with both variants in the file; the others have only one.

    Raises ToolError, CheckpointError; CheckFailedError if the file is for another model.
    """
    source, output = Path(source), Path(output)
    if not source.is_file():
        raise ToolError(f"{source}: no such file")
    if is_delta(source):
        raise ToolError(f"{source}: is already a .pxd; convert it to a LoRA adapter or a wire, or apply it")
    if source.suffix == ".safetensors":
        raise ToolError(f"{source}: is neither a .pt delta nor a wire; `compress` makes a delta of a checkpoint")
    counts = _Counts()
    with claim_delta(output, overwrite=overwrite, inputs=(source, base)), open_checkpoint(base) as checkpoint:
        found = read_torch_delta(source, layout, base=checkpoint.tensors, axis=axis)
        identity = pxd.Identity(id=name or source.stem)
        metadata = {"peraxis.converted": found.layout}
        with (
            pxd.DeltaWriter(
                output, base=checkpoint.identity, fine_tuned=identity, metadata=metadata, overwrite=overwrite
            ) as writer,
            watched(progress, "convert", checkpoint.tensors.size) as step,
        ):
            _write(writer, found, checkpoint, counts, step)
            manifest = writer.finish()
    note_whole(output, manifest, size=writer.size, reason=f"{source} has them whole")
    return ToPxdResult(
        path=output,
        content_id=manifest.content_id,
        layout=found.layout,
        bytes=writer.size,
        encodings=count_encodings(module.encoding for module in manifest.modules),
        scale_error=counts.scale_error,
        merges=counts.merges,
        cast=counts.cast,
    )


def _write(
    writer: pxd.DeltaWriter, found: TorchDelta, base: Checkpoint, counts: _Counts, progress: Callable[[int], None]
) -> None:
    tensors = base.tensors
    written: dict[str, str] = {}  # digests of full parameters: a head may be a copy of the embedding
    names = {*tensors, *found.whole}
    for name in sorted(names, key=execution_key):
        ref = None
        if name in tensors:
            info = tensors[name]
            ref = pxd.BaseRef(dtype=info.dtype, shape=info.shape, sha256=tensors.sha256(name))
            progress(info.size)
        if name in found.signs and ref is not None:
            carried = component_of(found.signs[name], ref.dtype)
            counts.scale_error = max(counts.scale_error, carried.error)
            counts.merges &= carried.merges
            writer.add(_module(name, ref.shape, ref.dtype, ref, components=(carried.component,)))
        elif name in found.whole:
            array, dtype = _storage(found.whole[name], ref, name, counts)
            digest = pxd.digest_of(array)
            if ref is not None and (digest, array.shape, dtype) == (ref.sha256, ref.shape, ref.dtype):
                writer.add(_module(name, ref.shape, ref.dtype, ref))
            elif ref is None and digest in written:
                writer.tie(written[digest], name)
            else:
                writer.add(_module(name, array.shape, dtype, ref, full=array))
                written[digest] = name
        elif ref is not None:
            writer.add(_module(name, ref.shape, ref.dtype, ref))


def _module(
    name: str,
    shape: tuple[int, ...],
    dtype: pxd.DType,
    base: pxd.BaseRef | None,
    *,
    components: tuple[pxd.Component, ...] = (),
    full: pxd.Array | None = None,
) -> pxd.ModuleDelta:
    encoding = pxd.Encoding.SIGN if components else pxd.Encoding.SAME if full is None else pxd.Encoding.FULL
    return pxd.ModuleDelta(
        name=name, shape=shape, dtype=dtype, encoding=encoding, base=base, components=components, full=full
    )


def _storage(tensor: Tensor, ref: pxd.BaseRef | None, name: str, counts: _Counts) -> tuple[pxd.Array, pxd.DType]:
    """A parameter in the base's dtype, if both are float types."""
    import torch

    kinds = {torch.bfloat16: pxd.DType.BF16, torch.float16: pxd.DType.F16, torch.float32: pxd.DType.F32}
    tensor = tensor.detach().contiguous()
    dtype = kinds.get(tensor.dtype)
    if dtype is None:
        raise ToolError(f"{name}: is {tensor.dtype}; only BF16, F16 and F32 parameters can be converted")
    array: pxd.Array = (tensor.view(torch.uint16) if dtype is pxd.DType.BF16 else tensor).numpy()
    if ref is None or not ref.dtype.is_float or ref.dtype is dtype:
        return np.ascontiguousarray(array), dtype
    counts.cast = (*counts.cast, name)
    return pxd.from_float32(pxd.to_float32(array, dtype), ref.dtype), ref.dtype
