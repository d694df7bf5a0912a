"""The verb pull: fetch deltas from the hub or a URL, and verify them before they are written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import peraxis_format as pxd
from peraxis_format.arguments import did_you_mean
from peraxis_format.hub import hub_errors, hub_reason
from peraxis_format.urls import is_url
from peraxis_tools.arguments import check_paths, sequence
from peraxis_tools.deltas.content_ids import parse_content_ids
from peraxis_tools.display.progress import Progress, ProgressOf, stages_of
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.outputs.rules import claim_files, made_folder, refuse_missing
from peraxis_tools.process.optional import require
from peraxis_tools.remote.files import local_copy
from peraxis_tools.remote.names import HUB_NAME, names_a_file
from peraxis_tools.remote.urls import without_secrets

__all__ = ["PullResult", "Pulled", "pull"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """One written file. content_id: None for a signature."""

    path: Path
    bytes: int
    content_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PullResult:
    """The result of `pull`. source: the given source without passwords. files: the written files."""

    source: str
    files: tuple[Pulled, ...]


def pull(
    source: str,
    output: str | Path = ".",
    *,
    files: Sequence[str] = (),
    expect_content_id: str | Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = None,
) -> PullResult:
    """Fetch the deltas of a repository (`org/name[@revision]`) with their signatures, or the delta of a URL.

    output: the folder for the files. files: names of single deltas in a repository. expect_content_id: the content IDs
    that a delta may have. All deltas are verified (steps 1 to 11 of SPEC 8) before any is written. progress: called
    with numbers of bytes, or True for bars. Raises CheckFailedError for another content ID, PxdError, ToolError,
    OSError.
    """
    check_paths(source=source, output=output)
    if not is_url(source) and not names_a_file(source):
        require(f"{source} (a repository)", "huggingface_hub")
    folder, files = Path(output), sequence(files)
    refuse_missing(folder.absolute().parent)
    expected = parse_content_ids(sequence(expect_content_id))
    stages = stages_of(progress)
    with _fetched(source, files, stages) as fetched:
        targets = [folder / path.name for path in fetched]
        with made_folder(folder), claim_files(targets, overwrite=overwrite):
            ids = [_verified(path, expected, stages, source) for path in fetched]
            for path, target in zip(fetched, targets, strict=True):
                with pxd.atomic_file(target, overwrite=overwrite) as writer, open(path, "rb") as reader:
                    shutil.copyfileobj(reader, writer, 1 << 22)
    pulled = zip(targets, ids, strict=True)
    return PullResult(
        source=without_secrets(source),
        files=tuple(Pulled(path=path, bytes=path.stat().st_size, content_id=its_id) for path, its_id in pulled),
    )


def _verified(path: Path, content_ids: Sequence[str], progress: ProgressOf, source: str) -> str | None:
    """The content ID of a fetched delta, None for a signature. Errors name the source, not the temporary copy."""
    if path.suffix == ".sig":
        return None
    try:
        return _content_id(path, content_ids, progress)
    except pxd.PxdError as error:
        error.file = without_secrets(source) if is_url(source) else f"{source}/{path.name}"
        raise


def _content_id(path: Path, content_ids: Sequence[str], progress: ProgressOf) -> str:
    with pxd.open(path) as delta:
        if content_ids and delta.content_id not in content_ids:
            raise CheckFailedError(
                f"{path.name}: is {delta.content_id}, which is none of those expected; this is another file"
            )
        with progress("verify", delta.data_size) as step:
            delta.verify(progress=step)
        return delta.content_id


@contextlib.contextmanager
def _fetched(source: str, files: Sequence[str], progress: ProgressOf) -> Iterator[list[Path]]:
    """Yield local paths of the deltas: in a temporary folder for a URL, in the hub's cache for a repository."""
    if is_url(source):
        if files:
            raise ToolError(f"{without_secrets(source)}: names one file already; leave out files (--file)")
        with local_copy(source, progress=progress) as path:
            yield [path]
        return
    match = HUB_NAME.fullmatch(source)
    if match is None or names_a_file(source):
        raise ToolError(f"{source}: neither a repository (org/name or org/name@revision) nor a URL")
    yield _from_hub(match["id"], match["revision"], files)


def _from_hub(repository: str, revision: str | None, files: Sequence[str]) -> list[Path]:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        there = api.list_repo_files(repository, revision=revision)
        wanted = list(files) or sorted(name for name in there if name.endswith(".pxd"))
        missing = next((name for name in wanted if name not in there), None)
        if missing is not None or not wanted:
            raise ToolError(f"{repository}: has no {missing or '.pxd'}{did_you_mean(missing or '', there)}")
        twice = len({PurePosixPath(name).name for name in wanted}) < len(wanted)
        if twice:
            raise ToolError(f"{repository}: two of its deltas have the same name; pull each with files (--file)")
        signatures = [f"{name}.sig" for name in wanted if f"{name}.sig" in there]
        return [Path(api.hf_hub_download(repository, name, revision=revision)) for name in (*wanted, *signatures)]
    except hub_errors() as error:
        raise ToolError(f"{repository}: cannot be fetched from the hub: {hub_reason(error)}") from None
