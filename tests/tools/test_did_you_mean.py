"""A mistyped name of a known set is answered with the name that it is close to, wherever a user types one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import peraxis
import peraxis_format as pxd
from peraxis_format.arguments import did_you_mean
from peraxis_format.ops.backend import available
from peraxis_tools.compress import CompressOptions
from peraxis_tools.errors import OptionError
from peraxis_tools.evaluate import evaluate
from peraxis_tools.merge import Mixture
from peraxis_tools.texts.documents import read_documents
from tests.tools.output_cases import make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    (folder / "run.yaml").write_text("calibraton: c4\n")
    return folder


def test_the_closest_name_is_shown_in_its_own_spelling_and_a_far_one_is_not() -> None:
    assert did_you_mean("Seqence_Length", ["sequence-length", "samples"]) == "; did you mean sequence-length?"
    assert did_you_mean("xyz", ["samples"]) == did_you_mean("", ["samples"]) == did_you_mean(None, []) == ""
    assert did_you_mean("a" * 10**7, ["samples"]) == ""


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("insepct a.pxd", "inspect"),
        ("inspect a.pxd --overwite", "--overwrite"),
        ("inspect a.pxd --module model.embed_token.weight", "model.embed_tokens.weight"),
        ("compress base tuned -o x.pxd --fit refind", "refined"),
        ("compress base tuned -o x.pxd --recipe distiled", "distilled"),
        ("compress base tuned -o x.pxd --config run.yaml", "calibration"),
        ("merge a.pxd b.pxd -o x.pxd --method tie", "ties"),
        ("convert a.pxd -o x --to lor", "lora"),
        ("verify a.pxd --format jason", "json"),
        ("verify a.pxd --report saref=x", "sarif"),
        ("completion bsh", "bash"),
    ],
)
def test_the_command_line_says_which_name_was_meant(line: str, meant: str, inputs: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "peraxis_tools", *line.split()], cwd=inputs, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert f"id you mean {meant}?" in run.stderr.replace("'", ""), run.stderr


def test_a_key_of_a_configuration_is_named_with_its_file(inputs: Path) -> None:
    with pytest.raises(OptionError, match=r"run.yaml: unknown option 'calibraton'; did you mean calibration\?$"):
        CompressOptions.from_yaml(inputs / "run.yaml")


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: CompressOptions.from_mapping({"Embedings": "sign"}), "embeddings"),
        (lambda: CompressOptions.from_mapping({"recipe": "beest"}), "best"),
        (lambda: CompressOptions(axis="rows"), "row"),
        (lambda: Mixture(method="tie"), "ties"),  # type: ignore[arg-type]
        (lambda: evaluate("a", "b", "c", {"a": "b"}, candidates=("merge",)), "merged"),
        (lambda: available("trition"), "triton"),
    ],
)
def test_python_says_which_name_was_meant(call: Any, meant: str) -> None:
    with pytest.raises((peraxis.ToolError, pxd.BackendError), match=rf"; did you mean {meant}\?$"):
        call()


def test_a_column_of_a_text_is_meant(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "sun"}\n')
    with pytest.raises(OptionError, match="did you mean content"):
        read_documents(str(tmp_path / "a.jsonl"), text_column="contents", limit=1)


def test_a_variant_of_a_live_model_is_meant() -> None:
    with peraxis.VariantSwitch({}) as switch, pytest.raises(peraxis.LiveModelError) as caught:
        switch.use("code")
    assert "did you mean" not in str(caught.value)  # none is registered
