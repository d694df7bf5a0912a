"""Deltas load by hub name, offline from the cache, and a line loads a model, its tokenizer and generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

import peraxis
import peraxis_format as pxd
import peraxis_tools
from peraxis_format.hub import HubName, hub_name, hub_path
from peraxis_format.torch.updates import UpdateWriter
from peraxis_tools.chain import update
from peraxis_tools.commands import inspect as inspect_command
from peraxis_tools.errors import CheckFailedError, ToolError
from tests.engines.pair import make_base, make_delta


def put_in_cache(cache: Path, repository: str, files: list[Path]) -> None:
    """Lay files out as huggingface_hub does."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    for file in files:
        shutil.copy(file, snapshot / file.name)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a delta with its own generation configuration and chat template, and a hub cache with both."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_base(folder / "base", tied=False)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "max_length": 33}))
    (folder / "chat_template.jinja").write_text("OWN {{ messages[0]['content'] }}")
    tokenizer = [base / "tokenizer.json", base / "tokenizer_config.json", base / "config.json"]
    own = [folder / "generation_config.json", folder / "chat_template.jinja"]
    assets = sorted([*own, *tokenizer], key=lambda path: path.name)
    delta = make_delta(folder / "delta.pxd", base, seed=1, assets=assets, base_id="org/base")
    other = make_delta(folder / "other.pxd", base, seed=2)
    put_in_cache(folder / "cache", "org/base", sorted(base.iterdir()))
    put_in_cache(folder / "cache", "me/delta", [delta])
    put_in_cache(folder / "cache", "me/several", [delta, other])
    return {"base": base, "delta": delta, "other": other, "cache": folder / "cache"}


