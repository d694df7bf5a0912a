"""compress from end to end on small random pairs: the result of every tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peraxis_format as pxd
from peraxis_tools import apply
from peraxis_tools.compress import CompressOptions, OptionError, compress
from peraxis_tools.compress.calibration.partition import partition
from peraxis_tools.compress.fit.layerwise import LayerwiseCalibration
from peraxis_tools.errors import ToolError
from peraxis_tools.evaluate import evaluate
from peraxis_tools.texts.samples import load_samples
from tests.factories import modules_of
from tests.tools.compress_pairs import FEW, llama_config, llama_pair, write_pair, write_text


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return llama_pair(tmp_path_factory.mktemp("pair"))


def edited(folder: Path, source: Path, **changes: torch.Tensor | None) -> Path:
    """Write a copy of a checkpoint with tensors changed, added, or removed (None)."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_every_tensor_is_covered_and_the_applied_folder_is_what_the_file_says(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, tuned, text = pair
    output = tmp_path / "delta.pxd"
    result = compress(base, tuned, output, calibration=str(text), **FEW)
    apply(base, output, tmp_path / "applied")
    original, applied = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "applied"))
    assert original.keys() == applied.keys()
    exact = {name for name, module in modules_of(output).items() if module.encoding is pxd.Encoding.FULL}
    assert exact == {name for name in original if "norm" in name}
    assert all(torch.equal(original[name], applied[name]) for name in exact)
    assert result.encodings["sign"] == len(original) - len(exact)
    assert not (tmp_path / "delta.pxd.peraxis-work").exists()


