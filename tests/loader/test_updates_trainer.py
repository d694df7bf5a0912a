"""The trainer of a chain: its files, its folder, and kills at random moments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

import peraxis_format as pxd
from peraxis_format.errors import LiveModelError
from peraxis_format.torch.updates import UpdateWriter, follow, list_updates
from tests.loader.updates_pair import published, server, train, trainer


def test_an_update_is_small_and_says_what_changed(tmp_path: Path) -> None:
    model = trainer()
    writer = UpdateWriter(model, tmp_path)
    first = writer.step()
    train(model, 0)
    done = writer.step()
    assert 0 < done.changed < done.weights
    assert done.bytes < first.bytes
    with pxd.open(done.path) as delta:
        assert delta.manifest.previous == first.content_id
        assert delta.manifest.tied == (("embed.weight", "head.weight"),)
    assert writer.result == done.result


def test_old_files_go_and_what_is_left_is_a_chain(tmp_path: Path) -> None:
    model = trainer()
    writer = UpdateWriter(model, tmp_path, anchor_every=2)
    for step in range(8):
        writer.step()
        train(model, step)
    gone = writer.prune(anchors=2)
    assert [path.name for path in gone][:2] == ["anchor-00000000.pxd", "step-00000001.pxd"]
    files, _ = list_updates(tmp_path)
    assert [(file.step, file.is_anchor) for file in files] == [(4, True), (5, False), (6, False), (6, True), (7, False)]
    live = server()
    assert follow(live, tmp_path).poll().step == 7
    again = UpdateWriter(model, tmp_path)
    assert again.step_number == 7
    assert again.step().step == 8
    assert follow(live, tmp_path).poll().step == 8
    assert published(live) == published(model)


@pytest.mark.parametrize("name", ["anchor-00000009.pxd", "anchor-00000002.pxd"])
def test_an_anchor_with_the_name_of_another_step_is_passed_over_and_named(tmp_path: Path, name: str) -> None:
    model, live = trainer(), server()
    writer = UpdateWriter(model, tmp_path, anchor_every=4)
    for step in range(7):
        writer.step()
        train(model, step)
    assert follow(live, tmp_path).poll().step == 6
    (tmp_path / "anchor-00000004.pxd").rename(tmp_path / name)
    wanted = f"{name}: is passed over, because it has the state of step-00000004.pxd; rename it to anchor-00000004.pxd"
    for server_of in (lambda: live, server):
        found = follow(server_of(), tmp_path).poll()
        assert found.step == 6
        assert found.waiting[tmp_path / name].endswith(wanted)
    with pytest.raises(LiveModelError, match=wanted):
        UpdateWriter(model, tmp_path).step()
    (tmp_path / name).rename(tmp_path / "anchor-00000004.pxd")
    assert UpdateWriter(model, tmp_path).step().step == 7


def test_anchors_of_a_state_that_does_not_change_are_taken_after_the_updates_before_them_are_gone(
    tmp_path: Path,
) -> None:
    model = trainer()
    writer = UpdateWriter(model, tmp_path, anchor_every=2)
    for _ in range(6):
        writer.step()
    writer.prune(anchors=1)
    live = server()
    assert follow(live, tmp_path).poll().step == 5
    assert published(live) == published(model)


def test_the_anchor_of_a_step_that_changed_nothing_is_taken_where_its_update_is_gone(tmp_path: Path) -> None:
    model, live = trainer(), server()
    writer = UpdateWriter(model, tmp_path, anchor_every=4)
    for step in range(5):
        writer.step()
        if step < 3:
            train(model, step)
    (tmp_path / "step-00000004.pxd").unlink()
    assert follow(live, tmp_path).poll().step == 4
    assert UpdateWriter(model, tmp_path).step().step == 5


@pytest.mark.parametrize("gone", ["step-*.pxd", "*.pxd", "step-00000002.pxd"])
def test_a_trainer_whose_newest_file_is_gone_warns_once(
    tmp_path: Path, gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = trainer()
    writer = UpdateWriter(model, tmp_path, anchor_every=5)
    for step in range(3):
        writer.step()
        train(model, step)
    for path in tmp_path.glob(gone):
        path.unlink()
    assert writer.step().step == 3
    for step in range(4, 6):
        train(model, step)
        writer.step()
    assert ["step-00000002.pxd: is gone" in message for message in caplog.messages] == [True]
    live = server()
    assert follow(live, tmp_path).poll().step == 5
    assert published(live) == published(model)


def test_a_folder_of_other_tensors_or_with_a_gap_is_refused_by_name(tmp_path: Path) -> None:
    model = trainer()
    writer = UpdateWriter(model, tmp_path)
    for step in range(4):
        writer.step()
        train(model, step)
    with pytest.raises(LiveModelError, match="other"):
        UpdateWriter({"other": torch.zeros(3)}, tmp_path).step()
    (tmp_path / "step-00000002.pxd").unlink()
    with pytest.raises(LiveModelError, match=r"step-00000003.pxd: a gap"):
        UpdateWriter(model, tmp_path)


def test_a_second_trainer_does_not_overwrite_what_is_published(tmp_path: Path) -> None:
    model = trainer()
    first, _ = UpdateWriter(model, tmp_path), None
    first.step()
    second = UpdateWriter(model, tmp_path)
    first.step()
    with pytest.raises(FileExistsError):
        second.step()


class Killed(BaseException):
    """Stands for a SIGKILL. The library does not catch it."""


class KillAfter:
    """Raises Killed in the library after a number of calls and returns of Python functions. count: their number."""

    def __init__(self, events: int) -> None:
        self.events = events
        self.count = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        self.count += 1
        if self.count > self.events and "peraxis_format" in frame.f_code.co_filename:
            sys.setprofile(None)
            raise Killed

    def __enter__(self) -> KillAfter:
        sys.setprofile(self)
        return self

    def __exit__(self, *error: object) -> bool:
        sys.setprofile(None)
        return isinstance(error[1], Killed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("seed", range(2))
def test_kills_of_trainer_and_server_at_random_moments_lose_nothing(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    model, live = trainer(seed), server(seed + 10)
    states: list[dict[str, bytes]] = []
    writer, follower = UpdateWriter(model, tmp_path, anchor_every=5), follow(live, tmp_path)
    length, kills = 0, 0  # number of events of a whole step, after the first one
    for attempt in range(16):
        want = published(model)
        with KillAfter(int(random.integers(1, length)) if attempt > 2 else sys.maxsize) as killer:
            writer.step()
        length = int(1.5 * killer.count) if attempt == 2 else length  # the first steps import and compile
        kills += killer.count > killer.events
        # Only the files in the folder count, because the publishing process is gone.
        writer = UpdateWriter(model, tmp_path, anchor_every=5)
        if writer.result is not None and writer.step_number == len(states):
            states.append(want)
            train(model, attempt)
        assert writer.step_number == len(states) - 1
        fate = random.integers(0, 4)
        if fate == 0:
            with KillAfter(int(random.integers(1, length))):
                follower.poll()
            # Either the same model, interrupted at any point, or a new one.
            live = live if random.random() < 0.5 else server(attempt)
            follower = follow(live, tmp_path)
        if fate <= 1:
            assert follower.poll().step == len(states) - 1
            assert published(live) == states[-1]
    assert follower.poll().lag == 0
    assert published(live) == states[-1]
    assert 3 < kills < 14


def test_the_tools_read_what_a_trainer_published(tmp_path: Path) -> None:
    from peraxis_tools.apply import apply
    from peraxis_tools.chain import log
    from peraxis_tools.checkpoints.checkpoint import open_checkpoint
    from tests.factories import write_checkpoint

    model = trainer()
    writer = UpdateWriter(model, tmp_path / "chain", anchor_every=2)
    for step in range(5):
        writer.step()
        train(model, step)
    writer.step()
    found = log(tmp_path / "chain")
    assert [entry.name for entry in found.updates] == ["anchor-00000000.pxd"] + [
        f"step-{step:08d}.pxd" for step in range(1, 6)
    ]
    assert [entry.name for entry in found.folded] == ["anchor-00000002.pxd", "anchor-00000004.pxd"]
    write_checkpoint(tmp_path / "base", {"seen": (np.zeros((), np.int64), pxd.DType.I64)})
    files = [tmp_path / "chain" / entry.name for entry in found.updates]
    apply(tmp_path / "base", files, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as out:
        assert {name: bytes(out.tensors.read(name).tobytes()) for name in out.tensors} == published(model)


@pytest.mark.parametrize("wrapped", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_published_under_the_names_of_its_checkpoint(
    tmp_path: Path, wrapped: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    model, live = trainer(), server()
    writer = UpdateWriter(wrapped(model), tmp_path)
    for seed in range(2):
        writer.step()
        assert follow(live, tmp_path).poll().step == seed
        assert published(live) == published(model)
        train(model, seed)
    UpdateWriter(model, tmp_path).step()  # without the wrapper it goes on
    assert follow(live, tmp_path).poll().step == 2


class Wrapper(torch.nn.Module):
    """What DistributedDataParallel does with names."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


