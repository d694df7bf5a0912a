"""Write safetensors shards tensor by tensor: headers need only names, dtypes and shapes, which are known in advance.

`safetensors.save_file` needs all tensors of a file in memory at once; a streaming apply cannot use it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from peraxis_format import INDEX_NAME, SINGLE_NAME, Array, DType, raw_bytes

__all__ = ["SHARD_BYTES", "ShardFile", "TensorSpec", "plan_shards", "shard_header", "write_index", "write_tensor"]

SHARD_BYTES: Final = 5_000_000_000  # the default of save_pretrained


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to write."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.size_of(self.shape)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file and its tensors, in file order."""

    file_name: str
    tensors: tuple[TensorSpec, ...]


def plan_shards(tensors: Iterable[TensorSpec], *, shard_bytes: int = SHARD_BYTES) -> list[ShardFile]:
    """Fill shards in order up to shard_bytes each; a larger tensor gets its own shard."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.size
    if len(groups) == 1:
        return [ShardFile(SINGLE_NAME, tuple(groups[0]))]
    return [
        ShardFile(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)
    ]


def shard_header(tensors: Iterable[TensorSpec]) -> bytes:
    """The header of a safetensors file with these tensors in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        header[tensor.name] = {
            "dtype": tensor.dtype.value,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensor(file: BinaryIO, spec: TensorSpec, array: Array) -> None:
    """Write one tensor's bytes. Raises ValueError if the array does not have the dtype and shape of the header."""
    if array.shape != spec.dtype.storage_shape(spec.shape) or array.dtype != spec.dtype.storage:
        raise ValueError(f"{spec.name}: {array.dtype} {array.shape} instead of {spec}")
    file.write(raw_bytes(array))


def write_index(folder: Path, shards: list[ShardFile]) -> None:
    """Write the index of several shards, as save_pretrained does; one file has no index."""
    if len(shards) == 1:
        return
    weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.size for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
