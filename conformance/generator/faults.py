"""Small edits that plant one fault: hooks for `build`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from .build import Record, Tensor, table, untabled

__all__ = ["added", "bytes_at", "drop_tensor", "patched", "put", "record", "removed", "replaced", "retensor", "swapped"]

Edit = Callable[[Any], Any]


def at(path: tuple[Any, ...], value: Any) -> Any:
    for step in path[:-1]:
        value = value[step]
    return value


def put(*path: Any, to: Any) -> Edit:
    """Set the value at a path of keys and indexes of the manifest."""

    def edit(manifest: dict[str, Any]) -> dict[str, Any]:
        made = copy.deepcopy(manifest)
        at(path, made)[path[-1]] = to
        return made

    return edit


def added(module: dict[str, Any], *digests: str, replace: bool = False) -> Edit:
    """Add a module with its digests after the others, or replace all of them."""

    def edit(manifest: dict[str, Any]) -> dict[str, Any]:
        modules, held = ([], []) if replace else (manifest["modules"], untabled(manifest["digests"]))
        return {**manifest, "modules": [*modules, module], "digests": table([*held, *digests])}

    return edit


def removed(*path: Any) -> Edit:
    """Remove the key at a path."""

    def edit(manifest: dict[str, Any]) -> dict[str, Any]:
        made = copy.deepcopy(manifest)
        del at(path, made)[path[-1]]
        return made

    return edit


def replaced(old: Any, new: Any, count: int = 1) -> Edit:
    """Replace text or bytes, which must occur."""

    def edit(text: Any) -> Any:
        if isinstance(new, bytes) and isinstance(text, str):
            text = text.encode()
        sought = old.encode() if isinstance(text, bytes) and isinstance(old, str) else old
        if sought not in text:
            raise LookupError(f"{old!r} does not occur in {text[:200]!r}")
        return text.replace(sought, new, count)

    return edit


def record(index: int, **changes: Any) -> Edit:
    """Change the fields of one record of the header; a value of None removes the field."""

    def edit(records: list[Record]) -> list[Record]:
        made = copy.deepcopy(records)
        for key, value in changes.items():
            made[index][key] = value
            if value is None:
                del made[index][key]
        return made

    return edit


def patched(index: int, offset: int, value: bytes) -> Edit:
    """Overwrite bytes of one tensor before its digest is taken."""

    def edit(tensors: list[Tensor]) -> list[Tensor]:
        made = list(tensors)
        data = bytearray(made[index].data)
        start = offset % len(data)
        data[start : start + len(value)] = value
        made[index] = dataclasses.replace(made[index], data=bytes(data))
        return made

    return edit


def bytes_at(offset: int, value: bytes) -> Edit:
    """Overwrite bytes of the data or the file, after every digest is taken."""

    def edit(data: bytes) -> bytes:
        start = offset % len(data)
        return data[:start] + value + data[start + len(value) :]

    return edit


def retensor(index: int, **changes: Any) -> Edit:
    """Change name, dtype, shape or data of one tensor; the digests follow."""

    def edit(tensors: list[Tensor]) -> list[Tensor]:
        made = list(tensors)
        made[index] = dataclasses.replace(made[index], **changes)
        return made

    return edit


def drop_tensor(index: int) -> Edit:
    """Omit one tensor."""
    return lambda tensors: [tensor for i, tensor in enumerate(tensors) if i != index % len(tensors)]


def swapped(first: int, second: int) -> Edit:
    """Exchange two tensors or records."""

    def edit(items: list[Any]) -> list[Any]:
        made = list(items)
        made[first], made[second] = made[second], made[first]
        return made

    return edit
