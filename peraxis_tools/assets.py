"""The small files of a checkpoint's folder: which of them a delta carries (SPEC 3.12), and which it leaves behind.

    configuration   config.json, generation_config.json
    tokenizer       tokenizer*.json, vocab*, merges.txt, *.model, *.tiktoken, chat templates, additional_chat_templates/
    processor       processor_config.json, preprocessor_config.json and relatives
    pipeline        sentence-transformers' modules.json, and the small files in the folders that it names

Each belongs to one group. Apply takes a group from the base only where the delta brings nothing of that group: files of
two checkpoints never mix within one. Everything else (code above all) stays behind and is named, but for what training
and publishing leave beside a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from peraxis_format import ASSET_PATH
from peraxis_tools.errors import ToolError

__all__ = [
    "ASSET_BYTES_MAX",
    "LEFT_BEHIND",
    "FolderAssets",
    "Group",
    "asset_group",
    "find_assets",
    "listed",
    "printable_name",
]

ASSET_BYTES_MAX: Final = 64 << 20
LEFT_BEHIND: Final = "peraxis.left_behind"  # metadata key: files that were not carried, a line each
Group: TypeAlias = Literal["configuration", "tokenizer", "processor", "pipeline"]

_TEMPLATES: Final = "additional_chat_templates"
# The names under which transformers' tokenizers and processors, and sentence-transformers, keep their files.
_GROUPS: Final[tuple[tuple[Group, re.Pattern[str]], ...]] = (
    ("processor", re.compile(r"([a-z]+_)?(pre)?processor_config\.json|audio_tokenizer_config\.json")),
    ("pipeline", re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json")),
    ("configuration", re.compile(r"(generation_)?config\.json")),
    ("tokenizer", re.compile(_TEMPLATES + r"/[^/]+\.jinja|[^/]+\.(jinja|model|tiktoken)")),
    ("tokenizer", re.compile(r"(tokenizer|vocab|\w+_vocab|merges|added_tokens|special_tokens)[\w-]*\.(json|txt)")),
    ("tokenizer", re.compile(r"(chat_template|normalizer|tekken|emoji|byte_maps|word_\w+)\.json|dict\.txt")),
)
# What training and publishing leave beside a model, and the weights themselves: not missed in an applied folder.
_BYPRODUCTS: Final = re.compile(
    r"(readme|licen[cs]e|notice|use_policy|changelog|modelcard)[^/]*|\.[^/]*"
    r"|(trainer_state|training_args|\w+_results|scheduler|optimizer|rng_state|adapter_config)[^/]*"
    r"|[^/]+\.(index\.json|md|png|jpe?g|gif|svg|pdf|log|lock|csv|pxd|sig)"
    r"|[^/]+\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|ot)",
    re.IGNORECASE,
)
_WEIGHTS: Final = (".safetensors", ".bin")


def asset_group(path: str) -> Group | None:
    """The group of a carried file; None for a file that no group has."""
    if "/" in path and not path.startswith(f"{_TEMPLATES}/"):
        return "pipeline"
    return next((group for group, pattern in _GROUPS if pattern.fullmatch(path)), None)


def listed(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def printable_name(path: str) -> str:
    """A name in one line of valid Unicode: what a file system lets into names beside that is escaped."""
    text = path.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderAssets:
    """carried: paths relative to the folder, sorted. left: files that a loaded model may miss, sorted."""

    folder: Path
    carried: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def read(self, path: str) -> bytes:
        """The bytes of a carried file. Raises ToolError for one that is too large."""
        file = self.folder / path
        size = file.stat().st_size
        if size > ASSET_BYTES_MAX:
            raise ToolError(f"{file}: {size} bytes is too much for an asset; move it out of the folder")
        return file.read_bytes()


def find_assets(folder: Path) -> FolderAssets:
    """What a delta of this folder carries, and what it leaves behind that a model may need."""
    carried, left = [], []
    for path in _files(folder, {_TEMPLATES, *_pipeline_folders(folder)}):
        name = path.relative_to(folder).as_posix()
        wanted = asset_group(name) is not None and ASSET_PATH.fullmatch(name) and not _is_index(name)
        if wanted and path.stat().st_size:
            carried.append(name)
        elif not _BYPRODUCTS.fullmatch(path.name) or ("/" in name and path.suffix in _WEIGHTS):
            left.append(name)
    return FolderAssets(folder=folder, carried=tuple(sorted(carried)), left=tuple(sorted(left)))


def _is_index(name: str) -> bool:
    return name.lower().endswith(".index.json")


def _files(folder: Path, inner: set[str]) -> list[Path]:
    places = [folder, *(folder / name for name in sorted(inner))]
    return [path for place in places if place.is_dir() for path in sorted(place.iterdir()) if path.is_file()]


def _pipeline_folders(folder: Path) -> set[str]:
    """Folders that sentence-transformers' modules.json names: plain names alone."""
    path = folder / "modules.json"
    try:
        modules = json.loads(path.read_bytes()) if path.is_file() else []
    except (OSError, ValueError, RecursionError):
        return set()
    found = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return {path for path in found if isinstance(path, str) and path and path == Path(path).name and path[0] != "."}
