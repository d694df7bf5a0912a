"""Small things that a report or a note says: sizes that are not known, identical pairs, names that no verb finds."""

from __future__ import annotations

import ast
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis
import peraxis_format as pxd
from peraxis_tools.cli import cli
from peraxis_tools.display.shown import times_smaller
from peraxis_tools.publish import publish
from tests.factories import random_storage, write_checkpoint
from tests.tools.output_cases import make_inputs


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="peraxis")  # --quiet in an earlier test may have changed it
    return caplog


def test_a_lossless_plan_gives_a_bound_and_no_ratio(inputs: Path) -> None:
    said = CliRunner().invoke(cli, "compress base tuned -o new.pxd --exact".split()).stderr
    assert "plan: at most" in said
    assert "times smaller" not in said
    said = CliRunner().invoke(cli, "compress base tuned -o signs.pxd --force".split()).stderr
    assert "at most" not in said
    assert "times smaller" in said


def test_a_pair_without_any_change_is_noted(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    base = write_checkpoint(tmp_path / "base", {"a.weight": (random_storage(rng, (64, 64)), pxd.DType.BF16)})
    peraxis.compress(base, base, tmp_path / "new.pxd")
    assert "holds no change" in notes.text
    other = write_checkpoint(tmp_path / "other", {"a.weight": (random_storage(rng, (64, 64)), pxd.DType.BF16)})
    notes.clear()
    peraxis.compress(base, other, tmp_path / "other.pxd", force=True)
    assert "holds no change" not in notes.text


@pytest.mark.parametrize(
    "line",
    [
        "compress base tuned --force -o {}",
        "merge a.pxd b.pxd --weights 0.5,0.5 -o {}",
        "merge part-1.pxd part-2.pxd -o {}",
        "update base tuned -o {}",
    ],
)
def test_a_delta_that_no_folder_search_finds_is_noted(line: str, inputs: Path, notes: pytest.LogCaptureFixture) -> None:
    for name, noted in (("d", True), ("d.safetensors", True), ("d.pxd", False)):
        notes.clear()
        done = CliRunner().invoke(cli, line.format(name).split())
        assert done.exception is None, done.exception
        assert (f"call it {name}.pxd to have it found" in notes.text) == noted


@pytest.mark.parametrize("line", ["inspect a.pxd --html -", "compress base tuned -o -", "split a.pxd --parts 2 -o -"])
def test_a_dash_is_no_name_of_an_output(line: str, inputs: Path) -> None:
    assert "name /dev/stdout" in str(CliRunner().invoke(cli, line.split()).exception)


def test_pull_makes_its_folder_and_leaves_none_behind_after_a_failure(inputs: Path) -> None:
    url = (inputs / "a.pxd").as_uri()
    with pytest.raises(peraxis.ToolError):
        peraxis.pull(url, inputs / "new", expect_content_id="sha256:" + "0" * 64)
    with pytest.raises(peraxis.ToolError, match="new: no such folder; make it first"):
        peraxis.pull(url, inputs / "new" / "deep")
    assert not (inputs / "new").exists()
    (pulled,) = peraxis.pull(url, inputs / "new").files
    assert pulled.path == inputs / "new" / "a.pxd"
    assert pulled.path.is_file()


def test_a_license_is_an_identifier_of_the_hub(inputs: Path) -> None:
    for name in ("my license", "Apache-2.0", ""):
        with pytest.raises(peraxis.ToolError, match="not an identifier of the hub"):
            publish("a/b", "a.pxd", license=name, dry_run="repo")
    publish("a/b", "a.pxd", license="apache-2.0", dry_run="repo")
    assert b"license: apache-2.0" in (inputs / "repo" / "README.md").read_bytes()


def test_the_card_shows_the_stable_interface_with_names_that_there_are(inputs: Path) -> None:
    publish("a/b", "a.pxd", dry_run="repo")
    card = (inputs / "repo" / "README.md").read_text("utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    tree = ast.parse(code)
    assert [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names] == [
        "peraxis"
    ]
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert used
    assert used <= set(peraxis.__all__)


def test_one_missing_field_is_it_and_several_are_them(inputs: Path) -> None:
    done = CliRunner().invoke(cli, "publish a/b a.pxd --dry-run repo".split())
    assert "(--card-from gives them)" in done.stdout
    assert "missing  base_model (--base-id gives it)" in done.stdout
    (inputs / "card").mkdir()
    (inputs / "card" / "README.md").write_text("---\nlanguage: en\npipeline_tag: text-generation\n---\n")
    done = CliRunner().invoke(cli, "publish a/b a.pxd --dry-run other --card-from card".split())
    assert "missing  license (--card-from gives it)" in done.stdout


def test_diff_lists_no_modules_if_none_are_asked_for(inputs: Path) -> None:
    shown = CliRunner().invoke(cli, "diff a.pxd b.pxd".split()).stdout
    assert "differ most" in shown
    assert "differ most" not in CliRunner().invoke(cli, "diff a.pxd b.pxd --top 0".split()).stdout


def test_diff_of_far_manifests_says_how_many_fields_it_leaves_out(inputs: Path) -> None:
    shutil.copy("a.pxd", "c.pxd")
    with pxd.open("a.pxd") as file:
        manifest = file.manifest
        with pxd.DeltaWriter(
            "c.pxd",
            base=pxd.Identity(id=manifest.base.id),
            fine_tuned=manifest.fine_tuned,
            metadata={f"key{i:02d}": "x" for i in range(30)},
        ) as writer:
            for name in file:
                writer.add(file.load(name))
            writer.finish()
    shown = CliRunner().invoke(cli, "diff a.pxd c.pxd".split()).stdout
    assert "more fields of the manifest (--json)" in shown
    assert shown.count("key") <= 12


def test_a_closed_file_says_that_it_is_closed(inputs: Path) -> None:
    with pxd.open("a.pxd") as delta:
        name = next(iter(delta))
        delta.load(name)
    for read in (delta.load, delta.__getitem__, delta.check):
        with pytest.raises(ValueError, match=r"a\.pxd: is closed; open it again"):
            read(name)


def test_lines_of_a_report_have_no_blanks_at_their_ends(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    CliRunner().invoke(cli, "compress base tuned -o signs.pxd --force".split())
    for line in ("inspect signs.pxd --modules", "diff signs.pxd a.pxd", "diff signs.pxd tuned --base base"):
        said = CliRunner().invoke(cli, line.split()).stdout
        assert said.endswith("\n")
        assert not [each for each in said.splitlines() if each != each.rstrip()]


def test_equal_deltas_need_no_word_on_their_distances(inputs: Path) -> None:
    said = CliRunner().invoke(cli, "diff a.pxd a.pxd".split()).stdout
    assert said.startswith("equal")
    assert "distances" not in said


def test_a_plan_counts_one_module_and_says_what_was_asked_for(inputs: Path) -> None:
    said = CliRunner().invoke(cli, "compress base tuned -o new.pxd --exact".split()).stderr
    assert "exact if changed (asked for)" in said
    assert "1 modules" not in said


def test_one_is_not_written_with_a_plural(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("base", "tuned"):
        write_checkpoint(tmp_path / name, {"a.weight": (random_storage(rng, (64, 64)), pxd.DType.BF16)})
    (tmp_path / "tuned" / "tokenizer_config.json").write_text("{}")
    said = {
        line: CliRunner().invoke(cli, line.split())
        for line in (
            "compress base tuned -o d.pxd --force --fit none",
            "inspect d.pxd",
            "verify d.pxd --base base",
            "apply base d.pxd -o out",
            "extract d.pxd -o small",
            "split d.pxd --parts 2 -o parts",
            "update base tuned -o u.pxd",
            "diff d.pxd u.pxd --base base",
        )
    }
    texts = {line: f"{done.output}{done.exception or ''}" for line, done in said.items()}
    assert "1 tensor, " in texts["apply base d.pxd -o out"]
    assert "has 1 module, too few for 2 parts; it cannot be split" in texts["split d.pxd --parts 2 -o parts"]
    with pxd.open("d.pxd") as file:
        texts["repr"] = repr(file)
    plural = re.compile(r"(?<!of )\b1 (?:modules|tensors|files|parts|masks|updates|samples|tokens|weights)\b")
    assert {line: found for line, text in texts.items() if (found := plural.findall(text))} == {}


@pytest.mark.parametrize(
    ("full", "stored", "said"),
    [
        (666, 100, "6.7 times smaller"),
        (2, 204_000, "102000.0 times larger"),
        (9, 9, "as large"),
        (35_900, 37_200, "4% larger"),
        (1020, 1000, "2% smaller"),
        (105, 100, "1.1 times smaller"),
        (0, 0, "as large"),
    ],
)
def test_a_file_that_is_larger_than_the_checkpoint_is_not_called_smaller(full: int, stored: int, said: str) -> None:
    assert times_smaller(full, stored) == said


def test_the_reports_of_a_checkpoint_of_few_bytes_beside_a_large_tokenizer_have_a_ratio(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        write_checkpoint(tmp_path / name, {"a": (np.full(1, len(name), np.uint16), pxd.DType.BF16)})
    (tmp_path / "tuned/tokenizer.json").write_text(f'{{"a": "{"x" * 200_000}"}}')
    command = ["compress", str(tmp_path / "base"), str(tmp_path / "tuned"), "--fit", "none"]
    for more in (["--dry-run"], ["--force", "-o", str(tmp_path / "d.pxd")]):
        done = CliRunner().invoke(cli, [*command, *more])
        assert done.exit_code == 0, done.exception
        assert re.search(r", 10\d{4}\.\d times larger", done.stdout)


def test_the_report_of_an_anchor_of_a_small_model_says_that_it_is_larger(tmp_path: Path) -> None:
    with pxd.DeltaWriter(tmp_path / "a.pxd", base=pxd.Identity(id="b"), fine_tuned=pxd.Identity(id="m")) as writer:
        writer.add(pxd.lossless_module("a.weight", np.ones((4, 4), np.float32), pxd.DType.F32, shape=(4, 4)))
        writer.finish()
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "a.pxd")]).output
    assert re.search(r"for a checkpoint of 64 B: \d+\.\d times larger", shown)


def test_an_anchor_and_a_chain_that_begins_with_one_name_no_base(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    writer = peraxis.UpdateWriter({"a": torch.ones(64)}, tmp_path / "run")
    anchor, page = writer.step().path, tmp_path / "report.html"
    shown = CliRunner().invoke(cli, ["inspect", str(anchor), "--html", str(page)]).output
    assert "base         none: this is an anchor, a whole state that needs no base" in shown
    assert "an anchor, a whole state that needs no base" in page.read_text()
    listed = CliRunner().invoke(cli, ["log", str(tmp_path / "run")]).output
    assert "made on  no base: the chain begins with an anchor" in listed
    with pxd.open(anchor) as file:
        assert file.manifest.base.digest[:19] not in shown + listed
    second = writer.step().path
    assert "base         model  sha256:" in CliRunner().invoke(cli, ["inspect", str(second)]).output
