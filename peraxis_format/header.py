"""Read a header: its bytes become tensor records (SPEC 2) and a manifest; the first failure is reported.

The grammar of SPEC 2 is regular: a valid header is read by two regular expressions, record after record, without a JSON
parser. Only an invalid header is parsed as JSON, to find its fault (`_explain`).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Final

from peraxis_format.container import (
    FILE_MAX,
    HEADER_BLOCK,
    HEADER_MAX,
    MAGIC,
    VERSION,
    Header,
    TensorRecord,
    records_of,
)
from peraxis_format.dtypes import DType
from peraxis_format.errors import ContainerError, fail
from peraxis_format.manifest import DIMENSIONS_MAX, TENSOR_MAX, Manifest
from peraxis_format.profile import check_manifest
from peraxis_format.schema import parse_manifest
from peraxis_format.strict_json import (
    INTEGER_MAX,
    PIECE_MAX,
    STRING,
    VALUES_MAX,
    Json,
    StrictJsonError,
    check_text,
    parse_piece,
    pieces,
    unescaped,
)

__all__ = ["read_header"]

_RECORD_NAME_MAX: Final = 1024
# A record has at least six values, and is itself a value of its object.
_RECORDS_MAX: Final = VALUES_MAX // 6

_INT: Final = rb"(?:0|[1-9][0-9]{0,15})"
_METADATA: Final = re.compile(re.escape(MAGIC + VERSION.encode()) + rb'","manifest":' + STRING + rb"\}")
_RECORD: Final = re.compile(
    rb"," + STRING + rb':\{"dtype":' + STRING + rb',"shape":\[((?:' + _INT + rb"(?:," + _INT + rb"){0,8}+)?)\],"
    rb'"data_offsets":\[(' + _INT + rb"),(" + _INT + rb")\]\}"
)
_DTYPES: Final = {dtype.value.encode(): dtype for dtype in DType}
# A member whose value is a string; only such members can be long.
_LONG: Final = re.compile(
    rb'[ \t\r\n]*+("(?:[^"\\]++|\\.)*+")[ \t\r\n]*+:[ \t\r\n]*+'
    rb'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"[ \t\r\n]*+',
    re.DOTALL,
)
# An integer that is beyond 2^53 by its length, outside of names.
_LONG_NUMBER: Final = re.compile(rb"[\[,:]-?[0-9]{17}")


def _check_start(start: bytes, file_size: int) -> None:
    """Refuse a file that is not PXD by its first bytes (SPEC 2.2). start: up to the first 4096 bytes."""
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
        # The likeliest mistake is an ordinary safetensors file, which has its header's brace here.
        fail("E112" if start[8:9] == b"{" else "E109", clause="2.2", offset=0)
    if file_size < HEADER_BLOCK:
        fail("E103", f"{file_size} bytes")


def _header_length(start: bytes, file_size: int) -> int:
    """N, checked by SPEC 2.3 and 2.4. start: the first 8 bytes."""
    length = int.from_bytes(start[:8], "little")
    if (8 + length) % HEADER_BLOCK or not HEADER_BLOCK - 8 <= length <= HEADER_MAX:
        fail("E110", str(length), offset=0)
    if 8 + length > file_size:
        fail("E111", f"{file_size} of at least {8 + length} bytes", offset=file_size)
    return length


def _parse_header(header: bytes, file_size: int) -> Header:
    """Parse the N bytes of a header (SPEC 2.5 to 2.18). Raises ContainerError, UnsupportedError for E201."""
    _check_magic(header)
    try:
        check_text(header)
        parsed = _by_grammar(header)
    except StrictJsonError as error:
        raise _located(error) from None
    except ContainerError:
        # SPEC 8: run the steps before the failed one over the whole header.
        _explain(header.rstrip(b" "))
        raise
    _check_extent(parsed, file_size)
    return parsed


def _check_magic(header: bytes) -> None:
    if not header.startswith(MAGIC):
        fail("E112", offset=8)  # SPEC 2.5
    version = header[len(MAGIC) : len(MAGIC) + 32].split(b'"')[0]
    if version != VERSION.encode():
        # SPEC 2.6: check the version first, because a later version may change the rest of the header.
        fail("E201", f"PXD {version.decode('ascii', 'backslashreplace')!r}; this reader knows {VERSION}")


def _by_grammar(header: bytes) -> Header:
    # SPEC 2.16: a text that the grammar accepts is canonical byte for byte.
    metadata = _METADATA.match(header)
    if metadata is None:
        fail("E122", field="__metadata__")
    records: list[TensorRecord] = []
    names = {"__metadata__"}
    at, end = metadata.end(), 0
    while match := _RECORD.match(header, at):
        record = _record(match, end)
        if record.name in names:
            fail("E115", repr(record.name[:64]), offset=8 + at)  # SPEC 2.9
        if record.begin != end:
            fail("E123", f"begins at {record.begin}, not {end}", field=record.name[:64])  # SPEC 2.17
        names.add(record.name)
        records.append(record)
        at, end = match.end(), record.end
    spaces = len(header) - at - 1
    if header[at : at + 1] != b"}" or header.count(b" ", at + 1) != spaces or spaces >= HEADER_BLOCK:
        fail("E122", offset=8 + at)
    return Header(8 + len(header), unescaped(metadata[1]), tuple(records))


@functools.lru_cache(maxsize=1024)
def _shape(text: bytes) -> tuple[int, ...]:
    return tuple(map(int, text.split(b","))) if text else ()


def _record(match: re.Match[bytes], before: int) -> TensorRecord:
    """A record from the parts of its text. before: the end of the record before it, an int object to share."""
    inside, dtype, shape, begin, end = match.groups()
    text = unescaped(inside) if b"\\" in inside else inside
    if len(text) > _RECORD_NAME_MAX:
        fail("E118", f"a name of {len(text)} bytes")  # SPEC 2.12
    name = text.decode("utf-8")
    if dtype not in _DTYPES:
        fail("E119", repr(dtype[:32]), field=name)  # SPEC 2.13
    sizes, first, last = _shape(shape), int(begin), int(end)
    if last > INTEGER_MAX:
        fail("E116", str(last), field=name)  # SPEC 2.10; sizes fail by their product
    _check_span(name, _DTYPES[dtype], sizes, first, last)
    return TensorRecord(name, _DTYPES[dtype], sizes, before if first == before else first, last)


def _check_span(name: str, dtype: DType, shape: tuple[int, ...], begin: int, end: int) -> None:
    size = dtype.size_of(shape)
    if len(shape) > DIMENSIONS_MAX or any(d < 1 for d in shape) or size >= TENSOR_MAX or not dtype.fits(shape):
        fail("E120", str(list(shape[:9])), field=f"{name}.shape")  # SPEC 2.14
    if begin < 0 or end - begin != size:
        fail("E121", f"[{begin}, {end}] for {size} bytes", field=f"{name}.data_offsets")  # SPEC 2.15


def _check_extent(header: Header, file_size: int) -> None:
    wanted = header.size + header.data_size
    if file_size < wanted:
        fail("E124", f"{file_size} of {wanted} bytes", offset=file_size)  # SPEC 2.18
    if file_size > wanted:
        fail("E125", f"{file_size - wanted} bytes too many", offset=wanted)  # SPEC 2.18


# --- find the fault of a header that the grammar does not accept --------------------------------------


def _located(error: StrictJsonError) -> ContainerError:
    return ContainerError(error.code, error.detail, offset=None if error.offset is None else 8 + error.offset)


def _explain(text: bytes) -> None:
    """Raise the first failure of SPEC 2.8 to 2.15, if any. text: the header without its spaces."""
    first: ContainerError | None = None
    names: set[str] = set()
    try:
        for begin, end in pieces(text, 0, len(text)):
            if not names:  # the metadata, because the magic contains its key
                name, check = "__metadata__", functools.partial(_explain_metadata, text, begin, end)
            else:
                name, value = _member(text, begin, end)
                check = functools.partial(_explain_record, name, value)
            if name in names:
                raise StrictJsonError("E115", repr(name[:64]), begin)  # SPEC 2.9
            names.add(name)
            if len(names) > _RECORDS_MAX:
                fail("E118", f"more than {_RECORDS_MAX} records")
            try:
                check()
            except ContainerError as error:
                first = first or error
        if not text.endswith(b"}"):
            raise StrictJsonError("E114", "something after the object", len(text))  # SPEC 2.8
    except StrictJsonError as error:
        raise _located(error) from None
    if first is not None:
        raise first


def _member(text: bytes, begin: int, end: int) -> tuple[str, Json]:
    """Key and value of one member. A long text is checked by the JSON grammar and returned as an empty one."""
    piece = text[begin:end]
    if len(piece) > PIECE_MAX:
        long = _LONG.fullmatch(piece)
        if long is None or len(long[1]) > PIECE_MAX:
            code = "E116" if _LONG_NUMBER.search(piece) else "E118"  # SPEC 2.10, 2.12
            fail(code, f"{len(piece)} bytes", offset=8 + begin)
        piece = long[1] + b':""'
    members = parse_piece(b"{" + piece + b"}", begin - 1)
    if not isinstance(members, dict) or len(members) != 1:
        raise StrictJsonError("E114", "nothing beside a comma", begin)
    return next(iter(members.items()))


def _explain_metadata(text: bytes, begin: int, end: int) -> None:
    # The magic contains the key and the opening brace.
    members: dict[str, Json] = {}
    for part_begin, part_end in pieces(text, text.index(b"{", begin), end, depth=2):
        key, value = _member(text, part_begin, part_end)
        if key in members:
            raise StrictJsonError("E115", repr(key[:64]), part_begin)  # SPEC 2.9
        members[key] = value
        if len(members) > 3:
            break
    if set(members) != {"format", "pxd", "manifest"}:
        fail("E118", "keys other than format, pxd, manifest", field="__metadata__")  # SPEC 2.12
    if not isinstance(members["manifest"], str):
        fail("E118", "not a string", field="__metadata__.manifest")  # SPEC 2.12


def _integers(value: Json) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    numbers = tuple(x for x in value if isinstance(x, int) and not isinstance(x, bool))
    return numbers if len(numbers) == len(value) else None


def _explain_record(name: str, value: Json) -> None:
    field = name[:64]
    if len(name.encode("utf-8", "surrogatepass")) > _RECORD_NAME_MAX:
        fail("E118", "a name of more than 1024 bytes", field=field)  # SPEC 2.12
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        fail("E118", "keys other than dtype, shape, data_offsets", field=field)  # SPEC 2.12
    dtype, shape, offsets = value["dtype"], _integers(value["shape"]), _integers(value["data_offsets"])
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        fail("E118", field=field)  # SPEC 2.12
    if dtype not in DType.__members__:
        fail("E119", repr(dtype[:32]), field=f"{field}.dtype")  # SPEC 2.13
    _check_span(field, DType(dtype), shape, *offsets)


def read_header(read: Callable[[int, int], bytes], file_size: int) -> tuple[Header, Manifest]:
    """Steps 1 (without the kind of file) to 8 of SPEC 8, for any source of bytes.

    read(offset, size) returns the bytes there, fewer at the end of the file. It is called at most twice, for
    the header alone. Raises ContainerError, ProfileError.
    """
    start = read(0, HEADER_BLOCK)
    _check_start(start, file_size)
    length = _header_length(start, file_size)
    header = _parse_header(start[8:] if length < HEADER_BLOCK else read(8, length), file_size)
    manifest = parse_manifest(header.manifest)
    check_manifest(manifest)
    _check_tensors(header.records, manifest)
    return header, manifest


def _check_tensors(records: Sequence[TensorRecord], manifest: Manifest) -> None:
    # SPEC 4.1, 4.2: the records must equal the layout of the manifest.
    sizes = [r.end - r.begin for r in records if r.name.startswith("__asset__.")]
    if len(sizes) != len(manifest.assets):
        fail("E212", f"{len(sizes)} assets in the data, {len(manifest.assets)} in the manifest", field="assets")
    for record, wanted in itertools.zip_longest(records, records_of(manifest.modules, sizes)):
        if record != wanted:
            detail = f"{_describe(record)} instead of {_describe(wanted)}"
            pad = record is not None and any(r and r.name.startswith("__pad__.") for r in (record, wanted))
            fail("E212", detail, clause="4.2" if pad else "4.1", field=record.name if record else None)


def _describe(record: TensorRecord | None) -> str:
    if record is None:
        return "nothing"
    return f"{record.name!r} {record.dtype.value} {list(record.shape)} at {record.begin}"
