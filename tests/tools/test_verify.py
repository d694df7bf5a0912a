"""`verify`: verdicts, exit codes and the formats that CI systems read."""

from __future__ import annotations

import importlib
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.commands.verify import command
from peraxis_tools.errors import ToolError
from tests.factories import random_storage, sign_module, write_checkpoint, write_delta

BF16 = pxd.DType.BF16
SCHEMAS = Path(__file__).parent / "schemas"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base folder and a delta for it."""
    rng = np.random.default_rng(0)
    base = random_storage(rng, (32, 48))
    folder = write_checkpoint(tmp_path / "base", {"a.weight": (base, BF16)})
    assets = {"config.json": b'{"model_type": "llama"}'}
    return folder, write_delta(tmp_path / "good.pxd", [sign_module(rng, "a.weight", base)], assets=assets)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def damaged(path: Path, position: int = 4100) -> Path:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    target = path.with_name("damaged.pxd")
    target.write_bytes(data)
    return target


def test_each_outcome_has_its_exit_code(pair, tmp_path: Path) -> None:
    base, good = pair
    newer = tmp_path / "newer.pxd"
    newer.write_bytes(good.read_bytes().replace(b'"pxd":"1.0"', b'"pxd":"9.0"', 1))
    other = write_checkpoint(tmp_path / "other", {"a.weight": (np.zeros((32, 48), np.uint16), BF16)})
    assert run(good)[0] == 0
    assert run(good, "--base", base)[0] == 0
    assert run(damaged(good))[0] == 1
    assert run(good, "--base", other)[0] == 1
    assert run(tmp_path / "missing.pxd")[0] == 2
    assert run(newer)[0] == 3
    assert run(good, "--base", tmp_path / "nowhere")[0] == 3
    assert run(good, "--public-key", tmp_path / "no.pub")[0] == 3


def test_the_gravest_of_several_files_decides_and_all_are_reported(pair, tmp_path: Path) -> None:
    _, good = pair
    code, shown = run(damaged(good), good, tmp_path / "missing.pxd", "--json")
    found = json.loads(shown)
    assert (code, found["schema"], found["status"]) == (1, "peraxis.verify/1", "failed")
    assert [verdict["status"] for verdict in found["files"]] == ["failed", "passed", "error"]
    check = found["files"][0]["checks"][-1]
    assert (check["name"], check["code"], check["clause"], check["field"]) == ("payload", "E301", "4.3", "a.weight")


def test_globs_are_files_sorted_and_an_empty_one_is_an_error(pair, tmp_path: Path) -> None:
    _, good = pair
    damaged(good)
    code, shown = run(tmp_path / "*.pxd", "--json")
    assert [Path(v["path"]).name for v in json.loads(shown)["files"]] == ["damaged.pxd", "good.pxd"]
    assert code == 1
    report = tmp_path / "report.xml"
    code, shown = run(tmp_path / "*.nothing", good, "--report", f"junit={report}")
    assert code == 2
    assert "matches no file" in shown
    assert [suite.get("errors") for suite in ElementTree.parse(report).getroot()] == ["1", "0"]
    (tmp_path / "empty").mkdir()
    code, shown = run(tmp_path / "empty", good)
    assert code == 2
    assert "has no .pxd" in shown


def test_the_content_id_pins_the_file(pair) -> None:
    _, good = pair
    with pxd.open(good) as file:
        content_id = file.content_id
    assert run(good, "--expect-content-id", content_id)[0] == 0
    code, shown = run(good, "--expect-content-id", "sha256:" + "0" * 64)
    assert code == 1
    assert "this is another file" in shown


def test_bounds_on_the_error_hold_and_fail(pair, tmp_path: Path) -> None:
    base, good = pair
    apply(base, good, tmp_path / "tuned")
    assert run(good, "--base", base, "--fine-tuned", tmp_path / "tuned", "--max-error", "0.9")[0] == 0
    code, shown = run(good, "--base", base, "--fine-tuned", tmp_path / "tuned", "--max-error", "1e-6")
    assert code == 1
    assert "is above 1e-06" in shown
    # The base in the place of the fine-tune has no delta to compare with.
    assert run(good, "--base", base, "--fine-tuned", base, "--max-error", "0.9")[0] == 1
    for missing in (("--fine-tuned", base), ("--base", base)):
        result = CliRunner().invoke(command, [str(tmp_path / "no.pxd"), *map(str, missing), "--max-error", "0.9"])
        assert isinstance(result.exception, ToolError)
        assert result.exception.exit_status == 2


def test_bounds_on_the_kl_are_held_against_the_evaluation(pair, tmp_path: Path, monkeypatch) -> None:
    evaluation = importlib.import_module("peraxis_tools.evaluate")
    base, good = pair
    monkeypatch.chdir(tmp_path)
    Path("chat.jsonl").touch()
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(evaluation, "worst_kl", lambda *arguments: seen.append(arguments) or ("chat", 0.25))
    arguments = (good, "--base", base, "--fine-tuned", "tuned", "--text", "chat=chat.jsonl")
    assert run(*arguments, "--max-kl", "0.3")[0] == 0
    code, shown = run(*arguments, "--max-kl", "0.2")
    assert code == 1
    assert "KL 0.25 nats per token on chat is above 0.2" in shown
    assert seen[0] == (str(base), "tuned", good, {"chat": "chat.jsonl"})
    monkeypatch.setattr(evaluation, "worst_kl", lambda *_: ("chat", float("nan")))
    assert run(*arguments, "--max-kl", "0.3")[0] == 1
    result = CliRunner().invoke(command, [str(good), "--max-kl", "0.3", "--fine-tuned", "tuned"])
    assert "--text" in str(result.exception)


def test_junit_is_well_formed_and_counts_right(pair, tmp_path: Path) -> None:
    _, good = pair
    report = tmp_path / "report.xml"
    code, shown = run(good, damaged(good), tmp_path / "mi<ss>&\x1bing.pxd", "--format", "junit", "-o", report)
    assert (code, shown) == (1, "")
    root = ElementTree.fromstring(report.read_text())
    assert root.attrib | {"name": ""} == {"name": "", "tests": "5", "failures": "1", "errors": "1"}
    assert [suite.get("failures") for suite in root] == ["0", "1", "0"]
    failure = root.find(".//failure")
    assert failure is not None
    assert failure.get("type") == "E301"


def test_sarif_has_what_its_schema_asks_for(pair, tmp_path: Path) -> None:
    _, good = pair
    _, shown = run(good, damaged(good), tmp_path / "with space.pxd", "--format", "sarif")
    log = json.loads(shown)
    assert log["version"] == "2.1.0"
    (job,) = log["runs"]
    driver = job["tool"]["driver"]
    assert [rule["id"] for rule in driver["rules"]] == ["E301", "peraxis/structure"]
    for result in job["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
    uris = [result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in job["results"]]
    assert uris[1].endswith("with%20space.pxd")


@pytest.fixture
def every_outcome(pair, tmp_path: Path) -> list[Path]:
    """Files that pass, are damaged, are missing or have another version, with names that need quoting."""
    _, good = pair
    newer = tmp_path / "newer 9.pxd"
    newer.write_bytes(good.read_bytes().replace(b'"pxd":"1.0"', b'"pxd":"9.0"', 1))
    return [good, damaged(good), newer, tmp_path / "mi<ss>&\x1bing\n\u202e%.pxd"]


def test_sarif_holds_to_the_published_schema(every_outcome: list[Path]) -> None:
    import jsonschema

    schema = json.loads((SCHEMAS / "sarif-2.1.0.json").read_bytes())
    validator = jsonschema.validators.validator_for(schema)(schema)
    for files in ([every_outcome[0]], every_outcome):
        log = json.loads(run(*files, "--format", "sarif")[1])
        assert [error.message for error in validator.iter_errors(log)] == []
        (job,) = log["runs"]
        assert len(job["results"]) == len(files) - 1
        # Requirements of GitHub's code scanning beyond the schema.
        for result in job["results"]:
            assert result["locations"][0]["physicalLocation"]["region"]["startLine"] == 1
        for rule in job["tool"]["driver"]["rules"]:
            assert all(rule[key]["text"] for key in ("shortDescription", "fullDescription", "help"))
    assert list(validator.iter_errors({**log, "versions": "2.1.0"}))  # the schema refuses a bad report


def test_junit_holds_to_the_schema_that_ci_reads_it_by(every_outcome: list[Path]) -> None:
    from lxml import etree

    schema = etree.XMLSchema(etree.parse(str(SCHEMAS / "junit.xsd")))
    for files in ([every_outcome[0]], every_outcome):
        report = etree.fromstring(run(*files, "--format", "junit")[1].encode())
        assert schema.validate(report), schema.error_log
    del report[0].attrib["tests"]
    assert not schema.validate(report)


def test_one_run_writes_several_reports(every_outcome: list[Path], tmp_path: Path) -> None:
    wanted = {kind: tmp_path / f"report.{kind}" for kind in ("junit", "sarif", "json", "text")}
    more = [word for kind, path in wanted.items() for word in ("--report", f"{kind}={path}")]
    code, shown = run(*every_outcome, "--format", "github", *more)
    assert (code, shown.count("::error"), shown.count("::notice")) == (1, 2, 1)
    for kind, path in wanted.items():
        assert path.read_text() == run(*every_outcome, "--format", kind)[1]
    assert run(every_outcome[0], "--report", "toml=x")[0] == 2


def test_the_default_format_goes_to_a_file_too_and_two_formats_are_refused(pair, tmp_path: Path) -> None:
    _, good = pair
    assert run(good, "-o", tmp_path / "report.txt") == (0, "")
    assert (tmp_path / "report.txt").read_text() == run(good)[1]
    result = CliRunner().invoke(command, [str(good), "--format", "junit", "--json"])
    assert isinstance(result.exception, ToolError)
    assert "--json and --format junit exclude each other; give one of them" in str(result.exception)
    assert run(good, "--format", "json", "--json")[0] == 0


def test_verdicts_of_any_length_keep_their_columns(pair, tmp_path: Path) -> None:
    _, good = pair
    _, shown = run(good, "--base", tmp_path / "nobase")
    rows = [line for line in shown.splitlines() if line.startswith(("  structure", "  payload", "  base"))]
    assert [row[14:28].strip() for row in rows] == ["passed", "passed", "not verifiable"]
    assert all(row[28:30] == "  " and row[30] != " " for row in rows)


def test_github_annotations_cannot_be_forged_by_a_file_name(pair, tmp_path: Path) -> None:
    _, good = pair
    _, shown = run(good, tmp_path / "x\n::error::gotcha,%.pxd", "--format", "github")
    lines = shown.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("::notice file=")
    assert lines[1].startswith("::error file=")
    assert "/x%0A%3A%3Aerror%3A%3Agotcha%2C%25.pxd,title=" in lines[1]
    assert not any(line.startswith("::error::") for line in lines)


def test_github_shows_a_name_as_it_is_and_what_is_hidden_as_an_escape(tmp_path: Path) -> None:
    """The escapes of GitHub's workflow commands are %25, %0D and %0A, and %3A and %2C in a property too."""
    _, shown = run(tmp_path / "50%: a,b\r\n\x1b\u2028.pxd", "--format", "github")
    (line,) = shown.splitlines()
    assert f"file={tmp_path}/50%25%3A a%2Cb%0D%0A\\u001b\\u2028.pxd,title=" in line
    text = line.rpartition("::")[2]
    assert text.startswith(f"{tmp_path}/50%25: a,b%0D%0A\\u001b\\u2028.pxd: ")


