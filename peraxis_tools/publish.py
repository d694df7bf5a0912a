"""The verb publish: deltas as a repository of the Hugging Face hub, with their signatures and a model card.

The card is made in card.py. The card and .gitattributes of an existing repository are extended.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import peraxis_format as pxd
from peraxis_format.hub import hub_errors, hub_reason
from peraxis_tools.arguments import check_choice, check_paths, refuse_idle, sequence
from peraxis_tools.card import CardDelta, card_text, missing_fields
from peraxis_tools.checkpoints.checkpoint import is_delta, parse_identity
from peraxis_tools.deltas.inspection import inspect
from peraxis_tools.deltas.parts import refuse_part
from peraxis_tools.deltas.signatures import refuse_stale_signature, signature_path
from peraxis_tools.display.progress import Progress, ProgressOf, stages_of
from peraxis_tools.errors import OptionError, ToolError
from peraxis_tools.outputs.folders import atomic_folder
from peraxis_tools.outputs.rules import check_folder, claim_folder
from peraxis_tools.process.optional import require
from peraxis_tools.remote.names import HUB_ID, names_a_file

__all__ = ["PublishResult", "PublishedDelta", "Relation", "publish"]

Relation = Literal["finetune", "adapter", "quantized", "merge"]

_CHUNK: Final = 1 << 22
_LICENSE: Final = re.compile(r"[a-z0-9]+([.+-][a-z0-9]+)*[+]?")
_EVALUATION: Final = "peraxis.eval/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedDelta:
    """One delta of a repository, by its name there."""

    name: str
    content_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishResult:
    """The result of `publish`.

    url: the URL of the commit, None if nothing was uploaded. files: names in the repository. missing: fields that the
    card lacks.
    """

    repository: str
    deltas: tuple[PublishedDelta, ...]
    missing: tuple[str, ...]
    files: tuple[str, ...]
    path: Path | None
    url: str | None


def publish(
    repository: str,
    deltas: str | Path | Sequence[str | Path],
    *,
    evaluation: str | Path | Sequence[str | Path] | None = None,
    license: str | None = None,
    relation: Relation = "finetune",
    base_id: str | None = None,
    card_from: str | Path | None = None,
    dry_run: str | Path | None = None,
    overwrite: bool = False,
    private: bool = False,
    revision: str | None = None,
    progress: Progress = None,
) -> PublishResult:
    """Verify the files, write a model card, and upload all of it to a repository of the hub.

    evaluation: files with the JSON of `peraxis-tools eval`, one for each delta. base_id: the hub id of the base for the
    card. card_from: a folder or a hub id whose README.md gives the language and the license. license: its identifier on
    the hub, like apache-2.0. relation: the hub's name of the relation to the base. dry_run: write the repository to
    this folder and upload nothing. private: make a new repository private. revision: the branch to commit to.
    progress: called with numbers of bytes, or True for bars. Raises ToolError, PxdError, OSError.
    """
    check_paths(card_from=card_from, dry_run=dry_run, optional=True)
    _check_options(
        license=license, relation=relation, dry_run=dry_run, revision=revision, overwrite=overwrite, private=private
    )
    require("a model card", "huggingface_hub")
    paths = [Path(path) for path in sequence(deltas)]
    dry_run = None if dry_run is None else Path(dry_run)
    evaluations = [] if evaluation is None else [Path(path) for path in sequence(evaluation)]
    _check_names(repository, paths)
    bundles = [signature_path(path) for path in paths]
    if dry_run is not None:
        check_folder(dry_run, overwrite=overwrite, inputs=(*paths, *bundles, *evaluations), repository=True)
    reports = [_read_evaluation(path) for path in evaluations]
    stages = stages_of(progress)
    for path in paths:
        _verify(path, stages)
    told = _told(paths, reports, base_id)
    files = {path.name: path for path in (*paths, *(bundle for bundle in bundles if os.path.isfile(bundle)))}
    before = _in_folder(dry_run) if dry_run is not None else _on_hub(repository, revision)
    card = card_text(
        repository, told, existing=before.card, fine_tuned_card=_readme(card_from), license=license, relation=relation
    )
    attributes = _with_line(before.attributes, _ATTRIBUTES)
    url = None
    if dry_run is None:
        message = f"Add {', '.join(delta.found.content_id for delta in told)}"
        url = _upload(repository, files, card, attributes, private=private, revision=revision, message=message)
    else:
        with claim_folder(dry_run, overwrite=overwrite, inputs=(*files.values(), *evaluations), repository=True):
            _write_repository(dry_run, files, card, attributes, overwrite=overwrite, progress=stages)
    return PublishResult(
        repository=repository,
        deltas=tuple(PublishedDelta(name=delta.file, content_id=delta.found.content_id) for delta in told),
        missing=tuple(missing_fields(card)),
        files=("README.md", ".gitattributes", *files),
        path=dry_run,
        url=url,
    )


def _check_options(
    *,
    license: str | None,
    relation: str,
    dry_run: str | Path | None,
    revision: str | None,
    overwrite: bool,
    private: bool,
) -> None:
    check_choice("relation", relation, get_args(Relation))
    if license is not None and not _LICENSE.fullmatch(license):
        raise OptionError(
            f"license {license!r}: not an identifier of the hub, like apache-2.0; pass other for any other"
        )
    if dry_run is None:
        refuse_idle("without dry_run", overwrite=overwrite)
    else:
        refuse_idle("with dry_run", private=private, revision=revision)


def _write_repository(
    target: Path, files: Mapping[str, Path], card: str, attributes: str, *, overwrite: bool, progress: ProgressOf
) -> None:
    """Write the repository to a folder, with no list of its files: all are for the hub, and the card identifies it."""
    with atomic_folder(target, overwrite=overwrite, repository=True) as folder:
        (folder / "README.md").write_text(card, "utf-8")
        (folder / ".gitattributes").write_text(attributes, "utf-8")
        with progress("copy", sum(source.stat().st_size for source in files.values())) as step:
            for name, source in files.items():
                _copy(source, folder / name, step)


def _verify(path: Path, progress: ProgressOf) -> None:
    with pxd.open(path) as delta:
        refuse_part(delta.manifest, path)
        with progress("verify", delta.data_size) as step:
            delta.verify(progress=step)
    refuse_stale_signature(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    """The repository's present content of the two files that are extended."""

    card: str | None = None
    attributes: str = ""


