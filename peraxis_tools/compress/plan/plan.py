"""The encoding of each tensor and its bytes: a pure function of names, dtypes, shapes and options.

    mask    d_out * ceil(d_in / 8) bytes       row, col, row+col, tensor: 2 * (d_out | d_in | d_out + d_in | 1)
    sign    the sum over components, each tensor aligned to 64        full    elements * itemsize

A tensor gets signs if both checkpoints have it as a float matrix (SPEC 3.9) and signs make it smaller. These are full:
norms, biases and other vectors; new tensors; matrices that are much smaller than a layer's weights (a router's few
rows, a convolution of width 4); embeddings and lm_head if requested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from peraxis_format import Axis, DType, Encoding, Identity, payload_size, tensor_shapes
from peraxis_tools.checkpoints.kinds import execution_key, kind_of, layer_of
from peraxis_tools.compress.options import AUTO, EVERYTHING, CompressOptions, OptionError
from peraxis_tools.deltas.whole_tensors import full_bytes

__all__ = [
    "EXACT",
    "LEFT_AT_BASE",
    "TABLES",
    "UNCHANGED",
    "WITHIN_BUDGET",
    "Plan",
    "PlannedModule",
    "TensorLike",
    "module_bytes",
    "plan",
    "table_or_kind",
]

_AUTO_EMBEDDING_MASKS: Final = 3
EXACT: Final = "exact"  # the reason of tensors that were requested losslessly
WITHIN_BUDGET: Final = "within the budget"
LEFT_AT_BASE: Final = "the budget buys more elsewhere"
UNCHANGED: Final = "unchanged"
TABLES: Final = ("embedding", "lm_head")


class TensorLike(Protocol):
    """The attributes of a tensor that a plan needs."""

    @property
    def dtype(self) -> DType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModule:
    """One tensor of the fine-tuned checkpoint. axis None: chosen when the data is read."""

    name: str
    kind: str
    dtype: DType
    shape: tuple[int, ...]
    base_dtype: DType | None
    base_shape: tuple[int, ...] | None
    encoding: Encoding
    components: int = 0
    axis: Axis | None = None
    reason: str = ""

    @property
    def payload_bytes(self) -> int:
        """The predicted bytes in the file; an open axis counts as row+col, the largest."""
        return module_bytes(self, components=self.components, axis=self.axis, same=self.encoding is Encoding.SAME)

    @property
    def compressible(self) -> bool:
        """Whether the format allows signs for this tensor (SPEC 3.9, 3.10)."""
        return _compressible(self.dtype, self.shape, self.base_dtype, self.base_shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All modules in execution order, aliases, and the base's tensors that the fine-tuned checkpoint lacks.

    assets: path and bytes of each file of the fine-tuned folder that the delta contains (SPEC 3.12). identities: those
    of base and fine-tune; None: not known yet. left_behind: the metadata of that name (assets.py).
    file_bytes: the predicted size of the file, with header and assets; None: not computed yet (size.py).
    """

    modules: tuple[PlannedModule, ...]
    tied: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...]
    assets: tuple[tuple[str, int], ...] = ()
    identities: tuple[Identity, Identity] | None = None
    left_behind: str = ""
    file_bytes: int | None = None

    @property
    def payload_bytes(self) -> int:
        """The predicted bytes of all payloads, without header and assets."""
        return sum(module.payload_bytes for module in self.modules)

    @property
    def full_bytes(self) -> int:
        """The bytes of the fine-tuned checkpoint's tensors; tied ones count once."""
        return full_bytes(self.modules)

    def with_choices(self, choices: Mapping[str, tuple[Encoding, int]]) -> Plan:
        """A plan with these encodings and numbers of masks, by name."""
        modules = []
        for module in self.modules:
            encoding, components = choices.get(module.name, (module.encoding, module.components))
            changed = (encoding, components) != (module.encoding, module.components)
            reason = LEFT_AT_BASE if encoding is Encoding.SAME else WITHIN_BUDGET
            reason = "" if encoding is Encoding.SIGN else reason if changed else module.reason
            modules.append(replace(module, components=components, encoding=encoding, reason=reason))
        return replace(self, modules=tuple(modules))


