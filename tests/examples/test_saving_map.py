"""The map of savings: its method on made-up runs whose answer is known, its queue, and its report."""

import json
import math
import random
from pathlib import Path

import pytest

from examples.experiments.prepare import Corpus
from examples.experiments.runs import digest, write_json
from examples.experiments.saving_map import report
from examples.experiments.saving_map.arms import METHODS, SIZES, arm_of
from examples.experiments.saving_map.line import fit, saving
from examples.experiments.saving_map.points import best_points, newton_schulz_flops, read_runs
from examples.experiments.saving_map.run import QUEUE, main, name_of, plan, planned_run, read_queue, with_best_rate
from megatron_ltd.checkpoint.layout import TRACKER_NAME
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import global_batch_size, policies

DOCS = Path(__file__).resolve().parents[2] / "docs"
BUDGETS = (1e12, 2e12, 4e12, 8e12)


def dense_loss(flops: float) -> float:
    return 2.5 + 1.5 * (flops / 1e12) ** -0.4


def test_the_curve_through_made_up_runs_is_the_one_they_were_made_with() -> None:
    line = fit([(flops, dense_loss(flops)) for flops in BUDGETS])
    assert line.floor == pytest.approx(2.5, abs=0.02)
    assert line.power == pytest.approx(0.4, abs=0.01)
    assert line.flops(dense_loss(3e12)) == pytest.approx(3e12, rel=1e-3)
    assert line.flops(line.floor) == math.inf


def test_an_arm_that_is_made_to_save_forty_percent_saves_forty_percent() -> None:
    dense = {flops: {1: dense_loss(flops)} for flops in BUDGETS}
    found = saving({1: dense_loss(3e12)}, 0.6 * 3e12, dense)
    assert found.share == pytest.approx(0.4, abs=1e-3)
    assert found.interval is None and not found.extrapolated
    assert found.text() == "+40% (one seed)"


def test_an_arm_of_one_seed_is_compared_with_dense_runs_of_that_seed() -> None:
    dense = {flops: {1: dense_loss(flops), 2: dense_loss(flops) + 0.1} for flops in BUDGETS}
    assert saving({1: dense_loss(3e12)}, 0.6 * 3e12, dense).share == pytest.approx(0.4, abs=1e-3)
    assert saving({2: dense_loss(3e12) + 0.1}, 0.6 * 3e12, dense).share == pytest.approx(0.4, abs=1e-3)


def test_budgets_far_away_do_not_bend_the_curve_at_an_arm() -> None:
    dense = {flops: {1: dense_loss(flops)} for flops in BUDGETS} | {1e11: {1: 9.0}}
    assert saving({1: dense_loss(3e12)}, 0.6 * 3e12, dense).share == pytest.approx(0.4, abs=1e-3)


def test_an_arm_that_costs_more_saves_a_negative_share() -> None:
    dense = {flops: {1: dense_loss(flops)} for flops in BUDGETS}
    assert saving({1: dense_loss(2e12)}, 3e12, dense).share == pytest.approx(-0.5, abs=1e-3)


