"""A delta that saves little needs --force. The size of the whole file counts, before the work and after writing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peraxis_tools.compress import CompressOptions, Plan, compress
from peraxis_tools.compress.run.dry_run import estimate_run
from peraxis_tools.errors import ToolError

NAME = "model.layers.{}.mlp.up_proj.weight"


def pair(folder: Path, width: int, dtype: torch.dtype = torch.bfloat16, scales: bool = False) -> tuple[Path, Path]:
    """Write two matrices in which every weight changes. Returns (base, fine-tuned)."""
    generator = torch.Generator().manual_seed(width)
    made = []
    for name in ("base", "tuned"):
        tensors = {NAME.format(i): torch.randn((width, width), generator=generator).to(dtype) for i in range(2)}
        if scales:
            tensors |= {f"{key}_scale_inv": torch.ones(1, 1) for key in list(tensors)}
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        made.append(folder / name)
    return made[0], made[1]


@pytest.mark.parametrize("options", [{"fit": "none"}, {"fit": "none", "target_size": 1 << 13}])
def test_a_checkpoint_so_small_that_the_header_eats_the_saving_is_refused_before_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, object]
) -> None:
    base, tuned = pair(tmp_path, 32)
    plans: list[Plan] = []
    with pytest.raises(
        ToolError, match=r"would take \d{4} of 4096 bytes: .*(header and files|the target).*, or pass force"
    ):
        compress(base, tuned, tmp_path / "d.pxd", show_plan=plans.append, **options)
    assert plans == []
    assert [path.name for path in tmp_path.iterdir() if path not in (base, tuned)] == []
    with caplog.at_level(logging.WARNING, "peraxis"):
        result = compress(base, tuned, tmp_path / "d.pxd", force=True, show_plan=plans.append, **options)
    assert result.bytes == plans[0].file_bytes
    assert sum("would take" in record.getMessage() for record in caplog.records) == 1


def test_what_is_written_is_held_to_the_same(tmp_path: Path) -> None:
    """The folder gets a tokenizer of one megabyte after the plan is shown."""
    base, tuned = pair(tmp_path, 256)

    def grow(_: Plan) -> None:
        (tuned / "tokenizer.json").write_text(json.dumps("x" * 1_000_000))

    with pytest.raises(ToolError, match=r"would take 10\d+ of 262144 bytes: .*header and files"):
        compress(base, tuned, tmp_path / "d.pxd", fit="none", show_plan=grow)
    assert not (tmp_path / "d.pxd").exists()
    assert compress(base, tuned, tmp_path / "d.pxd", fit="none", force=True).bytes > 1_000_000


@pytest.mark.parametrize("side", [0, 1])
def test_a_quantised_pair_is_refused_with_its_reason_and_remedy(tmp_path: Path, side: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = pair(tmp_path / "a", 256)
    small = pair(tmp_path / "b", 256, torch.float8_e4m3fn, scales=True)
    given = (small[0], plain[1]) if side == 0 else (plain[0], small[1])
    said = "the base is quantised" if side == 0 else "the fine-tune is quantised"
    with pytest.raises(ToolError, match=rf"{said} \(FP8: .*; pass the unquantised .*, or pass force"):
        compress(*given, tmp_path / "d.pxd", fit="none")
    assert "sign" not in compress(*given, tmp_path / "d.pxd", fit="none", force=True).encodings


def test_a_lossless_delta_is_asked_for_whatever_it_takes(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, 32)
    assert compress(base, tuned, tmp_path / "d.pxd", fit="none", exact=".*").ratio < 1.25


def test_a_dry_run_says_that_the_run_needs_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = pair(tmp_path, 32)
    options = CompressOptions(fit="none")
    said = estimate_run(base, tuned, options=options)
    (told,) = (record.message for record in caplog.records if "refused without force" in record.message)
    assert f"would take {said.bytes} of 4096 bytes" in told
    caplog.clear()
    estimate_run(base, tuned, options=options, force=True)
    assert not any("force" in record.message for record in caplog.records)


def test_weights_that_a_small_target_leaves_at_the_base_are_noted_with_their_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = pair(tmp_path, 256)
    for size, noted in ((14_000, True), (30_000, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "peraxis"):
            compress(base, tuned, tmp_path / f"{size}.pxd", target_size=size)
        share = [record.getMessage() for record in caplog.records if "stay as in the base" in record.getMessage()]
        assert [text.startswith("50% of the weights in matrices") for text in share] == [True] * noted
