"""An anchor gets the configuration and the tokenizer of its base, so it must be of the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peraxis
import peraxis_format as pxd
from peraxis_tools.errors import CheckFailedError
from tests.tools.compress_pairs import llama_config

REMEDY = "; pass the checkpoint that the trainer began with as the base(, or publish all weights of the model)?"


def model_of(**changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(llama_config(**changes), dtype=torch.bfloat16)


def base_of(folder: Path, **changes: Any) -> Path:
    model_of(**changes).save_pretrained(folder)
    return folder


def anchor_of(folder: Path, model: Any) -> Path:
    return Path(peraxis.UpdateWriter(model, folder).step().path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a trainer, with an anchor of a model of two layers."""
    return anchor_of(tmp_path / "run", model_of(num_hidden_layers=2)).parent


def uses(run: Path, base: Path, output: Path) -> list[Any]:
    return [
        lambda: peraxis.apply(base, run, output),
        lambda: peraxis.load_model(base, run),
        lambda: peraxis.compact(base, run, output.with_suffix(".pxd")),
        lambda: peraxis.verify(run, base=base),
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 1}, r"it has model\.layers\.1\.\S+, and the config\.json of \S+other says 1 layer"),
        ({"num_hidden_layers": 3}, r"it has no model\.layers\.2\.\S+\.weight, which is \[[0-9, ]+\] in \S+other"),
        (
            {"num_hidden_layers": 2, "hidden_size": 48},
            r"model\.embed_tokens\.weight is \[32, 24\] there and \[32, 48\] in \S+other",
        ),
    ],
)
def test_an_anchor_of_another_size_is_refused_by_each_verb(
    changes: dict[str, int], reason: str, run: Path, tmp_path: Path
) -> None:
    other = base_of(tmp_path / "other", **changes)
    for use in uses(run, other, tmp_path / "out"):
        with pytest.raises(CheckFailedError, match=rf"anchor-00000000\.pxd: is for another model; {reason}{REMEDY}$"):
            use()
    assert not (tmp_path / "out").exists()


def test_weights_that_the_base_lacks_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(num_hidden_layers=1)
    model.value = torch.nn.Linear(24, 24, bias=False, dtype=torch.bfloat16)
    run = anchor_of(tmp_path / "run", model).parent
    peraxis.apply(base_of(tmp_path / "other", num_hidden_layers=1), run, tmp_path / "out")
    noted = [message for message in caplog.messages if "that the base lacks" in message or " lacks, like " in message]
    assert len(noted) == 1
    assert "has 1 weight that" in noted[0]
    assert "like value.weight" in noted[0]


def test_layers_of_the_base_that_transformers_does_not_load_may_be_missing(run: Path, tmp_path: Path) -> None:
    """Those that predict several tokens, after the layers that the configuration counts."""
    other = base_of(tmp_path / "other", num_hidden_layers=3)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    peraxis.apply(other, run, tmp_path / "out")


