"""The scripts in examples/ run as they are written."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "compress_and_check": (["base", "fine-tuned", "made.pxd"], "times smaller"),
    "read_a_file": (["delta.pxd", "base"], "weights differ from the base"),
    "swap_variants": (["base", "legal.pxd", "medical.pxd"], "medical: next token"),
    "serve_a_batch": (["base", "legal.pxd", "medical.pxd"], "second: ["),
    "merge_two": (["legal.pxd", "medical.pxd", "merged.pxd", "base"], "masks a module"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs(
    name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = SCRIPTS[name]
    monkeypatch.chdir(workspace)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"](*arguments)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", [*SCRIPTS, "trl_publish"])
@pytest.mark.parametrize("arguments", [[], ["one"], ["1", "2", "3", "4", "5", "6"]])
def test_an_example_with_other_arguments_says_how_it_is_called(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert f"python examples/{name}.py" in str(caught.value)


def test_every_example_is_tested_and_short() -> None:
    found = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    loop = found.pop("rl_loop")  # tests/loader/test_rl_loop.py runs it
    trl = found.pop("trl_publish")  # test_trl_example.py runs it
    assert set(found) == set(SCRIPTS)
    assert all(len(path.read_text("utf-8").splitlines()) <= 45 for path in found.values())
    assert len(loop.read_text("utf-8").splitlines()) <= 140
    assert len(trl.read_text("utf-8").splitlines()) <= 60
