"""``make gpu`` and ``make smoke``: what there is to learn on a GPU in a short time, and one page at the end.

python3 tests/gpu.py --smoke     is anything wrong? Every check within three minutes
python3 tests/gpu.py             how good is it? Builds, tests and measures within nine minutes
either with --dry-run            the same without a GPU: interpreted, emulated, stood in for

Needs this checkout and python3 with torch and Triton. What else it can use and is not there (pytest, nvcc, torchvision,
compute-sanitizer) is named and left out.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402

from on_gpu import full, smoke  # noqa: E402


def main() -> int:
    """Runs one of the two and returns 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the checks instead of tests and benchmarks")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    parser.add_argument("--out", type=Path, help="folder of the results (runs/gpu or runs/smoke; dry: ..._dry)")
    parser.add_argument("--seconds", type=float, help=f"for everything ({full.SECONDS:.0f}, {smoke.SECONDS:.0f})")
    parser.add_argument("--only", default="", metavar="PATTERN", help="the steps or groups whose name matches")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run does the same without one", file=sys.stderr)
        return 1
    command = smoke if options.smoke else full
    folder = f"runs/{'smoke' if options.smoke else 'gpu'}{'_dry' if options.dry_run else ''}"
    out = (options.out or ROOT / folder).resolve()
    return command.main(out, options.dry_run, options.seconds or command.SECONDS, options.only)


if __name__ == "__main__":
    sys.exit(main())
