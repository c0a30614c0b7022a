"""Compare training runs: tables and plots of validation loss against tokens, layer tokens, FLOPs and hours.

    python tools/compare_runs.py --output comparison --baseline dense --metrics \\
        dense=dense_seed1.jsonl dense=dense_seed2.jsonl random-LTD='ltd_seed*.jsonl'

A run is its --metrics-file, or a folder that holds it as metrics.jsonl. Runs with the same name are the seeds of one
arm. Differences from the baseline are computed seed by seed if both arms have the same seeds. Give the seed as
NAME@SEED=FILE; otherwise it comes from a run.json or manifest.json next to the file, and without those runs are paired
in the order given. If two arms have different seeds, the error is Welch's.

Written into --output: table.md, table.json (unrounded), loss_raw_tokens.png, loss_layer_tokens.png, loss_flops.png,
loss_hours.png, final_loss_flops.png, and comparison.html, one file with all of it. Plots need the extra [plot].
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from tools.commands.command_line import add_output, exit_code_of, parser_of
from tools.comparison import figures
from tools.comparison.arms import Arm, read_arms
from tools.comparison.page import page
from tools.comparison.seed_statistics import compare
from tools.comparison.tables import markdown, values


def run(args: argparse.Namespace) -> None:
    console, folder = Console(), Path(args.output)
    if not (args.metrics or args.runs):
        raise ConfigError("--metrics is not given; name the runs to compare, as NAME=FILE.")
    arms = read_arms([*args.metrics, *args.runs], args.allow_different_lengths)
    baseline = _baseline(arms, args.baseline)
    comparison = compare(arms, baseline)
    title = args.title or f"{len(arms)} arm{'s' if len(arms) > 1 else ''}, baseline {baseline.name}"
    text = markdown(comparison, title)
    without = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(text, encoding="utf-8")
        numbers = json.dumps(values(comparison, title), indent=1, allow_nan=False, ensure_ascii=False)
        (folder / "table.json").write_text(numbers + "\n", encoding="utf-8")
        pictures: list[tuple[Path, str]] = []
        try:
            pictures = figures.draw(arms, comparison, title, folder)
        except ImportError:
            without = figures.MISSING
        (folder / "comparison.html").write_text(page(comparison, title, pictures, without), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output = {folder} cannot be written: {error}. Choose a writable folder.") from error
    console.line(text)
    console.line(f"{folder / 'comparison.html'}: {sum(len(arm.runs) for arm in arms)} runs, {len(pictures)} pictures")
    if without is not None:
        console.warn(without)


def _baseline(arms: list[Arm], name: str | None) -> Arm:
    """The arm with that name; by default the first."""
    found = next((arm for arm in arms if name is None or arm.name == name), None)
    if found is None:
        raise ConfigError(f"--baseline = {name} must be one of the arms: {', '.join(arm.name for arm in arms)}.")
    return found


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--metrics", nargs="+", default=[], metavar="NAME[@SEED]=FILE",
                        help="arm and --metrics-file of a run; * is a wildcard")
    parser.add_argument("runs", nargs="*", default=[], help=argparse.SUPPRESS)
    add_output(parser, "--output-dir", required=True, metavar="DIR", help="folder for tables and plots")
    parser.add_argument("--baseline", metavar="NAME", help="arm to compare the others with (default: the first)")
    parser.add_argument("--title", help="title of the tables and plots")
    parser.add_argument("--allow-different-lengths", action="store_true",
                        help="allow runs of one arm to end at different steps")
    return exit_code_of(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
