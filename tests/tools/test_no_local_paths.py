"""Files that others receive hold no path of this machine, and do not depend on the folder of the run."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.cli import cli
from peraxis_tools.compress import CompressOptions, compress
from tests.tools.compress_pairs import FEW, llama_pair
from tests.tools.output_cases import make_inputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
PRIVATE = "home-of-somebody"
# Each command line, and the outputs that are sent to others. The inputs have absolute paths.
WRITERS = {
    "compress": "compress {f}/base {f}/tuned --fit none -o new.pxd",
    "exact": "compress {f}/base {f}/tuned --exact .* --force -o new.pxd",
    "update": "update {f}/base {f}/tuned -o new.pxd",
    "compact": "compact {f}/chain/1.pxd --base {f}/base -o new.pxd",
    "merge": "merge {f}/a.pxd {f}/b.pxd --weights 1,1 -o new.pxd",
    "join": "merge {f}/part-1.pxd {f}/part-2.pxd -o new.pxd",
    "convert": "convert {f}/old.pt --base {f}/base -o new.pxd",
    "lora": "convert {f}/a.pxd --to lora --rank 4 -o new",
    "apply": "apply {f}/base {f}/a.pxd -o new",
    "split": "split {f}/a.pxd --parts 2 -o new",
    "extract": "extract {f}/a.pxd -o new",
    "publish": "publish me/delta {f}/a.pxd --dry-run new",
    "sign": "sign {f}/a.pxd --private-key {f}/key.pem --bundle new.sig",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs") / PRIVATE
    folder.mkdir()
    make_inputs(folder)
    (folder / "chain").mkdir()
    done = CliRunner().invoke(cli, shlex.split(f"update {folder}/base {folder}/tuned -o {folder}/chain/1.pxd"))
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("case", WRITERS)
def test_no_output_shows_the_folder_of_an_input(
    case: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("model_signing" if case == "sign" else "huggingface_hub")
    here = tmp_path / f"also-{PRIVATE}"
    here.mkdir()
    monkeypatch.chdir(here)
    done = CliRunner().invoke(cli, shlex.split(WRITERS[case].format(f=inputs)))
    assert done.exit_code == 0, done.output
    written = [path for path in here.rglob("*") if path.is_file()]
    assert written
    for path in written:
        assert PRIVATE.encode() not in path.read_bytes(), path.name


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("pair") / PRIVATE
    folder.mkdir()
    return llama_pair(folder)


def test_the_content_id_does_not_depend_on_the_folder_of_the_run_or_of_the_text(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, text = pair
    values = {name: value for name, value in FEW.items() if name != "force"}
    (tmp_path / "options.yaml").write_text(json.dumps({**values, "calibration": os.path.relpath(text, tmp_path)}))

    def of(calibration: str | Path, name: str) -> str:
        return compress(base, tuned, tmp_path / name, calibration=calibration, **FEW).content_id

    found = {of(text, "absolute.pxd")}
    monkeypatch.chdir(text.parent)
    found |= {of(text.name, "bare.pxd")}
    monkeypatch.chdir(tmp_path)
    options = CompressOptions.from_yaml(tmp_path / "options.yaml")
    found |= {compress(base, tuned, tmp_path / "yaml.pxd", options=options, force=True).content_id}
    assert len(found) == 1
    for path in tmp_path.glob("*.pxd"):
        assert PRIVATE.encode() not in path.read_bytes(), path.name
    with pxd.open(tmp_path / "yaml.pxd") as delta:
        assert json.loads(delta.manifest.metadata["peraxis.config"])["calibration"] == text.name


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("c4", "c4"),
        ("c4:0.5", "c4:0.5"),
        ("org/text", "org/text"),
        ("org/text:english", "org/text:english"),
        ("/home/somebody/text.jsonl", "text.jsonl"),
        ("../data/chat.jsonl.gz:.25", "chat.jsonl.gz:.25"),
        (("c4:0.5", "/home/somebody/text.jsonl:0.5"), ("c4:0.5", "text.jsonl:0.5")),
        (None, None),
    ],
)
def test_a_text_is_recorded_without_its_folder_even_after_it_was_removed(given: object, recorded: object) -> None:
    options = CompressOptions(calibration=given)  # type: ignore[arg-type]
    assert options.content()["calibration"] == recorded
    again = CompressOptions.from_mapping(json.loads(options.canonical_json()))
    assert again.content() == options.content()
