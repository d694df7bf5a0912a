"""The files that a loaded model needs, its configuration and its tokenizer: whether a fine-tune has its own.

A training script often saves neither, or a tokenizer's settings without its vocabulary. Both are then the base's, and a
note says so. A tokenizer of the base is not taken for a vocabulary of another size. An update is different: it carries
every file that differs from the state before it (assets.py). An anchor of another model is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Final

import peraxis_format as pxd
from peraxis_tools.checkpoint import Checkpoint
from peraxis_tools.errors import CheckFailedError
from peraxis_tools.notes import note

__all__ = ["has_vocabulary", "is_update", "note_borrowed", "note_missing", "refuse_foreign", "takes_tokenizer"]

_CONFIG: Final = "config.json"
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

    first: the delta, or the first update of a chain.
    """
    if not any(module.base is not None or module.name in base.tensors for module in first.manifest.modules):
        name = first.manifest.modules[0].name
        raise CheckFailedError(f"{first.path}: is for another model; {base.tensors.label} has no {name}, nor any other")


def note_borrowed(delta: pxd.DeltaFile, base: Checkpoint) -> None:
    """Note what a loaded model lacks, and what it has from the base. An update has only the groups that changed."""
    if is_update(delta.manifest):
        return
    own, others = [asset.path for asset in delta.manifest.assets], base.folder_assets().carried
    if _CONFIG not in own:
        taken = "that of the base is taken" if _CONFIG in others else "nor has the base; add it to load the model"
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
    try:
        values = json.loads(config)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    text = values.get("text_config")
    return (text if isinstance(text, dict) else values).get("vocab_size")
