"""BERT's WordPiece in the `tokenizers` library, from vocab.txt: the ids of transformers' BertTokenizerFast."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megatron_ltd.errors import DataError

CONTINUATION = "##"
PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, eq=False)
class MaskedVocabulary:
    """What masked language modelling needs to know of a vocabulary.

    Attributes:
        size: ids are in [0, size); a token that is replaced at random becomes any of them, as in megatron-core.
        continues_word: [size], True for the pieces ("##ing") that belong to the word of the token before them.
    """

    size: int
    pad: int
    cls: int
    sep: int
    mask: int
    continues_word: NDArray[np.bool_]


def read_vocabulary(path: str) -> dict[str, int]:
    """The tokens of a vocab.txt, one a line, with the line number from 0 as id.

    Raises:
        DataError: not UTF-8, a token twice, or a special token missing.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no vocab.txt: not UTF-8 at byte {error.start}.") from error
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(lines):
        token = line.removesuffix("\r")
        if token in vocabulary:
            raise DataError(f"{path}:{number + 1}: the token {token!r} is also on line {vocabulary[token] + 1}; a "
                            "vocab.txt names every token once. Correct the file.")
        vocabulary[token] = number
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise DataError(f"{path}: no {', '.join(missing)} among its {len(vocabulary)} tokens. A vocab.txt of BERT has "
                        "one token a line, these included.")
    return vocabulary


def wordpiece_engine(vocabulary: dict[str, int], lowercase: bool) -> tokenizers.Tokenizer:
    """BERT's tokenizer: clean, split at white space, punctuation and ideographs, then the longest known pieces.

    Args:
        lowercase: lower the case and strip accents first.
    """
    engine = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, continuing_subword_prefix=CONTINUATION))
    engine.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None,
                                                   lowercase=lowercase)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece(prefix=CONTINUATION)
    engine.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    return engine


def is_masked_wordpiece(engine: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer is a WordPiece with all of BERT's special tokens."""
    return isinstance(engine.model, models.WordPiece) and all(
        engine.token_to_id(token) is not None for token in SPECIAL_TOKENS)


def continuations(engine: tokenizers.Tokenizer, vocab_size: int) -> NDArray[np.bool_]:
    """`MaskedVocabulary.continues_word` of a WordPiece tokenizer."""
    prefix = getattr(engine.model, "continuing_subword_prefix", CONTINUATION)
    continues = np.zeros(vocab_size, dtype=np.bool_)
    for token, number in engine.get_vocab(with_added_tokens=True).items():
        continues[number] = token.startswith(prefix)
    continues.flags.writeable = False
    return continues
