"""Calls behind the caller keep their order, and what they raise reaches the caller."""

import sys
import threading
from pathlib import Path

import pytest

from megatron_ltd.data.preprocess import behind as module
from megatron_ltd.data.preprocess.behind import Behind
from megatron_ltd.data.preprocess.text_input import TextInput
from megatron_ltd.errors import DataError


def test_calls_are_made_in_order_and_few_of_them_wait() -> None:
    gate, made = threading.Event(), list[int]()
    with Behind() as behind:
        behind.call(gate.wait)
        for number in range(module._MOST_WAITING - 1):
            behind.call(made.append, number)
        assert made == []
        threading.Timer(0.05, gate.set).start()
        for number in range(module._MOST_WAITING - 1, 30):
            behind.call(made.append, number)  # the caller waits here until there is room
        behind.wait()
        assert made == list(range(30))


def test_an_error_reaches_the_caller_at_the_latest_at_the_end() -> None:
    made = list[int]()
    with pytest.raises(ZeroDivisionError), Behind() as behind:
        behind.call(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError), Behind() as behind:
        behind.call(lambda: 1 // 0)
        for number in range(30):
            behind.call(made.append, number)
    assert len(made) < 30
    with pytest.raises(KeyError), Behind() as behind:  # an error of the caller is the one that counts
        behind.call(lambda: 1 // 0)
        raise KeyError


def test_without_zstandard_only_zst_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for name in ("a.jsonl", "b.jsonl.zst"):
        (tmp_path / name).write_bytes(b'{"text": "1"}\n')
    assert [block.data for block in TextInput(str(tmp_path / "a.jsonl")).blocks()] == [b'{"text": "1"}\n']
    with pytest.raises(DataError, match=r"b\.jsonl\.zst needs the package zstandard"):
        list(TextInput(str(tmp_path / "b.jsonl.zst")).blocks())
