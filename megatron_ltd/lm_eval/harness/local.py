"""The data of the harness's tasks from local files, of which only those that are needed have to be there."""

import hashlib
import importlib
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.tasks.records import Record
from megatron_ltd.lm_eval.tasks.task_files import plain_suffix, read_records, sha256_of

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
"""Of local files, all but .parquet also packed; of two files for one split the first of these counts."""
OTHER_NAMES = {"validation": ("valid", "val", "dev")}
TABLES = {".parquet": ("pyarrow.parquet", "read_table"), ".csv": ("pyarrow.csv", "read_csv")}
"""Who reads what is not JSON."""
LAST_WORD = re.compile(r"[-_ ]")
SHARD = re.compile(r"-\d+-of-\d+$")
"""As the hub numbers the files of a split: validation-00000-of-00002.parquet."""


class LocalSplits(dict[str, Any]):
    """The splits of a task that are on disk, read when they are asked for, as the harness's data set.

    For a split that is not there, or cannot be read, one example of another stands in: the harness looks at splits that
    it does not use. `must_have` finds out whether one that it does use is there.

    A file whose name ends in that of a split, such as `swag_val.jsonl`, stands for the split if it is the only one.

    Args:
        folder: holds SPLIT.jsonl and the like, or has them in a folder `data`; or a file that stands for every split.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.is_file = folder, folder.is_file()
        found = [folder] if self.is_file else sorted([*folder.glob("*.*"), *folder.glob("data/*.*")])
        self.files: dict[str, list[Path]] = {}
        for suffix in SUFFIXES:
            of_suffix: dict[str, list[Path]] = {}
            for path in found:
                split = SHARD.sub("", path.name.partition(".")[0])
                if plain_suffix(path) == suffix and path.name.count(".") <= 2 and split and path.is_file():
                    of_suffix.setdefault(split, []).append(path)
            self.files = of_suffix | self.files
        self.problems: dict[str, Exception] = {}
        self.stood_in: set[str] = set()

    @cached_property
    def sha256(self) -> str:
        """Of the digests of the files, in order of name."""
        parts = [f"{split} {sha256_of(path)}" for split, paths in sorted(self.files.items()) for path in paths]
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()

    def __missing__(self, split: str) -> Any:
        docs = self._read(split)
        if docs is None:
            self.stood_in.add(split)
            others = (self._read(other) for other in self.files)
            docs = next((other.select([0]) for other in others if other is not None), None)
        if docs is None:
            self.must_have(next(iter(self.problems)))
        self[split] = docs
        return docs

    def must_have(self, split: str, purpose: str = "") -> None:
        """Check that a split was read.

        Raises:
            DataError: it is not there, or cannot be read.
        """
        if split in self.problems:
            raise DataError(self._why(split)) from self.problems[split]
        if not self._paths(split):
            held = ", ".join(path.name for paths in self.files.values() for path in paths)
            raise DataError(f"the split {split!r} is needed{purpose} and is not there: looked for "
                            f"{self.looked_for(split)}. {self.folder} holds {held}.")

    def looked_for(self, split: str = "SPLIT") -> str:
        """Where a split is looked for."""
        first, *others = SUFFIXES
        return f"{self.folder / split}{first} (or {', '.join(others)})"

    def absent(self) -> str:
        """What to say of splits that were asked for and could not be read, and of the columns of those that were."""
        missing = [f" {self._why(split)}" if split in self.problems else f" The split {split!r} is not there."
                   for split in sorted(self.stood_in)]
        read = [f" {self.names(split)} has the columns {', '.join(docs.column_names)}."[:300]
                for split, docs in self.items() if split not in self.stood_in]
        return "".join([*missing, *read])

    def _paths(self, split: str) -> list[Path]:
        names = (split, *OTHER_NAMES.get(split, ()))
        if self.is_file:
            return [self.folder]
        exact = next((self.files[name] for name in names if name in self.files), None)
        alike = [paths for name, paths in self.files.items() if LAST_WORD.split(name.lower())[-1] in names]
        return exact or (alike[0] if len(alike) == 1 else [])

    def names(self, split: str) -> str:
        """The files of a split."""
        return ", ".join(map(str, self._paths(split)))

    def told(self, split: str) -> list[str]:
        """What is to be told of where a split was found."""
        paths = self._paths(split)
        known = self.is_file or split in self.files or not paths
        return [] if known else [f"{paths[0].name} was read as the split {split!r}"]

    def _why(self, split: str) -> str:
        error = self.problems[split]
        if isinstance(error, DataError):
            return str(error)
        return f"{self._paths(split)[0]} cannot be read: {error.__cause__ or error}"[:500]

    def _read(self, split: str) -> Any:
        paths = self._paths(split)
        if not paths or split in self.problems:
            return None
        try:
            docs = importlib.import_module("datasets").concatenate_datasets([_docs(path) for path in paths])
            if not len(docs):
                raise DataError(f"{paths[0]} has no examples. Get it again.")
        except Exception as error:  # the libraries raise whatever their readers raise
            self.problems[split] = error
            return None
        return docs


def _docs(path: Path) -> Any:
    """The examples of a file as a data set."""
    datasets = importlib.import_module("datasets")
    if plain_suffix(path) in TABLES:
        module, reader = TABLES[plain_suffix(path)]
        table = getattr(importlib.import_module(module), reader)(path)
        no_text = [field.name for field in table.schema if str(field.type) in ("binary", "large_binary")]
        if no_text:
            raise DataError(f"{path}: {', '.join(no_text)} is not UTF-8 text. Convert it to UTF-8.")
        return datasets.Dataset(datasets.table.InMemoryTable(table))
    records = read_records(path)
    names = dict.fromkeys(name for record in records for name in record.values)
    try:
        return datasets.Dataset.from_dict({name: [record.values.get(name) for record in records] for name in names})
    except Exception:  # the library raises whatever its parts raise
        for name in names:
            _check_alike(name, [record for record in records if record.has(name)])
        raise


def _check_alike(name: str, records: list[Record]) -> None:
    """Check that a column has one type, as it must in a table.

    Raises:
        DataError: it has two.
    """
    first, *others = records
    for record in others:
        one, other = (type(each.values[name]) for each in (first, record))
        if one is not other and {one, other} != {int, float}:
            raise record.error(f"{name} = {record.values[name]!r} is of type {other.__name__}, and of type "
                               f"{one.__name__} in {first.place}; a column has one type")


def scored_split(task: Any) -> Any:
    """The split that an evaluation scores; None where a task is a class that does not say."""
    return task.config.test_split if task.has_test_docs() else task.config.validation_split


def needed_splits(task: Any, num_fewshot: int | None) -> dict[str, str]:
    """The splits that an evaluation draws examples from: the one that is scored, and the one of solved examples, with
    what it is needed for."""
    config, scored = task.config, scored_split(task)
    own = config.num_fewshot
    shots = own if num_fewshot is None or own == 0 else num_fewshot
    needed = {}
    if shots and config.fewshot_config.samples is None:
        solved = (config.fewshot_config.split or config.training_split or config.validation_split
                  or config.test_split)
        needed = {solved: " for solved examples (none with --num-fewshot 0)"}
    return {split: purpose for split, purpose in {**needed, scored: ""}.items() if split is not None}
