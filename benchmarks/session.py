"""Run every verb as a new user would and write the commands and their output to docs/session.md.

    python benchmarks/session.py docs/session.md --pair BASE FINE_TUNED --text TEXT --large FOLDER

BASE and FINE_TUNED are a small pair of checkpoints, on which every verb runs. TEXT is held-out text of the fine-tune.
FOLDER holds the files with the shapes of an 8B model; missing files are written (make_artifact.py; 36 GB, and 17 GB
more temporarily). Wall time, CPU time and peak memory follow each command in FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from make_artifact import write_artifact, write_bitdelta, write_checkpoints, write_variation

__all__ = ["Session", "gigabyte", "small_pair"]

_TOOL = "from peraxis_tools.cli import main; main()"
_INTRODUCTION = """# A session

<!-- Written by benchmarks/session.py; not run by the tests: it needs a trained pair. -->

This page shows the commands and their output on a real pair: `base` is a 260 K-parameter Llama trained on TinyStories,
and `tuned` is its full fine-tune on Shakespeare. They are not in the repository; the commands work on any pair, for
example on that of `make demo`. Long outputs are cut at `...`. Every command has `--help` with an example.
docs/commands.md describes all commands.
"""
_RESUMED = """
A calibrated run that is interrupted keeps its finished blocks in `one.pxd.peraxis-work`, beside the output. The same
command continues there and gives the same bytes; `--no-resume` begins anew. The folder is removed at the end.
"""
_LARGE = """## An 8B model