def test_what_all_arms_of_a_seed_share_does_not_widen_the_interval() -> None:
    shift = {1: -0.1, 2: 0.0, 3: 0.1}
    dense = {flops: {seed: dense_loss(flops) + by for seed, by in shift.items()} for flops in BUDGETS}
    found = saving({seed: dense_loss(3e12) + by for seed, by in shift.items()}, 0.6 * 3e12, dense, draws=200)
    assert found.interval == pytest.approx((0.4, 0.4), abs=2e-3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator, seeds, covered = random.Random(1), range(1, 9), 0
    for _ in range(40):
        dense = {flops: {seed: dense_loss(flops) + generator.gauss(0, 0.02) for seed in seeds} for flops in BUDGETS}
        found = saving({seed: dense_loss(3e12) + generator.gauss(0, 0.02) for seed in seeds}, 1.8e12, dense, draws=100)
        assert found.interval is not None
        covered += found.interval[0] <= 0.4 <= found.interval[1]
    assert 30 <= covered <= 40  # a percentile interval of eight seeds is somewhat too narrow


def test_a_loss_beyond_the_dense_budgets_is_called_extrapolated() -> None:
    dense = {flops: {1: dense_loss(flops)} for flops in BUDGETS}
    assert saving({1: dense_loss(9e12)}, 1e12, dense).extrapolated
    assert "extrapolated" in saving({1: dense_loss(9e11)}, 1e12, dense).text()


def test_two_budgets_are_no_curve() -> None:
    with pytest.raises(ValueError, match="2 dense budgets; a curve needs 3"):
        fit([(1e12, 4.0), (2e12, 3.0)])


def test_every_run_of_the_queue_can_be_planned() -> None:
    lines: list[str] = []
    plan(QUEUE, lines.append)
    assert [line.partition(":")[0] for line in lines] == [name_of(entry) for entry in read_queue(QUEUE)]


@pytest.mark.parametrize(("line", "said"), [("small dense 10 0.004", "is not size, arm"),
                                            ("small nothing 10 0.004 1", "no size 'small' with an arm 'nothing'")])
def test_a_line_that_is_no_run_is_named(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "queue.txt").write_text("# a comment\nsmall dense 10 0.004 1\n" + line + "\n")
    with pytest.raises(ConfigError, match=rf"queue\.txt, line 3: .*{said}"):
        read_queue(tmp_path / "queue.txt")


def test_every_arm_reads_the_same_raw_tokens() -> None:
    size = SIZES["small"]
    for name in METHODS:
        arm = arm_of(size, name, 2.5)
        config = size.budget.config(arm.flags, arm.steps)
        tokens = sum(policies(config).plan(step).text_tokens for step in range(arm.steps))
        assert global_batch_size(config, 1) * tokens == pytest.approx(2.5 * size.budget.parameters, rel=0.01), name


def test_a_continued_run_starts_from_the_other_one_until_it_has_its_own_checkpoint(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "tokenizer.json", tmp_path / "train", tmp_path / "valid")
    run = planned_run(("rehearsal", "ltd", 0.1, 1e-3, 1), corpus, tmp_path / "runs", tmp_path / "base/checkpoints")
    assert f"--load {tmp_path}/base/checkpoints --finetune --save" in " ".join(run.command())
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / TRACKER_NAME).write_text("2")
    assert f"--load {run.folder}/checkpoints --save" in " ".join(run.command())


def test_a_start_without_a_model_is_refused_before_anything_is_made(tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--text", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--start", str(tmp_path / "base")]
    assert main(arguments) == ConfigError.exit_code
    assert "--keep-models" in capsys.readouterr().err and not (tmp_path / "out" / "corpus").exists()


def test_best_is_the_rate_of_the_longest_dense_runs_with_the_same_optimizer(tmp_path: Path) -> None:
    for arm, tokens, rate, loss in (("dense", 2.5, 1e-3, 1.0), ("dense", 2.5, 2e-3, 2.0), ("dense", 5, 1e-3, 1.9),
                                    ("dense", 5, 2e-3, 1.8), ("dense", 10, 1e-3, 1.0), ("muon", 5, 4e-3, 1.0)):
        complete_run(tmp_path, arm, tokens, rate, 1, loss, 1e12)
    assert with_best_rate(("rehearsal", "ltd", 20, None, 1), tmp_path) == ("rehearsal", "ltd", 20, 2e-3, 1)
    assert with_best_rate(("rehearsal", "muon_ltd", 20, None, 1), tmp_path) is None
    assert with_best_rate(("rehearsal", "ltd", 20, None, 2), tmp_path) is None


def test_the_gpu_edition_reads_at_most_four_passes_of_forty_megabytes_and_fits_a_quarter_of_an_hour() -> None:
    size, entries = SIZES["gpu"], read_queue(QUEUE.with_name("queue_gpu.txt"))
    assert max(tokens for _, _, tokens, _, _ in entries) * size.budget.parameters <= 4 * 20e6
    arms = [arm_of(size, name, tokens) for _, name, tokens, _, _ in entries]
    # 60 TFLOP/s, a modest share of what a current GPU does in bf16, leaves time for starts and compilation.
    assert sum(size.budget.flops(arm.flags, arm.steps) for arm in arms) / 60e12 < 400


