"""Fidelity for a byte: BitDelta, the paper's procedure, and ours, on one pair, one text, one machine.

    python benchmarks/fidelity.py BASE FINE_TUNED --calibration train.jsonl --tuning other.jsonl \\
        --text domain=held-out.jsonl --text c4=held-out-c4.jsonl --json fidelity.json
    python benchmarks/fidelity.py --stories shared/data --json fidelity.json

All methods fit on the same tokens, 50 samples of the calibration text, and the 150 behind them where they distil;
`recipe best` takes 600 samples of the same text, and is shown on 200 too, and on 3000 where there is so much.
What is reported is measured on text that none of them saw. Each method runs in a process of its own: seconds are of
the method alone (models loaded, file written), peak memory is of that process. All write PXD files, so bytes are
counted alike; `payload` is without header and assets, which weigh on a small pair. KL is of the merged weights, in
nats per token.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Benchmark, Timing, arguments

__all__ = ["METHODS", "Inputs", "main", "run_method", "stories", "tokens"]

FIT, DISTILL, VALIDATE = 50, 150, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What every method gets. work: where each writes METHOD.pxd, and finds what earlier ones wrote."""

    base: Path
    fine_tuned: Path
    calibration: Path
    tuning: Path
    length: int
    work: Path

    def output(self, method: str) -> Path:
        """The file of a method."""
        return self.work / f"{method}.pxd"


def _bitdelta(inputs: Inputs, output: Path, *, distilled: bool) -> str:
    from baselines.bitdelta import bitdelta
    from baselines.pair import load_pair, write_pxd

    samples, ids = tokens(inputs)
    pair = load_pair(inputs.base, inputs.fine_tuned)
    write_pxd(output, pair, bitdelta(pair, ids[FIT:] if distilled else None), samples=samples)
    return "lr 1e-4" if distilled else ""


def _paper(inputs: Inputs, output: Path, *, distilled: bool) -> str:
    from baselines.pair import load_pair, write_pxd
    from baselines.paper import paper

    samples, ids = tokens(inputs)
    pair = load_pair(inputs.base, inputs.fine_tuned)
    modules = paper(pair, ids[:FIT], ids[FIT : FIT + VALIDATE], ids[FIT:] if distilled else None)
    write_pxd(output, pair, modules, samples=samples)
    return "lr 1e-4, 1e-5" + ("; 1e-5" if distilled else "")


def _paper_tuned(inputs: Inputs, output: Path) -> str:
    import torch
    from baselines.pair import load_pair, read_samples, write_pxd
    from baselines.tuned import paper_tuned

    samples, ids = tokens(inputs)
    tuning = read_samples(inputs.fine_tuned, inputs.tuning, samples=16, length=inputs.length)
    modules, settings = paper_tuned(
        lambda: load_pair(inputs.base, inputs.fine_tuned),
        ids[:FIT],
        ids[FIT : FIT + VALIDATE],
        ids[FIT:],
        torch.from_numpy(tuning.ids),
    )
    write_pxd(output, load_pair(inputs.base, inputs.fine_tuned), modules, samples=samples)
    return f"lr {settings.row_lr:g}; {settings.distill_lr:g}"


def tokens(inputs: Inputs) -> tuple[Any, Any]:
    """(the samples, their ids [FIT + DISTILL, length]): the ones that `compress` fits and distils on."""
    import torch
    from baselines.pair import read_samples

    samples = read_samples(inputs.fine_tuned, inputs.calibration, samples=FIT + DISTILL, length=inputs.length)
    return samples, torch.from_numpy(samples.ids)


def _ours(inputs: Inputs, output: Path, **options: Any) -> str:
    from peraxis_tools.compress import compress

    # Sizes in terms of what an earlier method wrote.
    if "half_of" in options:
        options["target_size"] = _half(inputs.output(options.pop("half_of")))
    if "size_of" in options:
        options["target_size"] = inputs.output(options.pop("size_of")).stat().st_size
    result = compress(
        inputs.base,
        inputs.fine_tuned,
        output,
        calibration=str(inputs.calibration),
        calibration_samples=FIT,
        sequence_length=inputs.length,
        overwrite=True,
        **options,
    )
    return ", ".join(f"{count} {axis}" for axis, count in result.axes.items())


def _half(path: Path) -> int:
    """The size of a file with half the payload of this one: header and assets cannot be halved."""
    found = _inspected(path)
    return found.file_bytes - sum(line.bytes for line in found.modules) // 2


def _inspected(path: Path) -> Any:
    from peraxis_tools.inspect import inspect

    return inspect(path)


