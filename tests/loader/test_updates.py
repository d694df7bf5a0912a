"""The server holds exactly the published weights, even if the trainer or the server is killed at any time."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peraxis_format.errors import PxdError
from peraxis_format.torch.updates import Poll, UpdateError, UpdateWriter, apply_update, follow, list_updates
from tests.loader.updates_pair import published, server, train, trainer


def test_a_server_that_polls_holds_what_the_trainer_published(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer, follower = UpdateWriter(model, tmp_path), follow(live, tmp_path)
    pointers = {name: tensor.data_ptr() for name, tensor in live.named_parameters()}
    for step in range(4):
        done = writer.step()
        assert (done.step, done.path.name) == (step, f"step-{step:08d}.pxd" if step else "anchor-00000000.pxd")
        found = follower.poll()
        assert (found.step, found.applied, found.lag, dict(found.waiting)) == (step, (done.path,), 0, {})
        assert published(live) == published(model)
        train(model, step)
    assert {name: tensor.data_ptr() for name, tensor in live.named_parameters()} == pointers
    assert follower.poll().applied == ()


def test_a_late_server_catches_up_and_one_in_the_middle_goes_on_from_its_state(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer = UpdateWriter(model, tmp_path)
    for step in range(6):
        writer.step()
        if step == 2:
            follow(live, tmp_path).poll()
        train(model, step)
    found = follow(live, tmp_path).poll()
    assert [path.name for path in found.applied] == [f"step-{step:08d}.pxd" for step in (3, 4, 5)]
    late = server(5)
    assert len(follow(late, tmp_path).poll().applied) == 6
    assert published(late) == published(live)


def test_a_missing_link_is_reported_and_skipped_at_the_next_anchor(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer, follower = UpdateWriter(model, tmp_path, anchor_every=4), follow(live, tmp_path)
    for step in range(4):
        writer.step()
        train(model, step)
    follower.poll()
    assert follower.step == 3
    writer.step()
    (tmp_path / "step-00000004.pxd").rename(tmp_path / "lost")
    (tmp_path / "anchor-00000004.pxd").rename(tmp_path / "later")
    train(model, 4)
    writer.step()
    found = follower.poll()
    assert (found.step, found.applied, found.lag) == (3, (), 1)
    assert "step-00000005.pxd: does not continue" in next(iter(found.waiting.values()))
    (tmp_path / "later").rename(tmp_path / "anchor-00000004.pxd")
    assert [path.name for path in follower.poll().applied] == ["anchor-00000004.pxd", "step-00000005.pxd"]
    assert published(live) == published(model)


def test_repeated_old_and_foreign_updates_are_refused_by_name_and_change_nothing(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer, follower = UpdateWriter(model, tmp_path / "a"), follow(live, tmp_path / "a")
    for step in range(3):
        writer.step()
        train(model, step)
    follower.poll()
    before = published(live)
    other = UpdateWriter(trainer(9), tmp_path / "b")
    foreign = [other.step(), other.step()][1].path
    with pytest.raises(UpdateError, match=r"step-00000002.pxd: is already applied"):
        follower.apply(tmp_path / "a" / "step-00000002.pxd")
    with pytest.raises(UpdateError, match=r"step-00000001.pxd: is not an update of"):
        follower.apply(foreign)
    for path in (tmp_path / "a" / "step-00000002.pxd", foreign):
        with pytest.raises(PxdError, match=r"E40[45]"):
            apply_update(live, path)
    assert published(live) == before


def test_a_damaged_update_leaves_the_model_as_it_was_and_is_tried_again(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer, follower = UpdateWriter(model, tmp_path), follow(live, tmp_path)
    writer.step()
    follower.poll()
    before = published(live)
    train(model, 0)
    path = writer.step().path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = follower.poll()
    assert "E30" in found.waiting[path]
    assert published(live) == before
    path.write_bytes(whole[:-5])
    assert path in follow(live, tmp_path).poll().waiting
    path.write_bytes(whole)
    assert follower.poll().applied == (path,)
    assert published(live) == published(model)


def test_weights_are_written_under_the_lock_alone(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer = UpdateWriter(model, tmp_path)
    writer.step()
    lock = threading.Lock()
    follower = follow(live, tmp_path, lock=lock)
    before = published(live)
    with lock:
        thread = threading.Thread(target=follower.poll)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert published(live) == before
    thread.join()
    assert published(live) == published(model)


def test_a_thread_follows(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer = UpdateWriter(model, tmp_path)
    seen: list[int | None] = []
    with follow(live, tmp_path, on_update=lambda poll: seen.append(poll.step)).start(every=0.01) as follower:
        for step in range(3):
            writer.step()
            train(model, step)
        assert follower.wait(2, seconds=30)
    assert seen[-1] == 2


def test_a_mapping_of_tensors_is_followed_too(tmp_path: Path) -> None:
    state: dict[str, Tensor] = {"w": torch.randn(300, 70), "b": torch.randn(5)}
    live = {name: torch.zeros_like(tensor, dtype=torch.float16) for name, tensor in state.items()}
    writer = UpdateWriter(state, tmp_path, dtype=torch.float16, prefer="speed")
    follower = follow(live, tmp_path)
    for _ in range(3):
        writer.step()
        state["w"] += 1e-4
    follower.poll()
    assert torch.equal(live["w"], (state["w"] - 1e-4).half()) or follower.step == 2
    assert follower.step == 2


def test_a_state_that_comes_back_is_passed_through_once(tmp_path: Path) -> None:
    state = {"w": torch.linspace(-1, 1, 500)}
    live = {"w": torch.zeros(500, dtype=torch.bfloat16)}
    writer = UpdateWriter(state, tmp_path)
    before = state["w"].clone()
    writer.step()
    for values in (before * 1.01, before, before * 1.02):
        state["w"].copy_(values)
        writer.step()
    found = follow(live, tmp_path).poll()
    assert [path.name[:5] for path in found.applied] == ["ancho", "step-", "step-", "step-"]
    assert torch.equal(live["w"], state["w"].bfloat16())
    assert UpdateWriter(state, tmp_path).step_number == 3


def test_a_live_tensor_that_differs_in_one_bit_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    state = {"a": torch.linspace(-1, 1, 500), "b": torch.linspace(-1, 1, 500)}
    writer = UpdateWriter(state, tmp_path)
    writer.step()
    for tensor in state.values():
        tensor.mul_(1.01)
    update = writer.step().path
    live = {name: torch.linspace(-1, 1, 500).bfloat16() for name in state}
    live["b"].view(torch.int16)[499] ^= 1
    before = {name: tensor.clone() for name, tensor in live.items()}
    with pytest.raises(PxdError, match="E405"):
        apply_update(live, update)
    for name, tensor in live.items():
        assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16))


def test_a_server_may_keep_some_tensors_in_f32(tmp_path: Path) -> None:
    model, live = trainer(), server()
    live.up.float()
    pointer = live.up.weight.data_ptr()
    writer, follower = UpdateWriter(model, tmp_path), follow(live, tmp_path)
    for step in range(3):  # an anchor, then updates
        writer.step()
        assert dict(follower.poll().waiting) == {}
        assert published(live) == published(model)
        assert (live.up.weight.dtype, live.up.weight.data_ptr()) == (torch.float32, pointer)
        assert torch.equal(live.up.weight, live.up.weight.bfloat16().float())
        train(model, step)


def test_a_file_that_another_took_the_place_of_is_looked_at_again(tmp_path: Path) -> None:
    """A trainer goes back to step 1 and publishes step 2 again after a server has listed the first step 2."""
    model, live = trainer(), server()
    writer, follower = UpdateWriter(model, tmp_path), follow(live, tmp_path)
    writer.step()
    train(model, 0)
    writer.step()
    follower.poll()
    kept = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    train(model, 1)
    path = writer.step().path
    list_updates(tmp_path, follower._files)  # listed but not applied yet
    path.unlink()
    other = trainer()
    again = UpdateWriter(other, tmp_path)
    train(other, 0)
    train(other, 7)
    assert again.step().path == path
    assert [file.read_bytes() for file in sorted(tmp_path.iterdir())][:2] == kept
    assert follower.poll().applied == (path,)
    assert published(live) == published(other)
    train(other, 8)
    again.step()
    assert follower.poll().lag == 0
    assert published(live) == published(other)


def test_a_tensor_of_the_model_that_the_chain_lacks_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = {name: torch.zeros(4, 4, dtype=torch.bfloat16) for name in ("weight", "extra", "other")}
    writer = UpdateWriter(torch.nn.Linear(4, 4, bias=False), tmp_path)
    with caplog.at_level(logging.WARNING, "peraxis"):
        follower = follow(live, tmp_path)
        for _ in range(2):
            writer.step()
            follower.poll()
    assert caplog.text.count("has no extra and 1 more, so the model keeps its own") == 1


def test_a_chain_of_every_parameter_warns_of_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    UpdateWriter(trainer(), tmp_path).step()
    with caplog.at_level(logging.WARNING, "peraxis"):
        follow(server(), tmp_path).poll()
    assert "has no" not in caplog.text


def test_a_poll_that_fails_on_the_thread_is_logged_and_not_the_last_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, live = trainer(), server()
    writer = UpdateWriter(model, tmp_path)
    writer.step()
    calls: list[int | None] = []

    def on_update(poll: Poll) -> None:
        calls.append(poll.step)
        if len(calls) == 1:
            raise OSError("the metrics server is away")

    with follow(live, tmp_path, on_update=on_update).start(every=0.01) as follower:
        assert follower.wait(0)
        train(model, 0)
        writer.step()
        assert follower.wait(1)
    assert calls == [0, 1]
    assert "the metrics server is away" in caplog.text
    assert published(live) == published(model)
