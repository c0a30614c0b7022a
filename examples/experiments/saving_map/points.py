"""Complete runs, each arm of them at its best peak rate, and what it saves against the dense ones.

Muon's own arithmetic is counted among its FLOPs.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from examples.experiments.runs import digest
from examples.experiments.saving_map.arms import METHODS, SIZES, Size
from examples.experiments.saving_map.line import LEAST_BUDGETS, Saving, saving
from megatron_ltd.errors import DataError
from megatron_ltd.model.arithmetic import flops as counts
from megatron_ltd.model.arithmetic.shapes import layer_matrices, parameter_shapes

BASELINES = {"dense": "dense, AdamW", "muon": "dense, Muon"}


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
    for (size, tokens, arm), group in sorted(groups.items(), key=lambda item: (*item[0][:2], order(item[0][2]))):
        first = min(run.seed for run in group)
        best = min((run for run in group if run.seed == first), key=lambda run: run.loss)
        same = [run for run in group if run.rate == best.rate]
        rates = [run.rate for run in group]
        points.append(Point(size, arm, tokens, best.rate, {run.seed: run.loss for run in same},
                            fmean(run.flops for run in same), min(rates) < best.rate < max(rates)))
    return points


def order(arm: str) -> int:
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
