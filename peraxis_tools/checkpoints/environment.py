"""The environment of a run: device, dtype, tokenizer, configuration."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peraxis_tools.checkpoints.config_bounds import check_config_bounds
from peraxis_tools.checkpoints.tokenizer_growth import check_growth
from peraxis_tools.errors import OptionError, ToolError, first_line, library_reason
from peraxis_tools.texts.encoding import tokenizer_errors

__all__ = ["check_causal", "load_config", "load_tokenizer", "parse_config", "resolve_device", "resolve_dtype"]


def load_tokenizer(folder: Path, *, shown: str | None = None) -> Any:
    """The tokenizer of a checkpoint's folder. shown: the folder's name in errors. Raises ToolError if it has none."""
    from transformers import AutoTokenizer

    shown = str(folder) if shown is None else shown
    check_growth(folder, shown=shown)
    with tokenizer_errors(f"{shown}: its tokenizer cannot be loaded", folder=str(folder), shown=shown):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_config(folder: Path, *, shown: str | None = None) -> Any:
    """The configuration of a checkpoint's folder, read by transformers. shown: the folder's name in errors.

    Raises ToolError if it cannot be read.
    """
    from transformers import AutoConfig

    shown = str(folder) if shown is None else shown
    check_config_bounds(folder, shown=shown)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a malformed file
        reason = library_reason(error, folder=str(folder), shown=shown)
        raise ToolError(f"{shown}: its config.json cannot be loaded: {reason}") from None


def parse_config(values: Mapping[str, Any], *, label: str) -> Any:
    """The configuration with these values of a config.json, read by transformers from a file.

    Only reading from a file decodes the forms that JSON lacks: {"__float__": "Infinity"} is infinity. Raises ToolError.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), "utf-8")
        return load_config(Path(folder), shown=label)


def check_causal(config: Any, label: str, *, remedy: str) -> None:
    """Raise ToolError unless transformers has a causal language model for this configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = getattr(config, "model_type", type(config).__name__)
        raise ToolError(f"{label}: transformers has no causal language model for model type {kind}; {remedy}")


def resolve_device(name: str) -> torch.device:
    """The device of `auto` or of a name. Raises OptionError if this machine does not have it."""
    if name == "auto":
        # Each process has one device: torchrun and accelerate give its number in LOCAL_RANK.
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device {name}: {first_line(error)}") from None
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype that blocks are computed in. auto: float32 on each device.

    With bfloat16 the KL of the default is 2.5 times as large (docs/figures.md). Weights are those of the file, rounded
    to their own dtype, for each choice.
    """
    found: torch.dtype = torch.float32 if name == "auto" else getattr(torch, name)
    return found
