"""The files that a loaded model needs, its configuration and its tokenizer: whether a fine-tune has its own.

A training script often saves neither, or a tokenizer's settings without its vocabulary. Both are then the base's, and a
note says so. A tokenizer of the base is not taken for a vocabulary of another size. An update is different: it carries
every file that differs from the state before it (assets.py). An anchor of another model is refused.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

import peraxis_format as pxd
from peraxis_tools.checkpoints.assets import asset_group
from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.checkpoints.kinds import kind_of, layer_of
from peraxis_tools.display.notes import note
from peraxis_tools.display.shown import counted, listed
from peraxis_tools.errors import CheckFailedError

__all__ = [
    "has_vocabulary",
    "is_update",
    "note_borrowed",
    "note_missing",
    "note_no_configuration",
    "refuse_foreign",
    "shapes_of",
    "takes_tokenizer",
    "with_configuration",
]

_CONFIG: Final = "config.json"
_BEGAN: Final = "pass the checkpoint that the trainer began with as the base"
_NUMBER: Final = re.compile(r"\.\d+\.")
_VOCABULARY: Final = re.compile(
    r"tokenizer\.json|tekken\.json|(\w+_)?vocab[\w-]*\.(json|txt)|merges\.txt|dict\.txt|[^/]+\.(model|tiktoken)"
)


def has_vocabulary(paths: Collection[str]) -> bool:
    """Whether one of these assets has the tokens of a tokenizer."""
    return any(_VOCABULARY.fullmatch(path) for path in paths)


def is_update(manifest: pxd.Manifest) -> bool:
    """Whether `update` or a trainer wrote this file, with the small files that changed. `compress` stores all of them,
    in a lossless file too.
    """
    return manifest.previous is not None or pxd.CHANGED_KEY in manifest.metadata


def takes_tokenizer(delta: pxd.DeltaFile, base: Checkpoint) -> bool:
    """Whether a loader takes the tokenizer of the base: the delta has none, the base has, and their sizes agree."""
    own = [asset.path for asset in delta.manifest.assets]
    if has_vocabulary(own) or not has_vocabulary(base.folder_assets().carried):
        return False
    return _CONFIG not in own or _rows(delta.asset(_CONFIG)) == _rows(_config_of(base))


def refuse_foreign(first: pxd.DeltaFile, base: Checkpoint) -> None:
    """Refuse an anchor of another model, which binds no tensor of the base but would get its other files.

    first: the delta, or the first update of a chain. One with its own config.json needs no more than one tensor in
    common with the base. Otherwise the weights must be those of the base, in the same shapes; more of them are noted.
    Bytes are read only of tables of a vocabulary that the anchor lacks. Raises CheckFailedError.
    """
    modules = first.manifest.modules
    if any(module.base is not None for module in modules):
        return
    tensors = _with_names_of(base.tensors, first.manifest)
    if not any(each.is_in(base.tensors) for each in tensors):
        name = modules[0].name
        raise CheckFailedError(f"{first.path}: is for another model; {base.tensors.label} has no {name}, nor any other")
    if all(asset.path != _CONFIG for asset in first.manifest.assets):
        layers = _layers(_config_of(base))
        _refuse_other_shapes(first.path, tensors, base.tensors, layers=layers)
        _note_added(first.path, tensors, base.tensors, layers=layers)


@dataclass(frozen=True, slots=True)
class _Named:
    """A tensor of an anchor. module: its own name, or the one that it is tied to. name: in the base's files, or its own
    if they have none like it.
    """

    module: str
    own: str
    name: str
    shape: tuple[int, ...]

    def is_in(self, base: pxd.Safetensors) -> bool:
        """Whether the base has this tensor: by its own name, or by the end of its name and its shape."""
        return self.name in base and (self.own == self.name or base[self.name].shape == self.shape)


def _with_names_of(base: pxd.Safetensors, manifest: pxd.Manifest) -> list[_Named]:
    """The tensors of an anchor, aliases included, with their names in the files of the base.

    A model in transformers may have other prefixes than its files. So a name that the base does not have is compared
    by its end with those that the anchor does not have: the first one of equal shape, else the first one.
    """
    names = manifest.names()
    modules = {own: module for module in manifest.modules for own in names[module.name]}
    left = defaultdict[str, list[str]](list)
    for name in base:
        if name not in modules:
            left[_tail(name)].append(name)
    tensors: list[_Named] = []
    for own, module in modules.items():
        alike = [] if own in base else left[_tail(own)]
        name = next((name for name in alike if base[name].shape == module.shape), alike[0] if alike else own)
        if alike:
            alike.remove(name)
        tensors.append(_Named(module.name, own, name, module.shape))
    return tensors


def _added(tensors: Sequence[_Named], base: pxd.Safetensors) -> list[_Named]:
    """The tensors that the base lacks. An alias of another tensor is none of them."""
    known = {each.module for each in tensors if each.name in base or each.name in base.foreign}
    return [each for each in tensors if each.module == each.own and each.module not in known]


def _refuse_other_shapes(anchor: Path, tensors: Sequence[_Named], base: pxd.Safetensors, *, layers: int | None) -> None:
    """Raise CheckFailedError for a tensor with another shape than in the base, and for a weight that is not there.

    layers: of the base's configuration, if it says. transformers loads no further ones, of several tokens' prediction.
    """
    for each in tensors:
        if each.name in base and base[each.name].shape != each.shape:
            found = f"{each.own} is {list(each.shape)} there and {list(base[each.name].shape)} in {base.label}"
            raise CheckFailedError(f"{anchor}: is for another model; {found}; {_BEGAN}")
    # transformers fuses some tensors in the model (experts). A layer with weights that the base does not name has such
    # tensors, so weights that are missing there say nothing.
    fused = {layer_of(each.name) for each in _added(tensors, base) if not _is_bias(each.own)}
    present = {each.name for each in tensors}
    missing = [
        name
        for name in base
        if name not in present
        and _is_needed(base[name], present)
        and (layer := layer_of(name)) not in fused
        and (layers is None or layer is None or layer < layers)
    ]
    for name in sorted(missing, key=lambda name: _is_table(base[name])):  # tables last, because they are read
        if not _is_tied(base, name, present) and not _is_idle(base, name):
            found = f"it has no {name}, which is {list(base[name].shape)} in {base.label}"
            remedy = f"{_BEGAN}, or publish all weights of the model"
            raise CheckFailedError(f"{anchor}: is for another model; {found}; {remedy}")


def _note_added(anchor: Path, tensors: Sequence[_Named], base: pxd.Safetensors, *, layers: int | None) -> None:
    """Note the matrices and biases of an anchor that the base lacks.

    Raises CheckFailedError for one of a layer after all those of the base, unless the base's configuration counts it.
    """
    added = [each.own for each in _added(tensors, base) if len(each.shape) > 1 or _is_bias(each.own)]
    last = _last_layers(base) if added else {}
    for name in added:
        layer, known = layer_of(name), last.get(_stack(name), last.get(_stack(_tail(name))))
        if layer is None or known is None or layer <= known or (layers is not None and layer < layers):
            continue
        said = f"has no layer after {known}" if layers is None else f"says {counted(layers, 'layer')}"
        where = base.label if layers is None else f"the config.json of {base.label}"
        raise CheckFailedError(f"{anchor}: is for another model; it has {name}, and {where} {said}; {_BEGAN}")
    if added:
        note(
            f"{anchor}: has {counted(len(added), 'weight')} that {base.label} lacks, like {added[0]}; if this is "
            f"not the model of that checkpoint, {_BEGAN}"
        )


def _tail(name: str) -> str:
    """The end of a name, from its layer on, or its last two words: prefixes differ between a model and its files."""
    number = _NUMBER.search(name)
    return name[number.start() :] if number else ".".join(name.split(".")[-2:])


def _stack(name: str) -> str:
    """A name without the number of its layer: equal for the tensors that each layer of a stack has."""
    return _NUMBER.sub(".*.", name, count=1)


def _last_layers(base: pxd.Safetensors) -> dict[str, int]:
    """The number of the last layer of the base by `_stack`, of whole names and of their ends."""
    last: dict[str, int] = {}
    for name in base:
        for stack in (_stack(name), _stack(_tail(name))):
            last[stack] = max(last.get(stack, 0), layer_of(name) or 0)
    return last


def shapes_of(manifest: pxd.Manifest) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a state, aliases included."""
    names = manifest.names()
    return {name: module.shape for module in manifest.modules for name in names[module.name]}


