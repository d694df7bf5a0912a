"""The container: header bytes <-> tensor records (SPEC 2 and 4). A strict profile of safetensors.

    file = N (8 bytes, little-endian) | header (N bytes: JSON, then spaces) | data

The header depends only on the manifest and the sizes of the assets: `layout` computes the records, `header_bytes`
writes them, header.py reads them, and the reader compares. `file_size` predicts the size of a file with the same
functions. A module is one tensor; `parts_of` gives the places of its masks, scales and tail.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from peraxis_format.dtypes import DType
from peraxis_format.errors import fail
from peraxis_format.manifest import Manifest, ModuleEntry
from peraxis_format.sizes import aligned
from peraxis_format.strict_json import StrictJsonError, check_text

__all__ = [
    "FILE_MAX",
    "HEADER_BLOCK",
    "HEADER_MAX",
    "MAGIC",
    "VERSION",
    "Header",
    "TensorRecord",
    "file_size",
    "header_bytes",
    "layout",
    "parts_of",
    "records_of",
]

VERSION: Final = "1.0"
MAGIC: Final = b'{"__metadata__":{"format":"pxd","pxd":"'
HEADER_BLOCK: Final = 4096
HEADER_MAX: Final = 2**26
FILE_MAX: Final = 2**53


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of the header; begin and end count from the first byte after the header."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header. size: 8 + N, the file offset of the data. manifest: its bytes, not yet parsed."""

    size: int
    manifest: bytes
    records: tuple[TensorRecord, ...]

    @property
    def data_size(self) -> int:
        """The bytes of data of the records."""
        return self.records[-1].end if self.records else 0


# --- writing ------------------------------------------------------------------------------------------


def layout(modules: Iterable[ModuleEntry], asset_sizes: Sequence[int]) -> tuple[TensorRecord, ...]:
    """All records of a file in order, with pads (SPEC 4.1, 4.2), from the modules and the sizes of assets alone."""
    return tuple(records_of(modules, asset_sizes))


def records_of(modules: Iterable[ModuleEntry], asset_sizes: Sequence[int]) -> Iterator[TensorRecord]:
    """The records of `layout` one by one."""
    end = pads = 0
    stored = (tensor for module in modules if (tensor := module.tensor()) is not None)
    assets = ((f"__asset__.{i}", DType.U8, (size,)) for i, size in enumerate(asset_sizes))
    for name, dtype, shape in chain(stored, assets):
        pad = aligned(end) - end
        if pad:
            yield TensorRecord(f"__pad__.{pads}", DType.U8, (pad,), end, end + pad)
            pads += 1
            end += pad
        size = dtype.size_of(shape)
        yield TensorRecord(name, dtype, shape, end, end + size)
        end += size


def parts_of(entry: ModuleEntry, begin: int) -> Iterator[TensorRecord]:
    """The places of a module's parts, named `<name>.<suffix>`. begin: the offset of its tensor (SPEC 4.2)."""
    for suffix, dtype, shape in entry.parts():
        size = dtype.size_of(shape)
        yield TensorRecord(f"{entry.name}.{suffix}", dtype, shape, begin, begin + size)
        begin += aligned(size)


def _json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _header_json(version: str, manifest: bytes, records: Iterable[TensorRecord]) -> bytes:
    parts = [
        f'{{"__metadata__":{{"format":"pxd","pxd":{_json_string(version)},'
        f'"manifest":{_json_string(manifest.decode("utf-8", "surrogatepass"))}}}'
    ]
    parts.extend(
        f',{_json_string(r.name)}:{{"dtype":"{r.dtype.value}","shape":[{",".join(map(str, r.shape))}],'
        f'"data_offsets":[{r.begin},{r.end}]}}'
        for r in records
    )
    parts.append("}")
    return "".join(parts).encode("utf-8", "surrogatepass")


def header_bytes(manifest: bytes, records: Iterable[TensorRecord]) -> bytes:
    """N and the header, padded with the fewest spaces to a multiple of 4096 (SPEC 2.3, 2.16).

    Raises ContainerError if the header would exceed 2^26 bytes (E110) or 2^22 values (E117).
    """
    text = _header_json(VERSION, manifest, records)
    try:
        check_text(text)
    except StrictJsonError as error:
        fail(error.code, error.detail)
    length = _header_length(len(text))
    if length > HEADER_MAX:
        fail("E110", f"{length} bytes for this many modules")
    return struct.pack("<Q", length) + text.ljust(length, b" ")


def _header_length(text: int) -> int:
    return text + (-(8 + text) % HEADER_BLOCK)


def file_size(manifest: Manifest, asset_sizes: Sequence[int]) -> int:
    """The bytes of the file of a manifest; neither its digests nor the limits of a header matter."""
    records = layout(manifest.modules, asset_sizes)
    text = _header_json(VERSION, manifest.to_bytes(), records)
    return 8 + _header_length(len(text)) + (records[-1].end if records else 0)
