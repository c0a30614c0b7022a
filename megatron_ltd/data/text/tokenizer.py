"""Text to token ids and back, for the kinds of tokenizer that a corpus can be written with.

The names of special tokens inside a text are treated as the tokenizer's own library does by default: GPT-2 and Hugging
Face tokenizers read `<|endoftext|>` in a document as that token (as `transformers` does with the same files),
SentencePiece reads `</s>` as ordinary characters, unless --tokenizer-control-symbols is given, BERT's WordPiece reads
`[MASK]` as that token. No tokenizer adds a token of its own to what it encodes: a beginning-of-text token is added
where --bos-token asks for it, an end-of-document token by `tools/preprocess_data.py --append-eod`.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.sentence_piece import SentencePieceTokenizer
from megatron_ltd.data.text.special_tokens import EOD_TOKENS, declared_beginning, end_of_document
from megatron_ltd.data.text.tiktoken import read_ranks, tiktoken_engine
from megatron_ltd.data.text.tokenizer_identity import library_digest, readable
from megatron_ltd.data.text.wordpiece import (
    CLS,
    MASK,
    PAD,
    SEP,
    UNK,
    continuations,
    is_masked_wordpiece,
    read_vocabulary,
    wordpiece_engine,
)
from megatron_ltd.errors import ConfigError, DataError, flag_name

PAD_TOKENS = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        eod: id of the end-of-document token; DataError if there is none.
        bos: id of the token that the tokenizer's files declare as the beginning of texts, if they do.
        adds_bos: whether they say to add it to every text.
        pad: id of the padding token, if there is one.
        digest: SHA-256 of all that decides the ids, whatever flags and files it was given by.
        files: what it was read from.
        remark: what to tell a user who needs `eod`, where it is one of several.
    """

    vocab_size: int
    bos: int | None
    adds_bos: bool
    pad: int | None
    digest: str
    files: tuple[str, ...]
    remark: str | None

    @property
    def eod(self) -> int: ...

    def token_to_id(self, token: str) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@runtime_checkable
class MaskedTokenizer(Tokenizer, Protocol):
    """A tokenizer with which BERT can be pretrained; [SEP] is its end-of-document token.

    Attributes:
        cls, sep, mask, unk: ids of these special tokens; `pad` is one too.
        continues_word: [vocab_size], True for the pieces ("##ing") that belong to the word of the token before them.
    """

    cls: int
    sep: int
    mask: int
    unk: int
    continues_word: NDArray[np.bool_]