def test_the_same_inputs_give_the_same_bytes(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, text = pair
    calibrated = {"calibration": str(text), **FEW}
    for options in ({"force": True}, calibrated, {"distill_samples": 2, "distill_epochs": 2, **calibrated}):
        files = [tmp_path / f"{i}.pxd" for i in range(2)]
        for file in files:
            compress(base, tuned, file, overwrite=True, **options)
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_can_be_repeated_from_its_artifact(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, text = pair
    monkeypatch.chdir(text.parent)  # the artifact names the text without its folder
    compress(base, tuned, tmp_path / "one.pxd", calibration=str(text), masks=2, axis="col", held_out=0.3, **FEW)
    with pxd.open(tmp_path / "one.pxd") as delta:
        (tmp_path / "run.yaml").write_text(delta.manifest.metadata["peraxis.config"], "utf-8")
        choices = json.loads(delta.manifest.metadata["peraxis.plan"])["choices"]
        assert choices.pop("sign 2 col") == "all others"
        named = {name for names in choices.values() for name in names.split()}
        assert named == {module.name for module in delta.manifest.modules if len(module.components) != 2}
    options = CompressOptions.from_yaml(tmp_path / "run.yaml")
    compress(base, tuned, tmp_path / "two.pxd", options=options, force=True)
    assert (tmp_path / "one.pxd").read_bytes() == (tmp_path / "two.pxd").read_bytes()


@pytest.mark.parametrize("calibrated", [False, True])
def test_added_dropped_unchanged_and_resized_tensors(
    pair: tuple[Path, Path, Path], tmp_path: Path, calibrated: bool
) -> None:
    source_base, source_tuned, text = pair
    original = load_file(source_base / "model.safetensors")
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    # The base has two fewer vocabulary rows, a tensor that the fine-tune lacks, and an unchanged tensor.
    base = edited(
        tmp_path / "base",
        source_base,
        **{name: original[name][:-2].clone() for name in tables},
        **{"model.gone.weight": torch.zeros(8, 8)},
    )
    same = "model.layers.1.mlp.up_proj.weight"
    tuned = edited(tmp_path / "tuned", source_tuned, **{same: original[same].clone(), "model.extra": torch.arange(5)})
    options = {"calibration": str(text), **FEW} if calibrated else {"force": True}
    compress(base, tuned, tmp_path / "delta.pxd", **options)
    modules = modules_of(tmp_path / "delta.pxd")
    assert modules[same].encoding is pxd.Encoding.SAME
    assert modules["model.extra"].base is None
    with pxd.open(tmp_path / "delta.pxd") as delta:
        assert delta.manifest.dropped == ("model.gone.weight",)
        assert delta["lm_head.weight"].tail.shape[0] == 2
    apply(base, tmp_path / "delta.pxd", tmp_path / "applied")
    applied, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "applied", tuned))
    assert applied.keys() == expected.keys()
    for name in tables:
        assert torch.equal(applied[name][-2:], expected[name][-2:])


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, llama_config(tie_word_embeddings=True))
    tensors = load_file(tuned / "model.safetensors")
    twice = edited(tmp_path / "twice", tuned, **{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    text = write_text(tmp_path / "text.jsonl")
    for source, tied in ((tuned, ()), (twice, (("model.embed_tokens.weight", "lm_head.weight"),))):
        compress(base, source, tmp_path / "delta.pxd", calibration=str(text), overwrite=True, **FEW)
        with pxd.open(tmp_path / "delta.pxd") as delta:
            assert delta.manifest.tied == tied
            assert "lm_head.weight" not in {module.name for module in delta.manifest.modules}


def test_an_embedding_that_is_the_head_too_is_fitted_as_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path, llama_config(tie_word_embeddings=True), step=0.05)
    text = write_text(tmp_path / "text.jsonl")
    options = {"calibration": str(text), "embeddings": "sign", **FEW, "calibration_samples": 40}
    with_head = divergence(base, tuned, tmp_path / "both", **options)
    monkeypatch.setattr(LayerwiseCalibration, "_fit_tied", lambda self, parameter: [])
    assert with_head < 0.9 * divergence(base, tuned, tmp_path / "rows", **options)


def divergence(base: Path, tuned: Path, folder: Path, **options: Any) -> float:
    """Return the mean KL(fine-tuned || applied) on random ids."""
    compress(base, tuned, folder.with_suffix(".pxd"), **options)
    apply(base, folder.with_suffix(".pxd"), folder)
    ids = torch.randint(3, 30, (16, 24), generator=torch.Generator().manual_seed(5))
    models = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (tuned, folder))
    with torch.no_grad():
        p, q = (torch.log_softmax(model(input_ids=ids).logits, -1) for model in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_pair_that_is_none_is_refused_before_work_naming_what_differs(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, tuned, _ = pair
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = edited(tmp_path / "wrong", base, **{name: torch.zeros(44, 25)})
    with pytest.raises(ToolError, match=r"up_proj.weight is \[44, 25\] in the base and \[44, 24\]"):
        compress(wrong, tuned, tmp_path / "delta.pxd")
    (tmp_path / "other").mkdir()
    save_file({"some.weight": torch.zeros(4, 4)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ToolError, match="no tensor has the same name"):
        compress(tmp_path / "other", tuned, tmp_path / "delta.pxd")
    assert not list(tmp_path.glob("delta*"))


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_byte_target_is_kept_and_used(pair: tuple[Path, Path, Path], tmp_path: Path, calibrated: bool) -> None:
    base, tuned, text = pair
    options = {"calibration": str(text), **FEW} if calibrated else {"force": True}
    errors = []
    smallest = compress(base, tuned, tmp_path / "small.pxd", embeddings="sign", **options).bytes
    for target in (smallest, smallest + 6000, smallest + 12000):
        path = tmp_path / f"{target}.pxd"
        result = compress(base, tuned, path, target_size=target, **options)
        assert target - 5200 <= result.bytes <= target
        if calibrated:  # the budget is spent for KL on the text, not for the error of the weights
            found = evaluate(base, tuned, path, {"text": text}, samples=8, sequence_length=16, candidates=("merged",))
            errors.append(found.domains[0].candidates["merged"].kl)
            continue
        apply(base, path, tmp_path / f"{target}")
        ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / f"{target}", tuned))
        errors.append(sum(float((ours[n].float() - theirs[n].float()).square().sum()) for n in ours))
    # A fit on 128 tokens orders near targets by chance; the error of the weights follows the bytes.
    assert errors[0] > (errors[-1] if calibrated else max(errors[1:]))
    with pytest.raises(OptionError, match="target too small"):
        compress(base, tuned, tmp_path / "none.pxd", target_size=3000, **options)


def test_distillation_is_never_worse_on_held_out_text(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, text = pair
    for lr, better in ((1e-2, True), (30.0, False)):
        path = tmp_path / f"{lr}.pxd"
        compress(base, tuned, path, calibration=str(text), distill_samples=6, distill_epochs=3, distill_lr=lr, **FEW)
        with pxd.open(path) as delta:
            before, after = map(float, delta.manifest.metadata["peraxis.distillation"].split(": ")[1].split(" -> "))
        assert after < before if better else after == before


def test_full_tensors_move_only_where_distillation_may_move_them(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, text = pair
    losses = []
    for lr in (0.0, 3e-3):
        path = tmp_path / f"{lr}.pxd"
        options = {"distill_samples": 6, "distill_epochs": 3, "embeddings": "full", "distill_full_lr": lr, **FEW}
        compress(base, tuned, path, calibration=str(text), **options)
        apply(base, path, tmp_path / f"{lr}")
        with pxd.open(path) as delta:
            losses.append(float(delta.manifest.metadata["peraxis.distillation"].split(" -> ")[1]))
            full = {module.name for module in delta.manifest.modules if module.encoding is pxd.Encoding.FULL}
        exact, applied = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / f"{lr}"))
        assert {name for name in full if not torch.equal(exact[name], applied[name])} == (full if lr else set())
    assert losses[1] < losses[0]


def test_hidden_states_on_disk_change_nothing(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, text = pair
    for limit in (1 << 30, 0):
        compress(base, tuned, tmp_path / f"{limit}.pxd", calibration=str(text), hidden_limit=limit, **FEW)
    assert (tmp_path / "0.pxd").read_bytes() == (tmp_path / f"{1 << 30}.pxd").read_bytes()


def test_text_is_read_alike_from_every_kind_of_file(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer

    _, tuned, text = pair
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    documents = [json.loads(line)["text"] for line in text.read_text("utf-8").splitlines()]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(text.read_bytes(), mtime=0))
    (tmp_path / "b.jsonl").write_bytes(text.read_bytes())
    (tmp_path / "c.txt").write_text("\n\n".join(documents), "utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "d.parquet")
    table = [{"a": d[:10], "b": d[10:], "n": 3} for d in documents]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, table)), "utf-8")
    ids = {
        path.name: load_samples(str(path), tokenizer, samples=8, length=16, seed=1).ids
        for path in sorted(tmp_path.glob("?.*"))
    }
    for name in ("b.jsonl", "c.txt", "d.parquet"):
        assert np.array_equal(ids[name], ids["a.json.gz"]), name
    assert ids["e.jsonl"].shape == (8, 16)
    other = load_samples(str(tmp_path / "b.jsonl"), tokenizer, samples=8, length=16, seed=2)
    assert not np.array_equal(other.ids, ids["b.jsonl"])
    with pytest.raises(OptionError, match="no column 'words'"):
        load_samples(str(tmp_path / "b.jsonl"), tokenizer, samples=8, length=16, seed=1, text_column="words")


