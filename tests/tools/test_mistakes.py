"""Mistakes that users make end in one error; none of them ends in a wrong result."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.chain import update
from peraxis_tools.cli import cli
from peraxis_tools.compress import CompressOptions, OptionError, compress
from peraxis_tools.convert import to_lora
from peraxis_tools.deltas.content_ids import parse_content_ids
from peraxis_tools.diff import diff, diff_checkpoint
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.merge import Mixture, merge
from peraxis_tools.split import split
from tests.factories import write_checkpoint, write_delta
from tests.tools.test_chain import start, stepped

NORM = "model.norm.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """base and tuned, whose norm changed too."""
    tensors = start()
    tuned = stepped(tensors, 1, wild=0)
    tuned[NORM] = tuned[NORM][0] + np.float32(0.5), pxd.DType.F32
    for name, its in (("base", tensors), ("tuned", tuned), ("other", stepped(tensors, 2, wild=0))):
        write_checkpoint(tmp_path / name, its)
    return tmp_path / "base", tmp_path / "tuned"


def test_every_verb_that_reads_weights_of_the_base_refuses_another_base(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    other = tmp_path / "other"
    files = [compress(base, tuned, tmp_path / f"{masks}.pxd", masks=masks, force=True).path for masks in (1, 2)]
    ties = Mixture(method="ties", density=0.5)
    merge(files, tmp_path / "right.pxd", weights=[1, 1], mixture=ties, masks=2, base=base)
    diff_checkpoint(files[0], tuned, base=base)
    for attempt in (
        lambda: merge(files, tmp_path / "wrong.pxd", weights=[1, 1], mixture=ties, masks=2, base=other),
        lambda: diff_checkpoint(files[0], tuned, base=other),
        lambda: diff(files[0], files[1], base=other),
        lambda: to_lora(files[0], tmp_path / "lora", rank=2, base=other),
    ):
        with pytest.raises(pxd.BindingError, match="E404"):
            attempt()
    assert not (tmp_path / "wrong.pxd").exists()


def test_diff_reads_both_files_even_if_their_manifests_are_equal(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = compress(*pair, tmp_path / "whole.pxd", force=True).path
    data = bytearray(whole.read_bytes())
    data[-70] ^= 1
    damaged = tmp_path / "damaged.pxd"
    damaged.write_bytes(data)
    for files in ((whole, damaged), (damaged, whole)):
        with pytest.raises(pxd.PayloadError):
            diff(*files)


def test_a_lora_of_exact_updates_holds_their_change(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    base, tuned = pair
    lossless = compress(base, tuned, tmp_path / "exact.pxd", exact=".*").path
    with pytest.raises(ToolError, match="need the base"):
        to_lora(lossless, tmp_path / "lora", rank=4)
    result = to_lora(lossless, tmp_path / "lora", max_error=0.01, base=base)
    assert {module.name for module in result.modules} >= {"model.layers.0.mlp.up_proj.weight"}
    assert all(module.rank > 0 and module.error <= 0.01 for module in result.modules)
    assert 0 < result.error < 0.02
    assert result.uncounted == 0


def test_an_expression_that_matches_nothing_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="matches no tensor"):
        compress(*pair, tmp_path / "d.pxd", exact="nomatch")
    assert not (tmp_path / "d.pxd").exists()


def test_a_recipe_with_a_fit_needs_a_text() -> None:
    with pytest.raises(OptionError, match="calibration"):
        CompressOptions.from_mapping({"recipe": "fit"})
    assert CompressOptions.from_mapping({}).resolved_fit == "none"
    assert CompressOptions.from_mapping({"recipe": "fit", "calibration": "c4"}).resolved_fit == "refined"


def test_an_update_that_returns_to_an_earlier_state_must_say_what_it_follows(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    first, second = tmp_path / "chain" / "1.pxd", tmp_path / "chain" / "2.pxd"
    first.parent.mkdir()
    update(base, tuned, first)
    with pytest.raises(CheckFailedError, match="--after"):
        update(tuned, base, second)
    assert not second.exists()
    update(base, base, second, after=[first])
    apply(base, [second, first], tmp_path / "back")


def test_a_state_of_another_model_is_not_applied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = pxd.lossless_module("foreign.weight", np.ones((8, 8), np.float32), pxd.DType.F32)
    anchor = write_delta(tmp_path / "anchor.pxd", [whole])
    with pytest.raises(CheckFailedError, match="another model"):
        apply(pair[0], anchor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_content_id_may_lack_its_prefix_and_nothing_else() -> None:
    digits = "ab" * 32
    assert parse_content_ids([digits, digits.upper(), f"sha256:{digits}"]) == (f"sha256:{digits}",) * 3
    for text in ("sha256:abc", digits[1:], f"md5:{digits}", ""):
        with pytest.raises(ToolError, match="not a content ID"):
            parse_content_ids([text])


def test_a_part_is_called_a_part(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = compress(*pair, tmp_path / "whole.pxd", force=True).path
    part = split(whole, tmp_path / "parts", parts=2).parts[0].path
    for verb in ("inspect", "verify"):
        shown = CliRunner().invoke(cli, [verb, str(part)]).output
        assert "a part with" in shown, verb


def test_a_file_that_is_no_pickle_is_not_a_pt_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for data in (b"hi\n", b"\x80\x02", pickle.dumps({1: 2})[:-3], b""):
        (tmp_path / "a.pt").write_bytes(data)
        done = CliRunner().invoke(cli, ["convert", str(tmp_path / "a.pt"), "--base", str(pair[0]), "-o", "x.pxd"])
        assert isinstance(done.exception, ToolError), data


def test_the_report_of_compress_counts_exact_modules(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["compress", *map(str, pair), "-o", str(tmp_path / "d.pxd"), "--json", "--force"])
    found = json.loads(result.stdout)
    assert found["encodings"]["full"] > 0
    assert sum(found["encodings"].values()) == found["module_count"]


def test_a_bad_tensor_of_the_base_is_the_fault_of_the_base(tmp_path: Path) -> None:
    good = {"w.weight": (np.ones((4, 4), np.float32), pxd.DType.F32)}
    write_checkpoint(tmp_path / "good", good)
    for name, tensor in (("w.weight", np.ones((0, 4), np.float32)), ("odd\u0007", np.ones(4, np.float32))):
        write_checkpoint(tmp_path / "bad", {**good, name: (tensor, pxd.DType.F32)})
        with pytest.raises(ToolError, match=r"^\S*/bad: tensor"):
            update(tmp_path / "bad", tmp_path / "good", tmp_path / "u.pxd")


def test_a_link_out_of_the_checkpoint_is_noted(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "blobs").mkdir()
    (pair[1] / "merges.txt").symlink_to(tmp_path / "secret.txt")
    (pair[1] / "inner.json").write_text("{}")
    (pair[1] / "vocab.json").symlink_to("inner.json")
    with caplog.at_level("INFO", logger="peraxis"):
        compress(*pair, tmp_path / "d.pxd", force=True)
    assert "merges.txt: is a link out of the checkpoint" in caplog.text
    assert "vocab.json" not in caplog.text
