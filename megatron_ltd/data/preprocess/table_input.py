"""Reads tables as a stream of blocks: parquet files (extra [parquet]) and datasets of the Hugging Face library (extra
[datasets]). A row is a document, a column a key.

A dataset may be a folder or a stream from elsewhere, so the rows that were read are digested: a resumed run then knows
whether the rows it skips are the ones that were read before.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ltd.data.corpus.manifest import file_facts
from megatron_ltd.data.preprocess.text_input import BLOCK_BYTES, START, Block, Place, TextInput
from megatron_ltd.errors import ConfigError, DataError, UserError

_ROWS = 256
_SAVED = ("state.json", "dataset_dict.json")
_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}


class TableInput:
    """A table whose rows `_batches` gives, some at a time.

    Args:
        keys: the columns that are read.
        size_bytes: of the table; 0 for a stream.
        rows: how many there are; 0 for a stream.

    Attributes:
        read_bytes: the share of `size_bytes` that the rows read so far are.
    """

    def __init__(self, path: str, keys: Sequence[str], size_bytes: int, rows: int = 0):
        self.path, self._keys = path, list(keys)
        self.size_bytes, self._rows = size_bytes, rows
        self.read_bytes = 0

    @property
    def sha256(self) -> str:
        """Of what was read."""
        raise NotImplementedError

    def _batches(self) -> Iterator[dict[str, list[object]]]:
        raise NotImplementedError

    def _digest(self, columns: list[list[object]], begin: int, end: int) -> str:
        """SHA-256 of all rows up to `end`, where the input has no file to be known by."""
        return ""

    def blocks(self, start: Place = START) -> Iterator[Block]:
        """The rows in pieces of about 512 KiB of text.

        Args:
            start: the `end` of a block; the rows before it are read and left out.

        Raises:
            ConfigError, DataError: the table cannot be read, has no such column, or its rows before the start changed.
        """
        place, first = start, 1
        for batch in self._batches():
            columns = [list(batch[key]) for key in self._keys]
            count = len(columns[0])
            begin = min(max(start.line - first, 0), count)
            digest = self._digest(columns, 0, begin)
            if begin and first + begin == start.line and digest != start.digest:
                raise DataError(f"--resume: {self.path} has other rows before row {start.line} than the interrupted "
                                "run read. Run without --resume to start again.")
            while begin < count:
                end, size = begin, 0
                while end < count and size < BLOCK_BYTES:
                    size += sum(len(text) for text in (column[end] for column in columns) if isinstance(text, str))
                    end += 1
                after = Place(first + end, 0, self._digest(columns, begin, end))
                self.read_bytes = self.size_bytes * (after.line - 1) // max(self._rows, 1)
                part = tuple(tuple(column[begin:end]) for column in columns)
                yield Block(self.path, place.line, 0, b"", False, part, after, size)
                place, begin = after, end
            first += count
        if first < start.line:
            raise DataError(f"--resume: {self.path} has {first - 1} rows, fewer than the interrupted run had read. Run "
                            "without --resume to start again.")
        self.read_bytes = self.size_bytes

    def _require_keys(self, names: Iterable[str], error: type[UserError], source: str) -> None:
        for key in self._keys:
            if key not in names:
                raise error(f"{source}: no column {key!r} among {', '.join(map(repr, names))} (--json-keys).")


class ParquetInput(TableInput):
    """One parquet file."""

    def __init__(self, path: str, keys: Sequence[str]):
        super().__init__(path, keys, os.path.getsize(path))

    @property
    def sha256(self) -> str:
        return file_facts(self.path).sha256

    def _batches(self) -> Iterator[dict[str, list[object]]]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise DataError(f"{self.path} needs the package pyarrow. Install it: pip install pyarrow.") from error
        try:
            with parquet.ParquetFile(self.path) as table:
                self._require_keys(table.schema_arrow.names, DataError, self.path)
                self._rows = table.metadata.num_rows
                for batch in table.iter_batches(_ROWS, columns=self._keys):
                    yield dict(zip(batch.schema.names, map(_values, batch.columns), strict=True))
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path} cannot be read as parquet: {error}.") from error


def _values(column: Any) -> list[object]:
    """The values of a column; of a text that is not UTF-8 its bytes."""
    try:
        values: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object


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


class HfInput(TableInput):
    """One split of a dataset of the Hugging Face library.

    Raises:
        ConfigError: the library is missing, or there is no such split or column.
        DataError: the dataset cannot be loaded.
    """

    def __init__(self, source: HfSource, keys: Sequence[str]):
        data = _load(source)
        streaming = source.streaming
        super().__init__(str(source), keys, 0 if streaming else int(data.data.nbytes), 0 if streaming else len(data))
        if data.column_names is not None:
            self._require_keys(data.column_names, ConfigError, f"--hf-dataset = {source}")
            data = data.select_columns(self._keys)
        self._data = data
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _batches(self) -> Iterator[dict[str, list[object]]]:
        self._hash = hashlib.sha256()
        rows: Iterator[dict[str, list[object]]] = iter(self._data.iter(_ROWS))
        while True:
            try:
                batch = next(rows, None)
            except Exception as error:  # of the library, of a file system, of a server
                raise DataError(f"--hf-dataset = {self.path} cannot be read: {_first_line(error)}.") from error
            if batch is None:
                return
            self._require_keys(batch, ConfigError, f"--hf-dataset = {self.path}")
            yield batch

    def _digest(self, columns: list[list[object]], begin: int, end: int) -> str:
        for row in zip(*(column[begin:end] for column in columns), strict=True):
            self._hash.update(json.dumps(row, default=repr).encode() + b"\n")
        return self._hash.hexdigest()


def open_input(source: str | HfSource, keys: Sequence[str]) -> TextInput | TableInput:
    """A dataset, or a file of the kind that its name says."""
    if isinstance(source, HfSource):
        return HfInput(source, keys)
    return ParquetInput(source, keys) if source.endswith(".parquet") else TextInput(source)


def _load(source: HfSource) -> Any:
    """The rows of a dataset, a `datasets.Dataset` or `IterableDataset`."""
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
