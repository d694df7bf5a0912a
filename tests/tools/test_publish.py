"""`publish`: a card that says what the manifest says, in a folder or to a hub that is a double."""

from __future__ import annotations

import json
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


def test_a_dry_run_is_the_repository_in_a_folder(delta: Path, tmp_path: Path) -> None:
    with pxd.open(delta) as file:
        content_id = file.content_id
    (tmp_path / "delta.pxd.sig").write_text("{}")
    report = evaluation(tmp_path / "eval.json", content_id)
    arguments = ["me/delta", str(delta), "--dry-run", str(tmp_path / "repo"), "--evaluation", str(report)]
    done = CliRunner().invoke(command, [*arguments, "--license", "apache-2.0", "--json"])
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["url"] is None
    names = sorted(path.name for path in (tmp_path / "repo").iterdir())
    assert names == [".gitattributes", "README.md", "delta.pxd", "delta.pxd.sig"]
    assert (tmp_path / "repo" / "delta.pxd").read_bytes() == delta.read_bytes()
    card = (tmp_path / "repo" / "README.md").read_text()
    assert front_matter(card) == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "library_name": "peraxis",
        "tags": ["pxd", "delta", "1-bit"],
    }
    assert content_id in card
    assert "| chat | merged | 0.0123 | 95.0% | 9.5 | 9.1 |" in card
    assert "[link](http" not in card
    assert f"peraxis-tools verify delta.pxd --base org/base --expect-content-id {content_id}" in card


def test_an_evaluation_of_another_file_is_refused(delta: Path, tmp_path: Path) -> None:
    other = evaluation(tmp_path / "eval.json", "sha256:" + "0" * 64)
    with pytest.raises(ToolError, match="not of this file"):
        publish("me/delta", delta, evaluation=other, dry_run=tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_a_damaged_file_is_never_published(delta: Path, tmp_path: Path) -> None:
    data = bytearray(delta.read_bytes())
    data[-1] ^= 1
    delta.write_bytes(data)
    with pytest.raises(pxd.PayloadError):
        publish("me/delta", delta, dry_run=tmp_path / "repo")


def test_an_upload_is_one_commit_of_everything(delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, repository: str, **options: Any) -> None:
            calls.append(("create", (repository, options)))

        def create_commit(self, repository: str, operations: list[Any], **options: Any) -> Any:
            calls.append(("commit", ([operation.path_in_repo for operation in operations], options)))
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    result = publish("me/delta", delta, private=True)
    assert result.url == "https://hub/commit/1"
    assert calls[0] == ("create", ("me/delta", {"private": True, "exist_ok": True}))
    assert calls[1][1][0] == ["delta.pxd", "README.md", ".gitattributes"]


def test_a_hub_that_cannot_be_reached_is_one_line(delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Hub:
        def create_repo(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(ToolError, match="me/delta: cannot be uploaded: no route"):
        publish("me/delta", delta)
    with pytest.raises(ToolError, match="org/name"):
        publish("no name", delta)
