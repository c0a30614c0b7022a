"""The measurements that the planner's predictions stand beside."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.plan_accuracy import times
from benchmarks.plan_accuracy.cases import CASES, FITTED, TIMED_CASES, Case
from benchmarks.plan_accuracy.critical_path import Note, communication_seconds, critical_seconds
from benchmarks.plan_accuracy.on_cpu import Rates, predicted
from benchmarks.plan_accuracy.processes import _process, _read
from benchmarks.plan_accuracy.times import Timed, compared, fitted_rates
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.memory import MemoryModel


def notes(*steps: tuple[str, str, bool, tuple[int, ...], float]) -> list[Note]:
    return [Note(kind, (key,), receives, members, seconds) for kind, key, receives, members, seconds in steps]


def test_the_critical_path_waits_for_messages_and_for_the_last_member() -> None:
    both = (0, 1)
    # The first works 3 s, sends, works 1 s and reduces in 0.5 s; the second receives in 0.25 s, works 4 s and reduces.
    first = notes(("begin", "", False, (), 10), ("start", "m", False, (1,), 13), ("start", "r", True, both, 14),
                  ("finish", "r", True, both, 14.5), ("end", "", False, (), 14.5))
    second = notes(("begin", "", False, (), 0), ("start", "m", True, (0,), 0), ("finish", "m", True, (0,), 0.25),
                   ("start", "r", True, both, 4.25), ("finish", "r", True, both, 5), ("end", "", False, (), 6))
    assert critical_seconds([first, second]) == pytest.approx(3 + 0.25 + 4 + 0.75 + 1)
    assert communication_seconds(first) == pytest.approx(0.5)
    assert communication_seconds(second) == pytest.approx(0.25 + 0.75)


def test_the_constants_of_a_machine_are_found_from_the_two_layouts_and_rank_the_others() -> None:
    machine = Rates(0.08, 1.5, 2e-3)
    measured = {case.name: Timed(predicted(case, machine).seconds, 0.0, predicted(case, machine).data)
                for case in TIMED_CASES}
    found = fitted_rates({name: measured[name] for name in FITTED})
    assert found == pytest.approx(machine, rel=0.1)
    text = compared(measured)
    pairs = len(TIMED_CASES) * (len(TIMED_CASES) - 1) // 2
    assert f"of {pairs} pairs" in text and "(100%)" in text and "ranked wrongly" not in text
    swapped = measured | {FITTED[0]: measured[FITTED[0]]._replace(seconds=0.9 * times.TIE)}
    assert "ranked wrongly" in compared(swapped)


def test_a_process_needs_the_memory_that_is_predicted(tmp_path: Path) -> None:
    """One case of the table, so that the benchmark keeps running."""
    case: Case = next(case for case in CASES if case.name == "GPT, one microbatch")
    threads = torch.get_num_threads()
    _process(0, case, str(tmp_path), 2, True)
    torch.set_num_threads(threads)
    found = _read(tmp_path / "0.json")
    model = MemoryModel(case.config, Layout.of(case.config, 1), "cpu")
    assert found.live_bytes == pytest.approx(model.peak(0, policies(case.config).plan(0)).total, rel=0.1)
    assert json.loads((tmp_path / "0.json").read_text())[2][0][-1][0] == "end"
