"""Files written from the published layouts and converted by `convert` apply to the results of their merge formulas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import peraxis_format as pxd
from peraxis_tools.commands.convert import command
from peraxis_tools.convert import to_lora, to_pxd
from peraxis_tools.errors import CheckFailedError, ToolError
from tests.factories import random_storage, sign_module, write_checkpoint, write_delta

BF16 = pxd.DType.BF16
SHAPES = {
    "model.embed_tokens.weight": (50, 64),
    "model.layers.0.self_attn.q_proj.weight": (32, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.norm.weight": (64,),
    "lm_head.weight": (50, 64),
}
MODULES = [name.removesuffix(".weight") for name in SHAPES if "proj" in name]


def pack_words(signs: torch.Tensor) -> torch.Tensor:
    """signs [d_in, d_out] (True: +1) -> int32 [d_in/32, d_out], bit i of word w is row 32 w + i."""
    rows, columns = signs.shape
    shifts = torch.arange(32, dtype=torch.int64)[None, :, None]
    words = (signs.reshape(rows // 32, 32, columns).long() << shifts).sum(dim=1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


TORCH = {BF16: torch.bfloat16, pxd.DType.F16: torch.float16, pxd.DType.F32: torch.float32}


def make_base(folder: Path, seed: int = 0, dtype: pxd.DType = BF16) -> tuple[Path, dict[str, torch.Tensor]]:
    rng = np.random.default_rng(seed)
    # The weights are as large as the scales below, so that many nearly cancel with their components.
    arrays = {name: random_storage(rng, shape, dtype, scale=1e-2) for name, shape in SHAPES.items()}
    path = write_checkpoint(folder / "base", {name: (array, dtype) for name, array in arrays.items()})
    return path, {name: torch.from_numpy(array.copy()).view(TORCH[dtype]) for name, array in arrays.items()}


def weights_of(delta: Path, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with pxd.open(delta) as file:
        result = {}
        for name in file:
            module = file.load(name)
            tensor = base[name].view(torch.uint16).numpy() if module.dtype is BF16 else base[name].numpy()
            result[name] = torch.from_numpy(pxd.reconstruct(module, tensor)).view(TORCH[module.dtype])
        return result


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from(list(TORCH)), st.floats(-20, 0))
@settings(max_examples=30)
def test_a_bitdelta_file_applies_to_bitdeltas_own_merge(tmp_path_factory, seed, negative, dtype, size) -> None:
    folder = tmp_path_factory.mktemp("bitdelta")
    path, base = make_base(folder, dtype=dtype)
    torch.manual_seed(seed)
    saved, merged, coeffs = {}, {}, {}
    for module in MODULES:
        d_out, d_in = SHAPES[f"{module}.weight"]
        signs = torch.rand(d_in, d_out) < 0.5
        coeff = (torch.rand(()) / 2 + 0.5) * 2.0**size * (-1 if negative else 1)
        saved[f"{module}.mask"], saved[f"{module}.coeff"] = pack_words(signs), coeff
        name, term = f"{module}.weight", coeff * (signs.float() * 2 - 1).T
        coeffs[name] = coeff
        merged[name] = base[name] + term.to(TORCH[dtype])  # as in the project, in the weight's dtype
    saved["model.norm.weight"] = torch.randn(64).double().to(torch.float32)  # loading it casts it
    saved["lm_head.weight"] = torch.randn(52, 64).to(TORCH[dtype])  # two rows more than the base
    torch.save(saved, folder / "diff.pt")
    result = to_pxd(folder / "diff.pt", path, folder / "out.pxd")
    got = weights_of(folder / "out.pxd", base)
    for name, weight in merged.items():
        if dtype is pxd.DType.F32:
            error = (got[name].double() - weight.double()).abs()
            assert torch.all(error <= 2.0**-11 * coeffs[name].abs().double() + 2.0**-23 * weight.double().abs())
        else:
            assert torch.equal(got[name], weight)
    assert torch.equal(got["model.norm.weight"], saved["model.norm.weight"].to(TORCH[dtype]))
    assert torch.equal(got["lm_head.weight"], saved["lm_head.weight"])
    assert torch.equal(got["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert result.encodings == {"full": 2, "same": 1, "sign": 2}
    assert result.cast == (() if dtype is pxd.DType.F32 else ("model.norm.weight",))
    assert result.merges or dtype is pxd.DType.F32
    # Below 2^-14 F16 has fewer bits, in their merge too.
    assert 0.0 <= result.scale_error <= (2.0**-8 if dtype is not pxd.DType.F16 or size > -13 else 1.0)


@given(st.integers(0, 2**32), st.sampled_from(["row", "col"]), st.booleans())
@settings(max_examples=10)
def test_a_file_of_the_papers_code_applies_to_its_merge_with_the_names_swapped(
    tmp_path_factory, seed, theirs, column_shaped
) -> None:
    folder = tmp_path_factory.mktemp("paper")
    path, base = make_base(folder)
    torch.manual_seed(seed)
    saved, wanted = {}, {}
    for module in MODULES:
        d_out, d_in = SHAPES[f"{module}.weight"]
        signs = torch.rand(d_in, d_out) < 0.5
        # It is stored transposed: a `row` scale for each of the d_in rows, a `col` scale for each of the d_out columns.
        coeff = (torch.randn(d_in if theirs == "row" else d_out) * 1e-3).bfloat16()
        dense = (signs.float() * 2 - 1) * (coeff[:, None] if theirs == "row" else coeff[None, :]).float()
        saved[f"{module}.mask_{theirs}"] = pack_words(signs)
        saved[f"{module}.coeff_{theirs}"] = coeff[:, None] if column_shaped else coeff
        wanted[f"{module}.weight"] = base[f"{module}.weight"].float() + dense.T
    torch.save(saved, folder / "delta.pt")
    result = to_pxd(folder / "delta.pt", path, folder / "out.pxd")
    assert result.layout == "peraxis-pt"
    assert (result.scale_error, result.merges) == (0.0, True)
    got = weights_of(folder / "out.pxd", base)
    for name, weight in wanted.items():
        assert torch.equal(got[name], weight.bfloat16())
    with pxd.open(folder / "out.pxd") as file:
        axes = {file.entry(f"{module}.weight").components[0].axis.value for module in MODULES}
    assert axes == {"col" if theirs == "row" else "row"}


def test_of_two_variants_the_one_that_was_asked_for_is_taken(tmp_path: Path) -> None:
    path, base = make_base(tmp_path)
    torch.manual_seed(0)
    saved, terms = {}, {}
    for module, kinds in zip(MODULES, (("row", "col"), ("col",)), strict=True):
        d_out, d_in = SHAPES[f"{module}.weight"]
        for theirs in kinds:
            signs = torch.rand(d_in, d_out) < 0.5
            coeff = (torch.rand(d_in if theirs == "row" else d_out) * 1e-3).bfloat16()
            saved[f"{module}.mask_{theirs}"], saved[f"{module}.coeff_{theirs}"] = pack_words(signs), coeff
            along = coeff[:, None] if theirs == "row" else coeff[None, :]
            terms[module, theirs] = ((signs.float() * 2 - 1) * along.float()).T
    torch.save(saved, tmp_path / "delta.pt")
    with pytest.raises(ToolError, match="--axis row"):
        to_pxd(tmp_path / "delta.pt", path, tmp_path / "out.pxd")
    # Their `row` is the `col` of SPEC 5.3. A module with one variant keeps it.
    for axis, theirs in ((pxd.Axis.COL, "row"), (pxd.Axis.ROW, "col")):
        to_pxd(tmp_path / "delta.pt", path, tmp_path / "out.pxd", axis=axis, overwrite=True)
        got = weights_of(tmp_path / "out.pxd", base)
        for module, taken in zip(MODULES, (theirs, "col"), strict=True):
            name = f"{module}.weight"
            assert torch.equal(got[name], (base[name].float() + terms[module, taken]).bfloat16())


def test_what_could_run_code_is_not_opened(tmp_path: Path) -> None:
    path, _ = make_base(tmp_path)
    torch.save({"model.norm.weight": Path("x")}, tmp_path / "evil.pt")
    with pytest.raises(ToolError, match="Python objects"):
        to_pxd(tmp_path / "evil.pt", path, tmp_path / "out.pxd")
    (tmp_path / "no.pt").write_bytes(b"not a file of torch")
    with pytest.raises(ToolError, match=r"not a \.pt file|Python objects"):
        to_pxd(tmp_path / "no.pt", path, tmp_path / "out.pxd")
    assert not (tmp_path / "out.pxd").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x.A": torch.zeros(2)}, ToolError, "not part of the layout"),
        ({"model.layers.0.self_attn.q_proj.coeff": torch.tensor(torch.nan)}, ToolError, "not finite"),
        ({"model.layers.0.mlp.down_proj.mask": torch.zeros(3, 64, dtype=torch.int32)}, ToolError, "coeff"),
        (
            {"model.layers.0.self_attn.q_proj.mask": torch.zeros(2, 33, dtype=torch.int32)},
            CheckFailedError,
            "pass the base that it was made for",
        ),
        (
            {"model.layers.0.self_attn.q_proj.mask_row": torch.zeros(2, 32, dtype=torch.int32)},
            ToolError,
            "both layouts",
        ),
        ({"model.layers.0.self_attn.q_proj.mask": torch.zeros(2, 32)}, ToolError, "not int32"),
    ],
)
def test_what_is_odd_is_named(tmp_path: Path, change, error, message) -> None:
    path, _ = make_base(tmp_path)
    saved = {f"{MODULES[0]}.mask": torch.zeros(2, 32, dtype=torch.int32), f"{MODULES[0]}.coeff": torch.tensor(0.1)}
    torch.save({**saved, **change}, tmp_path / "diff.pt")
    with pytest.raises(error, match=message):
        to_pxd(tmp_path / "diff.pt", path, tmp_path / "out.pxd")


def small_delta(folder: Path) -> tuple[Path, dict[str, pxd.ModuleDelta]]:
    rng = np.random.default_rng(4)
    modules = {
        name: sign_module(rng, name, random_storage(rng, SHAPES[name]), axes=(pxd.Axis.ROW_COL,))
        for name in SHAPES
        if len(SHAPES[name]) == 2
    }
    return write_delta(folder / "delta.pxd", list(modules.values())), modules


def adapter_delta(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    module = "base_model.model." + name.removesuffix(".weight")
    if f"{module}.lora_embedding_A" in tensors:
        return (tensors[f"{module}.lora_embedding_B"] @ tensors[f"{module}.lora_embedding_A"]).T.numpy()
    return (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]).numpy()


def test_a_lora_adapter_is_the_truncated_decomposition_and_reports_its_error(tmp_path: Path) -> None:
    path, modules = small_delta(tmp_path)
    result = to_lora(path, tmp_path / "adapter", rank=8)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for found in result.modules:
        dense = pxd.dense_delta(modules[found.name]).astype(np.float64)
        left = np.linalg.norm(dense - adapter_delta(tensors, found.name)) / np.linalg.norm(dense)
        values = np.linalg.svd(dense, compute_uv=False)
        assert found.error == pytest.approx(left, rel=1e-4)
        assert left == pytest.approx(np.sqrt(np.sum(values[8:] ** 2) / np.sum(values**2)), rel=0.02)
    assert 0.0 < result.error < 1.0


def test_the_rank_by_error_is_the_least_that_holds_it(tmp_path: Path) -> None:
    path, modules = small_delta(tmp_path)
    result = to_lora(path, tmp_path / "adapter", max_error=0.4)
    for found in result.modules:
        values = np.linalg.svd(pxd.dense_delta(modules[found.name]).astype(np.float64), compute_uv=False)
        assert found.error <= 0.4 * (1 + 1e-4)
        assert np.sqrt(np.sum(values[found.rank - 1 :] ** 2) / np.sum(values**2)) > 0.4 * (1 - 1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(m.rank for m in result.modules)


def test_a_bound_that_binary32_factors_cannot_meet_is_said_to_be_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = small_delta(tmp_path)
    result = to_lora(path, tmp_path / "adapter", max_error=1e-9)
    worst = max(result.modules, key=lambda module: module.error)
    assert worst.error > 1e-9
    said = f"{len(result.modules)} modules above max_error (--max-error), up to {worst.error:.4g} ({worst.name})"
    assert said in caplog.text
    caplog.clear()
    for bound in (0.4, 0.1, 1e-3, 1e-5):
        result = to_lora(path, tmp_path / "adapter", max_error=bound, overwrite=True)
        assert max(module.error for module in result.modules) <= bound
    assert "max_error" not in caplog.text


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*", "ignore::UserWarning:peft.*")
def test_peft_loads_the_adapter_into_the_weights_that_we_say(tmp_path: Path, shared: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from peraxis_tools.checkpoints.checkpoint import open_checkpoint

    model = transformers.AutoModelForCausalLM.from_pretrained(shared / "pairs" / "stories260K", dtype=torch.float32)
    rng = np.random.default_rng(0)
    with open_checkpoint(shared / "pairs" / "stories260K") as checkpoint:
        names = [name for name in checkpoint.tensors if "q_proj" in name or "down_proj" in name]
        modules = [sign_module(rng, name, checkpoint.tensors.read(name)) for name in names]
    path = write_delta(tmp_path / "delta.pxd", modules)
    to_lora(path, tmp_path / "adapter", rank=64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    for module in modules:
        change = (merged[module.name] - before[module.name]).numpy()
        np.testing.assert_allclose(change, pxd.dense_delta(module), atol=1e-5)


def test_an_adapter_is_no_source_and_is_called_one(tmp_path: Path) -> None:
    path, _ = small_delta(tmp_path)
    to_lora(path, tmp_path / "adapter", rank=2)
    done = CliRunner().invoke(
        command, [str(tmp_path / "adapter"), "--base", str(tmp_path), "-o", str(tmp_path / "x.pxd")]
    )
    assert isinstance(done.exception, pxd.CheckpointError)
    assert "it is a LoRA adapter: merge it into its base first" in str(done.exception)


def test_a_tied_embedding_is_left_out_and_counts_as_lost(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    names = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")
    modules = [sign_module(rng, name, random_storage(rng, SHAPES[name])) for name in names]
    config = json.dumps({"tie_word_embeddings": True}).encode()
    path = write_delta(tmp_path / "delta.pxd", modules, assets={"config.json": config})
    result = to_lora(path, tmp_path / "adapter", rank=32)
    assert [item.name for item in result.left_out] == ["model.embed_tokens.weight"]
    lost, kept = (float(np.sum(pxd.dense_delta(module).astype(np.float64) ** 2)) for module in modules)
    assert result.error == pytest.approx(np.sqrt(lost / (lost + kept)), rel=1e-4)


def test_the_command_converts_both_ways(tmp_path: Path) -> None:
    path, _ = make_base(tmp_path)
    torch.save(
        {f"{MODULES[0]}.mask": torch.ones(2, 32, dtype=torch.int32), f"{MODULES[0]}.coeff": torch.tensor(0.1)},
        tmp_path / "d.pt",
    )
    out = str(tmp_path / "d.pxd")
    done = CliRunner().invoke(command, [str(tmp_path / "d.pt"), "--base", str(path), "-o", out, "--json"])
    assert json.loads(done.stdout)["schema"] == "peraxis.convert/1", done.output
    lora = CliRunner().invoke(command, [out, "--to", "lora", "--rank", "4", "-o", str(tmp_path / "adapter")])
    assert "relative error" in lora.stdout, lora.output
    full = CliRunner().invoke(command, [out, "--to", "checkpoint", "--base", str(path), "-o", str(tmp_path / "full")])
    assert full.exit_code == 0, full.output