class WithModule(torch.nn.Module):
    """A model of which a submodule has the name of a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8))
        self.module = torch.nn.Linear(8, 8, bias=False)


@pytest.mark.parametrize("wrapped", [lambda model: model, Wrapper])
@pytest.mark.parametrize("live", [WithModule, lambda: Wrapper(WithModule())])
def test_a_submodule_with_the_name_of_a_wrapper_keeps_its_tensors(
    tmp_path: Path, wrapped: Callable[[torch.nn.Module], torch.nn.Module], live: Callable[[], torch.nn.Module]
) -> None:
    model, server = WithModule(), live()
    UpdateWriter(wrapped(model), tmp_path, dtype=None).step()
    with pxd.open(tmp_path / "anchor-00000000.pxd") as anchor:
        assert [entry.name for entry in anchor.manifest.modules] == ["weight", "module.weight"]
    assert follow(server, tmp_path).poll().step == 0
    for own, other in zip(model.parameters(), server.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_wrapped_model_inside_another_module_is_published_under_the_names_of_its_checkpoint(tmp_path: Path) -> None:
    class WithValueHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = torch.nn.DataParallel(torch.nn.Linear(4, 4))
            self.value_head = torch.nn.Linear(4, 1)

    UpdateWriter(WithValueHead(), tmp_path, dtype=None).step()
    with pxd.open(tmp_path / "anchor-00000000.pxd") as anchor:
        assert {entry.name for entry in anchor.manifest.modules} == {
            "weight", "bias", "value_head.weight", "value_head.bias"
        }  # fmt: skip


class OfWords(torch.nn.Module):
    """A model whose submodules have the names that wrappers give to what they wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Linear(4, 4)
        self.base_layer = torch.nn.Linear(4, 4)
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.base_model = torch.nn.ModuleDict({"model": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 4)})