def _is_needed(info: pxd.TensorInfo, present: Collection[str]) -> bool:
    """Whether a tensor is a weight, or a bias beside a weight that is present. A model may not use other tensors."""
    if _is_bias(info.name):
        return len(info.shape) == 1 and f"{info.name.removesuffix('bias')}weight" in present
    return info.name.endswith(".weight") and len(info.shape) > 0


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _is_idle(base: pxd.Safetensors, name: str) -> bool:
    """Whether a bias is zero: files have such ones for models without biases."""
    return _is_bias(name) and not np.any(pxd.to_float32(base.read(name), base[name].dtype))


def _is_table(info: pxd.TensorInfo) -> bool:
    return kind_of(info.name, info.shape) in ("embedding", "lm_head")


def _is_tied(base: pxd.Safetensors, name: str, others: Collection[str]) -> bool:
    """Whether a table of the base has the bytes of one of the others, like the head of a tied model."""
    info = base[name]
    if not _is_table(info):
        return False
    alike = [
        other
        for other in base
        if other in others
        and _is_table(base[other])
        and (base[other].dtype, base[other].shape) == (info.dtype, info.shape)
    ]
    return any(base.sha256(other) == base.sha256(name) for other in alike)


def note_borrowed(delta: pxd.DeltaFile, base: Checkpoint) -> None:
    """Note what a loaded model lacks, and what it has from the base. An update has only the groups that changed."""
    if is_update(delta.manifest):
        return
    own, others = [asset.path for asset in delta.manifest.assets], base.folder_assets().carried
    if _CONFIG not in own:
        # A group of files is that of the delta or that of the base (assets.py).
        hidden = next((path for path in own if asset_group(path) == asset_group(_CONFIG)), None)
        if _CONFIG not in others:
            taken = "nor has the base; add it to load the model"
        else:
            taken = f"copy that of the base, which {hidden} keeps out" if hidden else "that of the base is taken"
        note(f"{delta.path}: has no config.json; {taken}")
    if has_vocabulary(own):
        return
    if takes_tokenizer(delta, base):
        note(f"{delta.path}: has no tokenizer; that of the base is taken")
    elif has_vocabulary(others):
        note(
            f"{delta.path}: has no tokenizer, and its vocabulary has another size than the base's; "
            "copy the tokenizer of the fine-tune"
        )
    else:
        note(f"{delta.path}: has no tokenizer, nor has the base")


