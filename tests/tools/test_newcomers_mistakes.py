"""Likely mistakes of a first day: each is one line that says what is wrong and what to type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import peraxis
from peraxis_tools.cli import VERBS, cli
from peraxis_tools.compress import compress
from peraxis_tools.split import split
from tests.tools.compress_pairs import llama_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, d.pxd and its parts."""
    folder = tmp_path_factory.mktemp("pair")
    base, tuned, _ = llama_pair(folder)
    compress(base, tuned, folder / "d.pxd", fit="none", force=True)
    split(folder / "d.pxd", folder / "parts", parts=2)
    return folder


def said(*arguments: object) -> str:
    """The message of the error."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code != 0, done.output
    return str(done.exception) if not isinstance(done.exception, SystemExit) else done.output


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_shows_the_help_of_each_verb(verb: str | None) -> None:
    asked = CliRunner().invoke(cli, ["help", *([] if verb is None else [verb])], prog_name="peraxis-tools")
    shown = CliRunner().invoke(cli, [*([] if verb is None else [verb]), "--help"], prog_name="peraxis-tools")
    assert (asked.exit_code, asked.output) == (0, shown.output)


def test_help_of_an_unknown_verb_suggests_one() -> None:
    assert "did you mean verify?" in said("help", "verfy")


def test_a_repository_and_a_delta_in_the_wrong_order_are_told_apart(folder: Path) -> None:
    assert "pass them in the other order" in said("publish", folder / "d.pxd", "me/my-delta")


def test_a_bound_names_everything_that_it_needs(folder: Path) -> None:
    assert all(option in said("verify", folder / "d.pxd", "--max-kl", "1") for option in ("text", "fine_tuned", "base"))
    assert "text" not in said("verify", folder / "d.pxd", "--max-error", "1")


def test_a_missing_key_is_named_before_a_missing_bundle(folder: Path) -> None:
    assert "nokey: no such key" in said("verify", folder / "d.pxd", "--public-key", "nokey")


@pytest.mark.parametrize("verb", ["inspect", "verify", "extract"])
def test_a_folder_in_the_place_of_a_delta_is_an_error_of_input(folder: Path, verb: str) -> None:
    output = ["-o", str(folder / "out")] if verb == "extract" else []
    done = CliRunner().invoke(cli, [verb, str(folder / "base"), *output])
    status = done.exit_code if isinstance(done.exception, SystemExit) else done.exception.exit_status  # type: ignore[union-attr]
    assert status == 2


@pytest.mark.parametrize("line", ["apply {base} {delta}", "extract {delta}", "split {delta} --parts 2"])
def test_the_folder_above_an_output_must_exist(folder: Path, line: str) -> None:
    words = line.format(base=folder / "base", delta=folder / "d.pxd").split()
    assert f"{folder / 'no' / 'such'}: no such folder; make it first" in said(
        *words, "-o", folder / "no" / "such" / "x"
    )
    assert not (folder / "no").exists()


def test_the_folder_above_a_chain_must_exist(tmp_path: Path) -> None:
    with pytest.raises(peraxis.ArgumentError, match="no such folder; make it first"):
        peraxis.UpdateWriter(torch.nn.Linear(2, 2), tmp_path / "no" / "chain")
    assert not (tmp_path / "no").exists()


def test_the_base_digest_of_a_part_is_said_to_be_of_its_tensors(folder: Path) -> None:
    def shown(path: Path) -> str:
        return CliRunner().invoke(cli, ["inspect", str(path)]).output

    assert "of the part's tensors" in shown(min((folder / "parts").glob("*.pxd")))
    assert "of the part's tensors" not in shown(folder / "d.pxd")


def test_the_help_of_eval_explains_each_word_of_its_report() -> None:
    command = cli.get_command(click.Context(cli), "eval")
    assert command is not None
    words = str(command.help)
    assert all(word in words for word in ("KL", "±", "99%", "top-1", "recovered", "merged", "on the fly", "worst"))


@pytest.mark.parametrize("options", [[], ["--base", "base"]])
def test_a_source_of_another_kind_is_not_asked_for_its_base(folder: Path, options: list[str]) -> None:
    text = folder / "notes.jsonl"
    text.write_text("{}")
    output = folder / "converted.pxd"
    assert "notes.jsonl: is neither a .pt delta nor" in said("convert", text, "-o", output, *options)
    checkpoint = said("convert", folder / "tuned", "-o", output, *options)
    assert "tuned: is a checkpoint and not a delta" in checkpoint


def test_the_end_of_the_process_keeps_its_code_and_runs_exit_handlers_without_a_search_for_cycles() -> None:
    lines = [
        "import atexit, gc, sys",
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 1000))",
        "sys.argv = ['peraxis-tools', 'inspect', 'no-such.pxd']",
        "from peraxis_tools.cli import main; main()",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "frozen True\n")
