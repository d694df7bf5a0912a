"""Load a fine-tune from its delta: the model, its tokenizer, its generation configuration.

    model, tokenizer = load("me/delta")                              the base from the manifest
    model, tokenizer = load("delta.pxd", base="folder")
    model = PxdForCausalLM.from_pretrained("me/delta")               like transformers' own classes

A delta is a path, a URL, `hf://org/repo/file.pxd`, or a repository with one .pxd, with `@revision` or without; or the
updates of a chain, as `apply` takes them: a sequence of these, or a folder of files.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import peraxis_format as pxd
from peraxis_tools.arguments import check_paths, sequence
from peraxis_tools.chain import opened_deltas, state_before
from peraxis_tools.chain.sources import local_updates
from peraxis_tools.checkpoints.checkpoint import (
    Checkpoint,
    open_checkpoint,
    parse_identity,
    refuse_swapped,
    with_revision,
)
from peraxis_tools.checkpoints.completeness import has_vocabulary, note_borrowed, refuse_foreign, shapes_of
from peraxis_tools.checkpoints.config_shapes import check_config_shapes, other_shape
from peraxis_tools.checkpoints.json_files import json_object
from peraxis_tools.deltas.parts import refuse_part
from peraxis_tools.deltas.rebuild import assets_of, checkpoint_bytes, payload_first, rebuild_all
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Progress, watched
from peraxis_tools.display.shown import listed
from peraxis_tools.errors import CheckFailedError, ToolError, first_line
from peraxis_tools.process.optional import require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["Loaded", "PxdForCausalLM", "load", "load_model"]


class Loaded(NamedTuple):
    """A model and its tokenizer; the tokenizer is None if neither fine-tune nor base has one."""

    model: PreTrainedModel
    tokenizer: Any


def _hub_id(manifest: pxd.Manifest, delta: object) -> str:
    """The base that a manifest names, as `org/name[@revision]`. Raises ToolError if it is not a hub id."""
    base = manifest.base
    named = f"{base.id}@{base.revision}" if base.revision else base.id
    try:
        parse_identity(named)  # a manifest must not lead to folders of this machine
    except ToolError:
        raise ToolError(f"{delta}: names its base {named!r}, which is not a hub id; pass the base") from None
    return named


def _named(delta: str | Path | Sequence[str | Path], base: str | Path | None = None) -> list[str | Path]:
    """A delta, or the updates of a chain, as a list. Raises ToolError for none, and if base and delta are swapped."""
    named = sequence(delta)
    if not named:
        raise ToolError("no delta to load; pass one")
    if base is not None:
        check_paths(base=base)
        refuse_swapped(base, named[0])
    return named


def load_model(
    base: str | Path,
    delta: str | Path | Sequence[str | Path] | None = None,
    *,
    base_revision: str | None = None,
    progress: Progress = None,
    **options: Any,
) -> PreTrainedModel:
    """The fine-tuned model, without an intermediate folder: `load_model("org/base", "delta.pxd")`.

    A single argument, `load_model("me/delta")`, is the delta, and its manifest names the base. A delta is a path, a
    URL, or a repository on the hub; several, or a folder, are the updates of a chain in any order. The model has the
    fine-tune's generation configuration; `load` returns its tokenizer too. Its class is the one that the configuration
    names (`architectures`), else transformers' causal language model; options are passed to its `from_pretrained`.
    progress: bytes of tensors. Memory: the model, and one tensor of the base. Raises PxdError, CheckpointError,
    CheckFailedError, ToolError.
    """
    require("load_model", "torch", "transformers", extra="compress")
    named = _named(base) if delta is None else _named(delta, base)
    if "torch_dtype" in options:  # transformers' former name of dtype
        options.setdefault("dtype", options.pop("torch_dtype"))
    with (
        local_updates(named) as paths,
        opened_deltas(paths) as files,
        open_checkpoint(
            _hub_id(files[0].manifest, named[0]) if delta is None else base, revision=base_revision
        ) as opened,
        watched(progress, "load", checkpoint_bytes(files[-1].manifest)) as step,
        payload_first(files[-1]),
    ):
        file, checkpoint = files[-1], state_before(files, opened)
        label = str(named[0]) if len(named) == 1 else str(file.path)
        refuse_part(file.manifest, label)
        refuse_foreign(files[0], opened)
        note_borrowed(file, checkpoint)
        assets = dict(assets_of(file, checkpoint))
        config = _object_of(assets, "config.json", label) or checkpoint.config()
        generation = _object_of(assets, "generation_config.json", label)
        pxd.check_base_names(file.manifest, checkpoint.tensors)  # of two errors, a wrong base says more
        parsed, kind = _model_kind(config, label)
        check_config_shapes(kind, parsed, shapes_of(file.manifest), label)
        state = _state_of(file, checkpoint, step)
    dtype = config.get("dtype", config.get("torch_dtype", "float32"))
    model = _build_model(kind, parsed, state, {"dtype": dtype, **options}, label)
    if generation is not None:
        _set_generation(model, generation, label)
    return model


def _state_of(file: pxd.DeltaFile, checkpoint: Checkpoint, step: Callable[[int], None]) -> dict[str, Tensor]:
    """The fine-tuned tensors by name; tied names have one tensor. step: called with the bytes of each name."""
    from peraxis_format.ops.tensors import from_storage

    state = {}
    names = file.manifest.names()
    for entry, array in rebuild_all(file, checkpoint.tensors):
        tensor = from_storage(array, entry.dtype)
        for name in names[entry.name]:
            state[name] = tensor
            step(tensor.nbytes)
    return state


def _model_kind(config: dict[str, Any], label: str) -> tuple[Any, Any]:
    """The configuration of a config.json, and the class of its model. Raises ToolError if there is none."""
    from peraxis_tools.checkpoints.environment import parse_config

    parsed = parse_config(config, label=label)
    # Use the class itself, because AutoModelForCausalLM.from_pretrained needs a folder.
    return parsed, _model_class(parsed, label)


def _build_model(
    kind: Any, parsed: Any, state: dict[str, Tensor], options: dict[str, Any], label: str
) -> PreTrainedModel:
    """The model of a configuration with these tensors. kind: its class. options: of from_pretrained."""
    # Other shapes are refused below, where transformers names none of them.
    options = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _told(f"{label}: transformers cannot build its model"):
        model, info = kind.from_pretrained(None, config=parsed, state_dict=state, **options)
    _refuse_random(info["missing_keys"], kind, label)
    _refuse_other_shapes(info["mismatched_keys"], label)
    if info["unexpected_keys"]:
        names = listed(sorted(info["unexpected_keys"]), shown=3)
        note(f"{label}: {kind.__name__}, the model of its config.json, has no {names}; they are not loaded")
    built: PreTrainedModel = model.eval()
    return built


def _set_generation(model: PreTrainedModel, values: dict[str, Any], label: str) -> None:
    from transformers import GenerationConfig

    with _told(f"{label}: its generation_config.json cannot be loaded"):
        model.generation_config = GenerationConfig.from_dict(values)


def _object_of(assets: Mapping[str, bytes], name: str, label: str) -> dict[str, Any] | None:
    """The JSON object of an asset; None if there is no such asset. Raises ToolError for anything else."""
    return json_object(assets[name], f"{label}: its {name}") if name in assets else None


def _refuse_random(missing: Collection[str], kind: type, label: str) -> None:
    """Raise CheckFailedError if the model has weights that the fine-tune lacks: transformers draws them at random."""
    if missing:
        raise CheckFailedError(
            f"{label}: has no {listed(sorted(missing), shown=3)}, which {kind.__name__}, the model of its config.json, "
            "needs; publish all weights of the model, or write the checkpoint with apply and load it with its own class"
        )


def _refuse_other_shapes(mismatched: Collection[tuple[str, Any, Any]], label: str) -> None:
    """Raise CheckFailedError for weights that the model of the config.json has in other shapes."""
    if mismatched:
        raise other_shape(label, *min(mismatched))


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn the errors of transformers into a ToolError of one line; the original is its cause."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:  # it raises many types for odd values
        raise ToolError(f"{what}: {type(error).__name__}: {first_line(error)}") from error


def _model_class(config: Any, label: str) -> Any:
    """The class of transformers for a configuration. Raises ToolError if there is none."""
    import transformers

    from peraxis_tools.checkpoints.environment import check_causal

    for name in config.architectures if isinstance(config.architectures, list) else ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    check_causal(config, label, remedy="write the checkpoint with apply and load it with its own class")
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def load(
    delta: str | Path | Sequence[str | Path],
    base: str | Path | None = None,
    *,
    base_revision: str | None = None,
    progress: Progress = None,
    **options: Any,
) -> Loaded:
    """Load the fine-tune of a delta: (model, tokenizer), the tokenizer None if neither fine-tune nor base has one.

    delta, options, progress: as in `load_model`. base: a folder or hub id, by default that of the manifest. Raises
    PxdError, CheckpointError, ToolError.
    """
    named = _named(delta, base)
    with local_updates(named) as paths:
        with opened_deltas(paths) as files:
            where = with_revision(_hub_id(files[0].manifest, named[0]) if base is None else base, base_revision)
        model = load_model(where, paths, progress=progress, **options)
        return Loaded(model, _load_tokenizer_of(paths, where))


def _load_tokenizer_of(deltas: Sequence[Path], base: str | Path) -> Any:
    """The tokenizer that `apply` would write, with its chat template; None if there is none."""
    from peraxis_tools.checkpoints.environment import load_tokenizer

    with (
        opened_deltas(deltas) as files,
        open_checkpoint(base) as opened,
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        for path, data in assets_of(files[-1], state_before(files, opened)):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(data)
        if not has_vocabulary([path.name for path in folder.iterdir()]):
            return None
        return load_tokenizer(folder, shown=files[-1].path.name)


class PxdForCausalLM:
    """`PxdForCausalLM.from_pretrained("me/delta")` returns a transformers model, as AutoPeftModelForCausalLM does."""

    def __init__(self) -> NoReturn:
        raise TypeError("PxdForCausalLM cannot be instantiated; use PxdForCausalLM.from_pretrained(DELTA)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        base: str | Path | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """The fine-tuned model. revision: of the delta's repository. options: those of transformers' from_pretrained.

        Raises PxdError, CheckpointError, ToolError.
        """
        source = pretrained_model_name_or_path
        if revision is not None:
            if Path(source).exists() or "@" in str(source):
                raise ToolError(f"{source}: revision={revision!r} needs a repository without @revision")
            source = f"{source}@{revision}"
        return load_model(source, **options) if base is None else load_model(base, source, **options)
