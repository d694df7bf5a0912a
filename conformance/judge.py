"""Compare an adapter's result with the expected one; each function returns the difference, or an empty text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["compare_decoded", "compare_dump", "compare_tensors"]


def compare_decoded(expected: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """Every key of the case must have its value; an adapter may add keys."""
    return difference(expected, said, "")


def difference(expected: Any, said: Any, path: str) -> str:
    if isinstance(expected, dict):
        if not isinstance(said, Mapping):
            return f"{path or 'the result'} must be an object"
        if path == ".metadata" and set(said) != set(expected):
            return f"metadata holds {sorted(said)}, must hold {sorted(expected)}"
        found = (difference(value, said.get(key), f"{path}.{key}") for key, value in expected.items())
        return next(filter(None, found), "")
    if isinstance(expected, list):
        if not isinstance(said, list) or len(said) != len(expected):
            return f"{path.lstrip('.')} must have {len(expected)} entries"
        found = (difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(expected, said, strict=True)))
        return next(filter(None, found), "")
    if type(expected) is type(said) and expected == said:
        return ""
    return f"{path.lstrip('.')} is {json.dumps(said)}, must be {json.dumps(expected)}"


def compare_dump(expected: Mapping[str, Any], folder: Path) -> str:
    """The dumped files must have the digests of the case."""
    for i, module in enumerate(expected["modules"]):
        for k, part in enumerate(module["components"]):
            for word in ("signs", "scales"):
                if problem := hashed(folder / f"{i}.{k}.{word}", part[f"{word}_sha256"]):
                    return problem
        if module["exact_sha256"] and (problem := hashed(folder / f"{i}.exact", module["exact_sha256"])):
            return problem
    return ""


def hashed(path: Path, sha256: str) -> str:
    if not path.is_file():
        return f"the dump lacks {path.name}"
    return "" if hashlib.sha256(path.read_bytes()).hexdigest() == sha256 else f"the dump's {path.name} has other bytes"


def tensors(file: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (dtype, shape, bytes) of a safetensors file. Raises ValueError or KeyError for another file."""
    length = int.from_bytes(file[:8], "little")
    header, data = json.loads(file[8 : 8 + length]), file[8 + length :]
    made = {}
    for name, record in header.items():
        if name != "__metadata__":
            begin, end = record["data_offsets"]
            if not 0 <= begin <= end <= len(data):
                raise ValueError(name)
            made[name] = (record["dtype"], record["shape"], data[begin:end])
    return made


def compare_tensors(expected: bytes, made: bytes) -> str:
    """The same names, dtypes, shapes and bytes; the order in the file is free."""
    want = tensors(expected)
    try:
        have = tensors(made)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "the output is not a safetensors file"
    if want.keys() != have.keys():
        return f"the output holds {sorted(have)}, must hold {sorted(want)}"
    for name, (dtype, shape, data) in want.items():
        if have[name][:2] != (dtype, shape):
            return f"{name} is {have[name][0]} {have[name][1]}, must be {dtype} {shape}"
        if have[name][2] != data:
            return f"{name}{where(shape, data, have[name][2])}"
    return ""


def where(shape: list[int], want: bytes, have: bytes) -> str:
    """The first weight that differs, with both bit patterns."""
    if len(want) != len(have):
        return f" has {len(have)} bytes, must have {len(want)}"
    size = len(want) // math.prod(shape)
    first = next(i for i in range(len(want)) if want[i] != have[i]) // size
    index, rest = [], first
    for dimension in reversed(shape):
        rest, at = divmod(rest, dimension)
        index.append(at)
    bits = (data[first * size : (first + 1) * size][::-1].hex() for data in (have, want))
    return f"{index[::-1]} is 0x{next(bits)}, must be 0x{next(bits)}"
