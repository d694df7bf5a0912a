"""Ctrl-C at any line of a write leaves all of it or the state before, and the next call succeeds."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from peraxis_format.interrupts import uninterrupted
from peraxis_format.reader import DeltaFile
from peraxis_format.torch import VariantSwitch, apply_
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.swap import apply
from peraxis_format.torch.updates import UpdateWriter, follow, staged
from tests.loader.test_updates_writes import STEP, move, publish, same, weights

# A generator or an open file that an interrupt cuts off.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LINES = 5000  # more than a call has
STRIDE = int(os.environ.get("PERAXIS_TEST_STRIDE", "7"))  # with 1, all lines are tried, which takes a minute


@contextmanager
def interrupts(at: int, *, within: tuple[str, ...], second: int = 1) -> Iterator[list[int]]:
    """Send Ctrl-C at the `at`-th line that these files run, and at each later one until it raises.

    Then it is sent once more, at the `second`-th next call of a function. Yields a list of the number of lines that
    were run.
    """
    lines, sent, calls = [0], [False], [0]

    def send() -> None:
        sent[0] = True
        signal.raise_signal(signal.SIGINT)
        for _ in range(2):  # Python runs handlers at the latest at a jump back
            pass

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(within):
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] >= at:
                send()
        return trace

    def again(frame: FrameType, event: str, _: Any) -> None:
        if sent[0] and event == "call" and frame.f_code.co_filename.endswith(within):
            calls[0] += 1
            if calls[0] >= second:
                send()

    before = sys.gettrace()
    sys.setprofile(again)
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)
        sys.setprofile(None)


def at_every_line(
    run: Callable[[], object], within: tuple[str, ...], *, stride: int = STRIDE, second: int = 1
) -> Iterator[bool]:
    """Run with Ctrl-C from each stride-th line on. Yields after each run whether it was interrupted."""
    for at in range(1, LINES, stride):
        with interrupts(at, within=within, second=second) as lines:
            try:
                run()
                interrupted = False
            except KeyboardInterrupt:
                interrupted = True
        yield interrupted
        if lines[0] < at:
            return
    pytest.fail("the call has more lines than were tried")


def reset(live: dict[str, Tensor]) -> None:
    for name, tensor in weights().items():
        live[name].copy_(tensor)


def test_an_interrupt_at_any_line_of_an_update_leaves_a_whole_state(tmp_path: Path) -> None:
    live, model = publish(tmp_path)
    before, found = weights(), set()
    files = (
        "updates/follower.py",
        "updates/apply.py",
        "updates/write.py",
        "torch/place/proof.py",
        "peraxis_format/interrupts.py",
    )
    held = [follow(live, tmp_path)]
    for interrupted in at_every_line(lambda: held[0].poll(), files):
        found.add((interrupted, same(live, model)))
        assert same(live, model) or same(live, before)
        assert held[0].poll().step == 1
        assert same(live, model)
        reset(live)
        held[0] = follow(live, tmp_path)
    assert found == {(True, False), (True, True), (False, True)}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_at_any_line_of_a_staged_write_leaves_a_whole_state(tmp_path: Path) -> None:
    live, model = publish(tmp_path)
    before, found = weights(), set()

    def stage() -> staged.StagedUpdate:
        with DeltaFile(tmp_path / STEP) as file:
            return staged.stage(file, place(live, file.manifest))

    held = [stage()]
    for interrupted in at_every_line(
        lambda: held[0].write(), ("updates/staged.py", "place/ranks.py", "peraxis_format/interrupts.py")
    ):
        found.add((interrupted, same(live, model)))
        assert same(live, model) or same(live, before)
        if not same(live, model):
            held[0].write()
        assert same(live, model)
        reset(live)
        held[0] = stage()
    assert found == {(True, False), (True, True), (False, True)}


@pytest.mark.parametrize("second", [1, 3])
def test_two_interrupts_at_any_line_of_apply_leave_a_whole_state(second: int, tmp_path: Path) -> None:
    live, model = publish(tmp_path)
    before, found = weights(), set()
    files = ("swap/apply.py", "swap/stream.py", "torch/place/ranks.py", "peraxis_format/interrupts.py")
    run = partial(apply_, live, tmp_path / STEP, workers=1)
    for interrupted in at_every_line(run, files, stride=1, second=second):
        found.add((interrupted, same(live, model)))
        assert same(live, model) or same(live, before)
        reset(live)
    assert found == {(True, False), (True, True), (False, True)}


def test_an_interrupt_at_the_begin_of_a_revert_does_not_prevent_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, _ = publish(tmp_path)

    def broken(*_: Any, **__: Any) -> None:
        for tensor in live.values():
            tensor.zero_()  # written in part
        signal.raise_signal(signal.SIGINT)
        raise MemoryError

    def reverting(*given: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        restore(*given)

    restore = apply._restore
    monkeypatch.setattr(apply, "stream", broken)
    monkeypatch.setattr(apply, "_restore", reverting)
    with pytest.raises(KeyboardInterrupt) as found:
        apply_(live, tmp_path / STEP)
    assert isinstance(found.value.__context__, MemoryError)  # the interrupt came after it
    assert same(live, weights())


def test_an_interrupt_at_any_line_of_a_swap_leaves_the_variant_that_it_names(tmp_path: Path) -> None:
    live, model = publish(tmp_path)
    before, found = weights(), set()
    with VariantSwitch(live, base="device") as switch:
        switch.add("moved", tmp_path / STEP)
        for interrupted in at_every_line(
            lambda: switch.use("moved"), ("torch/swap/switch.py", "peraxis_format/interrupts.py")
        ):
            found.add((interrupted, switch.current))
            assert same(live, before if switch.current is None else model)
            switch.use("moved")
            assert same(live, model)
            switch.use(None)
            assert same(live, before)
    assert found == {(True, None), (True, "moved"), (False, "moved")}


def test_an_interrupt_at_any_line_of_a_step_leaves_a_chain_that_goes_on(tmp_path: Path) -> None:
    model = weights()
    writer = UpdateWriter(model, tmp_path, anchor_every=10)
    writer.step()
    ends = set()

    def step() -> None:
        move(model)
        writer.step()

    for interrupted in at_every_line(step, ("updates/publish.py", "format/writer.py", "format/files.py")):
        ends.add((interrupted, (tmp_path / f"step-{writer.step_number:08d}.pxd").exists()))
        move(model)
        writer.step()
        writer.prune()
    assert {interrupted for interrupted, _ in ends} == {True, False}
    server = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    assert follow(server, tmp_path).poll().step == writer.step_number
    assert same(server, model)


def test_deferred_signals_are_handled_after_the_block_and_in_other_threads_at_once() -> None:
    handled: list[int] = []

    def defer_all() -> None:
        with uninterrupted():
            for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGINT):
                signal.raise_signal(number)
            assert handled == []

    before = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            defer_all()
        assert handled == [signal.SIGUSR1]
        with uninterrupted(), uninterrupted():
            signal.raise_signal(signal.SIGUSR1)
            assert handled == [signal.SIGUSR1]
        assert handled == [signal.SIGUSR1] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)
    states: list[Any] = []

    def elsewhere() -> None:
        with uninterrupted():
            states.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert states == [signal.default_int_handler]
