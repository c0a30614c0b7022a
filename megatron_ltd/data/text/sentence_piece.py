"""SentencePiece models as tokenizers."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from megatron_ltd.data.text.special_tokens import declared_beginning, end_of_document
from megatron_ltd.data.text.tokenizer_identity import readable
from megatron_ltd.errors import DataError


class SentencePieceTokenizer:
    """A SentencePiece .model; its end-of-sentence token ends documents, unless `eod_token` names another.

    Args:
        control_symbols: the name of a control symbol in a text, such as `<s>`, is that symbol, and what follows it is a
            text of its own; otherwise the name is letters.

    Attributes:
        control: ids of the tokens that no text gives, such as `</s>`, by name.
    """

    def __init__(self, path: str, eod_token: str | None = None, control_symbols: bool = False):
        self.files: tuple[str, ...] = (readable(path, "--tokenizer-model"),)
        self._engine = sentencepiece.SentencePieceProcessor()
        try:
            self._engine.LoadFromSerializedProto(Path(path).read_bytes())
        except RuntimeError as error:
            raise DataError(f"{path} is no SentencePiece model: {error}.") from error
        self.vocab_size = self._engine.vocab_size()
        bos, eos, pad = (token if token >= 0 else None for token in (
            self._engine.bos_id(), self._engine.eos_id(), self._engine.pad_id()))
        self._eod, self.remark = eos, None
        if eod_token is not None or eos is None:
            self._eod, self.remark = end_of_document(self, Path(path).parent, eod_token)
        self.bos, self.adds_bos = bos, bos is not None and declared_beginning(Path(path).parent)[1] is True
        self.pad = pad
        self.control = {self._engine.id_to_piece(token): token for token in range(self.vocab_size)
                        if self._engine.is_control(token)}
        self._names = self._control_symbols()
        self._symbols = self._names if control_symbols else None
        kind = b"SentencePiece" if self._symbols is None else b"SentencePiece with control symbols"
        self.digest = hashlib.sha256(kind + Path(path).read_bytes()).hexdigest()

    def _control_symbols(self) -> re.Pattern[str] | None:
        """Finds the names of control symbols, of which the longest counts."""
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    @property
    def eod(self) -> int:
        if self._eod is None:
            raise DataError(f"{self.files[0]}: the SentencePiece model has no end-of-sentence token, which ends "
                            "documents. Name the token that does: --eod-token TOKEN.")
        return self._eod

    def token_to_id(self, token: str) -> int | None:
        found: int = self._engine.piece_to_id(token)
        return found if self.id_to_token(found) == token else None

    def id_to_token(self, id: int) -> str | None:
        return str(self._engine.id_to_piece(id)) if id < self.vocab_size else None

    def encode(self, text: str) -> list[int]:
        if self._symbols is None:
            ids: list[int] = self._engine.encode(text)
            return ids
        return self.encode_with_symbols(text)

    def encode_with_symbols(self, text: str) -> list[int]:
        """The ids of a text in which the name of a control symbol is that symbol, whatever `control_symbols` says."""
        parts = [text] if self._names is None else self._names.split(text)  # every second one is a symbol
        return [token for place, part in enumerate(parts) if part
                for token in ([self._engine.piece_to_id(part)] if place % 2 else self._engine.encode(part))]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._symbols is not None:
            return [self.encode(text) for text in texts]
        ids: list[list[int]] = self._engine.encode(texts, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._engine.decode(list(ids))
        return text
