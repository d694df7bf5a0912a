"""One writer at a time changes a live model, and a write that fails on the way is finished."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peraxis_format.errors import LiveModelError, TornError
from peraxis_format.reader import DeltaFile
from peraxis_format.torch import SwapError, VariantSwitch, apply_
from peraxis_format.torch.place.claims import writing
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.swap import apply, switch
from peraxis_format.torch.updates import Follower, Poll, UpdateWriter, apply_update, follow, staged

STEP = "step-00000001.pxd"


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(300, 100, generator=generator).bfloat16() for name in ("a", "b", "c")}


def move(model: dict[str, Tensor]) -> None:
    for tensor in model.values():
        tensor.view(torch.int16)[::3] += 1


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(tensor.equal(other[name]) for name, tensor in one.items())


def publish(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A server's weights before one step, and the trainer's after it."""
    model, live = weights(), weights()
    # Moves alone, which would also decode on weights that have them already.
    writer = UpdateWriter(model, folder, prefer="speed")
    writer.step()
    move(model)
    writer.step()
    return live, model


@contextmanager
def copies(monkeypatch: pytest.MonkeyPatch, failing: dict[int, type[BaseException]]) -> Iterator[list[int]]:
    """Let the n-th write of weights write the first half of them and fail."""
    original, calls = Tensor.copy_, [0]

    def copy(self: Tensor, source: Tensor, *args: Any, **options: Any) -> Tensor:
        calls[0] += 1
        if calls[0] in failing:
            half = self.numel() // 2
            original(self.reshape(-1)[:half], source.reshape(-1)[:half])
            raise failing[calls[0]]("no luck")
        return original(self, source, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", copy)
        yield calls


class Batch(AbstractContextManager[None]):
    """The lock of a batch that runs until `ended` is set. waiting: somebody waits for it."""

    def __init__(self) -> None:
        self.waiting, self.ended = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        self.waiting.set()
        assert self.ended.wait(60)

    def __exit__(self, *_: object) -> None: ...


def test_two_followers_of_one_model_apply_an_update_once(tmp_path: Path) -> None:
    live, model = publish(tmp_path)
    lock, found = Batch(), []

    def poll() -> None:
        found.append(follow(live, tmp_path, lock=lock).poll())

    first = threading.Thread(target=poll)
    first.start()
    assert lock.waiting.wait(60)  # it has checked the update, and waits for the batch
    poll()  # is refused at once, and does not wait
    lock.ended.set()
    first.join()
    polls: list[Poll] = found
    assert same(live, model)
    assert sorted(len(poll.applied) for poll in polls) == [0, 1]
    reasons = [reason for poll in polls for reason in poll.waiting.values()]
    assert reasons == ["another thread is writing these weights; wait for its end, and apply again"]


def test_no_other_write_begins_before_the_end_of_one(tmp_path: Path) -> None:
    live, model = publish(tmp_path)
    with writing(live.values()):
        for write in (apply_, apply_update):
            with pytest.raises(LiveModelError, match="another thread is writing these weights"):
                write(live, tmp_path / STEP)
    apply_update(live, tmp_path / STEP)
    assert same(live, model)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_error_while_weights_are_written_does_not_leave_half_of_them(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, model = publish(tmp_path)
    with copies(monkeypatch, {at: MemoryError}):
        apply_update(live, tmp_path / STEP)
    assert same(live, model)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupt_is_raised_after_the_last_weight_is_written(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, model = publish(tmp_path)
    follower = follow(live, tmp_path)
    with copies(monkeypatch, {at: KeyboardInterrupt}), pytest.raises(KeyboardInterrupt):
        follower.poll()
    assert same(live, model)
    assert follower.poll().step == 1


def test_a_write_that_cannot_be_finished_says_so_and_the_follower_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, model = publish(tmp_path)
    follower = follow(live, tmp_path)
    with copies(monkeypatch, {2: MemoryError, 3: MemoryError}), pytest.raises(TornError, match="load the model again"):
        follower.poll()
    assert not same(live, model)
    assert [path.name for path in follower.poll().applied] == ["anchor-00000000.pxd", STEP]
    assert same(live, model)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_write_of_a_staged_update_restores_the_old_weights(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, model = publish(tmp_path)
    with DeltaFile(tmp_path / STEP) as file:
        update = staged.stage(file, place(live, file.manifest))
    exchange, calls = staged._Change.exchange, [0]

    def interrupted(self: staged._Change) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        exchange(self)

    with monkeypatch.context() as patch:
        patch.setattr(staged._Change, "exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            update.write()
    assert same(live, weights())
    update.write()
    assert same(live, model)


def broken_stream(*_: Any, **__: Any) -> None:
    raise MemoryError("no room")


@pytest.mark.parametrize("undo", ["device", "host"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_delta_that_cannot_be_reverted_says_so_and_restores_the_other_weights(
    undo: Any, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, _ = publish(tmp_path)
    monkeypatch.setattr(apply, "stream", broken_stream)
    originals = apply._copies

    def copied(*arguments: Any) -> Any:
        found = originals(*arguments)
        for tensor in live.values():
            tensor.zero_()  # written in part
        return found

    monkeypatch.setattr(apply, "_copies", copied)
    with copies(monkeypatch, {5 if undo == "host" else 2: error}), pytest.raises(TornError, match=r"no room.*no luck"):
        apply_(live, tmp_path / STEP, undo=undo)
    assert [tensor.equal(weights()[name]) for name, tensor in live.items()] == [True, False, True]


def test_a_swap_that_cannot_be_reverted_says_so_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, model = publish(tmp_path)
    with VariantSwitch(live, base="device") as variants:
        variants.add("moved", tmp_path / STEP)
        variants.use("moved")
        with monkeypatch.context() as patch:
            patch.setattr(switch, "stream", broken_stream)
            with (
                copies(monkeypatch, {1: OSError, 2: MemoryError}),
                pytest.raises(TornError, match=r"use\(None\) tries"),
            ):
                variants.use(None)
        assert not same(live, model)
        assert not same(live, weights())
        variants.use(None)
        assert same(live, weights())
        variants.use("moved")
        assert same(live, model)


def out_of_memory(*_: Any, **__: Any) -> None:
    raise MemoryError


def test_a_failed_swap_without_a_message_names_the_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, _ = publish(tmp_path)
    with VariantSwitch(live, base="device") as variants:
        variants.add("moved", tmp_path / STEP)
        monkeypatch.setattr(switch, "stream", out_of_memory)
        with pytest.raises(SwapError, match=r"failed \(MemoryError\); the model is the base"):
            variants.use("moved")
        monkeypatch.setattr(variants, "_write", out_of_memory)
        with pytest.raises(TornError, match=r"^a swap .*\(MemoryError\).* reverted \(MemoryError\); .* tries it"):
            variants.use("moved")


def test_a_torn_update_without_a_message_names_the_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, _ = publish(tmp_path)
    with DeltaFile(tmp_path / STEP) as file:
        update = staged.stage(file, place(live, file.manifest))
    exchange, calls = staged._Change.exchange, [0]

    def once(self: staged._Change) -> None:
        calls[0] += 1
        if calls[0] > 1:
            raise MemoryError
        exchange(self)

    monkeypatch.setattr(staged._Change, "exchange", once)
    with pytest.raises(TornError, match=r"^an update failed .*\(MemoryError\).* reverted \(MemoryError\); load the"):
        update.write()


def test_a_failed_poll_without_a_message_is_logged_with_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    live, _ = publish(tmp_path)
    polled = threading.Event()

    def poll(_: Follower) -> Poll:
        polled.set()
        raise MemoryError

    monkeypatch.setattr(Follower, "poll", poll)
    with follow(live, tmp_path).start(every=0.001):
        assert polled.wait(300)
    assert caplog.messages[0].endswith("cannot be followed: MemoryError; trying again")


def test_empty_pieces_of_two_models_are_no_shared_weights() -> None:
    # A rank of a short tensor has an empty piece, and all empty storages have one address.
    with writing([torch.empty(0, 8), torch.ones(2)]), writing([torch.empty(0, 4), torch.ones(2)]):
        pass
