"""A plain `pip install peraxis` runs commands, or they name the package that is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import peraxis_format as pxd
from peraxis_tools.cli import VERBS
from peraxis_tools.errors import NotVerifiableError
from peraxis_tools.process.optional import DISTRIBUTIONS, EXTRAS, MissingPackageError, missing, require
from tests.bare import ROOT, run_bare
from tests.factories import random_storage, write_checkpoint
from tests.test_architecture import imported, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and tuned, their delta from the bare command, and a second delta."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    shapes = {"model.layers.0.mlp.up_proj.weight": (48, 64), "model.norm.weight": (64,)}
    for name in ("base", "tuned", "other"):
        tensors = {key: (random_storage(rng, shape), pxd.DType.BF16) for key, shape in shapes.items()}
        write_checkpoint(folder / name, tensors)
    for tuned, delta in (("tuned", "delta.pxd"), ("other", "second.pxd")):
        done = run_bare("compress", "base", tuned, "-o", delta, "--fit", "none", cwd=folder)
        assert done.returncode == 0, done.stderr
    (folder / "diff.pt").write_bytes(b"PK\x03\x04")
    return folder


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("inspect delta.pxd", 0),
        ("inspect delta.pxd --json", 0),
        ("inspect delta.pxd --html report.html", 0),
        ("verify delta.pxd --base base", 0),
        ("apply base delta.pxd -o applied", 0),
        ("diff delta.pxd second.pxd --base base", 1),
        ("diff delta.pxd tuned --base base", 1),
        ("split delta.pxd --parts 2 -o parts", 0),
        ("merge delta.pxd second.pxd --weights 0.5,0.5 --base base -o sum.pxd", 0),
        ("extract delta.pxd -o files", 0),
        ("verify .", 0),
        ("completion bash", 0),
    ],
)
def test_these_commands_need_numpy_click_and_rich_alone(pair: Path, command: str, code: int) -> None:
    done = run_bare(*command.split(), cwd=pair)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_needs_no_optional_package(verb: str) -> None:
    done = run_bare(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("compress base tuned -o out.pxd --calibration text.jsonl", "compress"),
        ("compress base tuned -o out.pxd --config options.yaml", "compress"),
        ("compress org/base org/tuned -o out.pxd", "hub"),
        ("apply org/base delta.pxd -o out", "hub"),
        ("inspect https://example.org/delta.pxd", "hub"),
        ("publish me/delta delta.pxd", "hub"),
        ("publish me/delta delta.pxd --dry-run repository", "hub"),
        ("pull me/delta", "hub"),
        ("pull https://example.org/delta.pxd", "hub"),
        ("inspect delta.pxd --plot plot.png", "plot"),
        ("sign delta.pxd --private-key base/config.json", "sign"),
        ("convert delta.pxd --to lora -o adapter", "torch"),
        ("convert diff.pt --base base -o out.pxd", "torch"),
        ("eval base tuned delta.pxd --text x=text.jsonl", "compress"),
        ("demo --folder demo", "compress"),
    ],
)
def test_a_missing_package_is_one_line_with_the_pip_command(pair: Path, command: str, extra: str) -> None:
    (pair / "options.yaml").write_text("fit: none\n")
    (pair / "text.jsonl").touch()
    before = sorted(pair.rglob("*"))
    done = run_bare(*command.split(), cwd=pair)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"pip install 'peraxis[{extra}]'")
    assert sorted(pair.rglob("*")) == before, "refused before anything was written"


def test_verify_reports_a_missing_package_as_not_verifiable(pair: Path) -> None:
    (pair / "delta.pxd.sig").write_text("{}")
    (pair / "y.txt").touch()
    signed = run_bare("verify", "delta.pxd", "--public-key", "base/config.json", cwd=pair)
    kl = "verify delta.pxd --base base --fine-tuned tuned --max-kl 1 --text x=y.txt"
    bounded = run_bare(*kl.split(), cwd=pair)
    (pair / "delta.pxd.sig").unlink()
    for done, extra in ((signed, "sign"), (bounded, "compress")):
        assert done.returncode == 3, done.stdout + done.stderr
        assert f"pip install 'peraxis[{extra}]'" in " ".join(done.stdout.split())
        assert "Traceback" not in done.stderr


def test_the_table_of_extras_is_the_one_of_the_project() -> None:
    for package, extra in EXTRAS.items():
        lines = PROJECT["optional-dependencies"][extra]
        name = DISTRIBUTIONS.get(package, package)
        found = [line for line in lines if re.split(r"[\[<>=;]", line)[0] == name]
        # fsspec[http] installs aiohttp.
        assert found or (package == "aiohttp" and any("fsspec[http]" in line for line in lines)), (package, extra)


def test_the_extra_of_all_tools_holds_every_extra_that_a_verb_may_ask_for() -> None:
    (line,) = PROJECT["optional-dependencies"]["tools"]
    named = set(re.findall(r"\[(.*)\]", line)[0].split(","))
    inner = {extra for text in PROJECT["optional-dependencies"]["compress"] for extra in re.findall(r"\[(.*)\]", text)}
    assert set(EXTRAS.values()) <= named | inner


def test_every_third_party_import_of_the_tools_has_an_extra() -> None:
    # torch installs Triton, transformers tokenizers, numba llvmlite, datasets pyarrow, and model-signing cryptography.
    known = {
        *EXTRAS,
        "triton",
        "tokenizers",
        "llvmlite",
        "pyarrow",
        "cryptography",
        "numpy",
        "click",
        "rich",
        "threadpoolctl",
        "peraxis_format",
        "peraxis_tools",
    }
    for path in sources("peraxis_tools"):
        strange = {name.partition(".")[0] for name in imported(path)} - known - set(sys.stdlib_module_names)
        assert not strange, (path, strange)


def test_require_names_the_first_missing_package_and_imports_nothing() -> None:
    require("this", "numpy", "json")
    with pytest.raises(MissingPackageError, match=r"^this needs the package no_such_package, .*: pip install no_such"):
        require("this", "numpy", "no_such_package")
    with pytest.raises(NotVerifiableError, match=r"pip install 'peraxis\[plot\]'"):
        require("this", "no_such_package", extra="plot")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda: ModuleNotFoundError("No module named 's3fs_no'", name="s3fs_no"), "pip install s3fs_no"),
        (lambda: ImportError("Install s3fs to access S3"), "Install s3fs to access S3"),
        (
            lambda: ImportError("cannot import name 'x'\nfrom 'numpy'", name="numpy"),
            "too old: cannot import name 'x' from",
        ),
    ],
)
def test_an_import_that_fails_inside_a_library_is_one_line(error: Callable[[], ImportError], said: str) -> None:
    found = str(missing("s3://x/y.pxd", error()))
    assert said in found
    assert "\n" not in found


def test_an_import_error_of_our_own_code_is_not_hidden() -> None:
    with pytest.raises(ImportError, match="cannot import name 'gone'"):
        missing("this", ImportError("cannot import name 'gone'", name="peraxis_tools.cli"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("inputs", "extras"),
    [
        ({"files": "*.pxd releases/*.pxd"}, []),
        ({"files": "a.pxd", "base": "."}, []),
        ({"files": "a.pxd", "base": "org/base"}, ["hub"]),
        ({"files": "hf://org/repo/a.pxd"}, ["hub"]),
        ({"files": "a.pxd", "public-key": "key.pub"}, ["sign"]),
        ({"files": "https://a/b.pxd", "base": "org/base", "public-key": "key.pub"}, ["hub", "sign"]),
    ],
)
def test_the_github_action_installs_what_its_inputs_need(
    inputs: dict[str, str], extras: list[str], tmp_path: Path
) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    (step,) = (step for step in action["runs"]["steps"] if step["name"] == "Install")
    values = {name: str(spec.get("default", "")) for name, spec in action["inputs"].items()} | inputs
    pip = tmp_path / "python"
    pip.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    pip.chmod(0o755)
    values["python"] = str(pip)
    environment = {
        k: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: values[m[1]], v) for k, v in step["env"].items()
    }
    script = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = PROJECT["optional-dependencies"]
    assert done.stdout.split() == [
        *("-P", "-m", "pip", "install", "--quiet", "peraxis"),
        *(requirement for extra in extras for requirement in lines[extra]),
    ]


def test_the_pre_commit_hook_installs_no_extra() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert "additional_dependencies" not in hook
