"""The kit without its corpus, as a package is installed; reports that cannot be written; keys of the list."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peraxis_conformance import cli

from tests.conformance.helpers import KIT, script, wrong_loader

RIGHT = " ".join(wrong_loader())


def without_a_corpus(folder: Path) -> Path:
    """The kit as `pip install .` installs it: its code alone. Returns the folder for PYTHONPATH."""
    package = folder / "peraxis_conformance"
    (package / "generator").mkdir(parents=True)
    for path in [*KIT.glob("*.py"), *KIT.glob("generator/*.py")]:
        (package / path.relative_to(KIT)).symlink_to(path)
    shutil.copyfile(KIT / "cases.py", folder / "cases.py")
    (package / "cases.py").unlink()
    (folder / "cases.py").rename(package / "cases.py")  # its own place says where the corpus would be
    return folder


def test_every_command_of_an_installed_kit_finds_a_named_corpus(tmp_path: Path) -> None:
    """`list`, `run`, `copy` and the plugin; without --corpus, one line says where the corpus is."""
    small = tmp_path / "small"
    small.mkdir()
    (small / "invalid").symlink_to(KIT / "invalid")
    lines = (KIT / "cases.jsonl").read_text().splitlines(keepends=True)
    (small / "cases.jsonl").write_text("".join(line for line in lines if json.loads(line)["id"] == "invalid/html-tag"))
    path = without_a_corpus(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": f"{path}"}
    plugin = ["pytest", "-q", "-p", "peraxis_conformance.plugin", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    plugin += ["--pyargs", "peraxis_conformance.suite", "--pxd-adapter", RIGHT]
    commands = [["list"], ["run", "--adapter", RIGHT], ["copy", str(tmp_path / "copy")]]
    runs = [(["peraxis_conformance.cli", *command], "--corpus") for command in commands] + [(plugin, "--pxd-corpus")]
    for command, option in runs:
        for given, status in (([], (2, 4)), ([option, str(small)], (0,))):
            done = subprocess.run(
                [sys.executable, "-m", *command, *given],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env=environment,
            )
            assert done.returncode in status, (command, given, done.stdout + done.stderr)
            assert bool(given) != (f"pass {option} REPOSITORY/conformance" in done.stdout + done.stderr), (
                command,
                done.stderr,
            )
    assert (tmp_path / "copy" / "cases.jsonl").is_file()


def test_the_readme_of_the_kit_starts_with_an_installation_that_has_the_corpus() -> None:
    text = (KIT / "README.md").read_text(encoding="utf-8")
    first = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
    assert first.splitlines() == ["pip install --editable .", 'peraxis-conformance run --adapter "node my-adapter.js"']
    assert "--corpus CLONE/conformance" in text.split("- [Ten minutes")[0]


@pytest.mark.parametrize("option", ["--json", "--junit"])
@pytest.mark.parametrize(("path", "part"), [("absent/report", "there is no folder"), (".", "is a folder")])
def test_a_report_that_cannot_be_written_is_refused_before_a_case_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, path: str, part: str
) -> None:
    ran = tmp_path / "ran"
    adapter = " ".join(script(tmp_path, f"open({str(ran)!r}, 'w'); sys.exit(77)"))
    with pytest.raises(SystemExit) as done:
        cli.main(["run", "--adapter", adapter, "--case", "invalid/empty", option, str(tmp_path / path)])
    said = capsys.readouterr().err
    assert done.value.code == 2
    assert part in said
    assert ".tmp" not in said
    assert not ran.exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_report_at_a_link_is_written_into_its_file(tmp_path: Path, exists: bool) -> None:
    report, link = tmp_path / "report.json", tmp_path / "link"
    if exists:
        report.write_text("the report before, which is longer than the new one" * 1000)
    link.symlink_to(report)
    assert cli.main(["run", "--adapter", RIGHT, "--case", "invalid/empty", "--json", str(link)]) == 0
    assert link.is_symlink()
    assert len(json.loads(report.read_text())["adapters"]) == 1


def test_a_report_to_standard_output_comes_after_the_lines_on_it(tmp_path: Path) -> None:
    link, out = tmp_path / "stdout", tmp_path / "out"
    link.symlink_to("/proc/self/fd/1" if Path("/proc/self/fd/1").exists() else "/dev/fd/1")
    given = ["run", "--adapter", RIGHT, "--case", "invalid/empty", "--json", str(link)]
    with out.open("w") as file:
        command = [sys.executable, "-c", f"from peraxis_conformance import cli; cli.main({given})"]
        subprocess.run(command, stdout=file, check=True)
    lines, _, report = out.read_text().partition("\n{")
    assert "conformance | 1 of 1" in lines
    assert len(json.loads("{" + report)["adapters"]) == 1
    assert link.is_symlink()


def test_a_report_that_fails_at_the_end_names_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    (tmp_path / ".report.json.tmp").mkdir()  # in the way of the temporary file
    assert cli.main(["run", "--adapter", RIGHT, "--case", "invalid/empty", "--json", str(report)]) == 2
    said = capsys.readouterr().err
    assert str(report) in said
    assert ".tmp" not in said


def test_the_list_has_the_keys_of_the_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    """`list --json` names and fills each key as cases.jsonl does."""
    assert cli.main(["list", "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stored = [json.loads(line) for line in (KIT / "cases.jsonl").read_text().splitlines()]
    assert listed == [{key: case[key] for key in listed[0]} for case in stored]
    assert {"expectation", "phase", "codes", "features"} < set(listed[0])
