"""index-value: flat indices and new values for each changed tensor (vLLM's sparse weight patches, verl, prime-rl; as
files, the sparse safetensors patches of TRL and PULSE).

    <name>.indices   I32 or I64 [k]           positions in row-major order
    <name>.values    the tensor's dtype [k]   the new values
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

import peraxis_format as pxd
from peraxis_tools.checkpoints.shards import TensorSpec, shard_header, write_tensor
from peraxis_tools.convert.wires.change import TensorChange, changed_words, checked_index, words_of
from peraxis_tools.errors import CheckFailedError, ToolError

__all__ = ["IndexValueFile", "IndexValueTensor", "is_index_value", "pack", "write"]

_INDICES, _VALUES = ".indices", ".values"
_INT32: Final = 2**31


def is_index_value(tensors: pxd.Safetensors) -> bool:
    """Whether the names are those of this wire."""
    return len(tensors) > 0 and all(name.endswith((_INDICES, _VALUES)) for name in tensors)


class IndexValueFile:
    """One such file, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError, ToolError."""
        self._path = path
        self._tensors = pxd.Safetensors.open(path)
        self._tensors.check_dtypes()
        names = {name.removesuffix(_INDICES).removesuffix(_VALUES) for name in self._tensors}
        for name in sorted(names):
            for suffix in (_INDICES, _VALUES):
                if name + suffix not in self._tensors:
                    raise ToolError(f"{path}: {name} has no tensor {name + suffix}; the index-value wire is incomplete")
        self._names = tuple(sorted(names))

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that it changes."""
        return self._names

    def change(self, name: str, info: pxd.TensorInfo) -> TensorChange:
        """See WireFile."""
        indices, values = self._tensors[name + _INDICES], self._tensors[name + _VALUES]
        where = f"{self._path}: {name}"
        if indices.dtype not in (pxd.DType.I32, pxd.DType.I64) or indices.shape != (_size(values),):
            raise ToolError(
                f"{where}: its indices are {indices.dtype.value} {list(indices.shape)} for {_size(values)} values; "
                "they must be I32 or I64, one per value"
            )
        if values.dtype is not info.dtype:
            raise CheckFailedError(
                f"{where}: its values are {values.dtype.value}, the base's {info.dtype.value}; pass the step's base"
            )
        index = self._tensors.read(name + _INDICES).astype(np.int64)
        words = words_of(self._tensors.read(name + _VALUES))
        order = checked_index(where, index, _size(info))
        if order is not None:
            index, words = index[order], words[order]
        return TensorChange(index=index, words=words, is_xor=False)

    def check(self, name: str, new: pxd.Array) -> None:
        """Do nothing, because the wire has no checksums."""

    def close(self) -> None:
        """Close the file."""
        self._tensors.close()


def _size(info: pxd.TensorInfo) -> int:
    """The number of elements of a tensor."""
    return info.size // info.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexValueTensor:
    """One tensor's part of a wire. values: a storage array of its dtype."""

    name: str
    dtype: pxd.DType
    indices: pxd.Array
    values: pxd.Array


def pack(name: str, dtype: pxd.DType, old: pxd.Array, new: pxd.Array) -> IndexValueTensor:
    """Pack one changed tensor. Raises ToolError for a tensor that int32 cannot index."""
    if new.size > _INT32:
        raise ToolError(f"{name}: has {new.size} weights, too many for an int32 index; use another wire")
    index, _ = changed_words(old, new)
    values = new.reshape(-1)[index]
    return IndexValueTensor(name=name, dtype=dtype, indices=index.astype(pxd.DType.I32.storage), values=values)


def write(path: Path, packed: Sequence[IndexValueTensor], *, overwrite: bool) -> int:
    """Write the file. Returns its size in bytes."""
    specs = []
    for item in packed:
        specs.append((TensorSpec(item.name + _INDICES, pxd.DType.I32, item.indices.shape), item.indices))
        specs.append((TensorSpec(item.name + _VALUES, item.dtype, item.values.shape), item.values))
    specs.sort(key=lambda pair: -pair[0].dtype.itemsize)  # so that each tensor is aligned, as in safetensors
    header = shard_header(spec for spec, _ in specs)
    with pxd.atomic_file(path, overwrite=overwrite) as file:
        file.write(header)
        for spec, array in specs:
            write_tensor(file, spec, array)
    return len(header) + sum(array.nbytes for _, array in specs)
