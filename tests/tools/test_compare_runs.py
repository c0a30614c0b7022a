"""Runs become tables whose numbers a hand calculation gives, and a page that needs nothing else."""

import builtins
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools import compare_runs
from tools.comparison import figures
from tools.comparison.arms import read_arms
from tools.comparison.curves import RunCurve, reach, read_run
from tools.comparison.seed_statistics import Comparison, compare
from tools.comparison.tables import cost_text


def training(step: int, **more: Any) -> dict[str, Any]:
    """100 raw tokens, 50 layer tokens, 1000 FLOPs and 36 seconds a step."""
    return {"step": step, "consumed_tokens": 100 * step, "consumed_layer_tokens": 50 * step, "lm_loss": 3.0,
            "consumed_flops": 1000 * step, "model_flops": 1000, "step_seconds": 36.0, "kept_length": 8,
            "grad_norm": 1.0, "loss_scale": 1.0, **more}


def validation(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "validation_loss": loss, "validation_ppl": math.exp(loss)}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_of(path: Path, *losses: float, gap: int = 10) -> Path:
    """A run with a validation every `gap` steps; like real ones, no two are the same to the byte."""
    steps = [gap * (at + 1) for at in range(len(losses))]
    return write(path, *(training(step, run=path.name) for step in steps), *map(validation, steps, losses))


def comparison_of(*arguments: str, baseline: int = 0, different: bool = False) -> Comparison:
    arms = read_arms(list(arguments), different)
    return compare(arms, arms[baseline])


def failure(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str]:
    code = compare_runs.main(["--output-dir", str(folder / "out"), *arguments])
    return code, capsys.readouterr().err


# Curves


def test_a_validation_between_logged_steps_is_charged_what_was_consumed_by_then(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", training(10), training(20, consumed_flops=40_000, step_seconds=72.0),
                 validation(5, 4.0), validation(15, 3.5), validation(20, 3.0))
    points = read_run(path).points
    assert [point.costs["raw_tokens"] for point in points] == [500, 1500, 2000]
    assert [point.costs["layer_tokens"] for point in points] == [250, 750, 1000]
    assert [point.costs["flops"] for point in points] == [5_000, 25_000, 40_000]
    # 10 steps of 36 s, then of 72 s.
    assert [point.costs["hours"] for point in points] == pytest.approx([0.05, 0.2, 0.3])


def test_files_that_do_not_count_flops_are_summed_over_the_steps_since_the_last_record(tmp_path: Path) -> None:
    records = [training(10, model_flops=7), training(12, model_flops=5), validation(12, 3.0)]
    for record in records:
        record.pop("consumed_flops", None)
    curve = read_run(write(tmp_path / "m.jsonl", *records))
    assert curve.flops_estimated
    assert curve.final.costs["flops"] == 10 * 7 + 2 * 5


def test_a_step_repeated_after_a_restart_counts_once_with_its_last_record(tmp_path: Path) -> None:
    curve = read_run(write(tmp_path / "m.jsonl", training(10), validation(10, 9.0), training(10), validation(10, 3.0)))
    assert [point.loss for point in curve.points] == [3.0]
    assert curve.final.costs["hours"] == pytest.approx(0.1)


def test_perplexity_is_the_logged_one_or_follows_from_the_loss_and_a_classifier_has_none(tmp_path: Path) -> None:
    logged = write(tmp_path / "1", training(10), {"step": 10, "validation_loss": 2.0, "validation_ppl": 7.5})
    bare = write(tmp_path / "2", training(10), {"step": 10, "validation_loss": 2.0})
    images = write(tmp_path / "3", training(10), {"step": 10, "validation_loss": 2.0, "validation_top1": 0.5})
    assert [read_run(path).final.perplexity for path in (logged, bare, images)] == [7.5, math.exp(2.0), None]


@pytest.mark.parametrize(("losses", "steps"), [
    ((4.0, 3.0, 2.0), 15.0),  # half of the way from 4 to 3
    ((4.0, 3.75, 3.0), 20 + 10 / 3),  # a third of the way from 3.75 to 3
    ((4.0, 3.0, 3.6, 3.2), 15.0),  # the first time, though it rises again
    ((3.4, 3.2, 3.0), 10.0),  # already there at the first validation
    ((4.0, 3.5), 20.0),  # exactly there
    ((4.0, math.nan, 3.0), 30.0),  # no line through what is not a number
    ((4.0, 3.51), None),
])
def test_reaching_a_loss_is_interpolated_on_the_validation_curve(
        tmp_path: Path, losses: tuple[float, ...], steps: float | None) -> None:
    found = reach(read_run(run_of(tmp_path / "m.jsonl", *losses)), 3.5)
    if steps is None:
        assert found is None
    else:
        assert found == pytest.approx({"raw_tokens": 100 * steps, "layer_tokens": 50 * steps, "flops": 1000 * steps,
                                       "hours": 0.01 * steps})


