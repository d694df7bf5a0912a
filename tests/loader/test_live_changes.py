"""The loader notices changes of a live model before the first write, and works with wrapped models."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peraxis_format as pf
from peraxis_format.torch import LiveModelError, SwapError, VariantSwitch, apply_
from peraxis_format.torch.serve.api import serve
from tests.loader.support import Small, base_of, bytes_of, expected_bytes, named_tensors, write_delta

IDS = torch.randint(0, 37, (4, 6), generator=torch.Generator().manual_seed(3))


def delta_for(model: nn.Module, path: Path, seed: int = 0) -> Path:
    return write_delta(path, base_of(model), seed=seed)


# --- swaps and forwards ----------------------------------------------------------------------------------


def test_a_forward_that_an_interrupt_ends_holds_no_swap_back(tmp_path: Path) -> None:
    model = Small()
    path = delta_for(model, tmp_path / "d.pxd")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with VariantSwitch(model) as live:
        live.add("v", path)
        handle = model.norm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS)
        handle.remove()
        live.use("v")
        done = threading.Event()
        threading.Thread(target=lambda: (live.use(None), model(IDS), done.set()), daemon=True).start()
        assert done.wait(300)
    assert "forward" not in model.__dict__


def replace_parameter(model: Small) -> None:
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())


def assign_state(model: Small) -> None:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [replace_parameter, assign_state, lambda model: model.to(torch.float32)])
def test_a_model_with_other_tensors_is_not_swapped(change: Callable[[Small], Any], tmp_path: Path) -> None:
    model = Small()
    path = delta_for(model, tmp_path / "d.pxd")
    with VariantSwitch(model) as live:
        live.add("v", path)
        change(model)
        before = bytes_of(named_tensors(model))
        with pytest.raises(LiveModelError, match=r"another tensor there.*make a new VariantSwitch"):
            live.use("v")
        assert bytes_of(named_tensors(model)) == before
        assert live.current is None


def test_weights_that_somebody_else_wrote_are_overwritten_only_on_demand(tmp_path: Path) -> None:
    model = Small()
    base = base_of(model)
    paths = [write_delta(tmp_path / f"{i}.pxd", base, seed=i, same=["second.weight"]) for i in range(2)]
    with VariantSwitch(model) as live, torch.no_grad():
        for i, path in enumerate(paths):
            live.add(str(i), path)
        live.use("0")
        model.second.weight.add_(1.0)
        with pytest.raises(LiveModelError, match=r"second\.weight: was written since the last swap"):
            live.use("1")
        live.use("1", overwrite=True)
        assert bytes_of(named_tensors(model)) == expected_bytes(paths[1], base)
        live.use(None)
        assert bytes_of(named_tensors(model)) == bytes_of(base)


def test_one_owner_changes_the_weights_of_a_model(tmp_path: Path) -> None:
    model = Small()
    path = delta_for(model, tmp_path / "d.pxd")
    before = bytes_of(named_tensors(model))
    with VariantSwitch(model) as first:
        first.add("v", path)
        with VariantSwitch(model) as second, pytest.raises(LiveModelError, match="keeps the base of these weights"):
            second.add("v", path)
        with pytest.raises(LiveModelError, match="keeps the base of these weights"):
            apply_(model, path)
        with pytest.raises(LiveModelError, match="keeps the base of these weights"):
            serve(model, {"v": path})
    with serve(model, {"v": path}):
        with pytest.raises(LiveModelError, match="the model is being served"):
            apply_(model, path)
        with VariantSwitch(model) as live, pytest.raises(LiveModelError, match="the model is being served"):
            live.add("v", path)
    assert bytes_of(named_tensors(model)) == before
    apply_(model, path)


def test_a_closed_switch_does_nothing_any_more(tmp_path: Path) -> None:
    model = Small()
    path = delta_for(model, tmp_path / "d.pxd")
    live = VariantSwitch(model)
    live.close()
    for call in (lambda: live.add("v", path), lambda: live.use(None)):
        with pytest.raises(LiveModelError, match="closed"):
            call()


def test_a_file_written_in_place_under_its_old_time_is_refused(tmp_path: Path) -> None:
    model = Small()
    path = delta_for(model, tmp_path / "d.pxd")
    before = bytes_of(named_tensors(model))
    with VariantSwitch(model) as live:
        live.add("v", path, "file")
        stamp = os.stat(path)
        with pf.open(path) as delta:
            at = delta.span("first.weight")[0]
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 255]))
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        with pytest.raises(SwapError, match="changed or removed"):
            live.use("v")
        assert bytes_of(named_tensors(model)) == before


# --- serving ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_closed_serve_gives_no_variant(tmp_path: Path) -> None:
    model = Small()
    served = serve(model, {"v": delta_for(model, tmp_path / "d.pxd")})
    with served.using("v"), pytest.raises(LiveModelError, match="inside `using`"):
        served.close()
    served.close()
    with pytest.raises(LiveModelError, match="closed"), served.using("v"):
        pass


@pytest.mark.parametrize("wrong", [[0.5], [b"v"], torch.tensor([[0]]), torch.tensor([0.0]), [True], [1], "w", []])
def test_what_names_no_variant_is_refused(wrong: Any, tmp_path: Path) -> None:
    model = Small()
    with (
        serve(model, {"v": delta_for(model, tmp_path / "d.pxd")}) as served,
        pytest.raises(LiveModelError),
        served.using(wrong),
    ):
        pass


@torch.no_grad()
def test_one_name_is_for_every_row_and_a_list_for_as_many_as_it_has(tmp_path: Path) -> None:
    model = Small(dtype=torch.float32)
    with serve(model, {"v": delta_for(model, tmp_path / "d.pxd")}) as served:
        with served.using("v"):
            every = model(IDS)
        with served.using(["v"] * 4):
            listed = model(IDS)
        torch.testing.assert_close(every, listed)
        for wrong in (["v"] * 3, ["v"], ["v", None]):
            with served.using(wrong), pytest.raises(LiveModelError, match="does not match"):
                model(IDS)


class ReadsAnother(nn.Module):
    """Computes with the weight of its child, as Mamba's mixer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.to(x.dtype).t()


