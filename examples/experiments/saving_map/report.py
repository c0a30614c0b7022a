"""Tables and pictures of the map from a folder of runs, complete or growing.

    python examples/experiments/saving_map/report.py --output-dir build/saving_map/report

Writes saving_map.md, saving_map_loss.png, saving_map.png, and saving_map.json, which tools/inspect_token_drop.py reads
its advice from (tools/drop_course). Each arm stands at its best peak rate; what it saves is
read off the curve of dense AdamW (line.py). Muon's own arithmetic is counted among its FLOPs.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # to run from a checkout that is not installed

from examples.experiments.runs import digest
from examples.experiments.saving_map import pictures
from examples.experiments.saving_map.arms import METHODS, SIZES, Size, arm_of
from examples.experiments.saving_map.line import LEAST_BUDGETS, Saving, saving
from megatron_ltd.errors import DataError
from megatron_ltd.model.arithmetic import flops as counts
from megatron_ltd.model.arithmetic.shapes import layer_matrices, parameter_shapes
from megatron_ltd.plan.derived import policies
from tools.commands.command_line import exit_code_of
from tools.drop_course.advice import parts_of

RUNS = Path(__file__).resolve().parent / "runs"
BASELINES = {"dense": "dense, AdamW", "muon": "dense, Muon"}
CHEAPER = ("muon", "muon_conv", "muon_ngram", "muon_ngram_conv")
"""Arms of which it is said with what share of a dense run's FLOPs they reach its loss."""
OPTIMIZERS = {"dense": "adam", "muon": "muon"}


@dataclass(frozen=True)
class Complete:
    """A complete run.

    Args:
        flops: forward, backward, and Muon's iterations.
    """

    name: str
    size: str
    arm: str
    tokens_per_parameter: float
    rate: float
    seed: int
    steps: int
    loss: float
    flops: float
    commit: str
    package: str
    machine: str
    digest: str


@dataclass(frozen=True)
class Point:
    """An arm of one size and length, at its best peak rate."""

    size: str
    arm: str
    tokens_per_parameter: float
    rate: float
    losses: Mapping[int, float]
    flops: float
    inside: bool
    """Whether a lower and a higher rate were tried."""

    @property
    def loss(self) -> float:
        return fmean(self.losses.values())


def newton_schulz_flops(size: Size, steps: int) -> int:
    """FLOPs of Muon's iterations in so many steps."""
    config = size.budget.config(("--optimizer", "muon"), steps)
    rows, total = layer_matrices(config.model), 0
    for name, shape in parameter_shapes(config.model).items():
        turn = rows.get(name.split(".", 2)[-1]) if name.startswith("layers.") else None
        if turn is not None:
            total += counts.newton_schulz_flops(shape, turn if config.optimizer.muon_split_qkv else shape[:1])
    return steps * config.optimizer.muon_num_ns_steps * total


def read_runs(folder: Path) -> list[Complete]:
    """All complete runs.

    Raises:
        DataError: a curve is not the one its run was completed with, or there are none.
    """
    found = []
    for path in sorted(folder.glob("*/done.json")):
        run, done = (json.loads((path.parent / name).read_text()) for name in ("run.json", "done.json"))
        metrics = path.parent / "metrics.jsonl"
        if done["metrics_sha256"] != digest(metrics):
            raise DataError(f"{metrics} is not the curve that done.json was written for; restore it, or delete "
                            f"{path.parent}")
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        flops = [record["consumed_flops"] for record in records if "consumed_flops" in record][-1]
        size, _, rest = path.parent.name.partition("-")
        tokens = float(rest.partition("-t")[2].partition("-lr")[0])
        if run["arm"].startswith("muon"):
            flops += newton_schulz_flops(SIZES[size], run["steps"])
        found.append(Complete(path.parent.name, size, run["arm"], tokens, run["rate"], run["seed"], run["steps"],
                              done["validation_loss"], flops, run["commit"], run["package"], run["machine"],
                              done["metrics_sha256"]))
    if not found:
        raise DataError(f"--runs = {folder}: no complete run there; run.py makes them")
    return found


def best_points(runs: Sequence[Complete]) -> list[Point]:
    """Each arm of a size and length at the rate that is best with the first seed."""
    groups: dict[tuple[str, float, str], list[Complete]] = defaultdict(list)
    for run in runs:
        groups[run.size, run.tokens_per_parameter, run.arm].append(run)
    points = []
    for (size, tokens, arm), group in sorted(groups.items(), key=lambda item: (*item[0][:2], _order(item[0][2]))):
        first = min(run.seed for run in group)
        best = min((run for run in group if run.seed == first), key=lambda run: run.loss)
        same = [run for run in group if run.rate == best.rate]
        rates = [run.rate for run in group]
        points.append(Point(size, arm, tokens, best.rate, {run.seed: run.loss for run in same},
                            fmean(run.flops for run in same), min(rates) < best.rate < max(rates)))
    return points


def _order(arm: str) -> int:
    return list(METHODS).index(arm)


def against(points: Sequence[Point], size: str, baseline: str) -> dict[float, Mapping[int, float]]:
    """Losses by FLOPs of a baseline; empty where it has too few budgets for a curve."""
    found = {point.flops: point.losses for point in points if (point.size, point.arm) == (size, baseline)}
    return found if len(found) >= LEAST_BUDGETS else {}


def savings(points: Sequence[Point], baseline: str) -> dict[tuple[str, float, str], Saving]:
    """What each arm saves against a baseline, by size, length and name."""
    found = {}
    for point in points:
        dense = against(points, point.size, baseline)
        if dense and point.arm != baseline:
            found[point.size, point.tokens_per_parameter, point.arm] = saving(point.losses, point.flops, dense)
    return found


