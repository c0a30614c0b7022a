"""Curves are read as a run wrote them, and become a picture."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.errors import DataError
from tools import plot_run


def training(step: int, loss: float = 3.0, kept: int = 128) -> dict[str, Any]:
    return {"step": step, "consumed_tokens": 100 * step, "consumed_layer_tokens": 50 * step, "lm_loss": loss,
            "kept_length": kept}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_step_repeated_after_a_restart_counts_once_with_its_last_record(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", training(1, 5.0), training(2, 4.0), training(3, 9.0), training(3, 3.5, 144))
    curves = plot_run.read_curves(path, "run")
    assert curves.loss.tolist() == [5.0, 4.0, 3.5]
    assert curves.consumed.tolist() == [50, 100, 150]
    assert curves.kept_tokens.tolist() == [128, 128, 144]


def test_a_validation_stands_at_the_layer_tokens_of_its_step_even_between_logged_steps(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.jsonl", training(10), {"step": 15, "validation_loss": 3.1, "validation_ppl": 22.2}, training(20),
        {"step": 20, "validation_loss": 3.0}, {"step": 5, "validation_loss": 4.0},
    )
    curves = plot_run.read_curves(path, "run")
    assert curves.validation_consumed.tolist() == [250, 750, 1000]
    assert curves.validation_loss.tolist() == [4.0, 3.1, 3.0]


def test_every_axis_counts_what_the_records_and_the_steps_between_them_consumed(tmp_path: Path) -> None:
    logged = {5: {"step_seconds": 2.0, "consumed_flops": 50.0, "model_flops": 10}, 15: {
        "step_seconds": 4.0, "consumed_flops": 90.0, "model_flops": 4}}
    path = write(tmp_path / "m.jsonl", *({**training(step), **numbers} for step, numbers in logged.items()),
                 {"step": 10, "validation_loss": 3.0})
    expected = {"step": (5, 15, 10), "tokens": (500, 1500, 1000), "layer-tokens": (250, 750, 500),
                "flops": (50, 90, 70), "hours": (10 / 3600, 50 / 3600, 30 / 3600)}
    assert set(expected) == set(plot_run.AXES)
    for axis, values in expected.items():
        curves = plot_run.read_curves(path, "run", axis)
        assert [*curves.consumed, *curves.validation_consumed] == pytest.approx(values)
    old = write(tmp_path / "old.jsonl", *({**training(step), "model_flops": 10} for step in (5, 15)))
    assert plot_run.read_curves(old, "run", "flops").consumed.tolist() == [50, 150]
    with pytest.raises(DataError, match="it needs step_seconds as a number"):
        plot_run.read_curves(old, "run", "hours")


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", training(1), training(2))
    path.write_text(path.read_text() + '{"step": 3, "lm_l')
    assert len(plot_run.read_curves(path, "run").loss) == 2


@pytest.mark.parametrize(
    "line", ["nonsense", "[1]", '{"lm_loss": 3}', '{"validation_loss": 3}', '{"step": "x", "validation_loss": 1}',
             '{"step": NaN, "validation_loss": 1}', '{"step": 2, "validation_loss": "low"}']
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "m.jsonl", training(1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"m\.jsonl:2 is no"):
        plot_run.read_curves(path, "run")


def test_smoothing_is_a_centred_mean_that_steps_over_what_is_not_a_number() -> None:
    smoothed = plot_run.smooth(np.array([1.0, 2.0, 6.0, math.nan, 4.0, 5.0]), 1)
    assert smoothed == pytest.approx([1.0, 3.0, 4.0, math.nan, 4.5, 5.0], nan_ok=True)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(0, 20))
def test_smoothing_leaves_straight_lines_alone_and_equals_plain_means(values: list[float], reach: int) -> None:
    line = np.arange(len(values), dtype=float)
    assert plot_run.smooth(line, reach) == pytest.approx(line)
    for at, smoothed in enumerate(plot_run.smooth(np.array(values), reach)):
        here = min(reach, at, len(values) - 1 - at)
        assert smoothed == pytest.approx(np.mean(values[at - here:at + here + 1]), abs=1e-9)


def picture_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_several_runs_become_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write(tmp_path / f"{name}.jsonl", *(training(step, 9 / (step + rate), 8 * step) for step in range(1, 120)),
              {"step": 100, "validation_loss": 1.0})
        for name, rate in (("dense", 1), ("ltd", 2))
    ]
    output = tmp_path / "runs.png"
    assert plot_run.main(["--metrics", *map(str, runs), "--output", str(output), "--title", "Two runs"]) == 0
    width, height = picture_size(output)
    assert width > 1000 and height > 700
    assert "2 runs" in capsys.readouterr().out


def test_a_run_of_one_step_and_a_run_that_diverged_can_be_drawn(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", training(1))
    diverged = write(tmp_path / "diverged.jsonl", training(1), training(2, math.nan), training(3, math.inf))
    for path in (one, diverged):
        output = tmp_path / f"{path.stem}.png"
        assert plot_run.main(["--metrics", str(path), "--output", str(output)]) == 0
        assert picture_size(output)[0] > 1000


def test_labels_are_the_files_names_or_with_their_folders_where_alike() -> None:
    labels = plot_run.labels_of
    assert labels([Path("a/dense.jsonl"), Path("b/ltd.jsonl")], None) == ["dense", "ltd"]
    assert labels([Path("a/metrics.jsonl"), Path("b/metrics.jsonl")], None) == ["a/metrics", "b/metrics"]
    assert labels([Path("a/metrics.jsonl")], None) == [""]
    assert labels([Path("a/metrics.jsonl")], ["mine"]) == ["mine"]


@pytest.mark.parametrize(
    ("metrics", "output", "more", "code", "message"),
    [
        ("none.jsonl", "run.png", [], 21, "none.jsonl cannot be read"),
        ("empty.jsonl", "run.png", [], 21, "has no training record"),
        ("good.jsonl", "run.jpeg", [], 20, "must be a .png"),
        ("good.jsonl", "none/run.png", [], 20, "existing folder"),
        ("good.jsonl", "run.png", ["--labels", "a", "b"], 20, "--labels has 2 names"),
    ],
)
def test_what_a_user_can_repair_is_one_message_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metrics: str, output: str, more: list[str], code: int,
    message: str,
) -> None:
    write(tmp_path / "good.jsonl", training(1))
    write(tmp_path / "empty.jsonl")
    flags = ["--metrics", str(tmp_path / metrics), "--output", str(tmp_path / output), *more]
    assert plot_run.main(flags) == code
    assert message in capsys.readouterr().err
