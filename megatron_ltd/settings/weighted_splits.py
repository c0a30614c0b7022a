"""BigScience's weighted splits as the paths of this project.

    --train-weighted-split-paths "TRAIN: 0.3 0:0.9 en, 0.7 0:0.9 fr"   ->   --train-data-path 0.3 en@0:0.9 0.7 fr@0:0.9

`-paths-path` names a file with such a line. Validation and test may have several sets, which become one, each with the
same share of it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

FLAG = re.compile(r"--(train|valid|test)-weighted-split-paths(-path)?")
_WRITE = 'write "NAME: WEIGHT BEGIN:END PREFIX, WEIGHT BEGIN:END PREFIX"'


def weighted_split(name: str, words: list[str]) -> list[str] | None:
    """The flag and the values that such a flag stands for; None for another flag.

    Raises:
        ValueError: the values, or the file, are not of this form.
    """
    found = FLAG.fullmatch(name.replace("_", "-"))
    if found is None:
        return None
    text, given = " ".join(words), f"{name} = {' '.join(words)}"
    if found[2]:
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{given}: cannot be read ({error}); give the path of a text file") from None
    sets = list(_sets(text, given))
    values = [value for corpora in sets for weight, part in corpora
              for value in (str(weight / sum(other for other, _ in corpora)) if len(sets) > 1 else str(weight), part)]
    return [f"--{found[1]}-data-path", *values]


def _sets(text: str, given: str) -> Iterator[list[tuple[float, str]]]:
    """The weight of each part of a corpus, set by set."""
    words = re.split(r"[\s,\"']+", text.strip(" \t\r\n,\"'"))
    corpora: list[tuple[float, str]] = []
    while words:
        if words[0].endswith(":"):
            if corpora:
                yield corpora
            corpora, words = [], words[1:]
        triple, words = words[:3], words[3:]
        try:
            weight, part, prefix = triple
            corpora.append((float(weight), f"{prefix}@{part}"))
        except ValueError:
            raise ValueError(f"{given}: {' '.join(triple)!r} is no WEIGHT BEGIN:END PREFIX; {_WRITE}") from None
    yield corpora
