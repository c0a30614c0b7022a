"""Does random-LTD save compute? One command runs every arm with several seeds and reports.

    python examples/experiments/compute_saving/run.py --text DIR --output-dir build/compute_saving

--text holds *.train.jsonl and *.valid.jsonl (also .gz, .zst), {"text": document} a line. The peak learning rate of each
arm is chosen from one grid by short runs; then each arm is run with every seed; then table and pictures are written to
OUTPUT_DIR/report. Interrupt it at any moment and start it again: complete runs are kept, others continue from their
newest checkpoint. arms.py says what the arms are, cpu.toml and gpu.toml what they share.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # to run from a checkout that is not installed

from examples.experiments.budget import Arm, Budget
from examples.experiments.compute_saving.arms import arms, budget_of
from examples.experiments.compute_saving.editions import EDITIONS, Edition
from examples.experiments.compute_saving.report import report
from examples.experiments.prepare import Corpus, Text, prepare
from examples.experiments.runs import ROOT, Run, complete_all, exit_code_of, say, write_json
from megatron_ltd.errors import ConfigError

CHECKPOINTS = 4
"""Checkpoints of a run; an interruption loses at most what lies between two."""
CURVE_POINTS = 6
"""Validations of a run; the short ones that choose a learning rate have one, at their end."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--text", type=Path, required=True, metavar="DIR", help="folder with the text")
    parser.add_argument("--output", "--output-dir", dest="output_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--edition", choices=sorted(EDITIONS), default="cpu")
    parser.add_argument("--arms", default="all", metavar="NAME,...", help="only these; the others may follow later")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: the edition's")
    parser.add_argument("--plan", action="store_true", help="print arms, steps and FLOPs, and stop")
    return parser.parse_args(argv)


def chosen_arms(known: dict[str, Arm], names: str) -> list[Arm]:
    """Arms by name.

    Raises:
        ConfigError: one of them does not exist.
    """
    asked = list(known) if names == "all" else names.split(",")
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ConfigError(f"--arms = {names}: no arm {unknown[0]!r}; choose from {', '.join(known)}")
    return [known[name] for name in asked]


def planned_run(edition: Edition, budget: Budget, corpus: Corpus, arm: Arm, *, seed: int, rate: float, folder: Path,
                keeps_model: bool) -> Run:
    """A run of an arm as the training program's arguments.

    Args:
        keeps_model: the run counts, and is not one of those that choose a learning rate.
    """
    points = CURVE_POINTS if keeps_model else 1
    arguments = ("--config", str(edition.config.relative_to(ROOT)),
                 *arm.flags, *corpus.flags(), "--train-iters", str(arm.steps), "--lr", f"{rate:g}", "--seed", str(seed),
                 "--save-interval", str(-(-arm.steps // CHECKPOINTS)), "--eval-interval",
                 str(-(-arm.steps // points)))
    return Run(folder, arm.name, seed, rate, arm.steps, arguments, keeps_model, budget.flops(arm.flags, arm.steps))


def choose_rates(edition: Edition, corpus: Corpus, names: Sequence[str], args: argparse.Namespace,
                 ) -> dict[str, float]:
    """The peak learning rate of each arm: that of the lowest validation loss among short runs."""
    short = arms(edition, edition.grid_share)
    budget = budget_of(edition)
    runs = [planned_run(edition, budget, corpus, short[name], seed=edition.grid_seed, rate=rate, keeps_model=False,
                        folder=args.output_dir / "grid" / f"{name}-lr{rate:g}")
            for name in names for rate in edition.rates]
    say(f"{len(runs)} short runs choose the peak learning rates of {len(names)} arms")
    results = complete_all(runs, args.jobs or edition.jobs, say)
    losses = {name: {run.rate: results[run.name]["validation_loss"] for run in runs if run.arm == name}
              for name in names}
    chosen = {name: min(found, key=found.__getitem__) for name, found in losses.items()}
    for name, rate in chosen.items():
        write_json(args.output_dir / "grid" / f"{name}.json", {"chosen": rate, "validation_loss": losses[name]})
    return chosen


def experiment(args: argparse.Namespace) -> None:
    """All of it."""
    edition = EDITIONS[args.edition]
    known = arms(edition)
    chosen = chosen_arms(known, args.arms)
    budget = budget_of(edition)
    for arm in chosen:
        say(f"{arm.name}: {arm.steps} steps, {budget.flops(arm.flags, arm.steps):.4g} FLOPs; {arm.title}")
    if args.plan:
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    corpus = prepare(Text.of(args.text), edition.vocab_size, args.output_dir / "corpus", say)
    rates = choose_rates(edition, corpus, [arm.name for arm in chosen], args)
    runs = [planned_run(edition, budget, corpus, arm, seed=seed, rate=rates[arm.name], keeps_model=True,
                        folder=args.output_dir / "runs" / f"{arm.name}-seed{seed}")
            for seed in edition.seeds for arm in chosen]
    say(f"{len(runs)} runs: {len(chosen)} arms, seeds {', '.join(map(str, edition.seeds))}")
    complete_all(runs, args.jobs or edition.jobs, say)
    report(known, args.output_dir, say)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace(**vars(args) | {"output_dir": args.output_dir.resolve(), "text": args.text.resolve()})
    return exit_code_of(lambda: experiment(args))


if __name__ == "__main__":
    sys.exit(main())
