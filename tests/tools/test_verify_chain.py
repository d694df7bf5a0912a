"""The updates of a chain are verified together: each on the state after those before it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import peraxis
import peraxis_format as pxd
from peraxis_tools.cli import cli
from peraxis_tools.errors import CheckFailedError
from peraxis_tools.verify_files import Status
from tests.factories import write_checkpoint
from tests.tools.test_chain import start, stepped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base, one, two and other; a chain of two updates on base."""
    first = start()
    second = stepped(first, 1, wild=0)
    for name, its in (
        ("base", first),
        ("one", second),
        ("two", stepped(second, 2, wild=0)),
        ("other", stepped(first, 3, wild=0)),
    ):
        write_checkpoint(tmp_path / name, its)
    (tmp_path / "chain").mkdir()
    peraxis.update(tmp_path / "base", tmp_path / "one", tmp_path / "chain" / "1.pxd")
    peraxis.update(tmp_path / "base", tmp_path / "two", tmp_path / "chain" / "2.pxd", after=tmp_path / "chain")
    return tmp_path


def verify(folder: Path, *names: str, base: str) -> tuple[int, str]:
    found = CliRunner().invoke(cli, ["verify", *(str(folder / name) for name in names), "--base", str(folder / base)])
    return found.exit_code, " ".join(found.output.split())


def test_a_chain_is_verified_on_its_base_in_any_order(folder: Path) -> None:
    for names in (("chain",), ("chain/2.pxd", "chain/1.pxd")):
        code, said = verify(folder, *names, base="base")
        assert code == 0
        assert "base is the one that this delta was made for" in said
        assert "follows 1.pxd, whose result is the one that it was made for" in said
        assert "2 of 2 verified" in said


def test_a_chain_on_another_base_fails_as_a_whole(folder: Path) -> None:
    code, said = verify(folder, "chain", base="other")
    assert code == 1
    assert said.count("base tensor with other bytes") == 2
    assert "pass that update too" not in said


def test_an_update_alone_names_the_one_before_it(folder: Path) -> None:
    code, said = verify(folder, "chain/2.pxd", base="base")
    assert code == 1
    assert "it follows update sha256:" in said
    assert verify(folder, "chain/2.pxd", base="one")[0] == 0


def test_an_update_whose_predecessor_is_damaged_is_not_verified_on_it(folder: Path) -> None:
    path = folder / "chain" / "1.pxd"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, said = verify(folder, "chain", base="base")
    assert code == 1
    assert "0 of 2 verified" in said


def test_a_whole_state_says_that_it_has_no_base(folder: Path) -> None:
    import torch

    state = {name: torch.ones(array.shape) for name, (array, _) in start().items()}
    peraxis.UpdateWriter(state, folder / "anchors").step()
    code, said = verify(folder, "anchors", base="base")
    assert code == 0
    assert "holds whole tensors and needs no base" in said


def test_each_update_of_a_long_chain_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = start()
    for step in range(9):
        write_checkpoint(tmp_path / f"{step}", state)
        state = stepped(state, step, wild=0)
    publish(tmp_path, 8)
    loads, load = Counter[tuple[Path, str]](), pxd.DeltaFile.load
    hashed, sha256 = Counter[str](), pxd.Safetensors.sha256

    def counted_load(self: pxd.DeltaFile, name: str) -> pxd.ModuleDelta:
        loads[self.path, name] += 1
        return load(self, name)

    def counted_sha256(self: pxd.Safetensors, name: str, **options: Any) -> str:
        hashed[name] += 1
        return sha256(self, name, **options)

    monkeypatch.setattr(pxd.DeltaFile, "load", counted_load)
    monkeypatch.setattr(pxd.Safetensors, "sha256", counted_sha256)
    monkeypatch.setattr(pxd.DeltaFile, "verify", lambda *_, **__: None)  # which loads each module to hash it
    code, said = verify(tmp_path, "chain", base="0")
    assert (code, said[-15:]) == (0, "8 of 8 verified")
    assert said.count("3 exact updates have the right results") == 8
    assert (len(loads), set(loads.values())) == (8 * 3, {1})
    assert (len(hashed), set(hashed.values())) == (len(state), {1})


