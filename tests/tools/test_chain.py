"""Chains of updates are exact, and gaps, forks, repetitions and foreign updates are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.chain import ChainState, chain_order, compact, link_of, log, update
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.cli import cli
from peraxis_tools.errors import CheckFailedError, ToolError
from tests.factories import write_checkpoint

Tensors = dict[str, tuple[np.ndarray, pxd.DType]]


def start(seed: int = 0) -> Tensors:
    random = np.random.default_rng(seed)

    def weights(shape: tuple[int, ...], dtype: pxd.DType) -> tuple[np.ndarray, pxd.DType]:
        return pxd.from_float32((random.standard_normal(shape) * 0.02).astype(np.float32), dtype), dtype

    return {
        "model.embed_tokens.weight": weights((96, 64), pxd.DType.BF16),
        "model.layers.0.mlp.up_proj.weight": weights((300, 64), pxd.DType.BF16),
        "model.layers.0.self_attn.q_proj.weight": weights((64, 64), pxd.DType.F16),
        "model.norm.weight": weights((64,), pxd.DType.F32),
        "position_ids": (np.arange(9, dtype=np.int64), pxd.DType.I64),
    }


def stepped(tensors: Tensors, seed: int, *, wild: int = 2) -> Tensors:
    """Return a step of training: some weights change by one unit, `wild` weights become random, one tensor stays."""
    random = np.random.default_rng(seed)
    after = {}
    for name, (array, dtype) in tensors.items():
        words = array.copy().reshape(-1).view(f"u{dtype.itemsize}")
        if dtype.is_float and name != "model.norm.weight":
            words[random.random(words.size) < 0.05] += 1
            words[random.integers(0, words.size, wild)] = random.integers(0, 1 << 16, wild).astype(words.dtype)
        after[name] = words.view(array.dtype).reshape(array.shape), dtype
    return after


@pytest.fixture
def chain(tmp_path: Path) -> tuple[list[Path], list[Tensors]]:
    """The folders state-0 to state-4 and the files updates/step-1.pxd to step-4.pxd."""
    states = [start()]
    for seed in range(1, 5):
        states.append(stepped(states[-1], seed))
    (tmp_path / "updates").mkdir()
    files: list[Path] = []
    for i, state in enumerate(states):
        write_checkpoint(tmp_path / f"state-{i}", state)
        if i:
            files.append(tmp_path / "updates" / f"step-{i}.pxd")
            update(tmp_path / "state-0", tmp_path / f"state-{i}", files[-1], after=files[:-1])
    return files, states


def assert_holds(folder: Path, state: Tensors) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(state)
        for name, (array, dtype) in state.items():
            assert checkpoint.tensors[name].dtype is dtype
            assert checkpoint.tensors.read(name).tobytes() == array.tobytes()


@pytest.mark.parametrize("rows", [40, 128])
def test_a_vocabulary_that_is_resized_and_otherwise_the_same_leaves_the_chain_whole(tmp_path: Path, rows: int) -> None:
    states = [start(), start(), start(1)]
    table, dtype = start()["model.embed_tokens.weight"]
    states[1]["model.embed_tokens.weight"] = (np.resize(table, (rows, 64)), dtype)
    states[2]["model.embed_tokens.weight"] = states[1]["model.embed_tokens.weight"]
    folders = [write_checkpoint(tmp_path / f"s{i}", state) for i, state in enumerate(states)]
    first = update(folders[0], folders[1], tmp_path / "1.pxd")
    assert first.result
    update(folders[0], folders[2], tmp_path / "2.pxd", after=[tmp_path / "1.pxd"])
    apply(folders[0], [tmp_path / "1.pxd", tmp_path / "2.pxd"], tmp_path / "out")
    assert_holds(tmp_path / "out", states[2])


def test_a_chain_given_in_any_order_is_applied_to_the_last_state(
    chain: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    files, states = chain
    apply(tmp_path / "state-0", [files[i] for i in (2, 0, 3, 1)], tmp_path / "out")
    assert_holds(tmp_path / "out", states[4])
    apply(tmp_path / "state-0", files[:2], tmp_path / "half")
    assert_holds(tmp_path / "half", states[2])
    apply(tmp_path / "half", files[2:], tmp_path / "rest")
    assert_holds(tmp_path / "rest", states[4])


def test_results_are_what_the_next_base_is(chain: tuple[list[Path], list[Tensors]]) -> None:
    links = [link_of(path) for path in chain[0]]
    assert [link.previous for link in links[1:]] == [link.content_id for link in links[:-1]]
    assert [link.base for link in links[1:]] == [link.result for link in links[:-1]]
    assert chain_order(reversed(links)) == links


def test_an_update_is_smaller_than_what_changed_and_stores_no_tensor_that_did_not(
    chain: tuple[list[Path], list[Tensors]],
) -> None:
    with pxd.open(chain[0][1]) as delta:
        assert {entry.name: entry.encoding for entry in delta.manifest.modules} == {
            "model.embed_tokens.weight": pxd.Encoding.EXACT,
            "model.layers.0.mlp.up_proj.weight": pxd.Encoding.EXACT,
            "model.layers.0.self_attn.q_proj.weight": pxd.Encoding.EXACT,
            "model.norm.weight": pxd.Encoding.SAME,
            "position_ids": pxd.Encoding.SAME,
        }
        assert delta.size - delta.header_size < 3000


@pytest.mark.parametrize(
    ("left_out", "message"),
    [((1,), "step-3.pxd: a gap; update sha256:"), ((0,), None), ((0, 2), r"step-[24].pxd: a gap")],
)
def test_a_gap_is_refused_by_name(
    chain: tuple[list[Path], list[Tensors]], tmp_path: Path, left_out: tuple[int, ...], message: str | None
) -> None:
    given = [path for i, path in enumerate(chain[0]) if i not in left_out]
    if message is None:  # a valid chain of another base
        with pytest.raises(pxd.PxdError, match=r"E404: .*step-2\.pxd: .*\(at "):
            apply(tmp_path / "state-0", given, tmp_path / "out")
    else:
        with pytest.raises(CheckFailedError, match=message):
            apply(tmp_path / "state-0", given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_updates_without_those_before_them_name_the_one_that_they_follow(
    chain: tuple[list[Path], list[Tensors]], tmp_path: Path, count: int
) -> None:
    late = chain[0][1 : 1 + count]
    with (
        pxd.open(late[0]) as file,
        pytest.raises(pxd.PxdError, match=f"E404.*follows update {file.manifest.previous} "),
    ):
        apply(tmp_path / "state-0", late, tmp_path / "out")


def test_a_fork_a_repetition_and_a_foreign_update_are_refused_by_name(
    chain: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    files, states = chain
    write_checkpoint(tmp_path / "other", stepped(states[2], 77))
    update(tmp_path / "state-0", tmp_path / "other", tmp_path / "fork.pxd", after=files[:2])
    with pytest.raises(CheckFailedError, match=r"fork.pxd and .*step-3.pxd: a fork; both follow .*step-2.pxd"):
        chain_order(link_of(path) for path in [*files, tmp_path / "fork.pxd"])
    (tmp_path / "copy.pxd").write_bytes(files[1].read_bytes())
    with pytest.raises(CheckFailedError, match=r"copy.pxd: is the same update as .*step-2.pxd"):
        chain_order(link_of(path) for path in [*files, tmp_path / "copy.pxd"])
    write_checkpoint(tmp_path / "else", start(9))
    write_checkpoint(tmp_path / "else-1", stepped(start(9), 1))
    update(tmp_path / "else", tmp_path / "else-1", tmp_path / "foreign.pxd")
    with pytest.raises(CheckFailedError, match=r"foreign.pxd: a gap|step-1.pxd: a gap"):
        chain_order(link_of(path) for path in [*files, tmp_path / "foreign.pxd"])
    with pytest.raises(pxd.PxdError, match="E404"):
        apply(tmp_path / "state-0", tmp_path / "foreign.pxd", tmp_path / "out")
    with pytest.raises(pxd.PxdError, match="E404"):  # applied twice
        apply(tmp_path / "state-1", files[0], tmp_path / "out")


def test_a_delta_without_a_result_is_no_update(tmp_path: Path) -> None:
    with pxd.DeltaWriter(tmp_path / "a.pxd", base=pxd.Identity(id="a"), fine_tuned=pxd.Identity(id="b")) as writer:
        full = np.zeros(3, np.float32)
        writer.add(pxd.ModuleDelta(name="w", shape=(3,), dtype=pxd.DType.F32, encoding=pxd.Encoding.FULL, full=full))
        writer.finish()
    with pytest.raises(ToolError, match=r"a.pxd: has no result"):
        link_of(tmp_path / "a.pxd")


def test_a_state_that_comes_back_is_no_fork(chain: tuple[list[Path], list[Tensors]], tmp_path: Path) -> None:
    files, states = chain
    back = tmp_path / "updates" / "step-5.pxd"
    update(tmp_path / "state-0", tmp_path / "state-1", back, after=files)
    forth = tmp_path / "updates" / "step-6.pxd"
    update(tmp_path / "state-0", tmp_path / "state-4", forth, after=[*files, back])
    assert [link.path.name for link in chain_order(map(link_of, [forth, back, *files]))][-2:] == [
        "step-5.pxd",
        "step-6.pxd",
    ]
    apply(tmp_path / "state-0", [forth, back, *files], tmp_path / "out")
    assert_holds(tmp_path / "out", states[4])


def test_a_folded_chain_has_the_same_result_and_the_chain_goes_on_behind_it(
    chain: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    files, states = chain
    folded = compact(tmp_path / "state-0", files[:3], tmp_path / "updates" / "1-to-3.pxd")
    assert folded.result == link_of(files[2]).result
    assert folded.bytes < sum(path.stat().st_size for path in files[:3])
    apply(tmp_path / "state-0", [folded.path, files[3]], tmp_path / "out")
    assert_holds(tmp_path / "out", states[4])
    middle = compact(tmp_path / "state-1", files[1:3], tmp_path / "2-to-3.pxd")
    apply(tmp_path / "state-0", [files[3], middle.path, files[0]], tmp_path / "again")
    assert_holds(tmp_path / "again", states[4])
    found = log(tmp_path / "updates")
    assert [entry.name for entry in found.updates] == [path.name for path in files]
    assert [entry.name for entry in found.folded] == ["1-to-3.pxd"]
    changed = sum(
        int(np.count_nonzero(a.view(f"u{d.itemsize}") != states[1][name][0].view(f"u{d.itemsize}")))
        for name, (a, d) in states[0].items()
    )
    assert found.updates[0].changed == changed


def test_a_chain_is_not_folded_on_another_base(chain: tuple[list[Path], list[Tensors]], tmp_path: Path) -> None:
    with pytest.raises(pxd.PxdError, match="E404"):
        compact(tmp_path / "state-1", chain[0], tmp_path / "out.pxd")
    assert not (tmp_path / "out.pxd").exists()


def test_tensors_that_come_or_go_end_a_chain(chain: tuple[list[Path], list[Tensors]], tmp_path: Path) -> None:
    files, states = chain
    fewer = {name: tensor for name, tensor in states[4].items() if name != "position_ids"}
    write_checkpoint(tmp_path / "fewer", fewer)
    with pytest.raises(CheckFailedError, match="tensors were removed, or tied in another way"):
        update(tmp_path / "state-0", tmp_path / "fewer", tmp_path / "out.pxd", after=files)
    update(tmp_path / "state-4", tmp_path / "fewer", tmp_path / "out.pxd")
    apply(tmp_path / "state-4", tmp_path / "out.pxd", tmp_path / "out")
    assert_holds(tmp_path / "out", fewer)


def test_a_damaged_update_in_the_middle_is_refused(chain: tuple[list[Path], list[Tensors]], tmp_path: Path) -> None:
    files, _ = chain
    with pxd.open(files[1]) as delta:
        begin, end = delta.span("model.embed_tokens.weight")
    raw = bytearray(files[1].read_bytes())
    raw[end - 1] ^= 1
    files[1].write_bytes(raw)
    assert begin < end
    with pytest.raises(pxd.PxdError, match=r"E301.*step-2.pxd"):
        apply(tmp_path / "state-0", files, tmp_path / "out")


def test_a_state_reads_rows_and_digests_like_a_checkpoint(
    chain: tuple[list[Path], list[Tensors]], tmp_path: Path
) -> None:
    files, states = chain
    name = "model.layers.0.mlp.up_proj.weight"
    with open_checkpoint(tmp_path / "state-0") as base, pxd.open(files[0]) as first, pxd.open(files[1]) as second:
        state = ChainState(base.tensors, [first, second])
        with open_checkpoint(tmp_path / "state-2") as wanted:
            assert state.sha256(name) == wanted.tensors.sha256(name)
            assert state.size == wanted.tensors.size
            assert list(state) == list(wanted.tensors)
        assert state.read(name, slice(3, 5)).tobytes() == states[2][name][0][3:5].tobytes()


def test_the_verbs_speak_of_chains(chain: tuple[list[Path], list[Tensors]], tmp_path: Path) -> None:
    run = CliRunner()
    done = run.invoke(cli, ["log", str(tmp_path / "updates"), "--json"])
    assert [entry["name"] for entry in json.loads(done.stdout)["updates"]] == [path.name for path in chain[0]]
    arguments = ["update", str(tmp_path / "state-0"), str(tmp_path / "state-2"), "--after", str(chain[0][0])]
    done = run.invoke(cli, [*arguments, "-o", str(tmp_path / "x.pxd"), "--quiet", "--prefer", "speed"])
    assert done.exit_code == 0, done.output
    assert link_of(tmp_path / "x.pxd").result == link_of(chain[0][1]).result
    done = run.invoke(cli, ["apply", str(tmp_path / "state-0"), *map(str, chain[0]), "-o", str(tmp_path / "o"), "-q"])
    assert done.exit_code == 0, done.output
    assert_holds(tmp_path / "o", chain[1][4])


@pytest.mark.parametrize(("bits", "count"), [(0x7FC0, 1), (0xFF80, 1), (0x7F7F, 0)])  # NaN, -infinity, the largest
def test_an_update_says_that_weights_are_not_finite(
    bits: int, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, (old, new) = "model.embed_tokens.weight", (start(), start())
    new[name][0].reshape(-1).view(np.uint16)[7] = bits
    write_checkpoint(tmp_path / "old", old)
    write_checkpoint(tmp_path / "new", new)
    update(tmp_path / "old", tmp_path / "new", tmp_path / "step-1.pxd")
    told = [message for message in caplog.messages if f"{name} has NaN or infinite weights (1)" in message]
    assert len(told) == count
