"""Compare two results files task by task: which differences are more than chance.

    python tools/compare_results.py --results before.json after.json

Either file is an `--output FILE.json` of tools/evaluate_zeroshot.py with --log-samples, or a results_*.json of
lm-evaluation-harness with its samples_*.jsonl beside it (or the folder of both). The interval of a difference is a
paired bootstrap over the examples. Without the values of single examples there are differences only. Options that the
two were not made alike with are told first, task by task.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.errors import ConfigError
from megatron_ltd.lm_eval.comparison import Difference, compare
from megatron_ltd.lm_eval.results_files import Scored, read_results
from megatron_ltd.lm_eval.table import number, table
from megatron_ltd.log import Console
from tools.commands.command_line import exit_code_of, parser_of


def run(args: argparse.Namespace) -> None:
    if not 0.0 < args.confidence < 1.0:
        raise ConfigError(f"--confidence = {args.confidence} must be above 0 and below 1, such as 0.95.")
    if args.resamples < 100:
        raise ConfigError(f"--resamples = {args.resamples} must be at least 100.")
    files = [*args.results, *args.files]
    if len(files) != 2:
        raise ConfigError(f"--results names {len(files)} files; give the two to compare.")
    first, second = (read_results(Path(name)) for name in files)
    common = [task for task in first if task in second]
    if not common:
        raise ConfigError(f"{files[0]} and {files[1]} have no task in common: {', '.join(first)}; "
                          f"{', '.join(second)}. Score the same tasks.")
    found = {(task, name): difference(name, first[task], second[task], args)
             for task in common for name in first[task].metrics if name in second[task].metrics}
    console = Console()
    unlike = {task: first[task].unlike(second[task]) for task in common}
    if any(unlike.values()):
        console.line("not made alike (first, second), so that differences need not come from the models:")
        console.line("".join(f"- {task}: {'; '.join(told)}\n" for task, told in unlike.items() if told))
    console.line(report(found, args.confidence))
    for name, ours, theirs in ((files[0], first, second), (files[1], second, first)):
        alone = [task for task in ours if task not in theirs]
        if alone:
            console.line(f"only in {name}: {', '.join(alone)}")
    paired = [one for one in found.values() if one.interval is not None]
    clear = dict.fromkeys(f"{task} (not made alike)" if unlike[task] else task
                          for (task, _), one in found.items() if one.is_clear)
    console.line(f"\nmore than chance: {', '.join(clear) or 'no task'}. Of {len(paired)} intervals, about "
                 f"{len(paired) * (1.0 - args.confidence):.1f} exclude zero where nothing differs.")


def difference(metric: str, first: Scored, second: Scored, args: argparse.Namespace) -> Difference:
    """The difference of a metric, with an interval if the two files hold the same examples."""
    values = (first.metrics[metric], second.metrics[metric])
    if first.has_other_examples_than(second):
        return Difference(*values, why_not="other examples")
    return compare(metric, values, (first.samples.get(metric), second.samples.get(metric)),
                   confidence=args.confidence, resamples=args.resamples, seed=args.seed)


def report(found: dict[tuple[str, str], Difference], confidence: float) -> str:
    """One row for each metric of each task; a star where the interval excludes zero."""
    rows = [("task", "metric", "first", "second", "difference", f"{100 * confidence:g}% interval", "pairs", "")]
    rows += [(task, metric, number(one.first), number(one.second), number(one.value, "+"),
              f"- ({one.why_not})" if one.interval is None else " to ".join(number(end, "+") for end in one.interval),
              str(one.n) if one.n else "-", "*" if one.is_clear else "") for (task, metric), one in found.items()]
    return table(rows, "<<>>><><")


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--results", nargs=2, default=[], metavar=("FIRST", "SECOND"),
                        help="results files, or folders of the harness's output; differences are SECOND - FIRST")
    parser.add_argument("files", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--confidence", type=float, default=0.95, metavar="X", help="of the intervals (default 0.95)")
    parser.add_argument("--resamples", type=int, default=5000, metavar="N", help="of the bootstrap (default 5000)")
    parser.add_argument("--seed", type=int, default=1234, help="of the bootstrap (default 1234)")
    return exit_code_of(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
