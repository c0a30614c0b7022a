"""The campaign's referee: it sees a wrong curve, a line too many, and a stop without a reason."""

from collections import Counter
from typing import Any

import pytest

from tests.campaign.__main__ import table
from tests.campaign.episodes import check_curve
from tests.campaign.faults import FAULTS
from tests.campaign.play import Broken, demand
from tests.campaign.processes import Ended

CURVE: list[dict[str, Any]] = [{"step": 1, "lm_loss": 5.0}, {"step": 2, "lm_loss": 4.5},
                               {"step": 2, "validation_loss": 4.6}]


def changed(line: int, **values: Any) -> list[dict[str, Any]]:
    return [{**found, **values} if number == line else found for number, found in enumerate(CURVE)]


def test_rounding_is_no_fault() -> None:
    check_curve(changed(1, lm_loss=4.5 * (1 + 5e-6)), CURVE)


@pytest.mark.parametrize("found", [changed(1, lm_loss=4.5 * (1 + 2e-5)), changed(2, validation_loss=float("nan")),
                                   CURVE[:2], [*CURVE, CURVE[-1]], changed(0, step=0)])
def test_another_curve_breaks_the_law(found: list[dict[str, Any]]) -> None:
    with pytest.raises(Broken):
        check_curve(found, CURVE)


def test_what_the_processes_said_is_in_the_report() -> None:
    with pytest.raises(Broken, match=r"(?s)should have stopped.*rank 1: 70\nodd"):
        demand(False, "should have stopped", [Ended(0, ""), Ended(70, "odd")])


def test_every_fault_has_a_line_in_the_table() -> None:
    assert [line.split("|")[1].strip() for line in table(Counter()).splitlines()[2:]] == [*FAULTS, "all"]
