"""A malformed file beside a checkpoint or delta gives one line that names the file, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest

import peraxis_format as pxd
from peraxis_format import reader
from peraxis_tools.cli import main
from tests.tools.compress_pairs import llama_pair
from tests.tools.output_cases import make_inputs

HOSTILE = {
    "cut": b"{",
    "array": b"[]",
    "object": b"{}",
    "null": b"null",
    "string": b'"x"',
    "no UTF-8": b"\xff\xfe",
    "deep": b"[" * 20_000,
    "long number": b"1" * 5000,
    "path upwards": b'{"weight_map": {"a": "../../x"}}',
    "no name": b'{"weight_map": {"a": 5}}',
    "null in a name": b'{"weight_map": {"a": "\\u0000"}}',
    "surrogate in a name": b'{"weight_map": {"a": "\\ud800"}}',
    "folder as a name": b'{"weight_map": {"a": "."}}',
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(inputs, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Return exit code and standard error, and check that it is at most one line and no internal error."""
    monkeypatch.setattr(sys, "argv", ["peraxis-tools", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    found = capsys.readouterr().err
    assert found.count("\n") <= 1, (arguments, found)
    assert "Traceback" not in found
    assert "internal error" not in found, (arguments, found)
    return int(caught.value.code or 0), found


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("file", ["model.safetensors.index.json", "model.safetensors"])
def test_a_malformed_checkpoint_file_is_named(
    kind: str, file: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if file.endswith(".json"):
        (folder / "tuned" / "model.safetensors").unlink()
    (folder / "tuned" / file).write_bytes(HOSTILE[kind])
    code, line = said(monkeypatch, capsys, "compress", "base", "tuned", "--fit", "none", "-q", "-o", "new.pxd")
    assert code == 2
    assert file.removesuffix(".index.json") in line
    assert said(monkeypatch, capsys, "apply", "tuned", "a.pxd", "-q", "-o", "new")[0] in (1, 2)
    assert not [name for name in os.listdir(folder) if name.startswith((".peraxis", "new"))]


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_malformed_side_file_of_a_verb_is_named(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("odd.json", "odd.pt", "odd.pem", "odd.sig", "odd.yaml"):
        (folder / name).write_bytes(HOSTILE[kind])
    for arguments, file in (
        (("publish", "me/x", "a.pxd", "--evaluation", "odd.json", "--dry-run", "new"), "odd.json"),
        (("convert", "odd.pt", "--base", "base", "-o", "new.pxd"), "odd.pt"),
        (("sign", "a.pxd", "--private-key", "odd.pem", "--bundle", "new.sig"), "a.pxd"),
        (("sign", "a.pxd", "--private-key", "key.pem", "--certificate", "odd.pem", "--bundle", "new.sig"), "a.pxd"),
        (("compress", "base", "tuned", "--config", "odd.yaml", "-o", "new.pxd"), ""),
    ):
        if arguments[0] == "compress" and kind in ("object", "null"):
            continue  # a configuration without options
        code, line = said(monkeypatch, capsys, *arguments)
        assert code == 2, arguments
        assert file in line
    for more in (
        ("--bundle", "odd.sig", "--public-key", "key.pub"),
        ("--bundle", "odd.sig", "--public-key", "odd.pem"),
    ):
        assert said(monkeypatch, capsys, "verify", "a.pxd", *more)[0] in (1, 2)
    assert not [name for name in os.listdir(folder) if name.startswith((".peraxis", "new"))]


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"domains": 5},
        {"domains": [1]},
        {"domains": [{"domain": "d", "candidates": {"merged": {}}}]},
        {"domains": [{"domain": "d", "candidates": {"merged": {"kl": "a", "top1": None}}, "perplexity": {}}]},
    ],
)
def test_an_evaluation_without_its_figures_is_refused(
    odd: dict[str, object], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pxd.open("a.pxd") as delta:
        report = {"schema": "peraxis.eval/1", "content_id": delta.content_id, **odd}
    (folder / "eval.json").write_text(json.dumps(report))
    arguments = ("publish", "me/x", "a.pxd", "--evaluation", "eval.json", "--dry-run", "new")
    code, line = said(monkeypatch, capsys, *arguments)
    assert (code, "eval.json" in line) == (2, True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return llama_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("config.json", b'{"model_type": ["llama"]}'),
        ("config.json", b"[" * 20_000),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Nope"}}'),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"tokenizer_class": 5}'),
    ],
)
def test_a_malformed_configuration_or_tokenizer_ends_a_calibration_in_one_line(
    file: str,
    data: bytes,
    llama: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, tuned, text = llama
    shutil.copytree(tuned, tmp_path / "tuned")
    (tmp_path / "tuned" / file).write_bytes(data)
    few = ("--calibration-samples", "4", "--sequence-length", "16")
    arguments = (str(base), str(tmp_path / "tuned"), "-o", str(tmp_path / "new.pxd"), "--calibration", str(text), *few)
    code, line = said(monkeypatch, capsys, "compress", *arguments, "--quiet")
    assert (code, line.count("\n")) == (2, 1)
    assert sorted(os.listdir(tmp_path)) == ["tuned"]


# --- the system ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_between_its_header_and_its_map_is_e124(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = reader.read_header

    def cut(*arguments: object) -> object:
        found = read(*arguments)  # type: ignore[arg-type]
        os.truncate("a.pxd", 4200)
        return found

    monkeypatch.setattr(reader, "read_header", cut)
    with pytest.raises(pxd.ContainerError, match=r"a\.pxd.*shorter since it was opened") as caught:
        pxd.open("a.pxd")
    assert (caught.value.code, caught.value.offset) == ("E124", 4200)


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ("convert a.pxd --to lora --rank 16 -q -o new", "new"),
        ("apply base a.pxd -q -o new", "new"),
        ("compress base tuned --fit none -q -o new.pxd", "new.pxd"),
        ("split a.pxd --parts 2 -q -o new", "new"),
    ],
)
def test_a_full_disk_is_one_line_with_the_outputs_path_and_the_bytes(
    arguments: str, output: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said(monkeypatch, capsys, "inspect", "a.pxd")  # late imports may write caches
    said(monkeypatch, capsys, *arguments.replace("-o new", "-o warm").split())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        code, line = said(monkeypatch, capsys, *arguments.split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert code == 2
    assert "File too large" in line
    assert re.search(r"(after|writing) \d+ bytes", line)
    assert output in line
    assert ".peraxis" not in line
    assert not [name for name in os.listdir(folder) if name.startswith((".peraxis", "new"))]
