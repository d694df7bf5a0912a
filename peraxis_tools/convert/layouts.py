"""Read delta files of other projects: `.pt` dictionaries of tensors. Nothing in them is executed.

Both layouts pack the signs of a weight [d_out, d_in] transposed: int32 [d_in/32, d_out], bit i of word [w, o] is the
sign of weight [o, 32 w + i]; 1 is +1. Read along d_in and little-endian, these are the bytes of a PXD mask.

    bitdelta     <module>.mask, <module>.coeff (one number); other parameters whole, under their own names
    peraxis-pt   <module>.mask_row with .coeff_row, or .mask_col with .coeff_col; vectors, BF16. The weight is stored
                 transposed, so its `row` vector has the length d_in and is PXD's `col`, and the other way round
                 (the table of SPEC 5.3)

A converted file must repeat their merges: bitdelta rounds each term to the weight's dtype and adds it in that dtype;
peraxis-pt adds terms that already have the weight's dtype. So

    W = round(W_base + b * round(scale))        round: to the dtype of W_base

8 bits of BF16 and 11 of F16 fit into an F16 scale with an exponent. So W equals theirs bit for bit on a base of these
dtypes, if all scales of a module are within 2^28 of its largest. On an F32 base a scale is rounded to F16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.convert.torch_files import check_plain, load_plain
from peraxis_tools.deltas.fold import negate_mask
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.process.optional import require

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LAYOUTS", "Carried", "Layout", "Signs", "TorchDelta", "component_of", "read_torch_delta"]

Layout: TypeAlias = Literal["bitdelta", "peraxis-pt"]
LAYOUTS: Final[tuple[Layout, ...]] = ("bitdelta", "peraxis-pt")

# Their name of an axis -> PXD's (SPEC 5.3).
_SWAPPED: Final = {"row": pxd.Axis.COL, "col": pxd.Axis.ROW}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """One module of such a file. words: int32 [d_in/32, d_out]. scale: binary64, flat, may be negative."""

    axis: pxd.Axis
    words: NDArray[np.int32]
    scale: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchDelta:
    """A whole file: modules with masks by the name of their weight, and full parameters."""

    layout: Layout
    signs: Mapping[str, Signs]
    whole: Mapping[str, Tensor]


def read_torch_delta(
    path: Path, layout: Layout | None = None, *, base: pxd.Safetensors, axis: pxd.Axis | None = None
) -> TorchDelta:
    """Read such a file; layout None recognises it by its names. Raises ToolError; CheckFailedError for another base.

    axis: row or col, by the names of SPEC.md: the variant to take if the file has both for a module.
    """
    require("a .pt file", "torch")
    tensors = _load(path)
    masks = {key for key in tensors if key.rpartition(".")[2] in ("mask", "mask_row", "mask_col")}
    if layout is None:
        layout = _recognise(path, masks)
    signs, used = (
        _bitdelta(path, tensors, masks, base) if layout == "bitdelta" else _peraxis(path, tensors, masks, base, axis)
    )
    whole = {name: tensor for name, tensor in tensors.items() if name not in used}
    strange = next((name for name in whole if name.rpartition(".")[2] not in ("weight", "bias")), None)
    if strange is not None:
        raise ToolError(f"{path}: {strange!r} is not part of the layout {layout}; it cannot be converted")
    return TorchDelta(layout=layout, signs=signs, whole=whole)


def _load(path: Path) -> dict[str, Tensor]:
    import torch

    found = load_plain(path, where=str(path), kind="a .pt file")
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise ToolError(f"{path}: not a dictionary of names and tensors; pass the file that the project saved")
    check_plain(((repr(name), value) for name, value in found.items()), size=path.stat().st_size, where=str(path))
    return found


def _recognise(path: Path, masks: set[str]) -> Layout:
    kinds: set[Layout] = {"bitdelta" if key.endswith(".mask") else "peraxis-pt" for key in masks}
    if len(kinds) != 1:
        known = ", ".join(LAYOUTS)
        raise ToolError(f"{path}: holds {'masks of both layouts' if kinds else 'no sign masks'}; --from knows {known}")
    return kinds.pop()


def _bitdelta(
    path: Path, tensors: Mapping[str, Tensor], masks: set[str], base: pxd.Safetensors
) -> tuple[dict[str, Signs], set[str]]:
    signs, used = {}, set()
    for key in masks:
        module = key.removesuffix(".mask")
        scale = f"{module}.coeff"
        signs[f"{module}.weight"] = Signs(
            axis=pxd.Axis.TENSOR,
            words=_words(path, key, tensors, base),
            scale=_scale(path, scale, tensors, 1),
        )
        used |= {key, scale}
    return signs, used


def _peraxis(
    path: Path, tensors: Mapping[str, Tensor], masks: set[str], base: pxd.Safetensors, wanted: pxd.Axis | None
) -> tuple[dict[str, Signs], set[str]]:
    signs: dict[str, Signs] = {}
    used: set[str] = set()
    for key in masks:
        module, _, name = key.rpartition(".")
        theirs = name.removeprefix("mask_")
        if theirs not in _SWAPPED:
            raise ToolError(f"{path}: {key!r} is not part of the layout peraxis-pt; try --from bitdelta")
        axis, scale = _SWAPPED[theirs], f"{module}.coeff_{theirs}"
        used |= {key, scale}
        if {f"{module}.mask_row", f"{module}.mask_col"} <= masks and axis is not wanted:
            if wanted is None:
                # The paper takes the variant with the lower validation error, which is not in the file.
                raise ToolError(
                    f"{path}: {module} has both a row and a col variant, and does not say which was chosen; pass "
                    "--axis row (a scale per output, their mask_col) or --axis col (a scale per input, their mask_row)"
                )
            continue
        words = _words(path, key, tensors, base)
        count = words.shape[1] if axis is pxd.Axis.ROW else words.shape[0] * 32
        signs[f"{module}.weight"] = Signs(axis=axis, words=words, scale=_scale(path, scale, tensors, count))
    return signs, used


def _words(path: Path, key: str, tensors: Mapping[str, Any], base: pxd.Safetensors) -> NDArray[np.int32]:
    """The words of a mask. Its shape is checked by the base's before the scales are read, which have a size of it."""
    import torch

    tensor = tensors[key]
    if tensor.dtype is not torch.int32 or tensor.ndim != 2:
        raise ToolError(
            f"{path}: {key!r} is {tensor.dtype} {list(tensor.shape)}, not int32 [d_in/32, d_out]; save the file again"
        )
    name, shape = f"{key.rpartition('.')[0]}.weight", (tensor.shape[1], tensor.shape[0] * 32)
    if name not in base:
        raise CheckFailedError(
            f"{path}: has a mask for {name}, which {base.label} lacks; pass the base that it was made for"
        )
    info = base[name]
    if info.shape != shape or not info.dtype.is_float:
        raise CheckFailedError(
            f"{path}: its mask for {name} is of {list(shape)}, the base's tensor is {info.dtype.value} "
            f"{list(info.shape)}; pass the base that it was made for"
        )
    words: NDArray[np.int32] = tensor.numpy()
    return words


