"""A mistyped file, revision or length is refused at once, and no name of a file is looked up on a network."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner

from peraxis_format import CheckpointError
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.checkpoints.positions import DEFAULT_LENGTH, checked_length, positions_of
from peraxis_tools.cli import cli
from peraxis_tools.compress import CompressOptions
from peraxis_tools.errors import OptionError, ToolError
from peraxis_tools.pull import pull
from peraxis_tools.remote.names import names_a_file
from peraxis_tools.texts.documents import check_text
from tests.tools.output_cases import make_inputs


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("looked up on a network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "is_file"),
    [
        ("nope.jsonl", True),
        ("data/held-out.txt", True),
        ("a/b/c", True),
        ("./a", True),
        ("/a", True),
        ("base/model.safetensors", True),
        ("org/name", False),
        ("org/model-2.5", False),
        ("org/name@refs/pr/1", False),
        ("wikitext", False),
    ],
)
def test_a_suffix_or_more_than_org_and_name_is_a_file(name: str, is_file: bool) -> None:
    assert names_a_file(name) == is_file


@pytest.mark.parametrize("name", ["nope.jsonl", "no/such/text", "nope.txt.gz", "python", "python:3"])
def test_a_text_that_is_no_file_is_refused_at_once(name: str) -> None:
    with pytest.raises(OptionError, match=f"text {name}: no such file"):
        check_text(name)


@pytest.mark.parametrize(
    "line",
    [
        "compress base tuned -o new.pxd --calibration nope.jsonl",
        "compress base tuned -o new.pxd --calibration nope.jsonl:0.5 --dry-run",
        "eval base tuned a.pxd --text nope.jsonl",
        "eval base tuned a.pxd --text nope",
        "compress base tuned -o new.pxd --calibration nope",
        "verify a.pxd --base base --fine-tuned tuned --max-kl 1 --text a=nope.jsonl",
    ],
)
def test_every_verb_with_a_text_checks_its_name_before_any_work(line: str, inputs: Path) -> None:
    found = CliRunner().invoke(cli, line.split())
    assert isinstance(found.exception, OptionError)
    assert re.match(r"text nope(\.jsonl)?: no such file, and not a datasets id \(org/name", str(found.exception))


@pytest.mark.parametrize(
    "line",
    [
        "compress base tuned -o new.pxd --calibration a.jsonl --calibration a.jsonl:2",
        "compress base tuned -o new.pxd --calibration a.jsonl --calibration ./a.jsonl --dry-run",
    ],
)
def test_a_text_that_is_given_twice_is_refused_before_any_work(line: str, inputs: Path) -> None:
    Path("a.jsonl").write_text("{}")
    found = CliRunner().invoke(cli, line.split())
    assert isinstance(found.exception, OptionError)
    assert "name it once" in str(found.exception)


def test_a_mistyped_checkpoint_or_delta_is_no_name_on_the_hub() -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint("base/model.safetensors")
    with pytest.raises(ToolError, match="neither a repository"):
        pull("org/delta.pxd")


def test_a_checkpoint_on_this_machine_has_no_revision(inputs: Path) -> None:
    with pytest.raises(ToolError, match=r"base: is on this machine and has no revision 'main'.*--base-id"):
        open_checkpoint("base", revision="main")


def test_two_revisions_of_one_name_are_refused() -> None:
    with pytest.raises(ToolError, match="names a revision already"):
        open_checkpoint("org/name@v1", revision="v2")


@pytest.mark.parametrize(
    "values",
    [{"device": "cpu"}, {"resume": False}, {"hidden_limit": 1}, {"logits_limit": 1}, {"fit": "none", "seed": 1}],
)
def test_an_option_of_a_fit_on_text_is_refused_without_one(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"does nothing with"):
        CompressOptions(**values)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 1024}, 1024),
        ({"n_positions": 64}, 64),
        ({"text_config": {"max_position_embeddings": 32}, "max_position_embeddings": 8}, 32),
        ({"max_position_embeddings": 64, "rope_scaling": {"factor": 4.0}}, 256),
        (
            {
                "max_position_embeddings": 256,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64},
            },
            256,
        ),
        ({"model_type": "mamba"}, None),
    ],
)
def test_a_sample_is_no_longer_than_the_model(config: dict[str, Any], limit: int | None) -> None:
    assert positions_of(json.loads(json.dumps(config))) == limit
    assert checked_length(config, limit or 1 << 20, "tuned") == (limit or 1 << 20)
    assert checked_length(config, DEFAULT_LENGTH, "tuned") == min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None:
        with pytest.raises(OptionError, match=f"sequence_length {limit + 1}: tuned has {limit} positions"):
            checked_length(config, limit + 1, "tuned")


@pytest.mark.parametrize(
    "line",
    [
        "compress base tuned -o new.pxd --calibration t.txt --sequence-length 9",
        "eval base tuned a.pxd --text t.txt --sequence-length 9",
    ],
)
def test_compress_and_eval_refuse_samples_beyond_the_positions_of_the_model(line: str, inputs: Path) -> None:
    (inputs / "t.txt").write_text("text")
    for folder in ("base", "tuned"):
        (inputs / folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 8}')
    found = CliRunner().invoke(cli, line.split())
    assert "tuned has 8 positions; pass at most 8" in str(found.exception)
