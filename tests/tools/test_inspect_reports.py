"""The reports of `inspect --html`, `--plot`, `--tree` and `--module` agree with the file and are safe to open."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.commands.inspect import command
from peraxis_tools.inspect import inspect
from peraxis_tools.inspect_details import details
from peraxis_tools.report.console import size
from peraxis_tools.report.html import page
from peraxis_tools.report.inspect import wrapped
from peraxis_tools.report.plot import _panels
from tests.factories import random_storage, sign_module

NASTY = "<script>alert(1)</script>\x1b[31m\u202e"


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """A delta of three layers, with a name and metadata that try to inject HTML."""
    rng = np.random.default_rng(0)
    path = tmp_path / "delta.pxd"
    tuned = pxd.Identity(id=NASTY)
    # In the order of the modules: q_proj and up_proj of three layers, and one more.
    errors = [line for i in range(3) for line in ([], [(i + 1.5) / 1000, 9.0])]
    metadata = {"note": NASTY, "peraxis.report": json.dumps({"errors": [*errors, None], "notes": {}})}
    with pxd.DeltaWriter(path, base=pxd.Identity(id="base"), fine_tuned=tuned, metadata=metadata) as writer:
        for i in range(3):
            axes = (pxd.Axis.ROW,) if i % 2 else (pxd.Axis.COL, pxd.Axis.TENSOR)
            for name in ("self_attn.q_proj", "mlp.up_proj"):
                full = f"model.layers.{i}.{name}.weight"
                writer.add(sign_module(rng, full, random_storage(rng, (8 * (i + 1), 16)), axes=axes))
        writer.add(sign_module(rng, "model.<b>x</b>.weight".replace("/", ""), random_storage(rng, (4, 8))))
        writer.finish()
    return path


class Page(HTMLParser):
    """Collects tags and the rows of the table of modules."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links.extend(value or "" for name, value in attrs if name in ("src", "href"))


def test_the_page_is_one_file_that_fetches_nothing_and_escapes_everything(delta: Path) -> None:
    text = page(inspect(delta), details(delta))
    parsed = Page(text)
    assert parsed.links == []
    assert parsed.tags.count("script") == 1
    assert "alert(1)</script>" not in text
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<b>x" not in text
    assert "default-src 'none'" in text


def test_noted_errors_are_read_and_odd_ones_are_not(delta: Path) -> None:
    found = details(delta).errors
    assert found == {f"model.layers.{i}.mlp.up_proj.weight": pytest.approx((i + 1.5) * 1e-3) for i in range(3)}


