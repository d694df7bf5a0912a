"""`publish` writes a card that agrees with the manifest, to a folder or to a test double of the hub."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.commands.publish import command
from peraxis_tools.errors import ToolError
from peraxis_tools.publish import publish
from tests.factories import random_storage, sign_module


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tuned = pxd.Identity(id="evil\n---\nlicense: x | [link](http://x)")
    with pxd.DeltaWriter(tmp_path / "delta.pxd", base=pxd.Identity(id="org/base"), fine_tuned=tuned) as writer:
        writer.add(sign_module(rng, "a.weight", random_storage(rng, (16, 24))))
        writer.finish()
    return tmp_path / "delta.pxd"


def write_bundle(signed: Path) -> None:
    """A bundle beside the file, with the statement that model-signing makes and no signature."""
    digest = hashlib.sha256(signed.read_bytes()).hexdigest()
    statement = {"predicate": {"resources": [{"name": ".", "algorithm": "sha256", "digest": digest}]}}
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    signed.with_name(f"{signed.name}.sig").write_text(json.dumps({"dsseEnvelope": {"payload": payload}}))


def evaluation(path: Path, content_id: str) -> Path:
    fidelity = {"kl": 0.0123, "top1": 0.95}
    domain = {
        "domain": "chat",
        "candidates": {"merged": fidelity},
        "perplexity": {"merged": 9.5},
        "perplexity_fine_tuned": 9.1,
    }
    path.write_text(json.dumps({"schema": "peraxis.eval/1", "content_id": content_id, "domains": [domain]}))
    return path


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


@pytest.mark.parametrize("bundle", ["stale", "{}", "not json", '{"dsseEnvelope": {"payload": 5}}'])
def test_a_signature_that_is_not_for_these_bytes_is_not_published(delta: Path, tmp_path: Path, bundle: str) -> None:
    other = tmp_path / "other" / "delta.pxd"
    other.parent.mkdir()
    other.write_bytes(b"other bytes")
    write_bundle(other)
    made = other.with_name("delta.pxd.sig").read_text() if bundle == "stale" else bundle
    (tmp_path / "delta.pxd.sig").write_text(made)
    done = CliRunner().invoke(command, ["me/delta", str(delta), "--dry-run", str(tmp_path / "repo")])
    assert isinstance(done.exception, ToolError)
    said = "was made for other bytes than those of delta.pxd" if bundle == "stale" else "is no signature"
    assert said in str(done.exception)
    assert "peraxis-tools sign" in str(done.exception)
    assert not (tmp_path / "repo").exists()


def test_a_dry_run_is_the_repository_in_a_folder(delta: Path, tmp_path: Path) -> None:
    with pxd.open(delta) as file:
        content_id = file.content_id
    write_bundle(tmp_path / "delta.pxd")
    report = evaluation(tmp_path / "eval.json", content_id)
    arguments = ["me/delta", str(delta), "--dry-run", str(tmp_path / "repo"), "--evaluation", str(report)]
    done = CliRunner().invoke(command, [*arguments, "--license", "apache-2.0", "--json"])
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["url"] is None
    names = sorted(path.name for path in (tmp_path / "repo").iterdir())
    assert names == [".gitattributes", "README.md", "delta.pxd", "delta.pxd.sig"]
    assert (tmp_path / "repo" / "delta.pxd").read_bytes() == delta.read_bytes()
    card = (tmp_path / "repo" / "README.md").read_text()
    data = front_matter(card)
    index = data.pop("model-index")
    assert data == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "library_name": "peraxis",
        "tags": ["pxd", "delta", "1-bit"],
    }
    assert [metric["value"] for metric in index[0]["results"][0]["metrics"]] == [0.0123, 0.95]
    assert json.loads(done.stdout)["missing"] == ["language", "pipeline_tag"]
    assert content_id in card
    assert "| chat | merged | 0.0123 | 95.0% | 9.5 | 9.1 |" in card
    assert "[link](http" not in card
    assert f"peraxis-tools verify delta.pxd --base org/base --expect-content-id {content_id}" in card


def test_an_evaluation_of_another_file_is_refused(delta: Path, tmp_path: Path) -> None:
    other = evaluation(tmp_path / "eval.json", "sha256:" + "0" * 64)
    with pytest.raises(ToolError, match="not of this file"):
        publish("me/delta", delta, evaluation=other, dry_run=tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"kl": 0.0123', '"kl": NaN'),
        ('"top1": 0.95', '"top1": Infinity'),
        ('"perplexity_fine_tuned": 9.1', '"perplexity_fine_tuned": -Infinity'),
        ('{"merged": {"kl": 0.0123, "top1": 0.95}}', "{}"),
    ],
)
def test_an_evaluation_without_finite_figures_is_refused(delta: Path, tmp_path: Path, old: str, new: str) -> None:
    with pxd.open(delta) as file:
        report = evaluation(tmp_path / "eval.json", file.content_id)
    assert old in report.read_text()
    report.write_text(report.read_text().replace(old, new))
    with pytest.raises(ToolError, match="lacks figures of an evaluation"):
        publish("me/delta", delta, evaluation=report, dry_run=tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_a_damaged_file_is_never_published(delta: Path, tmp_path: Path) -> None:
    data = bytearray(delta.read_bytes())
    data[-1] ^= 1
    delta.write_bytes(data)
    with pytest.raises(pxd.PayloadError):
        publish("me/delta", delta, dry_run=tmp_path / "repo")


class Hub:
    """A test double of the hub that records its files and its requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, str] = {}
        self.calls: list[tuple[str, Any]] = []

    def __call__(self) -> Hub:
        return self

    def hf_hub_download(self, repository: str, name: str, **_: Any) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        if name not in self.held:
            raise EntryNotFoundError(name)
        (self.folder / f"hub-{name}").write_text(self.held[name])
        return str(self.folder / f"hub-{name}")

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append(("create", (repository, options)))

    def create_commit(self, repository: str, operations: list[Any], **options: Any) -> Any:
        files = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        self.held = {**self.held, **{name: data.decode() for name, data in files.items() if isinstance(data, bytes)}}
        self.calls.append(("commit", (list(files), options)))
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    double = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", double)
    return double


