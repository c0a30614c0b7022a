"""What the steps of some arms cost in time, side by side, by the CPU time of one thread.

    python examples/experiments/saving_map/timing.py --arms dense muon muon_ngram --rounds 5

FLOPs leave out what a table of n-grams and an optimizer read and write; this does not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # to run from a checkout that is not installed

import torch

from benchmarks import machine
from examples.experiments.compute_saving.timing import seconds_of_steps, table
from examples.experiments.saving_map.arms import METHODS, SIZES, arm_of
from megatron_ltd.train.process import launch

TOKENS_PER_PARAMETER = 20


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--arms", choices=METHODS, nargs="+", default=["dense", "muon", "muon_ngram"], metavar="ARM",
                        help="dense among them; default: dense muon muon_ngram")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    size = SIZES[args.size]
    known = {name: arm_of(size, name, TOKENS_PER_PARAMETER) for name in dict.fromkeys(("dense", *args.arms))}
    found = table(known, size.budget, seconds_of_steps(known, size.budget, args.rounds))
    print(f"{args.rounds} rounds, CPU time of one thread; {machine.describe('cpu')}\n\n{found}")
    launch.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
