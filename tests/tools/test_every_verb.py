"""Laws of all verbs: JSON with the version of its schema, 80 columns, and the options for colour and silence."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import peraxis_format as pxd
from peraxis_tools.chain import update
from peraxis_tools.cli import VERBS
from tests.factories import random_storage, sign_module, write_checkpoint, write_delta

NAMES = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight")
# Verb -> its arguments in the folder below. eval and demo need models and have their own tests.
ARGUMENTS = {
    "compress": "base tuned -o new.pxd",
    "inspect": "a.pxd",
    "verify": "a.pxd b.pxd --base base",
    "sign": "a.pxd --private-key key.pem",
    "apply": "base a.pxd -o out",
    "diff": "a.pxd b.pxd",
    "merge": "a.pxd b.pxd --weights 0.7,0.3 --masks 1 -o new.pxd",
    "split": "a.pxd --parts 2 -o parts",
    "convert": "a.pxd --to lora --rank 4 -o adapter",
    "publish": "me/delta a.pxd --dry-run repo",
    "pull": "file://a.pxd -o fetched",
    "extract": "a.pxd -o small",
    "update": "base tuned -o new.pxd",
    "compact": "chain/1.pxd chain/2.pxd --base base -o new.pxd",
    "log": "chain",
}
NEEDS = {"sign": "model_signing", "convert": "torch"}
CASES = [
    pytest.param(
        verb,
        marks=pytest.mark.skipif(bool(verb in NEEDS and not importlib.util.find_spec(NEEDS[verb])), reason="extra"),
    )
    for verb in ARGUMENTS
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder with base, tuned, a.pxd and b.pxd of that base, and key.pem."""
    rng = np.random.default_rng(0)
    base = {name: random_storage(rng, (64, 48)) for name in NAMES}
    for which in ("base", "tuned"):
        tensors = {name: (array ^ np.uint16(which == "tuned"), pxd.DType.BF16) for name, array in base.items()}
        write_checkpoint(tmp_path / which, tensors)
    for which in ("a", "b"):
        modules = [sign_module(rng, name, base[name], axes=(pxd.Axis.ROW_COL,) * 3) for name in NAMES]
        write_delta(tmp_path / f"{which}.pxd", modules, assets={"config.json": b'{"model_type": "llama"}'})
    (tmp_path / "chain").mkdir()
    update(tmp_path / "base", tmp_path / "tuned", tmp_path / "chain" / "1.pxd")
    update(tmp_path / "base", tmp_path / "base", tmp_path / "chain" / "2.pxd", after=[tmp_path / "chain" / "1.pxd"])
    if importlib.util.find_spec("cryptography"):
        from tests.tools.test_sign import write_key

        write_key(tmp_path, "key")
    (tmp_path / "fetched").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(verb: str, *more: str, **environment: str) -> Result:
    command = importlib.import_module(f"peraxis_tools.commands.{verb}").command
    done = CliRunner().invoke(command, [*ARGUMENTS[verb].split(), *more], env=environment)
    assert done.exit_code in (0, 1), done.exception
    return done


def test_no_verb_is_left_out() -> None:
    assert set(VERBS) - set(ARGUMENTS) == {"eval", "demo", "completion", "help"}


@pytest.mark.parametrize("verb", CASES)
def test_json_is_one_object_that_names_its_schema_and_version(verb: str, folder: Path) -> None:
    done = run(verb, "--json", "--quiet")
    found = json.loads(done.stdout)
    assert re.fullmatch(rf"peraxis\.{verb}(-\w+)?/[1-9]\d*", found["schema"])
    assert next(iter(found)) == "schema"
    assert len(found) > 1
    assert done.stderr == ""


@pytest.mark.parametrize("verb", CASES)
def test_a_report_fits_80_columns_and_has_no_colour_in_a_pipe(verb: str, folder: Path) -> None:
    done = run(verb) if verb == "verify" else run(verb, "--quiet")  # there it hides what is verified
    assert done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    # Only tables must fit. A digest, a path or a sentence is not cut, so that it can be copied.
    assert [line for line in done.stdout.splitlines() if len(line) > 80 and "  " in line.strip()] == []
    assert done.stderr == ""


@pytest.mark.parametrize("verb", CASES)
def test_no_color_turns_colour_off_on_a_terminal(verb: str, folder: Path) -> None:
    colour = re.compile(r"\x1b\[[\d;]*(?:3[0-7]|9[0-7])[\d;]*m")
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80"}
    quiet = [] if verb == "verify" else ["--quiet"]
    plain = run(verb, *quiet, **terminal, NO_COLOR="1")
    assert not colour.search(plain.stdout)
    again = [] if verb in ("inspect", "verify", "diff", "log") else ["--overwrite"]
    bright = run(verb, *quiet, *again, **terminal)
    assert "\x1b[" in bright.stdout
