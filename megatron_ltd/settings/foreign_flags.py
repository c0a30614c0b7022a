"""Answers to unknown flags; those for Megatron-LM's and Megatron-DeepSpeed's are in `foreign_flags.toml`."""

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ANSWERS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
"""The tables of the file: answer -> flags that get it."""


def _table(name: str) -> dict[str, str]:
    """The answer to each flag of a table of the file."""
    return {flag: answer for answer, flags in ANSWERS[name].items() for flag in flags}


TRANSLATED = _table("translated")
"""A flag with its value -> the flag here with its value."""
NO_EFFECT = _table("without_effect")
"""Flag -> why it changes nothing."""
UNSUPPORTED = _table("unsupported")
"""Flag, or a pattern of flags with a star at its end -> what to do instead."""
SATISFIED: list[str] = ANSWERS["satisfied"]
"""Unsupported flags with a value that asks for the behaviour of this project."""
VALUES = _table("values")
"""A flag of this project with a value that it has elsewhere -> what to do instead."""
OTHER_FLAGS = frozenset("--" + name for name in ANSWERS["other"].split())
"""Flags without an answer of their own."""


@dataclass(frozen=True)
class Answer:
    """A sentence for the user, and whether the run can continue."""

    text: str
    harmless: bool


def foreign_answer(name: str, words: Sequence[str], known: Iterable[str]) -> Answer | None:
    """The answer to a flag of Megatron-LM or Megatron-DeepSpeed; None for a name they do not have either.

    Args:
        name: with its dashes.
        words: the values that follow it.
        known: this project's flags.
    """
    given = " ".join((name, *words))
    if name in NO_EFFECT:
        return Answer(f"{given} has no effect here: {NO_EFFECT[name]}", harmless=True)
    if given in SATISFIED:
        return Answer(f"{given} has no effect here: it asks for what happens anyway", harmless=True)
    of_family = (advice for pattern, advice in UNSUPPORTED.items() if fnmatchcase(name, pattern))
    advice = UNSUPPORTED.get(name) or next(of_family, None)
    if advice is None and name in OTHER_FLAGS:
        advice = ("Megatron has this flag, this project does not; leave it out "
                  f"(nearest here: {nearest(name, known)})")
    return Answer(f"{given}: not supported: {advice}", harmless=False) if advice is not None else None


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, whatever dashes, underscores and capitals it is written with."""
    plain = {_plain(candidate): candidate for candidate in known}
    return plain[difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.0)[0]]


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("_", "-")