@pytest.mark.parametrize("tie", [False, True])
def test_the_checkpoint_that_the_trainer_began_with_is_taken_without_a_word(
    tie: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of(tmp_path / "base", tie_word_embeddings=tie)
    run = anchor_of(tmp_path / "run", model_of(tie_word_embeddings=tie)).parent
    for use in uses(run, base, tmp_path / "out"):
        use()
    assert not [message for message in caplog.messages if "lacks" in message or "another model" in message]


def lone(path: Path, tensors: dict[str, torch.Tensor], *, config: bool = False) -> Path:
    """Write an anchor of these F32 tensors."""
    with pxd.DeltaWriter(path, base=pxd.Identity(id="b"), fine_tuned=pxd.Identity(id="t"), chained=True) as writer:
        for name, tensor in tensors.items():
            module = pxd.ModuleDelta(
                name=name, shape=tuple(tensor.shape), dtype=pxd.DType.F32, encoding=pxd.Encoding.FULL,
                full=tensor.numpy(),
            )  # fmt: skip
            writer.add(module)
        if config:
            writer.add_asset("config.json", b"{}")
        writer.finish()
    return path


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_copy_of_a_table_in_the_base_may_be_missing_and_another_table_may_not(tmp_path: Path) -> None:
    table = torch.rand(8, 4)
    anchor = lone(tmp_path / "a.pxd", {EMBED: table + 1})
    peraxis.apply(stored(tmp_path / "tied", {EMBED: table, HEAD: table.clone()}), anchor, tmp_path / "out")
    untied = stored(tmp_path / "untied", {EMBED: table, HEAD: table + 2})
    with pytest.raises(CheckFailedError, match=rf"it has no lm_head\.weight, which is \[8, 4\] in .*{REMEDY}"):
        peraxis.apply(untied, anchor, tmp_path / "other")


def test_an_anchor_with_its_own_configuration_is_not_compared(tmp_path: Path) -> None:
    base = stored(tmp_path / "base", {EMBED: torch.rand(8, 4), "model.norm.weight": torch.rand(4)})
    anchor = lone(tmp_path / "a.pxd", {EMBED: torch.rand(9, 4)}, config=True)
    assert peraxis.apply(base, anchor, tmp_path / "out").tensors == 1


def test_bytes_of_the_base_are_read_only_for_tables_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = pxd.Safetensors.sha256

    def counted(self: pxd.Safetensors, name: str, **options: Any) -> str:
        read.append(name)
        return digest(self, name, **options)

    monkeypatch.setattr(pxd.Safetensors, "sha256", counted)
    table, others = torch.rand(8, 4), {f"model.layers.{i}.mlp.up_proj.weight": torch.rand(8, 4) for i in range(3)}
    anchor = lone(tmp_path / "a.pxd", {EMBED: table, **others})
    peraxis.apply(stored(tmp_path / "base", {EMBED: table, HEAD: table.clone(), **others}), anchor, tmp_path / "out")
    assert set(read) == {EMBED, HEAD}


def test_experts_that_the_model_fuses_are_not_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expert = "model.layers.0.mlp.experts.{}.up_proj.weight"
    base = {EMBED: torch.rand(8, 4), **{expert.format(i): torch.rand(6, 4) for i in range(2)}}
    fused = {EMBED: torch.rand(8, 4), "model.layers.0.mlp.experts.up_proj": torch.rand(2, 6, 4)}
    peraxis.apply(stored(tmp_path / "base", base), lone(tmp_path / "a.pxd", fused), tmp_path / "out")
    assert ["has 1 weight that" in message for message in caplog.messages].count(True) == 1


def test_a_model_whose_tensors_have_other_prefixes_in_files_is_no_other_model(tmp_path: Path) -> None:
    """Llava in transformers 5, and the files of GPT-2 on the hub."""
    from transformers import CLIPVisionConfig, GPT2Config, GPT2LMHeadModel, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    llava = LlavaForConditionalGeneration(LlavaConfig(text_config=llama_config(), vision_config=vision)).bfloat16()
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=24, n_layer=2, n_head=2)).bfloat16()
    for name, model in (("llava", llava), ("gpt2", gpt2)):
        base = tmp_path / name
        model.save_pretrained(base)
        if name == "gpt2":
            tensors = load_file(base / "model.safetensors")
            bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
            save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
        run = anchor_of(tmp_path / f"{name}-run", model).parent
        peraxis.apply(base, run, tmp_path / f"{name}-out")
        again = type(model).from_pretrained(tmp_path / f"{name}-out", dtype=torch.bfloat16).state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 1}, r"it has layers\.1\.\S+, and the config\.json of \S+other says 1 layer"),
        ({"num_hidden_layers": 3}, r"it has no model\.layers\.2\.\S+\.weight, which is \[[0-9, ]+\] in \S+other"),
        ({"vocab_size": 48}, r"embed_tokens\.weight is \[32, 24\] there and \[48, 24\] in \S+other"),
        (
            {"intermediate_size": 96},
            r"layers\.0\.mlp\.\w+\.weight is \[[0-9, ]+\] there and \[[0-9, ]+\] in \S+other",
        ),
        ({"tie_word_embeddings": False}, r"it has no lm_head\.weight, which is \[32, 24\] in \S+other"),
    ],
)
def test_an_anchor_without_the_prefixes_of_files_is_refused_as_one_with_them_is(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    run = anchor_of(tmp_path / "run", model_of(num_hidden_layers=2).model).parent
    other = base_of(tmp_path / "other", **{"num_hidden_layers": 2, "tie_word_embeddings": True, **changes})
    for use in uses(run, other, tmp_path / "out"):
        with pytest.raises(CheckFailedError, match=rf"anchor-00000000\.pxd: is for another model; {reason}{REMEDY}$"):
            use()


def test_biases_that_the_anchor_lacks_are_missed_and_those_that_the_base_lacks_are_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen2 is Llama with biases, in the same names and shapes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = llama_config().to_diff_dict() | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    torch.manual_seed(0)
    qwen2 = Qwen2ForCausalLM(Qwen2Config.from_dict(config)).bfloat16()
    for name, parameter in qwen2.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.ones_(parameter)
    qwen2.save_pretrained(tmp_path / "qwen2")
    with pytest.raises(CheckFailedError, match=r"it has no model\.layers\.0\.self_attn\.[qkv]_proj\.bias"):
        peraxis.apply(tmp_path / "qwen2", anchor_of(tmp_path / "llama-run", model_of()), tmp_path / "out")
    llama = base_of(tmp_path / "llama")
    peraxis.apply(llama, anchor_of(tmp_path / "qwen2-run", qwen2), tmp_path / "out")
    (noted,) = [message for message in caplog.messages if " lacks, like " in message]
    assert "_proj.bias" in noted


def test_zero_biases_of_files_may_be_missing_in_a_model(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.bias"] = torch.zeros(24, dtype=torch.bfloat16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = anchor_of(tmp_path / "run", model_of()).parent
    peraxis.apply(base, run, tmp_path / "out")


def test_a_part_of_a_model_with_more_layers_than_its_text_model_is_no_other_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["lm_head.weight", *(f"model.visual.blocks.{i}.attn.weight" for i in range(3))]
    live = {name: torch.zeros(8, 8, dtype=torch.bfloat16) for name in names}
    base = tmp_path / "base"
    base.mkdir()
    save_file({name.removeprefix("model."): tensor for name, tensor in live.items()}, base / "model.safetensors")
    (base / "config.json").write_text('{"text_config": {"num_hidden_layers": 2}}')
    peraxis.apply(base, anchor_of(tmp_path / "run", live).parent, tmp_path / "out")
    assert not [message for message in caplog.messages if "lacks" in message]


def encoder_and_decoder(encoder: int, decoder: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, num_layers=encoder, num_decoder_layers=decoder)).bfloat16()


@pytest.mark.parametrize("layers", [(3, 4), (2, 5)])
def test_a_layer_after_those_of_the_base_is_refused_also_if_its_configuration_has_no_known_count(
    layers: tuple[int, int], tmp_path: Path
) -> None:
    """T5 has two stacks of layers, and other names for their numbers."""
    encoder_and_decoder(2, 4).save_pretrained(tmp_path / "base")
    more = anchor_of(tmp_path / "more", encoder_and_decoder(*layers))
    stack, last = ("encoder", 1) if layers[0] > 2 else ("decoder", 3)
    reason = rf"it has {stack}\.block\.{last + 1}\.\S+, and \S+base has no layer after {last}{REMEDY}"
    with pytest.raises(CheckFailedError, match=reason):
        peraxis.apply(tmp_path / "base", more, tmp_path / "out")
    same = anchor_of(tmp_path / "same", encoder_and_decoder(2, 4))
    peraxis.apply(tmp_path / "base", same, tmp_path / "out")
