"""serve gives every row its own variant within the stated bound of the merged model, and keeps the base unchanged."""

from __future__ import annotations

import copy
import importlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peraxis_format as pf
from peraxis_format.torch import DeviceError, LiveModelError, apply_
from peraxis_format.torch.serve.api import serve
from peraxis_format.torch.serve.linear import MANY_ROWS
from tests.loader.support import AXES, Small, base_of, bytes_of, named_tensors, write_delta

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
INTERPRETED = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


@pytest.fixture(params=["torch", "numba", pytest.param("triton", marks=INTERPRETED)])
def backend(request: pytest.FixtureRequest) -> str:
    """Plain torch, numba for matrices of all sizes, and the Triton kernels."""
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture
def device(backend: str) -> str:
    """The device of the model. The kernels run on a CUDA device if there is one."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def merged(model: nn.Module, path: Path | None) -> nn.Module:
    copied = copy.deepcopy(model)
    if path is not None:
        apply_(copied, path)
    return copied.eval()


class One(nn.Module):
    """One linear whose width is not a multiple of 8."""

    def __init__(self, d_in: int, d_out: int, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(d_in, d_out, bias=bias).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def dense_terms(path: Path, name: str) -> Tensor:
    with pf.open(path) as delta:
        return torch.from_numpy(pf.dense_delta(delta.load(name))).double()


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("length", [1, 7])
@torch.no_grad()
def test_on_the_fly_is_within_the_stated_bound_of_float64(
    backend: Any, device: str, dtype: torch.dtype, axis: pf.Axis, length: int, tmp_path: Path
) -> None:
    model = One(75, 53, dtype, bias=length == 7)
    base = base_of(model)
    paths = {str(i): write_delta(tmp_path / f"{i}.pxd", base, seed=i, axes=(axis,) * (1 + i)) for i in range(2)}
    wanted = ["1", None, "0", "1", "0"]
    x = torch.randn(len(wanted), length, 75).to(dtype)
    served = serve(model.to(device), paths, backend=backend)
    with served.using(wanted):
        found = model(x.to(device)).cpu()
    assert found.dtype == dtype
    u, width = ROUNDOFF[dtype], 75
    for i, name in enumerate(wanted):
        weight = base["linear.weight"].double()
        term = torch.zeros_like(weight) if name is None else dense_terms(paths[name], "linear.weight")
        bias = torch.zeros(53).double()
        if length == 7:
            bias = base["linear.bias"].double()
            if name is not None:
                with pf.open(paths[name]) as delta:
                    full = torch.from_numpy(delta.load("linear.bias").full.view("<i4" if u < 1e-6 else "<i2").copy())
                    bias = full.view(dtype).double()
        rows = x[i].double()
        plain, exact = rows @ weight.t(), rows @ (weight + term).t() + bias
        summed = rows.abs() @ (weight.abs() + term.abs()).t() + bias.abs()
        # docs/loading.md, "What is exact": at most three roundings to the dtype, and F32 sums.
        between = exact - bias
        roundings = plain.abs() + between.abs() + exact.abs()
        halves = 2.0**-14 if backend == "triton" and dtype != torch.float32 else 0.0
        bound = 1.01 * u * roundings + (width + 4) * 2.0**-24 * summed + halves * rows.abs() @ term.abs().t()
        assert torch.all((found[i].double() - exact).abs() <= bound)


@torch.no_grad()
def test_many_rows_of_a_variant_are_multiplied_with_the_merged_weights(
    backend: Any, device: str, tmp_path: Path
) -> None:
    model = One(40, 24, torch.float32, bias=False)
    base = base_of(model)
    paths = {"v": write_delta(tmp_path / "v.pxd", base, components=3), "w": write_delta(tmp_path / "w.pxd", base)}
    x = torch.randn(3, MANY_ROWS, 40)
    with serve(model.to(device), paths, backend=backend) as served, served.using(["v", None, "w"]):
        found = model(x.to(device)).cpu()
    for i, path in enumerate((paths["v"], None, paths["w"])):
        expected = merged(One(40, 24, torch.float32, bias=False), path)(x[i])
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6)
        if backend == "torch" and path is not None:
            assert torch.equal(found[i], expected)


@torch.no_grad()
def test_merged_weights_are_multiplied_block_by_block(
    backend: Any, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused weight has an exact part, a part with components, and a part that is the base's."""
    monkeypatch.setattr(importlib.import_module("peraxis_format.torch.serve.linear"), "_BLOCK", 100)
    model = One(40, 24, torch.bfloat16, bias=True).to(device)
    parts = {"a": (0, 10), "b": (10, 13), "c": (13, 24)}
    base = {name: model.linear.weight.detach()[first:last].cpu().clone() for name, (first, last) in parts.items()}
    views = {name: model.linear.weight.detach()[first:last] for name, (first, last) in parts.items()}
    path = write_delta(tmp_path / "v.pxd", base, components=2, full=("b",), same=("c",))
    weight = model.linear.weight.detach().clone()
    x = torch.randn(2, MANY_ROWS, 40).bfloat16().to(device)
    with serve(model, {"v": path}, backend=backend, views=views) as served, served.using(["v", None]):
        found = model(x)
    changed = merged_parts(path, base)
    weight[0:10], weight[10:13] = changed["a"].to(device), changed["b"].to(device)
    torch.testing.assert_close(found[1], model(x[1]))
    torch.testing.assert_close(found[0], nn.functional.linear(x[0], weight, model.linear.bias), rtol=0.02, atol=0.02)