def _scale(path: Path, key: str, tensors: Mapping[str, Any], count: int) -> NDArray[np.float64]:
    tensor = tensors.get(key)
    if tensor is None:
        raise ToolError(f"{path}: has no {key!r} for its mask; save the file again")
    if tensor.numel() != count or not tensor.is_floating_point():
        raise ToolError(f"{path}: {key!r} has {tensor.numel()} values instead of {count}; save the file again")
    scale: NDArray[np.float64] = tensor.detach().double().reshape(-1).numpy()
    if not np.all(np.isfinite(scale)):
        raise ToolError(f"{path}: {key!r} has values that are not finite; save the file again")
    return scale


@dataclass(frozen=True, slots=True)
class Carried:
    """A converted component.

    error: the largest relative difference to a scale of the file. merges: whether base + component equals the weight of
    their merge bit for bit.
    """

    component: pxd.Component
    error: float
    merges: bool


def component_of(signs: Signs, dtype: pxd.DType) -> Carried:
    """The component for a base tensor of this dtype. A negative scale is folded into the signs (SPEC 5.4)."""
    mask = np.ascontiguousarray(signs.words.T.astype("<i4")).view(np.uint8)
    negative = signs.scale < 0.0
    d_in = signs.words.shape[0] * 32
    if signs.axis is pxd.Axis.COL:
        mask = mask ^ np.packbits(negative, bitorder="little")
    else:
        mask = np.where(negative[:, None] if signs.axis is pxd.Axis.ROW else negative[0], negate_mask(mask, d_in), mask)
    scale = np.abs(signs.scale)
    theirs = pxd.to_float32(pxd.from_float32(scale.astype(np.float32), dtype), dtype).astype(np.float64)
    half, exponent = pxd.encode_scales(theirs)
    rounded = np.ldexp(half.astype(np.float64), exponent)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.nan_to_num(np.abs(rounded - scale) / scale, nan=0.0)
    name = {pxd.Axis.ROW: "row", pxd.Axis.COL: "col", pxd.Axis.TENSOR: "scalar"}[signs.axis]
    scales: dict[str, Any] = {name: half}
    return Carried(
        pxd.Component(axis=signs.axis, exponent=exponent, mask=mask, **scales),
        error=float(error.max(initial=0.0)),
        merges=bool(np.array_equal(rounded, theirs)),
    )
