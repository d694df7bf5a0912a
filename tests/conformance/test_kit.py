"""Test the kit: its corpus, its verdicts on adapters, its command and its plugin."""

from __future__ import annotations

import hashlib
import json
import re
import stat
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from peraxis_conformance import Adapter, Corpus, cli, generate, laid_out, run_cases
from peraxis_conformance.process import AdapterError

from tests.conformance.helpers import KIT, wrong_loader

CAPS = {
    "protocol": 1,
    "implementation": "script",
    "version": "1",
    "spec": ["1.0"],
    "features": [],
    "operations": ["decode"],
}
RIGHT = " ".join(wrong_loader())


def script(folder: Path, body: str) -> list[str]:
    """Write an adapter with correct caps. `body` is the rest of its code."""
    path = folder / "adapter.py"
    caps = json.dumps(json.dumps(CAPS))
    start = f"import json, os, sys, time\nif sys.argv[1] == 'caps':\n    print({caps}); sys.exit(0)\n"
    path.write_text(start + body)
    return [sys.executable, "-S", str(path)]


def verdict(command: list[str], pattern: str) -> list[tuple[str, str]]:
    """Return (status, detail) of the cases."""
    with laid_out() as corpus:
        summary = run_cases(Adapter(command), corpus, corpus.select([pattern]))
    return [(outcome.status, outcome.detail) for outcome in summary.outcomes]


def test_the_generator_gives_the_bytes_of_the_corpus() -> None:
    assert generate.main(["--check"]) == 0


def test_the_check_of_the_generator_finds_a_changed_a_missing_and_an_extra_file(tmp_path: Path) -> None:
    files = {"valid/a.pxd": b"a", "valid/b.pxd": b"b", "cases.jsonl": b"{}"}
    generate.write(tmp_path, files)
    assert generate.differences(tmp_path, files) == []
    (tmp_path / "valid/a.pxd").write_bytes(b"x")
    (tmp_path / "valid/b.pxd").unlink()
    (tmp_path / "valid/c.pxd").write_bytes(b"c")
    assert generate.differences(tmp_path, files) == ["valid/a.pxd", "valid/b.pxd", "valid/c.pxd"]


def test_every_stored_file_has_the_digest_that_its_case_names() -> None:
    for case in Corpus().cases:
        for role, path in case.files.items():
            if isinstance(path, str):
                assert hashlib.sha256((KIT / path).read_bytes()).hexdigest() == case.sha256[role], path


def test_the_kit_imports_the_standard_library_alone(tmp_path: Path) -> None:
    # A folder that contains only the kit, under its installed name.
    (tmp_path / "peraxis_conformance").symlink_to(KIT)
    program = (
        "import sys, peraxis_conformance.cli, peraxis_conformance.generate\n"
        "outside = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(name for name in outside if not name.startswith(('_', 'sitecustomize'))))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.strip() == "['peraxis_conformance']"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("sys.exit(0)", "exit status 0 without a result"),
        ("raise LookupError('here')", "exit status 1 without a result; it says 'LookupError: here'"),
        ("print('{}'); sys.exit(3)", "exit status 3"),
        ("print('{\"ok\": true}'); sys.exit(1)", "do not agree"),
        ("print('not json'); sys.exit(1)", "without a result"),
        ("sys.exit(77)", "says unsupported"),
        ("os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("print('{\"ok\": true}'); sys.exit(0)", "must be rejected"),
        ('print(\'{"ok": false, "phase": "profile", "code": "E999"}\'); sys.exit(1)', "phase 'profile'"),
        ("held = bytearray(400 << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(3)", "MiB of memory"),
    ],
)
def test_a_reply_outside_the_protocol_fails_the_case(tmp_path: Path, body: str, part: str) -> None:
    [(status, detail)] = verdict(script(tmp_path, body), "invalid/after-header")
    assert status == "failed"
    assert part in detail


def test_an_adapter_that_does_not_end_fails_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    command = script(tmp_path, "time.sleep(60)")
    with laid_out() as corpus:
        [case] = corpus.select(["invalid/after-header"])
        summary = run_cases(Adapter(command), corpus, [dataclasses.replace(case, seconds=0.3)])
    assert summary.outcomes[0].detail == "no answer after 0.3 s"


def test_another_code_in_the_right_phase_passes_and_is_counted(tmp_path: Path) -> None:
    command = script(tmp_path, 'print(\'{"ok": false, "phase": "container", "code": "E999"}\'); sys.exit(1)')
    with laid_out() as corpus:
        summary = run_cases(Adapter(command), corpus, corpus.select(["invalid/after-header"]))
    assert summary.passed
    assert summary.other_codes == 1


def test_what_an_adapter_does_not_offer_is_unsupported_and_never_passed(tmp_path: Path) -> None:
    assert {status for status, _ in verdict(script(tmp_path, "sys.exit(1)"), "apply/tied")} == {"unsupported"}
    assert cli.main(["run", "--adapter", " ".join(script(tmp_path, "")), "--case", "apply/tied"]) == 1


def test_an_adapter_that_cannot_start_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--adapter", "/nowhere/adapter"]) == 2
    assert (
        capsys.readouterr().err == "peraxis-conformance: cannot start '/nowhere/adapter': No such file or directory\n"
    )


def test_an_adapter_of_another_protocol_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.py"
    path.write_text("print('{\"protocol\": 2}')")
    with pytest.raises(AdapterError, match="speaks protocol 2"):
        Adapter([sys.executable, str(path)])


