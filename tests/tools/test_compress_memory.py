"""The memory of a run beside that of the machine: what is read, noted and refused."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest
import torch

from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.compress import CompressOptions, compress
from peraxis_tools.compress.plan.pair_plan import plan_pair
from peraxis_tools.compress.plan.stage_work import StageWork
from peraxis_tools.compress.run.dry_run import estimate_run
from peraxis_tools.compress.run.memory import MachineMemory, check_memory, held_bytes, machine_memory
from peraxis_tools.errors import ToolError
from tests.tools.compress_pairs import llama_config, llama_pair, write_pair, write_text

GB = 10**9
OPTIONS = CompressOptions(calibration="c4", distill_samples=4, distill_sign_lr=0.05)
WORKS = [StageWork(name="blocks", memory=2 * GB), StageWork(name="distill", memory=6 * GB)]


def check(available: float, total: float, options: CompressOptions = OPTIONS) -> None:
    machine = MachineMemory(available=int(available * GB), total=int(total * GB))
    check_memory(WORKS, options, held=GB, machine=machine)


@pytest.mark.parametrize(("available", "total"), [(6.0, 16.0), (6.0, 7.0)])
def test_nothing_is_said_where_a_run_fits(available: float, total: float, caplog: pytest.LogCaptureFixture) -> None:
    check(available, total)
    assert not caplog.records


@pytest.mark.parametrize(("available", "total"), [(5.9, 16.0), (1.0, 7.0), (5.0, 6.0)])
def test_a_run_that_needs_more_than_is_free_begins_with_a_note(
    available: float, total: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "peraxis"):
        check(available, total)
    (record,) = caplog.records
    said = record.getMessage()
    for part in ("the stage distill", "7 GB", f"{1 + available:.3g} GB are free", "--distill-sign-lr 0"):
        assert part in said


def test_a_run_that_cannot_fit_is_refused_with_what_lowers_it() -> None:
    with pytest.raises(ToolError, match=r"distill needs about 7 GB, and this machine has 5.8 GB; --distill-sign-lr 0"):
        check(5.0, 5.8)
    scales = CompressOptions(calibration="c4", distill_samples=4)
    with pytest.raises(ToolError, match=r"this machine has 5.8 GB; --distill-samples 0"):
        check(5.0, 5.8, scales)


def test_a_run_is_refused_before_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, text = llama_pair(tmp_path)
    run = importlib.import_module("peraxis_tools.compress.run.calibrated")
    monkeypatch.setattr(run, "machine_memory", lambda: MachineMemory(available=0, total=1 << 20))
    stages: set[str] = set()
    with pytest.raises(ToolError, match=r"memory: the stage .* needs about .*, and this machine has 1.05 MB; "):
        compress(
            base, tuned, tmp_path / "d.pxd", calibration=str(text), calibration_samples=4, sequence_length=16,
            force=True, progress=lambda stage, *_: stages.add(stage),
        )  # fmt: skip
    assert stages <= {"check", "open"}
    assert not (tmp_path / "d.pxd").exists()


def test_a_run_counts_the_samples_that_its_text_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = write_pair(tmp_path, llama_config())
    text = write_text(tmp_path / "two.jsonl", documents=1, words=9)
    options = [
        CompressOptions(calibration=str(text), calibration_samples=n, sequence_length=16, generated_samples=0)
        for n in (2, 1 << 24)
    ]
    few, many = (estimate_run(base, tuned, options=each) for each in options)
    assert [stage.memory for stage in few.stages] == [stage.memory for stage in many.stages]
    caplog.clear()
    done = compress(base, tuned, tmp_path / "d.pxd", options=options[1], force=True)
    assert done.calibration_samples == 2
    said = [record.getMessage() for record in caplog.records if "asked for" in record.getMessage()]
    assert said == [f"text {text}: holds 2 of the 16777216 samples asked for"]


def test_the_samples_that_a_text_holds_are_shared_as_those_that_were_asked_for(tmp_path: Path) -> None:
    base, tuned, text = llama_pair(tmp_path)
    options = CompressOptions(
        calibration=str(text), calibration_samples=3000, distill_samples=1000, sequence_length=128, generated_samples=0
    )
    inputs = importlib.import_module("peraxis_tools.compress.run.inputs")
    with open_checkpoint(base) as first, open_checkpoint(tuned) as second:
        planned = plan_pair(first, second, options)
        given = inputs.text_inputs(second, options)
    held = inputs.text_of(planned, options, given.device, torch.float32, given.samples)
    asked = inputs.text_of(planned, options, given.device, torch.float32, None)
    assert (asked.samples, asked.distilled, asked.length) == (3000, 1000, 128)
    count = len(given.samples.ids)
    assert (held.samples, held.distilled, held.length) == (round(0.75 * count), count - round(0.75 * count), 128)


def test_nothing_is_said_where_the_system_says_nothing(tmp_path: Path) -> None:
    assert machine_memory(proc=tmp_path, groups=tmp_path) is None
    assert held_bytes(proc=tmp_path) == 0
    check_memory(WORKS, OPTIONS, held=GB, machine=None)


def system(folder: Path, **groups: str) -> MachineMemory | None:
    """The memory of a system with these files of its groups: __ is a dot, v1_ the folder of the first version."""
    (folder / "meminfo").write_text("MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 6000 kB\nSwapTotal: 1000 kB\n")
    (folder / "memory").mkdir(exist_ok=True)
    for name, content in groups.items():
        (folder / name.replace("v1_", "memory/").replace("__", ".")).write_text(content)
    return machine_memory(proc=folder, groups=folder)


def test_a_machine_has_its_memory_and_its_swap(tmp_path: Path) -> None:
    assert system(tmp_path, memory__max="max\n") == MachineMemory(available=6000 << 10, total=9000 << 10)


LIMITED = ("5000000\n", "3000000\n", "anon 5\ninactive_file 400000\n")
NAMES = {
    "second": ("memory__max", "memory__current", "memory__stat"),
    "first": ("v1_memory.limit_in_bytes", "v1_memory.usage_in_bytes", "v1_memory.stat"),
}


@pytest.mark.parametrize(
    ("kind", "swap", "total"),
    [
        ("second", {}, 5_000_000 + 1_024_000),
        ("second", {"memory__swap__max": "max\n"}, 5_000_000 + 1_024_000),
        ("second", {"memory__swap__max": "24000\n"}, 5_024_000),
        ("second", {"memory__swap__max": "0\n"}, 5_000_000),
        ("first", {"v1_memory.memsw.limit_in_bytes": "5024000\n"}, 5_024_000),
        ("first", {"v1_memory.memsw.limit_in_bytes": "9223372036854771712\n"}, 5_000_000 + 1_024_000),
        ("first", {"v1_memory.memsw.limit_in_bytes": "-1\n"}, 5_000_000 + 1_024_000),
    ],
)
def test_a_container_has_no_more_than_its_limit_and_its_share_of_swap(
    kind: str, swap: dict[str, str], total: int, tmp_path: Path
) -> None:
    files = dict(zip(NAMES[kind], LIMITED, strict=True)) | swap
    assert system(tmp_path, **files) == MachineMemory(available=2_400_000, total=total)


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("0::/slice/job/task\n", "slice/job"),
        ("0::/../slice/job\n", "slice/job"),
        ("5:cpu:/\n4:memory,hugetlb:/slice/job\n", "memory/slice/job"),
    ],
)
def test_the_limit_of_a_group_above_that_of_the_process_counts(line: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(line)
    (tmp_path / folder).mkdir(parents=True)
    names = NAMES["first" if folder.startswith("memory") else "second"]
    for name, content in zip(names, LIMITED, strict=True):
        (tmp_path / folder / name.removeprefix("v1_").replace("__", ".")).write_text(content)
    assert system(tmp_path) == MachineMemory(available=2_400_000, total=5_000_000 + 1_024_000)


@pytest.mark.parametrize("text", ["", "\n\n", "max", "²", "9" * 5000, "-1", "x 1\n\n y", "\x00", "5 kB 7"])
def test_odd_files_of_a_system_say_nothing(text: str, tmp_path: Path) -> None:
    names = (name for kind in NAMES.values() for name in kind)
    files = dict.fromkeys([*names, "memory__swap__max", "v1_memory.memsw.limit_in_bytes"], text)
    assert system(tmp_path, **files) == MachineMemory(available=6000 << 10, total=9000 << 10)
    (tmp_path / "self").mkdir(exist_ok=True)
    for name in ("self/cgroup", "self/status", "meminfo"):
        (tmp_path / name).write_text(text)
    assert held_bytes(proc=tmp_path) == 0
    assert machine_memory(proc=tmp_path, groups=tmp_path) is None


def test_a_first_kind_of_container_without_a_limit_has_that_of_the_machine(tmp_path: Path) -> None:
    files = {"v1_memory.limit_in_bytes": "9223372036854771712\n", "v1_memory.usage_in_bytes": "100\n"}
    assert system(tmp_path, **files) == MachineMemory(available=6000 << 10, total=9000 << 10)


def test_this_process_holds_memory_of_this_machine() -> None:
    machine = machine_memory()
    if machine is None:
        pytest.skip("this system does not say")
    assert 1 << 20 < held_bytes() < machine.total
    assert machine.available <= machine.total
