"""Compare the small files that the engine reads with those of the fine-tune (SPEC 3.12).

The engine takes configuration, tokenizer and generation configuration from `--model`, which is still the base. If the
fine-tune has others, serving it with the base's would be silently wrong, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from peraxis_format.errors import LiveModelError
from peraxis_format.reader import DeltaFile

__all__ = ["AssetFolders", "asset_folders", "refuse_other_assets"]

# Keys of config.json that describe the origin of a checkpoint, not its computation.
_NOTES: Final = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})
_GENERATION_NOTES: Final = frozenset({"_from_model_config", "transformers_version"})
_TOKENIZER: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")

AssetFolders = Mapping[str, Path | None]
"""Asset -> the folder that the engine reads it from; None if the engine does not read it."""


def refuse_other_assets(delta: DeltaFile, folders: AssetFolders) -> None:
    """Raise LiveModelError if the engine reads an asset that is not the fine-tune's."""
    found = sorted(_differing_assets(delta, folders))
    if found:
        raise LiveModelError(
            f"{delta.path.name}: the fine-tune's {', '.join(found)} differ from those that the server reads; write "
            f"them with `peraxis-tools extract {delta.path.name} -o FILES` and pass --tokenizer FILES "
            "--generation-config FILES --hf-config-path FILES, or set VLLM_PERAXIS_ASSETS=ignore"
        )


def _differing_assets(delta: DeltaFile, folders: AssetFolders) -> Iterator[str]:
    """The names of assets that differ in a way that changes the model's outputs."""
    for asset in delta.manifest.assets:
        folder = folders.get(asset.path)
        if folder is None:
            continue
        own = delta.asset(asset.path)
        try:
            other = (folder / asset.path).read_bytes()
        except OSError:
            other = b""
        if own != other and not _equivalent(asset.path, own, other):
            yield asset.path


def asset_folders(model: str, tokenizer: str | None, config: str | None, generation: str | None) -> AssetFolders:
    """The folders that a server reads its small files from; names that are not local folders are left out.

    generation: "auto" means the model's folder, "vllm" means none.
    """
    base = _folder(model)
    tokens = _folder(tokenizer) if tokenizer else base
    configured = _folder(config) if config else base
    generated = base if generation in (None, "auto") else (None if generation == "vllm" else _folder(generation or ""))
    return {
        **dict.fromkeys(_TOKENIZER, tokens),
        "tokenizer_config.json": tokens,
        "config.json": configured,
        "generation_config.json": generated,
    }


def _folder(name: str) -> Path | None:
    path = Path(name)
    return path if path.is_dir() else None


def _equivalent(path: str, own: bytes, other: bytes) -> bool:
    if path == "config.json":
        return _without(own, _NOTES) == _without(other, _NOTES)
    if path == "generation_config.json":
        return _without(own, _GENERATION_NOTES) == _without(other, _GENERATION_NOTES)
    if path == "tokenizer_config.json":
        keys = ("chat_template", "add_bos_token", "add_eos_token", "bos_token", "eos_token", "tokenizer_class")
        return [_parsed(own).get(key) for key in keys] == [_parsed(other).get(key) for key in keys]
    return False


def _without(data: bytes, notes: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in _parsed(data).items() if key not in notes}


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