def build_tokenizer(config: DataConfig, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of --tokenizer-type.

    Args:
        vocab_size: --vocab-size: how many ids a NullTokenizer has besides end of document. With the other kinds it is
            the model's vocabulary, which must hold the tokenizer's.

    Raises:
        ConfigError: settings are missing or contradict each other.
        DataError: a file is missing or is no tokenizer of this kind.
    """
    kind = config.tokenizer_type

    def given(field: str) -> str:
        value: str | None = getattr(config, field)
        if value is None:
            raise ConfigError(f"{flag_name(field)} is not given; --tokenizer-type {kind} needs it.")
        return value

    if kind == "NullTokenizer":
        if vocab_size is None or vocab_size < 1:
            raise ConfigError(f"--vocab-size = {vocab_size}: NullTokenizer needs the number of token ids, such as "
                              "50257.")
        if vocab_size > np.iinfo(np.int32).max:
            raise ConfigError(f"--vocab-size = {vocab_size}: a corpus holds token ids in 32 bits; choose at most "
                              f"{np.iinfo(np.int32).max}.")
        return NullTokenizer(vocab_size)
    tokenizer: Tokenizer
    if kind == "GPT2BPETokenizer":
        tokenizer = gpt2_bpe_tokenizer(given("vocab_file"), given("merge_file"), config.eod_token)
    elif kind == "SentencePieceTokenizer":
        tokenizer = SentencePieceTokenizer(given("tokenizer_model"), config.eod_token, config.tokenizer_control_symbols)
    elif kind in ("BertWordPieceLowerCase", "BertWordPieceCase"):
        path = readable(given("vocab_file"), "--vocab-file")
        tokenizer = MaskedEngine(wordpiece_engine(read_vocabulary(path), kind == "BertWordPieceLowerCase"), (path,))
    elif kind == "HuggingFaceTokenizer":
        tokenizer = hugging_face_tokenizer(given("tokenizer_model"), config.eod_token)
    else:
        raise ConfigError(f"--tokenizer-type = {kind}: choose one of GPT2BPETokenizer, SentencePieceTokenizer, "
                          "HuggingFaceTokenizer, BertWordPieceLowerCase, BertWordPieceCase, NullTokenizer (with "
                          "--mock-data: NullTokenizer and --vocab-size).")
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"--vocab-size = {vocab_size} is less than the {tokenizer.vocab_size} ids of the tokenizer "
                          f"in {', '.join(tokenizer.files)}. Leave the flag out, or raise it.")
    return tokenizer


def tokenizer_of_model(config: DataConfig, vocab_size: int | None, *, grows: bool = False) -> Tokenizer:
    """The tokenizer of a trained model.

    Args:
        vocab_size: the model's; with a NullTokenizer it counts the end of document, which --vocab-size does not.
        grows: the model will be given rows for tokens that it does not have.

    Raises:
        as `build_tokenizer`, and ConfigError: the tokenizer has more tokens than the model.
    """
    if config.tokenizer_type == "NullTokenizer":
        return build_tokenizer(config, None if vocab_size is None else vocab_size - 1)
    tokenizer = build_tokenizer(config, None)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size and not grows:
        raise ConfigError(f"the tokenizer in {', '.join(tokenizer.files)} has {tokenizer.vocab_size} ids, and the "
                          f"model rows for {vocab_size}. Name the model's own tokenizer, or train the model with "
                          "--finetune --resize-vocabulary, which gives it rows for the others.")
    return tokenizer


class HuggingFaceEngine:
    """A tokenizer that runs in the `tokenizers` library.

    Args:
        engine: the library's tokenizer; truncation, padding and post-processing in it are turned off.
        known: names of end-of-document tokens that are looked for where the files beside declare none.
        eod_token: name of the end-of-document token, whatever they declare.

    Attributes:
        settings: `definition` as JSON, without its tables of tokens.
    """

    def __init__(self, engine: tokenizers.Tokenizer, files: tuple[str, ...], known: tuple[str, ...] = EOD_TOKENS,
                 eod_token: str | None = None):
        engine.no_truncation()
        engine.no_padding()
        self._engine, self._known = engine, known
        self.files = files
        self.vocab_size = max(engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        folder = Path(files[0]).parent
        self._eod, self.remark = end_of_document(engine, folder, eod_token, known)
        self.bos, self.adds_bos = self._beginning(folder)
        self.pad = next((token for name in PAD_TOKENS if (token := engine.token_to_id(name)) is not None), None)
        self.settings: dict[str, Any] = json.loads(self.definition)
        self.digest = library_digest(self.settings)
        engine.post_processor = None  # adds nothing here, and some, such as GPT-NeoX's, cut spaces out of spans
        for table in ("vocab", "merges"):
            self.settings["model"].pop(table, None)

    def _beginning(self, folder: Path) -> tuple[int | None, bool]:
        """`bos` and `adds_bos`. A tokenizer.json says so by what it adds to a text of its own accord."""
        name, says = declared_beginning(folder)
        plain, whole = (self._engine.encode("a", add_special_tokens=special).ids for special in (False, True))
        added = whole[:len(whole) - len(plain)] if whole[len(whole) - len(plain):] == plain else whole[:1]
        named = None if name is None else self.token_to_id(name)
        named = None if named == self._eod and not says else named  # such as GPT-2's, which stands between texts
        if len(added) == 1 and says is not False:
            return added[0], True
        return (named, says is True) if named is not None else (added[0] if len(added) == 1 else None, False)

    @property
    def eod(self) -> int:
        if self._eod is None:
            raise DataError(f"{' and '.join(self.files)}: no end-of-document token; looked for "
                            f"{', '.join(self._known)}, and for what tokenizer_config.json or generation_config.json "
                            "beside declares. Name the token that ends documents: --eod-token TOKEN.")
        return self._eod

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._engine.token_to_id(token)
        return found

    @functools.cached_property
    def definition(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        text: str = self._engine.to_str()
        return text

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and the first character of each and the one after its last."""
        encoding = self._engine.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._engine.decode(list(ids), skip_special_tokens=False)


class MaskedEngine(HuggingFaceEngine):
    """A WordPiece tokenizer with BERT's special tokens."""

    def __init__(self, engine: tokenizers.Tokenizer, files: tuple[str, ...]):
        super().__init__(engine, files, (SEP,), SEP)
        self.bos, self.adds_bos = None, False
        self.pad: int | None = engine.token_to_id(PAD)
        self.cls, self.sep, self.mask, self.unk = (engine.token_to_id(token) for token in (CLS, SEP, MASK, UNK))
        self.continues_word = continuations(engine, self.vocab_size)


def gpt2_bpe_tokenizer(vocab_file: str, merge_file: str, eod_token: str | None = None) -> HuggingFaceEngine:
    """Byte-level BPE as in GPT-2, from vocab.json and merges.txt; ids equal those of transformers' GPT2Tokenizer."""
    files = (readable(vocab_file, "--vocab-file"), readable(merge_file, "--merge-file"))
    try:
        engine = tokenizers.Tokenizer(models.BPE.from_file(*files))
    except Exception as error:  # the library raises nothing more precise
        raise DataError(f"{vocab_file} and {merge_file} are no vocab.json and merges.txt of GPT-2 BPE: "
                        f"{error}.") from error
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    if engine.token_to_id(EOD_TOKENS[0]) is not None:
        engine.add_special_tokens([EOD_TOKENS[0]])
    return HuggingFaceEngine(engine, files, EOD_TOKENS[:1], eod_token)


def hugging_face_tokenizer(path: str, eod_token: str | None = None) -> HuggingFaceEngine:
    """A tokenizer.json, the folder of one, or Llama 3's file of tokens and ranks."""
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    readable(file, "--tokenizer-model")
    if not file.endswith(".json") and (ranks := read_ranks(Path(file).read_bytes())):
        return HuggingFaceEngine(tiktoken_engine(ranks), (file,), eod_token=eod_token)
    try:
        engine = tokenizers.Tokenizer.from_file(file)
    except Exception as error:  # the library raises nothing more precise
        raise DataError(f"{file} is no tokenizer.json of Hugging Face tokenizers: {error}.") from error
    if is_masked_wordpiece(engine):
        return MaskedEngine(engine, (file,))
    return HuggingFaceEngine(engine, (file,), eod_token=eod_token)


class NullTokenizer:
    """Text that already is token ids, in decimal, between white space. `size` ids, and `size` ends a document."""

    def __init__(self, size: int):
        self.vocab_size = size + 1
        self.eod = size
        self.bos: int | None = None
        self.adds_bos = False
        self.remark: str | None = None
        self.pad: int | None = None
        self.files: tuple[str, ...] = ()
        self.digest = hashlib.sha256(f"NullTokenizer {size}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(f"NullTokenizer takes numbers between white space: {error}.") from error
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(f"NullTokenizer: token id = {token} is outside [0, {self.vocab_size}). Raise "
                                "--vocab-size.")
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)

    def token_to_id(self, token: str) -> int | None:
        return int(token) if token.isascii() and token.isdigit() and int(token) < self.vocab_size else None