def with_configuration(base: Checkpoint, fine_tuned: Checkpoint) -> Checkpoint:
    """The fine-tune, with the config.json of the base if it has other files of the configuration but not this one: they
    would keep that of the base out (assets.py). A note says so.
    """
    own = {path for path in fine_tuned.folder_assets().carried if asset_group(path) == asset_group(_CONFIG)}
    config = _config_of(base)
    if not own or _CONFIG in own or not config:
        return fine_tuned
    note(f"{fine_tuned.tensors.label}: has no config.json; that of the base is stored")
    files = {path: data for path, data in fine_tuned.assets() if path in own}
    return replace(fine_tuned, newer={**files, _CONFIG: config})


def note_no_configuration(new: Checkpoint) -> None:
    """Note a new state with other files of the configuration than config.json, which an update takes as they are."""
    own = {path for path in new.folder_assets().carried if asset_group(path) == asset_group(_CONFIG)}
    if own and _CONFIG not in own:
        found = f"has {listed(sorted(own))} and no config.json"
        note(f"{new.tensors.label}: {found}, and so has the checkpoint that apply writes")


def note_missing(base: Checkpoint, fine_tuned: Checkpoint) -> None:
    """Note that a fine-tune has no configuration or tokenizer of its own, before it is compressed."""
    own, others = fine_tuned.folder_assets().carried, base.folder_assets().carried
    for missing, there, elsewhere in (
        (_CONFIG, _CONFIG in own, _CONFIG in others),
        ("tokenizer", has_vocabulary(own), has_vocabulary(others)),
    ):
        if not there:
            taken = "a loader takes that of the base" if elsewhere else "nor has the base"
            note(f"{fine_tuned.tensors.label}: has no {missing}, so the delta has none; {taken}")


def _config_of(base: Checkpoint) -> bytes:
    return next((data for path, data in base.assets(checked=False) if path == _CONFIG), b"")


def _rows(config: bytes) -> Any:
    """The size of the vocabulary in a config.json; None if it does not say."""
    return _of_text(config, "vocab_size")


def _layers(config: bytes) -> int | None:
    """The number of layers in a config.json; None if it does not say."""
    count = _of_text(config, "num_hidden_layers")
    return count if isinstance(count, int) else None


def _of_text(config: bytes, key: str) -> Any:
    """A value of the text model in a config.json; None if it has none."""
    try:
        values = json.loads(config)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    text = values.get("text_config")
    return (text if isinstance(text, dict) else values).get(key)
