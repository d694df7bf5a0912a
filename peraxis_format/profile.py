"""Check a parsed manifest: names, limits, encodings, base digest, assets, result (SPEC 3.5 to 3.12, 3.14)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from peraxis_format.delta import EXPONENT_MAX, EXPONENT_MIN, Encoding
from peraxis_format.dtypes import DType
from peraxis_format.errors import fail
from peraxis_format.manifest import (
    ASSET_PATH,
    COMPONENTS_MAX,
    DIMENSIONS_MAX,
    EXACT_FEATURE,
    MODULES_MAX,
    TENSOR_MAX,
    Manifest,
    ModuleEntry,
    base_digest,
    result_digest,
)

__all__ = ["NAME", "check_manifest"]

# Printable ASCII without `/` and `\\`; tensor names that begin with `__` are reserved.
NAME: Final = re.compile(r"(?!__)[!-.0-\[\]-~]{1,512}")


def check_manifest(manifest: Manifest) -> None:
    """Check a parsed manifest by SPEC 3.5 to 3.12 and 3.14. Raises ProfileError (E206 to E211, E214)."""
    _check_names(manifest)
    _check_limits(manifest)
    for i, module in enumerate(manifest.modules):
        _check_encoding(module, f"modules[{i}]")
    if manifest.base.digest != base_digest(manifest.modules):
        fail("E210", field="base.digest")  # SPEC 3.11
    _check_assets(manifest)
    _check_chain(manifest)


def _named(manifest: Manifest) -> Iterable[tuple[str, str]]:
    for i, module in enumerate(manifest.modules):
        yield module.name, f"modules[{i}].name"
    for i, pair in enumerate(manifest.tied):
        yield pair[0], f"tied[{i}][0]"
        yield pair[1], f"tied[{i}][1]"
    for i, name in enumerate(manifest.dropped):
        yield name, f"dropped[{i}]"


def _check_names(manifest: Manifest) -> None:
    for name, path in _named(manifest):
        if not NAME.fullmatch(name):
            fail("E206", repr(name[:64]), field=path)  # SPEC 3.5
    modules: set[str] = set()
    for i, module in enumerate(manifest.modules):
        if module.name in modules:
            fail("E207", repr(module.name), field=f"modules[{i}].name")  # SPEC 3.6
        modules.add(module.name)
    taken = set(modules)
    for i, (name, alias) in enumerate(manifest.tied):
        if name not in modules:
            fail("E207", f"{name!r} is not a module", field=f"tied[{i}][0]")  # SPEC 3.6
        if alias in taken:
            fail("E207", repr(alias), field=f"tied[{i}][1]")  # SPEC 3.6
        taken.add(alias)
    for i, name in enumerate(manifest.dropped):
        if name in taken:
            fail("E207", repr(name), field=f"dropped[{i}]")  # SPEC 3.6
        taken.add(name)


def _check_limits(manifest: Manifest) -> None:
    # SPEC 3.8
    if not 1 <= len(manifest.modules) <= MODULES_MAX:
        fail("E208", f"{len(manifest.modules)} modules", field="modules")
    for i, module in enumerate(manifest.modules):
        if len(module.components) > COMPONENTS_MAX:
            fail("E208", f"{len(module.components)} components", field=f"modules[{i}].components")
        _check_shape(module.shape, module.dtype, f"modules[{i}].shape")
        if module.base is not None:
            _check_shape(module.base.shape, module.base.dtype, f"modules[{i}].base.shape")


def _check_shape(shape: tuple[int, ...], dtype: DType, path: str) -> None:
    # SPEC 3.8: the limits of a record (2.14), because a base tensor has no record.
    if len(shape) > DIMENSIONS_MAX or 0 in shape or dtype.size_of(shape) >= TENSOR_MAX or not dtype.fits(shape):
        fail("E208", f"shape {list(shape[:9])}", field=path)


def _check_encoding(module: ModuleEntry, path: str) -> None:
    # SPEC 3.9, 3.10
    base = module.base
    for k, component in enumerate(module.components):
        if not EXPONENT_MIN <= component.exponent <= EXPONENT_MAX:
            fail("E209", f"exponent {component.exponent}", field=f"{path}.components[{k}].exponent")
    if (module.encoding is Encoding.SIGN) != bool(module.components):
        fail("E209", "no components", field=f"{path}.components")
    if module.encoding is not Encoding.FULL:
        if base is None:
            fail("E209", "no base", field=f"{path}.base")
        if len(base.shape) != len(module.shape) or base.shape[1:] != module.shape[1:]:
            detail = f"{list(module.shape)} on a base of {list(base.shape)}"
            fail("E209", detail, clause="3.10", field=f"{path}.base.shape")
        both_float = module.dtype.is_float and base.dtype.is_float
        if module.encoding is Encoding.EXACT and (module.dtype is not base.dtype or not module.size):
            detail = f"exact {module.dtype.value} on {base.dtype.value}, {module.size} bytes"
            fail("E209", detail, field=f"{path}.encoding")
        if not (both_float or (module.encoding is Encoding.SAME and module.dtype is base.dtype)):
            fail("E209", f"{module.dtype.value} on {base.dtype.value}", field=f"{path}.dtype")
        if module.encoding is Encoding.SIGN and len(module.shape) < 2:
            fail("E209", f"sign of shape {list(module.shape)}", field=f"{path}.shape")


def _check_chain(manifest: Manifest) -> None:
    # SPEC 3.14
    if EXACT_FEATURE not in manifest.features:
        for i, module in enumerate(manifest.modules):
            if module.encoding is Encoding.EXACT:
                fail("E209", "exact without its feature", field=f"modules[{i}].encoding")
    elif manifest.result != result_digest(manifest.modules):
        fail("E214", field="result")


def _check_assets(manifest: Manifest) -> None:
    # SPEC 3.12
    seen: set[str] = set()
    for i, asset in enumerate(manifest.assets):
        lowered = asset.path.lower()
        if not ASSET_PATH.fullmatch(asset.path) or lowered.endswith(".index.json") or lowered in seen:
            fail("E211", repr(asset.path[:128]), field=f"assets[{i}].path")
        seen.add(lowered)