# Label, and what writes the file and returns a note.
Method = tuple[str, Callable[[Inputs, Path], str]]
# As many steps on the text of the others as `best` takes on its own.
_SAME_TEXT = {"recipe": "best", "distill_samples": DISTILL, "generated_samples": 2 * DISTILL, "distill_epochs": 16}
_ONE_AXIS = {"axis": "col", "embeddings": "full"}
# So much text that no sample is seen often enough to be learnt by heart.
_LONG = {"distill_samples": 2950, "generated_samples": 3000, "held_out": 0.05, "distill_epochs": 6, "axis": "row"}
# In this order, as later ones look at the sizes of earlier ones. "one axis": one vector a module, like the paper.
METHODS: Mapping[str, Method] = {
    "bitdelta-init": ("BitDelta, no distillation", lambda i, o: _bitdelta(i, o, distilled=False)),
    "bitdelta": ("BitDelta", lambda i, o: _bitdelta(i, o, distilled=True)),
    "paper-fit": ("paper, no distillation", lambda i, o: _paper(i, o, distilled=False)),
    "paper": ("paper", lambda i, o: _paper(i, o, distilled=True)),
    "paper-tuned": ("paper, rates tuned", _paper_tuned),
    "closed-form": ("closed form", lambda i, o: _ours(i, o, fit="closed-form", embeddings="full")),
    "refined": ("refined", lambda i, o: _ours(i, o, fit="refined", embeddings="full")),
    "scales": ("refined, scales distilled", lambda i, o: _ours(i, o, embeddings="full", distill_samples=DISTILL)),
    "distilled": ("recipe distilled", lambda i, o: _ours(i, o, embeddings="full", recipe="distilled")),
    "same-text": ("recipe best on 200 samples, one axis", lambda i, o: _ours(i, o, **_ONE_AXIS, **_SAME_TEXT)),
    "best": ("recipe best, one axis", lambda i, o: _ours(i, o, recipe="best", **_ONE_AXIS)),
    "long": ("recipe best on 6000 samples", lambda i, o: _ours(i, o, recipe="best", embeddings="full", **_LONG)),
    "half": ("all tensors, half the bytes", lambda i, o: _ours(i, o, half_of="best", recipe="best")),
    "budget": ("the paper's bytes, spent freely", lambda i, o: _ours(i, o, size_of="paper", recipe="best")),
}


def run_method(method: str, inputs: Inputs, *, methods: Mapping[str, Method] = METHODS) -> dict[str, Any]:
    """Run one method in this process. Wall and processor seconds, peak bytes; idle_rss: peak before it began."""
    import datasets  # noqa: F401  what every method imports is no method's time
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peraxis_tools.ops.sign_search.numba  # noqa: F401  compiled on import

    AutoTokenizer.from_pretrained(inputs.fine_tuned)
    AutoModelForCausalLM.from_pretrained(inputs.fine_tuned)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # nor is looking through what they left
    before = _peak()
    begin, cpu = time.perf_counter(), time.process_time()
    note = methods[method][1](inputs, inputs.output(method))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "rss": _peak(), "idle_rss": before, "note": note}


