"""The command line refuses invalid numbers and options without effect in one line."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_tools.cli import main
from peraxis_tools.compress import compress
from peraxis_tools.display.progress import silent
from peraxis_tools.errors import ToolError
from peraxis_tools.verify_files import Status, Wanted, verify_files
from tests.factories import random_storage, write_checkpoint
from tests.tools.output_cases import make_inputs, snapshot


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    (folder / "t.txt").write_text("text")
    return folder


def refused(arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error message, and check that nothing is written and the exit code is 2."""
    before = snapshot(Path())
    monkeypatch.setattr(sys, "argv", ["peraxis-tools", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (2, ""), arguments
    assert "Traceback" not in said.err
    assert "internal" not in said.err
    assert snapshot(Path()) == before
    return said.err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e-320", "1e400"])
@pytest.mark.parametrize(
    "line",
    [
        "merge a.pxd b.pxd -o new.pxd --weights={},1",
        "merge a.pxd b.pxd -o new.pxd --method ties --density={}",
        "merge a.pxd b.pxd -o new.pxd --method dare --density={}",
        "convert a.pxd --to lora -o new --max-error={}",
        "apply base a.pxd -o new --shard-size={}",
        "compress base tuned -o new.pxd --fit none --target-ratio={}",
        "compress base tuned -o new.pxd --fit none --target-size={}",
        "compress base tuned -o new.pxd --calibration t.txt --distill-samples 1 --distill-lr={}",
        "verify a.pxd --base base --fine-tuned tuned --max-error={}",
        "verify a.pxd --base base --fine-tuned tuned --text a=t.txt --max-kl={}",
    ],
)
def test_a_number_that_is_none_or_absurd_is_refused(
    line: str, value: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if line.startswith("verify") and value == "1e-320":
        return  # a valid bound
    monkeypatch.chdir(inputs)
    said = refused(line.format(value), monkeypatch, capsys)
    assert re.search(r"weight|density|max-error|size|target-ratio|distill-lr|max-kl", said)


def test_a_bound_that_is_none_is_not_met(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.chdir(inputs)
    wanted = Wanted(base="base", fine_tuned="tuned", max_error=float("nan"))
    report = verify_files(["a.pxd"], wanted, open_file=lambda name: nullcontext(Path(name)), progress=silent)
    assert report.status is Status.FAILED


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("merge part-1.pxd part-2.pxd -o new.pxd --density 0.3", "--density"),
        ("merge part-1.pxd part-2.pxd -o new.pxd --base base", "--base"),
        ("merge part-1.pxd part-2.pxd -o new.pxd --no-normalize", "--normalize"),
        ("merge a.pxd b.pxd --weights 1,1 --density 0.5 -o new.pxd", "--density"),
        ("merge a.pxd b.pxd --method ties --seed 0 -o new.pxd", "--seed"),
        ("inspect a.pxd --overwrite", "--overwrite"),
        ("inspect a.pxd --json --tree", "--tree"),
        ("inspect a.pxd --json --no-modules", "--modules"),
        ("verify a.pxd --overwrite", "--overwrite"),
        ("verify a.pxd --text chat=t.txt", "--text"),
        ("verify a.pxd --fine-tuned tuned", "--fine-tuned"),
        ("diff a.pxd b.pxd --json --top 3", "--top"),
        ("convert a.pxd --to lora --name x -o new", "--name"),
        ("convert a.pxd --to checkpoint --base base --rank 3 -o new", "--rank"),
        ("convert a.pxd --to checkpoint --base base --axis row -o new", "--axis"),
        ("convert old.pt --base base --max-error 0.1 -o new.pxd", "--max-error"),
        ("publish me/x a.pxd --dry-run new --private", "--private"),
        ("publish me/x a.pxd --dry-run new --revision main", "--revision"),
        ("publish me/x a.pxd --overwrite", "--overwrite"),
        ("sign a.pxd --private-key key.pem --certificate-chain key.pem", "--certificate-chain"),
        ("eval base tuned a.pxd --text t.txt --task-limit 3", "--task-limit"),
        ("eval base tuned a.pxd --tasks piqa --samples 3", "--samples"),
        ("compress base tuned -o new.pxd --fit none --distill-samples 3", "distill-samples"),
        ("compress base tuned -o new.pxd --recipe quick --calibration t.txt", "calibration"),
        ("compress base tuned -o new.pxd --sequence-length 64", "sequence-length"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_by_its_name(
    line: str, option: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    said = refused(line, monkeypatch, capsys)
    assert re.search(rf"{option}(/--no-\w+)? does nothing", said) or "needs a text" in said
    assert said.count("\n") == 1


def test_a_target_that_is_too_small_says_the_smallest_possible_which_is_possible(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {f"model.layers.{i}.mlp.up_proj.weight": random_storage(rng, (64, 64)) for i in range(6)}
    write_checkpoint(tmp_path / "base", {name: (array, pxd.DType.BF16) for name, array in base.items()})
    write_checkpoint(tmp_path / "tuned", {name: (array ^ np.uint16(1), pxd.DType.BF16) for name, array in base.items()})

    def made(target: int) -> int:
        output = tmp_path / "new.pxd"
        return compress(tmp_path / "base", tmp_path / "tuned", output, target_size=target, overwrite=True).bytes

    with pytest.raises(
        ToolError, match=r"target too small: 10 bytes; the smallest possible file has (\d+) bytes"
    ) as caught:
        made(10)
    smallest = int(re.findall(r"\d+", str(caught.value))[1])
    assert made(smallest) <= smallest
    with pytest.raises(ToolError, match=f"the smallest possible file has {smallest} bytes"):
        made(smallest - 1)
    assert not list(tmp_path.glob(".peraxis*"))
