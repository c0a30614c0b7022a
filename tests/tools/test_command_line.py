"""One convention for all tools: what a tool reads and writes are flags, and its help is its docstring."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tools import evaluate_zeroshot

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NAMES = sorted(path.stem for path in TOOLS.glob("*.py") if '__name__ == "__main__"' in path.read_text())
WRITE_NOTHING = {"generate", "generate_flag_docs", "compare_results"}
"""Tools that print, or write one page of this repository."""


class Parsed(Exception):  # noqa: N818 - no error: it carries the parser out of the tool
    """The parser of a tool, at the moment at which it would parse."""


def parser_of(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    def caught(parser: argparse.ArgumentParser, *_: Sequence[str]) -> None:
        raise Parsed(parser)

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, caught)
    with pytest.raises(Parsed) as found:
        tool.main([])
    parser = found.value.args[0]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


@pytest.mark.parametrize("name", NAMES)
def test_a_tool_has_flags_for_what_it_reads_and_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = importlib.import_module(f"tools.{name}")
    parser = parser_of(tool, monkeypatch)
    assert tool.__doc__ is not None and parser.description == tool.__doc__.split("\n\n")[0]
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert all(action.option_strings and action.option_strings[0].startswith("-") for action in shown)
    assert not [action.option_strings for action in shown if not action.help], "a flag without a word of help"
    assert ("--output" in parser._option_string_actions) == (name not in WRITE_NOTHING)


@pytest.mark.parametrize(("name", "older"), [
    ("compare_runs", "--output-dir"), ("preprocess_data", "--output-prefix"), ("merge_datasets", "--output-prefix"),
    ("inspect_dataset", "--histogram"), ("inspect_token_drop", "--plot"), ("import_megatron_checkpoint", "--save"),
])
def test_the_name_that_the_output_had_before_still_works(
    name: str, older: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = parser_of(importlib.import_module(f"tools.{name}"), monkeypatch)._option_string_actions
    assert flags[older] is flags["--output"]


@pytest.mark.parametrize("name", NAMES)
def test_a_list_that_is_given_in_parts_is_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        parser = parser_of(importlib.import_module(f"tools.{name}"), patched)
    for action in parser._actions:
        action.required = False
    for action in (action for action in parser._actions if action.nargs == "+" and action.option_strings):
        flag = action.option_strings[0]
        found = parser.parse_known_args([flag, "1", "2", flag, "3"])[0]
        assert list(map(str, getattr(found, action.dest))) == ["1", "2", "3"], flag


def test_tasks_that_are_named_one_by_one_are_all_scored() -> None:
    assert evaluate_zeroshot.parse_args(["--load", "a", "--tasks", "copa", "--tasks", "rte,piqa"]).tasks == \
        "copa,rte,piqa"
