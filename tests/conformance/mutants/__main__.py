"""Run the kit on mutants of two loaders.

    python -m tests.conformance.mutants                    the small Python reader, in this process
    python -m tests.conformance.mutants --loader c         the loader in C; needs a compiler and about half an hour
    python -m tests.conformance.mutants --every 10         each tenth mutant
    python -m tests.conformance.mutants --only updates.py  those whose file, line or text matches an expression

The kit should fail each mutant. Cases that failed earlier mutants are tried first, which ends most mutants at once.
Mutants that pass the quick cases are also held to the limits of SPEC 9, those in C with sanitizers, which see a write
beyond an array. Prints the mutants that no case fails. The status is 1 if there are any beside those that change no
verdict (equivalent.py).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from peraxis_conformance import Corpus, laid_out

from tests.conformance.helpers import SANITIZED, SLOW
from tests.conformance.mutants import Mutant, Teeth
from tests.conformance.mutants.c import c_mutants, survives_c, unchanged_c
from tests.conformance.mutants.equivalent import EQUIVALENT
from tests.conformance.mutants.python import SMALL, python_mutants, survives_python

__all__ = ["main"]


def teeth_of(corpus: Corpus, loader: str) -> tuple[Teeth, Teeth]:
    """The quick cases, and those for what these leave over."""
    cases = [
        dataclasses.replace(case, seconds=3, mib=512)
        for case in corpus.select(skip=SLOW)
        if case.operation in ("decode", "apply") and not case.id.startswith("hostile/limit")
    ]
    cases.sort(key=lambda case: (not case.id.startswith("valid/"), case.id.startswith("cut/")))
    large = [dataclasses.replace(case, mib=8192) for case in corpus.select(["hostile/limit-*"])]
    sound = [case for case in cases if case.id.startswith(("valid/", "invalid/tensors-", "apply/base-"))]
    left = Teeth([*sound, *large] if loader == "c" else large, 600, ("-O1", *SANITIZED))
    return Teeth(cases, 40, ("-O0",)), left


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", choices=("python", "c"), default="python")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth mutant")
    parser.add_argument("--only", default="", metavar="REGEX", help="only those whose name matches")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="N", help="begin with this number")
    given = parser.parse_args(arguments)
    started, alive = time.monotonic(), []
    sys.path.insert(0, str(SMALL))
    with laid_out() as corpus, tempfile.TemporaryDirectory() as scratch:
        made = python_mutants() if given.loader == "python" else c_mutants()
        mutants = [mutant for mutant in made if re.search(given.only, mutant.name)][given.first :: given.every]
        quick, limits = teeth_of(corpus, given.loader)

        def lives_through(mutant: Mutant, teeth: Teeth) -> bool:
            if given.loader == "python":
                return survives_python(mutant, corpus, teeth)
            return survives_c(mutant, corpus, teeth, Path(scratch))

        if given.loader == "c" and not survives_c(unchanged_c(), corpus, quick, Path(scratch)):
            parser.error("pxd.c itself does not compile, or fails a case: run `make conformance`")
        known, quickly = [], []
        for number, mutant in enumerate(mutants, 1):
            if number % 50 == 0:
                sys.stderr.write(f"{number} of {len(mutants)}\n")
            if not lives_through(mutant, quick):
                continue
            if any(part in mutant.name for part in EQUIVALENT):
                known.append(mutant)
            else:
                quickly.append(mutant)
                sys.stderr.write(f"the limits are left for: {mutant.name}\n")
        # These files take up to 64 MiB and a minute each, so only mutants that nothing else fails see them.
        if quickly and given.loader == "c" and not survives_c(unchanged_c(), corpus, limits, Path(scratch)):
            parser.error("pxd.c itself fails with sanitizers, or the compiler has none: run `make conformance`")
        for mutant in quickly:
            if lives_through(mutant, limits):
                alive.append(mutant.name)
                sys.stdout.write(f"survives: {mutant.name}\n")
                sys.stdout.flush()
    took = time.monotonic() - started
    sys.stdout.write(f"{len(mutants)} mutants, {len(known)} change nothing, {len(alive)} survive, in {took:.0f} s\n")
    return 1 if alive else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
