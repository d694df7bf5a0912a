"""The small files of a checkpoint's folder: those that a delta contains (SPEC 3.12), and those that it leaves out.

    configuration   config.json, generation_config.json
    tokenizer       tokenizer*.json, vocab*, merges.txt, *.model, *.tiktoken, chat templates, additional_chat_templates/
    processor       processor_config.json, preprocessor_config.json and relatives
    pipeline        sentence-transformers' modules.json, and the small files in the folders that it names

Each file belongs to one group. Apply takes a group from the base only if the delta has no file of that group, so files
of two checkpoints never mix within a group. So an update has all files of each group in which one has changed, and of
the updates of a chain the last one that has files of a group decides. All other files (code above all) are left out and
listed, except the files that training and publishing write beside a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypeVar

from peraxis_format import ASSET_PATH
from peraxis_tools.checkpoints.json_files import json_object, json_value
from peraxis_tools.display.notes import note
from peraxis_tools.display.shown import printable_name
from peraxis_tools.errors import ToolError

__all__ = [
    "LEFT_BEHIND",
    "FolderAssets",
    "Group",
    "asset_group",
    "changed_groups",
    "find_assets",
    "left_behind",
    "with_groups",
]

_ASSET_BYTES_MAX: Final = 64 << 20
LEFT_BEHIND: Final = "peraxis.left_behind"  # metadata key: files that are left out, one in each line
T = TypeVar("T")
Group: TypeAlias = Literal["configuration", "tokenizer", "processor", "pipeline"]

_TEMPLATES: Final = "additional_chat_templates"
# The file names of transformers' tokenizers and processors, and of sentence-transformers.
_GROUPS: Final[tuple[tuple[Group, re.Pattern[str]], ...]] = (
    ("processor", re.compile(r"([a-z]+_)?(pre)?processor_config\.json|audio_tokenizer_config\.json")),
    ("pipeline", re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json")),
    ("configuration", re.compile(r"(generation_)?config\.json")),
    ("tokenizer", re.compile(_TEMPLATES + r"/[^/]+\.jinja|[^/]+\.(jinja|model|tiktoken)")),
    ("tokenizer", re.compile(r"(tokenizer|vocab|\w+_vocab|merges|added_tokens|special_tokens)[\w-]*\.(json|txt)")),
    ("tokenizer", re.compile(r"(chat_template|normalizer|tekken|emoji|byte_maps|word_\w+)\.json|dict\.txt")),
)
# Files that an applied folder does not need: those of training and publishing, and the weights themselves.
_BYPRODUCTS: Final = re.compile(
    r"(readme|licen[cs]e|notice|use_policy|changelog|modelcard)[^/]*|\.[^/]*"
    r"|(trainer_state|training_args|\w+_results|scheduler|optimizer|rng_state|adapter_config)[^/]*"
    r"|[^/]+\.(index\.json|md|png|jpe?g|gif|svg|pdf|log|lock|csv|pxd|sig)"
    r"|[^/]+\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|ot)",
    re.IGNORECASE,
)
_WEIGHTS: Final = (".safetensors", ".bin")


def asset_group(path: str) -> Group | None:
    """The group of a file; None if it is in no group."""
    if "/" in path and not path.startswith(f"{_TEMPLATES}/"):
        return "pipeline"
    return next((group for group, pattern in _GROUPS if pattern.fullmatch(path)), None)


def _group_of(path: str) -> str:
    """The group of a file; a file that is in none is a group of its own."""
    return asset_group(path) or path


def with_groups(before: Mapping[str, T], own: Mapping[str, T]) -> dict[str, T]:
    """The small files after a delta whose own are given, by path in order. T: whatever stands for a file."""
    replaced = {_group_of(path) for path in own}
    kept = {path: file for path, file in before.items() if _group_of(path) not in replaced}
    return dict(sorted({**kept, **own}.items()))


def changed_groups(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of `after` in each group that differs from that of `before`, in path order.

    If `after` has no file of a group, a note names the group's files: a delta cannot record a removal.
    """
    groups: dict[str, list[dict[str, bytes]]] = {}
    for side, files in enumerate((before, after)):
        for path, data in files.items():
            groups.setdefault(_group_of(path), [{}, {}])[side][path] = data
    for old, new in groups.values():
        if old and not new:
            gone = ", ".join(sorted(old))
            note(f"{gone}: removed in the new state; an update cannot record this, so apply keeps the old files")
    changed = {path: data for old, new in groups.values() if old != new for path, data in new.items()}
    return dict(sorted(changed.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderAssets:
    """carried: the assets, as sorted paths relative to the folder. left: sorted files that a loaded model may need.

    newer: assets that are not read from the folder.
    """

    folder: Path
    carried: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    newer: Mapping[str, bytes] = field(default_factory=dict)

    def with_groups_of(self, own: Mapping[str, bytes]) -> FolderAssets:
        """The assets after updates whose own are given."""
        return replace(self, carried=tuple(with_groups(dict.fromkeys(self.carried, b""), own)), newer=own)

    def read(self, path: str, *, checked: bool = True) -> bytes:
        """The bytes of an asset.

        Raises ToolError if it is too large, or, if `checked`, named .json and no receiver could read it.
        """
        if path in self.newer:
            return self.newer[path]
        file = self.folder / path
        size = file.stat().st_size
        target = _outside(file, self.folder)
        if target is not None:
            note(f"{file}: is a link out of the checkpoint, to {target}; its content is taken")
        if size > _ASSET_BYTES_MAX:
            raise ToolError(f"{file}: {size} bytes is too much for an asset; move it out of the folder")
        data = file.read_bytes()
        if checked and file.suffix == ".json":
            _check_json(file, data)
        return data


def _check_json(file: Path, data: bytes) -> None:
    """Raise ToolError unless the content is JSON, and an object in a configuration."""
    read = json_object if asset_group(file.name) == "configuration" else json_value
    read(data, str(file), remedy="correct it or move it out of the folder")


def _outside(file: Path, folder: Path) -> Path | None:
    """The target of a link, of the file or of its folder, that leaves the checkpoint; None for any other file.

    Links into the hub's cache do not leave it.
    """
    target, folder = file.resolve(), folder.resolve()
    # A snapshot's files are links to the blobs of its repository: REPOSITORY/snapshots/COMMIT/file.
    inside = target.is_relative_to(folder) or any(
        target.is_relative_to(parent / "blobs") for parent in folder.parents if (parent / "snapshots").is_dir()
    )
    return None if inside else target


def find_assets(folder: Path) -> FolderAssets:
    """The files of this folder that a delta contains, and those that it leaves out but a model may need.

    If none of its files is an asset, the folder is not a model's, and no file is listed as left out.
    """
    carried, left = [], []
    for path in _files(folder, {_TEMPLATES, *_pipeline_folders(folder)}):
        name = path.relative_to(folder).as_posix()
        wanted = asset_group(name) is not None and ASSET_PATH.fullmatch(name) and not _is_index(name)
        if wanted and path.stat().st_size:
            carried.append(name)
        elif not _BYPRODUCTS.fullmatch(path.name) or ("/" in name and path.suffix in _WEIGHTS):
            left.append(name)
    return FolderAssets(folder=folder, carried=tuple(sorted(carried)), left=tuple(sorted(left)) if carried else ())


def left_behind(assets: FolderAssets) -> str:
    """The metadata LEFT_BEHIND: the files that are left out, a line each."""
    return "".join(f"{printable_name(path)}\n" for path in assets.left)


def _is_index(name: str) -> bool:
    return name.lower().endswith(".index.json")


def _files(folder: Path, inner: set[str]) -> list[Path]:
    """The files of the folder and of those inner ones; notes what has the name of an asset and is no file."""
    places = [folder, *(folder / name for name in sorted(inner))]
    found = [path for place in places if place.is_dir() for path in sorted(place.iterdir()) if not path.is_dir()]
    for path in found:
        if not path.is_file() and asset_group(path.relative_to(folder).as_posix()) is not None:
            kind = "a pipe or a device, not a file" if path.exists() else "a link to nothing"
            note(f"{path}: is {kind}, so it is left out")
    return [path for path in found if path.is_file()]


def _pipeline_folders(folder: Path) -> set[str]:
    """The folders that sentence-transformers' modules.json lists; only plain names count."""
    path = folder / "modules.json"
    try:
        modules = json.loads(path.read_bytes()) if path.is_file() else []
    except (OSError, ValueError, RecursionError):
        return set()
    found = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return {path for path in found if isinstance(path, str) and path and path == Path(path).name and path[0] != "."}
