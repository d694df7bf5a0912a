"""The manifest: frozen dataclasses <-> canonical JSON (SPEC 3).

Parsing is two steps: `parse_manifest` turns bytes into typed values (SPEC 3.1 to 3.4), `check_manifest`
holds them to what clauses 3.5 to 3.12 say about their content. After that the types are trusted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from peraxis_format.canonical import Json, StrictJsonError, canonical_json, parse_strict_json
from peraxis_format.delta import (
    EXPONENT_MAX,
    EXPONENT_MIN,
    Axis,
    BaseRef,
    Encoding,
    tensor_shapes,
)
from peraxis_format.dtypes import DType
from peraxis_format.errors import fail

__all__ = [
    "ASSET_PATH",
    "COMPONENTS_MAX",
    "DIMENSIONS_MAX",
    "FEATURES",
    "MODULES_MAX",
    "Asset",
    "BaseIdentity",
    "Calibration",
    "ComponentEntry",
    "Identity",
    "Manifest",
    "ModuleEntry",
    "Producer",
    "base_digest",
    "check_manifest",
    "parse_manifest",
]

FEATURES: Final[frozenset[str]] = frozenset()  # SPEC 3.3: none are defined in 1.0
MODULES_MAX: Final = 65_536
COMPONENTS_MAX: Final = 8
DIMENSIONS_MAX: Final = 8
ASSET_PATH: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,118}\.(json|txt|model|jinja|tiktoken|md)")
# Printable ASCII without `/` and `\`; tensor names that begin with `__` are reserved.
_NAME: Final = re.compile(r"(?!__)[!-.0-\[\]-~]{1,512}")
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")

T = TypeVar("T")
E = TypeVar("E", Axis, DType, Encoding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a checkpoint is called: a hub id or folder name, and its revision where there is one."""

    id: str
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """The base: its name, revision, and the digest over its tensors (SPEC 3.11)."""

    digest: str
    id: str
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Producer:
    """The program that wrote the file."""

    name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The text on which scales were fitted. digest: over the token ids, 32-bit little-endian (SPEC 3.4)."""

    digest: str
    samples: int
    seed: int
    sequence_length: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """A small file of the fine-tuned checkpoint's folder."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentEntry:
    """Axis and exponent of one component."""

    axis: Axis
    exponent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleEntry:
    """One tensor of the fine-tuned checkpoint as the manifest describes it.

    sha256: hex digest of the module's range, None where it stores nothing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    encoding: Encoding
    components: tuple[ComponentEntry, ...]
    sha256: str | None
    base: BaseRef | None

    def tensors(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        """Name, dtype and shape of each stored tensor, in file order (SPEC 4.1)."""
        suffixes = tensor_shapes(
            shape=self.shape,
            dtype=self.dtype,
            encoding=self.encoding,
            axes=tuple(component.axis for component in self.components),
            base_shape=None if self.base is None else self.base.shape,
        )
        return [(f"{self.name}.{suffix}", dtype, shape) for suffix, dtype, shape in suffixes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a PXD file says of itself (SPEC 3.4). `modules` stands in execution order."""

    base: BaseIdentity
    fine_tuned: Identity
    producer: Producer
    modules: tuple[ModuleEntry, ...]
    calibration: Calibration | None = None
    tied: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    assets: tuple[Asset, ...] = ()
    features: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The canonical JSON (SPEC 3.2)."""
        return canonical_json(_manifest_json(self))

    @property
    def content_id(self) -> str:
        """The digest of the manifest's bytes: binds names, axes, shapes, payloads and base (SPEC 3.2)."""
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()


def base_digest(modules: Iterable[ModuleEntry]) -> str:
    """The digest over (name, dtype, shape, sha256) of every base tensor, in name order (SPEC 3.11)."""
    rows: list[Json] = [
        [m.name, m.base.dtype.value, list(m.base.shape), m.base.sha256]
        for m in sorted(modules, key=lambda m: m.name)
        if m.base is not None
    ]
    return "sha256:" + hashlib.sha256(canonical_json(rows)).hexdigest()


