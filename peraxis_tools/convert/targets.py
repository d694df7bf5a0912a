"""The place of each checkpoint tensor in a live model, and whether PEFT can adapt its layer.

transformers builds the model from config.json without weights. If that fails, names decide: a tensor called weight
belongs to a linear layer, or to an embedding by kind_of.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import inspect
import json
import re
import warnings
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, cast

import peraxis_format as pxd
from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.checkpoints.kinds import kind_of
from peraxis_tools.process.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from peraxis_tools.checkpoints.parameter_names import ParameterSlice

__all__ = ["LayerKind", "ParameterPlace", "Targets", "targets_by_model", "targets_by_name", "targets_of"]


_LAYERS: Final = re.compile(r"(num_)?(n|hidden|encoder|decoder)_?layers?|num_layers|depth")


class LayerKind(Enum):
    """The kinds of layers for PEFT; the value says how LoRA handles it."""

    LINEAR = "adapted"
    CONV1D = "adapted, its weight is [d_in, d_out]"
    EMBEDDING = "adapted by rows"
    EXPERTS = "rows of one expert in a fused parameter, adapted through target_parameters"
    PARAMETER = "a router, or a layer that PEFT would treat as experts, adapted through target_parameters"
    OTHER = "saved whole or not at all"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPlace:
    """A parameter in a model: layer.parameter. siblings: the layer's state; empty: unknown.

    lost: the name that transformers would give the layer when PEFT loads it, if the model has no such layer.
    index, first, stack: for fused experts, the expert, its first row, and the parameter's shape [E, O, I].
    """

    layer: str
    parameter: str
    kind: LayerKind
    class_name: str
    tied: bool = False
    leaf: bool = True
    siblings: tuple[str, ...] = ()
    lost: str = ""
    index: int = 0
    first: int = 0
    stack: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """places: by checkpoint name; a name that is missing has no parameter in the model.

    modules: the names of all modules of the model, if they are known.
    """

    places: Mapping[str, ParameterPlace]
    task: str | None
    modules: frozenset[str] = frozenset()


def targets_of(delta: pxd.DeltaFile, base: Checkpoint | None) -> Targets:
    """The targets by the model of the delta's configuration, or of the base's; else by names."""
    names = [entry.name for entry in delta.manifest.modules]
    config = _configuration(delta, base)
    found = None if config is None else targets_by_model(config, names)
    if found is not None and found.places:
        return found
    shapes = {entry.name: entry.shape for entry in delta.manifest.modules}
    tied = {name for name, _ in delta.manifest.tied}
    kinds = {name: kind_of(name, shape) for name, shape in shapes.items()}
    if config is not None and config.get("tie_word_embeddings") and "lm_head" not in kinds.values():
        tied |= {name for name, kind in kinds.items() if kind == "embedding"}
    return targets_by_name(shapes, tied)


def _configuration(delta: pxd.DeltaFile, base: Checkpoint | None) -> Mapping[str, Any] | None:
    config: Any = None
    if any(asset.path == "config.json" for asset in delta.manifest.assets):
        try:
            config = json.loads(delta.asset("config.json"))
        except (ValueError, RecursionError):
            config = None
    elif base is not None and base.folder is not None and (base.folder / "config.json").is_file():
        config = base.config()
    return config if isinstance(config, dict) else None


def targets_by_name(shapes: Mapping[str, tuple[int, ...]], tied: Iterable[str]) -> Targets:
    """Targets that are guessed from names and shapes alone."""
    places = {}
    siblings: dict[str, list[str]] = {}
    for name in shapes:
        layer, _, parameter = name.rpartition(".")
        siblings.setdefault(layer, []).append(parameter)
    layers, aliases = sorted(siblings), set(tied)
    for name, shape in shapes.items():
        layer, _, parameter = name.rpartition(".")
        embedding = kind_of(name, shape) == "embedding"
        places[name] = ParameterPlace(
            layer=layer,
            parameter=parameter,
            kind=LayerKind.EMBEDDING if embedding else LayerKind.LINEAR if len(shape) == 2 else LayerKind.OTHER,
            class_name="layer",
            tied=name in aliases,
            leaf=not _has_children(layer, layers),
            siblings=tuple(siblings[layer]),
        )
    return Targets(places=places, task="CAUSAL_LM")


def _has_children(layer: str, layers: Sequence[str]) -> bool:
    """Whether one of the sorted layers is within this one."""
    at = bisect.bisect_left(layers, f"{layer}.")
    return at < len(layers) and layers[at].startswith(f"{layer}.")


def targets_by_model(config: Mapping[str, Any], names: Collection[str]) -> Targets | None:
    """Targets from the model that config.json describes; None if transformers cannot build it.

    Nor is a model built that has more layers than there are tensors: the configuration is of another model.
    """
    from peraxis_tools.checkpoints.parameter_names import map_names

    model = None if _depth(config) > len(names) else _model(config)
    if model is None:
        return None
    tied = _tied(model)
    slices = map_names(cast("PreTrainedModel", model), names).by_tensor
    fused = any(found.index is not None for found in slices.values())
    places = {}
    for name, found in slices.items():
        place = _place(model, found.parameter, tied=found.parameter in tied)
        if found.index is not None:
            experts = _expert_place(model, place, found)
            if experts is not None:
                places[name] = experts
        elif found.rows is None:
            taken = fused and place.kind is LayerKind.LINEAR and place.layer.endswith(_TAKEN_FOR_EXPERTS)
            places[name] = replace(place, kind=LayerKind.PARAMETER) if taken else place
    modules = frozenset(name for name, _ in model.named_modules() if name)
    renamings = _renamings(model)
    for name, place in places.items():
        loaded = _loaded_name(place.layer, renamings)
        if place.kind in (LayerKind.LINEAR, LayerKind.PARAMETER) and loaded not in modules:
            places[name] = replace(place, lost=loaded)
    return Targets(places=places, task=_task(type(model).__name__), modules=modules)


def _renamings(model: nn.Module) -> list[Any]:
    """transformers' renamings of a checkpoint; PEFT applies them to the names of an adapter's factors too."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before version 5, models had the checkpoint's names
        return []
    mapping: list[Any] = get_model_conversion_mapping(cast("PreTrainedModel", model)) or []
    return [entry for entry in mapping if isinstance(entry, WeightRenaming)]