def _check_names(repository: str, deltas: Sequence[Path]) -> None:
    if (is_delta(repository) or repository.endswith(".pxd")) and any(HUB_ID.fullmatch(str(path)) for path in deltas):
        raise ToolError(f"{repository} is a delta and {deltas[0]} is not; pass them in the other order")
    if not HUB_ID.fullmatch(repository):
        raise ToolError(f"{repository}: not a name of a repository; pass org/name")
    for path in deltas:
        if not path.name.isprintable() or path.name.startswith("-"):
            raise ToolError(f"{str(path)!r}: not a file name for a repository; rename the file")
    names = [path.name for path in deltas]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ToolError(f"{twice}: two of the files have this name; rename one")
    if not names:
        raise ToolError("no .pxd to publish; pass at least one")


def _told(deltas: Sequence[Path], reports: Sequence[Mapping[str, Any]], base_id: str | None) -> list[CardDelta]:
    """The card's data of each file. Raises ToolError for an evaluation of another file."""
    base = None if base_id is None else parse_identity(base_id)
    found = [inspect(path) for path in deltas]
    ids = {result.content_id for result in found}
    stray = next((report for report in reports if report.get("content_id") not in ids), None)
    if stray is not None:
        raise ToolError(f"the evaluation is of {stray.get('content_id')}, not of this file; evaluate it again")
    by_id = {str(report["content_id"]): report for report in reports}
    return [
        CardDelta(
            file=path.name,
            found=result,
            base_id=None if base is None else base.id,
            base_revision=None if base is None else base.revision,
            evaluation=by_id.get(result.content_id),
            architecture=_architecture(path),
        )
        for path, result in zip(deltas, found, strict=True)
    ]