def _peak() -> int:
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Table(Benchmark):
    """Benchmark whose table is about fidelity."""

    def table(self) -> str:
        domains = list(self.results[0].extra["kl"]) if self.results else []
        head = ["", "bytes", "payload"]
        for domain in domains:
            head += [f"KL {domain}", "± ", "vs paper", "top-1"]
        rows = [[*head, "seconds", "MB", ""], *(self._line(result.name, result, domains) for result in self.results)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        last = len(widths) - 1
        lines = [
            "  ".join(
                c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _line(self, label: str, result: Any, domains: Sequence[str]) -> list[str]:
        extra = result.extra
        paper = next((other.extra["kl"] for other in self.results if other.extra["method"] == "paper"), {})
        cells = [label, str(extra["bytes"]), str(extra["payload"])]
        for domain in domains:
            kl = extra["kl"][domain]
            cells += [f"{kl:.4f}", f"{extra['kl_error'][domain] or 0:.4f}"]
            cells += [f"{kl / paper[domain]:.3f}" if domain in paper else "", f"{100 * extra['top1'][domain]:.1f}%"]
        return [*cells, f"{result.median:.1f}", f"{extra['rss'] / 1e6:.0f}", result.note]


def measure(method: str, inputs: Inputs, texts: Mapping[str, Path], bench: Benchmark, *, samples: int) -> bool:
    """Run a method in a process of its own and record what it wrote; False, with a line on stderr, where it failed."""
    from peraxis_tools.evaluate import evaluate

    label = METHODS[method][0]
    arguments = {name: str(getattr(inputs, name)) for name in Inputs.__dataclass_fields__}
    done = subprocess.run(
        [sys.executable, __file__, "--one", method, "--inputs", json.dumps(arguments)], capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.stderr.write(f"{label}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}\n")
        return False
    run = json.loads(done.stdout.strip().splitlines()[-1])
    path = inputs.output(method)
    found = evaluate(
        inputs.base,
        inputs.fine_tuned,
        path,
        texts,
        samples=samples,
        sequence_length=inputs.length,
        candidates=("merged",),
        device="cpu",
    )
    merged = {domain.domain: domain.candidates["merged"] for domain in found.domains}
    shown = ", ".join(f"{name} {its.kl:.4g}" for name, its in merged.items())
    sys.stderr.write(
        f"{label}: {found.bytes} bytes, KL {shown}, {run['seconds']:.0f} s\n"
    )  # long runs want a sign of life
    bench.add(
        label,
        Timing((run["seconds"],)),
        note=run["note"],
        method=method,
        bytes=found.bytes,
        payload=sum(line.bytes for line in _inspected(path).modules),
        cpu=run["cpu"],
        rss=run["rss"],
        idle_rss=run["idle_rss"],
        kl={name: its.kl for name, its in merged.items()},
        kl_error={name: its.kl_error for name, its in merged.items()},
        top1={name: its.top1 for name, its in merged.items()},
        perplexity={name: its.perplexity for name, its in merged.items()},
        perplexity_fine_tuned={name: its.perplexity_fine_tuned for name, its in merged.items()},
    )
    return True


def stories(data: Path, work: Path) -> tuple[Path, Path, Path, Path, dict[str, Path]]:
    """The stories pair of the shared data: base, fine-tuned, calibration, tuning, held-out texts.

    C4 is split by documents: 800 calibrate, 100 tune, 100 are held out; of tinyshakespeare the last tenth, which the
    fine-tune did not see either, is held out.
    """
    with gzip.open(data / "c4" / "c4-train.00000-of-01024.json.gz", "rt", encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    play = (data / "text" / "tinyshakespeare.txt").read_text("utf-8")
    parts = {
        "calibration": documents[:800],
        "tuning": documents[800:900],
        "c4": documents[900:],
        "shakespeare": [play[len(play) * 9 // 10 :]],
    }
    paths = {name: work / f"{name}.jsonl" for name in parts}
    for name, texts in parts.items():
        paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    pairs = data / "pairs"
    texts = {name: paths[name] for name in ("shakespeare", "c4")}
    return pairs / "stories260K", pairs / "stories260K-shakespeare", paths["calibration"], paths["tuning"], texts


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("fine_tuned", type=Path, nargs="?")
    parser.add_argument("--calibration", type=Path, help="text that all methods fit on")
    parser.add_argument(
        "--tuning", type=Path, help="text that learning rates are tuned on; default: the calibration text"
    )
    parser.add_argument("--text", action="append", default=[], metavar="DOMAIN=FILE", help="held-out text; repeatable")
    parser.add_argument(
        "--stories", type=Path, metavar="DATA", help="the stories pair, texts and all, from this folder"
    )
    parser.add_argument("--methods", help="comma-separated; default: all, `long` for --stories alone")
    parser.add_argument("--length", type=int, default=256, help="tokens a sample")
    parser.add_argument("--samples", type=int, default=50, help="held-out samples of each text")
    parser.add_argument("--work", type=Path, help="keep the files here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Run the methods and print the table. 1 where a method failed."""
    parser = _parser()
    options = parser.parse_args()
    if options.one:
        given = json.loads(options.inputs)
        inputs = Inputs(**{k: int(v) if k == "length" else Path(v) for k, v in given.items()})
        sys.stdout.write(json.dumps(run_method(options.one, inputs)) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if options.stories is not None:
            base, fine_tuned, calibration, tuning, texts = stories(options.stories, work)
        elif options.fine_tuned is None or options.calibration is None or not options.text:
            parser.error("give BASE FINE_TUNED --calibration FILE --text DOMAIN=FILE, or --stories DATA")
        else:
            base, fine_tuned, calibration = options.base, options.fine_tuned, options.calibration
            tuning = options.tuning or calibration
            texts = {name: Path(file) for name, _, file in (text.partition("=") for text in options.text)}
        inputs = Inputs(
            base=base, fine_tuned=fine_tuned, calibration=calibration, tuning=tuning, length=options.length, work=work
        )
        bench = _Table(
            "fidelity", parameters={"pair": fine_tuned.name, "length": options.length, "fit": FIT, "distil": DISTILL}
        )
        names = [name for name in METHODS if name != "long" or options.stories is not None]
        if options.methods:
            names = options.methods.split(",")
        fine = [measure(name, inputs, texts, bench, samples=options.samples) for name in names]
        bench.finish(options.json)
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