# --- typed values -> JSON ------------------------------------------------------------------------------


def _base_json(base: BaseRef | None) -> Json:
    return None if base is None else {"dtype": base.dtype.value, "sha256": base.sha256, "shape": list(base.shape)}


def _module_json(module: ModuleEntry) -> Json:
    return {
        "base": _base_json(module.base),
        "components": [{"axis": c.axis.value, "exponent": c.exponent} for c in module.components],
        "dtype": module.dtype.value,
        "encoding": module.encoding.value,
        "name": module.name,
        "sha256": module.sha256,
        "shape": list(module.shape),
    }


def _calibration_json(calibration: Calibration | None) -> Json:
    if calibration is None:
        return None
    return {
        "digest": calibration.digest,
        "samples": calibration.samples,
        "seed": calibration.seed,
        "sequence_length": calibration.sequence_length,
        "source": calibration.source,
    }


def _manifest_json(manifest: Manifest) -> Json:
    return {
        "assets": [{"path": asset.path, "sha256": asset.sha256} for asset in manifest.assets],
        "base": {"digest": manifest.base.digest, "id": manifest.base.id, "revision": manifest.base.revision},
        "calibration": _calibration_json(manifest.calibration),
        "dropped": list(manifest.dropped),
        "features": list(manifest.features),
        "fine_tuned": {"id": manifest.fine_tuned.id, "revision": manifest.fine_tuned.revision},
        "metadata": dict(manifest.metadata),
        "modules": [_module_json(module) for module in manifest.modules],
        "producer": {"name": manifest.producer.name, "version": manifest.producer.version},
        "tied": [list(pair) for pair in manifest.tied],
    }


# --- JSON -> typed values: each takes (value, path) and fails with E205 at the path --------------------


