"""Exact tensors beside signs in every live path: the bits of the reference, and what is checked before they are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peraxis_format as pf
from peraxis_format.exact import lossless_module
from peraxis_format.ops.exact import BLOCK
from peraxis_format.ops.tensors import dtype_of, storage_array
from peraxis_format.torch import SwapError, VariantSwitch, apply_, serve
from peraxis_format.torch.swap import engine, undo
from peraxis_format.torch.updates import apply_update
from tests.loader.support import Small, base_of, bytes_of, expected_bytes, named_tensors, random_module, refused

EXACT = ("embed.weight", "first.weight", "first.bias", "norm.weight", "big")


class Larger(Small):
    """Small, with a matrix of more than two blocks of the exact encoding."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        torch.manual_seed(1)
        self.big = nn.Parameter(0.02 * torch.randn(3, BLOCK - 7).to(self.embed.weight.dtype))


def exact_module(name: str, base: Tensor, seed: int, result: str | None = None) -> pf.ModuleDelta:
    """A twentieth of the weights moved by one, a few by more, some to odd patterns."""
    rng = np.random.default_rng(seed)
    old = storage_array(base.detach().contiguous())
    new = old.copy()
    words = new.reshape(-1).view(f"u{new.dtype.itemsize}")
    words[rng.random(words.size) < 0.05] += 1
    words[rng.integers(0, words.size, 2)] ^= 0x155
    like = random_module(name, base, rng, [pf.Axis.ROW], pf.Encoding.SAME)
    made = lossless_module(name, new, dtype_of(base, name), old=old, base=like.base)
    assert made.encoding is pf.Encoding.EXACT
    return made if result is None else pf.ModuleDelta(**{**fields(made), "result": result})


def fields(module: pf.ModuleDelta) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__dataclass_fields__}


def write_mixed(
    path: Path, base: dict[str, Tensor], seed: int = 0, exact: Sequence[str] = EXACT, *, tied: bool = False,
    wrong: str | None = None,
) -> Path:  # fmt: skip
    """Exact tensors of these names, signs in other matrices, other vectors whole. wrong: names another result."""
    rng = np.random.default_rng(seed)
    with pf.DeltaWriter(path, base=pf.Identity(id="b"), fine_tuned=pf.Identity(id="f")) as writer:
        for i, (name, tensor) in enumerate(base.items()):
            if tied and name == "head.weight":
                continue
            if name in exact:
                writer.add(exact_module(name, tensor, seed + i, "0" * 64 if name == wrong else None))
            else:
                kind = pf.Encoding.SIGN if tensor.ndim > 1 else pf.Encoding.FULL
                writer.add(random_module(name, tensor, rng, [pf.Axis.ROW_COL], kind))
        if tied:
            writer.tie("embed.weight", "head.weight")
        writer.finish()
    return path


@pytest.mark.parametrize(("dtype", "keep", "backend"), [
    (torch.bfloat16, "device", "numba"), (torch.bfloat16, "host", "numpy"), (torch.float16, "host", "numba"),
    (torch.float32, "device", "numba"),
])  # fmt: skip
def test_apply_writes_the_bits_of_the_reference(
    dtype: torch.dtype, keep: Any, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERAXIS_BACKEND", backend)
    model = Larger(dtype=dtype)
    base = base_of(model)
    path = write_mixed(tmp_path / "d.pxd", base)
    apply_(model, path, undo=keep)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "tied"])
def three(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, dict[str, Path], dict[str | None, dict[str, bytes]]]:
    """Whether tensors of Larger are tied, three variants of it, and the bytes of each and of the base (None)."""
    base = base_of(Larger(tied=request.param))
    every = tuple(name for name in base if name != "head.weight")
    chosen = {"a": EXACT, "b": ("second.weight", "norm.bias"), "c": every}
    folder = tmp_path_factory.mktemp("three")
    paths = {
        name: write_mixed(folder / f"{name}.pxd", base, 10 * seed, exact, tied=request.param)
        for seed, (name, exact) in enumerate(chosen.items())
    }
    return request.param, paths, {None: bytes_of(base)} | {name: expected_bytes(paths[name], base) for name in paths}


