"""The differences of two manifests, without their modules."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping

import peraxis_format as pxd
from peraxis_tools.diff.result import ManifestChange

__all__ = ["manifest_changes"]


def manifest_changes(a: pxd.Manifest, b: pxd.Manifest) -> tuple[ManifestChange, ...]:
    """One change for each field that differs: names first, then the other fields."""
    fields_a, fields_b = dict(_fields(a)), dict(_fields(b))
    names = [*fields_a, *(name for name in fields_b if name not in fields_a)]
    changes = [
        ManifestChange(field=name, a=fields_a.get(name), b=fields_b.get(name))
        for name in names
        if fields_a.get(name) != fields_b.get(name)
    ]
    order_a = [module.name for module in a.modules]
    order_b = [module.name for module in b.modules]
    if order_a != order_b and sorted(order_a) == sorted(order_b):
        changes.append(ManifestChange(field="modules", a="in this order", b="in another order"))
    return tuple(changes)


def _fields(manifest: pxd.Manifest) -> Iterable[tuple[str, str | None]]:
    yield from _texts("base", {"id": manifest.base.id, "revision": manifest.base.revision})
    yield from _texts("base", {"digest": manifest.base.digest})
    yield from _texts("fine_tuned", {"id": manifest.fine_tuned.id, "revision": manifest.fine_tuned.revision})
    yield from _texts("producer", {"name": manifest.producer.name, "version": manifest.producer.version})
    if manifest.calibration is not None:
        yield from _texts("calibration", dataclasses.asdict(manifest.calibration))
    for name, alias in manifest.tied:
        yield f"tied[{alias!r}]", name
    for name in manifest.dropped:
        yield f"dropped[{name!r}]", "dropped"
    for asset in manifest.assets:
        yield f"assets[{asset.path!r}]", asset.sha256
    for key in sorted(manifest.metadata):
        yield from _metadata(key, manifest.metadata[key])


def _metadata(name: str, value: str) -> Iterable[tuple[str, str | None]]:
    """Pairs of field and text; a text that is a JSON object, as our tools write it, is split by its keys."""
    field = f"metadata[{name!r}]"
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        yield field, value
        return
    for key, item in found.items():
        yield f"{field}.{key}", json.dumps(item, ensure_ascii=False)


def _texts(prefix: str, values: Mapping[str, object]) -> Iterable[tuple[str, str | None]]:
    for key, value in values.items():
        yield f"{prefix}.{key}", None if value is None else str(value)
