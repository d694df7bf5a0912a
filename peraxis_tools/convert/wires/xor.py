"""xor: XOR of whole tensors, compressed with zstd, in a folder like a checkpoint's (slime, miles, SkyRL, ModelExpress).

    model.safetensors.index.json   metadata {version, base_version, delta_encoding "xor", compression_format "zstd",
                                   checksum_format "adler32"}, weight_map
    shards                         <name>   U8 [z]: a zstd frame of the tensor's bytes before XOR its bytes after
                                   __metadata__ {<name>: checksum of the bytes after, in hex}

Unchanged tensors are left out. If the index declares adler32, each tensor must have a checksum; those of other formats
are not checked.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import peraxis_format as pxd
from peraxis_tools.convert.wires import zstd
from peraxis_tools.convert.wires.change import TensorChange, words_of
from peraxis_tools.display.notes import note
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.outputs.folders import atomic_folder

__all__ = ["XorFolder", "XorTensor", "index_metadata", "pack", "write"]

_SHARD: Final = "model-00001-of-00001.safetensors"
_ADLER32: Final = "adler32"


def index_metadata(path: Path) -> Mapping[str, Any] | None:
    """The metadata of a folder's index if it is one of this wire, else None."""
    index = path / pxd.INDEX_NAME
    try:
        found = json.loads(index.read_bytes()) if index.is_file() else None  # a pipe would be waited for
    except (OSError, ValueError, RecursionError):
        return None
    metadata = found.get("metadata") if isinstance(found, dict) else None
    return metadata if isinstance(metadata, dict) and "delta_encoding" in metadata else None


class XorFolder:
    """One such folder, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError, ToolError."""
        self._path = path
        metadata = index_metadata(path)
        if metadata is None:
            raise ToolError(f"{path}: its {pxd.INDEX_NAME} has no delta_encoding; it is not an xor wire")
        wanted = {"delta_encoding": "xor", "compression_format": "zstd"}
        for key, value in wanted.items():
            if metadata.get(key) != value:
                raise ToolError(f"{path}: {key} is {metadata.get(key)!r}; only {value!r} is read")
        self._tensors = pxd.Safetensors.open(path)
        self._tensors.check_dtypes()
        self._checksums: dict[str, str] = {}
        self._has_checksums = metadata.get("checksum_format") == _ADLER32
        if not self._has_checksums:
            note(f"{path}: its checksums ({metadata.get('checksum_format')}) are not checked")
            return
        for file in self._tensors.files:
            self._checksums |= _checksums(file)
        missing = next((name for name in self._tensors if name not in self._checksums), None)
        if missing is not None:
            raise ToolError(
                f"{path}: {missing}: has no {_ADLER32} checksum (hex text in __metadata__), which the index declares; "
                "write the wire again"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that it changes."""
        return tuple(self._tensors)

    def change(self, name: str, info: pxd.TensorInfo) -> TensorChange:
        """See WireFile."""
        found = self._tensors[name]
        where = f"{self._path}: {name}"
        if found.dtype is not pxd.DType.U8 or len(found.shape) != 1:
            raise ToolError(
                f"{where}: is {found.dtype.value} {list(found.shape)}, not U8 [bytes]; write the wire again"
            )
        data = zstd.decompress(pxd.raw_bytes(self._tensors.read(name)), limit=info.size, where=where)
        if len(data) != info.size:
            raise CheckFailedError(
                f"{where}: ends at byte {len(data)}; the base's tensor has {info.size} bytes; another base, or damaged"
            )
        words = np.frombuffer(data, f"<u{info.dtype.itemsize}")
        return TensorChange(index=None, words=words, is_xor=True)

    def check(self, name: str, new: pxd.Array) -> None:
        """See WireFile."""
        if not self._has_checksums:
            return
        wanted, found = self._checksums[name], f"{zlib.adler32(pxd.raw_bytes(new)):08x}"
        if wanted.lower() != found:
            raise CheckFailedError(
                f"{self._path}: {name}: the result has checksum {found}, not the wire's {wanted}; it was made on "
                "another base, or is damaged"
            )

    def close(self) -> None:
        """Close the files."""
        self._tensors.close()


def _checksums(file: Path) -> dict[str, str]:
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        found = json.loads(stream.read(length)).get("__metadata__", {})
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class XorTensor:
    """One tensor's part of a wire: a zstd frame, and the checksum of the tensor's bytes afterwards."""

    name: str
    data: bytes
    checksum: str


def pack(name: str, dtype: pxd.DType, old: pxd.Array, new: pxd.Array) -> XorTensor:
    """Pack one changed tensor. Raises MissingPackageError."""
    xored = words_of(old) ^ words_of(new)
    checksum = f"{zlib.adler32(pxd.raw_bytes(new)):08x}"
    return XorTensor(name=name, data=zstd.compress(pxd.raw_bytes(xored)), checksum=checksum)


def write(path: Path, packed: Sequence[XorTensor], *, overwrite: bool, version: str, base_version: str) -> int:
    """Write the folder, and return its bytes. version, base_version: the names of the states after and before."""
    header: dict[str, Any] = {"__metadata__": {item.name: item.checksum for item in packed}}
    end = 0
    for item in packed:
        begin, end = end, end + len(item.data)
        header[item.name] = {"dtype": "U8", "shape": [len(item.data)], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    metadata = {
        "version": version,
        "base_version": base_version,
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": _ADLER32,
    }
    index = {"metadata": metadata, "weight_map": {item.name: _SHARD for item in packed}}
    listed = (json.dumps(index, indent=2) + "\n").encode()
    with atomic_folder(path, overwrite=overwrite) as folder:
        with open(folder / _SHARD, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for item in packed:
                file.write(item.data)
        (folder / pxd.INDEX_NAME).write_bytes(listed)
    return 8 + len(text) + end + len(listed)