def table(points: Sequence[Point]) -> str:
    """The map as Markdown; FLOPs are in units of dense AdamW on the same tokens."""
    found = {baseline: savings(points, baseline) for baseline in BASELINES}
    dense = {(point.size, point.tokens_per_parameter): point for point in points if point.arm == "dense"}
    lines = ["| model | tokens a parameter | arm | peak rate | seeds | FLOPs | loss | minus dense | "
             + " | ".join(f"FLOPs saved against {title}" for title in BASELINES.values()) + " |",
             "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
    for point in points:
        key = (point.size, point.tokens_per_parameter, point.arm)
        same = dense.get(key[:2])
        rate = f"{point.rate:g}" + ("" if point.inside else " *")
        share = minus = ""
        if same is not None:
            share = f"{point.flops / same.flops:.3f}"
            common = sorted(point.losses.keys() & same.losses.keys())
            if point.arm != "dense" and common:
                minus = f"{fmean(point.losses[seed] - same.losses[seed] for seed in common):+.3f}"
        saved = " | ".join(found[baseline][key].text() if key in found[baseline] else "" for baseline in BASELINES)
        lines.append(f"| {point.size} | {point.tokens_per_parameter:g} | {METHODS[point.arm].title} | {rate} | "
                     f"{len(point.losses)} | {share} | {point.loss:.4f} | {minus} | {saved} |")
    return "\n".join([*lines, "", "\\* the lowest or the highest rate tried at this length, or the only one."])


def reached_table(points: Sequence[Point]) -> str:
    """The share of a dense run's FLOPs with which a cheaper arm reaches its loss, on the curve through that arm's own
    budgets, between which the loss must lie."""
    lines = ["| model | tokens a parameter | the loss of | reached by | with, of its FLOPs |", "|---|--:|---|---|--:|"]
    for name in CHEAPER:
        for point in points:
            budgets = against(points, point.size, name)
            if budgets and point.arm in BASELINES and point.arm != name:
                found = saving(point.losses, point.flops, budgets)
                if found.extrapolated:
                    continue
                bounds = None if found.interval is None else [1.0 / (1.0 - bound) for bound in found.interval]
                spread = "one seed" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"
                lines.append(f"| {point.size} | {point.tokens_per_parameter:g} | {BASELINES[point.arm]} | "
                             f"{METHODS[name].title} | {1.0 / (1.0 - found.share):.2f} ({spread}) |")
    return "\n".join(lines)


def shapes_table(points: Sequence[Point], arm: str = "ltd") -> str:
    """What an arm saves against dense AdamW, by the shape of the model."""
    found = {key[:2]: one for key, one in savings(points, "dense").items() if key[2] == arm}
    lengths = sorted({tokens for _, tokens in found})
    lines = ["| model | layers x width | parameters | " + " | ".join(f"at {tokens:g}" for tokens in lengths) + " |",
             "|---|--:|--:|" + "--:|" * len(lengths)]
    for name, size in SIZES.items():
        cells = [found[name, tokens].text() if (name, tokens) in found else "" for tokens in lengths]
        if any(cells):
            model = size.budget.config((), 1).model
            lines.append(f"| {name} | {model.num_layers} x {model.hidden_size} | {size.budget.parameters:,} | "
                         + " | ".join(cells) + " |")
    return "\n".join(lines)


def advice_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The map as tools/drop_course/advice.py reads it. An arm is known by its policies, its optimizer, and whether it
    has a table of n-grams."""
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


def rates_table(runs: Sequence[Complete]) -> str:
    """Every peak rate that was tried, with the loss of the first seed."""
    rates = sorted({run.rate for run in runs})
    losses: dict[tuple[str, float, str], dict[float, float]] = defaultdict(dict)
    for run in sorted(runs, key=lambda run: -run.seed):
        losses[run.size, run.tokens_per_parameter, run.arm][run.rate] = run.loss
    lines = ["| model | tokens a parameter | arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
             "|---|--:|---|" + "--:|" * len(rates)]
    for (size, tokens, arm), found in sorted(losses.items(), key=lambda item: (*item[0][:2], _order(item[0][2]))):
        cells = [f"{found[rate]:.4f}" if rate in found else "" for rate in rates]
        marked = [f"**{cell}**" if found.get(rate) == min(found.values()) else cell
                  for rate, cell in zip(rates, cells, strict=True)]
        lines.append(f"| {size} | {tokens:g} | {METHODS[arm].title} | " + " | ".join(marked) + " |")
    return "\n".join(lines)


def digests_table(runs: Sequence[Complete]) -> str:
    lines = ["| run | steps | FLOPs | commit, package | loss | SHA-256 of metrics.jsonl |", "|---|--:|--:|---|--:|---|"]
    lines += [f"| {run.name} | {run.steps} | {run.flops:.4g} | {run.commit}, {run.package} | {run.loss:.6f} | "
              f"{run.digest} |" for run in runs]
    return "\n".join(lines)


def write(runs: Sequence[Complete], folder: Path) -> str:
    """Write tables and pictures; returns the map as Markdown."""
    points = best_points(runs)
    text = table(points)
    folder.mkdir(parents=True, exist_ok=True)
    machines = "; ".join(sorted({run.machine for run in runs}))
    tables = (text, reached_table(points), shapes_table(points), rates_table(runs), digests_table(runs))
    (folder / "saving_map.md").write_text("\n\n".join([*tables, f"fp32; {machines}"]) + "\n")
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
