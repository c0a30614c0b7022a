"""Cuts text into sentences: by rules that ship with the project, or by nltk's trained punkt if its data is installed.

Both give the span of each sentence without the white space around it. The rules look at every sentence-ending mark that
white space follows (ideographic ones need none) and ask what stands before and after it; an empty line always ends a
sentence. What is known of abbreviations is English; in another language only the rules that need no word list apply:
initials, single letters, ellipses, numbers, and the case of the next letter.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ltd.errors import ConfigError, DataError

Span = tuple[int, int]
SPLITTERS = ("auto", "rules", "punkt")

_CLOSERS = "\"'”’»›)\\]}*_"
_OPENERS = "\"'“‘„«‹([{*_¿¡—–-"
_MARKS = ".!?…‼⁇⁈⁉؟۔।॥։።"
_END = re.compile(  # no part of it can be tried again from the middle of a run: time stays linear in the text
    rf"(?<![{_MARKS}])(?P<mark>[{_MARKS}]++)[{_CLOSERS}]*+(?P<space>\s++)"
    rf"|(?P<ideographic>[。！？｡]++[{_CLOSERS}」』）】]*+)\s*+"
    r"|\n[^\S\n]*+\n\s*+")
_WORD_BEFORE = re.compile(r"[^\s\"“”‘’'«»()\[\]{}—–/]*\Z")
_WORD_BEFORE_CHARACTERS = 40
_DOTTED = re.compile(r"(?:\w\.)+\w")
_NUMBERING_CHARACTERS = 16
_NUMBERING = re.compile(r"\W*(?:\d{1,3}(?:\.\d{1,3})*|[ivxlcIVXLC]{1,5}|[a-zA-Z])")
_FIRST_WORD = re.compile(r"\w++(?!\.)")

MID_SENTENCE = frozenset("""mr mrs ms messrs mme mlle dr drs prof rev hon st ste mt gen col lt maj capt cmdr cpl sgt
    adm brig gov sen rep pres supt fr br insp det atty pvt ens amb asst assoc viz vs cf e.g i.e eg ie ca eds incl
    approx""".split())
"""Abbreviations after which a sentence continues, whatever follows; without the last period."""

BEFORE_NUMBERS = frozenset("""no nos nr p pp vol vols fig figs eq eqs ch chap sec secs art par op ver ed c tel ext jan
    feb mar apr jun jul aug sep sept oct nov dec""".split())
"""Abbreviations after which a sentence continues with a number."""

OPEN_ENDED = frozenset("al etc inc ltd co corp bros jr sr esq dept univ ph.d misc resp est".split())
"""Abbreviations that may end a sentence, as may all of single letters such as U.S. and a.m.: they do when a word
follows that seldom stands in the middle of one."""

STARTERS = frozenset("""The This That These Those It Its He She They We You There Here In On At As If When While After
    Before But And Or So Yet For From By With However Although Because Since Then Thus Now What Why How Who Where Some
    Many Most Several Both Each Another Such His Her Their Our My I A An To Once During Among Under
    According""".split())
"""Words that, in upper case after an abbreviation, show that a sentence begins."""


class RuleSplitter:
    """The rules of the module's docstring.

    Args:
        language: with `english` (in any case) abbreviations are known.
    """

    name = "rules"

    def __init__(self, language: str = "english"):
        self._english = language.lower() == "english"

    def spans(self, text: str) -> list[Span]:
        """Begin and end of each sentence, in ascending order, without overlap."""
        return list(self._spans(text))

    def _spans(self, text: str) -> Iterator[Span]:
        start = len(text) - len(text.lstrip())
        for match in _END.finditer(text):
            if match.end() <= start or match.end() == len(text):
                continue
            if match["mark"]:
                if match["space"].count("\n") < 2 and not self._ends(text, start, match):
                    continue
                end = match.start("space")
            elif match["ideographic"]:
                end = match.end("ideographic")
            else:
                end = start + len(text[start:match.start()].rstrip())
            if end > start:
                yield start, end
            start = match.end()
        end = len(text.rstrip())
        if end > start:
            yield start, end

    def _ends(self, text: str, start: int, match: re.Match[str]) -> bool:
        """Whether a mark ends the sentence that began at `start`."""
        first = match.end()
        while first < len(text) and text[first] in _OPENERS:
            first += 1
        bracketed = "(" in text[match.end():first]
        following = text[first:first + 1]
        if not following or (following.islower() and not bracketed) or following in ".,;:!?…)]}":
            return False
        if match["mark"] != "." or match.end("mark") < match.start("space"):  # closed by a quote or bracket
            return True
        if match.start() - start < _NUMBERING_CHARACTERS and _NUMBERING.fullmatch(text[start:match.start()].strip()):
            return False  # "1. Introduction"
        before = _WORD_BEFORE.search(text, max(start, match.start() - _WORD_BEFORE_CHARACTERS), match.start())
        word = _FIRST_WORD.match(text, first)
        return self._period_ends(before[0] if before else "", following, word[0] if word else "")

    def _period_ends(self, before: str, following: str, word: str) -> bool:
        """Whether a single period ends a sentence, by the words around it; `following` is the next character."""
        initials = len(before) == 1 and before.isupper() or _DOTTED.fullmatch(before) is not None
        if not self._english:
            return not initials
        plain = before.lower()
        if plain in MID_SENTENCE or plain in BEFORE_NUMBERS and following.isdigit():
            return False
        return word in STARTERS if initials or plain in OPEN_ENDED else True


class PunktSplitter:
    """nltk's punkt (Kiss and Strunk 2006), as Megatron-LM uses it.

    Raises:
        DataError: nltk or its data for the language is not installed.
    """

    name = "punkt"

    def __init__(self, language: str = "english"):
        try:
            from nltk.tokenize.punkt import PunktTokenizer
        except ImportError as error:
            raise DataError("--sentence-splitter punkt needs the package nltk. Install it (pip install nltk), or use "
                            "--sentence-splitter rules.") from error
        try:
            tokenizer: Any = PunktTokenizer(language.lower())
        except (LookupError, OSError) as error:
            raise DataError(f"--sentence-splitter punkt: nltk has no data punkt_tab for --lang {language}. Fetch it "
                            "(python -m nltk.downloader punkt_tab, then NLTK_DATA names its folder), or use "
                            "--sentence-splitter rules.") from error
        self._spans_of: Callable[[str], Iterator[Span]] = tokenizer.span_tokenize

    def spans(self, text: str) -> list[Span]:
        return list(self._spans_of(text))


SentenceSplitter = RuleSplitter | PunktSplitter


def build_splitter(name: str, language: str) -> SentenceSplitter:
    """The splitter of --sentence-splitter; `auto` is punkt where it is installed, else the rules.

    Raises:
        DataError: punkt is requested and not installed.
    """
    if name == "rules":
        return RuleSplitter(language)
    if name == "punkt":
        return PunktSplitter(language)
    if name != "auto":
        raise ConfigError(f"--sentence-splitter = {name}: choose one of {', '.join(SPLITTERS)}.")
    try:
        return PunktSplitter(language)
    except DataError:
        return RuleSplitter(language)


@dataclass(frozen=True)
class SentencePlan:
    """How texts become sentences.

    Attributes:
        splitter: one of `SPLITTERS`.
        keep_newlines: each sentence keeps the white space that follows it, so that together they are the text from its
            first sentence on; otherwise white space between sentences is left out.
    """

    splitter: str = "auto"
    language: str = "english"
    keep_newlines: bool = False

    def build(self) -> SentenceSplitter:
        return build_splitter(self.splitter, self.language)

    def cut(self, text: str, splitter: SentenceSplitter) -> list[str]:
        """The sentences of a text."""
        spans = splitter.spans(text)
        if self.keep_newlines and spans:
            starts = [start for start, _ in spans]
            return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
        return [text[start:end] for start, end in spans]