@pytest.mark.parametrize("options", [
    {"residency": "pinned"}, {"residency": "file"}, {"base": "undo"}, {"base": "undo", "small": True},
])  # fmt: skip
def test_random_swaps_have_the_bits_of_the_reference_at_every_residency(
    options: dict[str, Any],
    three: tuple[bool, dict[str, Path], dict[str | None, dict[str, bytes]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if options.get("small"):
        monkeypatch.setattr(undo, "_STRETCH", BLOCK)  # several stretches a tensor
    tied, paths, wanted = three
    model = Larger(tied=tied)
    chooser = random.Random(3)
    with VariantSwitch(model, base=options.get("base", "auto")) as switch:
        for name, path in paths.items():
            switch.add(name, path, options.get("residency"))
            switch.use(name)  # so that the next one is added while the model is a variant
        for _ in range(12):
            name = chooser.choice(list(wanted))
            switch.use(name)
            assert bytes_of(named_tensors(model)) == wanted[name]
        switch.use(None)
        assert bytes_of(named_tensors(model)) == wanted[None]


def test_the_engine_of_a_gpu_writes_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    chosen = engine.choose
    monkeypatch.setattr(engine, "choose", lambda name, size, kind: chosen(name, size, kind, "triton"))
    model = Small()
    live: dict[str, Tensor] = {**base_of(model), "long": 0.02 * torch.randn(900).bfloat16()}
    live["turned"] = torch.randn(30, 20).mul_(0.02).bfloat16().t()
    base = {name: tensor.detach().clone() for name, tensor in live.items()}
    path = write_mixed(tmp_path / "d.pxd", base, 1, ("embed.weight", "first.bias", "long", "turned"))
    with VariantSwitch(live) as switch:
        switch.add("d", path)
        assert isinstance(switch._registry.find("d").engine, engine.TritonEngine)
        switch.use("d")
        assert bytes_of(live) == expected_bytes(path, base)
        switch.use(None)
        assert bytes_of(live) == bytes_of(base)


@pytest.mark.parametrize("place", ["device", "undo"])
def test_strided_and_widened_tensors_are_written_too(place: Any, tmp_path: Path) -> None:
    turned = torch.randn(30, 20).mul_(0.02).bfloat16().t()
    narrow = torch.randn(20, 20).mul_(0.02).bfloat16()
    live = {"turned": turned, "wide": narrow.float(), "plain": narrow.clone()}
    base = {"turned": turned.clone(), "wide": narrow, "plain": narrow}
    path = write_mixed(tmp_path / "d.pxd", base, 1, tuple(base))
    wanted = expected_bytes(path, base)
    with VariantSwitch(live, base=place) as switch:
        switch.add("d", path)
        for name in ("d", None, "d"):
            switch.use(name)
            found = {key: tensor.bfloat16() for key, tensor in live.items()}
            assert bytes_of(found) == (bytes_of(base) if name is None else wanted)


def test_a_wrong_result_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    model = Larger()
    base = base_of(model)
    path = write_mixed(tmp_path / "d.pxd", base, wrong="first.bias")
    refused(model, path, pf.BindingError, r"E405: .*d\.pxd.*at first\.bias")
    for place in ("device", "undo"):
        with VariantSwitch(model, base=place) as switch:
            for residency in ("pinned", "file") if place == "device" else ("pinned",):
                with pytest.raises(pf.BindingError, match=r"E405: .*d\.pxd.*at first\.bias"):
                    switch.add("d", path, residency)
            assert switch.variants() == ()
    with pytest.raises(pf.BindingError, match=r"E405: .*d\.pxd.*at first\.bias"):
        serve(model, {"d": path})
    assert bytes_of(named_tensors(model)) == bytes_of(base)


@pytest.mark.parametrize("place", ["device", "undo"])
def test_a_failed_swap_to_an_exact_variant_returns_to_the_one_before(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Larger()
    base = base_of(model)
    paths = {name: write_mixed(tmp_path / f"{name}.pxd", base, seed) for seed, name in enumerate("ab")}
    with VariantSwitch(model, base=place) as switch:
        for name, path in paths.items():
            switch.add(name, path)
        switch.use("a")
        with monkeypatch.context() as patch:
            if place == "undo":
                plain, calls = undo.moved, [0]

                def broken(*args: Any, **options: Any) -> Tensor:
                    calls[0] += 1
                    if calls[0] == 3:
                        raise OSError("no memory")
                    return plain(*args, **options)

                patch.setattr(undo, "moved", broken)
            else:
                registered = switch._registry.find("b")

                def failing(*_: Any) -> None:
                    raise OSError("no memory")

                patch.setattr(registered.engine, "write", failing)
            with pytest.raises(SwapError, match="no memory"):
                switch.use("b")
        assert bytes_of(named_tensors(model)) == expected_bytes(paths["a"], base)
        switch.use("b")
        assert bytes_of(named_tensors(model)) == expected_bytes(paths["b"], base)


@pytest.mark.parametrize("tied", [False, True])
def test_a_mixed_batch_serves_exact_tensors_as_the_merged_model_has_them(tied: bool, tmp_path: Path) -> None:
    model = Small(tied=tied)
    base = base_of(model)
    ids = torch.randint(0, 37, (3, 70))  # so many rows that linears multiply with the merged weights
    everything = tuple(name for name in base if name != "head.weight" or not tied)
    paths = {
        "mixed": write_mixed(tmp_path / "a.pxd", base, 0, EXACT, tied=tied),
        "all": write_mixed(tmp_path / "b.pxd", base, 7, everything, tied=tied),
    }
    wanted = [model(ids[1:2])]
    for path in paths.values():
        merged = Small(tied=tied)
        apply_(merged, path)
        wanted.append(merged(ids[len(wanted) * 2 - 2 : len(wanted) * 2 - 1]))
    with serve(model, paths) as served:
        with served.using(["mixed", None, "all"]):
            found = model(ids)
        assert served.stored >= sum(base[name].nbytes for name in everything)
    assert torch.equal(found, torch.cat([wanted[1], wanted[0], wanted[2]]))
    assert torch.equal(model(ids[1:2]), wanted[0])


@pytest.mark.parametrize("encoding", ["exact", "sign"])
def test_equal_tensors_of_a_file_that_share_storage_are_written_once(encoding: str, tmp_path: Path) -> None:
    def write(path: Path, base: dict[str, Tensor]) -> Path:
        with pf.DeltaWriter(path, base=pf.Identity(id="b"), fine_tuned=pf.Identity(id="f")) as writer:
            for name, tensor in base.items():
                rng = np.random.default_rng(2)
                signs = random_module(name, tensor, rng, [pf.Axis.ROW], pf.Encoding.SIGN)
                writer.add(exact_module(name, tensor, 2) if encoding == "exact" else signs)
            writer.finish()
        return path

    table = torch.randn(40, 30).mul_(0.02).bfloat16()
    base = {"embed": table.clone(), "head": table.clone()}
    path = write(tmp_path / "d.pxd", base)
    wanted = expected_bytes(path, base)
    for keep in ("device", "host"):
        shared = table.clone()
        live = {"embed": shared, "head": shared}
        apply_(live, path, undo=keep)  # type: ignore[arg-type]
        assert bytes_of(live) == wanted
    model = nn.ModuleDict({"embed": nn.Embedding(40, 30), "head": nn.Linear(30, 40, bias=False)})
    model["embed"].weight = model["head"].weight = nn.Parameter(table.clone())
    names = {f"{name}.weight": tensor for name, tensor in base.items()}
    rows = torch.randn(70, 30).bfloat16()
    with serve(model, {"d": write(tmp_path / "e.pxd", names)}) as served, served.using("d"):
        found = model["embed"](torch.arange(40))
        assert bytes_of({"embed": found})["embed"] == wanted["embed"]
        assert torch.equal(model["head"](rows), nn.functional.linear(rows, found))
    shared = table.clone()
    live = {"embed": shared, "head": shared}
    with VariantSwitch(live, base="undo") as switch:
        switch.add("d", path)
        for name in ("d", None, "d"):
            switch.use(name)
            assert bytes_of(live) == (wanted if name else bytes_of(base))


def test_a_block_that_does_not_decode_is_named_with_its_tensor_and_file(tmp_path: Path) -> None:
    base = {"w": 0.02 * torch.randn(3, BLOCK - 7, generator=torch.Generator().manual_seed(0)).bfloat16()}
    path = write_mixed(tmp_path / "d.pxd", base, exact=("w",))
    other = base["w"].clone()
    other.reshape(-1)[BLOCK : 2 * BLOCK] = 1.0
    said = r"block 1 does not decode on these weights \(at w, SPEC 7\.4\); pass the base checkpoint"
    with pf.open(path) as delta, pytest.raises(pf.BindingError, match=f"E405: .*{said}"):
        pf.reconstruct(delta.load("w"), storage_array(other))
    said = r"block 1 does not decode on these weights \(at w, SPEC 7\.4\); load b, which it was made on; if other code"
    with pytest.raises(pf.BindingError, match=rf"E405: .*d\.pxd: .*{said}"):
        apply_update({"w": other}, path)


def test_what_compress_stores_exact_is_what_every_live_path_becomes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import peraxis
    from tests.tools.compress_pairs import llama_config, write_pair

    base, tuned = write_pair(tmp_path, llama_config(num_hidden_layers=1), dtype=torch.bfloat16)
    path = tmp_path / "d.pxd"
    done = peraxis.compress(base, tuned, path, fit="none", exact="q_proj|norm|embed|down")
    assert done.encodings["exact"] > 3

    def load(folder: Path) -> nn.Module:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model

    merged = peraxis.load(path, base=base, dtype=torch.bfloat16)[0]
    wanted = bytes_of(dict(merged.named_parameters()))
    model = load(base)
    pristine = bytes_of(dict(model.named_parameters()))
    for place in ("device", "undo"):
        with VariantSwitch(model, base=place) as switch:
            switch.add("d", path)
            for name in ("d", None):
                switch.use(name)
                assert bytes_of(dict(model.named_parameters())) == (wanted if name else pristine)
    ids = torch.arange(80)[None] % 30
    with serve(model, {"d": path}) as served, served.using(["d"]), torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits.float(), merged(ids).logits.float(), rtol=0.02, atol=0.02)
    apply_(model, path)
    assert bytes_of(dict(model.named_parameters())) == wanted
