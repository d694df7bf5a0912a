"""What is wrong with a local file of text, where, and what to do, in plain words; and the lines of JSON that it holds.

Readers of tables and of JSON give positions in the part that they hold at the time. The positions here are those of the
file: lines from 1, bytes from 0. Those of a .gz file are of the text in it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any, Final

__all__ = ["LineError", "fault_of", "json_rows", "open_text", "text_suffix"]

_AGAIN: Final = "fetch the file again"
_UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_MAGIC: Final = b"PAR1"  # the first and the last bytes of a parquet file


class LineError(ValueError):
    """Lines that are no rows. The message names the line, and the column of its fault."""


def text_suffix(path: Path) -> str:
    """The suffix that names the kind of a text, in lower case: `.jsonl` for `a.jsonl` and `a.jsonl.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def open_text(path: Path) -> IO[str]:
    """Open a file, or the text in a .gz file, as UTF-8 with or without its mark."""
    return gzip.open(path, "rt", encoding="utf-8-sig") if _packed(path) else open(path, encoding="utf-8-sig")


def json_rows(file: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file with one in each line; empty lines are skipped. Raises LineError."""
    for number, line in enumerate(file, 1):
        if line and not line.isspace():
            yield _json_row(line.rstrip("\r\n"), number)


def _json_row(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise LineError(_not_json(error.msg, number, error.colno)) from None
    except RecursionError:
        raise LineError(f"line {number} is nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise LineError(f"line {number}: {error}") from None
    if not isinstance(row, dict):
        raise LineError(f'line {number} is a {type(row).__name__}, not an object like {{"text": ...}}')
    return row


def _not_json(why: str, line: int, column: int) -> str:
    return f"line {line} is not JSON: {why} at column {column}; mend it"


def fault_of(path: Path) -> str | None:
    """The first fault of a local file; None if its bytes are as those of its kind. Reads the file."""
    try:
        if text_suffix(path) == ".parquet":
            return None if _packed(path) else _fault_of_parquet(path)
        return _fault_of_bytes(path) or _fault_of_json(path)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return _fault_of_gzip(path)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _packed(path: Path) -> bool:
    return path.name.endswith(".gz")


def _open_bytes(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if _packed(path) else open(path, "rb")


def _fault_of_parquet(path: Path) -> str | None:
    with open(path, "rb") as file:
        ends = [file.read(len(_MAGIC))]
        file.seek(max(0, path.stat().st_size - len(_MAGIC)))
        ends.append(file.read())
    if ends[0] != _MAGIC:
        return f"is not a parquet file, as it does not begin with {_MAGIC.decode()}"
    return None if ends[1] == _MAGIC else f"is cut off, as a parquet file ends with {_MAGIC.decode()}; {_AGAIN}"


def _fault_of_bytes(path: Path) -> str | None:
    """The first byte that is not UTF-8, and an empty file."""
    offset, empty = 0, True
    inside = " of the text in it" if _packed(path) else ""
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(_UTF16_MARKS):
                return "is UTF-16; save it as UTF-8"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                at = offset + error.start
                return f"line {number} is not UTF-8 at byte {at}{inside} (0x{line[error.start]:02x}); save it as UTF-8"
            offset += len(line)
            empty = empty and line.isspace()
    return "is empty; name another text" if empty else None


def _fault_of_json(path: Path) -> str | None:
    """The first line that is no JSON. A .json file holds one value, or one in each line."""
    kind = text_suffix(path)
    try:
        with open_text(path) as file:
            if kind == ".jsonl" or (kind == ".json" and not _is_one_value(file)):
                file.seek(0)
                for _ in json_rows(file):
                    pass
    except LineError as error:
        return str(error)
    return None


def _is_one_value(file: IO[str]) -> bool:
    """Whether the file is one JSON value. Raises LineError for a broken one of several lines."""
    try:
        json.loads(file.read())
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise LineError(_not_json(error.msg, error.lineno, error.colno)) from None
        return False
    except RecursionError:
        raise LineError("is nested too deeply") from None
    return True


def _fault_of_gzip(path: Path) -> str:
    """How far the text in a .gz file can be read."""
    read = 0
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return "is not compressed, although its name ends in .gz; rename it, or fetch the file again"
    try:
        with gzip.open(path, "rb") as packed:
            while part := packed.read1(1 << 16):
                read += len(part)
    except EOFError:
        return f"is cut off: its compressed data ends after {read} bytes of text; {_AGAIN}"
    except (gzip.BadGzipFile, zlib.error):
        pass
    return f"is damaged: its compressed data is wrong after {read} bytes of text; {_AGAIN}"
