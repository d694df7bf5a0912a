"""The installed package has the files of the tree."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_every_package_folder_is_installed() -> None:
    folders = {
        "peraxis": "peraxis",
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


def test_the_wheel_holds_code_and_no_corpus() -> None:
    """The cases (12 MB) stay in the repository."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    assert data["peraxis_conformance"] == ["py.typed"]
    assert not (ROOT / "MANIFEST.in").exists()
    for package, patterns in data.items():
        folder = ROOT / package.replace("peraxis_conformance", "conformance").replace(".", "/")
        files = [path for pattern in patterns for path in folder.glob(pattern)]
        assert files, f"{package}: {patterns} match nothing"
        assert sum(path.stat().st_size for path in files) < 100_000


def test_the_kit_without_its_corpus_names_the_option_that_finds_it() -> None:
    from peraxis_conformance.cases import Corpus, CorpusError

    with pytest.raises(CorpusError, match="pass --corpus REPOSITORY/conformance"):
        Corpus(ROOT / "docs")


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
