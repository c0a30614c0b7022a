"""Prompts and responses packed into samples: against samples written by hand, and what is refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ltd.data.finetuning.epochs import EpochDataset
from megatron_ltd.data.finetuning.packing import PackedDataset, best_fit
from megatron_ltd.data.finetuning.responses import ResponseForm, Responses, read_responses
from megatron_ltd.data.held_out import FilledDataset
from megatron_ltd.data.text.tokenizer import NullTokenizer
from megatron_ltd.errors import DataError

EOD = 99
FORM = ResponseForm("prompt", "response", longest=10)


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def read(*patterns: str, form: ResponseForm = FORM) -> Responses:
    return read_responses("--train-jsonl", patterns, NullTokenizer(EOD), form)


@pytest.fixture
def three(tmp_path: Path) -> Responses:
    return read(write(tmp_path / "a.jsonl", {"prompt": "1 2 3", "response": "4 5"},
                      {"prompt": "", "response": "6 7"}, {"prompt": "8", "response": "9", "more": 1}))


def test_packed_samples_are_those_written_by_hand(three: Responses) -> None:
    packed = PackedDataset(three, 10, EOD)
    # 5 tokens take part of the first, then 2 of each of the others.
    assert packed.packs == [[0, 1, 2]] and packed.fullness == 0.9
    sample = {name: values.tolist() for name, values in packed.sample(0).items()}
    assert sample == {
        "tokens": [1, 2, 3, 4, 5, 6, 7, 8, 9, EOD],
        "labels": [2, 3, 4, 5, EOD, 7, EOD, 9, EOD, EOD],
        "loss_mask": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 0, 1, 0],
        "document_ids": [0, 0, 0, 0, 0, 1, 1, 2, 2, 3],
    }


def test_what_does_not_fit_together_goes_into_another_sample_that_is_filled_up(three: Responses) -> None:
    packed = PackedDataset(three, 6, EOD)
    assert packed.packs == [[0], [1, 2]]
    sample = packed.sample(1)
    assert sample["tokens"].tolist() == [6, 7, 8, 9, EOD, EOD]
    assert sample["loss_mask"].tolist() == [1, 1, 1, 1, 0, 0]
    assert sample["document_ids"].tolist() == [0, 0, 1, 1, 2, 2]
    assert sample["labels"].tolist() == [7, EOD, 9, EOD, EOD, EOD]
    with pytest.raises(IndexError, match="sample 2 of 2"):
        packed.sample(2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_every_example_is_in_one_sample_and_none_is_too_long(lengths: list[int]) -> None:
    packs = best_fit(np.array(lengths), 20)
    assert sorted(example for pack in packs for example in pack) == list(range(len(lengths)))
    assert all(sum(lengths[example] for example in pack) <= 20 for pack in packs)
    # At most one pack is half empty: two of them would have been one.
    assert sum(sum(lengths[example] for example in pack) <= 10 for pack in packs) <= 1


def test_files_are_read_in_order_and_other_keys_on_demand(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", {"question": str(n), "answer": "7"}) for n, name in enumerate("ba")]
    form = ResponseForm("question", "answer", 10)
    assert read(*files, form=form).tokens.tolist() == [0, 7, EOD, 1, 7, EOD]
    assert read(str(tmp_path / "*.jsonl"), form=form).tokens.tolist() == [1, 7, EOD, 0, 7, EOD]


GOOD = {"prompt": "1", "response": "2"}
LONG = {"prompt": "1 2 3 4 5 6", "response": "1 2 3 4 5"}


@pytest.mark.parametrize(("lines", "fragments"), [
    ([GOOD, {"prompt": "1"}], ["bad.jsonl:2:", "no key 'response'", "--response-key"]),
    ([{"prompt": ["1"], "response": "2"}], ["bad.jsonl:1:0", "list under key 'prompt'", "--prompt-key"]),
    ([GOOD, "{"], ["bad.jsonl:2:", "no JSON object"]),
    ([GOOD, {"prompt": "1", "response": " "}], ["bad.jsonl:2: 'response' is empty", "remove this line"]),
    ([GOOD, LONG], ["1 lines do not fit into --seq-length = 10", "bad.jsonl:2: prompt and response take 6 + 5 tokens",
                    "--overlong-samples skip"]),
    ([LONG] * 7, ["7 lines do not fit", "bad.jsonl:5", "and 2 more"]),
    ([], ["bad.jsonl", "no line with a prompt and a response"]),
], ids=["missing-key", "not-a-string", "not-json", "empty-response", "too-long", "many-too-long", "empty"])
def test_lines_that_are_no_examples_are_refused_with_their_place(
    tmp_path: Path, lines: list[Any], fragments: list[str],
) -> None:
    path = write(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(DataError) as refusal:
        read(path)
    assert [part for part in fragments if part not in str(refusal.value)] == [], str(refusal.value)


def test_overlong_lines_are_left_out_and_counted_on_demand(tmp_path: Path) -> None:
    form = ResponseForm("prompt", "response", 10, skip_overlong=True)
    found = read(write(tmp_path / "a.jsonl", LONG, GOOD, LONG), form=form)
    assert (len(found), found.skipped, found.tokens.tolist()) == (1, 2, [1, 2, EOD])
    with pytest.raises(DataError, match="that fits into --seq-length = 10"):
        read(write(tmp_path / "b.jsonl", LONG), form=form)


def test_a_missing_file_and_plain_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--train-jsonl = .*nowhere.jsonl: no such file"):
        read(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="a.txt is plain text"):
        read(write(tmp_path / "a.txt", "1 2"))


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own() -> None:
    base = PackedDataset(read_many(), 2, EOD)
    size = len(base)
    stream = EpochDataset(base, 2 * size + 3, seed=5)
    seen = [tuple(stream.sample(index)["tokens"]) for index in range(len(stream))]
    once = Counter(tuple(base.sample(index)["tokens"]) for index in range(size))
    assert Counter(seen[:size]) == Counter(seen[size:2 * size]) == once
    assert seen[:size] != seen[size:2 * size]
    again = EpochDataset(base, 2 * size + 3, seed=5)
    assert [tuple(again.sample(index)["tokens"]) for index in reversed(range(len(again)))] == seen[::-1]
    assert EpochDataset(base, size, seed=6).digest != EpochDataset(base, size, seed=5).digest
    with pytest.raises(IndexError):
        stream.sample(len(stream))


def read_many() -> Responses:
    count = 30
    tokens = np.stack([np.arange(count), np.arange(count) + 30, np.full(count, EOD)], axis=1).flatten()
    return Responses(tokens, np.arange(count + 1) * 3, np.tile([False, True, True], count), 0, "many")


def test_a_held_out_set_is_filled_up_with_samples_that_count_for_nothing(three: Responses) -> None:
    base = PackedDataset(three, 6, EOD)
    filled = FilledDataset(base, 4)
    assert len(filled) == 4
    assert [int(filled.sample(index)["loss_mask"].sum()) for index in range(4)] == [3, 4, 0, 0]
    assert base.sample(0)["loss_mask"].sum() == 3