The files have the shapes of Llama-3.1-8B and random payload (`benchmarks/make_artifact.py`): two deltas of 1.0 GB, a
pair of checkpoints of 16.1 GB each, and a `.pt` file in BitDelta's layout. Wall time, CPU time of all threads and peak
memory follow each output. They were measured on two cores of an AMD EPYC that had other work to do, with a disk of 0.2
to 0.5 GB/s. CPU time says more than wall time, which was about twice that of the same machine without other work.
"""
# Runs a command and writes its wall time, CPU time and peak memory. The program is small, because a process starts with
# the peak memory of its parent. It runs after the prefix, so that waiting in a queue is not measured.
_WATCH = """
import os, sys, time
begin = time.monotonic()
_, status, used = os.wait4(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)
with open(sys.argv[1], "w") as file:
    print(time.monotonic() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss, file=file)
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Session:
    """Collects commands and their output. prefix: words before each command, for example those of a job queue."""

    def __init__(self, folder: Path, *, prefix: Sequence[str] = ()) -> None:
        self.folder = folder
        self.prefix = list(prefix)
        self.parts: list[str] = []

    def say(self, words: str) -> None:
        """Add a heading or a paragraph."""
        self.parts.append(words.strip("\n") + "\n")

    def run(self, command: str, *, lines: int | None = None, cost: bool = False) -> None:
        """Run a shell command. lines: number of output lines to keep. cost: add times and memory. Raises SystemExit if
        the command does not start."""
        environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
        with tempfile.NamedTemporaryFile("r") as report:
            watched = [sys.executable, "-S", "-c", _WATCH, report.name, *_words(command)]
            done = subprocess.run(
                [*self.prefix, *watched], cwd=self.folder, env=environment, text=True, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            measured = report.read().split()
        if not measured:
            raise SystemExit(f"{command}: was not run\n{done.stdout}")
        seconds, cpu, kilobytes = map(float, measured)
        output = [line.rstrip() for line in done.stdout.splitlines()]
        if lines is not None and len(output) > lines:
            output = [*output[:lines], "..."]
        if done.returncode:
            output.append(f"(exit code {done.returncode})")
        if cost:
            output.append(f"({seconds:.1f} s, {cpu:.1f} s of CPU, {kilobytes * 1024 / 1e6:.0f} MB)")
        self.parts.append("\n".join(["```console", f"$ {command}", *output, "```", ""]))
        sys.stderr.write(f"{seconds:7.1f} s  {kilobytes * 1024 / 1e6:6.0f} MB  {done.returncode}  {command}\n")


def _words(command: str) -> list[str]:
    """Return the argument list of a command. A plain peraxis-tools command runs without a shell, whose memory would
    be counted."""
    if command.startswith("peraxis-tools ") and not set(command) & set("|&;<>*"):
        return [sys.executable, "-c", _TOOL, *shlex.split(command)[1:]]
    return ["bash", "-c", f"peraxis-tools() {{ {shlex.quote(sys.executable)} -c '{_TOOL}' \"$@\"; }}; {command}"]


def small_pair(session: Session) -> None:
    """Run every verb on a real pair. The folder has `base`, `tuned`, the text `plays.txt` and BitDelta's `diff.pt`."""
    run, say = session.run, session.say
    say("## Compress, look, verify, apply")
    run("peraxis-tools compress base tuned -o one.pxd --quiet")
    say(_RESUMED)
    run("peraxis-tools inspect one.pxd --module '*.0.self_attn.*'")
    run("peraxis-tools inspect one.pxd --tree --quiet | grep -A 14 'one.pxd  [0-9]'", lines=15)
    run("peraxis-tools inspect one.pxd --plot one.png --html one.html", lines=2)
    run("peraxis-tools verify one.pxd --base base")
    run("peraxis-tools verify one.pxd --base tuned")
    run("peraxis-tools apply base one.pxd -o out")
    run("peraxis-tools eval base tuned one.pxd --text plays=plays.txt --sequence-length 128 --samples 16")
    say("## Compare\n\n`diff` compares two deltas on one base, or a delta with a checkpoint.")
    run("peraxis-tools compress base tuned --masks 2 -o two.pxd --quiet", lines=1)
    run("peraxis-tools diff one.pxd two.pxd --top 3")
    run("peraxis-tools diff one.pxd tuned --base base --top 3")
    run("peraxis-tools diff one.pxd out --base base", lines=1)
    say("## Verify in CI\n\n`verify` writes one report for several files. The exit code is that of the worst outcome.")
    run("peraxis-tools verify one.pxd two.pxd --base base --fine-tuned tuned --max-error 0.3")
    run("peraxis-tools verify two.pxd --base base --fine-tuned tuned --max-kl 0.05 --text plays=plays.txt")
    run("cp one.pxd damaged.pxd; printf x | dd of=damaged.pxd bs=1 seek=110000 conv=notrunc status=none")
    run("peraxis-tools verify '[od]*e*.pxd' --format github")
    run("peraxis-tools verify damaged.pxd --format junit")
    run("peraxis-tools verify damaged.pxd --format sarif -o report.sarif; head -5 report.sarif", lines=5)
    say("## Merge and split")
    run("peraxis-tools merge one.pxd two.pxd --weights 0.7,0.3 -o sum.pxd")
    run("peraxis-tools merge one.pxd two.pxd --method ties --density 0.6 --masks 2 --base base -o ties.pxd")
    run("peraxis-tools split two.pxd --parts 3 -o parts")
    run("peraxis-tools merge parts/*.pxd -o joined.pxd && cmp joined.pxd two.pxd && echo the same bytes")
    run("peraxis-tools apply base parts/two-00001-of-00003.pxd -o x")
    run("peraxis-tools merge one.pxd two.pxd -o x.pxd")
    say("## Exact updates\n\nAn update holds the exact changes between two checkpoints. This chain has two updates.")
    run("mkdir chain; peraxis-tools update base tuned -o chain/step-000001.pxd --quiet")
    run("peraxis-tools update base out --after chain -o chain/step-000002.pxd --quiet")
    run("peraxis-tools log chain")
    run("peraxis-tools verify chain/step-000001.pxd --base base")
    run("peraxis-tools apply base chain/*.pxd -o state", lines=1)
    run("cmp state/model.safetensors out/model.safetensors && echo the same bytes")
    run("peraxis-tools compact chain/*.pxd --base base -o compacted.pxd")
    say("## Convert\n\n`diff.pt` is a file in BitDelta's layout.")
    run("peraxis-tools convert diff.pt --base base -o bitdelta.pxd")
    run("peraxis-tools convert two.pxd --to lora --rank 16 -o adapter", lines=8)
    say("## Sign and publish")
    run(
        "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && "
        "openssl ec -in key.pem -pubout -out key.pub 2> /dev/null"
    )
    run("peraxis-tools sign one.pxd --private-key key.pem")
    run("peraxis-tools verify one.pxd --signature --public-key key.pub")
    run("peraxis-tools verify two.pxd --signature --public-key key.pub")
    run("peraxis-tools publish me/my-delta one.pxd --dry-run repo && head -12 repo/README.md")


def gigabyte(session: Session) -> None:
    """Run verbs on files with the shapes of an 8B model: `big.pxd`, `near.pxd`, `diff.pt`, and a checkpoint pair."""
    run, say, folder = session.run, session.say, session.folder
    say(_LARGE)

    def cost(command: str, *, lines: int | None = None) -> None:
        run(command, lines=lines, cost=True)

    cost("peraxis-tools inspect big.pxd", lines=6)
    cost("peraxis-tools inspect big.pxd --plot big.png --html big.html", lines=2)
    with _server(folder) as url:
        cost(f"peraxis-tools inspect {url}/big.pxd", lines=2)
        cost(f"peraxis-tools verify {url}/big.pxd")
    cost("peraxis-tools verify big.pxd")
    cost("peraxis-tools verify big.pxd near.pxd --format github")
    cost("peraxis-tools diff big.pxd near.pxd --top 2")
    cost("peraxis-tools split big.pxd --parts 4 -o parts --overwrite")
    cost("peraxis-tools merge " + " ".join(f"parts/big-0000{i}-of-00004.pxd" for i in range(1, 5)) + " -o joined.pxd")
    run("cmp joined.pxd big.pxd && echo the same bytes; rm -r parts joined.pxd")
    for options in ("", " --masks 1", " --masks 2"):
        cost(f"peraxis-tools merge big.pxd near.pxd --weights 0.7,0.3{options} -o sum.pxd --overwrite")
    cost("peraxis-tools merge big.pxd near.pxd --method ties --masks 1 -o sum.pxd --overwrite")
    run("rm sum.pxd; openssl ecparam -name prime256v1 -genkey -noout -out key.pem")
    run("openssl ec -in key.pem -pubout -out key.pub 2> /dev/null")
    cost("peraxis-tools sign big.pxd --private-key key.pem --overwrite")
    cost("peraxis-tools verify big.pxd --signature --public-key key.pub")
    cost("peraxis-tools publish me/big big.pxd --dry-run repo --overwrite")
    run("rm -r repo")
    cost("peraxis-tools convert big.pxd --to lora --rank 16 -o adapter --overwrite", lines=6)
    cost("peraxis-tools compress base fine-tuned --fit none -o real.pxd --overwrite --quiet")
    cost("peraxis-tools verify real.pxd --base base")
    cost("peraxis-tools verify real.pxd --base base --fine-tuned fine-tuned --max-error 0.7")
    cost("peraxis-tools diff real.pxd fine-tuned --base base --top 2")
    cost("peraxis-tools convert diff.pt --base base -o bitdelta.pxd --overwrite")
    for method in ("linear", "ties", "dare"):
        cost(
            f"peraxis-tools merge real.pxd bitdelta.pxd --method {method} --masks 1 --base base -o sum.pxd --overwrite"
        )
    run("rm -r sum.pxd bitdelta.pxd adapter")
    cost("peraxis-tools apply base real.pxd -o applied --overwrite")
    run("rm -r applied real.pxd")


class _Ranges(SimpleHTTPRequestHandler):
    """Serves files with byte ranges, which the server of the standard library does not support."""

    def log_message(self, *_: object) -> None:
        return None

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.translate_path(self.path)
        size = os.path.getsize(path)
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        begin, end = int(first), min(size, int(last) + 1 if last else size)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if body:
            with open(path, "rb") as file:
                self.connection.sendfile(file, begin, end - begin)


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Ranges, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 8000), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield "http://127.0.0.1:8000"
        finally:
            server.shutdown()


