"""The small files of a checkpoint are carried, taken from the base, or named in a note."""

from __future__ import annotations

import json
import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import peraxis_format as pxd
from peraxis_tools import apply
from peraxis_tools.chain import update
from peraxis_tools.checkpoints.assets import find_assets
from peraxis_tools.compress import compress
from peraxis_tools.errors import ToolError
from tests.tools.compress_pairs import llama_config, write_tokenizer


def small_pair(folder: Path) -> tuple[Path, Path]:
    """Two checkpoints of one matrix, each with a configuration."""
    for name, shift in (("base", 0.0), ("tuned", 0.01)):
        (folder / name).mkdir()
        weight = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64) / 4096 + shift * torch.randn(64, 64)
        save_file({"model.layers.0.mlp.up_proj.weight": weight}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama", "of": name}))
    return folder / "base", folder / "tuned"


def round_trip(base: Path, tuned: Path, folder: Path) -> Path:
    compress(base, tuned, folder / "d.pxd")
    apply(base, folder / "d.pxd", folder / "applied")
    return folder / "applied"


def files_of(folder: Path) -> set[str]:
    """Return every file except the list that marks an output of peraxis."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return paths - {".peraxis-output.json"}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_processor_loads_from_the_applied_folder_as_from_the_fine_tune(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    write_tokenizer(tuned)
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}),
        tokenizer=transformers.AutoTokenizer.from_pretrained(tuned),
        patch_size=16,
        chat_template={"default": "{{ messages }}", "tool_use": "{{ tools }}"},
    )
    processor.save_pretrained(tuned)
    applied = round_trip(base, tuned, tmp_path)
    assert files_of(applied) == files_of(tuned)
    assert "additional_chat_templates/tool_use.jinja" in files_of(applied)
    loaded = [transformers.LlavaProcessor.from_pretrained(folder) for folder in (tuned, applied)]
    assert loaded[0].to_dict() == loaded[1].to_dict()
    assert loaded[0].chat_template == loaded[1].chat_template


def test_a_sentence_transformer_keeps_its_modules(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "../outside", "type": "sentence_transformers.models.Normalize"},
    ]
    (tuned / "modules.json").write_text(json.dumps(modules))
    (tuned / "sentence_bert_config.json").write_text("{}")
    (tuned / "config_sentence_transformers.json").write_text("{}")
    for folder in ("1_Pooling", "2_Dense", "unrelated", "../outside"):
        (tuned / folder).mkdir()
        (tuned / folder / "config.json").write_text("{}")
    (tuned / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    applied = round_trip(base, tuned, tmp_path)
    wanted = files_of(tuned) - {"2_Dense/model.safetensors", "unrelated/config.json"}
    assert files_of(applied) == wanted
    assert find_assets(tuned).left == ("2_Dense/model.safetensors",)


def test_code_is_named_by_compress_and_by_apply(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = small_pair(tmp_path)
    for name in ("modeling_mine.py", "configuration_mine.py", "README.md", "trainer_state.json", "training_args.bin"):
        (tuned / name).write_text("{}")
    with caplog.at_level(logging.WARNING, "peraxis"):
        compress(base, tuned, tmp_path / "d.pxd")
    assert "configuration_mine.py, modeling_mine.py" in caplog.text
    assert "README" not in caplog.text
    result = apply(base, tmp_path / "d.pxd", tmp_path / "applied")
    assert result.left_behind == ("configuration_mine.py", "modeling_mine.py")


def test_the_base_gives_whole_groups_and_never_part_of_one(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    (base / "generation_config.json").write_text('{"temperature": 0.1}')
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (base / name).write_text('{"of": "base"}')
    (tuned / "vocab.json").write_text('{"of": "tuned"}')
    applied = round_trip(base, tuned, tmp_path)
    assert files_of(applied) == {"config.json", "model.safetensors", "vocab.json", "processor_config.json"}


def test_generation_is_set_up_as_in_the_fine_tune(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    (base / "generation_config.json").write_text('{"temperature": 0.1}')
    for folder, config in ((base, llama_config()), (tuned, llama_config(eos_token_id=7))):
        config.save_pretrained(folder)
    applied = round_trip(base, tuned, tmp_path)
    with pytest.raises(OSError, match="generation_config"):
        transformers.GenerationConfig.from_pretrained(applied)
    assert transformers.AutoConfig.from_pretrained(applied).eos_token_id == 7


def test_every_file_of_every_tokenizer_is_carried_or_named(tmp_path: Path) -> None:
    names: set[str] = set()
    for path in (Path(transformers.__path__[0]) / "models").glob("*/tokenization_*.py"):
        found: Any = re.search(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", path.read_text("utf-8"), re.DOTALL)
        names |= set(re.findall(r":\s*\"([^\"]+)\"", found.group(1))) if found else set()
    assert len(names) > 20
    for name in names:
        (tmp_path / name).write_text("x")
    assets = find_assets(tmp_path)
    assert {*assets.carried, *assets.left} == names
    assert set(assets.left) == {name for name in names if not pxd.ASSET_PATH.fullmatch(name)}


def test_a_file_that_is_too_large_is_named(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    with open(tuned / "tokenizer.json", "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ToolError, match=r"tokenizer\.json: 67108865 bytes"):
        compress(base, tuned, tmp_path / "d.pxd")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", b"{", "not JSON"),
        ("config.json", b"\xff\x00", "not JSON"),
        ("config.json", b"[" * 100_000, "nested too deeply"),
        ("config.json", b"[]", "not a JSON object"),
        ("generation_config.json", b"7", "not a JSON object"),
        ("tokenizer.json", b"{'a': 1}", "not JSON"),
    ],
)
@pytest.mark.parametrize("writer", ["compress", "update"])
def test_a_small_file_that_no_receiver_could_read_is_refused_by_the_writer(
    writer: str, name: str, content: bytes, part: str, tmp_path: Path
) -> None:
    base, tuned = small_pair(tmp_path)
    (tuned / name).write_bytes(content)
    write = partial(compress, fit="none") if writer == "compress" else update
    with pytest.raises(ToolError, match=part) as found:
        write(base, tuned, tmp_path / "d.pxd")
    assert str(tuned / name) in str(found.value)
    assert not (tmp_path / "d.pxd").exists()


def test_a_small_file_of_the_base_that_no_receiver_could_read_is_compared_without_a_check(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    (base / "config.json").write_bytes(b"{bad")
    update(base, tuned, tmp_path / "d.pxd")
    with pxd.open(tmp_path / "d.pxd") as file:
        assert file.asset("config.json") == (tuned / "config.json").read_bytes()
    apply(base, tmp_path / "d.pxd", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tuned / "config.json").read_bytes()


@pytest.mark.parametrize(("kind", "part"), [("pipe", "a pipe or a device"), ("nothing", "a link to nothing")])
def test_a_configuration_that_is_no_file_is_left_out_with_a_note(
    kind: str, part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, tuned = small_pair(tmp_path)
    (tuned / "config.json").unlink()
    if kind == "pipe":
        os.mkfifo(tuned / "config.json")
    else:
        (tuned / "config.json").symlink_to("gone.json")
    assert find_assets(tuned).carried == ()
    assert f"{tuned / 'config.json'}: is {part}" in caplog.text


def test_files_beside_weights_without_a_configuration_are_not_named_in_the_delta(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        save_file({"w": torch.randn(64, 64)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "salaries.xlsx").write_text("of no concern")
    compress(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d.pxd")
    with pxd.open(tmp_path / "d.pxd") as delta:
        assert "salaries" not in json.dumps(dict(delta.manifest.metadata))
