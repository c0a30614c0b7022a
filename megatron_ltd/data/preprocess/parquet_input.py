"""Reads parquet input (extra [parquet]) as a stream of blocks; a row is a document, a column a key."""

import os
from collections.abc import Iterator, Sequence

from megatron_ltd.data.corpus.manifest import file_facts
from megatron_ltd.data.preprocess.text_input import START, Block, Place, TextInput
from megatron_ltd.errors import DataError

_ROWS = 256
_BLOCK_BYTES = 1 << 19


class ParquetInput:
    """One parquet file.

    Args:
        keys: the columns that are read.

    Attributes:
        size_bytes: size on disk.
        read_bytes: the share of that which the rows read so far are.
    """

    def __init__(self, path: str, keys: Sequence[str]):
        self.path, self._keys = path, list(keys)
        self.size_bytes = os.path.getsize(path)
        self.read_bytes = 0

    @property
    def sha256(self) -> str:
        return file_facts(self.path).sha256

    def blocks(self, start: Place = START) -> Iterator[Block]:
        """The rows in pieces of about 512 KiB of text.

        Args:
            start: whose line is the number of the first row to give, from 1.

        Raises:
            DataError: pyarrow is missing, the file is damaged, or it has no such column.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise DataError(f"{self.path} needs the package pyarrow. Install it: pip install pyarrow.") from error
        try:
            with parquet.ParquetFile(self.path) as table:
                names, rows = table.schema_arrow.names, table.metadata.num_rows
                for key in self._keys:
                    if key not in names:
                        raise DataError(f"{self.path}: no column {key!r} among {', '.join(map(repr, names))} "
                                        "(--json-keys).")
                yield from self._blocks((batch.to_pydict() for batch in table.iter_batches(_ROWS, columns=self._keys)),
                                        start, rows)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path} cannot be read as parquet: {error}.") from error

    def _blocks(self, batches: Iterator[dict[str, list[object]]], start: Place, rows: int) -> Iterator[Block]:
        place, seen = start, 0
        for batch in batches:
            first = seen + 1
            columns = [batch[key] for key in self._keys]
            seen += len(columns[0])
            while place.line <= seen:
                begin = place.line - first
                end, size = begin, 0
                while end < len(columns[0]) and size < _BLOCK_BYTES:
                    size += sum(len(text) for text in (column[end] for column in columns) if isinstance(text, str))
                    end += 1
                after = Place(first + end)
                self.read_bytes = self.size_bytes * (after.line - 1) // max(rows, 1)
                part = tuple(tuple(column[begin:end]) for column in columns)
                yield Block(self.path, place.line, 0, b"", False, part, after, size)
                place = after
        self.read_bytes = self.size_bytes


def open_input(path: str, keys: Sequence[str]) -> TextInput | ParquetInput:
    """A file of input, as its name says."""
    return ParquetInput(path, keys) if path.endswith(".parquet") else TextInput(path)
