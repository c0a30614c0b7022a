"""Answers to unknown flags; those for Megatron-LM's and Megatron-DeepSpeed's are in `foreign_flags.toml`."""

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_ltd.settings.flag_reference import all_flags

ANSWERS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
"""The tables of the file: answer -> flags that get it."""


def _table(name: str) -> dict[str, str]:
    """The answer to each flag of a table of the file."""
    return {flag: answer for answer, flags in ANSWERS[name].items() for flag in flags}


TRANSLATED = _table("translated")
"""A flag with its value -> the flag here with its value."""
RENAMED = _table("renamed")
"""A flag -> the flag here that takes its values, after flags that it needs."""
NO_EFFECT = _table("without_effect")
"""Flag, or a pattern of flags -> why it changes nothing."""
UNSUPPORTED = _table("unsupported")
"""Flag, or a pattern of flags with a star at its end -> what to do instead."""
SATISFIED: list[str] = ANSWERS["satisfied"]
"""Unsupported flags with a value that asks for the behaviour of this project."""
VALUES = _table("values")
"""A flag of this project with a value that it has elsewhere -> what to do instead."""
MEGATRON_LIST = Path(__file__).with_name("megatron_flags.txt")
"""The names of Megatron-LM's flags, by `tools/upkeep/megatron_flags.py`."""
OTHER_FLAGS = frozenset("--" + name for name in (
    *ANSWERS["other"].split(), *MEGATRON_LIST.read_text(encoding="utf-8").split("\n", 1)[1].split())
    ) - {name for flag in all_flags() for name in (flag.name, flag.off_name)}
"""Flags of others; most have an answer of their own."""


@dataclass(frozen=True)
class Answer:
    """A sentence for the user, and whether the run can continue."""

    text: str
    harmless: bool


def foreign_answer(name: str, words: Sequence[str]) -> Answer | None:
    """The answer to a flag of Megatron-LM or Megatron-DeepSpeed; None for a name they do not have either.

    Args:
        name: with its dashes.
        words: the values that follow it.
    """
    given = " ".join((name, *words))
    if name in NO_EFFECT:
        return Answer(f"{given} has no effect here: {NO_EFFECT[name]}", harmless=True)
    if given in SATISFIED:
        return Answer(f"{given} has no effect here: it asks for what happens anyway", harmless=True)
    advice = UNSUPPORTED.get(name) or _of_pattern(name, UNSUPPORTED)
    if advice is None and (reason := _of_pattern(name, NO_EFFECT)) is not None:
        return Answer(f"{given} has no effect here: {reason}", harmless=True)
    if advice is None and name in OTHER_FLAGS:
        advice = "Megatron has this flag, this project does not; leave it out"
    return Answer(f"{given}: not supported: {advice}", harmless=False) if advice is not None else None


def is_known(name: str) -> bool:
    """Whether a flag has an answer."""
    return has_own_answer(name) or foreign_answer(name, ()) is not None


def has_own_answer(name: str) -> bool:
    """Whether a flag is known by its name, not only by a pattern."""
    return name in RENAMED or name in NO_EFFECT or name in UNSUPPORTED or name in OTHER_FLAGS \
        or any(words.split()[0] == name for words in (*TRANSLATED, *SATISFIED, *VALUES))


def _of_pattern(name: str, table: dict[str, str]) -> str | None:
    return next((answer for pattern, answer in table.items() if fnmatchcase(name, pattern)), None)


def nearest(name: str, known: Iterable[str], alike: float = 0.0) -> str | None:
    """The known name that is most like `name`, whatever dashes, underscores and capitals it is written with.

    Args:
        alike: from 0 to 1; None is returned if no name is that much like it.
    """
    plain = {_plain(candidate): candidate for candidate in known}
    found = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=alike)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("_", "-")
