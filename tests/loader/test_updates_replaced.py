"""A follower notices that its chain was replaced by another one, which is behind its state, and names both."""

from __future__ import annotations

import asyncio
import logging
import shutil
import uuid
from pathlib import Path

import pytest
import torch

from peraxis_format.engines.vllm.following import Following
from peraxis_format.torch.updates import UpdateWriter, follow
from tests.loader.test_updates_writes import move, same, weights
from tests.loader.updates_pair import server, train, trainer


def publish(folder: str | Path, steps: int, seed: int = 0) -> tuple[UpdateWriter, dict[str, torch.Tensor]]:
    model = weights(seed)
    writer = UpdateWriter(model, folder)
    writer.step()
    for _ in range(steps):
        move(model)
        writer.step()
    return writer, model


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in weights().items()}


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "chain")
    pytest.importorskip("fsspec")
    return f"memory://{uuid.uuid4().hex}/chain"


def remove(place: str) -> None:
    if "://" not in place:
        shutil.rmtree(place)
        return
    import fsspec

    fsspec.filesystem("memory").rm(place.removeprefix("memory:/"), recursive=True)


@pytest.mark.parametrize("steps", [0, 2, 3])
def test_another_chain_that_is_behind_is_reported_with_both_names_and_logged_once(
    steps: int, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    old, model = publish(place, 3)
    live = empty()
    with follow(live, place) as follower:
        for _ in range(3):
            assert (follower.poll().step, dict(follower.poll().waiting)) == (3, {})
        remove(place)
        new, other = publish(place, steps, seed=1)
        assert new._head is not None
        with caplog.at_level(logging.ERROR, "peraxis"):
            for _ in range(3):
                found = follower.poll()
                reason = found.waiting[Path(place)]
                assert "has another chain, " in reason
                assert f"{new._head.path.name} ({new._head.content_id})" in reason
                assert f"the model is at step 3 of the one with the result {old.result}" in reason
                assert (found.step, found.applied) == (3, ())
        assert caplog.text.count("has another chain") == 1
        assert same(live, model)
        with follow(live, place) as again:
            assert again.poll().step == steps
        assert same(live, other)


def test_a_chain_that_is_only_read_again_or_pruned_is_no_other_one(place: str) -> None:
    model = weights()
    writer = UpdateWriter(model, place, anchor_every=2)
    live = empty()
    with follow(live, place) as follower:
        for step in range(8):
            writer.step()
            move(model)
            found = follower.poll()
            assert (found.step, dict(found.waiting)) == (step, {})
            writer.prune(anchors=1)
            assert dict(follower.poll().waiting) == {}


def test_a_state_that_did_not_change_has_the_step_of_its_anchor_where_the_update_was_pruned(place: str) -> None:
    model, live = weights(), empty()
    writer = UpdateWriter(model, place, anchor_every=1)
    with follow(live, place) as follower:
        writer.step()
        assert follower.poll().step == 0
        writer.step()
        writer.prune(anchors=1)
        assert (follower.poll().step, follower.wait(1, seconds=0)) == (1, True)
        move(model)
        writer.step()
        assert follower.poll().step == 2
    assert same(live, model)


def test_a_server_of_vllm_notices_it_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, _ = publish(tmp_path / "chain", 2)

    async def apply(path: Path) -> None: ...

    following = Following(tmp_path / "chain", 1.0, apply)
    asyncio.run(following.poll())
    assert (following.step, following.waiting) == (2, {})
    remove(str(tmp_path / "chain"))
    publish(tmp_path / "chain", 1, seed=1)
    with caplog.at_level(logging.ERROR, "peraxis"):
        for _ in range(2):
            asyncio.run(following.poll())
    assert caplog.text.count("has another chain") == 1
    assert following.step == 2
    assert f"at step 2 of the one with the result {old.result}" in following.waiting["chain"]


@pytest.mark.parametrize("steps", [0, 1])
def test_a_trainer_does_not_publish_into_a_chain_that_took_the_place_of_its_own(steps: int, tmp_path: Path) -> None:
    """The other chain is behind, so no file of it is newer. No server could use an update after a gap."""
    place = str(tmp_path / "chain")
    old, model = publish(place, 3)
    remove(place)
    publish(place, steps, seed=1)
    before = sorted(path.name for path in (tmp_path / "chain").iterdir())
    move(model)
    for _ in range(2):
        with pytest.raises(FileExistsError, match=r"was replaced by another process.*publish to a new folder"):
            old.step()
    assert sorted(path.name for path in (tmp_path / "chain").iterdir()) == before


def test_a_trainer_goes_on_after_its_published_files_were_taken_away(tmp_path: Path) -> None:
    """As by a program that ships them to servers and then deletes them."""
    place = str(tmp_path / "chain")
    old, model = publish(place, 3)
    for path in (tmp_path / "chain").iterdir():
        path.unlink()
    for _ in range(2):
        move(model)
        old.step()
    assert sorted(path.name for path in (tmp_path / "chain").iterdir()) == ["step-00000004.pxd", "step-00000005.pxd"]


def test_another_chain_that_is_longer_is_reported_where_it_has_another_state_at_the_same_step(tmp_path: Path) -> None:
    folder, live = tmp_path / "chain", server()
    model = trainer()
    writer = UpdateWriter(model, folder)
    for step in range(2):
        writer.step()
        train(model, step)
    assert follow(live, folder).poll().step == 1
    follower = follow(live, folder)
    follower.poll()
    shutil.rmtree(folder)
    other = trainer()
    writer = UpdateWriter(other, folder)
    for step in range(4):
        writer.step()
        train(other, 10 + step)
    (found,) = [told for told in follower.poll().waiting.values() if "has another chain" in told]
    assert "follow again from the beginning" in found


def test_a_trainer_warns_of_an_adapter_that_is_not_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class PeftModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = torch.nn.Linear(4, 2, bias=False)

    model, live = PeftModel(), PeftModel()
    writer = UpdateWriter(torch.nn.ModuleDict({"inner": model}), tmp_path / "adapter", dtype=None)
    writer.step()
    assert follow(torch.nn.ModuleDict({"inner": live}), tmp_path / "adapter").poll().step == 0
    assert torch.equal(live.lora_A.weight, model.lora_A.weight)
    assert ["adapter of PEFT" in message for message in caplog.messages].count(True) == 1