def test_verdicts_fit_a_terminal(pair) -> None:
    _, good = pair
    _, shown = run(damaged(good))
    assert shown.splitlines()[0].startswith("failed  ")
    assert "E301" in shown
    assert all(len(line) <= 80 or "/" in line for line in shown.splitlines())


def test_several_files_end_with_a_list_of_the_failures_and_quiet_prints_no_others(pair, tmp_path: Path) -> None:
    base, good = pair
    bad, other = damaged(good), tmp_path / "other.pxd"
    other.write_bytes(good.read_bytes())
    code, shown = run(bad, good, other, "--base", base)
    assert (code, shown.endswith(f"2 of 3 verified\nfailed  {bad}  payload\n")) == (1, True)
    code, shown = run(bad, good, other, "--base", base, "-q")
    assert (code, shown.startswith(f"failed  {bad}\n"), shown.endswith("2 of 3 verified\n")) == (1, True, True)
    assert str(good) not in shown
    assert str(other) not in shown
    assert run(good, "-q") == (0, "")


def test_a_check_that_was_not_made_is_named(pair) -> None:
    base, good = pair
    assert "base        not checked (--base)" in run(good)[1]
    assert "not checked" not in run(good, "--base", base)[1]
    good.with_name("good.pxd.sig").write_text("{}")
    assert "signature   not checked (--signature)" in run(good, "--base", base)[1]
    assert json.loads(run(good, "--json")[1])["files"][0]["unchecked"] == ["signature", "base"]
