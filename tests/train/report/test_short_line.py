"""What people see on a terminal, and that files keep Megatron's line."""

import io
import math
import sys
from dataclasses import replace
from typing import Any, Literal

import pytest

from megatron_ltd.config.files import LoggingConfig
from megatron_ltd.log import Console, duration_text
from megatron_ltd.train.report.log_writers import Metrics
from megatron_ltd.train.report.short_line import COLUMNS, ShortLog, bar, count_text, short_line
from tests.train.report.test_metrics import REPORT


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **settings: Any) -> str:
    """What a logged step prints to this standard output."""
    monkeypatch.setattr(sys, "stdout", stream)
    Metrics(LoggingConfig(**settings), {}, Console(), 0).step(REPORT)
    return stream.getvalue()


def test_the_parts_of_the_short_line() -> None:
    assert short_line(REPORT, 200.0) == ("100/500 | loss 6.1235 | lr 1.50e-04 | kept 256/1024 | saved 25.0% | "
                                         "16.4k tokens/s | 3 min 20 s left")


@pytest.mark.parametrize(("change", "said"), [
    ({"skipped": True, "loss_scale": 1024.0}, "STEP SKIPPED, loss scale 1024"), ({"loss": math.nan}, "loss nan"),
    ({"gradient_norm": math.inf}, "GRADIENT NORM inf"), ({"sentence_order_loss": 0.5}, "order 0.500"),
])
def test_what_is_not_normal_is_said(change: dict[str, Any], said: str) -> None:
    assert said in short_line(replace(REPORT, **change), 1.0) and said not in short_line(REPORT, 1.0)


def test_the_line_fits_whatever_happens() -> None:
    worst = replace(REPORT, total_steps=10**9, loss=1e30, skipped=True, loss_scale=2.0**32, sentence_order_loss=1e9)
    assert len(short_line(worst, 1e9)) <= COLUMNS
    assert len(bar(10**9 - 1, 10**9, 1e9)) <= COLUMNS


@pytest.mark.parametrize(("log_format", "terminal", "short"), [
    ("auto", True, True), ("auto", False, False), ("short", False, True), ("megatron", True, False),
])
def test_files_get_megatrons_line_unless_the_short_one_is_wanted(
    monkeypatch: pytest.MonkeyPatch, log_format: Literal["auto", "short", "megatron"], terminal: bool, short: bool,
) -> None:
    text = printed(monkeypatch, Terminal() if terminal else io.StringIO(), log_format=log_format)
    assert ("consumed samples:" in text) == (not short)
    assert (text.lstrip("\r\x1b[K").rstrip("\n") == short_line(REPORT, 0.0)) == short
    if not terminal and not short:
        assert text[22:] == f"{REPORT.line()}\n"[22:]  # but for the time of day


def test_the_bar_is_wiped_before_the_next_line_and_never_written_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", "200")
        log = ShortLog(Console())
        log.count(5, 20, 2.0)
        Console().line("saved")
        shown = bar(5, 20, 30.0)
        assert stream.getvalue() == (f"\r\x1b[K{shown}\r\x1b[Ksaved\n" if stream.isatty() else "saved\n")
    assert shown == "[#######.......................] 25% | step 5/20 | 30 s left"


def test_the_pace_forgets_the_first_step_and_follows_the_others() -> None:
    log = ShortLog(Console(False))
    for seconds in (100.0, 1.0, 1.0):
        log.count(1, 20, seconds)
    assert log.seconds_left(10, 20) == pytest.approx(10.0)
    log.count(4, 20, 2.0)
    assert log.seconds_left(10, 20) == pytest.approx(11.0)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (125.0, "2 min 5 s"), (8000.0, "2 h 13 min"),
                                               (273_600.0, "3 d 4 h")])
def test_times(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0.0, "0"), (999.4, "999"), (1234.0, "1.23k"), (2.5e6, "2.5M"),
                                             (3e11, "300G"), (7e15, "7e+03T")])
def test_counts(count: float, text: str) -> None:
    assert count_text(count) == text
