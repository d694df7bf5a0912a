"""Base + delta -> the whole fine-tuned checkpoint, streamed tensor by tensor (steps 1 to 12 of SPEC 8).

Every tensor of the base is read once: the bytes that are hashed are the bytes that are used. Reading,
hashing and rebuilding run on a few threads, a bounded number of bytes ahead of the writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import peraxis_format as pxd
from peraxis_tools.assets import LEFT_BEHIND, asset_group
from peraxis_tools.checkpoint import Checkpoint, open_checkpoint, parse_identity
from peraxis_tools.delta_parts import refuse_part
from peraxis_tools.errors import ToolError
from peraxis_tools.folders import MARKER, atomic_folder
from peraxis_tools.outputs import claim_folder
from peraxis_tools.parallel import ordered_map
from peraxis_tools.progress import Steps, watched
from peraxis_tools.remote import local_copy
from peraxis_tools.shards import SHARD_BYTES, Shard, TensorSpec, plan_shards, shard_header, write_index, write_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ApplyResult",
    "applied_assets",
    "apply",
    "base_of",
    "checkpoint_bytes",
    "load_model",
    "rebuild",
    "rebuild_all",
    "to_torch",
]

_AHEAD_BYTES: Final = 384 << 20
_WORKERS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyResult:
    """What `apply` wrote.

    files: paths in the folder. left_behind: files of the fine-tuned folder that the delta does not carry.
    """

    folder: Path
    content_id: str
    tensors: int
    bytes: int
    files: tuple[str, ...]
    left_behind: tuple[str, ...] = ()


def rebuild(delta: pxd.DeltaFile, base: pxd.Safetensors, name: str) -> pxd.Array:
    """One module's fine-tuned tensor: base bytes read once and held to their digest, payload likewise.

    Returns a storage array. Raises PayloadError, BindingError (E404). Names, dtypes and shapes of the base
    must have been checked (`check_base_names`).
    """
    entry = delta.entry(name)
    tensor = None
    if entry.base is not None and entry.encoding is pxd.Encoding.FULL:
        pxd.check_base_digest(entry, base.sha256(name))  # bound, but not needed for the result
    elif entry.base is not None:
        tensor = base.read(name)
        pxd.check_base_bytes(entry, tensor)
    return pxd.reconstruct(delta.load(name), tensor)


def rebuild_all(
    delta: pxd.DeltaFile, base: pxd.Safetensors, *, workers: int | None = None
) -> Iterator[tuple[pxd.ModuleEntry, pxd.Array]]:
    """Every module in file order with its fine-tuned tensor, a few of them in flight at a time.

    Memory: about twice the bytes in flight, which are at most _AHEAD_BYTES or one tensor.
    Raises BindingError before the first tensor where names, dtypes or shapes do not match.
    """
    pxd.check_base_names(delta.manifest, base)

    def work(entry: pxd.ModuleEntry) -> tuple[pxd.ModuleEntry, pxd.Array]:
        return entry, rebuild(delta, base, entry.name)

    def size(entry: pxd.ModuleEntry) -> int:
        return TensorSpec(entry.name, entry.dtype, entry.shape).size

    return ordered_map(work, delta.manifest.modules, cost=size, budget=_AHEAD_BYTES, workers=workers or _WORKERS)


def apply(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    base_revision: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    progress: Steps | bool | None = None,
) -> ApplyResult:
    """Write base + delta as a Hugging Face folder: shards, index, configuration, tokenizer.

    base: folder, file or hub id. progress: called with each number of bytes written, or True for a bar. The folder
    appears under `output` whole or not at all. Raises PxdError, CheckpointError, ToolError, OSError.
    """
    output = Path(output)
    with (
        claim_folder(output, overwrite=overwrite, inputs=(base, delta)),
        pxd.open(delta) as file,
        open_checkpoint(base, revision=base_revision) as checkpoint,
        watched(progress, "apply", checkpoint_bytes(file.manifest)) as step,
    ):
        refuse_part(file.manifest, delta)
        shards = plan_shards(_specs(file.manifest), shard_bytes=shard_bytes)
        with atomic_folder(output, overwrite=overwrite) as folder:
            _write_shards(folder, shards, file, checkpoint.tensors, workers, step)
            write_index(folder, shards)
            for name, data in applied_assets(file, checkpoint):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
            paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            names = tuple(sorted(name for name in paths if name != MARKER))
        tensors = [tensor for shard in shards for tensor in shard.tensors]
        return ApplyResult(
            folder=output,
            content_id=file.content_id,
            tensors=len(tensors),
            bytes=sum(tensor.size for tensor in tensors),
            files=names,
            left_behind=tuple(file.manifest.metadata.get(LEFT_BEHIND, "").split("\n")[:-1]),
        )


def _aliases(manifest: pxd.Manifest) -> dict[str, list[str]]:
    aliases: dict[str, list[str]] = {}
    for name, alias in manifest.tied:
        aliases.setdefault(name, []).append(alias)
    return aliases


def _specs(manifest: pxd.Manifest) -> Iterator[TensorSpec]:
    """What the fine-tuned checkpoint holds, aliases right behind their modules (SPEC 6.5)."""
    aliases = _aliases(manifest)
    for module in manifest.modules:
        for name in (module.name, *aliases.get(module.name, ())):
            yield TensorSpec(name, module.dtype, module.shape)


def checkpoint_bytes(manifest: pxd.Manifest) -> int:
    """Bytes of the whole fine-tuned checkpoint."""
    return sum(spec.size for spec in _specs(manifest))


def _write_shards(
    folder: Path,
    shards: list[Shard],
    delta: pxd.DeltaFile,
    base: pxd.Safetensors,
    workers: int | None,
    progress: Callable[[int], None],
) -> None:
    aliases = _aliases(delta.manifest)
    arrays = (
        array
        for entry, array in rebuild_all(delta, base, workers=workers)
        for _ in range(1 + len(aliases.get(entry.name, ())))
    )
    for shard in shards:
        with open(folder / shard.file_name, "wb") as file:
            file.write(shard_header(shard.tensors))
            for spec in shard.tensors:
                write_tensor(file, spec, next(arrays))
                progress(spec.size)


def applied_assets(delta: pxd.DeltaFile, base: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """The delta's assets, and of the base's the groups that the delta brings nothing of."""
    own = [asset.path for asset in delta.manifest.assets]
    groups = {asset_group(path) for path in own}
    for path in own:
        yield path, delta.asset(path)
    found = base.folder_assets()
    for path in found.carried:
        if path not in own and asset_group(path) not in groups:
            yield path, found.read(path)


def base_of(manifest: pxd.Manifest, delta: object) -> str:
    """The base that a manifest names, as `org/name[@revision]`. Raises ToolError where that is no hub id."""
    base = manifest.base
    named = f"{base.id}@{base.revision}" if base.revision else base.id
    try:
        parse_identity(named)  # a manifest must not lead to folders of this machine
    except ToolError:
        raise ToolError(f"{delta}: names its base {named!r}, which is no hub id; say where the base is") from None
    return named


def load_model(
    base: str | Path,
    delta: str | Path | None = None,
    *,
    base_revision: str | None = None,
    progress: Steps | bool | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The fine-tuned model itself, without a folder in between: `load_model("org/base", "delta.pxd")`.

    With one argument, `load_model("me/delta")`, that is the delta, and its manifest names the base. A delta is a path,
    a URL, or a repository on the hub. The model has the fine-tune's generation configuration; `load` gives its
    tokenizer too. options go to `AutoModelForCausalLM.from_pretrained`. progress: as of `apply`. Memory: the model, and
    one tensor of the base. Raises PxdError, CheckpointError, ToolError.
    """
    import json

    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    named = base if delta is None else delta
    with (
        local_copy(named) as path,
        pxd.open(path) as file,
        open_checkpoint(base_of(file.manifest, named) if delta is None else base, revision=base_revision) as checkpoint,
        watched(progress, "load", checkpoint_bytes(file.manifest)) as step,
    ):
        refuse_part(file.manifest, named)
        assets = dict(applied_assets(file, checkpoint))
        config = json.loads(assets.get("config.json") or json.dumps(checkpoint.config()))
        state = {}
        aliases = _aliases(file.manifest)
        for entry, array in rebuild_all(file, checkpoint.tensors):
            tensor = to_torch(array, entry.dtype)
            for name in (entry.name, *aliases.get(entry.name, ())):
                state[name] = tensor
                step(tensor.nbytes)
    options.setdefault("dtype", config.get("dtype", config.get("torch_dtype", torch.float32)))
    parsed = AutoConfig.for_model(**config)
    # The class itself: AutoModelForCausalLM.from_pretrained insists on a folder to look into.
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)]
    model: PreTrainedModel = kind.from_pretrained(None, config=parsed, state_dict=state, **options)
    if "generation_config.json" in assets:
        model.generation_config = GenerationConfig.from_dict(json.loads(assets["generation_config.json"]))
    return model.eval()


def to_torch(array: pxd.Array, dtype: pxd.DType) -> Any:
    """A storage array as a torch tensor of its dtype, sharing memory."""
    import torch

    kinds = {
        pxd.DType.BF16: torch.bfloat16,
        pxd.DType.BOOL: torch.bool,
        pxd.DType.F8_E4M3: torch.float8_e4m3fn,
        pxd.DType.F8_E5M2: torch.float8_e5m2,
    }
    tensor = torch.from_numpy(array)
    return tensor.view(kinds[dtype]) if dtype in kinds else tensor
