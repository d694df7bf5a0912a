"""What `compress` and `inspect` say about the fit: nothing was fitted, or all was distilled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from peraxis_tools.cli import cli
from tests.tools.compress_pairs import llama_pair

FEW = ["--calibration-samples", "8", "--sequence-length", "16", "--generated-samples", "0", "--force"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, text.jsonl."""
    folder = tmp_path_factory.mktemp("pair")
    llama_pair(folder)
    return folder


def compressed(folder: Path, tuned: str, output: Path, *more: str) -> str:
    words = ["compress", folder / "base", folder / tuned, "-o", output, "--calibration", folder / "text.jsonl"]
    done = CliRunner().invoke(cli, [*map(str, words), *FEW, *more])
    assert done.exit_code == 0, done.exception
    return done.stdout


@pytest.mark.parametrize(("tuned", "fitted"), [("base", False), ("tuned", True)])
def test_a_fit_is_claimed_only_where_a_module_has_signs(folder: Path, tmp_path: Path, tuned: str, fitted: bool) -> None:
    said = compressed(folder, tuned, tmp_path / "d.pxd")
    assert ("0 with signs" in said) is not fitted
    assert ("fit      none: no module has signs" in said) is not fitted
    assert ("fit      refined, on 8 samples, 128 tokens" in said) is fitted


def test_a_distilled_file_says_its_samples_steps_and_losses(folder: Path, tmp_path: Path) -> None:
    said = compressed(folder, "tuned", tmp_path / "d.pxd", "--distill-samples", "6", "--distill-epochs", "2")
    assert "fit      refined, then distilled; 14 samples, 224 tokens" in said
    line = re.search(r"distilled  (12 samples, 12 steps, held-out kl: \S+ -> \S+)\n", said)
    assert line is not None, said
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "d.pxd")]).stdout
    assert f"distilled    {line[1]}\n" in shown