def merged_parts(path: Path, base: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in base.items()}
    apply_(state, path)
    return state


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_mixed_batch_gives_each_sequence_its_merged_model(
    backend: Any, device: str, tied: bool, tmp_path: Path
) -> None:
    model = Small(tied=tied, dtype=torch.float32).eval()
    base = base_of(model)
    before = bytes_of(named_tensors(model))
    alias = {"head.weight": "embed.weight"} if tied else None
    paths = {
        str(i): write_delta(tmp_path / f"{i}.pxd", base, seed=i, components=1 + i, tied=alias) for i in range(3)
    }  # fmt: skip
    paths["same"] = write_delta(tmp_path / "s.pxd", base, tied=alias, same=tuple(base))
    wanted: list[str | None] = ["2", None, "0", "same", "1", "0"]
    whole = {name: merged(model, paths[name] if name else None).to(device) for name in wanted}
    ids = torch.randint(0, 37, (len(wanted), 6)).to(device)
    with serve(model.to(device), paths, backend=backend) as served:
        with served.using(wanted):
            found = model(ids)
        for i, name in enumerate(wanted):
            torch.testing.assert_close(found[i], whole[name](ids[i : i + 1])[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(model(ids), whole[None](ids))  # no variant is selected
        assert bytes_of(named_tensors(model)) == before
    assert type(model.first) is nn.Linear
    assert type(model.embed) is nn.Embedding
    assert "forward" not in model.norm.__dict__


@torch.no_grad()
def test_a_packed_batch_has_a_variant_for_each_token_row(tmp_path: Path) -> None:
    model = One(40, 24, torch.float32, bias=False)
    base = base_of(model)
    paths = {"v": write_delta(tmp_path / "v.pxd", base)}
    x = torch.randn(1, 5, 40)
    with serve(model, paths) as served:
        with served.using(torch.tensor([0, 0, -1, 0, -1])):
            found = model(x)
        with served.using([0, -1, -1]), pytest.raises(LiveModelError, match="variants for 3 sequences"):
            model(x)
    whole = merged(model, paths["v"])(x)
    torch.testing.assert_close(found[0, [0, 1, 3]], whole[0, [0, 1, 3]], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0, [2, 4]], model(x)[0, [2, 4]])


@torch.no_grad()
def test_embedding_rows_and_norms_are_the_merged_bits(tmp_path: Path) -> None:
    model = Small().eval()
    base = base_of(model)
    path = write_delta(tmp_path / "v.pxd", base, components=2)
    whole = merged(model, path)
    ids = torch.randint(0, 37, (3, 4))
    hidden = torch.randn(3, 4, 43).bfloat16()
    with serve(model, {"v": path}) as served, served.using(["v", None, "v"]):
        embedded, normed = model.embed(ids), model.norm(hidden)
    for i, one in enumerate((whole, model, whole)):
        assert torch.equal(embedded[i], one.embed(ids[i]))
        assert torch.equal(normed[i], one.norm(hidden[i]))


@torch.no_grad()
def test_variants_belong_to_the_thread_that_asked_for_them(tmp_path: Path) -> None:
    model = One(40, 24, torch.float32, bias=False)
    path = write_delta(tmp_path / "v.pxd", base_of(model))
    x = torch.randn(2, 3, 40)
    plain = model(x)
    found: dict[str, Tensor] = {}
    with serve(model, {"v": path}) as served, served.using(["v", "v"]):

        def other() -> None:
            with torch.no_grad():
                found["other"] = model(x)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        found["mine"] = model(x)
    # Another thread may split the product differently, so the last bit is not compared.
    torch.testing.assert_close(found["other"], plain)
    assert not torch.allclose(found["mine"], plain)


def test_what_cannot_be_served_is_refused_and_the_model_stays_ordinary(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "v.pxd", base_of(model))
    other = write_delta(tmp_path / "o.pxd", base_of(Small(seed=4)))
    with pytest.raises(pf.BindingError, match="E404"):
        serve(model, {"v": path, "o": other})
    assert type(model.first) is nn.Linear
    with serve(model, {"v": path}) as served:
        with pytest.raises(LiveModelError, match="no variant 'w'; served: v"), served.using(["w"]):
            pass
        with pytest.raises(LiveModelError, match="no variant 1"), served.using([1]):
            pass
        with pytest.raises(LiveModelError, match="empty batch"), served.using([]):
            pass
        with pytest.raises(LiveModelError, match="already served"):
            serve(model, {"v": path})


def test_the_triton_backend_says_that_it_needs_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model = Small()
    with pytest.raises(DeviceError, match="CUDA"):
        serve(model, {}, backend="triton")


def transformers_pair(tmp_path: Path, config: Any) -> tuple[nn.Module, dict[str, Path]]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    base = base_of(model)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else None
    if config.model_type == "gpt2":
        tied = {"lm_head.weight": "transformer.wte.weight"}
    return model, {
        str(i): write_delta(tmp_path / f"{i}.pxd", base, seed=i, components=1 + i, tied=tied) for i in range(2)
    }


@pytest.mark.parametrize("index", [1, 3, 4, 5, 7])
@torch.no_grad()
def test_transformers_models_serve_mixed_batches(index: int, tmp_path: Path) -> None:
    """The models have tied heads, biases, per-head norms, scaled embeddings and Conv1D."""
    pytest.importorskip("transformers")
    from tests.loader.test_apply_transformers import configurations

    model, paths = transformers_pair(tmp_path, configurations()[index])
    wanted = ["0", None, "1", "0"]
    ids = torch.randint(1, 61, (4, 5))
    whole = [merged(model, paths[name] if name else None)(ids[i : i + 1]).logits[0] for i, name in enumerate(wanted)]
    with serve(model, paths) as served, served.using(wanted):
        found = model(ids).logits
    for one, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_fused_experts_are_served_too(index: int, tmp_path: Path) -> None:
    """The experts get flattened tokens. In the checkpoint the experts of a variant are parts of one tensor."""
    from tests.loader.test_apply_transformers import moe_pair

    model, base = moe_pair(index, tmp_path / "base")
    model.float()
    base = {name: tensor.float() for name, tensor in base.items()}
    paths = {str(i): write_delta(tmp_path / f"{i}.pxd", base, seed=i, components=1 + i) for i in range(2)}
    wanted = ["0", None, "1", "0"]
    ids = torch.randint(1, 61, (4, 5))
    whole = [merged(model, paths[name] if name else None)(ids[i : i + 1]).logits[0] for i, name in enumerate(wanted)]
    with serve(model, paths) as served, served.using(wanted):
        found, one = model(ids).logits, model(ids[:, :1]).logits
    for i, expected in enumerate(whole):
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one[i], expected[:1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generate_with_mixed_variants_writes_what_the_merged_models_write(shared: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared / "pairs" / "stories260K"
    # In F32 the two ways differ only by rounding, far less than the logits of two words differ.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = base_of(model)
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    paths = {
        str(i): write_delta(tmp_path / f"{i}.pxd", base, seed=i, components=1 + i, tied=tied) for i in range(2)
    }  # fmt: skip
    wanted = ["1", None, "0", "1"]
    ids = tokenizer(["Once upon a time"] * 4, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    whole = [
        merged(model, paths[name] if name else None).generate(ids[:1], **options)[0] for name in wanted
    ]  # fmt: skip
    with serve(model, paths) as served, served.using(wanted):
        found = model.generate(ids, **options)
    assert len({tuple(one.tolist()) for one in whole}) == 3
    for one, expected in zip(found, whole, strict=True):
        assert one[: len(expected)].tolist() == expected.tolist()
