"""What verbs say is true: plans agree with results, -q has no notes, help names every option, errors say where."""

from __future__ import annotations

import dataclasses
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis
import peraxis_format as pxd
from peraxis_tools import demo as demo_module
from peraxis_tools.cli import cli
from peraxis_tools.commands import compress as compress_command
from peraxis_tools.compress import CompressOptions
from peraxis_tools.compress.options import RECIPES, OptionError
from peraxis_tools.process.command_line import told_on_interrupt
from peraxis_tools.report.evaluate import shown_kl
from peraxis_tools.yaml_file import read_mapping
from tests.factories import random_storage, write_checkpoint
from tests.tools.output_cases import make_inputs

NOTE = "its signs were worse on the other text"


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("more", [[], ["--masks", "1"], ["--exact"]])
def test_a_plan_promises_no_more_than_the_result_of_an_unchanged_pair(more: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "layers.0.a.weight": (random_storage(rng, (64, 64)), pxd.DType.BF16),
        "layers.0.b.weight": (random_storage(rng, (64,)), pxd.DType.BF16),
    }
    base = write_checkpoint(tmp_path / "base", tensors)
    done = CliRunner().invoke(
        cli, ["compress", str(base), str(base), "-o", str(tmp_path / "d.pxd"), "--fit", "none", "--force", *more]
    )
    assert "0 with signs, 2 as in the base, 0 exact" in done.stdout
    plan = next(line for line in done.stderr.splitlines() if line.startswith("plan: ")).removeprefix("plan: ")
    for clause in plan.split(", "):
        assert "if changed" in clause or "as in the base" in clause, plan


@pytest.mark.parametrize(("more", "shown"), [([], True), (["-q"], False)])
def test_quiet_leaves_out_the_notes_of_a_result(
    more: list[str], shown: bool, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(*arguments: Any, **options: Any) -> Any:
        return dataclasses.replace(peraxis_compress(*arguments, **options), notes={"a.weight": NOTE})

    peraxis_compress = compress_command.compress
    monkeypatch.setattr(compress_command, "compress", noted)
    done = CliRunner().invoke(cli, ["compress", "base", "tuned", "-o", "n.pxd", "--force", *more])
    assert done.exit_code == 0, done.exception
    assert (NOTE in done.stdout) is shown
    assert "compressed" in done.stdout


def test_every_option_of_a_configuration_is_one_of_the_command_line() -> None:
    names = [parameter.name for parameter in compress_command.command.params]
    between = set(names[names.index("exact") : names.index("resume") + 1])
    assert between == {field.name for field in dataclasses.fields(CompressOptions)} | {"recipe"}
    shown = " ".join(CliRunner().invoke(cli, ["compress", "--help"]).stdout.split())
    assert "options from --exact to --resume" in shown
    assert RECIPES


def test_the_help_of_a_dry_run_says_that_it_measures() -> None:
    assert "measures this machine" in " ".join(CliRunner().invoke(cli, ["compress", "--help"]).stdout.split())


def test_an_unknown_key_has_a_suggestion_or_the_list_and_not_both() -> None:
    with pytest.raises(OptionError, match=r"^unknown option 'calibraton'; did you mean calibration\?$"):
        CompressOptions.from_mapping({"calibraton": "c4"})
    with pytest.raises(OptionError, match=r"^unknown option 'zzzz'; known are axis, .*, text-column$"):
        CompressOptions.from_mapping({"zzzz": 1})


def test_an_interrupted_demo_says_one_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        with told_on_interrupt(lambda: "d.pxd was not written"):
            error = KeyboardInterrupt()
            error.add_note("d.pxd.peraxis-work keeps 4 blocks; the same command continues")
            raise error

    monkeypatch.setattr(demo_module, "train_pair", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        next(demo_module.demo(tmp_path / "demo"))
    assert caught.value.__notes__ == ["the next demo begins with the training again"]


@pytest.mark.parametrize(
    ("line", "written"),
    [("compress base tuned --force -o new.pxd", "new.pxd"), ("split a.pxd --parts 2 -o parts", "parts")],
)
def test_without_a_standard_output_a_verb_says_what_it_wrote_and_is_done_if_quiet(
    line: str, written: str, inputs: Path
) -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-m", "peraxis_tools", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"is closed, so nothing can be printed; {written} was written" in done.stderr
    done = subprocess.run([*command, "--overwrite", "-q"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (inputs / written).exists()


def test_a_verb_that_only_prints_needs_a_standard_output(inputs: Path) -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-m", "peraxis_tools", "inspect", "a.pxd", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "written" not in done.stderr


def test_kl_is_never_shown_below_zero() -> None:
    assert [shown_kl(kl) for kl in (-2.07e-08, -0.0, 0.0, 0.00431)] == ["0", "0", "0", "0.00431"]
    assert (shown_kl(-1e-9, ".4f"), shown_kl(float("nan"))) == ("0.0000", "nan")
    assert "above 100%" in CliRunner().invoke(cli, ["eval", "--help"]).stdout


@pytest.mark.parametrize(("weights", "noted"), [((0.0, 0.0), True), ((0.5, 0.0), False)])
def test_a_merge_without_any_change_is_noted(
    weights: tuple[float, float], noted: bool, inputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="peraxis")
    peraxis.merge(["a.pxd", "b.pxd"], "m.pxd", weights=weights)
    assert ("m.pxd: holds no change" in caplog.text) is noted


def test_what_is_no_yaml_is_named_with_its_line(inputs: Path) -> None:
    (inputs / "run.yaml").write_text("masks: 1\ncalibration: [a, b: c\nseed: 2\n")
    with pytest.raises(OptionError, match=r"run\.yaml: not a YAML file: line [23]: \S+"):
        read_mapping(inputs / "run.yaml")
    (inputs / "card").mkdir()
    (inputs / "card" / "README.md").write_text("---\nlanguage: [en\nlicense: mit\n---\n# Title\n")
    done = CliRunner().invoke(cli, "publish a/b a.pxd --dry-run repo --card-from card".split())
    assert re.search(r"front matter cannot be read \(line [34]: ", str(done.exception)), done.exception