def test_scales_are_those_of_the_file(delta: Path) -> None:
    lines = {line.name: line for line in details(delta).scales}
    with pxd.open(delta) as file:
        module = file.load("model.layers.1.mlp.up_proj.weight")
    row = module.components[0].row.astype(np.float64) * 2.0 ** module.components[0].exponent
    assert lines[module.name].median == pytest.approx(np.median(row))
    assert lines[module.name].layer == 1


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_the_same_bytes_each_time(delta: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        done = CliRunner().invoke(command, [str(delta), "--plot", str(tmp_path / f"{name}.{suffix}"), "--no-modules"])
        assert done.exit_code == 0, done.exception
    data = (tmp_path / f"a.{suffix}").read_bytes()
    assert data == (tmp_path / f"b.{suffix}").read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert len(data) > 10_000


def test_another_suffix_is_refused(delta: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, [str(delta), "--plot", str(tmp_path / "a.gif")])
    assert "a plot is a .png or an .svg" in str(done.exception)


def test_module_globs_choose_lines_and_keep_the_sums(delta: Path) -> None:
    whole = json.loads(CliRunner().invoke(command, [str(delta), "--json"]).stdout)
    found = json.loads(CliRunner().invoke(command, [str(delta), "--module", "*.q_proj.*", "--json"]).stdout)
    assert [m["name"] for m in found["modules"]] == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    assert found["by_kind"] == whole["by_kind"]
    none = CliRunner().invoke(command, [str(delta), "--module", "nothing*"])
    assert "no module that matches" in str(none.exception)


def test_the_tree_sums_bytes_upwards(delta: Path) -> None:
    shown = CliRunner().invoke(command, [str(delta), "--tree"]).stdout
    total = sum(line.bytes for line in inspect(delta).modules)
    assert f" model  {size(total)}" in shown
    layers = sum(line.bytes for line in inspect(delta).modules if ".layers." in line.name)
    assert f"layers  {size(layers)}" in shown
    # A part with one child has no line of its own, and every module has one.
    assert shown.count("self_attn.q_proj.weight  ") == 3
    assert "sign col, tensor" in shown
    tree = shown[shown.index("\u2500 model  ") :]
    assert not any(line.endswith(" ") for line in tree.splitlines())


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browser(page_file: Path, folder: Path, *, dark: bool, width: int, script_check: bool = False) -> str:
    """Return the DOM of the page in a real browser, or write a screenshot beside it."""
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900",
        *(["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]),
    ]
    action = "--dump-dom" if script_check else f"--screenshot={folder / 'shot.png'}"
    done = subprocess.run([CHROMIUM, *flags, action, page_file.as_uri()], capture_output=True, timeout=600, check=True)
    return done.stdout.decode()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_real_browser_runs_the_page_in_light_and_dark_narrow_and_wide(delta: Path, tmp_path: Path) -> None:
    written = tmp_path / "report.html"
    assert CliRunner().invoke(command, [str(delta), "--html", str(written), "--no-modules"]).exit_code == 0
    # The script ran under the policy of the page, because it counted the rows.
    assert "7 of 7 modules" in browser(written, tmp_path, dark=False, width=1200, script_check=True)
    image = pytest.importorskip("PIL.Image")
    corners = {}
    for dark in (False, True):
        for width in (500, 1280):
            browser(written, tmp_path, dark=dark, width=width)
            with image.open(tmp_path / "shot.png") as shot:
                assert shot.width == width
                corners[dark, width] = shot.convert("L").getpixel((2, 2))
                colours = shot.convert("RGB").getcolors(1 << 24)
                assert len(colours) > 50  # bars and text, not an empty page
    assert all(value > 240 for (dark, _), value in corners.items() if not dark)
    assert all(value < 40 for (dark, _), value in corners.items() if dark)


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    """A delta with one axis, a base on the hub, long names, and the errors that a calibrated fit records."""
    rng = np.random.default_rng(0)
    path = tmp_path / "fitted.pxd"
    names = [f"model.language_model.layers.{i}.block_sparse_moe.experts.11.gate_up_projection.weight" for i in range(3)]
    errors = [[0.1 * (i + 1), 2.0, 10.0] for i in range(len(names))]
    base = pxd.Identity(id="org/base", revision="refs/pr/1")
    metadata = {"peraxis.report": json.dumps({"errors": errors, "notes": {}})}
    with pxd.DeltaWriter(path, base=base, fine_tuned=pxd.Identity(id="tuned"), metadata=metadata) as writer:
        for name in names:
            writer.add(sign_module(rng, name, random_storage(rng, (32, 16)), axes=(pxd.Axis.ROW_COL,)))
        writer.finish()
    return path


def test_plain_inspect_prints_a_line_a_group_and_leaves_a_line_between_tables(delta: Path) -> None:
    shown = CliRunner().invoke(command, [str(delta)]).stdout
    blocks = [block.splitlines() for block in shown.split("\n\n")]
    assert [block[0].split()[0] for block in blocks[1:]] == ["encoding", "group"]
    numbers = {line.split()[0]: re.findall(r"(\d+)  +\d+ B", line) for line in blocks[2][1:]}
    assert numbers["q_proj"][0] == numbers["up_proj"][0] == "3"
    assert "layers.0" not in shown
    assert "layers.0" in CliRunner().invoke(command, [str(delta), "--modules"]).stdout


def test_each_line_has_at_most_80_columns_and_names_break_behind_dots(fitted: Path) -> None:
    shown = CliRunner().invoke(command, [str(fitted), "--modules"]).stdout
    tables = shown.split("\n\n", 1)[1]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= 80
    rows = tables.split("module ")[-1].splitlines()[1:]
    first = [line[:40].split()[0] for line in rows]
    assert "".join(first).startswith(
        "model.language_model.layers.0.block_sparse_moe.experts.11.gate_up_projection.weight"
    )
    assert all(part.endswith((".", "weight")) for part in first)


def test_a_wrapped_name_is_the_name() -> None:
    name = "model.layers.0.a_part_that_is_longer_than_the_column.weight"
    for width in (5, 20, 80):
        lines = wrapped(name, width).split("\n")
        assert "".join(line.strip() for line in lines) == name
        assert all(len(line) <= max(width, 42) for line in lines)


def test_relative_errors_are_shares_of_the_error_of_the_base(fitted: Path, delta: Path) -> None:
    assert sorted(details(fitted).relative.values()) == pytest.approx([0.01, 0.02, 0.03])
    assert details(delta).relative == {}


def test_the_page_says_first_how_near_it_is_and_links_to_the_base(fitted: Path) -> None:
    text = page(inspect(fitted), details(fitted))
    parsed = Page(text)
    assert parsed.links == ["https://huggingface.co/org/base/tree/refs%2Fpr%2F1"]
    assert "<dt>output error left, median</dt><dd>2.00%</dd>" in text
    assert text.index("output error left, worst module") < text.index("<dt>file</dt>") < text.index("<h2>")
    assert inspect(fitted).manifest.base.digest in text[: text.index("</header>")]
    for title in ("ratio, ×", "error left, %", "error, mean square"):
        assert f"<button type=button>{title}</button>" in text


def test_panels_of_one_colour_give_way_to_ones_that_inform(fitted: Path, delta: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure

    def titles(path: Path) -> list[str]:
        found = []
        for panel in _panels(inspect(path), details(path)):
            axes = figure().add_subplot()
            panel(axes)
            found.append(axes.get_title(loc="right"))
        return found

    assert not any(title.startswith("Axis") for title in titles(fitted))
    assert "Relative error by module" in titles(fitted)
    assert [title for title in titles(delta) if title.startswith("Axis")] == ["Axis by group", "Axis by depth"]
