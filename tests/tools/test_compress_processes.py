"""Two processes give the artifact of one: equal signs, and scales within the rounding of float64 sums."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import peraxis_format as pxd
from peraxis_tools.compress import compress
from tests.tools.compress_pairs import llama_config, write_pair, write_text
from tests.tools.test_compress_architectures import FAMILIES

TOLERANCE = 2.0**-10  # of a scale: the last bit of F16
OPTIONS = {"calibration_samples": 10, "sequence_length": 16, "batch_size": 1}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "granite-moe"])
def test_two_processes_give_the_artifact_of_one(family: str, tmp_path: Path) -> None:
    config = llama_config() if family == "llama" else FAMILIES[family]()
    assert isinstance(config, transformers.PretrainedConfig)
    base, tuned = write_pair(tmp_path, config, dtype=torch.float32)
    options = {"calibration": str(write_text(tmp_path / "text.jsonl")), **OPTIONS}
    compress(base, tuned, tmp_path / "one.pxd", **options)
    script = tmp_path / "two.py"
    script.write_text(
        "import peraxis_tools\n"
        f"peraxis_tools.compress({str(base)!r}, {str(tuned)!r}, {str(tmp_path / 'two.pxd')!r}, **{options!r})\n",
        "utf-8",
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    differing = weights = 0
    with pxd.open(tmp_path / "one.pxd") as one, pxd.open(tmp_path / "two.pxd") as two:
        assert [m.name for m in one.manifest.modules] == [m.name for m in two.manifest.modules]
        for entry in one.manifest.modules:
            for left, right in zip(one[entry.name].components, two[entry.name].components, strict=True):
                assert left.axis == right.axis
                differing += int(np.unpackbits(left.mask ^ right.mask).sum())
                weights += left.mask.size * 8
                ours, theirs = (
                    np.concatenate([s.ravel() for s in c.scales().values()]).astype(np.float64) for c in (left, right)
                )
                if not np.any(left.mask ^ right.mask):
                    np.testing.assert_allclose(ours, theirs, rtol=2 * TOLERANCE, atol=0)
    # A sign whose margin is below the rounding of the sums may fall either way; hardly any is.
    assert differing <= weights // 1000
