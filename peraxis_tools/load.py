"""Base + delta -> a transformers model in memory, without a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import peraxis_format as pxd
from peraxis_tools.checkpoint import open_checkpoint
from peraxis_tools.delta_parts import refuse_part
from peraxis_tools.optional import require
from peraxis_tools.progress import Progress, watched
from peraxis_tools.rebuild import aliases_of, assets_of, checkpoint_bytes, rebuild_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_model"]


def load_model(
    base: str | Path,
    delta: str | Path,
    *,
    base_revision: str | None = None,
    progress: Progress = None,
    **options: Any,
) -> PreTrainedModel:
    """The fine-tuned model itself, without a folder in between: `load_model("org/base", "delta.pxd")`.

    Its class is the one that the configuration names (`architectures`), else transformers' causal language model.
    options go to `from_pretrained` of that class. progress: bytes of tensors. Memory: the model, and one tensor
    of the base. Raises PxdError, CheckpointError, ToolError.
    """
    require("load_model", "torch", "transformers", extra="compress")
    import json

    import torch

    from peraxis_format.ops.tensors import from_storage
    from peraxis_tools.environment import parse_config

    with (
        pxd.open(delta) as file,
        open_checkpoint(base, revision=base_revision) as checkpoint,
        watched(progress, "load", checkpoint_bytes(file.manifest)) as step,
    ):
        refuse_part(file.manifest, delta)
        config = json.loads(dict(assets_of(file, checkpoint)).get("config.json") or json.dumps(checkpoint.config()))
        state = {}
        aliases = aliases_of(file.manifest)
        for entry, array in rebuild_all(file, checkpoint.tensors):
            tensor = from_storage(array, entry.dtype)
            for name in (entry.name, *aliases.get(entry.name, ())):
                state[name] = tensor
                step(tensor.nbytes)
    options.setdefault("dtype", config.get("dtype", config.get("torch_dtype", torch.float32)))
    parsed = parse_config(config, label=str(delta))
    # The class itself: AutoModelForCausalLM.from_pretrained insists on a folder to look into.
    kind = _model_class(parsed, str(delta))
    model: PreTrainedModel = kind.from_pretrained(None, config=parsed, state_dict=state, **options).eval()
    return model


def _model_class(config: Any, label: str) -> Any:
    """The class of transformers for a configuration. Raises ToolError where there is none."""
    import transformers

    from peraxis_tools.environment import check_causal

    for name in config.architectures or ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    check_causal(config, label, remedy="write the checkpoint with apply and load it with its own class")
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
