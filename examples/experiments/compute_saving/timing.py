"""What the steps of each arm cost in time, side by side on one machine: hours of a run, beside its FLOPs.

    python examples/experiments/compute_saving/timing.py --edition cpu --rounds 5 --output build/timing.md

Each arm is timed at points spread evenly over its run, so that growing lengths and skipped layers come in with the
shares they have; all points of all arms take turns within a round, and each point counts by its median. One process of
one thread by its CPU time, so that a busy machine disturbs little. The runs' own clocks cannot be compared: they shared
a machine with each other.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # to run from a checkout that is not installed

import torch

from benchmarks import machine
from benchmarks.ours import OurModel
from examples.experiments.budget import Arm, Budget
from examples.experiments.compute_saving.arms import arms, budget_of
from examples.experiments.compute_saving.editions import EDITIONS
from megatron_ltd.config.run import RunConfig
from megatron_ltd.plan.derived import policies
from megatron_ltd.token_drop.importance_table import ImportanceTable
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.launch import Runtime

POINTS = 12


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--edition", choices=sorted(EDITIONS), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table there too")
    return parser.parse_args(argv)


def points(config: RunConfig, steps: int) -> list[StepPlan]:
    """The plans of steps in the middles of equal parts of a run."""
    count = min(POINTS, steps)
    return [policies(config).plan(steps * (2 * number + 1) // (2 * count)) for number in range(count)]


def model_of(config: RunConfig, runtime: Runtime) -> OurModel:
    """A model that takes the steps of an arm on random tokens."""
    ours = OurModel(config, runtime)
    if config.token_drop.policy == "importance":
        assert config.model.vocab_size is not None
        ours.model.choose_by(ImportanceTable.initial(
            config.model.vocab_size, initial_importance=10.0, beta=0.995, always_keep=(), always_drop=(),
            device=torch.device("cpu")))
    return ours


def seconds_of_steps(known: dict[str, Arm], budget: Budget, rounds: int) -> dict[str, float]:
    """Mean seconds of a step over the run of each arm; a round before the counted ones warms up."""
    configs = {name: budget.config(arm.flags, arm.steps) for name, arm in known.items()}
    runtime = launch.start(configs["dense"], Launch())
    models = {name: model_of(config, runtime) for name, config in configs.items()}
    work = {name: points(config, known[name].steps) for name, config in configs.items()}
    found: dict[str, list[list[float]]] = {name: [[] for _ in work[name]] for name in known}
    for number in range(rounds + 1):
        for point in range(POINTS):
            for name in known:
                if point < len(work[name]):
                    started = time.process_time()
                    models[name].step_of(work[name][point])
                    if number:
                        found[name][point].append(time.process_time() - started)
        print(f"round {number}/{rounds}", file=sys.stderr, flush=True)
    return {name: statistics.fmean(map(statistics.median, times)) for name, times in found.items()}


def table(known: dict[str, Arm], budget: Budget, seconds: dict[str, float]) -> str:
    """Time and FLOPs of a run relative to dense, and the share of the FLOPs saved that was saved in time."""
    lines = ["| arm | steps | ms a step | time | FLOPs | realised |", "|---|--:|--:|--:|--:|--:|"]
    dense = known["dense"]
    for name, arm in known.items():
        time_share = arm.steps * seconds[name] / (dense.steps * seconds["dense"])
        share = budget.flops(arm.flags, arm.steps) / budget.flops(dense.flags, dense.steps)
        realised = f"{(1 - time_share) / (1 - share):.0%}" if share < 0.99 else ""
        lines.append(f"| {arm.title} | {arm.steps} | {1000 * seconds[name]:.0f} | {time_share:.3f} | {share:.3f} | "
                     f"{realised} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    edition = EDITIONS[args.edition]
    known, budget = arms(edition), budget_of(edition)
    found = table(known, budget, seconds_of_steps(known, budget, args.rounds))
    text = f"{args.rounds} rounds, CPU time of one thread; {machine.describe('cpu')}\n\n{found}\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text)
    launch.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
