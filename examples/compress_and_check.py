"""Compress a fine-tune, inspect the file, and verify it with its base.

    python examples/compress_and_check.py BASE FINE_TUNED DELTA [CALIBRATION]

Without a calibration text the scales are mean magnitudes (`fit="none"`), which needs neither torch nor a model.
"""

import sys

import peraxis


def main(base: str, fine_tuned: str, delta: str, calibration: str | None = None) -> None:
    """Compress, inspect, verify."""
    made = peraxis.compress(base, fine_tuned, delta, calibration=calibration, overwrite=True)
    print(f"{made.bytes:,} bytes, {made.ratio:.1f} times smaller, {made.content_id}")
    for share in peraxis.inspect(delta).by_encoding:
        print(f"{share.label:<5} {share.module_count:>5} modules {share.bytes:>12,} bytes")
    for check in peraxis.verify(delta, base=base).files[0].checks:
        print(f"{check.name:<11} {check.status.value}  {check.message}")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
