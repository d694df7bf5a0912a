"""Chains of odd updates: empty ones, states that come back, tensors that come and go, and many files."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import peraxis
import peraxis_format as pxd
from peraxis_tools.cli import cli
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.verify_files import Status
from tests.factories import random_storage, write_checkpoint
from tests.tools.test_chain import Tensors, assert_holds, start, stepped


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """An empty folder beside the checkpoints zero, one and two."""
    states = [start()]
    for seed in (1, 2):
        states.append(stepped(states[-1], seed))
    for name, state in zip(("zero", "one", "two"), states, strict=True):
        write_checkpoint(tmp_path / name, state)
    (tmp_path / "chain").mkdir()
    return tmp_path / "chain"


def verified(chain: Path) -> bool:
    return peraxis.verify(chain, base=chain.parent / "zero", keep_going=True).status is Status.PASSED


@pytest.mark.parametrize("names", ["abc", "cba", "bca"])
def test_an_empty_update_that_names_no_other_one_is_verified_after_it(names: str, chain: Path) -> None:
    folder = chain.parent
    steps = [("zero", "one"), ("one", "one"), ("one", "two")]
    for name, (old, new) in zip(names, steps, strict=True):
        if new == "two":
            peraxis.update(folder / "zero", folder / new, chain / f"{name}.pxd", after=chain)
        else:
            peraxis.update(folder / old, folder / new, chain / f"{name}.pxd")
        assert verified(chain)
    assert [entry.name for entry in peraxis.log(chain).updates] == [f"{name}.pxd" for name in names]


def test_a_second_empty_update_without_a_name_before_it_is_noted(chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = chain.parent
    peraxis.update(folder / "zero", folder / "zero", chain / "a.pxd")
    assert not caplog.messages
    peraxis.update(folder / "zero", folder / "zero", chain / "b.pxd")
    assert ["b.pxd: repeats " in message for message in caplog.messages] == [True]
    (chain / "b.pxd").unlink()
    peraxis.update(folder / "zero", folder / "zero", chain / "b.pxd", after=chain)
    with pytest.raises(CheckFailedError, match=r"c\.pxd: its place would not be known .*--after"):
        peraxis.update(folder / "zero", folder / "one", chain / "c.pxd")
    peraxis.update(folder / "zero", folder / "one", chain / "c.pxd", after=chain)
    assert [entry.name for entry in peraxis.log(chain).updates] == ["a.pxd", "b.pxd", "c.pxd"]


def test_an_update_that_does_not_follow_the_others_is_noted(chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = chain.parent
    peraxis.update(folder / "zero", folder / "one", chain / "a.pxd")
    assert not caplog.messages
    write_checkpoint(folder / "other", start(7))
    write_checkpoint(folder / "another", start(8))
    peraxis.update(folder / "other", folder / "another", chain / "b.pxd")
    assert sum("does not follow the updates in its folder" in message for message in caplog.messages) == 1


def test_equal_whole_states_at_several_steps_are_one(tmp_path: Path) -> None:
    model = {"w": torch.zeros(4, 8, dtype=torch.bfloat16)}
    writer = peraxis.UpdateWriter(model, tmp_path / "chain", anchor_every=1)
    for value in (0, 0, 1, 0, 1, 1):
        model["w"].fill_(value)
        writer.step()
    found = peraxis.log(tmp_path / "chain")
    steps = [f"step-{i:08d}.pxd" for i in range(1, 6)]
    assert [entry.name for entry in found.updates] == ["anchor-00000000.pxd", *steps]
    assert [entry.name for entry in found.folded] == [f"anchor-{i:08d}.pxd" for i in range(1, 6)]
    base = write_checkpoint(tmp_path / "base", {"w": (np.zeros((4, 8), np.uint16), pxd.DType.BF16)})
    peraxis.apply(base, tmp_path / "chain", tmp_path / "out")
    assert_holds(tmp_path / "out", {"w": (np.full((4, 8), 0x3F80, np.uint16), pxd.DType.BF16)})
    assert peraxis.verify(tmp_path / "chain", base=base).status is Status.PASSED


@pytest.mark.parametrize("deleted", range(8))
def test_a_chain_of_which_the_deletion_of_old_files_was_broken_off_begins_at_its_anchor(
    deleted: int, tmp_path: Path
) -> None:
    model, chain = {"w": torch.zeros(4, 8, dtype=torch.bfloat16)}, tmp_path / "chain"
    writer = peraxis.UpdateWriter(model, chain, anchor_every=3)
    for value in range(8):
        model["w"].fill_(value)
        writer.step()
    order = [f"{kind}-{step:08d}.pxd" for step in range(7) for kind in ("step", "anchor")]
    for name in [name for name in order if (chain / name).exists()][:deleted]:
        (chain / name).unlink()
    anchor = 0 if deleted == 0 else 3 if deleted < 5 else 6
    found = [entry.name for entry in peraxis.log(chain).updates]
    assert found == [f"anchor-{anchor:08d}.pxd", *(f"step-{i:08d}.pxd" for i in range(anchor + 1, 8))]
    base = write_checkpoint(tmp_path / "base", {"w": (np.zeros((4, 8), np.uint16), pxd.DType.BF16)})
    peraxis.apply(base, chain, tmp_path / "out")
    assert_holds(tmp_path / "out", {"w": (np.full((4, 8), 0x40E0, np.uint16), pxd.DType.BF16)})
    verdicts = peraxis.verify(chain, base=base, keep_going=True).files
    failed = {Path(verdict.path).name for verdict in verdicts if verdict.status is not Status.PASSED}
    assert not failed & set(found)


def test_a_missing_update_within_a_chain_is_still_a_gap(tmp_path: Path) -> None:
    model, chain = {"w": torch.zeros(4, 8, dtype=torch.bfloat16)}, tmp_path / "chain"
    writer = peraxis.UpdateWriter(model, chain, anchor_every=3)
    for value in range(6):
        model["w"].fill_(value)
        writer.step()
    (chain / "step-00000002.pxd").unlink()
    with pytest.raises(CheckFailedError, match=r"step-00000003\.pxd: a gap"):
        peraxis.log(chain)


def test_a_tensor_that_goes_and_comes_back_is_folded(tmp_path: Path) -> None:
    states: list[Tensors] = [start(), start(), stepped(start(), 1)]
    del states[1]["position_ids"]
    for i, state in enumerate(states):
        write_checkpoint(tmp_path / f"{i}", state)
    files = [tmp_path / "1.pxd", tmp_path / "2.pxd"]
    for i, file in enumerate(files):
        peraxis.update(tmp_path / f"{i}", tmp_path / f"{i + 1}", file)
    peraxis.compact(tmp_path / "0", files, tmp_path / "fold.pxd")
    for source in (files, tmp_path / "fold.pxd"):
        peraxis.apply(tmp_path / "0", source, tmp_path / "out", overwrite=True)
        assert_holds(tmp_path / "out", states[2])


def test_scalars_with_the_name_of_a_table_are_no_vocabulary(tmp_path: Path) -> None:
    for i in range(2):
        weights: Tensors = {"lm_head.weight": (np.array(i, np.uint16), pxd.DType.BF16)}
        write_checkpoint(tmp_path / f"{i}", weights)
    peraxis.update(tmp_path / "0", tmp_path / "1", tmp_path / "u.pxd")
    peraxis.apply(tmp_path / "0", tmp_path / "u.pxd", tmp_path / "out")
    assert_holds(tmp_path / "out", weights)


def test_a_chain_of_more_files_than_a_process_may_open_says_what_to_do(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model = {"w": torch.zeros(4, 8, dtype=torch.bfloat16)}
    writer = peraxis.UpdateWriter(model, tmp_path / "chain")
    for value in range(60):
        model["w"].fill_(value)
        writer.step()
    base = write_checkpoint(tmp_path / "base", {"w": (np.zeros((4, 8), np.uint16), pxd.DType.BF16)})
    words = ["apply", str(base), str(tmp_path / "chain"), "-o", str(tmp_path / "out")]
    for limits, code in (((100, 100), 2), ((100, 1000), 0)):
        done = subprocess.run(
            [sys.executable, "-m", "peraxis_tools", *words],
            capture_output=True,
            text=True,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, limits),
        )
        assert done.returncode == code, done.stderr
        if code:
            assert done.stderr.count("\n") == 1
            assert "Too many open files; this chain needs" in done.stderr
            assert "raise the limit (ulimit -n)" in done.stderr


def test_an_update_that_is_larger_than_the_checkpoint_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = [random_storage(np.random.default_rng(seed), (64, 64)) for seed in (0, 1)]
    little = states[0].copy()
    little[0, 0] ^= 1
    for name, array in (("old", states[0]), ("other", states[1]), ("near", little)):
        write_checkpoint(tmp_path / name, {"a.weight": (array, pxd.DType.BF16)})
    large = peraxis.update(tmp_path / "old", tmp_path / "other", tmp_path / "large.pxd")
    assert large.bytes > large.full_bytes
    said = f"large.pxd: takes {large.bytes} bytes, more than the {large.full_bytes} of the new checkpoint"
    assert said in caplog.text
    caplog.clear()
    peraxis.update(tmp_path / "old", tmp_path / "near", tmp_path / "near" / "small.pxd")
    assert "more than" not in caplog.text


@pytest.mark.parametrize("shared", [True, False])
def test_of_checkpoints_of_two_models_update_names_the_old_and_the_new_one(shared: bool, tmp_path: Path) -> None:
    for side, width in (("old", 8), ("new", 6)):
        weights = random_storage(np.random.default_rng(1), (4, width)), pxd.DType.BF16
        write_checkpoint(tmp_path / side, {"up.weight" if shared else f"{side}.weight": weights})
    with pytest.raises(ToolError) as caught:
        peraxis.update(tmp_path / "old", tmp_path / "new", tmp_path / "a.pxd")
    said = str(caught.value)
    if shared:
        assert "up.weight is [4, 8] in the old checkpoint and [4, 6] in the new checkpoint; pass two check" in said
    else:
        assert "(the old checkpoint has old.weight; the new checkpoint has new.weight)" in said
    assert "base" not in said
    assert "fine-tune" not in said


@pytest.mark.parametrize(
    "names",
    [("1.pxd", "1.pxd"), ("1.pxd", "2.pxd", "./1.pxd"), (".", "."), (".", "2.pxd"), ("0.pxd", "0.pxd"), ("0.pxd", ".")],
)
def test_a_file_that_is_given_twice_is_a_mistake_of_usage_and_named(tmp_path: Path, names: tuple[str, ...]) -> None:
    """0.pxd is an anchor, of which equal ones are left out of a chain."""
    state, live = start(), tmp_path / "run"
    for step in range(3):
        write_checkpoint(tmp_path / f"{step}", state)
        state = stepped(state, step, wild=0)
    anchor = peraxis.UpdateWriter({"a": torch.ones(3)}, live).step()
    (tmp_path / "chain").mkdir()
    if "0.pxd" in names:
        Path(anchor.path).rename(tmp_path / "chain" / "0.pxd")
    else:
        for step in (1, 2):
            after = sorted((tmp_path / "chain").iterdir())
            peraxis.update(tmp_path / "0", tmp_path / f"{step}", tmp_path / "chain" / f"{step}.pxd", after=after)
    files = [str(tmp_path / "chain" / name) for name in names]
    for words in (["compact", "--base", str(tmp_path / "0"), *files], ["apply", str(tmp_path / "0"), *files]):
        found = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "out.pxd")])
        assert isinstance(found.exception, ToolError)
        assert found.exception.exit_status == 2
        assert ".pxd: is given twice; pass it once" in str(found.exception)


def test_a_link_beside_the_file_that_it_leads_to_is_not_a_file_given_twice(tmp_path: Path) -> None:
    live, run = {"a": torch.ones(300)}, tmp_path / "run"
    writer = peraxis.UpdateWriter(live, run)
    for step in range(3):
        writer.step()
        live["a"][step] += 1.0
    write_checkpoint(tmp_path / "base", {"a": (np.zeros(300, np.uint16), pxd.DType.BF16)})
    (run / "first.pxd").symlink_to("anchor-00000000.pxd")
    for name, given in (("folder", [run]), ("files", sorted(run.iterdir()))):
        peraxis.apply(tmp_path / "base", given, tmp_path / name)
    (run / "latest.pxd").symlink_to("step-00000002.pxd")
    with pytest.raises(CheckFailedError, match=r"is the same update as .*latest\.pxd; delete one of them"):
        peraxis.apply(tmp_path / "base", run, tmp_path / "out")
