"""The options of `--config`: those of a YAML file, or those that a delta was written with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from peraxis_format import open as open_delta
from peraxis_tools.checkpoints.checkpoint import is_delta
from peraxis_tools.compress.options import (
    EVERYTHING,
    OF_DISTILLATION,
    OF_TEXT,
    SAMPLES_MOST,
    CompressOptions,
    OptionError,
    read_yaml,
)
from peraxis_tools.deltas.metadata_keys import CONFIG_KEY

__all__ = ["options_of"]

_RIVALS: Final[Mapping[str, tuple[str, ...]]] = {
    "target_size": ("target_ratio", "masks", "exact"),
    "target_ratio": ("target_size", "masks", "exact"),
    "masks": ("target_size", "target_ratio"),
    "exact": ("target_size", "target_ratio"),
}
"""An option -> those that it excludes."""


def options_of(config: Path | None, given: dict[str, Any]) -> CompressOptions:
    """The options of `config` under those of the command line. An error that is the file's own names the file.

    An option of the file that one of the command line excludes, or leaves without effect, is dropped.
    Raises OptionError, also for a delta that `compress` did not write; PxdError for a damaged delta.
    """
    own = {} if config is None else _read_options(config)
    try:
        kept = {name: value for name, value in own.items() if name not in _rivals(given)}
        return CompressOptions.from_mapping(kept | given)
    except OptionError as error:
        if config is not None and _fault(own) == str(error):
            raise OptionError(f"{config}: {error}") from None
        raise


def _rivals(given: Mapping[str, Any]) -> set[str]:
    """The options that cannot stand beside the given ones, or have no effect beside them."""
    names = {rival for name in given for rival in _RIVALS.get(name, ())}
    fit, lossless = given.get("fit"), given.get("exact") == EVERYTHING
    if fit == "none" or lossless:
        names.update(OF_TEXT, ("refine_rounds",))
    if lossless:
        names.update(("fit", "axis", "masks", "embeddings"))
    if fit == "adamw":
        names.update(("target_size", "target_ratio", "masks"))
    if fit in ("closed-form", "adamw"):
        names.add("refine_rounds")
    if given.get("distill_samples") == 0:
        names.update(OF_DISTILLATION)
    return names


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