@pytest.mark.parametrize(("last", "points", "diverged"), [
    ({}, [math.nan], True),
    ({}, [3.0], False),
    ({"lm_loss": math.nan}, [], True),
    ({"grad_norm": math.inf}, [], True),
    ({"grad_norm": math.inf, "loss_scale": 1024.0}, [3.0], False),  # an ordinary overflow
])
def test_a_run_has_diverged_if_it_ended_in_what_is_not_finite(
        tmp_path: Path, last: dict[str, float], points: list[float], diverged: bool) -> None:
    records = [training(10), validation(10, 4.0), training(20, **last), *(validation(20, loss) for loss in points)]
    assert read_run(write(tmp_path / "m.jsonl", *records)).diverged is diverged


# Statistics


def test_mean_and_standard_error_over_seeds_are_those_of_a_hand_calculation(tmp_path: Path) -> None:
    files = [run_of(tmp_path / f"{seed}.jsonl", 4.0, loss) for seed, loss in enumerate((3.0, 3.1, 3.5))]
    row = comparison_of(*(f"dense={path}" for path in files)).summaries[0]
    assert row.loss is not None and row.perplexity is not None
    # Deviations from 3.2: -0.2, -0.1, 0.3; their squares sum to 0.14; / 2 / 3.
    assert row.loss.mean == pytest.approx(3.2)
    assert row.loss.standard_error == pytest.approx(math.sqrt(0.14 / 2 / 3))
    assert row.perplexity.mean == pytest.approx((math.exp(3.0) + math.exp(3.1) + math.exp(3.5)) / 3)
    assert (row.seeds, row.steps, row.difference) == (3, (20, 20), None)
    assert {name: found.mean for name, found in row.costs.items()} == pytest.approx(
        {"raw_tokens": 2000, "layer_tokens": 1000, "flops": 20_000, "hours": 0.2})


def test_differences_are_paired_by_the_seeds_that_are_named_whatever_their_order(tmp_path: Path) -> None:
    base = {1: 3.0, 2: 3.2, 3: 3.7}
    other = {3: 3.8, 1: 3.2, 2: 3.5}  # differences by seed 0.2, 0.3, 0.1
    arguments = [f"{name}@{seed}={run_of(tmp_path / f'{name}{seed}', loss)}"
                 for name, losses in (("dense", base), ("ltd", other)) for seed, loss in losses.items()]
    found = comparison_of(*arguments).summaries[1].difference
    assert found is not None and (found.method, found.count) == ("paired by seed", 3)
    assert found.mean == pytest.approx(0.2)
    assert found.standard_error == pytest.approx(0.1 / math.sqrt(3))


def test_seeds_are_read_beside_the_metrics(tmp_path: Path) -> None:
    for name, seeds in (("dense", (7, 8)), ("ltd", (8, 7))):
        for at, seed in enumerate(seeds):
            run_of(tmp_path / name / str(at) / "metrics.jsonl", 3.0 + seed + (0.5 if name == "ltd" else 0.0))
            settings = {"config": {"training": {"seed": seed}}}
            (tmp_path / name / str(at) / "run.json").write_text(json.dumps(settings))
    found = comparison_of(f"dense={tmp_path}/dense/*", f"ltd={tmp_path}/ltd/*").summaries[1].difference
    assert found is not None and found.method == "paired by seed"
    assert (found.mean, found.standard_error) == pytest.approx((0.5, 0.0))


def test_without_seeds_runs_are_paired_in_their_order_and_unequal_numbers_give_welch(tmp_path: Path) -> None:
    dense = [f"dense={run_of(tmp_path / f'd{at}', loss)}" for at, loss in enumerate((3.0, 3.4))]
    ltd = [f"ltd={run_of(tmp_path / f'l{at}', loss)}" for at, loss in enumerate((3.1, 3.7, 3.4))]
    found = comparison_of(*dense, *ltd[:2]).summaries[1].difference
    assert found is not None and found.method == "paired by order"
    assert (found.mean, found.standard_error) == pytest.approx((0.2, 0.1))  # 0.1 and 0.3
    found = comparison_of(*dense, *ltd).summaries[1].difference
    assert found is not None and found.method == "Welch"
    # Variances 0.08 of 2 and 0.09 of 3.
    assert (found.mean, found.standard_error) == pytest.approx((0.2, math.sqrt(0.08 / 2 + 0.09 / 3)))


