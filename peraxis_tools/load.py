"""A fine-tune ready for use, from its delta alone: the model, its tokenizer, its generation configuration.

    model, tokenizer = load("me/delta")                              the base from the manifest
    model, tokenizer = load("delta.pxd", base="folder")
    model = PxdForCausalLM.from_pretrained("me/delta")               in the manner of transformers' own classes

A delta is a path, a URL, `hf://org/repo/file.pxd`, or a repository that holds one .pxd, with `@revision` or without.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import peraxis_format as pxd
from peraxis_tools.apply import applied_assets, base_of, load_model
from peraxis_tools.checkpoint import open_checkpoint
from peraxis_tools.errors import ToolError
from peraxis_tools.progress import Steps
from peraxis_tools.remote import local_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Loaded", "PxdForCausalLM", "load", "load_tokenizer_of"]


class Loaded(NamedTuple):
    """A model and its tokenizer; None where neither fine-tune nor base brings one."""

    model: PreTrainedModel
    tokenizer: Any


def load(
    delta: str | Path, *, base: str | Path | None = None, progress: Steps | bool | None = None, **options: Any
) -> Loaded:
    """The fine-tune of a delta. base: a folder or hub id, by default the one that the manifest names.

    options go to `AutoModelForCausalLM.from_pretrained`. Raises PxdError, CheckpointError, ToolError.
    """
    with local_copy(delta) as path:
        with pxd.open(path) as file:
            where = base_of(file.manifest, delta) if base is None else base
        model = load_model(where, path, progress=progress, **options)
        return Loaded(model, load_tokenizer_of(path, where))


def load_tokenizer_of(delta: Path, base: str | Path) -> Any:
    """The tokenizer that `apply` would write, chat template included; None where there is none."""
    from transformers import AutoTokenizer

    with pxd.open(delta) as file, open_checkpoint(base) as checkpoint, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, data in applied_assets(file, checkpoint):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(data)
        if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
            return None
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ToolError(f"{delta.name}: its tokenizer cannot be loaded: {line}") from None


class PxdForCausalLM:
    """`PxdForCausalLM.from_pretrained("me/delta")`: a transformers model, as AutoPeftModelForCausalLM gives one."""

    def __init__(self) -> NoReturn:
        raise TypeError("PxdForCausalLM is not made by itself; use PxdForCausalLM.from_pretrained(DELTA)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        base: str | Path | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """The fine-tuned model. revision: of the delta's repository. options: as of transformers' from_pretrained.

        Raises PxdError, CheckpointError, ToolError.
        """
        source = pretrained_model_name_or_path
        if revision is not None:
            if Path(source).exists() or "@" in str(source):
                raise ToolError(f"{source}: revision={revision!r} is for a repository that names none itself")
            source = f"{source}@{revision}"
        return load_model(source, **options) if base is None else load_model(base, source, **options)
