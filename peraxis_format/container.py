"""The container: header bytes <-> tensor records (SPEC 2 and 4). A strict profile of safetensors.

    file = N (8 bytes, little-endian) | header (N bytes: JSON, then spaces) | data

The header follows from the manifest and the sizes of the assets alone: `layout` computes the records,
`header_bytes` writes them, and the reader compares.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from peraxis_format.canonical import Json, StrictJsonError, parse_strict_json
from peraxis_format.dtypes import DType
from peraxis_format.errors import fail
from peraxis_format.manifest import DIMENSIONS_MAX, ModuleEntry

__all__ = [
    "ALIGNMENT",
    "FILE_MAX",
    "HEADER_BLOCK",
    "HEADER_MAX",
    "VERSION",
    "Header",
    "TensorRecord",
    "check_start",
    "header_bytes",
    "header_length",
    "layout",
    "parse_header",
]

VERSION: Final = "1.0"
MAGIC: Final = b'{"__metadata__":{"format":"pxd","pxd":"'
ALIGNMENT: Final = 64
HEADER_BLOCK: Final = 4096
HEADER_MAX: Final = 2**24
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
        """Bytes of data that the records ask for."""
        return self.records[-1].end if self.records else 0


# --- writing ------------------------------------------------------------------------------------------


def layout(modules: Iterable[ModuleEntry], asset_sizes: Sequence[int]) -> tuple[TensorRecord, ...]:
    """All records of a file in order, pads included (SPEC 4.1, 4.2). Takes nothing but manifest and sizes."""
    records: list[TensorRecord] = []
    end = pads = 0
    assets = ((f"__asset__.{i}", DType.U8, (size,)) for i, size in enumerate(asset_sizes))
    for name, dtype, shape in chain((tensor for module in modules for tensor in module.tensors()), assets):
        pad = -end % ALIGNMENT
        if pad:
            records.append(TensorRecord(f"__pad__.{pads}", DType.U8, (pad,), end, end + pad))
            pads += 1
            end += pad
        size = math.prod(shape) * dtype.itemsize
        records.append(TensorRecord(name, dtype, shape, end, end + size))
        end += size
    return tuple(records)


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

    Raises ContainerError (E110) if the header would exceed 2^24 bytes.
    """
    text = _header_json(VERSION, manifest, records)
    length = len(text) + (-(8 + len(text)) % HEADER_BLOCK)
    if length > HEADER_MAX:
        fail("E110", f"{length} bytes for this many modules")
    return struct.pack("<Q", length) + text.ljust(length, b" ")


# --- reading: (bytes) -> typed values, first failure wins ---------------------------------------------


def check_start(start: bytes, file_size: int) -> None:
    """Tell what is no PXD file at all by its first bytes (SPEC 2.2). start: up to the first 4096 bytes."""
    if file_size >= FILE_MAX:
        fail("E102", f"{file_size} bytes")  # SPEC 2.1
    if not start:
        fail("E103", "0 bytes")
    lowered = start[:1024].lstrip(b" \t\r\n\f\v").lower()
    if start.startswith(b"version https://git-lfs"):
        fail("E104")
    if lowered.startswith((b"<!doctype", b"<html")):
        fail("E105")
    if start.startswith(b"PK"):
        fail("E106")
    if start[0] == 0x80 and len(start) > 1 and 2 <= start[1] <= 5:
        fail("E107")
    if not any(start[:8]):
        fail("E108")
    if start[0] != 0xF8:
        # An ordinary safetensors file, the likeliest mistake, has its header's brace there.
        fail("E112" if start[8:9] == b"{" else "E109", offset=0)
    if file_size < HEADER_BLOCK:
        fail("E103", f"{file_size} bytes")


def header_length(start: bytes, file_size: int) -> int:
    """N, held to SPEC 2.3 and 2.4. start: the first 8 bytes."""
    length = int.from_bytes(start[:8], "little")
    if (8 + length) % HEADER_BLOCK or not HEADER_BLOCK - 8 <= length <= HEADER_MAX:
        fail("E110", str(length), offset=0)
    if 8 + length > file_size:
        fail("E111", f"{file_size} of at least {8 + length} bytes", offset=file_size)
    return length


