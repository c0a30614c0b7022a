"""What to answer to a flag that is not this project's: never silence, never a guess."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_ltd.settings.foreign.flags_without_effect import NO_EFFECT
from megatron_ltd.settings.foreign.other_megatron_flags import OTHER_FLAGS
from megatron_ltd.settings.foreign.unsupported_flags import FAMILIES, SATISFIED, UNSUPPORTED


@dataclass(frozen=True)
class Answer:
    """A sentence for the user, and whether the run can go on."""

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
    if len(words) == 1 and words[0] in SATISFIED.get(name, ()):
        return Answer(f"{given} has no effect here: it asks for what happens anyway", harmless=True)
    if name in UNSUPPORTED:
        return Answer(f"{given}: not supported: {UNSUPPORTED[name]}", harmless=False)
    for beginning, advice in FAMILIES.items():
        if name.startswith(beginning):
            return Answer(f"{given}: not supported: {advice}", harmless=False)
    if name in OTHER_FLAGS:
        return Answer(f"{given}: not supported: Megatron has this flag, this project does not; leave it out "
                      f"(nearest here: {nearest(name, known)})", harmless=False)
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, whatever dashes, underscores and capitals it is written with."""
    plain = {_plain(candidate): candidate for candidate in known}
    return plain[difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.0)[0]]


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("_", "-")
