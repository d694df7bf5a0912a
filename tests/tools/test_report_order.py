"""Reports keep the order that the user gave, put results first, and crop nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import peraxis
from peraxis_tools.chain import ChainLog, LogEntry
from peraxis_tools.cli import cli
from peraxis_tools.display.consoles import LEAST_WIDTH, standard_output
from peraxis_tools.report.console import plain_text
from peraxis_tools.report.update import render_log
from tests.tools.output_cases import make_inputs


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    peraxis.compress("base", "tuned", "one.pxd", fit="none", force=True)
    peraxis.compress("base", "tuned", "two.pxd", fit="none", masks=2, force=True)
    return tmp_path


def said(line: str) -> str:
    return CliRunner().invoke(cli, line.split()).stdout


@pytest.mark.parametrize("files", [("one.pxd", "two.pxd"), ("two.pxd", "one.pxd")])
def test_merge_names_its_files_with_their_weights_in_the_order_given(files: tuple[str, str], inputs: Path) -> None:
    found = peraxis.merge(files, "sum.pxd", weights=(0.7, 0.3), base="base")
    assert [(part.path, part.weight) for part in found.inputs] == [(files[0], 0.7), (files[1], 0.3)]
    for part in found.inputs:
        with peraxis.open(part.path) as delta:
            assert delta.content_id == part.content_id
    lines = said(f"merge {' '.join(files)} --weights 0.7,0.3 --base base -o cli.pxd").splitlines()
    rows = [line.split() for line in lines if re.match(r" *0\.\d  ", line)]
    assert rows == [["0.7", files[0]], ["0.3", files[1]]]
    assert any("--masks" in line for line in lines)


def test_joined_parts_are_named(inputs: Path) -> None:
    said("split one.pxd --parts 2 -o parts")
    shown = said("merge parts -o joined.pxd")
    assert re.findall(r"part  (\S+)\n +sha256:", shown) == [f"parts/one-0000{i}-of-00002.pxd" for i in (1, 2)]


def test_diff_prints_fields_of_the_manifest_after_its_results(inputs: Path) -> None:
    lines = said("diff one.pxd two.pxd").splitlines()
    begin = lines.index("manifest")
    assert begin > next(i for i, line in enumerate(lines) if line.startswith("differ most"))
    assert not any("metadata" in line for line in lines[:begin])
    assert any("metadata" in line for line in lines[begin:])


@pytest.mark.parametrize("line", ["inspect two.pxd --modules", "diff one.pxd two.pxd", "log chain"])
def test_a_narrow_terminal_crops_no_column(line: str, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inputs / "chain").mkdir()
    peraxis.update("base", "tuned", "chain/step-00000000000000000001.pxd")
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = said(line)
    for columns in ("10", "40", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        assert said(line) == wide


def test_a_wide_terminal_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, width in ((40, LEAST_WIDTH), (133, 133)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert isinstance(console := standard_output(), Console)
        assert console.width == width


def entry(name: str, result: str) -> LogEntry:
    return LogEntry(
        name=name, content_id=name, previous=None, base="sha256:b", result=result, changed=1, weights=2, bytes=3
    )


def test_log_shows_a_folded_update_after_the_one_with_its_result() -> None:
    updates = tuple(entry(f"step-{i}.pxd", f"sha256:{i}") for i in range(3))
    folded = (entry("first.pxd", "sha256:1"), entry("other.pxd", "sha256:9"))
    lines = plain_text(ChainLog(path="chain", updates=updates, folded=folded), render_log).splitlines()
    names = [line.split()[0] for line in lines[1:6]]
    assert names == ["step-0.pxd", "step-1.pxd", "first.pxd", "step-2.pxd", "other.pxd"]