@torch.no_grad()
def test_a_weight_that_another_module_reads_is_the_variants_or_an_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ReadsAnother()
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base)
    merged = ReadsAnother()
    merged.load_state_dict(base)
    apply_(merged, path)
    x = torch.randn(2, 3, 8)
    with serve(model, {"v": path}) as served:
        with served.using("v"):
            assert torch.equal(model(x), merged(x))
        assert model.inner.weight.shape == (8, 8)
        with served.using(["v", None]):
            assert model.inner.weight.dtype is torch.float32
            with pytest.raises(LiveModelError, match="reads the weights of another module"):
                model(x)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def configuration(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    made = {
        "gpt-oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, sliding_window=8),
        "mamba": lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8),
        "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
        ),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=128,
        ),
    }
    return made[family]()


@pytest.mark.parametrize("family", ["gpt-oss", "mamba", "qwen2-moe", "opt"])
@torch.no_grad()
def test_modules_with_weights_and_served_children_serve_a_mixed_batch(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)

    def built() -> nn.Module:
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(configuration(family), dtype=torch.float32)
        return model.eval()

    model, other = built(), built()
    other.load_state_dict(model.state_dict())
    # Every tensor changes, including the module's own vectors.
    path = write_delta(tmp_path / "d.pxd", {n: p.detach() for n, p in model.named_parameters()})
    apply_(other, path)
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(1))
    wanted: Sequence[str | None] = ["v", None, "v", None]
    rows = zip(ids, wanted, strict=True)
    expected = [(other if name else model)(input_ids=row[None], use_cache=False).logits[0] for row, name in rows]
    with serve(model, {"v": path}) as served, served.using(wanted):
        found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


# --- wrappers --------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Names its parameters as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [torch.compile, Wrapper, lambda model: torch.compile(Wrapper(model))])
def test_a_wrapped_model_is_looked_through(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = Small()
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base)
    apply_(wrap(model), path)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)


def test_a_model_under_an_adapter_is_looked_through(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = Small()
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["first"], r=2))
    apply_(adapted, path)
    live = {name.replace("base_layer.", ""): p for name, p in named_tensors(model).items() if "lora" not in name}
    assert bytes_of(live) == expected_bytes(path, base)


def test_another_dtype_is_named_with_what_to_load(tmp_path: Path) -> None:
    model = Small()
    path = delta_for(model, tmp_path / "d.pxd")
    with pytest.raises(pf.BindingError, match=r"F16, not BF16: load the model with dtype=torch\.bfloat16"):
        apply_(model.to(torch.float16), path)


def test_another_base_is_named(tmp_path: Path) -> None:
    path = delta_for(Small(), tmp_path / "d.pxd")
    with pytest.raises(pf.BindingError, match=r"E404.*the delta was made for base"):
        apply_(Small(seed=1), path)