def test_other_seeds_are_not_paired(tmp_path: Path) -> None:
    arguments = [f"{name}@{seed}={run_of(tmp_path / f'{name}{seed}', 3.0 + seed)}"
                 for name, seeds in (("a", (1, 2)), ("b", (1, 3))) for seed in seeds]
    found = comparison_of(*arguments).summaries[1].difference
    assert found is not None and found.method == "Welch"


def test_a_single_seed_has_no_error_and_the_table_says_so(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"a={run_of(tmp_path / 'a', 3.0)}", f"b={run_of(tmp_path / 'b', 2.5)}"]
    comparison = comparison_of(*arguments)
    row = comparison.summaries[1]
    assert row.loss is not None and row.loss.standard_error is None
    assert row.difference is not None
    assert (row.difference.mean, row.difference.standard_error) == (-0.5, None)
    assert compare_runs.main(["--output-dir", str(tmp_path / "out"), *arguments]) == 0
    assert "2.5000 (one seed: no error)" in capsys.readouterr().out


def test_compute_to_reach_the_baselines_final_loss_is_the_mean_of_the_seeds_that_reach_it(tmp_path: Path) -> None:
    dense = [run_of(tmp_path / f"d{at}", 5.0, loss) for at, loss in enumerate((3.9, 4.1))]  # mean 4
    fast = [run_of(tmp_path / "f0", 4.5, 3.5), run_of(tmp_path / "f1", 6.0, 3.0), run_of(tmp_path / "f2", 5.0, 4.2)]
    slow = run_of(tmp_path / "s", 6.0, 5.0)
    arguments = [*(f"dense={path}" for path in dense), *(f"fast={path}" for path in fast), f"slow={slow}"]
    comparison = comparison_of(*arguments)
    assert comparison.target == pytest.approx(4.0)
    _, row, missed = comparison.summaries
    # At steps 15 and 10 + 10 * 2 / 3; the third never.
    first, second = 15_000.0, 10_000.0 * (1 + 2 / 3)
    assert row.reached == 2
    assert row.reach["flops"].mean == pytest.approx((first + second) / 2)
    assert row.reach["flops"].standard_error == pytest.approx((second - first) / 2)
    assert row.reach_ratios["flops"] == pytest.approx((first + second) / 2 / 20_000)
    assert (missed.reached, missed.reach) == (0, {})


def test_diverged_runs_are_counted_and_in_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [run_of(tmp_path / f"g{at}", 4.0, loss) for at, loss in enumerate((3.0, 3.2))]
    bad = write(tmp_path / "bad", training(10), validation(10, 4.0), training(13, lm_loss=math.nan))
    lost = run_of(tmp_path / "lost", 4.0, math.nan)
    arguments = [*(f"dense={path}" for path in good), f"dense={bad}", f"hot={lost}"]
    dense, hot = comparison_of(*arguments).summaries
    assert dense.loss is not None and dense.loss.mean == pytest.approx(3.1)
    assert (dense.seeds, dense.diverged, hot.loss, hot.difference) == (3, 1, None, None)
    assert compare_runs.main(["--output-dir", str(tmp_path / "out"), *arguments]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\| dense +\| +3, 1 diverged \| +20 \| 3\.1000", text)
    assert re.search(r"\| hot +\| +1, 1 diverged \| +- \| +diverged", text)
    assert "dense: 1 of 3 runs diverged (seed 3)" in text
    values = json.loads((tmp_path / "out" / "table.json").read_text(), parse_constant=pytest.fail)
    assert values["arms"][1]["loss"] is None


def test_a_baseline_that_diverged_leaves_the_others_in_the_table(tmp_path: Path) -> None:
    lost, good = run_of(tmp_path / "lost", math.nan), run_of(tmp_path / "good", 3.0)
    assert compare_runs.main(["--output-dir", str(tmp_path / "out"), f"lost={lost}", f"good={good}"]) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "3.0000" in text and "nan" not in text


# Refusals


@pytest.mark.parametrize(("records", "message"), [
    ([training(10)], "has no validation record"),
    ([validation(10, 3.0)], "has no step record"),
    ([training(10), validation(11, 3.0)], "after its last step record, 10"),
    ([training(500), training(510), training(520), validation(520, 3.0)], "its start is missing"),
    ([training(10), training(20, consumed_tokens=5), validation(20, 3.0)], "raw tokens are 1000 at step 10 and 5"),
    ([training(10, consumed_layer_tokens=None), validation(10, 3.0)], r"m\.jsonl:1 .* needs consumed_layer_tokens"),
    ([training(10), {"step": 10, "validation_loss": "x"}], r"m\.jsonl:2 .* needs validation_loss"),
])
def test_a_file_that_cannot_be_compared_is_refused(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], records: list[dict[str, Any]], message: str) -> None:
    code, said = failure(capsys, tmp_path, f"a={write(tmp_path / 'm.jsonl', *records)}")
    assert code == 21 and re.search(message, said) and not (tmp_path / "out").exists()


