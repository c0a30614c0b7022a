"""The compute-saving experiment: budgets, verdict, and a driver that may be stopped at any moment."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.experiments.budget import Arm
from examples.experiments.compute_saving.arms import arms, budget_of
from examples.experiments.compute_saving.editions import EDITIONS
from examples.experiments.compute_saving.report import ArmResult, report, verdict_text
from examples.experiments.compute_saving.verdict import Estimate, compute_saved, difference, estimate, in_words
from examples.experiments.runs import Run, complete_all, digest, write_json
from megatron_ltd.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"step_seconds", "tokens_per_second", "tflops_per_device", "mfu", "own_seconds", "own_seconds_slowest",
         "slowest_rank", "stragglers", "host_memory_free", "clock_skew_seconds"}


def test_the_claim_saves_a_third_of_the_layer_tokens_of_the_cpu_edition() -> None:
    claim, steps = arms(EDITIONS["cpu"])["ltd"], EDITIONS["cpu"].steps
    growth = int(claim.flags[claim.flags.index("--random-ltd-steps") + 1])
    processed = 0
    for step in range(steps):  # 12 layers, all but two of which keep 64 of 512 tokens at first
        kept = 512 if step >= growth else max(64, math.floor(64 + 448 * step / growth) // 16 * 16)
        processed += 2 * 512 + 10 * kept
    assert processed / (steps * 12 * 512) == pytest.approx(2 / 3, abs=5e-4)


def test_arms_of_equal_flops_differ_by_less_than_a_step() -> None:
    edition = EDITIONS["cpu"]
    known, budget = arms(edition), budget_of(edition)
    step = budget.flops((), 1)
    flops = {name: budget.flops(arm.flags, arm.steps) for name, arm in known.items()}
    for name in set(known) - {"dense", "ltd_long", "ltd_published", "layer_drop"}:
        assert abs(flops[name] - flops["ltd"]) <= step, name
    assert abs(flops["ltd_long"] - flops["dense"]) <= step
    # By hand: 12 layers of width 128, 512 tokens, 4,096 ids, 2 samples a step; backward is twice forward.
    layer = 24 * 512 * 128 * 128 + 2 * 128 * 512 * 513
    assert step == 2 * 3 * (12 * layer + 2 * 512 * 128 * 4096)


def test_differences_pair_the_seeds() -> None:
    found = difference({1: 3.1, 2: 3.4, 3: 3.3, 9: 0.0}, {1: 3.0, 2: 3.2, 3: 3.3})
    assert found.mean == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(np.std([0.1, 0.2, 0.0], ddof=1) / np.sqrt(3))
    assert found.interval == pytest.approx((0.1 - 4.303 * found.standard_error, 0.1 + 4.303 * found.standard_error))


@pytest.mark.parametrize(("mean", "said"), [(0.1, "worse"), (-0.1, "better"), (0.01, "undecided")])
def test_a_difference_is_called_by_its_interval(mean: float, said: str) -> None:
    assert in_words(Estimate(mean, 0.01, 3)).startswith(said)


def test_one_seed_has_no_error_bar() -> None:
    assert estimate([3.0]) == Estimate(3.0, None, 1)
    assert in_words(estimate([3.0])) == "one seed, so no error bar"


def test_compute_saved_is_read_off_the_line_through_the_dense_budgets() -> None:
    short, long = ({1: 4.0}, 1e12), ({1: 3.0}, 4e12)
    half_way = compute_saved({1: 3.5}, 1e12, short, long)  # half-way in the logarithm is 2e12
    assert half_way is not None and half_way.mean == pytest.approx(0.5)
    as_dense = compute_saved({1: 4.0}, 1e12, short, long)
    assert as_dense is not None and as_dense.mean == pytest.approx(0.0)
    assert compute_saved({1: 3.5}, 1e12, short, ({1: 4.0}, 4e12)) is None


def test_the_verdict_names_the_difference_and_its_interval() -> None:
    costs = {"consumed_tokens": 90.0, "consumed_layer_tokens": 90.0, "consumed_flops": 90.0}
    dense = ArmResult(Arm("dense", "dense", (), 9), {1: 3.0, 2: 3.1, 3: 3.2}, 1e-3, costs)
    fewer = dict(costs, consumed_layer_tokens=60.0, consumed_flops=63.0)
    claim = ArmResult(Arm("ltd", "random-LTD", (), 9), {1: 3.2, 2: 3.3, 3: 3.4}, 2e-3, fewer)
    text = verdict_text({"dense": dense, "ltd": claim})
    assert "Equal loss with 33.3% fewer layer tokens, 30.0% fewer FLOPs? +0.2000 ± 0.0000 nats against dense; " in text
    assert "| random-LTD | 0.002 | 9 | 1.000 | 0.667 | 0.700 | 3.3000 ± 0.0577 | +0.2000 ± 0.0000 |" in text


STEPS = 60


def small_run(folder: Path, seed: int, flags: tuple[str, ...] = ()) -> Run:
    edition = EDITIONS["rehearsal"]
    arguments = ("--config", str(edition.config), *flags, "--mock-data", "--vocab-size", "320", "--train-iters",
                 str(STEPS), "--lr", "1e-3", "--seed", str(seed), "--save-interval", "15", "--eval-interval", "15")
    return Run(folder / f"seed{seed}", "ltd", seed, 1e-3, STEPS, arguments, False,
               budget_of(edition).flops(flags, STEPS))


DROPPING = ("--random-ltd", "--random-ltd-start-length", "16", "--random-ltd-steps", "45")
DRIVER = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is not there where the tests run in the background
from tests.examples.test_compute_saving import DROPPING, small_run
from examples.experiments.runs import complete_all
complete_all([small_run(Path(sys.argv[1]), 1, DROPPING)], 1, print)
"""


