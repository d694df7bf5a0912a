"""compress --dry-run predicts the result and writes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import CliRunner

from peraxis_format import CheckpointError, DType
from peraxis_tools.cli import cli
from peraxis_tools.compress import CompressOptions, compress
from peraxis_tools.compress.plan.estimate import work_of
from peraxis_tools.compress.plan.plan import plan
from peraxis_tools.compress.plan.stage_work import SampleCounts, StageWork
from peraxis_tools.compress.run.dry_run import estimate_run
from tests.tools.compress_pairs import FEW, llama_config, llama_pair, write_pair, write_text


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return llama_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("masks", [1, 2])
def test_the_size_is_that_of_the_file_within_one_block(
    pair: tuple[Path, Path, Path], tmp_path: Path, masks: int
) -> None:
    base, tuned, _ = pair
    said = estimate_run(base, tuned, options=CompressOptions(masks=masks))
    made = compress(base, tuned, tmp_path / "d.pxd", masks=masks, force=True)
    assert abs(said.bytes - made.bytes) <= 4096
    assert (said.full_bytes, said.module_count, said.fit) == (made.full_bytes, made.module_count, made.fit)


@pytest.mark.parametrize("ratio", [1.5, 2.0])
def test_the_size_for_a_target_is_that_of_the_file(pair: tuple[Path, Path, Path], tmp_path: Path, ratio: float) -> None:
    base, tuned, _ = pair
    said = estimate_run(base, tuned, options=CompressOptions(target_ratio=ratio))
    made = compress(base, tuned, tmp_path / "d.pxd", target_ratio=ratio, force=True)
    assert abs(said.bytes - made.bytes) <= 4096
    assert said.bytes <= said.full_bytes / ratio


def test_a_dry_run_refuses_an_output_that_the_run_would_refuse(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, text = pair
    (tmp_path / "d.pxd").write_bytes(b"mine")
    command = ["compress", str(base), str(tuned), "--dry-run", "-o"]
    calibrated = [*command, str(text), "--overwrite", "--calibration", str(text)]
    assert "is an input" in str(CliRunner().invoke(cli, calibrated).exception)
    assert "standard error" in str(CliRunner().invoke(cli, [*command, "/dev/stderr"]).exception)
    for output, part in ((tmp_path / "d.pxd", "exists already"), (tmp_path / "no" / "d.pxd", "no such folder")):
        done = CliRunner().invoke(cli, [*command, str(output)])
        assert part in str(done.exception)
    assert CliRunner().invoke(cli, [*command, str(tmp_path / "d.pxd"), "--overwrite"]).exit_code == 0
    assert (tmp_path / "d.pxd").read_bytes() == b"mine"


def test_it_names_every_stage_of_a_fit_and_writes_nothing(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, text = pair
    before = sorted(path.name for path in text.parent.rglob("*"))
    arguments = [
        "compress",
        str(base),
        str(tuned),
        "-o",
        str(tmp_path / "d.pxd"),
        "--calibration",
        str(text),
        "--target-ratio",
        "2",
        "--distill-samples",
        "4",
    ]
    command = [sys.executable, "-m", "peraxis_tools", *arguments, "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["schema"] == "peraxis.compress-dry-run/1"
    assert [stage["name"] for stage in said["stages"]] == [
        "open",
        "generate",
        "sensitivity",
        "table",
        "blocks",
        "distill",
        "write",
    ]
    assert said["memory"] > max(stage["memory"] for stage in said["stages"]) > 0
    assert said["seconds"] == pytest.approx(sum(stage["seconds"] for stage in said["stages"]))
    assert not list(tmp_path.iterdir())
    assert sorted(path.name for path in text.parent.rglob("*")) == before


def test_without_a_text_it_needs_no_torch(pair: tuple[Path, Path, Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from peraxis_tools.compress.run.dry_run import estimate_run;"
        "from peraxis_tools.compress import CompressOptions;"
        f"estimate_run({str(pair[0])!r}, {str(pair[1])!r}, options=CompressOptions());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_no_pair_is_refused_as_in_a_run(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        estimate_run(tmp_path / "nothing", pair[1], options=CompressOptions())


def test_seconds_follow_from_the_work_and_what_was_measured() -> None:
    from peraxis_tools.compress.run.probe import Probe

    probe = Probe(token=0.5, step=0.1, draw=2.0, products=4.0, refine=True, loss=0.25)
    work = StageWork(name="any", memory=0, products=8.0, passes=6.0, steps=10, layers=3)
    assert probe.seconds(work) == pytest.approx(8 / 4 + 6 * 0.5 + 10 * (3 * 0.1 + 2.0))
    assert probe.seconds(StageWork(name="any", memory=0, losses=8.0)) == 2.0
    build, reduction = probe.trained(2)
    assert min(build, reduction) > 0
    trained = StageWork(name="any", memory=0, builds=((3, 2, 5.0),), reductions=((3, 2, 4.0),))
    assert probe.seconds(trained) == pytest.approx(3 * 5 * build + 3 * 4 * reduction)
    one = probe.fit(24, 16, 1)
    assert one > 0
    assert probe.seconds(StageWork(name="any", memory=0, matrices=((24, 16, 1),) * 5)) == pytest.approx(5 * one)


class _Tensor:
    def __init__(self, *shape: int) -> None:
        self.shape, self.dtype = shape, DType.BF16


def works(
    layers: int, text: SampleCounts, masks: int | Literal["auto"] = "auto", **given: float
) -> dict[str, StageWork]:
    tensors = {"model.embed_tokens.weight": _Tensor(512, 64), "lm_head.weight": _Tensor(512, 64)}
    for i in range(layers):
        tensors[f"model.layers.{i}.self_attn.q_proj.weight"] = _Tensor(64, 64)
        tensors[f"model.layers.{i}.mlp.down_proj.weight"] = _Tensor(64, 192)
    options = CompressOptions(calibration="c4", masks=masks, **given)  # type: ignore[arg-type]
    planned = plan(fine_tuned=tensors, base=tensors, options=options)
    return {work.name: work for work in work_of(planned, options, text)}


def test_blocks_take_time_by_the_layer_and_memory_by_the_token() -> None:
    text = SampleCounts(samples=8, generated=8, length=64, value_bytes=4)
    two, four = works(2, text), works(4, text)
    assert sorted(four["blocks"].matrices) == sorted(2 * two["blocks"].matrices)
    assert sorted(four["blocks"].sums) == sorted(2 * two["blocks"].sums)
    assert four["blocks"].passes == 2 * two["blocks"].passes
    assert four["blocks"].memory == two["blocks"].memory
    longer = works(2, SampleCounts(samples=24, generated=8, length=64, value_bytes=4))
    # Of one sample: hidden states of both sides; what q_proj and down_proj read, and what waits for them.
    states_and_inputs = 2 * 4 * 64 * 64 + 4 * 4 * 64 * (64 + 192)
    assert longer["blocks"].memory - two["blocks"].memory == 16 * states_and_inputs
    assert longer["blocks"].matrices == two["blocks"].matrices


def test_nothing_is_said_of_stages_that_will_not_be() -> None:
    found = works(2, SampleCounts(samples=8, generated=0, length=64, value_bytes=4))
    assert list(found) == ["plan", "table", "blocks", "write"]
    for masks in (1, 2):
        assert "plan" not in works(2, SampleCounts(samples=8, generated=0, length=64, value_bytes=4), masks=masks)


def test_trained_signs_take_the_bytes_of_their_latents() -> None:
    from peraxis_tools.compress.shared_sizes import BYTES_A_SIGN

    signs = 2 * 512 * 64 + 2 * (64 * 64 + 64 * 192)
    assert _distill(distill_sign_lr=0.05) - _distill() == BYTES_A_SIGN * signs


def _distill(**options: float) -> int:
    """The memory of the stage distill for two layers with one mask in each tensor."""
    text = SampleCounts(samples=8, generated=8, length=64, value_bytes=4, distilled=8)
    return works(2, text, masks=1, distill_samples=8, **options)["distill"].memory


def test_generated_samples_take_the_memory_of_a_batch_and_calibrate_by_the_share_of_the_text() -> None:
    texts = (SampleCounts(samples=8, generated=n, length=64, value_bytes=4, together=16) for n in (16, 64))
    few, many = (works(2, text) for text in texts)
    assert few["generate"].memory == many["generate"].memory
    assert few["generate"].steps * 4 == many["generate"].steps
    assert few["blocks"].passes < many["blocks"].passes
    text = SampleCounts(samples=8, generated=64, length=64, value_bytes=4, together=16, distilled=24)
    some = works(2, text, distill_samples=24)
    assert some["blocks"] == few["blocks"]  # a quarter of 64 samples


@pytest.mark.parametrize("tied", [False, True])
def test_a_distillation_builds_and_reduces_what_the_estimate_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    from peraxis_tools.compress.distill.parametrization import DeltaParametrization
    from peraxis_tools.compress.model import layerwise_model
    from peraxis_tools.compress.plan import estimate

    base, tuned = write_pair(tmp_path, llama_config(tie_word_embeddings=tied))
    text = write_text(tmp_path / "text.jsonl")
    options: dict[str, Any] = {**FEW, "masks": 2, "calibration": str(text), "distill_samples": 8, "held_out": 0.25}
    options["distill_epochs"] = 2
    force = options.pop("force")
    for module in (layerwise_model, estimate):
        monkeypatch.setattr(module, "LOGITS_BYTES", 4 * llama_config().vocab_size * 5)
    foretold = []
    real = estimate.work_of

    def noted(*given: Any) -> list[StageWork]:
        foretold.append(real(*given))
        return foretold[-1]

    monkeypatch.setattr(sys.modules[estimate_run.__module__], "work_of", noted)
    estimate_run(base, tuned, options=CompressOptions(**options))
    (distill,) = (work for work in foretold[-1] if work.name == "distill")
    built, reduced = [], []
    build, gradients = DeltaParametrization.build, DeltaParametrization.gradients

    def counted_build(self: Any, base: Any) -> Any:
        built.append(base.numel())
        return build(self, base)

    def counted_gradients(self: Any, gradient: Any) -> Any:
        reduced.append(gradient.numel())
        return gradients(self, gradient)

    monkeypatch.setattr(DeltaParametrization, "build", counted_build)
    monkeypatch.setattr(DeltaParametrization, "gradients", counted_gradients)
    compress(base, tuned, tmp_path / "d.pxd", force=force, **options)
    for seen, said in ((built, distill.builds), (reduced, distill.reductions)):
        assert sum(seen) == sum(weights * times for weights, _, times in said) > 0