def _loaded_name(layer: str, renamings: Iterable[Any]) -> str:
    """The name of the layer that PEFT would load into."""
    key = f"{layer}.lora_A.weight"
    for renaming in renamings:
        key = str(renaming.rename_source_key(key)[0])
    return key.removesuffix(".lora_A.weight")


def _expert_place(model: nn.Module, place: ParameterPlace, found: ParameterSlice) -> ParameterPlace | None:
    """The place of one expert's rows; None if PEFT orders the parameter otherwise ([E, I, O])."""
    module = model.get_submodule(place.layer)
    stack = tuple(model.get_parameter(found.parameter).shape)
    if len(stack) != 3 or getattr(module, "is_transposed", False):
        return None
    first = 0 if found.rows is None else found.rows[0]
    return replace(place, kind=LayerKind.EXPERTS, index=found.index or 0, first=first, stack=stack)


def _depth(config: Mapping[str, Any]) -> int:
    """The largest number of layers that a configuration states, for the model or one of its parts."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return max(
        (
            value
            for part in parts
            for key, value in part.items()
            if isinstance(value, int) and _LAYERS.fullmatch(str(key))
        ),
        default=0,
    )


def _model(config: Mapping[str, Any]) -> nn.Module | None:
    try:
        import torch
        import transformers
    except ImportError:
        return None
    try:
        with quiet_transformers(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            parsed = transformers.AutoConfig.for_model(**_plain(config))
            kind = getattr(transformers, str(next(iter(config.get("architectures") or []), "")), None)
            if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
                built: nn.Module = transformers.AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)
                return built
            model: nn.Module = kind(parsed)
            return model
    except Exception:  # an untrusted configuration can fail in any way
        return None


def _plain(value: Any) -> Any:
    """Decode transformers' form of a float that JSON lacks: {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _tied(model: nn.Module) -> set[str]:
    """The names of parameters that have several names."""
    seen: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen.setdefault(id(parameter), []).append(name)
    return {name for names in seen.values() if len(names) > 1 for name in names}


