"""Detect a quantised checkpoint by the names, dtypes and configuration of each method.

A delta is defined on float weights (SPEC 3.9), which a quantised checkpoint does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from peraxis_format import DType, TensorInfo

__all__ = ["Quantisation", "quantisation_of", "unmerged_adapter"]

# (a suffix that only this method writes, the name of the method)
_SUFFIXES: Final = (
    (".absmax", "bitsandbytes"),
    (".quant_map", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "FP8"),
    ("_scale_inv", "FP8"),
    (".input_scale", "FP8"),
    ("_blocks", "MXFP4"),
)
# Types of quantised matrices alone, by the bits of an element. Their names begin with these letters; F64 is none.
_SMALL_FLOATS: Final = {4: "FP4", 6: "FP6", 8: "FP8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """method: its usual name. example: a tensor that shows it."""

    method: str
    example: str


def quantisation_of(infos: Iterable[TensorInfo], config: Mapping[str, Any] | None) -> Quantisation | None:
    """The quantisation of the checkpoint; None if it has none."""
    infos = list(infos)
    names = {info.name for info in infos}
    for info in infos:
        if info.dtype.value.startswith(("F4", "F6_", "F8")) and len(info.shape) >= 2:
            return Quantisation(method=_SMALL_FLOATS[info.dtype.bits], example=info.name)
        for suffix, method in _SUFFIXES:
            if info.name.endswith(suffix) and (method != "MXFP4" or _is_mxfp4(info, names)):
                return Quantisation(method=method, example=info.name)
    stated = (config or {}).get("quantization_config")
    named = stated.get("quant_method") if isinstance(stated, dict) else None
    packed = next((i for i in infos if i.dtype in (DType.U8, DType.I8, DType.I32) and i.name.endswith(".weight")), None)
    if isinstance(named, str) and packed is not None:
        return Quantisation(method=named, example=packed.name)
    return None


def _is_mxfp4(info: TensorInfo, names: set[str]) -> bool:
    return info.dtype is DType.U8 and info.name.removesuffix("_blocks") + "_scales" in names


def unmerged_adapter(names: Iterable[str]) -> str | None:
    """A tensor of a LoRA adapter that was saved with its base and not merged into it."""
    return next((name for name in names if ".lora_A." in name or ".base_layer." in name), None)