def test_an_upload_is_one_commit_of_everything(delta: Path, hub: Hub) -> None:
    result = publish("me/delta", delta, private=True)
    assert result.url == "https://hub/commit/1"
    assert hub.calls[0] == ("create", ("me/delta", {"private": True, "exist_ok": True}))
    assert hub.calls[1][1][0] == ["delta.pxd", "README.md", ".gitattributes"]


def another(folder: Path, name: str, seed: int = 1) -> Path:
    rng = np.random.default_rng(seed)
    tuned, config = pxd.Identity(id="org/tuned"), json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()
    with pxd.DeltaWriter(folder / name, base=pxd.Identity(id="org/other"), fine_tuned=tuned) as writer:
        writer.add(sign_module(rng, "a.weight", random_storage(rng, (16, 24))))
        writer.add_asset("config.json", config)
        writer.finish()
    return folder / name


def test_a_repository_that_exists_keeps_what_it_holds(delta: Path, tmp_path: Path, hub: Hub) -> None:
    hub.held = {
        "README.md": "---\nlicense: mit\nlanguage:\n- de\ntags:\n- mine\nown_key: 7\n---\n\n# My model\n\nMy words.\n",
        ".gitattributes": "*.bin filter=lfs",
    }
    with pxd.open(delta) as file:
        report = evaluation(tmp_path / "eval.json", file.content_id)
    (tmp_path / "README.md").write_text("---\nlicense: gemma\nlanguage: fr\ndatasets: some/text\n---\ntext\n")
    publish("me/delta", delta, evaluation=report, card_from=tmp_path)
    publish("me/delta", another(tmp_path, "other.pxd"))
    card, data = hub.held["README.md"], front_matter(hub.held["README.md"])
    assert "# My model\n\nMy words." in card
    assert (data["license"], data["language"], data["own_key"]) == ("mit", ["de"], 7)
    assert data["datasets"] == "some/text"
    assert data["tags"] == ["mine", "pxd", "delta", "1-bit"]
    assert data["base_model"] == ["org/base", "org/other"]
    assert data["pipeline_tag"] == "text-generation"
    assert card.count("<!-- peraxis delta ") == 2
    assert len(data["model-index"][0]["results"]) == 1
    assert hub.held[".gitattributes"].splitlines()[0] == "*.bin filter=lfs"
    once = hub.held
    publish("me/delta", delta, evaluation=report)
    assert hub.held == once


def test_several_deltas_are_published_at_once_each_with_its_evaluation(delta: Path, tmp_path: Path, hub: Hub) -> None:
    other = another(tmp_path, "other.pxd")
    reports = []
    for path in (other, delta):
        with pxd.open(path) as file:
            reports.append(evaluation(tmp_path / f"{path.name}.json", file.content_id))
    result = publish("me/delta", [delta, other], evaluation=reports)
    assert [item.name for item in result.deltas] == ["delta.pxd", "other.pxd"]
    index = front_matter(hub.held["README.md"])["model-index"][0]["results"]
    assert [metric["config"] for item in index for metric in item["metrics"]] == ["delta.pxd"] * 2 + ["other.pxd"] * 2
    assert hub.calls[1][1][0] == ["delta.pxd", "other.pxd", "README.md", ".gitattributes"]


