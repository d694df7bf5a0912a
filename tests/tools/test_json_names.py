"""The documents of --json: a concept has one name in all of them, and a name one kind of value."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final

import pytest

import peraxis_format as pxd
import peraxis_tools.report
from peraxis_tools.compress.run.dry_run import RunEstimate
from peraxis_tools.compress.run.run import CompressResult
from peraxis_tools.demo import DemoStep

# Names that were in use for a concept, and the one that it has: a reader of two documents looks for one key.
OTHER_NAMES: Final[Mapping[str, str]] = {
    "file": "path of a file here, name of one elsewhere",
    "folder": "path",
    "output": "path",
    "size": "bytes",
    "file_bytes": "bytes",
    "file_size": "bytes",
    "full_size": "full_bytes",
    "checkpoint_bytes": "full_bytes",
    "subtype": "group",
    "by_subtype": "by_group",
    "bits": "masks",
    "accepts": "expectation",
    "signed": "encodings, the number of modules by encoding",
    "unchanged": "encodings",
    "exact": "encodings",
    "exact_updates": "encodings",
    "sign": "encodings",
    "full": "encodings",
    "same": "encodings",
    "exact_blocks": "blocks",
}
_IMPORTED_FOR_TYPES: Final[dict[str, Any]] = {
    "CompressResult": CompressResult,
    "RunEstimate": RunEstimate,
}
_MANIFEST: Final = pxd.Manifest  # its names are those of SPEC 3


def results() -> dict[str, type]:
    """The types that a command prints: those that the reports render."""
    found: dict[str, type] = {}
    for module in pkgutil.iter_modules(peraxis_tools.report.__path__):
        report = importlib.import_module(f"peraxis_tools.report.{module.name}")
        for name, function in vars(report).items():
            if name.startswith("render_"):
                hints = typing.get_type_hints(function, localns=_IMPORTED_FOR_TYPES)
                kind = hints[next(iter(hints))]
                if dataclasses.is_dataclass(kind) and kind is not DemoStep:
                    found[kind.__name__] = typing.cast("type", kind)
    return found


def kind_of(hint: Any) -> str:
    """text, number, flag, list or object, as `to_json` writes a value of this type; "" for None."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        [kind] = {kind_of(each) for each in typing.get_args(hint)} - {""}
        return kind
    if hint is type(None):
        return ""
    if origin is typing.Literal:
        return "text"
    plain = origin or hint
    for kind, classes in (
        ("text", (str, Path, Enum)),
        ("flag", (bool,)),
        ("number", (int, float)),
        ("object", (Mapping,)),
        ("list", (Sequence,)),
    ):
        if issubclass(plain, classes):
            return kind
    assert dataclasses.is_dataclass(plain), hint
    return "object"


def keys(document: type, place: str) -> Iterator[tuple[str, str, str]]:
    """(key, kind of its value, place) of every key that a document may hold, at any depth."""
    if document is _MANIFEST:
        return
    hints = typing.get_type_hints(document, localns=_IMPORTED_FOR_TYPES)
    for field in dataclasses.fields(document):
        yield field.name, kind_of(hints[field.name]), f"{place}.{field.name}"
        for inner in inner_types(hints[field.name]):
            yield from keys(inner, f"{place}.{field.name}")


def inner_types(hint: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(hint):
        yield typing.cast("type", hint)
    for each in typing.get_args(hint):
        yield from inner_types(each)


def every_key() -> list[tuple[str, str, str]]:
    return [key for name, document in results().items() for key in keys(document, name)]


def test_the_documents_are_those_of_all_verbs() -> None:
    names = set(results())
    assert {"CompressResult", "InspectResult", "VerifyResult", "EvaluateResult", "DemoResult", "RunEstimate"} < names
    assert len(names) >= 19


@pytest.mark.parametrize("other", OTHER_NAMES)
def test_no_document_has_another_name_of_a_concept(other: str) -> None:
    assert [place for key, _, place in every_key() if key == other] == [], f"call it: {OTHER_NAMES[other]}"


def test_a_name_has_one_kind_of_value_in_all_documents() -> None:
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, kind, place in every_key():
        found[key][kind].append(place)
    assert {key: dict(kinds) for key, kinds in found.items() if len(kinds) > 1} == {}