def test_the_served_loader_and_the_command_agree() -> None:
    with laid_out() as corpus:
        cases = corpus.select(["valid/axis-*", "invalid/pad-*", "apply/tail-*"])
        served = run_cases(Adapter(wrong_loader()), corpus, cases)
        single = run_cases(Adapter(wrong_loader(), serve=False), corpus, cases)
    assert [(o.case.id, o.status, o.code) for o in served.outcomes] == [
        (o.case.id, o.status, o.code) for o in single.outcomes
    ]
    assert served.passed


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
    assert Corpus(small).copy(tmp_path / "copy") == len(few)
    copied = Corpus(tmp_path / "copy")
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


def test_the_plugin_runs_one_test_a_case(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "peraxis_conformance.plugin",
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "peraxis_conformance.suite",
        "--pxd-adapter",
        RIGHT,
        "--pxd-case",
        "invalid/pad-*",
        "--pxd-case",
        "encode/pads",
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    count = len(Corpus().select(["invalid/pad-*"]))
    assert f"{count} passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    failing = [
        *command[: command.index(RIGHT)],
        " ".join(wrong_loader("pads-not-zero")),
        *command[command.index(RIGHT) + 1 :],
    ]
    done = subprocess.run(failing, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "accepted, must be rejected" in done.stdout


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("data", ""),
        ("data + bytes(1)", "differs at byte"),
        ("data[:-1] + b'x'", "differs at byte"),
        ("b''", "differs at byte 0"),
    ],
)
def test_a_writer_is_held_to_every_byte(tmp_path: Path, change: str, part: str) -> None:
    """A writer that copies the expected file passes; with one byte changed it fails."""
    caps = {**CAPS, "operations": ["encode"]}
    golden = KIT / "encode" / "pads.pxd"
    path = tmp_path / "adapter.py"
    path.write_text(
        f"import sys\nif sys.argv[1] == 'caps':\n    print({json.dumps(json.dumps(caps))}); sys.exit(0)\n"
        f"data = open({str(golden)!r}, 'rb').read()\nopen(sys.argv[4], 'wb').write({change})\nprint('{{\"ok\": true}}')"
    )
    command = [sys.executable, "-S", str(path)]
    assert verdict(command, "encode/pads")[0][0] == ("failed" if part else "passed")
    assert part in verdict(command, "encode/pads")[0][1]
    assert verdict(command, "encode/refuse-exponent") == [("failed", "accepted, must be rejected")]


def test_the_ten_minute_path_of_the_readme_is_true(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two pieces of code and the runner's output about them are those of conformance/README.md."""
    text = (KIT / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    mine = tmp_path / "mine.py"
    mine.write_text(first)
    adapter = f"{sys.executable} {mine}"
    assert cli.main(["run", "--adapter", adapter, "--case", "invalid/html*", "--case", "invalid/empty", "-v"]) == 0
    *passed, _, _, badge = capsys.readouterr().out.splitlines()
    assert badge == "PXD 1.0 conformance | 4 of 4"
    assert "".join(f"{line}\n" for line in passed) in text
    mine.write_text(first.replace("    sys.exit(77)\n", second))
    assert cli.main(["run", "--adapter", adapter, "--case", "valid/minimal", "--case", "cut/minimal-*"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "FAIL cut/minimal-4096  SPEC 2.18: accepted, must be rejected"
    assert said[-1] == "PXD 1.0 conformance | 5 of 6"
    for line in (said[0], said[-1], "PXD 1.0 conformance | 4 of 4"):
        assert line in text


def test_an_adapter_without_caps_is_shown_with_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter.py"
    adapter.write_text("raise LookupError('here')", "utf-8")
    assert cli.main(["run", "--adapter", f"{sys.executable} {adapter}", "--case", "valid/minimal"]) == 2
    said = capsys.readouterr().err
    assert said == "peraxis-conformance: `caps` failed: exit status 1; it says 'LookupError: here'\n"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('hi')", "no JSON object on standard output: 'hi'"),
        ("print([1])", "no JSON object on standard output: '[1]'"),
        ("", "no JSON object on standard output: ''"),
        ("print('hi'); exit(3)", "exit status 3"),
    ],
)
def test_caps_that_are_no_object_are_shown(
    body: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter.py").write_text(body, "utf-8")
    adapter = f"{sys.executable} {tmp_path / 'adapter.py'}"
    assert cli.main(["run", "--adapter", adapter, "--case", "valid/minimal"]) == 2
    assert capsys.readouterr().err == f"peraxis-conformance: `caps` failed: {reason}\n"


def test_a_script_without_its_interpreter_is_told_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("", "utf-8")
    for command, told in (("mine.py", True), ("./mine.py", True), ("no-such-program", False)):
        assert cli.main(["run", "--adapter", command, "--case", "valid/minimal"]) == 2
        assert (f'name its interpreter too, like "python {command}"' in capsys.readouterr().err) == told


def test_equal_failures_are_counted_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = " ".join(script(tmp_path, "raise KeyError('encoding')"))
    assert cli.main(["run", "--adapter", adapter, "--case", "invalid/html*", "--jobs", "3"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("FAIL") for line in said) == 3
    assert sum(line.startswith("  failed: 3 (") and "KeyError: " in line for line in said) == 1


def test_the_kit_has_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert re.fullmatch(r"peraxis-conformance of peraxis \S.*\n", capsys.readouterr().out)
