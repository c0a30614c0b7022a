"""Tables and pictures of the map from a folder of runs, complete or growing.

    python examples/experiments/saving_map/report.py --output-dir build/saving_map/report

Writes saving_map.md with every number, saving_map_short.md with the tables of docs/results.md, saving_map_loss.png,
saving_map.png, and saving_map.json, which tools/inspect_token_drop.py reads its advice from (tools/drop_course).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # to run from a checkout that is not installed

from examples.experiments.saving_map import pictures, tables
from examples.experiments.saving_map.arms import METHODS, SIZES, arm_of
from examples.experiments.saving_map.points import (
    BASELINES,
    Complete,
    Point,
    against,
    best_points,
    read_runs,
    savings,
)
from megatron_ltd.plan.derived import policies
from tools.commands.command_line import exit_code_of
from tools.drop_course.advice import parts_of

RUNS = Path(__file__).resolve().parent / "runs"
OPTIMIZERS = {"dense": "adam", "muon": "muon"}
PAGE = """# The map of savings: every number

What it says, and how it was made, is in [results.md](results.md#the-map). This page is written by
`examples/experiments/saving_map/report.py`.

## Losses and savings

{table}

Loss: held-out loss in nats a token at the end of a fully decayed run, mean over seeds. FLOPs are relative to dense
AdamW on the same tokens.

## Peak rates that were tried

The loss of the first seed:

{rates}

## Runs

The digests are of the curves with their step times: a repetition on the same type of processor gives the same losses,
not the same times.

{digests}

fp32; {machines}
"""


def advice_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The map as tools/drop_course/advice.py reads it. An arm is known by its policies, its optimizer, and the parts
    that it adds to a model."""
    found, rows = {baseline: savings(points, baseline) for baseline in BASELINES}, []
    for point in points:
        size = SIZES[point.size]
        arm = arm_of(size, point.arm, point.tokens_per_parameter)
        config = size.budget.config(arm.flags, arm.steps)
        saved = {OPTIMIZERS[baseline]: found[baseline].get((point.size, point.tokens_per_parameter, point.arm))
                 for baseline in BASELINES}
        rows.append({
            "title": METHODS[point.arm].title, "policies": sorted(policy.name for policy in policies(config).active),
            "optimizer": config.optimizer.optimizer, "parts": parts_of(config.model),
            "parameters": size.budget.parameters, "layers": size.budget.config((), 1).model.num_layers,
            "tokens_per_parameter": point.tokens_per_parameter,
            "against": {optimizer: {"share": round(one.share, 4), "interval": one.interval and [
                round(bound, 4) for bound in one.interval], "seeds": one.seeds, "extrapolated": one.extrapolated}
                for optimizer, one in saved.items() if one is not None}})
    return rows


def short_tables(points: Sequence[Point]) -> list[str]:
    """Those of docs/results.md."""
    return [*(tables.saved_table(points, baseline) for baseline in BASELINES), tables.reached_table(points),
            tables.shapes_table(points)]


def page(runs: Sequence[Complete], points: Sequence[Point]) -> str:
    """docs/saving_map.md."""
    return PAGE.format(table=tables.map_table(points), rates=tables.rates_table(runs),
                       digests=tables.digests_table(runs), machines="; ".join(sorted({run.machine for run in runs})))


def write(runs: Sequence[Complete], folder: Path) -> str:
    """Write tables and pictures; returns the short tables."""
    points = best_points(runs)
    text = "\n\n".join(short_tables(points))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "saving_map.md").write_text(page(runs, points))
    (folder / "saving_map_short.md").write_text(text + "\n")
    rows = ",\n".join(map(json.dumps, advice_rows(points)))
    (folder / "saving_map.json").write_text(f"[\n{rows}\n]\n")
    lines = {size: against(points, size, "dense") for size in SIZES}
    pictures.losses(points, {size: dense for size, dense in lines.items() if dense}, folder / "saving_map_loss.png")
    pictures.saved({baseline: savings(points, baseline) for baseline in BASELINES}, folder / "saving_map.png")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="default: runs beside report.py")
    parser.add_argument("--output", "--output-dir", dest="output_dir", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: print(write(read_runs(args.runs), args.output_dir)))


if __name__ == "__main__":
    sys.exit(main())
