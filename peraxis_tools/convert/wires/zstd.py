"""zstd through pyarrow, which `peraxis[compress]` installs with datasets."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from peraxis_tools.errors import ToolError, first_line
from peraxis_tools.process.optional import require

__all__ = ["MAGIC", "compress", "decompress"]

MAGIC: Final = b"\x28\xb5\x2f\xfd"
_LEVEL: Final = 1  # the level of the wires
_PIECE: Final = 1 << 24  # bytes to unpack at a time


def _arrow() -> Any:
    require("a wire under zstd", "pyarrow", extra="compress")
    return import_module("pyarrow")


def compress(data: bytes | memoryview) -> bytes:
    """Compress into one frame. Raises MissingPackageError."""
    return bytes(_arrow().Codec("zstd", compression_level=_LEVEL).compress(data, asbytes=True))


def decompress(data: bytes | memoryview, *, limit: int, where: str) -> bytes:
    """The content of a frame, which may have at most `limit` bytes. where: names it in errors.

    Raises ToolError for data that is not such a frame or is larger, MissingPackageError.
    """
    arrow = _arrow()
    stream = arrow.input_stream(arrow.BufferReader(bytes(data)), compression="zstd")
    parts: list[bytes] = []
    left = limit + 1
    try:
        while left > 0 and (part := stream.read(min(left, _PIECE))):
            parts.append(part)
            left -= len(part)
    except OSError as error:
        raise ToolError(f"{where}: not zstd data, or damaged ({first_line(error)}); fetch it again") from None
    if left <= 0:
        raise ToolError(
            f"{where}: unpacks to more than the {limit} bytes that the base allows; another base, or damaged"
        )
    return b"".join(parts)
