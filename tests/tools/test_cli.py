"""The command line for people: help with examples, 80 columns, exit codes, completion, correct docs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import yaml

import peraxis_format as pxd
from peraxis_tools.cli import VERBS, cli
from tests.factories import random_storage, sign_module, write_delta

ROOT = Path(__file__).parents[2]
# Verbs that read a .pxd and report on it. The others need models.
LIGHT = ("inspect", "verify", "diff", "merge", "split", "sign", "publish", "completion")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peraxis_tools", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        cwd=ROOT,
    )


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return write_delta(tmp_path / "delta.pxd", [sign_module(rng, "a.weight", random_storage(rng, (16, 24)))])


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_an_example_of_itself(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    assert "Example:" in (command.help or "")
    assert f"peraxis-tools {verb}" in (command.help or "")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", [60, 80])
def test_an_example_can_be_copied_because_it_is_not_wrapped(verb: str, columns: int) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    wanted = [line.strip().removeprefix("Example: ") for line in (command.help or "").splitlines()]
    wanted = [line for line in wanted if line.startswith(("peraxis-tools ", "openssl "))]
    shown = command.get_help(click.Context(command, info_name=verb, terminal_width=columns))
    lines = [line.strip().removeprefix("Example: ") for line in shown.splitlines()]
    assert wanted
    assert [line for line in wanted if line not in lines] == []


def test_threads_say_of_each_verb_what_they_may_change() -> None:
    said = {}
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option) and "--threads" in option.opts:
                said[verb] = (option.help or "").split("may change ")[1].split(".")[0]
    assert said == {"compress": "a last bit of a fit on text", "eval": "the last digits of a figure"}


@pytest.mark.parametrize("verb", VERBS)
def test_options_that_mean_the_same_are_called_the_same(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    options = {name for parameter in command.params for name in parameter.opts}
    if verb not in ("completion", "help"):
        assert {"--json", "--quiet", "-q"} <= options
    assert "--out" not in options
    assert ("--output" in options) == ("-o" in options)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_help_text(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.hidden and not option.help] == []


def test_the_reference_is_what_the_code_says(tmp_path: Path) -> None:
    path = ROOT / "docs" / "commands.md"
    message = "stale: run python -m peraxis_tools.reference docs/commands.md"
    # It runs in its own process, because click remembers earlier calls of a command.
    written = tmp_path / "commands.md"
    subprocess.run([sys.executable, "-m", "peraxis_tools.reference", str(written)], check=True, cwd=ROOT)
    assert path.read_text("utf-8") == written.read_text("utf-8"), message
    inside = re.findall(r"```text\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    assert len(inside) == len(VERBS) + 1


def test_light_verbs_import_no_torch() -> None:
    code = (
        "import sys, importlib\n"
        f"[importlib.import_module('peraxis_tools.commands.' + verb) for verb in {LIGHT!r}]\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'fsspec', 'model_signing'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_threads_that_wait_for_each_other_sleep_in_every_verb() -> None:
    """Spinning threads made the training of the demo ten times slower beside other programs."""
    code = "import peraxis_tools.cli, os, sys; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert run.stdout == "passive\n"


def test_errors_are_one_line_on_standard_error_with_the_code_of_their_kind(delta: Path, tmp_path: Path) -> None:
    for arguments, code in (
        (("inspect", tmp_path / "missing.pxd"), 2),
        (("split", delta, "--parts", "9", "-o", tmp_path / "parts"), 2),
        (("merge", delta, delta, "-o", tmp_path / "out.pxd"), 2),
        (("convert", delta, "-o", tmp_path / "out"), 2),
        (("diff", delta, "no-such-checkpoint"), 2),
        (("sign", delta, "--private-key", tmp_path / "no.pem"), 3),
        (("inspect", ROOT / "action.yml"), 1),
    ):
        done = run(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")


def test_there_is_no_colour_in_a_pipe_and_none_with_no_color(delta: Path) -> None:
    for environment in ({}, {"NO_COLOR": "1"}, {"NO_COLOR": "1", "TERM": "xterm-256color"}):
        done = run("inspect", delta, **environment)
        assert "\x1b" not in done.stdout + done.stderr
        assert max(map(len, (line for line in done.stdout.splitlines() if "/" not in line))) <= 80


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_the_program(shell: str) -> None:
    done = run("completion", shell)
    assert done.returncode == 0
    assert "_PERAXIS_TOOLS_COMPLETE" in done.stdout
    if shell == "bash" and shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def test_completion_completes_verbs_and_options() -> None:
    program = shutil.which("peraxis-tools") or str(Path(sys.executable).with_name("peraxis-tools"))
    if not Path(program).is_file():
        pytest.skip("not installed")

    def complete(words: str, position: int) -> list[str]:
        environment = {"_PERAXIS_TOOLS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        done = subprocess.run([program], env={**os.environ, **environment}, capture_output=True, text=True, check=False)
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert complete("peraxis-tools ins", 1) == ["inspect"]
    assert "--expect-content-id" in complete("peraxis-tools verify --ex", 2)


def action_step(name: str) -> dict:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    (step,) = (step for step in action["runs"]["steps"] if step["name"] == name)
    return step


def run_action(workdir: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """Run the script of the action with its inputs, as the runner would."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    values = {name: str(spec.get("default", "")) for name, spec in action["inputs"].items()}
    values |= {name.replace("_", "-"): value for name, value in inputs.items()} | {"python": sys.executable}
    step = action_step("Verify")
    environment = {
        key: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda match: values[match[1]], text)
        for key, text in step["env"].items()
    }
    assert "${{" not in step["run"], "inputs reach the script through the environment, never as code"
    script = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
    search = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        script, env={**os.environ, **search, **environment}, cwd=workdir, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_github_action_annotates_reports_and_fails(delta: Path, tmp_path: Path) -> None:
    good = run_action(tmp_path, files="*.pxd")
    assert (good.returncode, good.stdout.count("::notice")) == (0, 1), good.stderr
    data = bytearray(delta.read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.pxd").write_bytes(data)
    bad = run_action(tmp_path, files="*.pxd", sarif="out.sarif", junit="out.xml")
    assert bad.returncode == 1, bad.stderr
    assert "::error file=bad.pxd,title=payload%3A failed::E301" in bad.stdout
    assert json.loads((tmp_path / "out.sarif").read_text())["runs"][0]["results"][0]["ruleId"] == "E301"
    assert "E301" in (tmp_path / "out.xml").read_text()
    injected = run_action(tmp_path, files="$(touch pwned) ;touch pwned")
    assert injected.returncode == 2
    assert not (tmp_path / "pwned").exists()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_github_action_runs_no_module_of_the_repository_that_it_checks(delta: Path, tmp_path: Path) -> None:
    for name in ("click", "numpy", "json", "sitecustomize", "peraxis_format", "peraxis_tools"):
        (tmp_path / f"{name}.py").write_text("open('pwned', 'w'); raise SystemExit(0)")
    (tmp_path / "bad.pxd").write_bytes(delta.read_bytes()[:-1])
    assert run_action(tmp_path, files="bad.pxd").returncode == 1
    assert not (tmp_path / "pwned").exists()
    assert all('" -P -m ' in line for step in ("Install", "Verify") for line in modules_run(step))


def modules_run(step: str) -> list[str]:
    found = [line for line in action_step(step)["run"].splitlines() if " -m " in line]
    assert found
    return found


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_file_name_is_never_an_option_of_the_github_action(delta: Path, tmp_path: Path) -> None:
    with pxd.open(delta) as file:
        own = file.content_id
    pinned = {"expect_content_id": "sha256:" + "0" * 64}
    assert run_action(tmp_path, files="delta.pxd", **pinned).returncode == 1
    (tmp_path / "--quiet").write_bytes(delta.read_bytes())
    for name in (f"--expect-content-id={own}", "--help", "--version", "--report=json=written.pxd", "-q"):
        done = run_action(tmp_path, files=f"delta.pxd {name}", **pinned)
        assert done.returncode in (1, 2), (name, done.stdout)
        assert "::error" in done.stdout, (name, done.stderr)
    assert not (tmp_path / "written.pxd").exists()
    # If a glob matches such a name, the file is opened.
    found = run_action(tmp_path, files="--q*")
    assert (found.returncode, found.stdout.count("::notice file=--quiet")) == (0, 1), found.stderr


def test_the_github_action_writes_its_reports_again_in_the_same_folder(delta: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = run_action(tmp_path, files="delta.pxd", sarif="out.sarif", junit="out.xml")
        assert done.returncode == 0, done.stderr


def test_a_file_name_is_never_an_option_of_the_hook(delta: Path, tmp_path: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["args"][-1] == "--"
    done = run(*hook["entry"].split()[1:], *hook["args"], delta, f"--report=json={tmp_path}/x.pxd")
    assert done.returncode == 2
    assert not (tmp_path / "x.pxd").exists()


def test_the_pre_commit_hook_runs_what_it_says(delta: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert re.search(hook["files"], delta.name)
    program, *arguments = hook["entry"].split()
    assert program == "peraxis-tools"
    assert run(*arguments, delta).returncode == 0
    delta.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    done = run(*arguments, delta)
    assert done.returncode == 1
    assert "git lfs pull" in done.stdout
