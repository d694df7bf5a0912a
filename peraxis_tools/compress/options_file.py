"""The options of `--config`: those of a YAML file, or those that a delta was written with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peraxis_format import open as open_delta
from peraxis_tools.checkpoint import is_delta
from peraxis_tools.compress.options import SAMPLES_MOST, OptionError, read_yaml
from peraxis_tools.metadata_keys import CONFIG_KEY

__all__ = ["read_options"]


def read_options(path: Path) -> dict[str, Any]:
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
