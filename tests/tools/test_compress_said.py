"""What `compress` says about its options, and `--config delta.pxd`, which repeats those of a delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import peraxis_format as pxd
from peraxis_tools.chain import update
from peraxis_tools.commands.compress import command
from peraxis_tools.compress import compress
from tests.tools.compress_pairs import llama_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, tuned, _ = llama_pair(tmp_path_factory.mktemp("pair"))
    return base, tuned


def _ran(base: Path, tuned: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(command, [str(base), str(tuned), "-o", str(output), "--force", "-q", *options])


@pytest.mark.parametrize("options", [{}, {"masks": 1}, {"masks": 2, "axis": "row"}])
def test_the_options_of_a_delta_give_its_bytes_again(
    pair: tuple[Path, Path], tmp_path: Path, options: dict[str, object]
) -> None:
    made = compress(*pair, tmp_path / "a.pxd", force=True, **options)
    again = _ran(*pair, tmp_path / "b.pxd", "--config", str(made.path))
    assert again.exit_code == 0, again.output
    assert (tmp_path / "b.pxd").read_bytes() == made.path.read_bytes()


def test_an_option_overrides_that_of_the_delta(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = compress(*pair, tmp_path / "a.pxd", force=True)
    assert _ran(*pair, tmp_path / "b.pxd", "--config", str(made.path), "--masks", "1").exit_code == 0
    with pxd.open(tmp_path / "b.pxd") as delta:
        assert {len(module.components) for module in delta.manifest.modules} == {0, 1}


def test_an_error_names_the_file_of_options_where_it_is_the_file_s_own(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("masks: nine\n")
    said = str(_ran(*pair, tmp_path / "a.pxd", "--config", str(path)).exception)
    assert said == f"{path}: masks 'nine': must be auto, or 1 to 8"
    assert _ran(*pair, tmp_path / "a.pxd", "--config", str(path), "--masks", "1").exit_code == 0
    path.write_text("masks: 1\n")
    said = str(_ran(*pair, tmp_path / "b.pxd", "--config", str(path), "--masks", "9").exception)
    assert said.startswith("masks 9:")


def test_a_delta_that_compress_did_not_write_has_no_options(pair: tuple[Path, Path], tmp_path: Path) -> None:
    update(*pair, tmp_path / "a.pxd")
    done = _ran(*pair, tmp_path / "b.pxd", "--config", str(tmp_path / "a.pxd"))
    assert "has no options of compress" in str(done.exception)


def test_exact_that_took_an_argument_as_its_value_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["--exact", "base", "fine-tuned", "-o", str(tmp_path / "x.pxd")])
    assert done.exit_code == 2
    assert "--exact took 'base' as its value" in done.output
    done = CliRunner().invoke(command, ["base", "-o", str(tmp_path / "x.pxd"), "--exact"])
    assert done.exit_code == 2
    assert "took" not in done.output


def test_a_dry_run_of_exact_tensors_is_an_upper_bound(pair: tuple[Path, Path]) -> None:
    for options, bound in ((["--exact"], True), ([], False)):
        done = CliRunner().invoke(command, [*map(str, pair), "--dry-run", *options])
        assert done.exit_code == 0, done.output
        assert ("at most" in done.output) is bound
        assert ("times smaller" in done.output) is not bound


@pytest.mark.parametrize(
    ("options", "noted"), [({}, True), ({"fit": "none"}, False), ({"exact": ".*"}, False), ({"recipe": "quick"}, False)]
)
def test_a_run_without_a_text_says_what_its_scales_are(
    pair: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], noted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    compress(*pair, tmp_path / "a.pxd", force=True, **options)
    assert any("no calibration text" in record.message for record in caplog.records) is noted
