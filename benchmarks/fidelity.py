"""KL at equal bytes: BitDelta, the paper's procedure, LoRA and peraxis, on one pair and one text.

    python benchmarks/fidelity.py BASE FINE_TUNED --calibration train.jsonl --tuning other.jsonl \\
        --text domain=held-out.jsonl --text c4=held-out-c4.jsonl --json fidelity.json
    python benchmarks/fidelity.py --stories FOLDER --json fidelity.json        folders as in stories()
    python benchmarks/fidelity.py BASE FINE_TUNED ... --methods scalar,scalar-distilled,adamw,refined,scales,default \\
        --fit-samples 16 --distill-samples 28 --samples 16        a model of 100 M parameters and more
    python benchmarks/fidelity.py BASE FINE_TUNED ... --methods ratio-6,ratio-8,ratio-12        KL over bytes

All methods fit on the same samples of the calibration text, and distil on the samples after them; `best` takes 600
samples of the same text, and is also shown on 200, and on 3000 if the text is long enough. KL is measured on held-out
text. Each method runs in its own process: seconds are of the method alone (models loaded, file written), and peak
memory is of that process; `device MB` is what torch allocated on a GPU (--device cuda). The first row has the base
alone. All methods write PXD files, so bytes are counted alike; a LoRA's bytes are those of its factors and exact
vectors. `payload` leaves out header and assets, which are large on a small pair. KL is of the merged weights, in nats
per token; 99%: the KL that 99% of the tokens stay below; special: the mean after special tokens.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fidelity_methods import DISTILL, FIT, LARGE, METHODS, RATIOS, Inputs, inspected, run_method
from harness import Benchmark, Timing, arguments, replace

__all__ = ["main", "measure", "stories"]


class _Table(Benchmark):
    """Benchmark whose table is about fidelity."""

    def table(self) -> str:
        domains = list(self.results[0].extra["kl"]) if self.results else []
        head = ["", "bytes", "payload"]
        for domain in domains:
            head += [f"KL {domain}", "± ", "99%", "special", "vs paper", "top-1"]
        rows = [
            [*head, "s", "CPU s", "MB", "device MB", ""],
            *(self._line(result.name, result, domains) for result in self.results),
        ]
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
        paper = next((other.extra["kl"] for other in self.results if other.extra["method"] in ("paper", "adamw")), {})
        cells = [label, str(extra["bytes"]), str(extra["payload"])]
        for domain in domains:
            kl = extra["kl"][domain]
            special = extra["kl_special"][domain]
            cells += [f"{kl:.5f}", f"{extra['kl_error'][domain] or 0:.5f}", f"{extra['kl_99'][domain]:.4f}"]
            cells += ["" if special is None else f"{special:.4f}"]
            cells += [f"{kl / paper[domain]:.3f}" if domain in paper else "", f"{100 * extra['top1'][domain]:.1f}%"]
        cells += [f"{extra[name]:.1f}" if name in extra else "" for name in ("seconds", "cpu")]
        cells += [f"{extra[name] / 1e6:.0f}" if extra.get(name) else "" for name in ("rss", "device")]
        return [*cells, result.note]


def measure(method: str, inputs: Inputs, texts: Mapping[str, Path], bench: Benchmark, *, samples: int) -> bool:
    """Run a method in a process of its own and record what it wrote; False, with a line on stderr, where it failed."""
    from peraxis_tools.evaluate import evaluate

    label = METHODS[method][0]
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}  # as on the command line
    done = subprocess.run(
        [sys.executable, __file__, "--one", method, "--inputs", inputs.to_json()],
        capture_output=True,
        text=True,
        env=environment,
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
        candidates=("merged",) if bench.results else ("base", "merged"),
        device=inputs.device,
    )
    if not bench.results:
        bench.add("base alone", Timing((0.0,)), method="base", bytes=0, payload=0, **_figures(found, "base"))
    figures = _figures(found, "merged")
    shown = ", ".join(f"{name} {kl:.4g}" for name, kl in figures["kl"].items())
    # print each result at once, because a run takes hours
    sys.stderr.write(f"{label}: {run['bytes'] or found.bytes} bytes, KL {shown}, {run['seconds']:.0f} s\n")
    bench.add(
        label,
        Timing((run["seconds"],)),
        note=run["note"],
        method=method,
        bytes=run["bytes"] or found.bytes,
        payload=run["payload"] or sum(line.bytes for line in inspected(path).modules),
        seconds=run["seconds"],
        cpu=run["cpu"],
        rss=run["rss"],
        idle_rss=run["idle_rss"],
        device=run["device"],
        **figures,
    )
    return True


def _figures(found: Any, candidate: str) -> dict[str, dict[str, Any]]:
    """The fidelity of a candidate: figure -> domain -> value."""
    each = {domain.domain: domain.candidates[candidate] for domain in found.domains}
    figures: dict[str, Callable[[Any], Any]] = {
        "kl": lambda its: its.kl,
        "kl_99": lambda its: its.tail.percentile_99,
        "kl_special": _special,
        "kl_error": lambda its: its.kl_error,
        "top1": lambda its: its.top1,
        "perplexity": lambda its: its.perplexity,
        "perplexity_fine_tuned": lambda its: its.perplexity_fine_tuned,
    }
    return {figure: {name: of(its) for name, its in each.items()} for figure, of in figures.items()}


def _special(found: Any) -> float | None:
    """The mean KL after special tokens; None if the text has none."""
    count = sum(token.count for token in found.tail.special)
    return sum(token.kl * token.count for token in found.tail.special) / count if count else None


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
    parser.add_argument("--fit-samples", type=int, default=FIT, help="samples that all methods fit on")
    parser.add_argument("--distill-samples", type=int, default=DISTILL, help="samples that they distil on")
    parser.add_argument("--work", type=Path, help="keep the files here")
    parser.add_argument("--device", default="cpu", help="where all methods and the evaluation run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Run the methods and print the table. 1 where a method failed."""
    parser = _parser()
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(run_method(options.one, Inputs.from_json(options.inputs))) + "\n")
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
            base=base,
            fine_tuned=fine_tuned,
            calibration=calibration,
            tuning=tuning,
            length=options.length,
            work=work,
            fit=options.fit_samples,
            distill=options.distill_samples,
            device=options.device,
        )
        bench = _Table(
            "fidelity",
            parameters={
                "pair": fine_tuned.name,
                "length": options.length,
                "fit": options.fit_samples,
                "distil": options.distill_samples,
                "device": options.device,
            },
        )
        chosen = {*LARGE, *RATIOS}
        names = [name for name in METHODS if name not in chosen and (name != "long" or options.stories is not None)]
        if options.methods:
            names = options.methods.split(",")
        fine = []
        for name in names:
            fine.append(measure(name, inputs, texts, bench, samples=options.samples))
            if options.json is not None:
                replace(options.json, bench.to_json().encode())  # a run that is cut keeps its rows
        bench.finish(options.json)
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
