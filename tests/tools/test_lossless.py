"""Exact tensors in every verb: compress --exact, inspect, verify --base, diff, merge, split."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.cli import cli
from peraxis_tools.compress import CompressOptions, OptionError, compress
from peraxis_tools.diff import diff, diff_checkpoint
from peraxis_tools.errors import ToolError
from peraxis_tools.merge import merge, merge_parts
from peraxis_tools.split import split
from peraxis_tools.verify import verify
from tests.factories import write_checkpoint
from tests.tools.test_chain import Tensors, assert_holds, start, stepped

EVERYTHING = ".*"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Tensors]:
    """base and tuned, one training step later with a larger vocabulary, a new tensor and a removed tensor."""
    base = start()
    tuned = stepped(base, 1, wild=0)
    rows, dtype = tuned["model.embed_tokens.weight"]
    tuned["model.embed_tokens.weight"] = np.concatenate([rows, rows[:3]]), dtype
    tuned["model.new.weight"] = np.ones((4, 4), np.float32), pxd.DType.F32
    base["model.old.weight"] = np.ones(4, np.float32), pxd.DType.F32
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    return tmp_path / "base", tmp_path / "tuned", tuned


def encodings(path: Path) -> dict[str, str]:
    with pxd.open(path) as delta:
        return {entry.name: entry.encoding.value for entry in delta.manifest.modules}


def test_any_pair_goes_losslessly_into_a_file_and_comes_back_bit_for_bit(
    pair: tuple[Path, Path, Tensors], tmp_path: Path
) -> None:
    base, tuned, tensors = pair
    result = compress(base, tuned, tmp_path / "a.pxd", exact=EVERYTHING)
    assert encodings(result.path) == {
        "model.embed_tokens.weight": "exact",
        "model.layers.0.mlp.up_proj.weight": "exact",
        "model.layers.0.self_attn.q_proj.weight": "exact",
        "model.norm.weight": "same",
        "position_ids": "same",
        "model.new.weight": "full",
    }
    assert result.encodings == {"exact": 3, "full": 1, "same": 2}
    apply(base, result.path, tmp_path / "out")
    assert_holds(tmp_path / "out", tensors)


def test_a_group_is_exact_beside_signs(pair: tuple[Path, Path, Tensors], tmp_path: Path) -> None:
    base, tuned, tensors = pair
    result = compress(base, tuned, tmp_path / "a.pxd", exact="up_proj|norm")
    found = encodings(result.path)
    assert (found["model.layers.0.mlp.up_proj.weight"], found["model.layers.0.self_attn.q_proj.weight"]) == (
        "exact",
        "sign",
    )
    apply(base, result.path, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as out:
        name = "model.layers.0.mlp.up_proj.weight"
        assert out.tensors.read(name).tobytes() == tensors[name][0].tobytes()


def test_auto_takes_exact_where_it_is_smaller_than_signs(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    base = start()
    tuned = dict(base)
    for name, share in (("model.layers.0.mlp.up_proj.weight", 0.002), ("model.embed_tokens.weight", 1.0)):
        words = base[name][0].copy()
        words[random.random(words.shape) < share] += 1
        tuned[name] = words, base[name][1]
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    found = encodings(compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a.pxd", exact="auto", masks=1).path)
    assert found["model.layers.0.mlp.up_proj.weight"] == "exact"
    assert found["model.layers.0.self_attn.q_proj.weight"] == "same"
    plain = compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "b.pxd", masks=1)
    assert "exact" not in encodings(plain.path).values()
    assert (tmp_path / "a.pxd").stat().st_size < plain.bytes


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"exact": "("}, "not a regular expression"),
        ({"exact": "norm", "target_ratio": 12.0}, "exclude each other"),
        ({"exact": EVERYTHING, "calibration": "c4"}, "needs no text"),
        ({"exact": EVERYTHING, "masks": 2}, "masks does nothing in a lossless file"),
        ({"exact": EVERYTHING, "axis": "row"}, "axis does nothing in a lossless file"),
    ],
)
def test_options_that_do_not_go_together_are_refused(choices: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CompressOptions.from_mapping(dict(choices))


def test_verify_holds_results_to_their_digests(pair: tuple[Path, Path, Tensors], tmp_path: Path) -> None:
    base, tuned, _ = pair
    path = compress(base, tuned, tmp_path / "a.pxd", exact=EVERYTHING).path
    verify(path, base=base)
    done = CliRunner().invoke(cli, ["verify", str(path), "--base", str(base)])
    assert done.exit_code == 0
    assert "3 exact updates have the right results" in done.output
    bad = tmp_path / "bad.pxd"
    name = "model.layers.0.self_attn.q_proj.weight"
    # A writer gives a false result. The file is intact, and only a check with the base finds it.
    with (
        pxd.open(path) as delta,
        pxd.DeltaWriter(bad, base=pxd.Identity(id="a"), fine_tuned=pxd.Identity(id="b")) as writer,
    ):
        module = delta.load(name)
        writer.add(pxd.ModuleDelta(**{**{f: getattr(module, f) for f in module.__slots__}, "result": "0" * 64}))
        writer.finish()
    verify(bad)
    with pytest.raises(pxd.PxdError, match=rf"E405: .*bad\.pxd: .*\(at {name}, "):
        verify(bad, base=base)


def test_diff_sees_exact_updates_with_the_base_and_says_that_it_needs_it(
    pair: tuple[Path, Path, Tensors], tmp_path: Path
) -> None:
    base, tuned, _ = pair
    a = compress(base, tuned, tmp_path / "a.pxd", exact=EVERYTHING).path
    b = compress(base, tuned, tmp_path / "b.pxd").path
    found = diff_checkpoint(a, tuned, base=base)
    assert found.equal
    assert found.total.relative == 0.0
    against = diff(a, b, base=base)
    assert not against.equal
    assert any(module.distance for module in against.modules)
    with pytest.raises(ToolError, match=r"pass base \(--base\)"):
        diff(a, b)
    assert diff(a, a).equal


def test_merge_rebuilds_exact_updates_from_the_base(pair: tuple[Path, Path, Tensors], tmp_path: Path) -> None:
    base, tuned, tensors = pair
    a = compress(base, tuned, tmp_path / "a.pxd", exact=EVERYTHING).path
    b = compress(base, tuned, tmp_path / "b.pxd", embeddings="full").path
    with pytest.raises(ToolError, match=r"pass base \(--base\)"):
        merge([a, b], tmp_path / "m.pxd", weights=(0.5, 0.5))
    merge([a, b], tmp_path / "m.pxd", weights=(1.0, 0.0), base=base)
    apply(base, tmp_path / "m.pxd", tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as out:
        name = "model.layers.0.mlp.up_proj.weight"
        assert out.tensors.read(name).tobytes() == tensors[name][0].tobytes()


def test_parts_of_a_lossless_file_are_joined_byte_for_byte(pair: tuple[Path, Path, Tensors], tmp_path: Path) -> None:
    base, tuned, _ = pair
    path = compress(base, tuned, tmp_path / "a.pxd", exact=EVERYTHING).path
    parts = split(path, tmp_path / "parts", parts=3).parts
    merge_parts([part.path for part in reversed(parts)], tmp_path / "whole.pxd")
    assert (tmp_path / "whole.pxd").read_bytes() == path.read_bytes()


def test_inspect_shows_result_and_predecessor(pair: tuple[Path, Path, Tensors], tmp_path: Path) -> None:
    base, tuned, _ = pair
    path = compress(base, tuned, tmp_path / "a.pxd", exact=EVERYTHING).path
    for view in ([], ["--modules"], ["--tree"], ["--html", str(tmp_path / "a.html")]):
        assert CliRunner().invoke(cli, ["inspect", str(path), *view]).exit_code == 0, view
    done = CliRunner().invoke(cli, ["inspect", str(path)])
    with pxd.open(path) as delta:
        assert f"result       {delta.manifest.result}" in done.output.replace("\n", "") or delta.manifest.result is None
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(path), "--json"]).stdout)
    assert {share["label"] for share in found["by_encoding"]} == {"exact", "same", "full"}


def test_a_live_model_becomes_what_an_exact_file_was_made_of(pair: tuple[Path, Path, Tensors], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from peraxis_format.ops.tensors import from_storage, storage_array
    from peraxis_format.torch import apply_
    from peraxis_tools.checkpoints.checkpoint import open_checkpoint

    base, tuned, _ = pair
    with open_checkpoint(base) as before, open_checkpoint(tuned) as after:
        names = [n for n in before.tensors if n in after.tensors and before.tensors[n].shape == after.tensors[n].shape]
        kinds = {name: before.tensors[name].dtype for name in names}
        names = [name for name in names if after.tensors[name].dtype is kinds[name]]
        old = {name: (before.tensors.read(name), kinds[name]) for name in names}
        new = {name: (after.tensors.read(name), kinds[name]) for name in names}
    folders = write_checkpoint(tmp_path / "old", old), write_checkpoint(tmp_path / "new", new)
    path = compress(*folders, tmp_path / "a.pxd", exact=EVERYTHING).path
    with pxd.open(path) as delta:
        assert any(entry.encoding is pxd.Encoding.EXACT for entry in delta.manifest.modules)
    live = {name: from_storage(array.copy(), kind) for name, (array, kind) in old.items()}
    apply_(live, path)
    for name, tensor in live.items():
        assert storage_array(tensor).tobytes() == new[name][0].tobytes()


def test_the_writer_is_told_what_to_prefer_and_says_how_the_blocks_are_stored(
    pair: tuple[Path, Path, Tensors], tmp_path: Path
) -> None:
    base, tuned, tensors = pair
    small = compress(base, tuned, tmp_path / "small.pxd", exact=EVERYTHING)
    fast = compress(base, tuned, tmp_path / "fast.pxd", exact=EVERYTHING, prefer="speed")
    assert (small.prefer, fast.prefer) == ("size", "speed")
    assert small.blocks["keyed"] == 3
    assert "keyed" not in fast.blocks
    assert sum(small.blocks.values()) == sum(fast.blocks.values()) == 3
    assert small.bytes < fast.bytes
    for result in (small, fast):
        found: Counter[str] = Counter()
        with pxd.open(result.path) as delta:
            for name in delta:
                index = delta.load(name).index
                for entry in [] if index is None else index.tolist():
                    mode, length = entry & 255, entry >> 8
                    found["raw" if mode == 255 else "keyed" if mode else "gaps" if length else "unchanged"] += 1
        assert found == result.blocks
        apply(base, result.path, tmp_path / "out", overwrite=True)
        assert_holds(tmp_path / "out", tensors)
    config = {"exact": EVERYTHING, "prefer": "speed"}
    with pxd.open(fast.path) as delta:
        stored = json.loads(delta.manifest.metadata["peraxis.config"])
    assert CompressOptions.from_mapping(stored) == CompressOptions.from_mapping(config)
    with pytest.raises(OptionError, match="prefer does nothing without exact"):
        CompressOptions(prefer="speed")
    with pytest.raises(OptionError, match="choose one of size, speed"):
        CompressOptions(exact=EVERYTHING, prefer="fast")  # type: ignore[arg-type]


def test_the_command_says_what_was_chosen(pair: tuple[Path, Path, Tensors], tmp_path: Path) -> None:
    base, tuned, _ = pair
    arguments = [str(base), str(tuned), "-q", "--prefer", "speed", "-o"]
    for verb in (["compress", "--exact=.*"], ["update"]):
        done = CliRunner().invoke(cli, [*verb, *arguments, str(tmp_path / f"{verb[0]}.pxd")])
        assert done.exit_code == 0, (done.output, done.exception)
        assert re.search(r"blocks +\d gaps.*; written for speed", done.output)
