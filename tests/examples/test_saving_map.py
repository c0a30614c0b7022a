"""The method of the map of savings on made-up runs whose answer is known, and its arms."""

import json
import math
from pathlib import Path

import pytest

from examples.experiments.saving_map.arms import METHODS, SIZES, arm_of
from examples.experiments.saving_map.report import Line, Point, best_rates, interval, read_runs, saving, table
from examples.experiments.saving_map.run import name_of, read_queue
from megatron_ltd.errors import ConfigError
from megatron_ltd.settings.checks.all import violations


def dense_loss(flops: float) -> float:
    return 9.0 - 0.4 * math.log(flops)


def runs_of(arm: str, cost: float, noise: float = 0.0, seeds: int = 1) -> list[Point]:
    """An arm that needs `cost` of dense training's FLOPs for every loss."""
    return [Point("small", arm, budget, 0.01, seed, budget * 1e3,
                  dense_loss(budget * 1e3 / cost) + noise * (seed - (seeds + 1) / 2))
            for budget in (2.5, 5.0, 10.0) for seed in range(1, seeds + 1)]


def test_a_saving_without_noise_is_found_exactly() -> None:
    points = runs_of("dense", 1.0) + runs_of("cheap", 0.7) + runs_of("dear", 1.25)
    assert saving(points, "small", "dense", "cheap", 5.0) == (pytest.approx(0.3), False)
    assert saving(points, "small", "dense", "dear", 5.0) == (pytest.approx(-0.25), False)
    # The best run of the cheap arm is better than any dense run: the line is extended to it.
    assert saving(points, "small", "dense", "cheap", 10.0) == (pytest.approx(0.3), True)


def test_noise_that_all_arms_share_cancels_and_noise_of_one_arm_widens_the_interval() -> None:
    shared = runs_of("dense", 1.0, 0.02, 3) + runs_of("cheap", 0.7, 0.02, 3)
    bounds = interval(shared, "small", "dense", "cheap", 5.0)
    assert bounds == (pytest.approx(0.3), pytest.approx(0.3))
    own = runs_of("dense", 1.0, 0.0, 3) + runs_of("cheap", 0.7, 0.02, 3)
    bounds = interval(own, "small", "dense", "cheap", 5.0)
    assert bounds is not None and bounds[0] < 0.28 < 0.3 < 0.32 < bounds[1]
    # The extremes are those in which one seed is drawn three times: 0.02 nats are 0.05 of ln(FLOPs).
    low, high = (1 - 0.7 * math.exp(sign * 0.05) for sign in (1, -1))
    assert bounds == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_with_one_seed_there_is_no_interval() -> None:
    points = runs_of("dense", 1.0) + runs_of("cheap", 0.7)
    assert interval(points, "small", "dense", "cheap", 5.0) is None
    assert "30% |" in table(points) and "(one tried)" in table(points) and "30%, extrapolated" in table(points)


def test_the_line_is_the_least_squares_line() -> None:
    points = [Point("small", "dense", 1, 1, 1, math.exp(x), y) for x, y in ((1, 5.0), (2, 4.0), (3, 3.6))]
    line = Line.through(points)
    assert (line.a, line.b) == (pytest.approx(5.6), pytest.approx(-0.7))  # by the normal equations
    assert line.flops(4.2) == pytest.approx(math.exp(2.0))


def test_the_best_rate_counts_and_more_seeds_before_fewer() -> None:
    def run(rate: float, seed: int, loss: float) -> Point:
        return Point("small", "dense", 5.0, rate, seed, 1.0, loss)

    (chosen,) = best_rates([run(0.1, 1, 3.0), run(0.2, 1, 2.9), run(0.4, 1, 3.1)]).values()
    assert chosen == [run(0.2, 1, 2.9)]
    (chosen,) = best_rates([run(0.1, 1, 3.0), run(0.1, 2, 3.0), run(0.2, 1, 2.9)]).values()
    assert {point.rate for point in chosen} == {0.1} and len(chosen) == 2


@pytest.mark.parametrize("name", METHODS)
def test_every_arm_can_run_and_costs_at_most_dense_training(name: str) -> None:
    size = SIZES["rehearsal"]
    arm = arm_of(size, name, 5)
    assert violations(size.budget.config((*arm.flags, "--lr", "0.01"), arm.steps), 1) == []
    assert size.budget.flops(arm.flags, arm.steps) <= size.budget.flops((), arm.steps)


def test_the_queue_is_read_and_what_is_no_entry_is_named(tmp_path: Path) -> None:
    path = tmp_path / "queue.txt"
    path.write_text("# a comment\nsmall dense 2.5 0.004 1\n")
    assert [name_of(entry) for entry in read_queue(path)] == ["small-dense-t2.5-lr0.004-seed1"]
    for wrong in ("small dense 2.5", "small nothing 2.5 0.004 1", "huge dense 2.5 0.004 1"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="line 1"):
            read_queue(path)


def test_complete_runs_are_read_from_their_folders(tmp_path: Path) -> None:
    for name, complete in (("small-dense-t5-lr0.01-seed2", True), ("small-dense-t5-lr0.02-seed2", False)):
        folder = tmp_path / name
        folder.mkdir()
        lines = [{"consumed_flops": 5}, {"consumed_flops": 9}, {"validation_loss": 2.0}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        if complete:
            (folder / "done.json").write_text(json.dumps({"validation_loss": 2.0}))
    assert read_runs(tmp_path) == [Point("small", "dense", 5.0, 0.01, 2, 9, 2.0)]
