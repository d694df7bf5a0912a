"""The options of `--config`: those of a YAML file, or those that a delta was written with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peraxis_format import open as open_delta
from peraxis_tools.checkpoints.checkpoint import is_delta
from peraxis_tools.compress.options import SAMPLES_MOST, CompressOptions, OptionError, read_yaml
from peraxis_tools.deltas.metadata_keys import CONFIG_KEY

__all__ = ["options_of"]


def options_of(config: Path | None, given: dict[str, Any]) -> CompressOptions:
    """The options of `config` under those of the command line. An error that is the file's own names the file.

    Raises OptionError, also for a delta that `compress` did not write; PxdError for a damaged delta.
    """
    own = {} if config is None else _read_options(config)
    try:
        return CompressOptions.from_mapping(own | given)
    except OptionError as error:
        if config is not None and _fault(own) == str(error):
            raise OptionError(f"{config}: {error}") from None
        raise


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
