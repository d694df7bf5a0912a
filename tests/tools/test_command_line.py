"""The command line for CI: one line per error, the documented exit code, no partial output."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_tools.cli import main
from tests.factories import random_storage, write_checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Base and fine-tuned checkpoint, large enough that writing takes a moment."""
    rng = np.random.default_rng(11)
    base = {f"layers.{i}.weight": (random_storage(rng, (256, 512)), pxd.DType.BF16) for i in range(24)}
    tuned = {
        name: (pxd.from_float32(pxd.to_float32(array, dtype) + np.float32(0.01), dtype), dtype)
        for name, (array, dtype) in base.items()
    }
    return write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "tuned", tuned)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["peraxis-tools", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def damaged_files(folder: Path, delta: Path) -> dict[str, tuple[Path, int]]:
    """Every common kind of bad file and its exit code."""
    whole = delta.read_bytes()
    with pxd.open(delta) as file:
        data = file.header_size
    made: dict[str, tuple[bytes, int]] = {
        "E103": (b"", 1),
        "E104": (b"version https://git-lfs.github.com/spec/v1\n", 1),
        "E105": (b"<!DOCTYPE html><html>", 1),
        "E107": (pickle.dumps({"a": 1}), 1),
        "E108": (bytes(8192), 1),
        "E109": (b"\x1b[31mred" * 1000, 1),
        "E110": (b"\xf8\xff\xff\xff\xff\xff\xff\xff" + whole[8:], 1),
        "E112": (whole[:8] + whole[8:].replace(b'"pxd"', b'"dxp"', 1), 1),
        "E122": (whole[:8] + whole[8:].replace(b'":{"dtype"', b'": {"dtype"', 1)[:-1], 1),
        "E124": (whole[:-1], 1),
        "E125": (whole + b"\0", 1),
        "E201": (whole.replace(b'"pxd":"1.0"', b'"pxd":"9.0"', 1), 3),
        "E301": (whole[:data] + bytes([whole[data] ^ 1]) + whole[data + 1 :], 1),
    }
    files = {}
    for code, (content, status) in made.items():
        path = folder / f"{code}.pxd"
        path.write_bytes(content)
        files[code] = (path, status)
    with zipfile.ZipFile(folder / "E106.pxd", "w") as archive:
        archive.writestr("data.pkl", b"")
    return files | {"E106": (folder / "E106.pxd", 1)}


def test_bad_files_give_one_line_their_code_and_no_output(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = pair
    delta = tmp_path / "delta.pxd"
    assert run(monkeypatch, "compress", base, tuned, "-o", delta, "--fit", "none", "--quiet") == 0
    capsys.readouterr()
    for code, (path, status) in damaged_files(tmp_path, delta).items():
        for verb in (["verify", path], ["apply", base, path, "-o", tmp_path / "out"]):
            assert run(monkeypatch, *verb, "--quiet") == status, (code, verb[0])
            captured = capsys.readouterr()
            shown = captured.err + captured.out
            assert code in shown, (code, shown)
            assert "Traceback" not in shown
            assert "\x1b" not in shown
            assert not (tmp_path / "out").exists()


def test_a_wrong_base_is_exit_code_1_and_leaves_no_output(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = pair
    delta = tmp_path / "delta.pxd"
    assert run(monkeypatch, "compress", base, tuned, "-o", delta, "--fit", "none") == 0
    assert run(monkeypatch, "apply", tuned, delta, "-o", tmp_path / "out") == 1
    assert "E404" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(monkeypatch, "apply", base, delta, "-o", tmp_path / "out") == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "missing.pxd"],
        ["apply", "nowhere", "missing.pxd", "-o", "out"],
        ["compress", "a", "b", "-o", "c.pxd"],
    ],
)
def test_missing_inputs_are_exit_code_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["compress", "apply"])
def test_a_killed_run_leaves_nothing_under_the_final_name(verb: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    delta, out = tmp_path / "delta.pxd", tmp_path / "out"
    tool = [sys.executable, "-c", "from peraxis_tools.cli import main; main()"]
    compress = [*tool, "compress", str(base), str(tuned), "-o", str(delta), "--fit", "none", "--quiet"]
    command, target = (compress, delta)
    if verb == "apply":
        subprocess.run(compress, check=True, capture_output=True)
        command, target = ([*tool, "apply", str(base), str(delta), "-o", str(out), "--quiet"], out)
    begin = time.monotonic()
    subprocess.run([*command, "--overwrite"], check=True, capture_output=True)
    whole = time.monotonic() - begin
    rng = random.Random(5)
    killed = 0
    for _ in range(20):
        if target.is_dir():
            subprocess.run(["rm", "-r", str(target)], check=True)
        else:
            target.unlink(missing_ok=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * rng.uniform(0.5, 0.98))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            killed += 1
        else:
            whole *= 0.8  # the machine had more to do when the time was taken
        if target.exists():
            if verb == "compress":
                with pxd.open(target) as file:
                    file.verify()
            else:
                assert (target / "config.json").exists()
                assert len(pxd.Safetensors.open(target)) == 24
        if killed == 5:
            break
    assert killed > 0
    assert os.path.exists(base)
