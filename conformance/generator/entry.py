"""One case of the corpus before it is written: bytes for each role, and the expected result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PHASES", "Cut", "Entry", "Made", "Special", "refused"]

PHASES = {"1": "container", "2": "profile", "3": "payload", "4": "binding"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """The first `length` bytes of the file of another case."""

    source: str
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A file too large to store, that `generator.large` makes from its name."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Special:
    """A file that cannot be stored: kind is "directory", "fifo", "symlink" or "sparse" (with `size`)."""

    kind: str
    source: str | None = None
    size: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """files: role (file, base, output, source/<name>) -> its content."""

    id: str
    clause: str
    operation: str = "decode"
    phase: str | None = None
    codes: tuple[str, ...] = ()
    files: Mapping[str, bytes | Cut | Made | Special]
    expect: Mapping[str, Any] = field(default_factory=dict)
    seconds: int = 10
    mib: int = 256
    note: str = ""
    features: tuple[str, ...] = ()


def refused(id: str, codes: str, clause: str, file: Any, note: str = "", **more: Any) -> Entry:
    """A file that `decode` must reject; codes are separated by spaces, the first one gives the phase."""
    listed = tuple(codes.split())
    phase = "profile" if listed[0] == "E201" else PHASES[listed[0][1]]
    return Entry(id=id, clause=clause, phase=phase, codes=listed, files={"file": file}, note=note, **more)
