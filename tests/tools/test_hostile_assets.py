"""Small files of a stranger, in a delta or a folder: what is malformed is one line, and a link elsewhere is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import peraxis
import peraxis_format as pxd
from peraxis_format import CheckpointError
from peraxis_tools.checkpoints.assets import find_assets
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.compress import compress
from peraxis_tools.errors import ToolError, error_line
from tests.tools.compress_pairs import llama_pair

HOSTILE = {
    "cut": b"{",
    "array": b"[]",
    "null": b"null",
    "deep": b"[" * 20_000,
    "no UTF-8": b"\xff",
    "long number": b"1" * 5000,
}


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a delta for it, with the assets of a small Llama."""
    folder = tmp_path_factory.mktemp("pair")
    base, tuned, _ = llama_pair(folder)
    compress(base, tuned, folder / "a.pxd", fit="none", force=True)
    return base, folder / "a.pxd"


def with_asset(delta: Path, path: str, data: bytes, output: Path) -> Path:
    with (
        pxd.open(delta) as file,
        pxd.DeltaWriter(output, base=pxd.Identity(id="base"), fine_tuned=file.manifest.fine_tuned) as writer,
    ):
        for name in file:
            writer.add(file.load(name))
        for asset in file.manifest.assets:
            writer.add_asset(asset.path, data if asset.path == path else file.asset(asset.path))
        writer.finish()
    return output


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("path", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_load_names_the_delta_for_a_malformed_file_in_it(
    path: str, kind: str, delta: tuple[Path, Path], tmp_path: Path
) -> None:
    base, good = delta
    bad = with_asset(good, path, HOSTILE[kind], tmp_path / "bad.pxd")
    with pytest.raises(ToolError, match=r"bad\.pxd: its (tokenizer|config|generation_config)") as caught:
        peraxis.load(bad, base=base)
    assert "\n" not in str(caught.value)


def test_load_names_the_delta_for_a_configuration_that_does_not_fit_its_weights(
    delta: tuple[Path, Path], tmp_path: Path
) -> None:
    base, good = delta
    with pxd.open(good) as file:
        config = json.loads(file.asset("config.json")) | {"hidden_size": 7, "num_attention_heads": 3}
    bad = with_asset(good, "config.json", json.dumps(config).encode(), tmp_path / "bad.pxd")
    with pytest.raises(ToolError, match=r"bad\.pxd: "):
        peraxis.load(bad, base=base)


def test_a_link_of_a_folder_out_of_the_checkpoint_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secrets, folder = tmp_path / "secrets", tmp_path / "model"
    secrets.mkdir()
    folder.mkdir()
    (secrets / "config.json").write_text('{"auths": "token"}')
    (folder / "inside").mkdir()
    (folder / "inside" / "config.json").write_text("{}")
    (folder / "1_Pooling").symlink_to(secrets)
    (folder / "2_Dense").symlink_to("inside")
    (folder / "modules.json").write_text(json.dumps([{"path": "1_Pooling"}, {"path": "2_Dense"}]))
    found = find_assets(folder)
    with caplog.at_level(logging.WARNING, "peraxis"):
        for path in found.carried:
            found.read(path)
    assert {"1_Pooling/config.json", "2_Dense/config.json"} <= set(found.carried)
    assert [line.split(":")[0] for line in caplog.messages] == [str(folder / "1_Pooling" / "config.json")]


def test_a_long_name_in_an_error_is_cut(tmp_path: Path) -> None:
    name = "n" * 1_000_000
    header = json.dumps({name: {"dtype": "X", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError) as caught:
        checkpoint.tensors.check_dtypes()
    line = error_line(caught.value)
    assert len(line) < 5000
    assert line.startswith(str(path))
    assert line.endswith("in another dtype")
