"""What the runs of the map say: FLOPs saved at equal loss, as a table and a picture.

    python examples/experiments/saving_map/report.py [--runs DIR] [--output-dir DIR]

Dense training at several budgets gives a line, loss = a + b ln(FLOPs), fitted by least squares. An arm with FLOPs C
and loss L saves 1 - C / C_dense(L), where C_dense(L) is what the line needs for L. The best tried rate of each arm and
budget counts. Intervals are bootstrapped over seeds: all arms are resampled by the same seeds, since a seed means the
same data order in every arm. With one seed there is no interval, and a loss outside the range of the line is marked as
extrapolated.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

RUNS = Path(__file__).resolve().parent / "runs"
DRAWS = 2000
BASELINES = {"dense": "AdamW", "muon": "Muon"}


@dataclass(frozen=True)
class Point:
    """A finished run.

    Args:
        budget: tokens a parameter.
        flops: of the whole run, as counted by it.
        loss: held-out, at the end.
    """

    size: str
    arm: str
    budget: float
    rate: float
    seed: int
    flops: float
    loss: float


@dataclass(frozen=True)
class Line:
    """loss = a + b ln(FLOPs), over the losses between `lowest` and `highest`."""

    a: float
    b: float
    lowest: float
    highest: float

    @classmethod
    def through(cls, points: Sequence[Point]) -> "Line":
        """By least squares; needs two budgets."""
        x, y = [math.log(point.flops) for point in points], [point.loss for point in points]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        b = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True)) / sum((p - mean_x)**2 for p in x)
        return cls(mean_y - b * mean_x, b, min(y), max(y))

    def flops(self, loss: float) -> float:
        """What dense training needs for this loss."""
        return math.exp((loss - self.a) / self.b)


def read_runs(folder: Path) -> list[Point]:
    """The complete runs of a folder."""
    found = []
    for done in sorted(folder.glob("*/done.json")):
        size, arm, budget, rate, seed = done.parent.name.split("-")
        lines = [json.loads(line) for line in (done.parent / "metrics.jsonl").read_text().splitlines()]
        flops = max(line["consumed_flops"] for line in lines if "consumed_flops" in line)
        found.append(Point(size, arm, float(budget[1:]), float(rate[2:]), int(seed[4:]), flops,
                           json.loads(done.read_text())["validation_loss"]))
    return found


def best_rates(points: Iterable[Point]) -> dict[tuple[str, str, float], list[Point]]:
    """The runs at the best tried rate of each (size, arm, budget), one for each seed; of rates with several seeds the
    mean counts, and a rate with more seeds is preferred to one with fewer."""
    by_rate: dict[tuple[str, str, float], dict[float, list[Point]]] = {}
    for point in points:
        by_rate.setdefault((point.size, point.arm, point.budget), {}).setdefault(point.rate, []).append(point)
    return {key: min(rates.values(), key=lambda runs: (-len(runs), sum(run.loss for run in runs) / len(runs)))
            for key, rates in by_rate.items()}


def saving(points: Sequence[Point], size: str, baseline: str, arm: str, budget: float) -> tuple[float, bool]:
    """Share of the FLOPs that an arm saves at equal loss, and whether its loss lies outside the baseline's line."""
    chosen = best_rates(point for point in points if point.size == size)
    line = Line.through([point for (_, name, _), runs in chosen.items() if name == baseline for point in runs])
    runs = chosen[size, arm, budget]
    loss, flops = (sum(values) / len(runs) for values in ([run.loss for run in runs], [run.flops for run in runs]))
    return 1.0 - flops / line.flops(loss), not line.lowest <= loss <= line.highest


def interval(points: Sequence[Point], size: str, baseline: str, arm: str, budget: float) -> tuple[float, float] | None:
    """The 95% interval of `saving` over seeds; None with fewer than two seeds of the arm."""
    seeds = sorted({point.seed for point in best_rates(points)[size, arm, budget]})
    if len(seeds) < 2:
        return None
    draw, found = random.Random(0), []
    for _ in range(DRAWS):
        chosen = draw.choices(seeds, k=len(seeds))
        resampled = [Point(p.size, p.arm, p.budget, p.rate, place, p.flops, p.loss)
                     for place, seed in enumerate(chosen) for p in points if p.seed == seed]
        found.append(saving(resampled, size, baseline, arm, budget)[0])
    found.sort()
    return found[round(0.025 * (DRAWS - 1))], found[round(0.975 * (DRAWS - 1))]


def table(points: Sequence[Point]) -> str:
    """One row for each size, arm and budget."""
    columns = ("size", "arm", "tokens a parameter", "rate", "seeds", "FLOPs", "held-out loss", "saved against AdamW",
               "against Muon")
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "--:|" * (len(columns) - 2)]
    chosen = best_rates(points)
    tried = {key: sorted({p.rate for p in points if (p.size, p.arm, p.budget) == key}) for key in chosen}
    for (size, arm, budget), runs in sorted(chosen.items()):
        cells = []
        for baseline in BASELINES:
            budgets = {b for s, name, b in chosen if s == size and name == baseline}
            if len(budgets) < 2 or arm == baseline:
                cells.append("")
                continue
            share, outside = saving(points, size, baseline, arm, budget)
            bounds = interval(points, size, baseline, arm, budget)
            text = f"{share:.0%}" + (f" ({bounds[0]:.0%} to {bounds[1]:.0%})" if bounds else "")
            cells.append(text + (", extrapolated" if outside else ""))
        rates = tried[size, arm, budget]
        edge = "" if rates[0] < runs[0].rate < rates[-1] else " (edge)" if len(rates) > 1 else " (one tried)"
        lines.append(f"| {size} | {arm} | {budget:g} | {runs[0].rate:g}{edge} | {len(runs)} | {runs[0].flops:.3g} | "
                     f"{sum(run.loss for run in runs) / len(runs):.3f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path) -> None:
    """Loss against FLOPs with the lines of dense training."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = best_rates(points)
    sizes = sorted({size for size, _, _ in chosen})
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(6.5 * len(sizes), 4.8), squeeze=False, layout="constrained")
    for axis, size in zip(axes[0], sizes, strict=True):
        arms = sorted({arm for s, arm, _ in chosen if s == size})
        for number, arm in enumerate(arms):
            runs = [run for (s, name, _), found in chosen.items() if (s, name) == (size, arm) for run in found]
            axis.plot([run.flops for run in runs], [run.loss for run in runs], "os^vD*PXhp<>"[number % 12],
                      label=arm, linestyle="-" if arm in BASELINES else "none", markersize=7)
        axis.set_xscale("log")
        axis.set_xlabel("FLOPs")
        axis.set_ylabel("held-out loss")
        axis.set_title(size)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="default: runs beside this file")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="write report.md and report.png there")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    points = read_runs(args.runs)
    if not points:
        print(f"report.py: --runs = {args.runs} holds no complete run; name the folder of run.py", file=sys.stderr)
        return 20
    found = table(points)
    print(found)
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "report.md").write_text(found + "\n", encoding="utf-8")
        draw(points, args.output_dir / "report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