def curve(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES}
            for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]  # the last may be half there


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the driver ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_driver_that_is_stopped_loses_no_run_and_counts_none_twice(tmp_path: Path) -> None:
    whole = complete_all([small_run(tmp_path / "whole", 1, DROPPING)], 1, lambda line: None)
    folder = tmp_path / "cut" / "seed1"
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path / "cut")], cwd=ROOT, env=environment,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def steps_logged() -> int:
        path = folder / "metrics.jsonl"
        return max([0, *(record["step"] for record in curve(path))]) if path.exists() else 0

    first = start()
    wait_for(lambda: steps_logged() >= 16, first)
    first.send_signal(signal.SIGINT)
    first.wait(timeout=300)
    assert not (folder / "done.json").exists()
    second = start()
    wait_for(lambda: steps_logged() >= 32, second)
    second.kill()  # the run itself lives on, and keeps its folder
    second.wait()
    third = start()
    assert third.wait(timeout=300) == 0
    assert curve(folder / "metrics.jsonl") == curve(tmp_path / "whole" / "seed1" / "metrics.jsonl")
    done = json.loads((folder / "done.json").read_text())
    assert done["validation_loss"] == whole["whole/seed1"]["validation_loss"]
    flops = curve(folder / "metrics.jsonl")[-2]["consumed_flops"]
    assert flops == budget_of(EDITIONS["rehearsal"]).flops(DROPPING, STEPS)
    before = (folder / "log").stat().st_size
    complete_all([small_run(tmp_path / "cut", 1, DROPPING)], 1, lambda line: None)
    assert (folder / "log").stat().st_size == before, "a complete run was started again"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"not the curve that done\.json was written for"):
        complete_all([small_run(tmp_path / "cut", 1, DROPPING)], 1, lambda line: None)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path, 1)
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps(run.identity() | {"rate": 5.0}))
    with pytest.raises(DataError, match=r"rate = 5\.0, but this run has 0\.001; delete the folder"):
        complete_all([run], 1, lambda line: None)


def test_a_run_that_fails_says_where_its_log_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"exit code 20; its log says why: .*seed1/log"):
        complete_all([small_run(tmp_path, 1, ("--num-query-groups", "7"))], 1, lambda line: None)


def complete_run(folder: Path, arm: Arm, seed: int, loss: float, flops: int) -> None:
    """A run as the driver leaves it, with a made-up curve."""
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for share in (0.5, 1.0):
        step = round(share * arm.steps)
        records += [{"step": step, "consumed_samples": step, "consumed_tokens": 64 * step, "lm_loss": seed,
                     "consumed_layer_tokens": 64 * step, "consumed_flops": round(share * flops), "step_seconds": 0.1},
                    {"step": step, "validation_loss": loss + 1 - share, "validation_ppl": math.exp(loss + 1 - share)}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_json(folder / "run.json", {"arm": arm.name, "seed": seed, "rate": 1e-3, "commit": "abc"})
    write_json(folder / "done.json", {"validation_loss": loss, "metrics_sha256": digest(folder / "metrics.jsonl")})


def test_the_report_has_every_complete_arm_its_pictures_and_digests(tmp_path: Path) -> None:
    known = arms(EDITIONS["rehearsal"])
    losses = {"dense": (3.0, 3.1), "dense_cut": (3.4, 3.4), "ltd": (3.1, 3.2)}
    for name, values in losses.items():
        for seed, loss in enumerate(values, 1):
            complete_run(tmp_path / "runs" / f"{name}-seed{seed}", known[name], seed, loss,
                         4000 if name == "dense" else 2000)
    said: list[str] = []
    report(known, tmp_path, said.append)
    verdict = (tmp_path / "report" / "verdict.md").read_text()
    assert "50.0% fewer FLOPs? +0.1000 ± 0.0000 nats against dense" in verdict
    assert "Against dense with the same FLOPs: -0.2500 ± 0.0500 nats" in verdict
    assert digest(tmp_path / "runs" / "ltd-seed2" / "metrics.jsonl") in verdict
    assert verdict.startswith(said[0])
    page = (tmp_path / "report" / "comparison.html").read_text()
    assert all(known[name].title in page for name in losses)
    assert list((tmp_path / "report").glob("loss_flops*.png"))


def test_the_time_of_every_arm_is_measured(tmp_path: Path) -> None:
    script = ROOT / "examples" / "experiments" / "compute_saving" / "timing.py"
    done = subprocess.run([sys.executable, str(script), "--edition", "rehearsal", "--rounds", "1", "--output",
                           str(tmp_path / "timing.md")], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "timing.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [arm.title for arm in arms(EDITIONS["rehearsal"]).values()]
    assert rows[0][3:5] == ["1.000", "1.000"]
    assert all(float(row[2]) > 0 for row in rows)
