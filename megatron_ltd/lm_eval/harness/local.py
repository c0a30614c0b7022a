"""The data of the harness's tasks from local files, of which only those that are needed have to be there."""

import hashlib
import importlib
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.tasks.task_files import sha256_of

SUFFIXES = {".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json", ".json": "json", ".parquet": "parquet"}
"""Of local files, and who reads them; of two files for one split the first counts."""


class LocalSplits(dict[str, Any]):
    """The splits of a task that are on disk, read when they are asked for, as the harness's data set.

    For a split that is not there, or cannot be read, one example of another stands in: the harness looks at splits that
    it does not use. `must_have` finds out whether one that it does use is there.

    Args:
        folder: holds SPLIT.jsonl and the like; None for no local files.
    """

    def __init__(self, folder: Path | None):
        super().__init__()
        self.folder = Path("hub") if folder is None else folder
        found = [] if folder is None else sorted(folder.glob("*.*"))
        self.paths: dict[str, Path] = {}
        for suffix in SUFFIXES:
            for path in found:
                split = path.name.removesuffix(suffix)
                if path.name.endswith(suffix) and "." not in split and split:
                    self.paths.setdefault(split, path)
        self.problems: dict[str, Exception] = {}
        self.stood_in: set[str] = set()

    @cached_property
    def sha256(self) -> str:
        """Of the digests of the files, in order of name."""
        parts = [f"{split} {sha256_of(path)}" for split, path in sorted(self.paths.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __missing__(self, split: str) -> Any:
        docs = self._read(split)
        if docs is None:
            self.stood_in.add(split)
            others = (self._read(other) for other in self.paths)
            docs = next((other.select([0]) for other in others if other is not None), None)
        if docs is None:
            self.must_have(next(iter(self.problems)))
        self[split] = docs
        return docs

    def must_have(self, split: str) -> None:
        """Check that a split was read.

        Raises:
            DataError: it is not there, or cannot be read.
        """
        if split not in self.paths:
            raise DataError(f"the split {split!r} is needed and is not there: looked for {self.looked_for(split)}. "
                            f"{self.folder} holds {', '.join(path.name for path in self.paths.values())}.")
        if split in self.problems:
            error = self.problems[split]
            raise DataError(f"{self.paths[split]} cannot be read: {error.__cause__ or error}"[:500]
                            ) from self.problems[split]

    def looked_for(self, split: str = "SPLIT") -> str:
        """Where a split is looked for."""
        first, *others = SUFFIXES
        return f"{self.folder / split}{first} (or {', '.join(others)})"

    def absent(self) -> str:
        """What to say of splits that were asked for and could not be read."""
        return "".join(f" {self.paths[split]}: {self.problems[split].__cause__ or self.problems[split]}"[:300]
                       if split in self.problems else f" The split {split!r} is not there." for split in self.stood_in)

    def _read(self, split: str) -> Any:
        path = self.paths.get(split)
        if path is None or split in self.problems:
            return None
        kind = next(kind for suffix, kind in SUFFIXES.items() if path.name.endswith(suffix))
        try:
            docs = importlib.import_module("datasets").load_dataset(kind, data_files=str(path), split="train")
            if not len(docs):
                raise DataError(f"{path} has no examples")
        except Exception as error:  # the library raises whatever its readers raise
            self.problems[split] = error
            return None
        return docs


def needed_splits(task: Any, num_fewshot: int | None) -> list[str]:
    """The splits that an evaluation draws examples from: the one that is scored, and the one of solved examples."""
    config = task.config
    scored = config.test_split if task.has_test_docs() else config.validation_split
    own = config.num_fewshot
    shots = own if num_fewshot is None or own == 0 else num_fewshot
    needed = [scored]
    if shots and config.fewshot_config.samples is None:
        needed.append(config.fewshot_config.split or config.training_split or config.validation_split
                      or config.test_split)
    return [split for split in needed if split is not None]


def check_answers(task: Any, limit: int | None) -> list[str]:
    """Check that the right answers of a multiple-choice task are among its choices; says how many are not.

    The harness counts an example as wrong whose answer is a label that it does not know, such as a text where it
    expects a number, or -1 where the answer is kept secret.

    Raises:
        DataError: no example has an answer that can be right.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or getattr(task, "multiple_input", 0):
        return []
    bad, count, seen = 0, 0, ""
    for doc in islice(task.eval_docs, limit):
        gold, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
        golds = gold if isinstance(gold, list) else [gold]
        known = [0 <= one < len(choices) if isinstance(one, int) else one in choices for one in golds]
        if not any(known):
            bad, seen = bad + 1, seen or f"{gold!r}, where the choices are {choices!r}"
        count += 1
    if bad == count:
        raise DataError(f"{task.task_name}: no example has a right answer among its choices; the first has {seen}"[:400]
                        + ". The harness expects the number of the choice, from 0, or its text: write the labels as in "
                        "the data set that it would download.")
    return [f"{task.task_name}: {bad} of {count} examples have no right answer among their choices (the first {seen}) "
            "and count as wrong"] if bad else []
