"""What ranks tell one another in JSON, and how differences are worded."""

import json
from typing import Any
from unittest import mock

import pytest

from megatron_ltd.parallel.agreement import disagreements, gather_json
from tests.gloo import run_ranks

VALUES: list[Any] = [None, {"größe": [1, 2.5, True], "text": "ü" * 5000}, []]


def own_value(rank: int, ranks: int) -> list[Any]:
    return gather_json(VALUES[rank])


def test_values_of_every_length_come_back_in_order_of_rank() -> None:
    assert run_ranks(own_value, 3) == [VALUES] * 3


def test_one_process_without_a_group_hears_itself() -> None:
    assert gather_json({"a": [1]}) == [{"a": [1]}]


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        gather_json(float("nan"))


def test_differences_name_the_key_the_values_and_the_ranks() -> None:
    values: list[dict[str, Any]] = [{"--seed": 1, "--lr": 0.1, "--bf16": True} for _ in range(8)]
    values[3] = values[3] | {"--seed": 2}
    del values[5]["--bf16"]
    assert disagreements(values) == [
        "--bf16: true on rank 0 and 6 others; null on rank 5", "--seed: 1 on rank 0 and 6 others; 2 on rank 3"]
    assert disagreements(values[2:4]) == ["--seed: 1 on rank 0; 2 on rank 1"]


def test_equal_values_are_no_difference() -> None:
    assert disagreements([{"a": [1, None], "b": {"c": 2}}] * 3) == []
    assert disagreements([{"a": 1}]) == []


def test_ranks_that_agree_are_not_compared_key_by_key() -> None:
    values = [{f"--flag-{number}": number for number in range(50)} for _ in range(100)]
    with mock.patch.object(json, "dumps", wraps=json.dumps) as looks:
        assert disagreements(values) == []
    assert looks.call_count == 100
