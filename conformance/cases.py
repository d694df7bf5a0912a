"""The corpus as the runner sees it: cases.jsonl, and a folder in which every file of a case exists."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Case", "Corpus", "CorpusError"]

ROOT = Path(__file__).parent


class CorpusError(Exception):
    """The corpus itself is damaged or cannot be laid out here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One line of cases.jsonl."""

    id: str
    clause: str
    operation: str
    accepts: bool
    phase: str | None
    codes: tuple[str, ...]
    features: tuple[str, ...]
    seconds: float
    mib: int
    files: Mapping[str, Any]
    sha256: Mapping[str, str]
    expect: Mapping[str, Any]
    note: str

    @classmethod
    def parse(cls, line: str) -> Case:
        """One record. Raises KeyError if a field is missing."""
        said = json.loads(line)
        return cls(
            id=said["id"],
            clause=said["clause"],
            operation=said["operation"],
            accepts=said["expectation"] == "accept",
            phase=said["phase"],
            codes=tuple(said["codes"]),
            features=tuple(said["features"]),
            seconds=said["budget"]["seconds"],
            mib=said["budget"]["mib"],
            files=said["files"],
            sha256=said["sha256"],
            expect=said.get("expect", {}),
            note=said.get("note", ""),
        )


class Corpus:
    """A folder of cases. `path(case, role)` gives a file's path; a file that is not stored is made in `scratch`."""

    def __init__(self, root: Path = ROOT, *, scratch: Path | None = None) -> None:
        self.root = root
        self.scratch = scratch
        self._lock = threading.Lock()
        if not (root / "cases.jsonl").is_file():
            raise CorpusError(f"{root} has no corpus; it is in the repository: pass --corpus REPOSITORY/conformance")
        with open(root / "cases.jsonl", encoding="utf-8") as lines:
            self.cases = tuple(Case.parse(line) for line in lines)

    def select(self, patterns: Iterable[str] = (), skip: Iterable[str] = ()) -> list[Case]:
        """Cases whose id matches a pattern (all without one) and none of `skip`."""
        wanted, unwanted = list(patterns) or ["*"], list(skip)
        return [case for case in self.cases if matches(case.id, wanted) and not matches(case.id, unwanted)]

    def path(self, case: Case, role: str) -> Path:
        """The file of a role. Raises CorpusError if it is damaged, OSError if it cannot be made here."""
        given = case.files[role]
        if isinstance(given, str):
            path = self.root / given
        else:
            with self._lock:  # Two threads may need the same file.
                path = self._derived(case, role, given)
        if role in case.sha256 and not self._is_made(given):
            self._check(path, case.sha256[role])
        return path

    def source(self, case: Case) -> Path:
        """The folder of an encode case."""
        for role in case.files:
            if role.startswith("source/"):
                self.path(case, role)
        content: str = case.files["source/content.json"]
        return (self.root / content).parent

    @staticmethod
    def _is_made(given: Any) -> bool:
        return isinstance(given, dict) and "make" in given

    @staticmethod
    def _check(path: Path, sha256: str) -> None:
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise CorpusError(f"{path} is not the file of this corpus (its SHA-256 differs)")

    def _derived(self, case: Case, role: str, given: Mapping[str, Any]) -> Path:
        if self.scratch is None:
            raise CorpusError(f"{case.id} needs a scratch folder")
        name = f"make-{given['make']}.pxd" if "make" in given else f"{case.id.replace('/', '-')}.pxd"
        target = self.scratch / name
        if not os.path.lexists(target):
            materialise(given, self.root, target)
            if "make" in given:
                self._check(target, case.sha256[role])
        return target

    def copy(self, target: Path) -> int:
        """Write the corpus so that every file of a case exists as one; returns the number of cases."""
        shutil.copytree(self.root, target, dirs_exist_ok=True, ignore=only_corpus(self.root))
        written = []
        for case in self.cases:
            files = dict(case.files)
            for role, given in case.files.items():
                if isinstance(given, dict) and ("truncate" in given or "make" in given):
                    files[role] = f"{case.id}.pxd"
                    (target / files[role]).parent.mkdir(parents=True, exist_ok=True)
                    if not (target / files[role]).exists():
                        materialise(given, self.root, target / files[role])
            written.append((case.id, files))
        rewrite(target / "cases.jsonl", dict(written))
        return len(written)


def matches(id: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(id, pattern) for pattern in patterns)


def only_corpus(root: Path) -> Any:
    folders = {"valid", "invalid", "hostile", "apply", "encode"}

    def ignored(folder: str, names: list[str]) -> Iterator[str]:
        top = Path(folder) == root
        return (name for name in names if top and name not in folders | {"cases.jsonl", "README.md"})

    return lambda folder, names: set(ignored(folder, names))


def rewrite(path: Path, files: Mapping[str, Any]) -> None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    said = "".join(json.dumps(line | {"files": files[line["id"]]}, separators=(",", ":")) + "\n" for line in lines)
    path.write_text(said, encoding="utf-8")


def materialise(given: Mapping[str, Any], root: Path, target: Path) -> None:
    """Make a file that a case describes instead of storing it: a cut, a large file, or a file that is not regular."""
    temporary = target.with_name(f"{target.name}.part")
    if "truncate" in given:
        temporary.write_bytes((root / given["of"]).read_bytes()[: given["truncate"]])
    elif "make" in given:
        from .generator.large import large

        temporary.write_bytes(large(given["make"]))
    elif given["special"] == "directory":
        temporary.mkdir()
    elif given["special"] == "fifo":
        os.mkfifo(temporary)
    elif given["special"] == "symlink":
        temporary.symlink_to((root / given["of"]).resolve())
    elif given["special"] == "sparse":
        sparse(root / given["of"], temporary, given["size"])
    else:
        raise CorpusError(f"unknown kind of file: {given}")
    os.replace(temporary, target)


def sparse(source: Path, target: Path, size: int) -> None:
    """A file with a hole at its end; few file systems support one of 2^53 bytes."""
    try:
        shutil.copyfile(source, target)
        os.truncate(target, size)
    except OSError:
        target.unlink(missing_ok=True)
        raise
