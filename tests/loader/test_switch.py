"""VariantSwitch and its stream: exact bits after any swap, one upload per module, and no mixed state."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import peraxis_format as pf
from peraxis_format.ops.tensors import storage_array
from peraxis_format.torch import DeviceError, LiveModelError, SwapError, VariantSwitch
from peraxis_format.torch.device import HostDevice
from peraxis_format.torch.ring import DEPTH
from peraxis_format.torch.swap import registry
from peraxis_format.torch.swap.engine import HostEngine
from tests.loader.support import Small, base_of, bytes_of, expected_bytes, named_tensors, write_delta

RESIDENCIES = ("pinned", "file")


def variants(folder: Path, base: dict[str, Tensor], count: int) -> dict[str | None, Path]:
    """Variants that change different modules in different ways."""
    same = [(), ("second.weight", "norm.bias"), ("embed.weight",), ("first.weight", "first.bias", "head.weight")]
    return {
        str(i): write_delta(folder / f"{i}.pxd", base, seed=i, components=1 + i % 2, same=same[i % 4])
        for i in range(count)
    }


def test_a_thousand_random_swaps_end_in_the_bits_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "TRANSFER_LIMIT", 700)  # more transfers than the ring has slots
    model = Small()
    base = base_of(model)
    wanted = {None: bytes_of(base)}
    chooser = random.Random(5)
    with VariantSwitch(model) as live:
        for i, (name, path) in enumerate(variants(tmp_path, base, 4).items()):
            live.add(name, path, RESIDENCIES[i % 2], direct=i == 3)
            wanted[name] = expected_bytes(path, base)
        epoch = 0
        for _ in range(1000):
            name = chooser.choice(list(wanted))
            previous = live.current
            swap = live.use(name)
            assert (swap.previous, live.current) == (previous, name)
            epoch += name != previous
            assert live.epoch == swap.epoch == epoch
            assert bytes_of(named_tensors(model)) == wanted[name]


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_swap_uploads_each_module_once_and_allocates_nothing(
    residency: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "TRANSFER_LIMIT", 300)
    model = Small()
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base, components=2)
    with VariantSwitch(model) as live:
        variant = live.add("v", path, residency)
        device = live._registry.device
        assert isinstance(device, HostDevice)
        for method in ("buffer", "host_buffer"):
            monkeypatch.setattr(HostDevice, method, lambda *_: pytest.fail("a swap allocates"))
        for _ in range(3):
            device.counters.reset()
            swap = live.use("v")
            with pf.open(path) as delta:
                stored = {name for name in delta if delta.span(name) != (0, 0)}
                assert device.counters.modules == dict.fromkeys(stored, 1)
                assert swap.uploaded >= sum(b - a for a, b in map(delta.span, stored))
            assert swap.uploads > DEPTH  # every slot of the ring was used again
            assert swap.read == (variant.stored if residency == "file" else 0)
            live.use(None)


def test_triton_kernels_swap_to_the_same_bits_over_the_same_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a GPU runs except streams and link: tables, launches, exact copies, odd and strided shapes."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")

    monkeypatch.setenv("PERAXIS_BACKEND", "triton")
    monkeypatch.setattr(registry, "TRANSFER_LIMIT", 700)
    base = {name: t.detach().clone() for name, t in named_tensors(Small()).items()}
    base["experts"] = torch.randn(3, 9, 24).bfloat16()
    live = {name: tensor.clone() for name, tensor in base.items()}
    turned = live.pop("second.weight").t().contiguous()
    with VariantSwitch(live, views={"second.weight": turned.t()}) as switched:
        for name, path in variants(tmp_path, base, 3).items():
            switched.add(name, path, "file" if name == "1" else "pinned")
        for name in ("0", "1", None, "2", "1"):
            with np.errstate(all="ignore"):
                switched.use(name)
            wanted = bytes_of(base) if name is None else expected_bytes(tmp_path / f"{name}.pxd", base)
            assert bytes_of({**live, "second.weight": turned.t()}) == wanted


def test_residency_says_what_is_kept_where(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    with VariantSwitch(model) as live:
        assert live.add("a", path).residency == "pinned"
        assert live.add("b", path, "file").host == 0
        assert live.variants()[0].host == live.variants()[0].stored > 0
        assert live.base_size == sum(t.numel() * 2 for t in named_tensors(model).values())
        assert live.ring_size >= DEPTH * 4096
        if not torch.cuda.is_available():
            with pytest.raises(DeviceError, match="CUDA"):
                live.add("c", path, "gpu")
            with VariantSwitch(Small(), base="pinned") as other, pytest.raises(DeviceError, match="CUDA"):
                other.add("a", path)


@pytest.mark.parametrize("previous", [None, "0"])
@pytest.mark.parametrize("nth", [0, 1, 2])
def test_a_failed_swap_goes_back_and_says_to_what(
    previous: str | None, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "TRANSFER_LIMIT", 300)
    model = Small()
    base = base_of(model)
    with VariantSwitch(model) as live:
        for name, path in variants(tmp_path, base, 2).items():
            live.add(name, path)
        live.use(previous)
        before, epoch = bytes_of(named_tensors(model)), live.epoch
        plain, count = HostEngine.write, [0]

        def failing(self: HostEngine, *args: Any) -> None:
            count[0] += 1
            if count[0] == nth + 1:
                raise RuntimeError("the link is down")
            plain(self, *args)

        monkeypatch.setattr(HostEngine, "write", failing)
        with pytest.raises(SwapError, match="link is down") as caught:
            live.use("1")
        assert caught.value.now == live.current == previous
        assert bytes_of(named_tensors(model)) == before
        assert live.epoch > epoch


def test_where_the_previous_variant_cannot_be_had_the_model_is_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    base = base_of(model)
    with VariantSwitch(model) as live:
        for name, path in variants(tmp_path, base, 2).items():
            live.add(name, path)
        live.use("0")

        def failing(*_: Any) -> None:
            raise RuntimeError("no engine")

        monkeypatch.setattr(HostEngine, "write", failing)
        with pytest.raises(SwapError, match="the model is the base") as caught:
            live.use("1")
        assert caught.value.now is live.current is None
        assert bytes_of(named_tensors(model)) == bytes_of(base)


def test_a_file_that_changed_since_it_was_registered_is_refused(tmp_path: Path) -> None:
    model = Small()
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base)
    with VariantSwitch(model) as live:
        live.add("v", path, "file")
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
        with pytest.raises(SwapError, match="changed or removed"):
            live.use("v")
        assert bytes_of(named_tensors(model)) == bytes_of(base)


def test_a_damaged_variant_or_another_base_is_not_registered(tmp_path: Path) -> None:
    model = Small()
    base = base_of(model)
    good = write_delta(tmp_path / "good.pxd", base)
    data = bytearray(good.read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.pxd").write_bytes(data)
    other = write_delta(tmp_path / "other.pxd", base_of(Small(seed=9)))
    with VariantSwitch(model) as live:
        live.add("good", good)
        live.use("good")
        for residency in RESIDENCIES:
            with pytest.raises(pf.PayloadError, match="E301"):
                live.add("bad", tmp_path / "bad.pxd", residency)
        with pytest.raises(pf.BindingError, match="E404"):
            live.add("other", other)
        # The live weights are a variant's, but the base is known, so another variant of it is accepted.
        live.add("again", good)
        assert [v.name for v in live.variants()] == ["good", "again"]
        assert bytes_of(named_tensors(model)) == expected_bytes(good, base)


def test_names_are_checked_and_the_variant_in_use_stays(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    with VariantSwitch(model) as live:
        live.add("v", path)
        with pytest.raises(LiveModelError, match="registered already"):
            live.add("v", path)
        with pytest.raises(LiveModelError, match="no variant 'w'; registered: v"):
            live.use("w")
        live.use("v")
        epoch = live.epoch
        assert live.use("v").epoch == epoch  # idempotent
        with pytest.raises(LiveModelError, match="in use"):
            live.remove("v")
        live.use(None)
        live.remove("v")
        assert live.variants() == ()


def test_a_forward_sees_one_variant_from_its_first_to_its_last_layer(tmp_path: Path) -> None:
    model = Small().eval()
    base = base_of(model)
    ids = torch.randint(0, 37, (2, 5))
    with VariantSwitch(model) as live, torch.no_grad():
        for name, path in variants(tmp_path, base, 3).items():
            live.add(name, path)
        outputs = []
        for name in (None, "0", "1", "2"):
            live.use(name)
            outputs.append(model(ids))
        assert len({storage_array(output).tobytes() for output in outputs}) == 4
        seen: set[bytes] = set()
        stop = threading.Event()

        def forwards() -> None:
            with torch.no_grad():
                while not stop.is_set():
                    seen.add(storage_array(model(ids)).tobytes())

        threads = [threading.Thread(target=forwards) for _ in range(2)]
        for thread in threads:
            thread.start()
        chooser = random.Random(1)
        swaps, deadline = 0, time.monotonic() + 60
        while swaps < 60 or (len(seen) < 3 and time.monotonic() < deadline):
            live.use(chooser.choice([None, "0", "1", "2"]))
            swaps += 1
            time.sleep(0.001)  # otherwise this thread may take the lock again before another one wakes up
        stop.set()
        for thread in threads:
            thread.join()
        assert len(seen) > 1, "no swap fell between two forwards"
        assert seen <= {storage_array(output).tobytes() for output in outputs}


def test_a_swap_that_is_asked_for_inside_a_forward_waits_for_its_end(tmp_path: Path) -> None:
    model = Small().eval()
    ids = torch.randint(0, 37, (2, 5))
    with VariantSwitch(model) as live, torch.no_grad():
        for name, path in variants(tmp_path, base_of(model), 2).items():
            live.add(name, path)
        live.use("1")
        after = model(ids)
        live.use("0")
        before = model(ids)
        swapped = threading.Event()

        def swap() -> None:
            live.use("1")
            swapped.set()

        thread = threading.Thread(target=swap)
        early = []

        def between(*_: Any) -> None:
            thread.start()
            early.append(swapped.wait(0.2))  # long enough for a swap that does not wait

        hook = model.norm.register_forward_hook(between)
        inside = model(ids)
        hook.remove()
        thread.join()
        assert early == [False]
        assert torch.equal(inside, before)
        assert torch.equal(model(ids), after)
        assert not torch.equal(before, after)


def test_a_variant_is_registered_while_a_forward_runs(tmp_path: Path) -> None:
    model = Small().eval()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    inside, registered = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert registered.wait(300)

    with VariantSwitch(model) as live:
        handle = model.norm.register_forward_hook(wait)
        thread = threading.Thread(target=model, args=(torch.tensor([[1]]),))
        thread.start()
        assert inside.wait(300)
        live.add("v", path)
        registered.set()
        thread.join()
        handle.remove()
        assert live.use("v").epoch == 1


def test_a_swap_inside_a_forward_of_the_same_thread_is_refused(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    with VariantSwitch(model) as live:
        live.add("v", path)
        model.norm.register_forward_hook(lambda *_: live.use("v"))
        with pytest.raises(LiveModelError, match="between steps"):
            model(torch.tensor([[1]]))
        assert live.current is None
        # The failed forward pass has released the weights.
        live.use("v")


def test_a_compiled_model_is_guarded_by_hand(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "d.pxd", base_of(model))
    with VariantSwitch(model, guard=False) as live:
        live.add("v", path)
        assert not model._forward_hooks
        with live.running(), pytest.raises(LiveModelError, match="between steps"):
            live.use("v")
        live.use("v")
        assert live.current == "v"