def _object(value: Json, path: str, keys: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        fail("E205", "not an object", field=path)
    wanted = set(keys.split())
    for key in sorted(value.keys() - wanted):
        fail("E205", f"unknown key {key!r}", field=path)
    for key in sorted(wanted - value.keys()):
        fail("E205", f"missing key {key!r}", field=path)
    return value


def _array(value: Json, path: str, item: Callable[[Json, str], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        fail("E205", "not an array", field=path)
    return tuple(item(element, f"{path}[{i}]") for i, element in enumerate(value))


def _text(value: Json, path: str) -> str:
    if not isinstance(value, str):
        fail("E205", "not a string", field=path)
    return value


def _optional(value: Json, path: str, item: Callable[[Json, str], T]) -> T | None:
    return None if value is None else item(value, path)


def _integer(value: Json, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        fail("E205", "not an integer", field=path)
    return value


def _natural(value: Json, path: str) -> int:
    number = _integer(value, path)
    if number < 0:
        fail("E205", f"{number} is negative", field=path)
    return number


def _matching(pattern: re.Pattern[str], what: str) -> Callable[[Json, str], str]:
    def item(value: Json, path: str) -> str:
        text = _text(value, path)
        if not pattern.fullmatch(text):
            fail("E205", f"not {what}", field=path)
        return text

    return item


_hex = _matching(_HEX, "64 lower-case hex digits")
_digest = _matching(_DIGEST, "sha256: and 64 lower-case hex digits")


def _one_of(kind: type[E], value: Json, path: str) -> E:
    text = _text(value, path)
    if text not in {member.value for member in kind}:
        fail("E205", f"unknown {kind.__name__.lower()} {text!r}", field=path)
    return kind(text)


def _dtype(value: Json, path: str) -> DType:
    return _one_of(DType, value, path)


def _base_ref(value: Json, path: str) -> BaseRef:
    fields = _object(value, path, "dtype sha256 shape")
    return BaseRef(
        dtype=_dtype(fields["dtype"], f"{path}.dtype"),
        shape=_array(fields["shape"], f"{path}.shape", _natural),
        sha256=_hex(fields["sha256"], f"{path}.sha256"),
    )


def _component(value: Json, path: str) -> ComponentEntry:
    fields = _object(value, path, "axis exponent")
    return ComponentEntry(
        axis=_one_of(Axis, fields["axis"], f"{path}.axis"),
        exponent=_integer(fields["exponent"], f"{path}.exponent"),
    )


def _module(value: Json, path: str) -> ModuleEntry:
    fields = _object(value, path, "base components dtype encoding name sha256 shape")
    return ModuleEntry(
        name=_text(fields["name"], f"{path}.name"),
        shape=_array(fields["shape"], f"{path}.shape", _natural),
        dtype=_dtype(fields["dtype"], f"{path}.dtype"),
        encoding=_one_of(Encoding, fields["encoding"], f"{path}.encoding"),
        components=_array(fields["components"], f"{path}.components", _component),
        sha256=_optional(fields["sha256"], f"{path}.sha256", _hex),
        base=_optional(fields["base"], f"{path}.base", _base_ref),
    )


def _asset(value: Json, path: str) -> Asset:
    fields = _object(value, path, "path sha256")
    return Asset(path=_text(fields["path"], f"{path}.path"), sha256=_hex(fields["sha256"], f"{path}.sha256"))


def _pair(value: Json, path: str) -> tuple[str, str]:
    names = _array(value, path, _text)
    if len(names) != 2:
        fail("E205", "not a pair of names", field=path)
    return names[0], names[1]


def _calibration(value: Json, path: str) -> Calibration:
    fields = _object(value, path, "digest samples seed sequence_length source")
    return Calibration(
        digest=_digest(fields["digest"], f"{path}.digest"),
        samples=_natural(fields["samples"], f"{path}.samples"),
        seed=_natural(fields["seed"], f"{path}.seed"),
        sequence_length=_natural(fields["sequence_length"], f"{path}.sequence_length"),
        source=_text(fields["source"], f"{path}.source"),
    )


def _identity(value: Json, path: str) -> Identity:
    fields = _object(value, path, "id revision")
    return Identity(
        id=_text(fields["id"], f"{path}.id"), revision=_optional(fields["revision"], f"{path}.revision", _text)
    )


def _base_identity(value: Json, path: str) -> BaseIdentity:
    fields = _object(value, path, "digest id revision")
    return BaseIdentity(
        digest=_digest(fields["digest"], f"{path}.digest"),
        id=_text(fields["id"], f"{path}.id"),
        revision=_optional(fields["revision"], f"{path}.revision", _text),
    )


def _producer(value: Json, path: str) -> Producer:
    fields = _object(value, path, "name version")
    return Producer(name=_text(fields["name"], f"{path}.name"), version=_text(fields["version"], f"{path}.version"))


def _metadata(value: Json, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        fail("E205", "not an object", field=path)
    return {key: _text(text, f"{path}[{key!r}]") for key, text in value.items()}


_KEYS: Final = "assets base calibration dropped features fine_tuned metadata modules producer tied"


def parse_manifest(data: bytes) -> Manifest:
    """Parse the manifest's bytes into typed values (SPEC 3.1 to 3.4, 3.7).

    Raises ProfileError (E202, E203, E205) or UnsupportedError (E204).
    """
    try:
        value = parse_strict_json(data)
    except StrictJsonError as error:
        fail("E202", error.detail, field="manifest")  # SPEC 3.1
    if _canonical_or_none(value) != data:
        fail("E203", field="manifest")  # SPEC 3.2
    if isinstance(value, dict):
        # SPEC 3.3: before the schema, since a feature may bring keys that this reader does not know.
        _check_features(value.get("features"))
    fields = _object(value, "manifest", _KEYS)
    manifest = Manifest(
        assets=_array(fields["assets"], "assets", _asset),
        base=_base_identity(fields["base"], "base"),
        calibration=_optional(fields["calibration"], "calibration", _calibration),
        dropped=_array(fields["dropped"], "dropped", _text),
        features=_array(fields["features"], "features", _text),
        fine_tuned=_identity(fields["fine_tuned"], "fine_tuned"),
        metadata=_metadata(fields["metadata"], "metadata"),
        modules=_array(fields["modules"], "modules", _module),
        producer=_producer(fields["producer"], "producer"),
        tied=_array(fields["tied"], "tied", _pair),
    )
    for path, names in (("tied", [alias for _, alias in manifest.tied]), ("dropped", list(manifest.dropped))):
        if names != sorted(names):
            fail("E205", "not sorted", field=path)  # SPEC 3.7
    return manifest


def _canonical_or_none(value: Json) -> bytes | None:
    try:
        return canonical_json(value)
    except UnicodeEncodeError:
        return None  # an unpaired surrogate has no canonical form


def _check_features(value: Json) -> None:
    if not isinstance(value, list) or not all(isinstance(feature, str) for feature in value):
        return  # the schema refuses it, with its path
    for feature in value:
        if feature not in FEATURES:
            fail("E204", repr(feature), field="features")


# --- what the content of a manifest must hold to -------------------------------------------------------


def check_manifest(manifest: Manifest) -> None:
    """Hold a parsed manifest to SPEC 3.5 to 3.12. Raises ProfileError (E206 to E211)."""
    _check_names(manifest)
    _check_limits(manifest)
    for i, module in enumerate(manifest.modules):
        _check_encoding(module, f"modules[{i}]")
    if manifest.base.digest != base_digest(manifest.modules):
        fail("E210", field="base.digest")  # SPEC 3.11
    _check_assets(manifest)


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
        if not _NAME.fullmatch(name):
            fail("E206", repr(name[:64]), field=path)  # SPEC 3.5
    modules: set[str] = set()
    for i, module in enumerate(manifest.modules):
        if module.name in modules:
            fail("E207", repr(module.name), field=f"modules[{i}].name")  # SPEC 3.6
        modules.add(module.name)
    taken = set(modules)
    for i, (name, alias) in enumerate(manifest.tied):
        if name not in modules:
            fail("E207", f"{name!r} is no module", field=f"tied[{i}][0]")  # SPEC 3.6
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
        shapes = [(module.shape, "shape")] + ([(module.base.shape, "base.shape")] if module.base else [])
        for shape, key in shapes:
            if len(shape) > DIMENSIONS_MAX or 0 in shape:
                fail("E208", f"shape {list(shape)}", field=f"modules[{i}].{key}")


def _check_encoding(module: ModuleEntry, path: str) -> None:
    # SPEC 3.9, 3.10
    base = module.base
    for k, component in enumerate(module.components):
        if not EXPONENT_MIN <= component.exponent <= EXPONENT_MAX:
            fail("E209", f"exponent {component.exponent}", field=f"{path}.components[{k}].exponent")
    if (module.encoding is Encoding.SIGN) != bool(module.components):
        fail("E209", f"{len(module.components)} components", field=f"{path}.components")
    if module.encoding is not Encoding.FULL:
        if base is None:
            fail("E209", "no base", field=f"{path}.base")
        if len(base.shape) != len(module.shape) or base.shape[1:] != module.shape[1:]:
            detail = f"{list(module.shape)} on a base of {list(base.shape)}"
            fail("E209", detail, field=f"{path}.base.shape")
        both_float = module.dtype.is_float and base.dtype.is_float
        if not (both_float or (module.encoding is Encoding.SAME and module.dtype is base.dtype)):
            fail("E209", f"{module.dtype.value} on {base.dtype.value}", field=f"{path}.dtype")
        if module.encoding is Encoding.SIGN and len(module.shape) < 2:
            fail("E209", f"sign of shape {list(module.shape)}", field=f"{path}.shape")
    if (module.sha256 is not None) != bool(module.tensors()):
        fail("E209", "sha256 without tensors, or tensors without sha256", field=f"{path}.sha256")


def _check_assets(manifest: Manifest) -> None:
    # SPEC 3.12
    seen: set[str] = set()
    for i, asset in enumerate(manifest.assets):
        lowered = asset.path.lower()
        if not ASSET_PATH.fullmatch(asset.path) or lowered.endswith(".index.json") or lowered in seen:
            fail("E211", repr(asset.path[:128]), field=f"assets[{i}].path")
        seen.add(lowered)
