"""The targets of the pages exist: files, headings, and the functions of the walks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
WALKS = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("## Five walks")[2]


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


def test_pages_show_one_content_id_of_the_delta_of_the_session_in_the_readme() -> None:
    """`make demo` writes it; other pages show the same file."""
    shown = [
        found
        for page in (ROOT / "README.md", ROOT / "docs" / "ci.md")
        for found in re.findall(r"verified  delta\.pxd\n  (sha256:[0-9a-f]{64})", page.read_text("utf-8"))
    ]
    assert len(shown) == 2
    assert len(set(shown)) == 1


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text("utf-8")
    assert all(f"({path.name})" in index for path in folder.glob("*.md") if path.name != "README.md")


def walks() -> dict[str, list[tuple[str, str]]]:
    """Return the hops (file, function) of each walk."""
    found = {}
    for part in WALKS.split("\n### ")[1:]:
        title = part.splitlines()[0]
        found[title] = re.findall(r"^\d+\. `([\w/.]+)` `(\w+)`:", part, re.MULTILINE)
    return found


def test_the_five_walks_are_there_and_name_functions_that_exist() -> None:
    assert list(walks()) == ["compress", "apply", "VariantSwitch.use", "serve", "update and follow"]
    for title, hops in walks().items():
        assert len(hops) >= 6, title
        for file, name in hops:
            assert (ROOT / file).is_file(), f"{title}: {file}"
            text = (ROOT / file).read_text("utf-8")
            assert re.search(rf"^ *def {name}\(", text, re.MULTILINE), f"{title}: {file} {name}"


def test_no_walk_goes_back_to_a_file() -> None:
    for title, hops in walks().items():
        files = [file for file, _ in hops]
        assert len(files) == len(set(files)), title


def test_files_in_backquotes_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"):
        for name in re.findall(
            r"`((?:peraxis|docs|tests|benchmarks|conformance)[\w/]*\.\w+)`", page.read_text("utf-8")
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