def _architecture(path: Path) -> str:
    """The model's class by the delta's configuration; empty if it names none."""
    with pxd.open(path) as delta:
        if not any(asset.path == "config.json" for asset in delta.manifest.assets):
            return ""
        try:
            names = json.loads(delta.asset("config.json"))["architectures"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return ""
    return str(names[0]) if isinstance(names, list) and names else ""


def _readme(source: str | Path | None) -> str | None:
    """The README.md of a folder or of a repository of the hub."""
    if source is None:
        return None
    path = Path(source)
    if path.exists():
        path = path / "README.md" if path.is_dir() else path
        if not path.is_file():
            raise ToolError(f"{source}: has no README.md; pass the folder or hub id of a model with a card")
        return path.read_text("utf-8", "replace")
    found = None if names_a_file(str(source)) else _from_hub(str(source), "README.md", None)
    if found is None:
        raise ToolError(f"{source}: not a folder, and the hub has no README.md for it that can be read")
    return found


def _in_folder(folder: Path) -> _Before:
    def text(name: str) -> str | None:
        path = folder / name
        return path.read_text("utf-8", "replace") if path.is_file() else None

    return _Before(card=text("README.md"), attributes=text(".gitattributes") or "")


def _on_hub(repository: str, revision: str | None) -> _Before:
    card = _from_hub(repository, "README.md", revision)
    return _Before(card=card, attributes=_from_hub(repository, ".gitattributes", revision) or "")


def _from_hub(repository: str, name: str, revision: str | None) -> str | None:
    """A text file of a repository; None if the file or the repository does not exist. Raises ToolError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    missing = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)
    try:
        return Path(HfApi().hf_hub_download(repository, name, revision=revision)).read_text("utf-8", "replace")
    except hub_errors() as error:
        # Without a connection the present content is unknown.
        if isinstance(error, missing) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ToolError(f"{repository}: {name} cannot be read from the hub: {hub_reason(error)}") from None


def _with_line(text: str, line: str) -> str:
    """The text with this line appended, unless it is there."""
    if line.strip() in (held.strip() for held in text.splitlines()):
        return text
    return text + ("\n" if text and not text.endswith("\n") else "") + line


def _copy(source: Path, target: Path, step: Callable[[int], None]) -> None:
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            step(len(chunk))


# A .pxd is large and binary. Cython uses the same suffix, and its text filters must not change it.
_ATTRIBUTES: Final = "*.pxd filter=lfs diff=lfs merge=lfs -text\n"


def _upload(
    repository: str,
    files: Mapping[str, Path],
    card: str,
    attributes: str,
    *,
    private: bool,
    revision: str | None,
    message: str,
) -> str:
    require("an upload", "huggingface_hub")
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, source) for name, source in files.items()]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    operations.append(CommitOperationAdd(".gitattributes", attributes.encode()))
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message=message, revision=revision)
    except hub_errors() as error:
        raise ToolError(f"{repository}: cannot be uploaded: {hub_reason(error)}; log in with `hf auth login`") from None
    return str(done.commit_url)


def _read_evaluation(path: Path) -> Mapping[str, Any]:
    """An evaluation's JSON. Raises ToolError for anything else."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("schema") != _EVALUATION:
        raise ToolError(f"{path}: not the JSON of an evaluation ({_EVALUATION}); write it with `eval --json`")
    if not _is_evaluation(found):
        raise ToolError(
            f"{path}: lacks figures of an evaluation, or they are not finite numbers; write it with `eval --json`"
        )
    return found


def _is_evaluation(found: Mapping[str, Any]) -> bool:
    """Whether the figures of the card are present: for each domain, finite numbers of each candidate."""
    domains = found.get("domains")
    return isinstance(domains, list) and all(isinstance(domain, dict) and _is_domain(domain) for domain in domains)


def _is_domain(domain: Mapping[str, Any]) -> bool:
    candidates, perplexity = domain.get("candidates"), domain.get("perplexity")
    if not candidates or not isinstance(candidates, dict) or not isinstance(perplexity, dict) or "domain" not in domain:
        return False
    numbers = [domain.get("perplexity_fine_tuned")]
    for name, fidelity in candidates.items():
        if not isinstance(fidelity, dict):
            return False
        numbers += [fidelity.get("kl"), fidelity.get("top1"), perplexity.get(name)]
    return all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
