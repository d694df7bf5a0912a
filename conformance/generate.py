"""Write the corpus: valid/ invalid/ hostile/ apply/ encode/ and cases.jsonl.

    python -m peraxis_conformance.generate [DIR]       write
    python -m peraxis_conformance.generate --check     compare with the corpus of the clone

It uses the standard library and integers only, and not the reference writer. The same version of this program writes
the same bytes everywhere. A released corpus is immutable; later versions add cases.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .generator.applied import applied
from .generator.base_files import base_files
from .generator.build import MAGIC, build, expected
from .generator.container import container
from .generator.edges import applied_edges, golden_edges, refused_edges
from .generator.encoded import encoded
from .generator.entry import Cut, Entry, Made, Special
from .generator.hostile import hostile
from .generator.kinds import applied_kinds, golden_kinds, refused_kinds
from .generator.large import large
from .generator.manifest import manifest
from .generator.packed import applied_packed, encoded_packed, golden_packed, refused_packed
from .generator.payload import payload
from .generator.profile import profile
from .generator.update_bits import applied_bits, golden_bits, refused_bits
from .generator.update_faults import refused_bindings, refused_updates
from .generator.update_writers import encoded_updates
from .generator.updates import applied_updates, golden_updates
from .generator.valid import contents

__all__ = ["boundaries", "corpus", "main"]

FOLDERS = ("valid", "invalid", "hostile", "apply", "encode")
SUFFIX = {"file": ".pxd", "base": ".base.safetensors", "output": ".out.safetensors"}


def boundaries(file: bytes) -> list[int]:
    """The offsets where a part of a file ends: N, magic, JSON, header, each tensor, the last byte."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = file[8:start]
    ends = {start + record["data_offsets"][1] for name, record in json.loads(header).items() if name != "__metadata__"}
    seams = {0, 8, 8 + len(MAGIC), 8 + len(header.rstrip(b" ")), start, len(file) - 1} | ends
    return sorted(seam for seam in seams if seam < len(file))


def golden() -> Iterator[tuple[str, Entry]]:
    """Every valid file, then each of its cuts."""
    for slug, clause, content in contents():
        file = build(content)
        yield "valid", Entry(id=slug, clause=clause, files={"file": file}, expect=expected(content, file))
        header = 8 + int.from_bytes(file[:8], "little")
        for length in boundaries(file):
            code, where = (
                ("E124", "2.18") if length >= header else ("E111", "2.4") if length >= 4096 else ("E103", "2.2")
            )
            yield (
                "cut",
                Entry(
                    id=f"{slug}-{length}",
                    clause=where,
                    phase="container",
                    codes=(code,),
                    files={"file": Cut(source=f"valid/{slug}", length=length)},
                ),
            )


def corpus() -> Iterator[tuple[str, Entry]]:
    """(folder, entry) of every case, in the order of cases.jsonl."""
    yield from golden()
    for group in (golden_kinds, golden_packed, golden_updates, golden_bits, golden_edges):
        yield from (("valid", entry) for entry in group())
    faults = (container, manifest, profile, payload, refused_kinds, refused_packed, refused_updates, refused_bits)
    for group in (*faults, refused_edges):
        yield from (("invalid", entry) for entry in group())
    yield from (("hostile", entry) for entry in hostile())
    applications = (applied, applied_kinds, applied_packed, applied_updates, applied_bits, refused_bindings)
    for group in (*applications, applied_edges, base_files):
        yield from (("apply", entry) for entry in group())
    for group in (encoded, encoded_packed, encoded_updates):
        yield from (("encode", entry) for entry in group())


def stored(folder: str, entry: Entry, role: str) -> str:
    """The path of one file of a case, relative to the corpus."""
    if role.startswith("source/"):
        return f"{folder}/{entry.id}/{role.removeprefix('source/')}"
    suffix = ".pxd" if entry.operation == "encode" and role == "output" else SUFFIX[role]
    return f"{folder}/{entry.id}{suffix}"


def derived(value: Cut | Made | Special) -> dict[str, Any]:
    """The description of a file that the runner makes."""
    if isinstance(value, Cut):
        return {"truncate": value.length, "of": f"{value.source}.pxd"}
    if isinstance(value, Made):
        return {"make": value.name}
    given: dict[str, Any] = {"special": value.kind}
    if value.source:
        given["of"] = f"{value.source}.pxd"
    return given | ({"size": value.size} if value.size else {})


def line(folder: str, entry: Entry) -> tuple[dict[str, Any], dict[str, bytes]]:
    """One record of cases.jsonl and the files to store for it."""
    paths: dict[str, Any] = {}
    sums: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for role, value in entry.files.items():
        if isinstance(value, bytes):
            paths[role] = stored(folder, entry, role)
            files[paths[role]] = value
            sums[role] = hashlib.sha256(value).hexdigest()
        else:
            paths[role] = derived(value)
            if isinstance(value, Made):
                sums[role] = hashlib.sha256(large(value.name)).hexdigest()
    record = {
        "id": f"{folder}/{entry.id}",
        "clause": entry.clause,
        "operation": entry.operation,
        "expectation": "reject" if entry.phase else "accept",
        "phase": None if entry.phase == "any" else entry.phase,
        "codes": list(entry.codes),
        "features": list(entry.features),
        "budget": {"seconds": entry.seconds, "mib": entry.mib},
        "files": paths,
        "sha256": sums,
    }
    if entry.expect:
        record["expect"] = dict(entry.expect)
    if entry.note:
        record["note"] = entry.note
    return record, files


def everything() -> dict[str, bytes]:
    """path -> bytes of the whole corpus."""
    files: dict[str, bytes] = {}
    lines: dict[str, str] = {}
    for folder, entry in corpus():
        record, made = line(folder, entry)
        if record["id"] in lines or files.keys() & made.keys():
            raise ValueError(f"two cases are called {record['id']}")
        lines[record["id"]] = json.dumps(record, separators=(",", ":")) + "\n"
        files |= made
    return {**files, "cases.jsonl": "".join(lines.values()).encode()}


def differences(root: Path, files: dict[str, bytes]) -> list[str]:
    """The sorted paths that are missing, differ, or should not exist."""
    wrong = [path for path, data in files.items() if not (root / path).is_file() or (root / path).read_bytes() != data]
    there = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file())
    extra = (path.relative_to(root).as_posix() for path in there)
    return sorted(wrong + [path for path in extra if path not in files])


def write(root: Path, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_bytes() != data:
            temporary = target.with_name(f".{target.name}.tmp")
            temporary.write_bytes(data)
            os.replace(temporary, target)


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit status 1 if --check finds a difference."""
    parser = argparse.ArgumentParser(prog="generate", description="Write the conformance corpus.")
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    given = parser.parse_args(arguments)
    files = everything()
    if not given.check:
        write(given.directory, files)
    different = differences(given.directory, files)
    for path in different:
        sys.stdout.write(f"differs: {path}\n")
    count = files["cases.jsonl"].count(b"\n")
    sys.stdout.write(f"{count} cases, {len(files)} files, {sum(map(len, files.values())):,} bytes\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
