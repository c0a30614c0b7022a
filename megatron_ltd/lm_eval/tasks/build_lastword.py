"""A last-word-prediction set in LAMBADA's form, built from held-out documents.

A passage is a run of whole sentences: a context of at least `min_words` words, then one sentence whose last
word is to be predicted. As in most LAMBADA passages the word has been said before, so that a model which uses
the whole context can know it. The passage ends with that word, without its full stop. Passages of a document
do not overlap, and which ones are kept is a function of their text and the seed, not of the order of files.
"""

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_ltd.errors import ConfigError

SENTENCE_END = re.compile(r"""[.!?]["'\u201d\u2019)\]]*(?=\s)|$""")
PROSE_END = re.compile(r"""[.!?,;:\u2014-]["'\u201d\u2019)\]]*$""")
"""What a heading, a table cell or a list entry does not end in: no passage runs across one."""
ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Gen|Col|Capt|Rev|Hon|No|vs|e\.g|i\.e|cf|etc)|\b[A-Z])\.$")
TARGET = re.compile(r"""([A-Za-z]+(?:['\u2019-][A-Za-z]+)*)[.!?,;:"'\u201d\u2019)\]]*$""")
WORD = re.compile(r"[A-Za-z]+(?:['\u2019-][A-Za-z]+)*")
FUNCTION_WORDS = frozenset(
    "about after again all also and any are because been before being both but can could did does done each even "
    "every few for from had has have her here hers him his how into its just less made make many may might more "
    "most much must nor not now off once one only onto other ought our ours out over own said same shall she "
    "should since some such than that the their theirs them then there these they this those though through thus "
    "too two under until upon use used very was well were what when where which while who whom whose why will "
    "with within without would yet you your yours".split()
)
MIN_TARGET_LETTERS = 3


@dataclass(frozen=True)
class LastWordOptions:
    """Shape of the passages, in words split at white space.

    Args:
        min_words: of the context before the last sentence.
        max_words: of the whole passage.
        count: passages to keep at most; None keeps all.
        seed: chooses which ones.
    """

    min_words: int = 50
    max_words: int = 120
    count: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 1 <= self.min_words < self.max_words:
            raise ConfigError(
                f"--min-words = {self.min_words} must be at least 1 and less than --max-words = {self.max_words}, "
                "which counts the last sentence too. Widen the range."
            )
        if self.count is not None and self.count < 1:
            raise ConfigError(f"--count = {self.count} must be at least 1. Leave it out to keep every passage.")


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence, without the white space around it.

    A sentence ends at a full stop, question or exclamation mark (with the quotes that close after it) before white
    space, or with its paragraph.
    """
    spans: list[tuple[int, int]] = []
    for paragraph in re.finditer(r"[^\n]+", text):
        line, start = paragraph.group(), 0
        for stop in SENTENCE_END.finditer(line):
            abbreviated = stop.group() == "." and ABBREVIATION.search(line, start, stop.end())
            sentence = line[start:stop.end()]
            if abbreviated or not sentence.strip():
                continue
            lead = len(sentence) - len(sentence.lstrip())
            end = start + len(sentence.rstrip())
            spans.append((paragraph.start() + start + lead, paragraph.start() + end))
            start = stop.end()
    return spans


def target_word(context: str, sentence: str) -> str | None:
    """The last word of the sentence as it stands, if it can be asked for: said before, and no function word."""
    last = sentence.rpartition(" ")[2]
    match = TARGET.fullmatch(last)
    if " " not in sentence or match is None:
        return None
    word = match.group(1)
    if len(word) < MIN_TARGET_LETTERS or word.lower() in FUNCTION_WORDS:
        return None
    said = {other.lower() for other in WORD.findall(context)}
    return word if word.lower() in said else None


def passages_of(document: str, options: LastWordOptions) -> Iterator[str]:
    """The passages of a document from its beginning to its end, none overlapping another."""
    spans = sentence_spans(document)
    words = [len(document[start:end].split()) for start, end in spans]
    first = 0
    while first < len(spans):
        passage, following = _passage_from(first, document, spans, words, options)
        if passage is not None:
            yield passage
        first = following


def _passage_from(
    first: int, document: str, spans: list[tuple[int, int]], words: list[int], options: LastWordOptions
) -> tuple[str | None, int]:
    """The shortest passage that begins with sentence `first`, if any, and the sentence to go on from."""
    context_words = 0
    for last in range(first, len(spans)):
        if context_words >= options.min_words:
            if context_words + words[last] > options.max_words:
                break
            begin, (start, end) = spans[first][0], spans[last]
            word = target_word(document[begin:start], document[start:end])
            if word is not None:
                before = document[begin:end].rpartition(" ")[0]
                return before + " " + word, last + 1
        if not PROSE_END.search(document[spans[last][0]:spans[last][1]]):
            return None, last + 1
        context_words += words[last]
    return None, first + 1


def build_lastword_set(documents: Iterable[str], options: LastWordOptions) -> list[str]:
    """Distinct passages of the documents in their order, `count` of them chosen by a hash of text and seed."""
    seen: dict[str, int] = {}
    for document in documents:
        for passage in passages_of(document, options):
            seen.setdefault(passage, len(seen))
    if options.count is None or len(seen) <= options.count:
        return list(seen)
    chosen = heapq.nsmallest(options.count, seen, key=lambda passage: _draw(options.seed, passage))
    return sorted(chosen, key=seen.__getitem__)


def _draw(seed: int, passage: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{passage}".encode()).digest()
