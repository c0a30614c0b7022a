"""Reads datasets of the Hugging Face library (extra [datasets]) as a stream of blocks; a row is a document.

What was read is digested row by row, so that a resumed run knows whether what it skips is what was read before, be it
a folder or a stream from elsewhere.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ltd.data.preprocess.text_input import START, Block, Place
from megatron_ltd.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets

_ROWS = 256
_BLOCK_BYTES = 1 << 19
_SAVED = ("state.json", "dataset_dict.json")
_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class HfSource:
    """A dataset as the flags name it.

    Attributes:
        name: a folder that `save_to_disk` wrote, a folder or a file of data, or a name on the hub.
        split: a split, or what `load_dataset` takes for one, such as train[:10%].
        streaming: read it without a copy on this machine.
    """

    name: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False

    def __str__(self) -> str:
        return f"{self.name}{f'/{self.config}' if self.config else ''}[{self.split}]"


class HfInput:
    """One split of a dataset.

    Args:
        keys: the columns that are read.

    Attributes:
        size_bytes: of its tables; 0 for a stream.
        read_bytes: the share of that which the rows read so far are.

    Raises:
        ConfigError: the library is missing, or there is no such split or column.
        DataError: the dataset cannot be loaded.
    """

    def __init__(self, source: HfSource, keys: Sequence[str]):
        self.path, self._keys = str(source), list(keys)
        self.read_bytes = 0
        self._hash = hashlib.sha256()
        data = load(source)
        names = data.column_names
        if names is not None:
            for key in self._keys:
                if key not in names:
                    raise ConfigError(f"--hf-dataset = {source}: no column {key!r} among "
                                      f"{', '.join(map(repr, names))} (--json-keys).")
            data = data.select_columns(self._keys)
        self._data, self._rows = data, 0 if source.streaming else len(data)
        self.size_bytes = 0 if source.streaming else int(data.data.nbytes)

    @property
    def sha256(self) -> str:
        """Of the rows read so far."""
        return self._hash.hexdigest()

    def blocks(self, start: Place = START) -> Iterator[Block]:
        """The rows in pieces of about 512 KiB of text.

        Args:
            start: the `end` of a block; the rows before it are read and left out.

        Raises:
            DataError: the dataset cannot be read, or the rows before the start are others than they were.
        """
        self._hash = hashlib.sha256()
        place, first = start, 1
        for columns in self._batches():
            count = len(columns[0])
            begin = min(max(start.line - first, 0), count)
            self._digest(columns, 0, begin)
            if begin and first + begin == start.line and self.sha256 != start.digest:
                raise DataError(f"--resume: {self.path} has other rows before row {start.line} than the interrupted "
                                "run read. Run without --resume to start again.")
            while begin < count:
                end, size = begin, 0
                while end < count and size < _BLOCK_BYTES:
                    size += sum(len(text) for text in (column[end] for column in columns) if isinstance(text, str))
                    end += 1
                self._digest(columns, begin, end)
                after = Place(first + end, 0, self.sha256)
                self.read_bytes = self.size_bytes * (after.line - 1) // max(self._rows, 1)
                part = tuple(tuple(column[begin:end]) for column in columns)
                yield Block(self.path, place.line, 0, b"", False, part, after, size)
                place, begin = after, end
            first += count
        if first < start.line:
            raise DataError(f"--resume: {self.path} has {first - 1} rows, fewer than the interrupted run had read. Run "
                            "without --resume to start again.")
        self.read_bytes = self.size_bytes

    def _batches(self) -> Iterator[list[list[object]]]:
        rows: Iterator[dict[str, list[object]]] = iter(self._data.iter(_ROWS))
        while True:
            try:
                batch = next(rows, None)
            except Exception as error:  # of the library, of a file system, of a server
                raise DataError(f"--hf-dataset = {self.path} cannot be read: {_first_line(error)}.") from error
            if batch is None:
                return
            for key in self._keys:
                if key not in batch:
                    raise ConfigError(f"--hf-dataset = {self.path}: no column {key!r} among "
                                      f"{', '.join(map(repr, batch))} (--json-keys).")
            yield [list(batch[key]) for key in self._keys]

    def _digest(self, columns: Iterable[list[object]], begin: int, end: int) -> None:
        for row in zip(*(column[begin:end] for column in columns), strict=True):
            self._hash.update(json.dumps(row, default=repr).encode() + b"\n")


def load(source: HfSource) -> "datasets.Dataset | datasets.IterableDataset":
    """The rows of a dataset.

    Raises:
        ConfigError, DataError: as `HfInput`.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("--hf-dataset needs the package datasets. Install it: pip install -e "
                          "'.[datasets]'.") from error
    name, saved = source.name, any(os.path.isfile(os.path.join(source.name, file)) for file in _SAVED)
    if saved and source.config is not None:
        raise ConfigError(f"--hf-config = {source.config}: {name} was written by save_to_disk and has none; leave it "
                          "out.")
    try:
        if saved:
            found: Any = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                if source.split not in found:
                    raise ConfigError(f"--hf-split = {source.split}: {name} holds {', '.join(map(str, found))}.")
                found = found[source.split]
            return found.to_iterable_dataset() if source.streaming else found
        arguments: dict[str, Any] = {"path": name, "name": source.config}
        kind = _KINDS.get(os.path.splitext(name)[1])
        if kind is not None and os.path.isfile(name):
            arguments = {"path": kind, "data_files": {"train": name}}
        return datasets.load_dataset(**arguments, split=source.split, streaming=source.streaming)
    except ConfigError:
        raise
    except Exception as error:  # of the library, of a file system, of a server
        raise DataError(f"--hf-dataset = {source} cannot be loaded: {_first_line(error)}. Give a folder that "
                        "save_to_disk wrote, a folder or file of data, or a name on the hub; --hf-config names a "
                        "configuration, --hf-split a split.") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(". ")
