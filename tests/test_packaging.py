"""What is installed is what is in the tree."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_every_package_folder_is_installed() -> None:
    folders = {
        "peraxis_format": "peraxis_format",
        "peraxis_tools": "peraxis_tools",
        "conformance": "peraxis_conformance",
    }
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in folders.items()
        for path in (ROOT / folder).rglob("__init__.py")
        if "loaders" not in path.parts
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_whole_corpus_is_installed() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["peraxis_conformance"]
    covered = {path for pattern in patterns for path in (ROOT / "conformance").glob(pattern)}
    files = [
        path
        for path in (ROOT / "conformance").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    ]
    missing = [path for path in files if path not in covered and not any(parent in covered for parent in path.parents)]
    assert len(files) > 300
    assert missing == []


def test_the_versions_agree() -> None:
    import peraxis_format

    assert PROJECT["project"]["version"] == peraxis_format.__version__


def test_what_is_pinned_satisfies_what_is_asked_for() -> None:
    from packaging.requirements import Requirement

    pinned = dict(
        line.strip().lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    extras = PROJECT["project"]["optional-dependencies"].values()
    for text in [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(text)
        if requirement.name == "peraxis":
            continue
        name = requirement.name.lower().replace("-", "_")
        version = pinned.get(name) or pinned.get(name.replace("_", "-"))
        assert version is not None, text
        assert version in requirement.specifier, text
