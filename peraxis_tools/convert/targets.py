"""Where in a live model each checkpoint tensor is, and whether PEFT can adapt the layer that holds it.

The model is built from config.json by transformers, without weights. Where that is not possible, names alone decide:
what is called weight is a linear layer, or an embedding by kind_of.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from peraxis_tools.kinds import kind_of
from peraxis_tools.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerKind", "Place", "Targets", "targets_by_model", "targets_by_name"]


class LayerKind(Enum):
    """What a layer is to PEFT; value: what LoRA can do with it."""

    LINEAR = "adapted"
    CONV1D = "adapted, its weight is [d_in, d_out]"
    EMBEDDING = "adapted by rows"
    OTHER = "saved whole or not at all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A parameter in a model: layer.parameter. siblings: all that the layer's state holds; empty: unknown."""

    layer: str
    parameter: str
    kind: LayerKind
    class_name: str
    tied: bool = False
    leaf: bool = True
    siblings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """places: by checkpoint name; a name that is not there has no parameter of its own in the model."""

    places: Mapping[str, Place]
    task: str | None


def targets_by_name(shapes: Mapping[str, tuple[int, ...]], tied: Iterable[str]) -> Targets:
    """Guessed from names and shapes alone."""
    places = {}
    siblings: dict[str, list[str]] = {}
    for name in shapes:
        layer, _, parameter = name.rpartition(".")
        siblings.setdefault(layer, []).append(parameter)
    for name, shape in shapes.items():
        layer, _, parameter = name.rpartition(".")
        embedding = kind_of(name, shape) == "embedding"
        places[name] = Place(
            layer=layer,
            parameter=parameter,
            kind=LayerKind.EMBEDDING if embedding else LayerKind.LINEAR if len(shape) == 2 else LayerKind.OTHER,
            class_name="layer",
            tied=name in set(tied),
            siblings=tuple(siblings[layer]),
        )
    return Targets(places=places, task="CAUSAL_LM")


def targets_by_model(config: Mapping[str, Any], names: Iterable[str]) -> Targets | None:
    """From the model that config.json describes; None where transformers cannot build it."""
    model = _model(config)
    if model is None:
        return None
    state = model.state_dict()
    prefix = str(getattr(model, "base_model_prefix", "")) + "."
    tied = _tied(model)
    places = {}
    for name in names:
        candidates = (name, prefix + name, name.removeprefix(prefix))
        found = next((candidate for candidate in candidates if candidate in state), None)
        if found is not None:
            places[name] = _place(model, found, tied=found in tied)
    return Targets(places=places, task=_task(type(model).__name__))


def _model(config: Mapping[str, Any]) -> nn.Module | None:
    try:
        import torch
        import transformers
    except ImportError:
        return None
    try:
        with quiet_transformers(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            parsed = transformers.AutoConfig.for_model(**config)
            kind = getattr(transformers, str(next(iter(config.get("architectures") or []), "")), None)
            if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
                built: nn.Module = transformers.AutoModelForCausalLM.from_config(parsed)
                return built
            model: nn.Module = kind(parsed)
            return model
    except Exception:  # a configuration from a stranger's file may fail in any way
        return None


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that stand under several names."""
    seen: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen.setdefault(id(parameter), []).append(name)
    return {name for names in seen.values() if len(names) > 1 for name in names}


_CLASSES: Final = {
    "Linear": LayerKind.LINEAR,
    "Conv1D": LayerKind.CONV1D,
    "Embedding": LayerKind.EMBEDDING,
}
# PEFT refuses these layers of state space models, whose kernels read the weights themselves.
_STATE_SPACE: Final = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_READ_BY_KERNELS: Final = frozenset({"conv1d", "out_proj"})


def _kind(model: nn.Module, path: str, module: nn.Module) -> LayerKind:
    """PEFT replaces the forward of what it adapts: a subclass that has one of its own (positions, scales) is left."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    if model_type in _STATE_SPACE and path.rpartition(".")[2] in _READ_BY_KERNELS:
        return LayerKind.OTHER
    for parent in type(module).__mro__:
        if "forward" in vars(parent):
            return _CLASSES.get(parent.__name__, LayerKind.OTHER)
    return LayerKind.OTHER


def _place(model: nn.Module, name: str, *, tied: bool) -> Place:
    layer, _, parameter = name.rpartition(".")
    module = model.get_submodule(layer)
    return Place(
        layer=layer,
        parameter=parameter,
        kind=_kind(model, layer, module),
        class_name=type(module).__name__,
        tied=tied,
        leaf=next(module.children(), None) is None,
        siblings=tuple(module.state_dict()),
    )


def _task(class_name: str) -> str | None:
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if class_name.startswith(("T5", "Bart", "MT5", "UMT5", "Pegasus", "Marian")) else None