def test_only_the_tensors_that_the_chain_changes_are_read_from_the_base(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, found = pxd.Safetensors.read, Counter[str]()

    def counted(self: pxd.Safetensors, name: str) -> pxd.Array:
        found[name] += 1
        return read(self, name)

    monkeypatch.setattr(pxd.Safetensors, "read", counted)
    assert peraxis.verify(five / "chain", base=five / "0").status is Status.PASSED
    with pxd.open(five / "chain" / "1.pxd") as file:
        changed = [entry.name for entry in file.manifest.modules if entry.encoding is pxd.Encoding.EXACT]
        assert len(changed) < len(file.manifest.modules)
    assert found == Counter(changed)


def forked(folder: Path) -> Path:
    """Add an update that follows 1.pxd, as 2.pxd does. Returns the folder of the chain."""
    peraxis.update(folder / "base", folder / "other", folder / "fork.pxd", after=[folder / "chain" / "1.pxd"])
    (folder / "fork.pxd").rename(folder / "chain" / "fork.pxd")
    return folder / "chain"


def test_both_updates_of_a_fork_and_a_chain_after_one_are_verified(folder: Path) -> None:
    """The chain after one of them has the result of the other, which so is no fork but a fold."""
    chain = forked(folder)
    after = [chain / "1.pxd", chain / "fork.pxd"]
    peraxis.update(folder / "base", folder / "two", chain / "back.pxd", after=after)
    code, said = verify(folder, "chain", base="base")
    assert (code, said.count("follows 1.pxd"), said.count("follows fork.pxd")) == (0, 2, 1)


def test_a_fork_fails_in_each_report_and_names_both_files_and_the_remedy(folder: Path) -> None:
    chain = forked(folder)
    reason = rf"{chain / 'fork.pxd'} and {chain / '2.pxd'}: a fork; both follow .*1\.pxd; leave one of them out, or"
    with pytest.raises(CheckFailedError, match=reason):
        peraxis.verify(chain)
    assert peraxis.verify(sorted(chain.iterdir()), base=folder / "base").status is Status.PASSED
    for options in (["-q"], ["--json"], ["--format", "junit"], ["--format", "sarif"], ["--format", "github"]):
        found = CliRunner().invoke(cli, ["verify", str(folder), *options])
        assert found.exit_code == 1
        assert re.search(r"2\.pxd: a fork; both follow .*leave one of them out", " ".join(found.output.split()))


def test_a_chain_without_an_update_in_its_middle_fails_without_a_base_too(five: Path) -> None:
    assert peraxis.verify(five / "chain").status is Status.PASSED
    (five / "chain" / "2.pxd").unlink()
    with pytest.raises(CheckFailedError, match=r"3\.pxd: a gap; update sha256:.* is missing in front of it"):
        peraxis.verify(five / "chain")
    found = CliRunner().invoke(cli, ["verify", str(five / "chain"), "--format", "sarif"])
    assert '"text": "Add the update that is missing; ' in found.output


def test_variants_of_one_base_side_by_side_are_no_fork_unless_they_have_the_names_of_steps(folder: Path) -> None:
    chain = folder / "chain"
    peraxis.update(folder / "base", folder / "two", folder / "variant.pxd")
    (chain / "2.pxd").unlink()
    (folder / "variant.pxd").rename(chain / "variant.pxd")
    assert peraxis.verify(chain, base=folder / "base").status is Status.PASSED
    (chain / "variant.pxd").rename(chain / "step-1.pxd")
    with pytest.raises(CheckFailedError, match="a fork; both were made on one state"):
        peraxis.verify(chain, base=folder / "base")


def test_whole_states_and_an_update_that_changes_nothing_are_no_chain_beside_variants(folder: Path) -> None:
    (folder / "releases").mkdir()
    for name, new in (("a", "one"), ("b", "two"), ("same", "base")):
        peraxis.update(folder / "base", folder / new, folder / f"{name}.pxd")
        (folder / f"{name}.pxd").rename(folder / "releases" / f"{name}.pxd")
    assert peraxis.verify(folder / "releases", base=folder / "base").status is Status.PASSED
    (folder / "whole").mkdir()
    for name in ("a", "b"):
        state = {"weight": torch.full((4,), float(ord(name)))}
        anchor = peraxis.UpdateWriter(state, folder / f"run-{name}").step().path
        Path(anchor).rename(folder / "whole" / f"{name}.pxd")
    assert peraxis.verify(folder / "whole").status is Status.PASSED


def test_a_folder_with_the_name_of_an_update_is_an_error(folder: Path) -> None:
    (folder / "chain" / "step-3.pxd").mkdir()
    code, said = verify(folder, "chain", base="base")
    assert code == 2
    assert "step-3.pxd: is a folder with the name of a file; move it away or rename it" in said


def test_a_chain_is_verified_on_the_state_in_its_middle_as_far_as_it_follows_from_it(folder: Path) -> None:
    code, said = verify(folder, "chain", base="one")
    assert code == 1
    assert "1 of 2 verified" in said
    assert "base is the one" not in said.partition("2.pxd")[0]


def test_a_wrong_result_in_the_chain_fails_this_update_and_those_after_it(folder: Path) -> None:
    write_checkpoint(folder / "three", stepped(stepped(stepped(start(), 1, wild=0), 2, wild=0), 3, wild=0))
    peraxis.update(folder / "base", folder / "three", folder / "chain" / "3.pxd", after=folder / "chain")
    path = folder / "chain" / "2.pxd"
    rewrite(path, result="0" * 64)
    code, said = verify(folder, "chain/1.pxd", "chain/2.pxd", base="base")
    assert (code, said.count("E405")) == (1, 1)
    assert "1 of 2 verified" in said


def test_the_updates_of_tied_tensors_are_verified(tmp_path: Path) -> None:
    states = [start()]
    for seed in (1, 2, 3):
        states.append(stepped(states[-1], seed, wild=0))
    for i, state in enumerate(states):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        write_checkpoint(tmp_path / f"{i}", state)
    publish(tmp_path, 3)
    with pxd.open(tmp_path / "chain" / "1.pxd") as first:
        assert first.manifest.tied
    code, said = verify(tmp_path, "chain", base="0")
    assert (code, said[-15:]) == (0, "3 of 3 verified")


def test_an_update_after_a_damaged_one_names_that_one_and_not_its_place(tmp_path: Path) -> None:
    states = [start()]
    for seed in (1, 2, 3):
        states.append(stepped(states[-1], seed, wild=0))
    for i, state in enumerate(states):
        write_checkpoint(tmp_path / f"{i}", state)
    publish(tmp_path, 3)
    second = tmp_path / "chain" / "2.pxd"
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    found = peraxis.verify(tmp_path / "chain", base=tmp_path / "0", keep_going=True)
    checks = [verdict.checks[-1] for verdict in found.files]
    assert [check.code for check in checks] == [None, "E301", "E301"]
    assert checks[1].offset is not None
    assert (checks[2].field, checks[2].offset) == (None, None)
    assert checks[2].message is not None
    assert re.match(r"after .*2\.pxd, which failed: ", checks[2].message)


@pytest.fixture
def five(tmp_path: Path) -> Path:
    """The folders 0 to 5, and a chain of five updates."""
    state = start()
    for step in range(6):
        write_checkpoint(tmp_path / f"{step}", state)
        state = stepped(state, step, wild=0)
    publish(tmp_path, 5)
    return tmp_path


def remedies(folder: Path) -> list[str | None]:
    found = peraxis.verify(folder / "chain", base=folder / "0", keep_going=True)
    return [verdict.checks[-1].remedy for verdict in found.files if verdict.path.endswith(".pxd")]


def test_every_update_after_a_missing_one_says_which_file_needs_it(five: Path) -> None:
    with pxd.open(five / "chain" / "2.pxd") as missing:
        follows = f"it follows update {missing.content_id}"
    wanted = f"{follows}: pass that update too, or the checkpoint after that update as the base"
    (five / "chain" / "2.pxd").unlink()
    third = five / "chain" / "3.pxd"
    assert remedies(five) == [None, wanted, f"{third}: {wanted}", f"{third}: {wanted}"]


def test_every_update_after_one_that_cannot_be_read_names_it(five: Path) -> None:
    second, third = five / "chain" / "2.pxd", five / "chain" / "3.pxd"
    second.write_bytes(second.read_bytes()[:-100])
    found = [found or "" for found in remedies(five)]
    assert f"(perhaps {second}, which cannot be read): pass that update too" in found[2]
    assert found[3:] == [f"{third}: {found[2]}"] * 2
    first = five / "chain" / "0.pxd"
    first.write_bytes(b"")
    assert f"(perhaps one of {first}, {second}, which cannot be read): pass" in (remedies(five)[3] or "")


def test_every_update_after_one_with_a_wrong_result_or_damage_has_the_remedy_of_that_one(five: Path) -> None:
    second = five / "chain" / "2.pxd"
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    found = remedies(five)
    assert found[1] == pxd.CODES["E301"].remedy
    assert found[2:] == [f"{second}: {found[1]}"] * 3
    data[-1] ^= 1
    second.write_bytes(data)
    rewrite(second, result="0" * 64)
    third = five / "chain" / "3.pxd"
    rewrite(third, previous=pxd.open(second).content_id)
    found = remedies(five)
    assert found[1] == (
        "fetch this update again; if the publisher's copy has this content ID, the publisher must write it again"
    )
    assert found[2] == f"{second}: {found[1]}"


def rewrite(path: Path, *, result: str | None = None, previous: str | None = None) -> None:
    """Write an update again, with a wrong result of one tensor or another predecessor."""
    with pxd.open(path) as file:
        modules = [file.load(entry.name) for entry in file.manifest.modules]
        manifest = file.manifest
    path.unlink()
    side = manifest.fine_tuned
    with pxd.DeltaWriter(
        path, base=side, fine_tuned=side, previous=previous or manifest.previous, chained=True
    ) as writer:
        for module in modules:
            wrong = result is not None and module.name.endswith("q_proj.weight")
            writer.add(replace(module, result=result) if wrong else module)
        writer.finish()


def publish(folder: Path, count: int) -> None:
    """Write the updates between the folders 0, 1, 2 ... into `chain`."""
    (folder / "chain").mkdir()
    for step in range(1, count + 1):
        after = sorted((folder / "chain").iterdir())
        peraxis.update(folder / "0", folder / f"{step}", folder / "chain" / f"{step}.pxd", after=after)


def test_releases_and_a_patch_of_one_lie_side_by_side(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "releases").mkdir()
    for old, new in (("base", "one"), ("one", "two"), ("base", "other")):
        peraxis.update(folder / old, folder / new, folder / f"{new}.pxd")
        (folder / f"{new}.pxd").rename(folder / "releases" / f"{new}.pxd")
    assert peraxis.verify(folder / "releases").status is Status.PASSED
    assert any("is not one chain" in message and "a fork" in message for message in caplog.messages)