@pytest.mark.parametrize("wrapped", [lambda model: model, torch.compile, torch.nn.DataParallel])
def test_submodules_with_the_names_of_wrappers_are_published_under_their_own(
    tmp_path: Path, wrapped: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    model, live = OfWords(), OfWords().bfloat16()
    path = UpdateWriter(wrapped(model), tmp_path).step().path
    with pxd.open(path) as delta:
        assert {entry.name for entry in delta.manifest.modules} == set(model.state_dict())
    assert follow(live, tmp_path).poll().step == 0
    assert published(live) == published(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("kind", ["lora", "prompt", "checkpointed"])
def test_the_model_of_an_adapter_is_published_under_the_names_of_its_checkpoint(tmp_path: Path, kind: str) -> None:
    """An adapter of prompts has the model itself where one of LoRA has a tuner. Activation checkpointing leaves its own
    word out of a state dict, and what it wraps may be a wrapper too.
    """
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from tests.tools.compress_pairs import llama_config

    model = transformers.AutoModelForCausalLM.from_config(llama_config())
    names = {name for name, _ in model.named_parameters()}
    if kind == "checkpointed":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for layer in model.model.layers:
            layer.self_attn = checkpoint_wrapper(layer.self_attn)
    config = (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        if kind == "prompt"
        else peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    path = UpdateWriter(peft.get_peft_model(model, config), tmp_path).step().path
    with pxd.open(path) as delta:
        found = {name for entry in delta.manifest.modules for name in delta.manifest.names()[entry.name]}
    assert names <= found
