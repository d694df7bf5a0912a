"""The options of `--config`: those of a YAML file, or those that a delta was written with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from peraxis_format import open as open_delta
from peraxis_tools.checkpoints.checkpoint import is_delta
from peraxis_tools.compress.options import (
    AUTO,
    EVERYTHING,
    OF_DISTILLATION,
    OF_TEXT,
    RECIPES,
    SAMPLES_MOST,
    CompressOptions,
    OptionError,
    read_yaml,
)
from peraxis_tools.deltas.metadata_keys import CONFIG_KEY
from peraxis_tools.texts.samples import check_calibration

__all__ = ["options_of"]

_TARGETS: Final = {"target_size", "target_ratio"}
_LOSSY: Final = {"axis", "masks", "embeddings"}
_FITTED: Final = {*OF_TEXT, "refine_rounds"}  # idle without a fit on text
_AGAINST: Final[Mapping[str, set[str]]] = {  # options that are refused or idle with a fit
    "none": {"calibration"},
    "closed-form": {"refine_rounds"},
    "adamw": {*_TARGETS, "masks", "refine_rounds"},
}


def options_of(config: Path | None, given: dict[str, Any]) -> CompressOptions:
    """The options of `config` under those of the command line. An error that is the file's own names the file.

    An option of the command line also drops those of the file that contradict it. Raises OptionError, also for a delta
    that `compress` did not write; PxdError for a damaged delta.
    """
    own = {} if config is None else _read_options(config)
    try:
        options = CompressOptions.from_mapping(_overridden(own, given) | given)
    except OptionError as error:
        if config is not None and _fault(own) == str(error):
            raise OptionError(f"{config}: {error}") from None
        raise
    if config is not None and "calibration" not in given:
        try:
            check_calibration(options.calibration)
        except OptionError as error:
            raise OptionError(f"{config}: {error}; name the text here with calibration (--calibration)") from None
    return options


def _overridden(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a file without those that contradict the given ones; a recipe is replaced by its options."""
    values = dict(own)
    if "recipe" not in given and str(own.get("recipe")) in RECIPES:
        values = {**RECIPES[values.pop("recipe")], **values}
    dropped = _contradicted(values, given)
    return {name: value for name, value in values.items() if name not in dropped}


def _contradicted(own: Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    """The names of the options of a file that contradict the given ones (`CompressOptions` refuses them together)."""
    asked = {name for name, value in given.items() if value not in (None, AUTO)}
    fit = given.get("fit")
    dropped: set[str] = set()
    if asked & {*_TARGETS, "masks", "exact"}:
        dropped |= _TARGETS
    if asked & _TARGETS:
        dropped |= {"masks", "exact"}
    if own.get("exact") == EVERYTHING and asked & {*_LOSSY, "calibration"}:
        dropped |= {"exact"}
    if given.get("exact") == EVERYTHING:
        dropped |= {"fit", *_LOSSY, *_FITTED}
    if fit == "none":
        dropped |= _FITTED
    if fit == "adamw":
        dropped |= {*_TARGETS, "masks"}
    if fit in ("adamw", "closed-form"):
        dropped |= {"refine_rounds"}
    if given.get("distill_samples") == 0:
        dropped |= set(OF_DISTILLATION)
    if asked & _AGAINST.get(str(own.get("fit")), set()):
        dropped |= {"fit"}
    if "exact" in dropped:
        dropped |= {"prefer"}
    return dropped


def _fault(values: dict[str, Any]) -> str | None:
    """The error of these options alone."""
    try:
        CompressOptions.from_mapping(values)
    except OptionError as error:
        return str(error)
    return None


def _read_options(path: Path) -> dict[str, Any]:
    """The options in a YAML file, or those in the metadata of a .pxd, by their names in files.

    Raises OptionError for a delta that `compress` did not write, and as `read_yaml`; PxdError for a damaged delta.
    """
    if not is_delta(path):
        return read_yaml(path)
    with open_delta(path) as delta:
        said = delta.manifest.metadata.get(CONFIG_KEY)
    try:
        values = None if said is None else json.loads(said)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise OptionError(f"{path}: has no options of compress in its metadata; pass a delta that compress wrote")
    if values.get("calibration") is None and values.get("calibration_samples") == SAMPLES_MOST:
        del values["calibration_samples"]  # the default of earlier versions, without a text
    return values
