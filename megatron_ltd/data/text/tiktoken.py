"""Llama 3's tokenizer file (tiktoken's format: a line for each token, its bytes in base64 and its rank) as a tokenizer
of the `tokenizers` library.

A file gives ranks but neither merges nor special tokens. Two neighbours merge if their bytes together are a token, the
least rank first; so a token has one merge for each way to cut it into two tokens. The pattern that cuts text into words
and the 256 special tokens behind the ranks are those that Llama 3 was published with.
"""

import base64
import binascii

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
_SPECIAL_TOKENS = 256
_NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


def read_ranks(content: bytes) -> dict[bytes, int] | None:
    """The rank of each token; None for a file of another format."""
    ranks = {}
    try:
        for line in content.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return None
    return ranks if sorted(ranks.values()) == list(range(len(ranks))) else None


def tiktoken_engine(ranks: dict[bytes, int]) -> tokenizers.Tokenizer:
    """The library's tokenizer with these tokens, and Llama 3's special tokens after them."""
    shown = {byte: chr(byte) for byte in _PRINTABLE}  # as GPT-2 writes bytes
    shown |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - shown.keys()))}
    names = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = [(names[token[:cut]], names[token[cut:]]) for token in sorted(ranks, key=ranks.__getitem__)
              for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    engine = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    engine.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.decoder = decoders.ByteLevel()
    reserved = iter(range(_SPECIAL_TOKENS))
    engine.add_special_tokens([f"<|{_NAMED[i] if i in _NAMED else f'reserved_special_token_{next(reserved)}'}|>"
                               for i in range(_SPECIAL_TOKENS)])
    return engine