def parse_header(header: bytes, file_size: int) -> Header:
    """Parse the N bytes of a header (SPEC 2.5 to 2.18). Raises ContainerError, UnsupportedError for E201."""
    _check_magic(header)
    text = header.rstrip(b" ")
    try:
        value = parse_strict_json(text)
    except StrictJsonError as error:
        fail(error.code, error.detail, offset=None if error.offset is None else 8 + error.offset)
    if not isinstance(value, dict):
        fail("E114", offset=8)
    manifest = _metadata(value.pop("__metadata__"))
    records = tuple(_record(name, record) for name, record in value.items())
    # SPEC 2.16: what was parsed, written again, is the header byte for byte, with the fewest spaces.
    canonical = _header_json(VERSION, manifest, records)
    if canonical != text or len(header) - len(text) >= HEADER_BLOCK:
        differs = next((i for i, (a, b) in enumerate(zip(canonical, text, strict=False)) if a != b), len(text))
        fail("E122", offset=8 + differs)
    parsed = Header(8 + len(header), manifest, records)
    _check_extent(parsed, file_size)
    return parsed


def _check_magic(header: bytes) -> None:
    if not header.startswith(MAGIC):
        fail("E112", offset=8)  # SPEC 2.5
    version = header[len(MAGIC) : len(MAGIC) + 32].split(b'"')[0]
    if version != VERSION.encode():
        # SPEC 2.6: before anything else of the header, which a later version may change.
        fail("E201", f"PXD {version.decode('ascii', 'backslashreplace')!r}; this reader knows {VERSION}")


def _metadata(value: Json) -> bytes:
    # SPEC 2.12
    if not isinstance(value, dict) or set(value) != {"format", "pxd", "manifest"}:
        fail("E118", "keys other than format, pxd, manifest", field="__metadata__")
    manifest = value["manifest"]
    if not isinstance(manifest, str):
        fail("E118", "not a string", field="__metadata__.manifest")
    return manifest.encode("utf-8", "surrogatepass")


def _integers(value: Json) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    numbers = tuple(x for x in value if isinstance(x, int) and not isinstance(x, bool))
    return numbers if len(numbers) == len(value) else None


def _record(name: str, value: Json) -> TensorRecord:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        fail("E118", "keys other than dtype, shape, data_offsets", field=name)  # SPEC 2.12
    dtype, shape, offsets = value["dtype"], _integers(value["shape"]), _integers(value["data_offsets"])
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        fail("E118", field=name)  # SPEC 2.12
    if dtype not in DType.__members__:
        fail("E119", repr(dtype[:32]), field=f"{name}.dtype")  # SPEC 2.13
    kind = DType(dtype)
    size = math.prod(shape) * kind.itemsize
    if len(shape) > DIMENSIONS_MAX or any(d < 1 for d in shape) or size >= FILE_MAX:
        fail("E120", str(list(shape[:9])), field=f"{name}.shape")  # SPEC 2.14
    begin, end = offsets
    if begin < 0 or end - begin != size:
        fail("E121", f"[{begin}, {end}] for {size} bytes", field=f"{name}.data_offsets")  # SPEC 2.15
    return TensorRecord(name, kind, shape, begin, end)


def _check_extent(header: Header, file_size: int) -> None:
    end = 0
    for record in header.records:
        if record.begin != end:
            fail("E123", f"begins at {record.begin}, not {end}", field=f"{record.name}.data_offsets")  # SPEC 2.17
        end = record.end
    wanted = header.size + end
    if file_size < wanted:
        fail("E124", f"{file_size} of {wanted} bytes", offset=file_size)  # SPEC 2.18
    if file_size > wanted:
        fail("E125", f"{file_size - wanted} bytes too many", offset=wanted)  # SPEC 2.18