def test_a_broken_line_is_named_and_one_that_has_no_end_is_left_out_and_said(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_of(tmp_path / "m.jsonl", 4.0, 3.0)
    whole = path.read_text()
    path.write_text(whole + '{"step": 30, "lm_l')
    assert compare_runs.main(["--output-dir", str(tmp_path / "out"), f"a={path}"]) == 0
    assert "is incomplete and was left out" in capsys.readouterr().out
    path.write_text(whole + "{oops\n")
    code, said = failure(capsys, tmp_path, f"a={path}")
    assert code == 21 and f"{path}:5 is not JSON" in said


def test_a_file_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pattern in ("none.jsonl", "none*.jsonl", ""):
        code, said = failure(capsys, tmp_path, f"a={tmp_path}/{pattern}")
        assert code == 21 and "there is no" in said


def test_a_run_that_would_be_counted_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_of(tmp_path / "m.jsonl", 3.0)
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(path.read_bytes())
    for again in (path, tmp_path / "." / ".." / tmp_path.name / "m.jsonl", copied):
        code, said = failure(capsys, tmp_path, f"a={path}", f"b={again}")
        assert code == 21 and "counted twice" in said


def test_runs_of_one_arm_must_have_one_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = run_of(tmp_path / "1", 4.0), run_of(tmp_path / "2", 4.0, 3.0)
    code, said = failure(capsys, tmp_path, f"a={short}", f"a={long}")
    assert code == 21 and "last validations at steps 10 and 20" in said
    assert "1000 and 2000 raw tokens" in said and "--allow-different-lengths" in said
    arguments = ["--allow-different-lengths", f"a={short}", f"a={long}"]
    assert compare_runs.main(["--output-dir", str(tmp_path / "out"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "10 to 20" in said and "its runs have different lengths" in said


def test_other_budgets_at_the_same_step_are_refused_but_what_a_draw_changes_is_not(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = run_of(tmp_path / "1", 3.0)
    drawn = write(tmp_path / "2", training(10, consumed_flops=10_050), validation(10, 3.1))
    other = write(tmp_path / "3", training(10, consumed_flops=12_000), validation(10, 3.1))
    assert failure(capsys, tmp_path, f"a={base}", f"a={drawn}")[0] == 0
    code, said = failure(capsys, tmp_path, f"a={base}", f"a={other}")
    assert code == 21 and "10000 and 12000 flops" in said


def test_arguments_that_mean_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run_of(tmp_path / "1.jsonl", 3.0), run_of(tmp_path / "2.jsonl", 4.0)
    for arguments, message in (
        ([str(one)], "must be NAME=FILE"),
        ([f"={one}"], "must be NAME=FILE"),
        ([f"a={one}", "--baseline", "b"], "--baseline = b must be one of the arms: a"),
        ([f"a@1={one}", f"a={two}"], "1 of 2 runs have a seed"),
        ([f"a@1={one}", f"a@1={two}"], "name a seed twice"),
        ([f"a@1={tmp_path}/?.jsonl"], "names one seed and 2 files"),
    ):
        code, said = failure(capsys, tmp_path, *arguments)
        assert code == 20 and message in said


# What is written


class Elements(HTMLParser):
    """What a page refers to, and the texts of its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def two_arms(folder: Path) -> list[str]:
    arguments = []
    for name, gain in (("dense", 0.0), ("<b>50% & less</b>", 0.1)):
        for seed in (1, 2):
            path = run_of(folder / f"{gain}-{seed}.jsonl", 5.0, 4.0 - gain + 0.01 * seed, 3.5 - gain)
            arguments.append(f"{name}@{seed}={path}")
    return arguments


def test_the_page_holds_everything_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compare_runs.main(["--output-dir", str(out), "--title", "T <i>", *two_arms(tmp_path)]) == 0
    names = {"loss_raw_tokens.png", "loss_layer_tokens.png", "loss_flops.png", "loss_hours.png", "final_loss_flops.png"}
    assert {path.name for path in out.iterdir()} == names | {"table.md", "table.json", "comparison.html"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names)
    text = (out / "comparison.html").read_text()
    found = Elements()
    found.feed(text)
    assert len(found.references) == 5
    assert all(reference.startswith("data:image/png;base64,") for reference in found.references)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    assert not {"b", "i", "script", "link"} & set(found.tags)
    for words in ("T <i>", "<b>50% & less</b>", "Only final losses are fair", "3.4000", "paired by seed, 2 pairs"):
        assert words in found.text


def test_tables_and_page_are_written_without_matplotlib(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert compare_runs.main(["--output-dir", str(tmp_path / "out"), *two_arms(tmp_path)]) == 0
    assert "pip install 'megatron_ltd[plot]'" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.md", "table.json", "comparison.html"}


def test_the_table_of_values_holds_the_unrounded_numbers_of_each_arm(tmp_path: Path) -> None:
    arguments = two_arms(tmp_path)
    assert compare_runs.main(["--output-dir", str(tmp_path / "out"), "--baseline", "dense", *arguments]) == 0
    values = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (values["baseline"], values["baseline_final_loss"]) == ("dense", 3.5)
    assert [row["name"] for row in values["arms"]] == ["dense", "<b>50% & less</b>"]
    assert values["arms"][1]["loss"] == {"mean": 3.4, "standard_error": 0.0, "count": 2}
    assert values["arms"][1]["difference"]["mean"] == pytest.approx(-0.1)


def test_a_mean_curve_has_the_validations_that_all_seeds_have(tmp_path: Path) -> None:
    one, two = run_of(tmp_path / "1", 5.0, 4.0, 3.0), run_of(tmp_path / "2", 6.0, 4.4)
    arm = read_arms([f"a={one}", f"a={two}"], True)[0]
    curve = figures.curve_of(arm, "raw_tokens")
    assert [x for x, _ in curve] == [1000, 2000]
    assert [y.mean for _, y in curve] == pytest.approx([5.5, 4.2])
    assert [y.standard_error for _, y in curve] == pytest.approx([0.5, 0.2])


@given(st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=12))
def test_names_in_the_margin_do_not_touch_and_stay_in_it(places: list[float]) -> None:
    wanted, gap = sorted(places), 1 / 12
    found = figures.spread(wanted, gap)
    assert all(after - before >= gap - 1e-9 for before, after in zip(found, found[1:], strict=False))
    assert found[0] >= -1e-9 and found[-1] <= 1 + 1e-9


def test_names_move_no_further_than_they_must() -> None:
    assert figures.spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert figures.spread([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert figures.spread([0.0, 0.0], 0.2) == pytest.approx([0.0, 0.2])


def test_pictures_show_all_ends_and_most_of_each_curve() -> None:
    low, high = figures.loss_limits([[9.0, 4.0, 3.5, 3.2, 3.0], [8.0, 5.0, 4.0, 3.6, 3.4]])
    assert low < 3.0 and 5.0 < high < 8.0
    low, high = figures.loss_limits([[3.0]])
    assert low < 3.0 < high


def test_ten_arms_have_ten_looks_that_differ_without_colour(tmp_path: Path) -> None:
    arms = read_arms([f"{at}={run_of(tmp_path / str(at), 3.0 + at)}" for at in range(10)], False)
    looks = figures.looks(arms, "0")
    assert len({(str(look.dash), look.marker) for look in looks}) == 10
    assert len({look.colour for look in looks}) == 10


@pytest.mark.parametrize(("name", "value", "text"), [
    ("flops", 3.146e14, "3.15e14"), ("raw_tokens", 12_000_000, "12.0M"), ("raw_tokens", 999_900, "1000k"),
    ("raw_tokens", 123_456, "123k"), ("layer_tokens", 0.0, "0.00"), ("hours", 0.5094, "0.509"),
    ("hours", 12.346, "12.35"),
])
def test_costs_are_told_with_three_digits_and_a_unit(name: str, value: float, text: str) -> None:
    assert cost_text(name, value) == text


def test_a_run_without_a_finite_point_has_no_curve(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", training(10, lm_loss=math.nan))
    curve = read_run(path)
    assert curve == RunCurve(path, (), 10, True, False, False)
