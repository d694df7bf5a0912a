"""How a server follows a folder, without an engine: which file is next, and when the server tries it."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
import torch

from peraxis_format.engines.vllm.following import Following, RequestError
from peraxis_format.torch.updates import UpdateWriter


class Engine:
    """Records the applied files, and refuses the names in `errors` with their status."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.errors: dict[str, int] = {}

    async def apply(self, path: Path) -> None:
        self.asked.append(path.stem)
        if path.stem in self.errors:
            raise RequestError(self.errors[path.stem], f"{path.stem} is refused")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """anchor 0, steps 1 to 4, anchor 3."""
    live = {"w": torch.arange(64, dtype=torch.bfloat16)}
    writer = UpdateWriter(live, tmp_path, anchor_every=3)
    for _ in range(5):
        writer.step()
        live["w"].add_(64)
    return tmp_path


def test_it_begins_with_the_newest_anchor_and_goes_on_by_steps(folder: Path) -> None:
    engine = Engine()
    following = Following(folder, 1.0, engine.apply)
    asyncio.run(following.poll())
    assert engine.asked == ["anchor-00000003", "step-00000004"]
    assert following.report() == {"folder": str(folder), "step": 4, "lag": 0, "waiting": {}}
    asyncio.run(following.poll())
    assert len(engine.asked) == 2


def test_a_file_that_is_at_fault_is_tried_again_only_when_it_has_changed(folder: Path) -> None:
    engine = Engine()
    following = Following(folder, 1.0, engine.apply)
    engine.errors["step-00000004"] = 400
    for _ in range(3):
        asyncio.run(following.poll())
    assert engine.asked.count("step-00000004") == 1
    assert (following.step, following.lag) == (3, 1)
    assert following.waiting == {"step-00000004.pxd": "step-00000004 is refused"}
    engine.errors.clear()
    path = folder / "step-00000004.pxd"
    os.utime(path, ns=(1, 1))
    asyncio.run(following.poll())
    assert (following.step, following.lag, following.waiting) == (4, 0, {})


def test_what_the_engine_has_no_time_for_is_tried_at_each_poll_and_nothing_else_instead(folder: Path) -> None:
    engine = Engine()
    engine.errors["anchor-00000003"] = 503
    following = Following(folder, 1.0, engine.apply)
    for _ in range(2):
        asyncio.run(following.poll())
    assert engine.asked == ["anchor-00000003"] * 2
    engine.errors.clear()
    asyncio.run(following.poll())
    assert following.step == 4


def test_it_polls_until_it_is_stopped_and_then_no_more(folder: Path) -> None:
    engine = Engine()

    async def session() -> None:
        following = Following(folder, 0.01, engine.apply)
        following.start()
        while following.step != 4:
            await asyncio.sleep(0.01)
        await following.stop()
        asked = len(engine.asked)
        (folder / "step-00000004.pxd").unlink()
        await asyncio.sleep(0.05)
        assert len(engine.asked) == asked

    asyncio.run(session())


def test_a_folder_that_vanishes_and_comes_back_costs_no_update_twice(folder: Path) -> None:
    engine = Engine()
    following = Following(folder, 1.0, engine.apply)
    asyncio.run(following.poll())
    away = folder.with_name("away")
    folder.rename(away)
    for reason in ("no such folder yet", "is not a folder"):
        asyncio.run(following.poll())
        assert (following.step, following.lag, list(following.waiting)) == (4, 0, [folder.name])
        assert reason in following.waiting[folder.name]
        folder.touch()
    folder.unlink()
    away.rename(folder)
    asyncio.run(following.poll())
    assert (following.step, following.waiting, len(engine.asked)) == (4, {}, 2)


def test_an_update_of_another_trainer_is_a_lag_with_its_reason_until_an_anchor_arrives(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine, fork = Engine(), tmp_path_factory.mktemp("fork")
    following = Following(folder, 1.0, engine.apply)
    asyncio.run(following.poll())
    live = {"w": torch.ones(64, dtype=torch.bfloat16)}
    writer = UpdateWriter(live, fork)
    for _ in range(2):
        writer.step()
        live["w"].add_(1)
    shutil.copy(fork / "step-00000001.pxd", folder / "step-00000005.pxd")
    for _ in range(2):
        asyncio.run(following.poll())
        assert (following.step, following.lag, len(engine.asked)) == (4, 1, 2)
        assert "does not continue the model's state" in following.waiting["step-00000005.pxd"]
    shutil.copy(fork / "anchor-00000000.pxd", folder / "anchor-00000006.pxd")
    asyncio.run(following.poll())
    assert (following.step, following.lag, engine.asked[2:]) == (6, 0, ["anchor-00000006"])
