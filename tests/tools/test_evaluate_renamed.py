"""`eval` of a model whose weights have other names in transformers, like the experts of Mixtral."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner

from peraxis_tools.cli import cli
from peraxis_tools.compress import compress
from peraxis_tools.errors import ToolError
from peraxis_tools.evaluate import CANDIDATES, evaluate
from tests.tools.compress_pairs import SMALL, write_pair, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, tuned/, text.jsonl, d.pxd."""
    folder = tmp_path_factory.mktemp("mixtral")
    config = transformers.MixtralConfig(**{**SMALL, "num_hidden_layers": 1}, num_key_value_heads=2, num_local_experts=2)
    base, tuned = write_pair(folder, config)
    write_text(folder / "text.jsonl", seed=1)
    compress(base, tuned, folder / "d.pxd", fit="none", force=True)
    return folder


def test_by_default_the_other_candidates_are_measured_and_a_request_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="peraxis")
    words = ["eval", *(str(folder / name) for name in ("base", "tuned", "d.pxd")), "--text", f"{folder}/text.jsonl"]
    words += ["--samples", "2", "--sequence-length", "16", "--device", "cpu"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.exception
    assert "\nmerged" in done.stdout
    assert "\non the fly" not in done.stdout
    assert "the candidate on-the-fly is left out" in caplog.text
    asked = CliRunner().invoke(cli, [*words, "--on-the-fly"])
    assert isinstance(asked.exception, ToolError)
    assert "--no-on-the-fly" in str(asked.exception)
    arguments = (folder / "base", folder / "tuned", folder / "d.pxd", {"text": folder / "text.jsonl"})
    with pytest.raises(ToolError, match="has another name in transformers"):
        evaluate(*arguments, candidates=CANDIDATES, samples=2, sequence_length=16, device="cpu")
