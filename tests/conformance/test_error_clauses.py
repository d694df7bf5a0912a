"""Over the whole corpus, errors of the reference reader name the clause that a file violates."""

from __future__ import annotations

from pathlib import Path

import pytest
from peraxis_conformance import Case, Corpus

import peraxis_format as pxd


def check(corpus: Corpus, case: Case) -> None:
    """Run every check that the operation of the case makes on its file."""
    with pxd.open(corpus.path(case, "file")) as delta:
        delta.verify(workers=1)
        if case.operation == "apply":
            with pxd.Safetensors.open(corpus.path(case, "base")) as base:
                pxd.check_base(delta.manifest, base, workers=1)
                for name in delta:
                    pxd.reconstruct(delta.load(name), base.read(name) if name in base else None)


def test_every_refusal_prints_code_and_clause_of_its_case(tmp_path: Path) -> None:
    corpus = Corpus(scratch=tmp_path)
    refused = [case for case in corpus.cases if case.codes and case.operation != "encode"]
    # Files of up to 64 MiB take long, and a file of 2^53 bytes needs a special file system.
    large = {"make", "size"}
    small = [c for c in refused if not any(large & set(f) for f in c.files.values() if isinstance(f, dict))]
    differ = []
    for case in small:
        with pytest.raises(pxd.PxdError) as caught:
            check(corpus, case)
        error = caught.value
        assert f"SPEC {error.clause})" in str(error)
        # Some damage breaks two rules. The case then names both codes and the clause of the first.
        if error.code not in case.codes or (error.code == case.codes[0] and error.clause != case.clause):
            differ.append(f"{case.id}: {error.code} of {error.clause}, must be {case.codes[0]} of {case.clause}")
    assert differ == []
    assert len(small) > 1400


def test_a_malformed_base_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    """SPEC 8 has no code for it (SPEC 7)."""
    corpus = Corpus(scratch=tmp_path)
    refused = [case for case in corpus.cases if not case.accepts and case.clause == "7.5"]
    for case in refused:
        with pytest.raises(pxd.CheckpointError, match=case.id.rpartition("/")[2]):
            check(corpus, case)
    assert len(refused) > 140