def test_validation_samples_are_nowhere_fitted() -> None:
    sources = [np.arange(20).reshape(10, 2), np.arange(100, 112).reshape(6, 2)]
    parts = partition(sources, calibration=0.5, validation=0.2)
    for whole in (
        (parts.distill, parts.distill_validation),
        (parts.fit, parts.validation, parts.distill[:6], parts.distill_validation),
    ):
        assert sorted(np.concatenate(whole).tolist()) == sorted(np.concatenate(sources).tolist())
    assert (len(parts.fit), len(parts.validation), len(parts.distill_validation)) == (6, 2, 2)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_short_text_has_a_sample_for_the_fit_beside_much_distillation(samples: int) -> None:
    parts = partition([np.arange(2 * samples).reshape(samples, 2)], calibration=4 / 154, validation=0.2)
    assert len(parts.fit) == 1
    assert len(parts.distill) >= 1


@pytest.mark.realdata
def test_the_shared_pair_is_compressed_and_rebuilt(shared: Path, tmp_path: Path) -> None:
    base, tuned = (shared / "pairs" / name for name in ("stories260K", "stories260K-shakespeare"))
    text = shared / "c4" / "c4-train.00000-of-01024.json.gz"
    options = CompressOptions(calibration=str(text), calibration_samples=10, sequence_length=128)
    result = compress(base, tuned, tmp_path / "s.pxd", options=options, force=True)
    assert result.encodings["sign"] == 36
    apply(base, tmp_path / "s.pxd", tmp_path / "applied")
    assert os.listdir(tmp_path / "applied")


@pytest.mark.parametrize("masks", ["auto", 1])
def test_distillation_of_a_pair_whose_head_alone_differs_ends_well(
    pair: tuple[Path, Path, Path], tmp_path: Path, masks: Any
) -> None:
    base, _, text = pair
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    moved = head + 0.01 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0)).to(head.dtype)
    tuned = edited(tmp_path / "tuned", base, **{"lm_head.weight": moved})
    path = tmp_path / "d.pxd"
    compress(base, tuned, path, calibration=str(text), masks=masks, distill_samples=4, **FEW)
    with pxd.open(path) as delta:
        before, after = map(float, delta.manifest.metadata["peraxis.distillation"].split(": ")[1].split(" -> "))
    assert after <= before