def test_newton_schulz_is_counted_by_hand() -> None:
    def iteration(m: int, n: int) -> int:  # X X^T, A A, and a polynomial of both times X
        return 2 * m * m * n + 2 * m ** 3 + 2 * m * m * n

    layer = 4 * iteration(64, 64) + 2 * iteration(64, 256)
    assert newton_schulz_flops(SIZES["small"], 3) == 3 * 6 * 5 * layer


def complete_run(folder: Path, arm: str, tokens: float, rate: float, seed: int, loss: float, flops: float) -> None:
    folder = folder / f"rehearsal-{arm}-t{tokens:g}-lr{rate:g}-seed{seed}"
    folder.mkdir(parents=True)
    steps = SIZES["rehearsal"].steps(tokens)
    records = [{"step": steps, "lm_loss": loss, "consumed_flops": flops}, {"step": steps, "validation_loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_json(folder / "run.json", {"arm": arm, "seed": seed, "rate": rate, "steps": steps, "commit": "abc",
                                     "package": "def", "machine": "a processor"})
    write_json(folder / "done.json", {"validation_loss": loss, "metrics_sha256": digest(folder / "metrics.jsonl")})


def test_the_report_compares_each_arm_at_its_best_rate_with_the_dense_curve(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for tokens, flops in zip((2.5, 5.0, 10.0, 20.0), BUDGETS, strict=True):
        for seed, by in ((1, 0.0), (2, 0.01)):
            complete_run(runs, "dense", tokens, 0.004, seed, dense_loss(flops) + by, flops)
        complete_run(runs, "dense", tokens, 0.008, 1, dense_loss(flops) + 0.1, flops)
        for seed, by in ((1, 0.0), (2, 0.01)):  # reaches every loss with half of the FLOPs
            complete_run(runs, "muon", tokens, 0.004, seed, dense_loss(2 * flops) + by, flops)
    for seed, by in ((1, 0.0), (2, 0.01)):
        complete_run(runs, "ltd", 10.0, 0.008, seed, dense_loss(3e12) + by, 0.6 * 3e12)
    complete_run(runs, "ltd", 10.0, 0.004, 1, dense_loss(3e12) + 0.2, 0.6 * 3e12)
    assert report.main(["--runs", str(runs), "--output-dir", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "saving_map.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| rehearsal | 10 | random-LTD"))
    assert "| 0.008 * | 2 |" in row  # no higher rate was tried
    assert "+40% (+40% to +40%)" in row
    assert "| rehearsal | 10 | dense, Muon | 0.004 * | 2 | 1.051 |" in text
    short = (tmp_path / "report" / "saving_map_short.md").read_text()
    assert "| random-LTD, linear over the run | rehearsal |  |  | 40% (40% to 40%) |  |" in short
    assert "| share of FLOPs to the loss of | model | dense, AdamW, at 5 | dense, AdamW, at 10 |" in short
    assert "| dense, Muon | rehearsal | 0.53 (0.53 to 0.53) | 0.53 (0.53 to 0.53) |" in short  # half of 1.051
    assert "| rehearsal | 6 x 32 | 88,160 | 40% (40% to 40%) |" in short
    assert digest(runs / "rehearsal-ltd-t10-lr0.008-seed2" / "metrics.jsonl") in text
    assert (tmp_path / "report" / "saving_map_loss.png").exists()


def test_a_curve_that_was_changed_is_refused(tmp_path: Path) -> None:
    complete_run(tmp_path, "dense", 2.5, 0.004, 1, 4.0, 1e12)
    with open(tmp_path / "rehearsal-dense-t2.5-lr0.004-seed1" / "metrics.jsonl", "a") as file:
        file.write("{}\n")
    assert report.main(["--runs", str(tmp_path), "--output-dir", str(tmp_path)]) != 0


def test_the_pages_have_the_tables_of_the_committed_runs() -> None:
    runs = read_runs(report.RUNS)
    points = best_points(runs)
    assert (DOCS / "saving_map.md").read_text() == report.page(runs, points)
    results = (DOCS / "results.md").read_text()
    assert [table for table in report.short_tables(points) if table not in results] == []
