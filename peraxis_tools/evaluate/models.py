"""Load the four models of an evaluation: fine-tuned, base, merged, on the fly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peraxis_format as pxd
from peraxis_tools.checkpoints import environment
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.checkpoints.config_shapes import check_config_shapes
from peraxis_tools.checkpoints.positions import checked_length
from peraxis_tools.checkpoints.vocabulary import check_ids, check_tokenizer_files
from peraxis_tools.errors import ToolError
from peraxis_tools.load import load_model
from peraxis_tools.texts.samples import Ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = [
    "RenamedWeightError",
    "check_model",
    "check_tokens",
    "load_checkpoint_model",
    "load_merged",
    "load_on_the_fly",
    "load_tokenizer",
]


class RenamedWeightError(ToolError):
    """A weight of a delta has another name, or lies in a larger tensor, in the model of transformers."""


def _folder(source: str | Path, revision: str | None) -> Path:
    return _folder_and_shapes(source, revision)[0]


def _folder_and_shapes(source: str | Path, revision: str | None) -> tuple[Path, dict[str, tuple[int, ...]]]:
    """The folder of a checkpoint, and the shapes of its tensors."""
    with open_checkpoint(source, revision=revision) as checkpoint:
        if checkpoint.folder is None:
            raise ToolError(f"{source}: has no configuration beside it; pass the checkpoint's folder")
        checkpoint.config()
        checkpoint.tensors.check_dtypes()  # transformers reads every tensor
        return checkpoint.folder, {name: checkpoint.tensors[name].shape for name in checkpoint.tensors}


def load_checkpoint_model(
    source: str | Path, *, dtype: torch.dtype, device: torch.device, revision: str | None = None
) -> PreTrainedModel:
    """The unchanged checkpoint, computing in `dtype`. Raises CheckFailedError if its config.json does not fit it."""
    from transformers import AutoModelForCausalLM

    folder, shapes = _folder_and_shapes(source, revision)
    config = environment.load_config(folder)
    check_config_shapes(AutoModelForCausalLM.from_config, config, shapes, str(source))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return _on(model.eval(), device)


def _on(model: Any, device: torch.device) -> PreTrainedModel:
    """Move the model to a device. The type of transformers' `to` does not show its arguments."""
    moved: PreTrainedModel = model.to(device)
    return moved


def load_merged(
    base: str | Path, delta: str | Path, *, dtype: torch.dtype, device: torch.device, revision: str | None = None
) -> PreTrainedModel:
    """Base + delta, weights rounded to their own dtype (SPEC 6.1) and then computing in `dtype`."""
    return _on(load_model(base, delta, base_revision=revision, dtype=dtype), device)


def load_on_the_fly(
    base: str | Path, delta: str | Path, *, device: torch.device, revision: str | None = None
) -> PreTrainedModel:
    """Base + delta in binary32 without the last rounding, as a server with separate components computes it.

    It is built like `load_merged`; then every `sign` weight is replaced by its unrounded sum.
    """
    import torch

    model = load_model(base, delta, base_revision=revision, dtype=torch.float32)
    with pxd.open(delta) as file, open_checkpoint(base, revision=revision) as checkpoint:
        for name, weight in _unrounded(file, checkpoint.tensors):
            _put(model, name, weight)
    return _on(model, device)


def _unrounded(delta: pxd.DeltaFile, base: pxd.Safetensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The covered rows of each `sign` module: f32(base) + the sum of its components. Aliases follow by tying."""
    import torch

    for entry in delta.manifest.modules:
        if entry.encoding is pxd.Encoding.SIGN and entry.base is not None:
            module = delta.load(entry.name)
            kept = pxd.to_float32(base.read(entry.name, slice(0, module.kept)), entry.base.dtype)
            yield entry.name, torch.from_numpy(kept + pxd.dense_delta(module))


def _put(model: PreTrainedModel, name: str, weight: torch.Tensor) -> None:
    import torch

    try:
        parameter = model.get_parameter(name)
    except AttributeError:
        raise RenamedWeightError(
            f"{name}: has another name in transformers",
            remedy="leave out the candidate on-the-fly: --no-on-the-fly",
        ) from None
    with torch.no_grad():
        parameter[: weight.shape[0]].copy_(weight)


def check_model(source: str | Path, *, length: int, revision: str | None) -> int:
    """The number of tokens in a sample (positions.py). Raises ToolError without a causal language model."""
    config = environment.load_config(_folder(source, revision))
    environment.check_causal(config, str(source), remedy="eval compares next-token distributions; use diff or verify")
    return checked_length(config.to_dict(), length, str(source))


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint. Raises ToolError if it has none."""
    folder = _folder(source, revision)
    check_tokenizer_files(folder, str(source))
    return environment.load_tokenizer(folder)


def check_tokens(source: str | Path, texts: Iterable[Ids], *, revision: str | None) -> None:
    """Raise ToolError for a token in these texts that the model does not have."""
    config = environment.load_config(_folder(source, revision)).to_dict()
    for ids in texts:
        check_ids(ids, config, str(source))
