"""A run of compress that is killed or interrupted and resumed gives the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peraxis_tools.compress import compress
from tests.processes import fork
from tests.tools.compress_pairs import FEW, llama_pair

LONG = {"distill_samples": 2, "distill_epochs": 3, **FEW, "generated_samples": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return llama_pair(tmp_path_factory.mktemp("pair"))


def compress_and_tell(base: Path, tuned: Path, output: Path, part: str | None, options: dict[str, Any]) -> None:
    """Compress, and kill this process as soon as a part of this name is in the work folder."""
    work = output.with_name(output.name + ".peraxis-work")

    def look(*_: object) -> None:
        if part is not None and (work / part).exists():
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    compress(base, tuned, output, progress=look, **options)


class Killable:
    """A compression in its own process, which can be killed."""

    def __init__(self, base: Path, tuned: Path, output: Path, options: dict[str, Any]) -> None:
        self.output, self.work = output, output.with_name(output.name + ".peraxis-work")
        self._inputs, self._options = (base, tuned, output), options

    def run(self, *, moment: float | None = None, part: str | None = None) -> float:
        """Run it, and return its seconds. It is killed `moment` seconds after its start, or after it wrote `part`."""
        begin = time.perf_counter()
        process = fork(compress_and_tell, *self._inputs, part, self._options)
        process.join(moment)
        if moment is not None:
            process.kill()
            process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return time.perf_counter() - begin


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_at_five_random_moments_ends_in_the_same_bytes(
    pair: tuple[Path, Path, Path], tmp_path: Path, seed: int
) -> None:
    base, tuned, text = pair
    run = Killable(base, tuned, tmp_path / "cut.pxd", {"calibration": str(text), **LONG})
    run.run()  # the first process waits for imports
    run.output.unlink()
    undisturbed = run.run()
    whole = run.output.read_bytes()
    draw = random.Random(seed)
    kills = 0
    while kills < 5:
        run.output.unlink(missing_ok=True)
        run.run(moment=draw.uniform(0.0, undisturbed / 2))
        # A resumed run may finish before its moment. Then the next run starts from the beginning.
        if run.output.exists():
            assert run.output.read_bytes() == whole
        else:
            kills += 1
    run.output.unlink(missing_ok=True)
    run.run()
    assert run.output.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pxd"]


@pytest.mark.slow
def test_a_run_killed_after_each_of_its_parts_goes_on_to_the_same_bytes(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, tuned, text = pair
    options = {"calibration": str(text), **LONG}
    compress(base, tuned, tmp_path / "whole.pxd", **options)
    run = Killable(base, tuned, tmp_path / "cut.pxd", options)
    parts = ("generated.npy", "embedding.json", "block-00000.json", "block-00001.json", "head.json", "distilling.npz")
    for part in parts:
        run.run(part=part)
        assert (run.work / part).exists()
        assert not run.output.exists()
    compress(base, tuned, run.output, **options)
    assert run.output.read_bytes() == (tmp_path / "whole.pxd").read_bytes()
    assert not run.work.exists()


def test_a_work_folder_of_other_options_is_not_continued(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, text = pair
    compress(base, tuned, tmp_path / "plain.pxd", calibration=str(text), **FEW)
    work = tmp_path / "delta.pxd.peraxis-work"
    work.mkdir()
    (work / "inputs.json").write_text('{"digest": "of another run"}')
    (work / "embedding.json").write_text("[]")
    compress(base, tuned, tmp_path / "delta.pxd", calibration=str(text), **FEW)
    assert (tmp_path / "delta.pxd").read_bytes() == (tmp_path / "plain.pxd").read_bytes()


def test_a_run_is_not_continued_for_another_fine_tune_of_the_same_size_and_time(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, tuned, text = pair
    other = shutil.copytree(tuned, tmp_path / "other")
    tensors = {name: 1.5 * tensor for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    before = (tuned / "model.safetensors").stat()
    os.utime(other / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (other / "model.safetensors").stat().st_size == before.st_size
    options = {"calibration": str(text), **FEW}
    compress(base, other, tmp_path / "whole.pxd", **options)
    run = Killable(base, tuned, tmp_path / "delta.pxd", options)
    run.run(part="block-00001.json")
    assert run.work.exists()
    compress(base, other, run.output, **options)
    assert run.output.read_bytes() == (tmp_path / "whole.pxd").read_bytes()


@pytest.mark.parametrize("change", ["configuration", "copy"])
def test_a_run_begins_anew_with_another_configuration_and_goes_on_with_a_copy(
    pair: tuple[Path, Path, Path], tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = (shutil.copytree(folder, tmp_path / folder.name) for folder in pair[:2])
    options = {"calibration": str(pair[2]), **FEW}
    run = Killable(base, tuned, tmp_path / "delta.pxd", options)
    run.run(part="block-00001.json")
    for folder in (base, tuned) if change == "configuration" else ():
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    if change == "copy":
        shutil.copy2(tuned / "model.safetensors", tmp_path / "copy")
        os.replace(tmp_path / "copy", tuned / "model.safetensors")
    compress(base, tuned, run.output, **options)
    compress(base, tuned, tmp_path / "whole.pxd", **options)
    assert run.output.read_bytes() == (tmp_path / "whole.pxd").read_bytes()
    told = [record.message for record in caplog.records]
    assert any("this run begins anew" in text for text in told) is (change == "configuration")


def test_where_teacher_states_are_kept_changes_no_byte(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, text = pair
    files = [tmp_path / f"{limit}.pxd" for limit in (0, 4000, 1 << 20)]
    for file in files:
        compress(base, tuned, file, calibration=str(text), logits_limit=int(file.stem), **LONG)
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("kept", [1, 2])
def test_distillation_goes_on_from_its_last_epoch_to_the_same_bytes(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    base, tuned, text = pair
    options = {"calibration": str(text), "distill_sign_lr": 0.05, "distill_full_lr": 3e-3, **LONG}
    stages: dict[str, int] = {}
    compress(base, tuned, tmp_path / "whole.pxd", progress=lambda step, done, _: stages.update({step: done}), **options)
    assert list(stages) == ["check", "open", "generate", "fit", "the fine-tuned model's states", "distill", "write"]
    assert all(stages.values())
    steps: list[int] = []

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "distill":
            steps.append(done)
            if done == kept * total // 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(base, tuned, tmp_path / "cut.pxd", progress=interrupt, **options)
    assert len(steps) > 1
    steps.clear()
    compress(base, tuned, tmp_path / "cut.pxd", progress=lambda step, done, _: steps.append(done), **options)
    assert (tmp_path / "cut.pxd").read_bytes() == (tmp_path / "whole.pxd").read_bytes()
