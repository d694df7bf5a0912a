"""Plans need only shapes: the sizes of the paper's models, and the encoding of each kind of tensor."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import peraxis_format as pxd
from peraxis_tools.compress import CompressOptions, OptionError, Plan
from peraxis_tools.compress.options import RECIPES
from peraxis_tools.compress.plan.budget import Choice, allocate
from peraxis_tools.compress.plan.plan import plan
from peraxis_tools.display.sizes import parse_size


@dataclass(frozen=True)
class Info:
    dtype: pxd.DType
    shape: tuple[int, ...]


BF16 = pxd.DType.BF16
# layers, hidden, query, key/value, MLP, vocabulary from the public configurations of the models
LLAMA = (32, 4096, 4096, 1024, 14336, 128256)
QWEN = (40, 5120, 5120, 1024, 17408, 151936)
PHI = (40, 5120, 5120, 1280, 17920, 100352)


def shapes(layers: int, hidden: int, query: int, kv: int, mlp: int, vocabulary: int, *, fused: bool) -> dict[str, Info]:
    """Return the tensors of a Llama-like checkpoint. fused: as in Phi-3 and Phi-4."""
    matrices = {"self_attn.o_proj": (hidden, query), "mlp.down_proj": (hidden, mlp)}
    if fused:
        matrices |= {"self_attn.qkv_proj": (query + 2 * kv, hidden), "mlp.gate_up_proj": (2 * mlp, hidden)}
    else:
        matrices |= {"self_attn.q_proj": (query, hidden), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden)}
        matrices |= {"self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    tensors = {name: Info(BF16, (vocabulary, hidden)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = Info(BF16, (hidden,))
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": Info(BF16, shape) for name, shape in matrices.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = Info(BF16, (hidden,))
    return tensors


def planned(tensors: dict[str, Info], base: dict[str, Info] | None = None, **options: object) -> Plan:
    return plan(fine_tuned=tensors, base=base or tensors, options=CompressOptions(**options))


@pytest.mark.parametrize(
    ("model", "fused", "full", "sign"),
    # full: Llama's size is from Table 2 of the paper; the other two follow from the shapes (masks + exact tables)
    [(LLAMA, False, 2980, 1007), (QWEN, False, 4768, 1852), (PHI, True, 3764, 1838)],
    ids=["Llama-3.1-8B", "Qwen3-14B", "Phi-4"],
)
def test_sizes_of_the_papers_models_follow_from_their_shapes(
    model: tuple[int, ...], fused: bool, full: int, sign: int
) -> None:
    tensors = shapes(*model, fused=fused)
    for embeddings, expected in (("full", full), ("sign", sign)):
        size = planned(tensors, embeddings=embeddings, axis="row").payload_bytes / 1e6
        assert size == pytest.approx(expected, rel=0.01)


def test_plans_stand_in_execution_order_and_need_no_torch() -> None:
    names = [module.name for module in planned(shapes(*LLAMA, fused=False)).modules]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    code = "import sys, peraxis_tools.compress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_cannot_or_should_not_carry_signs_is_exact_and_says_why() -> None:
    tuned = {
        "model.embed_tokens.weight": Info(BF16, (100, 64)),
        "model.layers.0.q.weight": Info(BF16, (64, 64)),
        "model.layers.0.q.bias": Info(BF16, (64,)),
        "model.layers.0.mlp.gate.weight": Info(BF16, (4, 64)),
        "model.layers.0.conv.weight": Info(BF16, (64, 1, 4)),
        "model.layers.0.steps": Info(pxd.DType.I64, (8, 8)),
        "model.layers.0.new.weight": Info(BF16, (64, 64)),
    }
    base = {name: info for name, info in tuned.items() if "new" not in name} | {"old.weight": Info(BF16, (8, 8))}
    base["model.embed_tokens.weight"] = Info(pxd.DType.F32, (90, 64))
    result = planned(tuned, base, masks=2)
    modules = {module.name: module for module in result.modules}
    assert {name for name, module in modules.items() if module.encoding is pxd.Encoding.SIGN} == {
        "model.embed_tokens.weight",
        "model.layers.0.q.weight",
    }
    assert all(module.reason for module in modules.values() if module.encoding is pxd.Encoding.FULL)
    assert modules["model.layers.0.q.weight"].components == 2
    assert result.dropped == ("old.weight",)
    # 90 rows have signs (2 masks and their scales), 10 new rows are exact
    embedding = modules["model.embed_tokens.weight"]
    assert embedding.payload_bytes == 2 * (768 + 192 + 128) + 1280


def test_a_number_of_masks_that_is_given_is_that_of_every_module() -> None:
    tensors = shapes(1, 64, 64, 64, 128, 100, fused=False)
    for masks in (1, 2, 5):
        options = CompressOptions(masks=masks)
        found = {module.components for module in planned(tensors, masks=masks).modules}
        assert found == {0, masks}
        assert not options.spends_freely
    assert CompressOptions().spends_freely
    assert CompressOptions(masks="auto") == CompressOptions()


def test_a_number_of_masks_and_a_target_exclude_each_other_and_a_ratio_is_above_1() -> None:
    for values in ({"masks": 1, "target_ratio": 12}, {"target_ratio": 0.5}, {"target_ratio": 1}, {"masks": 0}):
        with pytest.raises(OptionError):
            CompressOptions(**values)


def test_a_budget_is_spent_where_a_byte_saves_most() -> None:
    full, sign = pxd.Encoding.FULL, pxd.Encoding.SIGN
    choices = {
        "steep": [Choice(sign, 1, 10, 100.0), Choice(sign, 2, 20, 10.0), Choice(full, 0, 100, 0.0)],
        "flat": [Choice(sign, 1, 10, 5.0), Choice(sign, 2, 20, 4.0), Choice(full, 0, 100, 0.0)],
        # its second point lies above the line from the first to the third, so it is never the best at any price
        "bent": [Choice(sign, 1, 10, 50.0), Choice(sign, 2, 20, 49.0), Choice(sign, 3, 30, 0.0)],
    }
    assert {name: c.size for name, c in allocate(choices, 40).items()} == {"steep": 20, "flat": 10, "bent": 10}
    assert {name: c.size for name, c in allocate(choices, 65).items()} == {"steep": 20, "flat": 10, "bent": 30}
    with pytest.raises(OptionError, match="target too small"):
        allocate(choices, 29)


def test_options_survive_their_own_json_and_refuse_what_they_do_not_know() -> None:
    import json

    for options in (
        CompressOptions(calibration="c4", target_ratio=12.5, held_out=0.3, distill_samples=4),
        *(CompressOptions(masks=masks) for masks in ("auto", 1, 2)),
    ):
        assert CompressOptions.from_mapping(json.loads(options.canonical_json())) == options
    for values in ({"nonsense": 1}, {"masks": 9}, {"masks": "two"}, {"axis": "diagonal"}, {"fit": "refined"}):
        with pytest.raises(OptionError):
            CompressOptions.from_mapping(values)


def test_an_option_that_is_given_wins_over_its_recipe() -> None:
    for recipe, values in RECIPES.items():
        text = {} if recipe == "quick" else {"calibration": "text.jsonl"}
        made = CompressOptions.from_mapping({"embeddings": "full", **text, "recipe": recipe})
        assert made == CompressOptions.from_mapping({**values, **text, "embeddings": "full"})
    changed = CompressOptions.from_mapping({"recipe": "best", "calibration": "text.jsonl", "distill-epochs": 3})
    assert changed.distill_epochs == 3
    with pytest.raises(OptionError, match="recipe 'better': choose one of"):
        CompressOptions.from_mapping({"recipe": "better"})


TEXT = {"calibration": "text.jsonl"}


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"fit": "none", "distill_samples": 4, **TEXT}, "calibration"),
        ({"recipe": "quick", **TEXT}, "calibration"),
        ({"recipe": "best", "fit": "none"}, "distill"),
        ({"calibration_samples": 7}, "calibration_samples"),
        ({"seed": 1}, "seed"),
        ({"distill_epochs": 3, **TEXT}, "distill_epochs"),
        ({"distill_sign_lr": 0.1, **TEXT}, "distill_sign_lr"),
        ({"distill_loss": "mse", **TEXT}, "distill_loss"),
        ({"refine_rounds": 5, "fit": "closed-form", **TEXT}, "refine_rounds"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_by_name(values: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}.*does nothing|needs a text") as caught:
        CompressOptions.from_mapping(values)
    assert "\n" not in str(caught.value)


def test_what_a_file_says_of_its_options_can_be_passed_back() -> None:
    import json

    for values in ({"fit": "none"}, {"fit": "closed-form", **TEXT}, {"recipe": "best", **TEXT}, {"target_ratio": 8.0}):
        made = CompressOptions.from_mapping(values)
        assert CompressOptions.from_mapping(json.loads(made.canonical_json())) == made


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-320, -1.0, 1e308])
@pytest.mark.parametrize("name", ["target_ratio", "held_out", "distill_lr", "distill_sign_lr", "distill_full_lr"])
def test_numbers_that_are_none_or_absurd_are_refused_by_name(name: str, value: float) -> None:
    given = {**TEXT, "distill_samples": 4, name: value}
    if name == "held_out" and value == 1e-320:
        assert CompressOptions.from_mapping(given).held_out == value  # a share of no sample
        return
    with pytest.raises(OptionError, match=name):
        CompressOptions.from_mapping(given)


@pytest.mark.parametrize(
    "text", ["a: [", "2020-99-99", "- a", "a: &a [*a]\n? {b: 1}\n: c", "\x00", "[" * 5000, "calibration: 3", "fit: {}"]
)
def test_a_configuration_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        CompressOptions.from_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"), [("1200000", 1200000), ("800kB", 800_000), ("1.2GB", 1_200_000_000), ("1GiB", 1 << 30)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match=r"1\.2GB"):
        parse_size("big")


def test_a_plan_says_which_modules_stay_as_in_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    from peraxis_tools.report.compress import plan_lines

    result = planned({"model.layers.0.q.weight": Info(BF16, (64, 64))})
    plan_lines(result.with_choices({"model.layers.0.q.weight": (pxd.Encoding.SAME, 0)}))
    assert "plan: 1 as in the base (the budget buys more elsewhere)" in capsys.readouterr().err


def test_signs_never_take_more_bytes_than_the_tensor_itself() -> None:
    # Of GOT-OCR 2: kernels outside of all layers, whose last dimension is 3, in four bytes a number.
    kernels = {
        "conv_upsampler.weight": Info(pxd.DType.F32, (512, 256, 3, 3)),
        "projection.weight": Info(pxd.DType.F32, (96, 96)),
        "vision_tower.layers.0.narrow.weight": Info(BF16, (4, 4)),
    }
    for masks in ("auto", 1, 3, 8):
        for module in planned(kernels, masks=masks).modules:
            assert module.payload_bytes <= module.dtype.size_of(module.shape) + 63, (module.name, masks)
    found = {module.name: module.components for module in planned(kernels).modules}
    assert found == {"conv_upsampler.weight": 1, "projection.weight": 3, "vision_tower.layers.0.narrow.weight": 0}
