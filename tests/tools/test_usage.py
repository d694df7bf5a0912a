"""Errors of usage are one line, with a suggestion; inputs in each other's place are named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import peraxis
import peraxis_format as pxd
from peraxis_tools.chain import update
from peraxis_tools.cli import VERBS, cli, main
from peraxis_tools.compress import CompressOptions
from peraxis_tools.display.sizes import parse_size
from peraxis_tools.errors import ToolError
from tests.factories import large_pair, random_storage, write_checkpoint
from tests.tools.output_cases import make_inputs

Shown = Callable[..., tuple[int, str]]


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """Runs the command line in a folder with inputs; gives the exit code and standard error."""
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["peraxis-tools", *line.split()])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(str(caught.value.code)), capsys.readouterr().err

    return run


def test_an_option_with_one_value_is_given_once_to_every_verb(shown: Shown) -> None:
    """No verb begins its work, and repeatable options, flags and the help stay as they are."""
    tried = 0
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        for option in command.params:
            if not isinstance(option, click.Option) or option.multiple or option.is_flag or option.name == "help":
                continue
            tried += 1
            code, error = shown(f"{verb} {option.opts[-1]}=1 {option.opts[0]}=2")
            wanted = f"error: {option.opts[0]} is given twice; it takes one value (see `peraxis-tools {verb} --help`)\n"
            assert (code, error) == (2, wanted)
    assert tried > 80
    assert shown("verify a.pxd -q -q --quiet")[0] == 0
    assert shown("verify a.pxd --report json=1 --report junit=2")[0] == 0
    assert shown("apply -o x -o y --help")[0] == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compres base tuned -o x.pxd", "no command 'compres'; did you mean compress? (see `peraxis-tools --help`)"),
        ("quux", "no command 'quux' (see `peraxis-tools --help`)"),
        ("verify", "Missing argument 'DELTA...' (see `peraxis-tools verify --help`)"),
        ("split a.pxd -o x --part 3", "Did you mean '--parts'?"),
        ("split a.pxd -o x --parts 1", "1 is not in the range x>=2 (see `peraxis-tools split --help`)"),
        ("apply base a.pxd -o x --shard-size big", "write it as 800MB, 1.2GB or 1GiB"),
        ("apply base a.pxd -o x --shard-size 5", "--shard-size 5: must be 1MB or more; write it like 5GB"),
    ],
)
def test_a_wrong_usage_is_one_line(line: str, said: str, shown: Shown) -> None:
    code, error = shown(line)
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith("error: ")
    assert said in error


@pytest.mark.parametrize("masks", ["0", "9"])
def test_the_limit_of_masks_has_one_wording(masks: str, shown: Shown) -> None:
    for line in ("compress base tuned -o x.pxd", "merge a.pxd b.pxd --weights 1,1 -o x.pxd"):
        assert f"error: --masks {masks}: must be 1 to 8\n" in shown(f"{line} --masks {masks}")[1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("apply a.pxd base -o x", "a.pxd is a delta and base is not; pass them in the other order"),
        ("apply base a.pxd b.pxd -o x", "a.pxd: is a delta and not an update of a chain"),
        ("apply base a.pxd b.pxd -o x", "use merge"),
        ("diff tuned a.pxd --base base", "tuned: is a checkpoint and not a delta; pass the delta first"),
        ("diff tuned base", "tuned: is a checkpoint and not a delta"),
        ("eval base a.pxd tuned --tasks x", "a.pxd is a delta and tuned is not; pass them in the other order"),
        ("compress base a.pxd -o x.pxd", "a.pxd: is a delta, not a checkpoint"),
        ("compress a.pxd tuned -o x.pxd", "a.pxd: is a delta, not a checkpoint"),
        ("update a.pxd base -o x.pxd", "a.pxd: is a delta, not a checkpoint"),
        ("inspect base", "not a regular file: it is a folder"),
    ],
)
def test_an_input_in_the_place_of_another_is_named(line: str, said: str, shown: Shown) -> None:
    assert said in shown(line)[1]


@pytest.mark.parametrize("line", ["inspect -", "apply base - -o x", "extract - -o x", "diff - a.pxd"])
def test_a_dash_for_a_file_says_that_standard_input_is_not_read(line: str, shown: Shown) -> None:
    assert "-: No such file or directory; standard input is not read" in " ".join(shown(line)[1].split())


def test_an_update_whose_predecessor_is_missing_names_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    states = [
        write_checkpoint(tmp_path / str(i), {"a.weight": (random_storage(rng, (8, 16)), pxd.DType.BF16)})
        for i in range(3)
    ]
    first = update(states[0], states[1], tmp_path / "1.pxd")
    update(states[0], states[2], tmp_path / "2.pxd", after=[tmp_path / "1.pxd"])
    for call in (
        lambda: peraxis.apply(states[0], tmp_path / "2.pxd", tmp_path / "out"),
        lambda: peraxis.verify(tmp_path / "2.pxd", base=states[0]),
    ):
        with pytest.raises(
            pxd.BindingError, match=f"E404.*it follows update {first.content_id} .*1.pxd.: pass that update too"
        ):
            call()


def test_a_damaged_header_may_be_a_damaged_download(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    data = bytearray((tmp_path / "a.pxd").read_bytes())
    for position in range(100, 1000, 90):
        damaged = bytes(data[:position]) + bytes([data[position] ^ 1]) + bytes(data[position + 1 :])
        (tmp_path / "damaged.pxd").write_bytes(damaged)
        with pytest.raises(pxd.PxdError) as caught:
            peraxis.verify(tmp_path / "damaged.pxd")
        assert "fetch the file again" in str(caught.value), caught.value


def test_every_option_that_is_a_size_takes_the_same_texts() -> None:
    options = CompressOptions.from_mapping({"calibration": "c4", "hidden_limit": "2GiB", "logits-limit": "800MB"})
    assert (options.hidden_limit, options.logits_limit) == (2 << 30, 800_000_000)
    assert CompressOptions.from_mapping({"target-size": "1.5kB"}).target_size == parse_size("1500")


def test_the_shards_of_apply_take_a_size_as_text(tmp_path: Path) -> None:
    base, delta = large_pair(tmp_path)
    one, more = (peraxis.apply(base, delta, tmp_path / size, shard_size=size) for size in ("1GB", "1MB"))
    assert sum(name.endswith(".safetensors") for name in one.files) == 1
    assert sum(name.endswith(".safetensors") for name in more.files) == one.tensors > 1


@pytest.mark.parametrize("size", ["1 kB", "5", 999_999])
def test_a_size_of_a_shard_that_lacks_its_unit_is_refused_in_python_too(size: int | str, tmp_path: Path) -> None:
    base, delta = large_pair(tmp_path)
    with pytest.raises(ToolError, match=r"shard_size \d+: must be 1MB or more; write it like 5GB"):
        peraxis.apply(base, delta, tmp_path / "out", shard_size=size)


@pytest.mark.parametrize("verb", ["apply base {} -o out", "compact {} --base base -o out.pxd"])
def test_a_quoted_pattern_in_place_of_updates_says_that_a_folder_can_be_passed(shown: Shown, verb: str) -> None:
    said = "error: run/*.pxd: no such file; pass the folder, run, which means every .pxd in it\n"
    assert shown(verb.format("run/*.pxd")) == (2, said)


@pytest.mark.parametrize("verb", ["apply", "diff", "verify", "compress", "eval"])
def test_the_help_tells_the_threads_of_a_verb_from_those_of_all_libraries(verb: str) -> None:
    text = " ".join(CliRunner().invoke(cli, [verb, "--help"]).stdout.split())
    own, every = ("threads that read, hash and rebuild", "threads of all libraries and child processes")
    assert (own in text, every in text) == ((True, False) if "--workers" in text else (False, True))


@pytest.mark.parametrize("verb", ["compress", "eval"])
def test_the_help_names_every_kind_of_text(verb: str) -> None:
    text = " ".join(CliRunner().invoke(cli, [verb, "--help"]).stdout.split())
    assert "json, jsonl, txt, csv (each also .gz) or parquet file" in text


def test_the_module_of_the_command_line_runs_it() -> None:
    done = subprocess.run([sys.executable, "-m", "peraxis_tools.cli", "quux"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no command 'quux'" in done.stderr


def test_a_dry_run_needs_no_output_and_a_run_does(shown: Shown) -> None:
    assert shown("compress base tuned --dry-run --force")[0] == 0
    assert shown("compress base tuned") == (
        2,
        "error: Missing option '--output' / '-o' (see `peraxis-tools compress --help`)\n",
    )