def test_language_and_licence_come_from_the_fine_tunes_card_or_are_named_as_missing(
    delta: Path, tmp_path: Path, hub: Hub
) -> None:
    assert publish("me/delta", delta).missing == ("license", "language", "pipeline_tag")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "README.md").write_text("---\nlicense: gemma\nlanguage: fr\npipeline_tag: x\n---\ntext\n")
    assert publish("me/other", delta, card_from=tmp_path / "tuned").missing == ()
    data = front_matter(hub.held["README.md"])
    assert (data["license"], data["language"]) == ("gemma", "fr")


def test_the_bases_hub_id_can_be_given(delta: Path, hub: Hub) -> None:
    publish("me/delta", delta, base_id="real/base@abc123")
    card = hub.held["README.md"]
    assert front_matter(card)["base_model"] == "real/base"
    assert "apply real/base@abc123 delta.pxd -o model" in card
    assert 'peraxis.load("delta.pxd", base="real/base@abc123")' in card


@pytest.mark.parametrize(
    "name", ["a b$(touch PWNED).pxd", "x```.pxd", 'q".pxd', "<img src=x>.pxd", "it's.pxd", "--> x.pxd"]
)
def test_a_file_name_stays_a_file_name_in_every_block(delta: Path, tmp_path: Path, hub: Hub, name: str) -> None:
    odd = delta.rename(tmp_path / name)
    if name.startswith("-"):
        with pytest.raises(ToolError, match="rename the file"):
            publish("me/delta", odd)
        return
    publish("me/delta", odd)
    publish("me/delta", odd)
    card = hub.held["README.md"]
    assert card.count("<!-- peraxis delta ") == 1
    fence, shell, python = re.search(r"(?m)^(`{3,})sh\n(.*?)\n\1\n\n\1python\n(.*?)\n\1$", card, re.DOTALL).groups()
    assert len(fence) > 3 or "```" not in name
    download = next(line for line in shell.splitlines() if line.startswith("hf download"))
    assert shlex.split(download)[3] == name
    call = ast.parse(python).body[1].value
    assert [argument.value for argument in call.args] == [name]
    assert [keyword.value.value for keyword in call.keywords] == ["org/base"]
    prose = re.sub(r"<!--.*?-->", "", card.replace(shell, "").replace(python, ""))
    assert re.search(r"(?<!\\)<", prose.split("---\n", 2)[2]) is None


def test_a_name_with_control_characters_is_refused(delta: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="rename the file"):
        publish("me/delta", delta.rename(tmp_path / "x\n```.pxd"), dry_run=tmp_path / "repo")


def test_a_hub_that_cannot_be_reached_is_one_line(delta: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "create_repo", fail)
    with pytest.raises(ToolError, match="me/delta: cannot be uploaded: no route"):
        publish("me/delta", delta)
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(ToolError, match=r"README\.md cannot be read from the hub: no route"):
        publish("me/delta", delta)
    with pytest.raises(ToolError, match="org/name"):
        publish("no name", delta)


def test_a_card_that_cannot_be_read_is_not_replaced(delta: Path, hub: Hub) -> None:
    hub.held = {"README.md": "---\n: [\n---\ntext"}
    with pytest.raises(ToolError, match=r"README\.md: its front matter"):
        publish("me/delta", delta)
    assert hub.calls == []


def test_a_revision_from_the_file_cannot_leave_its_code_block(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    revision = "main'\n```\n\n# Injected\n<script>[click](https://evil)\u202e\n```sh\n'"
    base = pxd.Identity(id="org/base", revision=revision)
    with pxd.DeltaWriter(tmp_path / "d.pxd", base=base, fine_tuned=pxd.Identity(id="https://evil www.evil")) as writer:
        writer.add(sign_module(rng, "a.weight", random_storage(rng, (16, 24))))
        writer.finish()
    publish("me/delta", [tmp_path / "d.pxd"], dry_run=tmp_path / "repo")
    card = (tmp_path / "repo" / "README.md").read_text()
    for part in ("# Injected", "<script>", "evil)", "\u202e", "https://evil", "www.evil"):
        assert part not in card, part