def table_or_kind(name: str, shape: tuple[int, ...]) -> str:
    """The kind by kinds.py; matrices outside of all layers are tables."""
    kind = kind_of(name, shape)
    # A matrix outside of all layers is a table of a vocabulary, whatever its name; a convolution is none.
    return "embedding" if kind == "other" and len(shape) == 2 and layer_of(name) is None else kind


def module_bytes(module: PlannedModule, *, components: int, axis: Axis | None, same: bool = False) -> int:
    """The bytes of this module with this many components (0: full, or only the tail if `same`), with padding."""
    encoding = Encoding.SIGN if components and module.base_shape is not None else Encoding.FULL
    shapes = tensor_shapes(
        shape=module.shape,
        dtype=module.dtype,
        encoding=Encoding.SAME if same else encoding,
        axes=(axis or Axis.ROW_COL,) * (0 if same else components),
        base_shape=module.base_shape,
    )
    return payload_size(shapes)


def _compressible(
    dtype: DType, shape: tuple[int, ...], base_dtype: DType | None, base_shape: tuple[int, ...] | None
) -> bool:
    # SPEC 3.9, 3.10
    return (
        base_shape is not None
        and base_dtype is not None
        and dtype.is_float
        and base_dtype.is_float
        and len(shape) >= 2
        and len(base_shape) == len(shape)
        and base_shape[1:] == shape[1:]
    )


def _plan_module(name: str, tensor: TensorLike, base: TensorLike | None, options: CompressOptions) -> PlannedModule:
    shape = tuple(tensor.shape)
    module = PlannedModule(
        name=name,
        kind=table_or_kind(name, shape),
        dtype=tensor.dtype,
        shape=shape,
        base_dtype=None if base is None else base.dtype,
        base_shape=None if base is None else tuple(base.shape),
        encoding=Encoding.FULL,
    )
    if base is None:
        return replace(module, reason="not in the base")
    if options.is_exact(name):
        return replace(module, reason=EXACT)
    if len(shape) < 2:
        return replace(module, reason="a vector")
    if module.kind in ("bias", "norm"):
        return replace(module, reason="a bias" if module.kind == "bias" else "a norm")
    if not module.compressible:
        return replace(module, reason="dtype or shape allows no delta")
    masks = options.least_masks
    if module.kind in TABLES:
        if options.embeddings == "full":
            return replace(module, reason="embeddings are stored full")
        if options.embeddings == "auto" and options.masks == "auto":
            masks = _AUTO_EMBEDDING_MASKS
    elif shape[-2] * 16 <= shape[-1]:
        return replace(module, reason="few rows: a router or a small head")
    axis = None if options.axis == "auto" else Axis(options.axis)
    one, every = (module_bytes(module, components=count, axis=axis) for count in (1, masks))
    if (2 * one > module.payload_bytes and shape[-1] < 32) or every >= module.payload_bytes:
        return replace(module, reason="signs would not make it smaller")
    return replace(module, encoding=Encoding.SIGN, components=masks, axis=axis)


def plan(
    *,
    fine_tuned: Mapping[str, TensorLike],
    base: Mapping[str, TensorLike],
    options: CompressOptions,
    tied: Iterable[tuple[str, str]] = (),
) -> Plan:
    """Plan every tensor of the fine-tuned checkpoint.

    tied: (module, alias) pairs among its names; aliases are not planned. Unchanged tensors are known only when the data
    is read; they become `same` then, whatever the plan says.
    """
    pairs = tuple(sorted(tied, key=lambda pair: pair[1]))
    aliases = {alias for _, alias in pairs}
    modules = [
        _plan_module(name, fine_tuned[name], base.get(name), options)
        for name in sorted(fine_tuned, key=execution_key)
        if name not in aliases
    ]
    if options.exact not in (None, AUTO, EVERYTHING) and not any(map(options.is_exact, fine_tuned)):
        raise OptionError(f"exact '{options.exact}': matches no tensor; names are like {min(fine_tuned)}")
    dropped = tuple(sorted(name for name in base if name not in fine_tuned))
    return Plan(modules=tuple(modules), tied=pairs, dropped=dropped)