def _write_small_bitdelta(base: Path, path: Path) -> None:
    """Write a `.pt` file in BitDelta's layout for a small base: random signs and one scalar for each projection."""
    import torch

    import peraxis_format as pxd

    torch.manual_seed(0)
    with pxd.Safetensors.open(base) as tensors:
        shapes = {name: tensors[name].shape for name in tensors if "proj" in name and tensors[name].shape[1] % 32 == 0}
    saved = {}
    for name, (d_out, d_in) in shapes.items():
        module = name.removesuffix(".weight")
        saved[f"{module}.mask"] = torch.randint(-(2**31), 2**31, (d_in // 32, d_out), dtype=torch.int32)
        saved[f"{module}.coeff"] = torch.rand(()) * 1e-2
    torch.save(saved, path)


def main() -> None:
    """Run the session and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pair", type=Path, nargs=2, required=True, metavar=("BASE", "FINE_TUNED"))
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--large", type=Path, help="folder of the 8B files; without it the 8B part is left out")
    parser.add_argument("--prefix", default="", help="words before each command")
    options = parser.parse_args()
    parts = [_INTRODUCTION]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source, target in zip(options.pair, ("base", "tuned"), strict=True):
            shutil.copytree(source, folder / target)
        text = options.text.read_text("utf-8")
        (folder / "plays.txt").write_text(text[-len(text) // 10 :], "utf-8")
        _write_small_bitdelta(folder / "base", folder / "diff.pt")
        session = Session(folder.resolve(), prefix=shlex.split(options.prefix))
        small_pair(session)
        parts += session.parts
    if options.large is not None:
        _make_large(options.large)
        session = Session(options.large.resolve(), prefix=shlex.split(options.prefix))
        gigabyte(session)
        parts += session.parts
    options.output.write_text("\n".join(parts), "utf-8")


def _make_large(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "big.pxd").exists():
        write_artifact(folder / "big.pxd")
    if not (folder / "near.pxd").exists():
        write_variation(folder / "near.pxd", folder / "big.pxd", flip=0.02)
    if not (folder / "diff.pt").exists():
        write_bitdelta(folder / "diff.pt")
    if not (folder / "base").exists():
        write_checkpoints(folder)


if __name__ == "__main__":
    main()
