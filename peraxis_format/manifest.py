"""The manifest: frozen dataclasses <-> canonical JSON (SPEC 3).

The text leaves out usual values of a module and has all digests in one field (`digests`); here each module has every
field.

Reading has two steps: schema.py turns bytes into these types (SPEC 3.1 to 3.4), profile.py checks their content by
clauses 3.5 to 3.12 and 3.14. After that the values are trusted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from peraxis_format.canonical import canonical_json
from peraxis_format.delta import (
    Axis,
    BaseRef,
    Encoding,
    tensor_shapes,
)
from peraxis_format.digest_table import written
from peraxis_format.dtypes import DType
from peraxis_format.sizes import payload_size
from peraxis_format.strict_json import Json

__all__ = [
    "ASSET_PATH",
    "CHANGED_KEY",
    "COMPONENTS_MAX",
    "DIMENSIONS_MAX",
    "ENTRIES_MAX",
    "EXACT_FEATURE",
    "FEATURES",
    "METADATA_MAX",
    "MODULES_MAX",
    "NO_BASE",
    "PART_KEY",
    "TENSOR_MAX",
    "Asset",
    "BaseIdentity",
    "Calibration",
    "ComponentEntry",
    "Identity",
    "Manifest",
    "ModuleEntry",
    "Producer",
    "base_digest",
    "result_digest",
]

EXACT_FEATURE: Final = "exact"  # SPEC 3.14: exact modules, and the fields of a chain
FEATURES: Final[frozenset[str]] = frozenset([EXACT_FEATURE])  # SPEC 3.3
MODULES_MAX: Final = 2**18
ENTRIES_MAX: Final = 2**18  # also for assets, dropped, tied and metadata
METADATA_MAX: Final = 2**24  # bytes of its canonical JSON
COMPONENTS_MAX: Final = 8
DIMENSIONS_MAX: Final = 8
CHANGED_KEY: Final = "peraxis.changed"  # metadata: the number of weights that an update changes
PART_KEY: Final = "peraxis.part"  # metadata: the file is a part of a delta, and these are all of its modules
TENSOR_MAX: Final = 2**53  # bytes of a tensor of the file or of the base are fewer
ASSET_PATH: Final = re.compile(
    r"([A-Za-z0-9_][A-Za-z0-9_-]{0,62}/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,118}\.(json|txt|model|jinja|tiktoken|md)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The name of a checkpoint: a hub id or folder name, and its revision if it has one."""

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

    sha256: hex digest of the module's tensor in the file, None if it has none. For an `exact` module, size: the bytes
    of its data; result: hex digest of the new tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    encoding: Encoding
    components: tuple[ComponentEntry, ...]
    sha256: str | None
    base: BaseRef | None
    size: int | None = None
    result: str | None = None

    def parts(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        """Suffix, dtype and shape of each part, in file order (SPEC 4.1)."""
        return tensor_shapes(
            shape=self.shape,
            dtype=self.dtype,
            encoding=self.encoding,
            axes=tuple(component.axis for component in self.components),
            base_shape=None if self.base is None else self.base.shape,
            size=self.size,
        )

    def tensor(self) -> tuple[str, DType, tuple[int, ...]] | None:
        """Name, dtype and shape of the module's tensor in the file; None if it has none (SPEC 4.1)."""
        if self.encoding is Encoding.FULL:
            return f"{self.name}.full", self.dtype, self.shape
        size = payload_size(self.parts())
        return (f"{self.name}.delta", DType.U8, (size,)) if size else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The manifest of a PXD file (SPEC 3.4). `modules` is in execution order.

    previous: content ID of the update before this one; result: the digest over all new tensors (SPEC 3.14).
    """

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
    previous: str | None = None
    result: str | None = None

    def names(self) -> dict[str, list[str]]:
        """Module -> the names of its tensor in the checkpoint: its own, and its aliases (SPEC 3.7)."""
        found = {module.name: [module.name] for module in self.modules}
        for name, alias in self.tied:
            found[name].append(alias)
        return found

    def to_bytes(self) -> bytes:
        """The canonical JSON (SPEC 3.2)."""
        return canonical_json(_manifest_json(self))

    @property
    def content_id(self) -> str:
        """The digest of the manifest's bytes; it binds names, axes, shapes, payloads and base (SPEC 3.2)."""
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()


def base_digest(modules: Iterable[ModuleEntry]) -> str:
    """The digest over (name, dtype, shape, sha256) of every base tensor, in name order (SPEC 3.11)."""
    digest, opening = hashlib.sha256(), b"["
    for m in sorted(modules, key=lambda m: m.name):
        if m.base is not None:
            row: Json = [m.name, m.base.dtype.value, list(m.base.shape), m.base.sha256]
            digest.update(opening + canonical_json(row))
            opening = b","
    digest.update(b"]" if opening == b"," else b"[]")
    return "sha256:" + digest.hexdigest()


NO_BASE: Final = base_digest(())
"""The base digest of a file that binds no tensor of a base, like an anchor."""


def result_digest(modules: Iterable[ModuleEntry]) -> str | None:
    """The digest over every new tensor, as `base_digest` over the base's; None if one is unknown (SPEC 3.14)."""
    rows: list[Json] = []
    for m in sorted(modules, key=lambda m: m.name):
        known = _known_result(m)
        if known is None:
            return None
        rows.append([m.name, m.dtype.value, list(m.shape), known])
    return "sha256:" + hashlib.sha256(canonical_json(rows)).hexdigest()


def _known_result(module: ModuleEntry) -> str | None:
    """The hex digest of a new tensor, if the manifest determines it."""
    if module.encoding is Encoding.EXACT:
        return module.result
    if module.encoding is Encoding.FULL:
        return module.sha256
    base = module.base
    unchanged = base is not None and (base.dtype, base.shape) == (module.dtype, module.shape)
    return base.sha256 if base is not None and unchanged and module.encoding is Encoding.SAME else None


def _module_json(module: ModuleEntry) -> Json:
    # SPEC 3.4: usual values are left out.
    base, made = module.base, dict[str, Json](name=module.name, shape=list(module.shape))
    if base is None:
        made["base"] = None
    elif (base.dtype, base.shape) != (module.dtype, module.shape):
        made["base"] = {"dtype": base.dtype.value, "shape": list(base.shape)}
    if module.dtype is not DType.BF16:
        made["dtype"] = module.dtype.value
    if module.encoding is Encoding.SIGN:
        made["components"] = [[c.axis.value, c.exponent] for c in module.components]
    else:
        made["encoding"] = module.encoding.value
    if module.encoding is Encoding.EXACT:
        made["size"] = module.size
    return made


def _digests(modules: Iterable[ModuleEntry]) -> str:
    # SPEC 3.13
    all_of = ((module.base.sha256 if module.base else None, module.sha256, module.result) for module in modules)
    return written(digest for digests in all_of for digest in digests)


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
    chain: dict[str, Json] = {}
    if EXACT_FEATURE in manifest.features:
        chain = {"previous": manifest.previous, "result": manifest.result}
    return {
        **chain,
        "assets": [{"path": asset.path, "sha256": asset.sha256} for asset in manifest.assets],
        "base": {"digest": manifest.base.digest, "id": manifest.base.id, "revision": manifest.base.revision},
        "calibration": _calibration_json(manifest.calibration),
        "digests": _digests(manifest.modules),
        "dropped": list(manifest.dropped),
        "features": list(manifest.features),
        "fine_tuned": {"id": manifest.fine_tuned.id, "revision": manifest.fine_tuned.revision},
        "metadata": dict(manifest.metadata),
        "modules": [_module_json(module) for module in manifest.modules],
        "producer": {"name": manifest.producer.name, "version": manifest.producer.version},
        "tied": [list(pair) for pair in manifest.tied],
    }