_CLASSES: Final = {
    "Linear": LayerKind.LINEAR,
    "Conv1D": LayerKind.CONV1D,
    "Embedding": LayerKind.EMBEDDING,
}
# PEFT treats these names of mixture-of-experts checkpoints as the experts that transformers fuses.
_TAKEN_FOR_EXPERTS: Final = (".gate", ".gate_proj", ".up_proj", ".down_proj", ".w1", ".w2", ".w3")
# PEFT refuses these layers of state space models, whose kernels read the weights themselves.
_STATE_SPACE: Final = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_READ_BY_KERNELS: Final = frozenset({"conv1d", "out_proj"})


def _kind(model: nn.Module, path: str, module: nn.Module) -> LayerKind:
    """The kind of a layer. PEFT replaces an embedding's forward, so a subclass with its own forward is OTHER."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    if model_type in _STATE_SPACE and path.rpartition(".")[2] in _READ_BY_KERNELS:
        return LayerKind.OTHER
    if _is_read_by_its_owner(model, path):
        return LayerKind.OTHER
    names = [parent.__name__ for parent in type(module).__mro__]
    if names[0].endswith("Router"):
        return LayerKind.PARAMETER  # a layer with its own forward
    if "Linear" in names and "Grouped" not in names[0]:
        return LayerKind.LINEAR  # the factors are added to its output, whatever its forward adds
    own = next((parent.__name__ for parent in type(module).__mro__ if "forward" in vars(parent)), "")
    return _CLASSES.get(own, LayerKind.OTHER)


def _is_read_by_its_owner(model: nn.Module, path: str) -> bool:
    """Whether the code of the parent module computes with the layer's weight directly, without calling the layer.

    With PEFT such code sees the base's weight. Methods that build and initialise are ignored.
    """
    above, _, name = path.rpartition(".")
    use = rf"(?<!isinstance\()\bself\.{re.escape(name)}\.weight\b(?!\.(dtype|device|shape|size|ndim)\b)"
    return re.search(use, _source(cast("Hashable", type(model.get_submodule(above))))) is not None


@functools.cache
def _source(kind: type) -> str:
    """The source of a class's methods, without those that initialise."""
    methods = (value for name, value in vars(kind).items() if callable(value) and "init" not in name)
    found = []
    for method in methods:
        with contextlib.suppress(OSError, TypeError):  # no source, or no function
            found.append(inspect.getsource(method))
    return "\n".join(found)


def _class_name(model: nn.Module, layer: str, module: nn.Module) -> str:
    """A description of a layer for messages."""
    above = layer.rpartition(".")[0]
    if _is_read_by_its_owner(model, layer):
        return f"{type(module).__name__} whose weight a {type(model.get_submodule(above)).__name__} reads directly"
    return type(module).__name__


def _place(model: nn.Module, name: str, *, tied: bool) -> ParameterPlace:
    layer, _, parameter = name.rpartition(".")
    module = model.get_submodule(layer)
    return ParameterPlace(
        layer=layer,
        parameter=parameter,
        kind=_kind(model, layer, module),
        class_name=_class_name(model, layer, module),
        tied=tied,
        leaf=next(module.children(), None) is None,
        siblings=tuple(module.state_dict()),
    )


def _task(class_name: str) -> str | None:
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if class_name.startswith(("T5", "Bart", "MT5", "UMT5", "Pegasus", "Marian")) else None
