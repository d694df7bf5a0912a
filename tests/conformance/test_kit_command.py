"""Test the kit's command: its corpus, its reports and its list."""

from __future__ import annotations

import json
import re
import stat
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from peraxis_conformance import Corpus, cli

from tests.conformance.helpers import KIT, wrong_loader

RIGHT = " ".join(wrong_loader())


def test_reports_say_the_same_in_text_json_and_junit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = " ".join(wrong_loader("exponent-ignored"))
    paths = {"--json": tmp_path / "report.json", "--junit": tmp_path / "report.xml"}
    arguments = [
        "run",
        "--adapter",
        wrong,
        "--case",
        "apply/exponent-*",
        *(str(x) for pair in paths.items() for x in pair),
    ]
    assert cli.main(arguments) == 1
    [report] = json.loads(paths["--json"].read_text())["adapters"]
    failures = ElementTree.parse(paths["--junit"]).getroot().findall(".//failure")
    text = capsys.readouterr().out
    assert report["counts"]["failed"] == len(failures) == text.count("FAIL ") > 0
    assert (
        text.splitlines()[-1]
        == report["badge"]
        == f"PXD 1.0 conformance | {report['counts']['passed']} of {len(report['cases'])}"
    )
    assert "apply/exponent-63" in text
    assert "must be 0x" in text


def test_select_and_skip_are_globs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--case", "valid/axis-*", "--skip", "*-batch", "--skip", "*-1x1"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["valid/axis-row", "valid/axis-col", "valid/axis-row-col", "valid/axis-tensor"]
    assert cli.main(["run", "--adapter", "true", "--case", "nothing/*"]) == 2


def test_a_copy_holds_every_file_and_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus()
    few = tuple(case for case in corpus.cases if case.id.startswith(("valid/simple", "cut/simple-")))
    assert len(few) > 5
    lines = (KIT / "cases.jsonl").read_text().splitlines(keepends=True)
    small = tmp_path / "small"
    small.mkdir()
    (small / "valid").symlink_to(KIT / "valid")
    (small / "cases.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["id"] in {case.id for case in few})
    )
    assert cli.main(["copy", "--corpus", str(small), str(tmp_path / "copy")]) == 0
    copied = Corpus(tmp_path / "copy")
    assert len(copied.cases) == len(few)
    assert all(
        isinstance(copied.path(case, "file"), Path) and copied.path(case, "file").is_file() for case in copied.cases
    )
    assert cli.main(["run", "--corpus", str(tmp_path / "copy"), "--adapter", RIGHT]) == 0


def test_a_damaged_corpus_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = next(line for line in (KIT / "cases.jsonl").read_text().splitlines() if '"id":"valid/simple"' in line)
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid/simple.pxd").write_bytes(b"other")
    (tmp_path / "cases.jsonl").write_text(line + "\n")
    assert cli.main(["run", "--corpus", str(tmp_path), "--adapter", RIGHT]) == 2
    assert "its SHA-256 differs" in capsys.readouterr().err


def test_special_files_are_what_they_say(tmp_path: Path) -> None:
    corpus = Corpus(scratch=tmp_path)
    kinds = {"invalid/directory": stat.S_ISDIR, "invalid/fifo": stat.S_ISFIFO, "hostile/symbolic-link": stat.S_ISREG}
    for id, test in kinds.items():
        [case] = corpus.select([id])
        assert test(corpus.path(case, "file").stat().st_mode), id


def test_the_kit_has_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert re.fullmatch(r"peraxis-conformance of peraxis \S.*\n", capsys.readouterr().out)
