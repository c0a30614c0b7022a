"""The beginning-of-text token: what a model's files declare, and what is made of it."""

import json
from pathlib import Path

import sentencepiece
import tokenizers

from megatron_ltd.data.text.tokenizer import HuggingFaceEngine, SentencePieceTokenizer, Tokenizer


def declared_bos(tokenizer: Tokenizer) -> tuple[int | None, bool]:
    """The id of the token that a tokenizer's files name for the beginning of texts, and whether they say to add it.

    A tokenizer.json says so by what it adds to a text of its own accord. A SentencePiece model only names the token; a
    tokenizer_config.json beside it says whether to add it.
    """
    if isinstance(tokenizer, HuggingFaceEngine):
        engine = tokenizers.Tokenizer.from_str(tokenizer.definition)
        plain, whole = (engine.encode("a", add_special_tokens=special).ids for special in (False, True))
        first = whole[:len(whole) - len(plain)] if whole[-len(plain):] == plain else whole[:1]
        return (first[0], True) if len(first) == 1 else (None, False)
    if isinstance(tokenizer, SentencePieceTokenizer):
        path = Path(tokenizer.files[0])
        bos: int = sentencepiece.SentencePieceProcessor(model_file=str(path)).bos_id()
        beside = path.with_name("tokenizer_config.json")
        says = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        return (bos, says.get("add_bos_token") is True) if bos >= 0 else (None, False)
    return None, False


def choose_bos(tokenizer: Tokenizer, given: int | None, none_wanted: bool, trained_here: bool
               ) -> tuple[int | None, str | None]:
    """The token that every text begins with, and what is to be told of it.

    Args:
        given: the user's choice.
        none_wanted: the user wants none.
        trained_here: the model has been trained by this project, whose corpora have no such token.
    """
    bos, added = declared_bos(tokenizer)
    if given is not None or none_wanted or bos is None:
        return given, None
    if added and not trained_here:
        return bos, (f"every text begins with token {bos}, as the model's tokenizer files say; --no-bos leaves it out")
    reason = "the model was trained here, on texts without it" if trained_here else "they do not say to add it"
    return None, (f"texts begin without token {bos}, which the model's tokenizer files name as the beginning of texts: "
                  f"{reason}; --bos-token-id {bos} adds it")
