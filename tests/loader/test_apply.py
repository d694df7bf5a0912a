"""apply_: the reference's bits in the storage that was there, or nothing at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peraxis_format as pf
from peraxis_format.torch import LiveModelError, apply_
from peraxis_format.torch.device import HostDevice
from peraxis_format.torch.place import binding, digests
from peraxis_format.torch.ring import Ring
from peraxis_format.torch.swap.engine import HostEngine
from tests.loader.support import AXES, Small, bytes_of, expected_bytes, named_tensors, write_delta


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("undo", ["device", "host"])
def test_applied_weights_have_the_bits_of_the_reference(
    dtype: torch.dtype, axis: pf.Axis, backend: str, undo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend)
    monkeypatch.setenv("PERAXIS_BACKEND", backend)
    model = Small(dtype=dtype)
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base, axes=(axis, pf.Axis.ROW))
    pointers = {name: tensor.data_ptr() for name, tensor in named_tensors(model).items()}
    applied = apply_(model, path, undo=undo)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)
    assert pointers == {name: tensor.data_ptr() for name, tensor in named_tensors(model).items()}
    assert applied.modules == len(base)


def test_a_state_dict_is_written_in_place_and_tied_weights_once(tmp_path: Path) -> None:
    model = Small(tied=True)
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base, tied={"head.weight": "embed.weight"}, components=2)
    state = model.state_dict()
    applied = apply_(state, path)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)
    assert applied.uploads == 1
    assert model.head.weight is model.embed.weight


def test_an_alias_with_storage_of_its_own_is_written_too(tmp_path: Path) -> None:
    model = Small(tied=False)
    model.head.weight.data.copy_(model.embed.weight.data)
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base, tied={"head.weight": "embed.weight"})
    apply_(model, path)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)
    assert model.head.weight.data_ptr() != model.embed.weight.data_ptr()


def refused(model: Any, path: Path, error: type[Exception], match: str, **options: Any) -> None:
    before = bytes_of(dict(model) if isinstance(model, dict) else named_tensors(model))
    with pytest.raises(error, match=match):
        apply_(model, path, **options)
    assert before == bytes_of(dict(model) if isinstance(model, dict) else named_tensors(model))


def test_another_base_is_refused_before_the_first_write(tmp_path: Path) -> None:
    model = Small()
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base)
    other = Small(seed=1)
    refused(other, path, pf.BindingError, "E404")
    one_bit = base_of(model)
    one_bit["second.weight"].view(torch.int16)[3, 5] ^= 1
    refused(one_bit, path, pf.BindingError, r"E404.*second\.weight")
    refused({k: v for k, v in base.items() if k != "norm.bias"}, path, pf.BindingError, r"E402.*norm\.bias")
    refused({f"x.{k}": v for k, v in base.items()}, path, pf.BindingError, "E401")
    refused({**base, "norm.bias": base["norm.bias"].half()}, path, pf.BindingError, r"E403.*norm\.bias")


def test_a_second_apply_meets_the_fine_tune_and_not_the_base(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    apply_(model, path)
    refused(model, path, pf.BindingError, "E404")


def test_a_damaged_file_leaves_the_base(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(model, path, pf.PayloadError, r"E301: .*d\.pxd")


def test_a_pad_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    with pf.open(path) as delta:
        module_ends = {delta.span(name)[1] for name in delta}
        begin = next(
            delta.header_size + r.begin for r in delta.records
            if r.name.startswith("__pad__.") and delta.header_size + r.begin in module_ends
        )  # fmt: skip
    data = bytearray(path.read_bytes())
    data[begin] = 1  # between two modules: in no module's digest
    path.write_bytes(data)
    refused(model, path, pf.PayloadError, "E304")


@pytest.mark.parametrize("undo", ["device", "host"])
@pytest.mark.parametrize("nth", [0, 3, 6])
def test_an_error_while_writing_puts_the_old_weights_back(
    nth: int, undo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    plain, count = HostEngine._part_jobs, [0]

    def failing(self: HostEngine, *args: Any) -> Any:
        count[0] += 1
        if count[0] > nth:
            raise OSError("no more")
        jobs = list(plain(self, *args))
        for job in jobs:
            job()  # written already when the next one fails
        return iter(())

    monkeypatch.setattr(HostEngine, "_part_jobs", failing)
    refused(model, path, OSError, "no more", undo=undo)


def test_a_base_is_hashed_once_and_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    hashed: list[int] = []
    plain = digests.as_bytes

    def counted(tensor: Tensor) -> Tensor:
        hashed.append(1)
        return plain(tensor)

    monkeypatch.setattr(digests, "as_bytes", counted)
    ring = Ring(HostDevice())
    with pf.open(path) as delta:
        placement = pf_place(model, delta.manifest)
        binding.check_live(delta.manifest, placement, ring=ring)
        first = len(hashed)
        binding.check_live(delta.manifest, placement, ring=ring)
        assert len(hashed) == first == len(placement)
        with torch.no_grad():
            model.first.weight[0, 0] += 1
        with pytest.raises(pf.BindingError, match=r"E404.*first\.weight"):
            binding.check_live(delta.manifest, placement, ring=ring)
        assert len(hashed) == first + 1


def pf_place(model: nn.Module, manifest: pf.Manifest) -> Any:
    from peraxis_format.torch import place

    return place(model, manifest)


class Fused(nn.Module):
    """What a runtime makes of q, k, v and of gate, up: one parameter each."""

    def __init__(self, base: dict[str, Tensor]) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(16, 40, bias=True, dtype=torch.bfloat16)
        self.gate_up_proj = nn.Linear(16, 42, bias=False, dtype=torch.bfloat16)
        self.qkv_proj.weight.data = torch.cat([base[f"{n}_proj.weight"] for n in "qkv"])
        self.qkv_proj.bias.data = torch.cat([base[f"{n}_proj.bias"] for n in "qkv"])
        self.gate_up_proj.weight.data = torch.cat([base["gate_proj.weight"], base["up_proj.weight"]])


def fused_base() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "q_proj.weight": (24, 16), "q_proj.bias": (24,), "k_proj.weight": (8, 16), "k_proj.bias": (8,),
        "v_proj.weight": (8, 16), "v_proj.bias": (8,), "gate_proj.weight": (21, 16), "up_proj.weight": (21, 16),
    }  # fmt: skip
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def test_rows_of_fused_parameters_get_their_own_modules_with_their_own_axes(tmp_path: Path) -> None:
    base = fused_base()
    path = write_delta(tmp_path / "d.pxd", base)
    model = Fused(base)
    apply_(model, path)
    wanted = expected_bytes(path, base)
    assert bytes_of({"w": model.qkv_proj.weight})["w"] == b"".join(wanted[f"{n}_proj.weight"] for n in "qkv")
    assert bytes_of({"b": model.qkv_proj.bias})["b"] == b"".join(wanted[f"{n}_proj.bias"] for n in "qkv")
    gate_up = wanted["gate_proj.weight"] + wanted["up_proj.weight"]
    assert bytes_of({"w": model.gate_up_proj.weight})["w"] == gate_up


def test_a_transposed_layout_is_reached_through_a_view(tmp_path: Path) -> None:
    base = {"w": torch.randn(24, 17).bfloat16()}
    path = write_delta(tmp_path / "d.pxd", base)
    for undo in ("device", "host"):
        live = base["w"].t().contiguous()
        apply_({}, path, views={"w": live.t()}, undo=undo)
        assert bytes_of({"w": live.t()}) == expected_bytes(path, base)


def test_what_cannot_hold_the_fine_tune_is_refused(tmp_path: Path) -> None:
    model = Small()
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base)
    quantised = copy.deepcopy(model)
    quantised.hf_quantizer = object()
    refused(quantised, path, LiveModelError, "quantised")
    with torch.device("meta"):
        empty = Small()
    with pytest.raises(LiveModelError, match="meta"):
        apply_(empty, path)
    longer = pf.ModuleDelta(
        name="w", shape=(3, 8), dtype=pf.DType.BF16, encoding=pf.Encoding.FULL,
        full=np.zeros((3, 8), np.uint16),
        base=pf.BaseRef(dtype=pf.DType.BF16, shape=(2, 8), sha256="0" * 64),
    )  # fmt: skip
    with pf.DeltaWriter(
        tmp_path / "r.pxd", base=pf.Identity(id="b"), fine_tuned=pf.Identity(id="f")
    ) as writer:  # fmt: skip
        writer.add(longer)
        writer.drop("gone")
        writer.finish()
    refused({"w": torch.zeros(2, 8).bfloat16()}, tmp_path / "r.pxd", LiveModelError, "storage cannot change in place")


def test_a_part_of_a_delta_is_refused(tmp_path: Path) -> None:
    from peraxis_tools.split import split

    model = Small()
    whole = write_delta(tmp_path / "whole.pxd", base_of(model))
    parts = split(whole, tmp_path / "parts", parts=2).parts
    refused(model, parts[0].path, LiveModelError, "part of a delta")


def test_modules_that_share_storage_but_differ_are_refused(tmp_path: Path) -> None:
    model = Small(tied=True)
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    refused(model, path, LiveModelError, "share storage")


def configurations() -> list[Any]:
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

    size = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return [
        LlamaConfig(**size),
        LlamaConfig(**size, tie_word_embeddings=True),
        MistralConfig(**size),
        Qwen2Config(**size, tie_word_embeddings=True),
        Qwen3Config(**size, head_dim=8),
        Gemma2Config(**size, head_dim=8),
        Phi3Config(**size),
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ]


@pytest.mark.parametrize("index", range(8))
def test_transformers_models_become_what_the_fine_tuned_checkpoint_would_be(index: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = configurations()[index]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    base = base_of(model)
    tied = {}
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        first = next(n for n, p in named_tensors(model).items() if p is model.get_input_embeddings().weight)
        last = [n for n, p in named_tensors(model).items() if p is model.get_input_embeddings().weight][-1]
        tied = {last: first} if last != first else {}
    path = write_delta(tmp_path / "d.pxd", base, tied=tied, components=1 + index % 2)
    apply_(model, path)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.isfinite(model(ids).logits).all()


def test_the_stories_pair_becomes_what_the_reference_makes_of_it(shared: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared / "pairs" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base, tied={"lm_head.weight": "model.embed_tokens.weight"}, components=2)
    apply_(model, path)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)


def moe_configurations() -> list[Any]:
    from transformers import MixtralConfig, Qwen3MoeConfig

    size = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    return [
        MixtralConfig(**size, num_local_experts=3),
        Qwen3MoeConfig(**size, num_experts=4, moe_intermediate_size=20, head_dim=8),
    ]


def moe_pair(index: int, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """A model as from_pretrained gives it, and the tensors of its checkpoint."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from safetensors.torch import load_file

    config = moe_configurations()[index]
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return model, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("index", [0, 1])
def test_experts_with_other_names_in_the_checkpoint_become_what_it_would_load(index: int, tmp_path: Path) -> None:
    """Mixtral renames and fuses its experts, Qwen3-MoE fuses them: `place` finds each in the live tensors."""
    model, base = moe_pair(index, tmp_path / "base")
    assert base.keys() - named_tensors(model).keys()
    path = write_delta(tmp_path / "d.pxd", base, components=1 + index)
    apply_(model, path)
    model.save_pretrained(tmp_path / "tuned")
    from safetensors.torch import load_file

    assert bytes_of(load_file(tmp_path / "tuned" / "model.safetensors")) == expected_bytes(path, base)


def test_a_mapping_that_permutes_inside_tensors_is_told_from_a_missing_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from transformers import core_model_loading

    model, base = moe_pair(1, tmp_path / "base")
    path = write_delta(tmp_path / "d.pxd", base)

    real = core_model_loading.revert_weight_conversion

    def permuted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = real(model, state)
        return {name: t.reshape(2, -1).t().reshape(t.shape) if "expert" in name else t for name, t in found.items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", permuted)
    refused(model, path, LiveModelError, r"experts.*stores it in several tensors, or in another order")