@pytest.fixture
def cached(pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The hub is unreachable, and its cache is the one of the pair."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(pair["cache"]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return pair


def failing(error: Exception):
    """Return a replacement for a function of huggingface_hub that raises this error."""

    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_without_a_connection_a_repository_is_listed_from_the_cache(
    cached: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = type("ConnectError", (HfHubHTTPError.__bases__[0],), {})("no route to host")
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", failing(lost))
    assert hub_path("me/delta").name == "delta.pxd"


def test_a_fault_of_the_program_is_no_lost_connection(cached: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", failing(TypeError("a fault of ours")))
    with pytest.raises(TypeError, match="a fault of ours"):
        hub_path("me/delta")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/delta", HubName(repository="me/delta")),
        ("me/delta@v1", HubName(repository="me/delta", revision="v1")),
        ("hf://me/delta", HubName(repository="me/delta")),
        ("hf://me/delta@v1", HubName(repository="me/delta", revision="v1")),
        ("hf://me/delta/a/b.pxd", HubName(repository="me/delta", file="a/b.pxd")),
        ("hf://me/delta/b.pxd@v1", HubName(repository="me/delta", file="b.pxd", revision="v1")),
        ("hf://me/delta@v1/b.pxd", HubName(repository="me/delta", file="b.pxd", revision="v1")),
        ("delta.pxd", None),
        ("me/delta.pxd", None),
        ("/me/delta", None),
        ("a/b/c", None),
        ("https://host/me/delta.pxd", None),
        ("hf://datasets/me/data/b.pxd", None),
    ],
)
def test_a_name_says_what_it_is(name: str, expected: HubName | None) -> None:
    assert hub_name(name) == expected


def test_what_exists_on_disk_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("me").mkdir()
    Path("me/delta").write_bytes(b"")
    assert hub_name("me/delta") is None


@pytest.mark.parametrize("name", ["hf://me", "hf://me/delta@a/b.pxd@c", "hf://"])
def test_a_malformed_hub_name_is_refused(name: str) -> None:
    with pytest.raises(pxd.CheckpointError, match="hf://org/repo"):
        hub_name(name)


def test_a_repository_is_its_one_delta_offline_too(cached: dict[str, Path]) -> None:
    assert hub_path("me/delta").read_bytes() == cached["delta"].read_bytes()
    assert hub_path("hf://me/several/other.pxd").read_bytes() == cached["other"].read_bytes()


def test_a_repository_with_several_deltas_asks_for_a_name(cached: dict[str, Path]) -> None:
    with pytest.raises(pxd.CheckpointError, match=r"2 \.pxd files \(delta\.pxd, other\.pxd\).*hf://me/several/FILE"):
        hub_path("me/several")


def test_a_repository_that_is_not_cached_is_one_line_offline(cached: dict[str, Path]) -> None:
    with pytest.raises(pxd.CheckpointError, match="me/nothing") as caught:
        hub_path("me/nothing")
    assert "\n" not in str(caught.value)


def test_load_takes_the_base_from_the_manifest_and_brings_all_that_apply_writes(
    cached: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peraxis_tools.apply(cached["base"], cached["delta"], tmp_path / "applied")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "applied")
    model, tokenizer = peraxis_tools.load("me/delta")
    ids = torch.tensor([[1, 5, 9, 200]])
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert model.generation_config.eos_token_id == [2, 7]
    assert model.generation_config.max_length == reference.generation_config.max_length == 33
    words = [{"role": "user", "content": "w5"}]
    expected = AutoTokenizer.from_pretrained(tmp_path / "applied").apply_chat_template(words, tokenize=False)
    assert tokenizer.apply_chat_template(words, tokenize=False) == expected == "OWN w5"


def test_load_model_with_one_argument_and_the_auto_class_give_the_same_model(cached: dict[str, Path]) -> None:
    ids = torch.tensor([[1, 5, 9, 200]])
    expected = peraxis_tools.load_model(cached["base"], cached["delta"])(ids).logits
    assert torch.equal(peraxis_tools.load_model("me/delta")(ids).logits, expected)
    assert torch.equal(peraxis_tools.PxdForCausalLM.from_pretrained("me/delta")(ids).logits, expected)
    assert torch.equal(peraxis_tools.PxdForCausalLM.from_pretrained("me/delta", revision="main")(ids).logits, expected)


def test_a_base_that_is_no_hub_id_has_to_be_named(cached: dict[str, Path]) -> None:
    with pytest.raises(ToolError, match="names its base 'base'"):
        peraxis_tools.load(cached["other"])
    assert peraxis_tools.load(cached["other"], base=cached["base"]).tokenizer is not None


def test_a_manifest_cannot_lead_to_a_folder_of_this_machine(cached: dict[str, Path], tmp_path: Path) -> None:
    delta = make_delta(tmp_path / "d.pxd", cached["base"], seed=3, base_id=str(cached["base"]))
    with pytest.raises(ToolError, match="not a hub id"):
        peraxis_tools.load(delta)


def test_the_command_line_takes_a_repository_in_the_place_of_a_path(cached: dict[str, Path]) -> None:
    done = CliRunner().invoke(inspect_command.command, ["me/delta", "--json"])
    assert done.exit_code == 0, done.output
    with pxd.open(cached["delta"]) as delta:
        assert delta.content_id in done.output


def test_the_former_name_of_dtype_is_not_ignored(pair: dict[str, Path]) -> None:
    for options in ({"dtype": torch.float32}, {"torch_dtype": torch.float32}, {"torch_dtype": "float32"}):
        assert peraxis_tools.load(pair["delta"], base=pair["base"], **options).model.dtype is torch.float32
    assert peraxis_tools.load(pair["delta"], base=pair["base"]).model.dtype is torch.bfloat16


@pytest.fixture
def chain(pair: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a folder of two updates; the second has another generation configuration and chat template."""
    states = [pair["base"]]
    (tmp_path / "updates").mkdir()
    for step in (1, 2):
        state = shutil.copytree(states[-1], tmp_path / f"state-{step}")
        tensors = load_file(state / "model.safetensors")
        tensors["model.norm.weight"] += step
        save_file(tensors, state / "model.safetensors", metadata={"format": "pt"})
        if step == 2:
            (state / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_length": 44}))
            (state / "chat_template.jinja").write_text("SECOND {{ messages[0]['content'] }}")
        update(states[-1], state, tmp_path / "updates" / f"{step}.pxd")
        states.append(state)
    return states[-1], tmp_path / "updates"


@pytest.mark.parametrize("named", ["folder", "files"])
def test_the_updates_of_a_chain_load_as_its_last_state(
    pair: dict[str, Path], chain: tuple[Path, Path], named: str
) -> None:
    state, folder = chain
    updates = folder if named == "folder" else sorted(folder.iterdir(), reverse=True)
    model, tokenizer = peraxis_tools.load(updates, base=pair["base"])
    wanted = load_file(state / "model.safetensors")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.max_length == 44
    assert tokenizer.chat_template.startswith("SECOND")
    again = peraxis_tools.load_model(pair["base"], updates)
    assert torch.equal(again.model.norm.weight, wanted["model.norm.weight"])


def test_a_gap_in_a_chain_and_no_delta_at_all_are_named(pair: dict[str, Path], chain: tuple[Path, Path]) -> None:
    _, folder = chain
    (folder / "1.pxd").unlink()
    with pytest.raises(pxd.PxdError, match=r"2\.pxd"):
        peraxis_tools.load(folder, base=pair["base"])
    with pytest.raises(ToolError, match="no delta to load"):
        peraxis_tools.load_model(pair["base"], [])
    with pytest.raises(ToolError, match="not an update of a chain"):
        peraxis_tools.load_model(pair["base"], [pair["delta"], pair["other"]])


def published(folder: Path, state: Mapping[str, torch.Tensor], steps: int, **options: Any) -> Path:
    """A chain of a trainer: each step moves all weights."""
    live = {name: tensor.clone() for name, tensor in state.items()}
    writer = UpdateWriter(live, folder, **options)
    for _ in range(steps):
        writer.step()
        for tensor in live.values():
            tensor.add_(0.001)
    return folder


@pytest.mark.parametrize("steps", [1, 2])
def test_a_state_of_another_model_gets_no_file_of_the_base(pair: dict[str, Path], tmp_path: Path, steps: int) -> None:
    chain = published(tmp_path / "chain", {"weight": torch.ones(8, 8, dtype=torch.bfloat16)}, steps)
    with pytest.raises(CheckFailedError, match="is for another model"):
        peraxis_tools.load(chain, pair["base"])
    with pytest.raises(CheckFailedError, match="is for another model"):
        peraxis_tools.apply(pair["base"], chain, tmp_path / "applied")
    with pytest.raises(CheckFailedError, match="is for another model"):
        peraxis_tools.verify(chain, base=pair["base"])
    with pytest.raises(CheckFailedError, match="is for another model"):
        peraxis.compact(pair["base"], chain, tmp_path / "compacted.pxd")


def test_weights_that_a_state_lacks_are_refused_and_not_drawn_at_random(pair: dict[str, Path], tmp_path: Path) -> None:
    whole = load_file(pair["base"] / "model.safetensors")
    part = {name: tensor for name, tensor in whole.items() if ".layers.0." not in name}
    chain = published(tmp_path / "chain", part, 1)
    with pytest.raises(CheckFailedError, match=r"it has no model\.layers\.0\..*, or publish all weights"):
        peraxis_tools.load(chain, pair["base"])
    base = shutil.copytree(pair["base"], tmp_path / "base")  # the same part of a checkpoint
    save_file(part, base / "model.safetensors")
    with pytest.raises(CheckFailedError, match=r"has no model\.layers\.0\..* and \d+ more, which LlamaForCausalLM"):
        peraxis_tools.load(chain, base)


def test_tensors_that_the_model_has_no_place_for_are_named(
    pair: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = load_file(pair["base"] / "model.safetensors") | {"score.weight": torch.ones(2, 24, dtype=torch.bfloat16)}
    peraxis_tools.load(published(tmp_path / "chain", state, 1), pair["base"])
    assert "LlamaForCausalLM, the model of its config.json, has no score.weight; they are not loaded" in caplog.text


def test_weights_of_another_shape_than_the_configuration_s_are_refused_by_name(
    pair: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((pair["base"] / "config.json").read_text())
    base = shutil.copytree(pair["base"], tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    chain = published(tmp_path / "chain", load_file(base / "model.safetensors"), 1)
    with pytest.raises(CheckFailedError, match=r"down_proj\.weight is \[.*\], and the model of its config\.json has"):
        peraxis_tools.load(chain, base)


def test_updates_that_are_named_are_taken_as_their_folder_is(pair: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(pair["base"] / "model.safetensors")
    chain = published(tmp_path / "chain", state, 5, anchor_every=2)
    named = sorted(chain.glob("*.pxd"))
    assert sum("anchor" in path.name for path in named) > 1
    peraxis_tools.apply(pair["base"], chain, tmp_path / "folder")
    peraxis_tools.apply(pair["base"], named, tmp_path / "named")
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("folder", "named")]
    assert found[0] == found[1]
