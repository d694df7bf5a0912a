"""Functions of the public interface refuse strings, numbers, paths and sequences that they cannot use, in one line.

The parameters come from the signatures, so that a new one is covered.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import pytest

import peraxis
import peraxis_format as pxd
from peraxis_format.arguments import check_choice, check_least
from peraxis_format.errors import LiveModelError
from peraxis_format.torch.updates import UpdateWriter
from peraxis_format.torch.updates.publish_sharded import ShardedUpdateWriter
from peraxis_tools.arguments import sequence
from peraxis_tools.chain import compact, update
from peraxis_tools.diff import diff_checkpoint
from peraxis_tools.merge import Mixture

Function = Callable[..., Any]
REFUSED: Final = (pxd.ArgumentError, pxd.BackendError, LiveModelError, peraxis.ToolError)
# Numbers whose allowed range is below 1 or has no end; their own tests check them.
FREE: Final = {"seed"}


def add(residency: Any) -> None:
    with peraxis.VariantSwitch({}) as switch:
        switch.add("a", "no.pxd", residency)


def functions() -> dict[str, Function]:
    public = {name: getattr(peraxis, name) for name in peraxis.__all__}
    found = {name: value for name, value in public.items() if inspect.isfunction(value)}
    more = (peraxis.VariantSwitch, UpdateWriter, ShardedUpdateWriter, Mixture, pxd.lossless_module)
    return found | {value.__name__: value for value in (*more, update, compact, diff_checkpoint)}


def parameters() -> Iterator[tuple[str, str, str]]:
    for name, function in functions().items():
        for parameter in inspect.signature(function).parameters.values():
            yield name, parameter.name, str(parameter.annotation)


def evaluated(name: str, annotation: str) -> Any:
    """The type of an annotation, or None if its names are known only to type checkers."""
    module = sys.modules[inspect.unwrap(functions()[name]).__module__]
    try:
        return eval(annotation, vars(module))
    except (NameError, AttributeError):
        return None


def choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [value for part in get_args(kind) for value in choices(part)]


def call(name: str, /, **given: Any) -> Any:
    """Call a function with a placeholder for each required argument."""
    function = functions()[name]
    needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    placeholders: dict[str, Any] = {p: "no" for p in needed if p not in ("options", "kwargs")}
    placeholders |= {"weights": [1.0], "to": "lora", "texts": {"a": "org/no"}, "parts": 2, "variants": {}}
    return function(**{key: value for key, value in placeholders.items() if key in needed} | given)


def misplaced(annotation: str) -> list[Any]:
    """Values that are neither paths nor what else a parameter takes."""
    several = [[3]] if "Sequence" in annotation else []
    by_name = [{"a": 3}] if "Mapping" in annotation else []
    return [3, *([] if "None" in annotation else [None]), *several, *by_name]


PATHS = [(f, p, value) for f, p, a in parameters() if "Path" in a for value in misplaced(a)]
ENUMERATED = [(f, p, choices(evaluated(f, a))) for f, p, a in parameters() if choices(evaluated(f, a))]
COUNTS = [(f, p) for f, p, a in parameters() if a.startswith("int") and p not in FREE]


def test_the_signatures_have_the_parameters_that_these_laws_are_about() -> None:
    assert {("VariantSwitch", "base"), ("serve", "backend"), ("apply_", "undo"), ("convert", "to")} <= {
        (f, p) for f, p, _ in ENUMERATED
    }
    assert {("split", "parts"), ("verify", "workers"), ("apply", "shard_size"), ("evaluate", "samples")} <= set(COUNTS)
    assert {
        ("log", "source"),
        ("open", "path"),
        ("sign", "private_key"),
        ("verify", "texts"),
        ("follow", "source"),
    } <= {(f, p) for f, p, _ in PATHS}


@pytest.mark.parametrize(("function", "parameter", "allowed"), ENUMERATED)
def test_an_unknown_word_is_refused_with_the_allowed_ones(function: str, parameter: str, allowed: list[str]) -> None:
    with pytest.raises(REFUSED) as caught:
        call(function, **{parameter: "no-such-word"})
    assert "no-such-word" in str(caught.value)
    assert parameter.replace("_", "-") in str(caught.value).replace("_", "-")
    assert all(word in str(caught.value) for word in allowed)


def test_an_unknown_residency_is_refused_when_the_variant_is_added() -> None:
    with pytest.raises(LiveModelError, match="residency 'foo': choose one of gpu, pinned, file"):
        add("foo")


@pytest.mark.parametrize(("function", "parameter"), COUNTS)
@pytest.mark.parametrize("value", [-5, float("nan")])
def test_a_number_below_its_range_is_refused_by_name(function: str, parameter: str, value: float) -> None:
    with pytest.raises(REFUSED) as caught:
        call(function, **{parameter: value})
    assert parameter.replace("_", "-") in str(caught.value).replace("_", "-")


@pytest.mark.parametrize(("function", "parameter", "value"), PATHS)
def test_a_value_that_is_no_path_is_refused_by_its_type(function: str, parameter: str, value: Any) -> None:
    with pytest.raises(REFUSED) as caught:
        call(function, **{parameter: value})
    said = str(caught.value)
    named = said.startswith((f"{parameter} does nothing", f"{parameter} {value!r}: must be"))
    assert named or re.search(r"is (an int|None); pass", said), said


@pytest.mark.parametrize("parts", [0, 1, -5])
def test_a_delta_has_at_least_two_parts(parts: int) -> None:
    with pytest.raises(peraxis.ToolError, match="parts"):
        peraxis.split("no.pxd", "no", parts=parts)


@pytest.mark.parametrize("workers", [0, -1])
def test_a_number_of_threads_is_at_least_one_in_the_format_too(workers: int, tmp_path: Path) -> None:
    path = tmp_path / "a.pxd"
    with pxd.DeltaWriter(path, base=pxd.Identity(id="b"), fine_tuned=pxd.Identity(id="f")) as writer:
        writer.add(pxd.lossless_module("w", pxd.from_float32(_ones(), pxd.DType.F32), pxd.DType.F32))
        writer.finish()
    with pxd.open(path) as delta, pytest.raises(pxd.ArgumentError, match="workers"):
        delta.verify(workers=workers)


def _ones() -> Any:
    import numpy as np

    return np.ones((2, 2), np.float32)


def test_paths_may_be_plain_strings_everywhere() -> None:
    for function, parameter, annotation in parameters():
        assert "Path" not in annotation or "str" in annotation, (function, parameter, annotation)


def test_a_calibration_text_may_be_a_path() -> None:
    from peraxis_tools.compress import CompressOptions

    for text in (Path("a.jsonl"), [Path("a.jsonl")], "a.jsonl"):
        assert CompressOptions.from_mapping({"calibration": text}).calibration == "a.jsonl"
    assert CompressOptions.from_mapping({"calibration": [Path("a"), "b"]}).calibration == ("a", "b")


def test_a_single_string_is_one_item_and_not_its_letters() -> None:
    assert sequence("delta.pxd") == ["delta.pxd"]
    assert sequence(Path("delta.pxd")) == [Path("delta.pxd")]
    assert sequence(("a", "b")) == ["a", "b"]
    with pytest.raises(peraxis.ToolError, match="None is None; pass a text or a path, or several"):
        sequence(None)  # type: ignore[arg-type]


def test_weights_of_a_merge_are_numbers(tmp_path: Path) -> None:
    with pytest.raises(peraxis.ToolError, match=r"weights \['1'\]: must be numbers"):
        peraxis.merge([tmp_path / "a.pxd"], tmp_path / "b.pxd", weights="1")  # type: ignore[arg-type]
    for name in ("merge", "merge_parts", "compact", "apply", "publish"):
        several = next(p for f, p, _ in parameters() if f == name and p in ("deltas", "updates"))
        with pytest.raises((FileNotFoundError, peraxis.ToolError, pxd.CheckpointError)) as caught:
            call(name, **{several: "delta.pxd"})
        assert "'d'" not in str(caught.value)
        assert "9 " not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "given"),
    [
        ("merge", {"deltas": [], "weights": []}),
        ("merge_parts", {"deltas": []}),
        ("compact", {"updates": []}),
        ("apply", {"deltas": []}),
        ("publish", {"repository": "a/b", "deltas": []}),
    ],
)
def test_no_input_at_all_is_refused(function: str, given: dict[str, Any]) -> None:
    with pytest.raises(peraxis.ToolError, match="pass"):
        call(function, **given)


def test_a_list_in_place_of_a_mapping_is_refused() -> None:
    with pytest.raises(peraxis.ToolError, match="texts is a list; pass a mapping"):
        call("evaluate", texts=["f.txt"])
    with pytest.raises(LiveModelError, match="variants is a list; pass a mapping"):
        call("serve", variants=["a.pxd"])


def test_two_names_of_one_option_are_refused() -> None:
    with pytest.raises(peraxis.ToolError, match="is another name of"):
        pxd_options({"batch-size": 2, "batch_size": 2})


def pxd_options(values: dict[str, Any]) -> None:
    from peraxis_tools.compress import CompressOptions

    CompressOptions.from_mapping(values)


@pytest.mark.parametrize(
    ("function", "given", "idle"),
    [
        ("convert", {"to": "lora", "axis": "row"}, "axis"),
        ("convert", {"to": "lora", "after": ["a.pxd"]}, "after"),
        ("convert", {"to": "lora", "prefer": "speed"}, "prefer"),
        ("convert", {"to": "pxd", "rank": 2}, "rank"),
        ("convert", {"to": "xor", "max_error": 0.5}, "max_error"),
        ("convert", {"to": "xor", "name": "a"}, "name"),
        ("evaluate", {"task_limit": 3}, "task_limit"),
        ("publish", {"repository": "a/b", "overwrite": True}, "overwrite"),
        ("publish", {"repository": "a/b", "dry_run": "no", "private": True}, "private"),
        ("sign", {"certificate_chain": "a.pem"}, "certificate_chain"),
        ("verify", {"base_revision": "main"}, "base_revision"),
        ("compress", {"device": "cpu"}, "device"),
        ("compress", {"resume": False}, "resume"),
    ],
)
def test_an_argument_without_effect_is_refused(function: str, given: dict[str, Any], idle: str) -> None:
    with pytest.raises(peraxis.ToolError, match=f"^{idle} does nothing with"):
        call(function, **given)


def test_weights_that_sum_to_zero_cannot_be_normalised() -> None:
    for mixture in (Mixture(normalize=True), Mixture(method="linear"), Mixture(method="dare", normalize=True)):
        with pytest.raises(peraxis.ToolError, match="weights 1, -1: their sum is 0"):
            call("merge", deltas=["a", "b"], weights=[1, -1], mixture=mixture)


def test_the_checks_pass_what_is_allowed() -> None:
    check_choice("a", "x", ("x", "y"))
    for value in (None, 1, 2.5):
        check_least("a", value, 1)
    for value in (0, True, float("inf")):
        with pytest.raises(pxd.ArgumentError):
            check_least("a", value, 1)
