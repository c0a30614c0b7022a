"""Which token a run begins its texts with."""

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.sentence_piece import SentencePieceTokenizer
from megatron_ltd.data.text.special_tokens import AUTO
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError


def chosen_bos(tokenizer: Tokenizer, choice: str | None) -> tuple[int | None, str | None]:
    """The token that --bos-token chooses for the beginning of every text, if any, and what to tell the user of it.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    if choice is None:
        return None, None if not tokenizer.adds_bos else (
            f"token {tokenizer.bos}, which the tokenizer's files say to add, begins no text; --bos-token auto adds it")
    if choice == AUTO:
        if not tokenizer.adds_bos:
            return None, "--bos-token = auto: none, since the tokenizer's files do not say to add one"
        return tokenizer.bos, f"--bos-token = auto: token {tokenizer.bos} begins texts, as the tokenizer's files say"
    bos = tokenizer.token_to_id(choice)
    if bos is None:
        raise ConfigError(f"--bos-token = {choice}: the tokenizer has no such token; name one of its tokens, or auto "
                          "for the one that its files say to add.")
    return bos, None


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """The text by which `token_to_id` knows a token; SentencePiece decodes its control symbols to nothing."""
    known = tokenizer.id_to_token(token) if isinstance(tokenizer, SentencePieceTokenizer) else None
    return tokenizer.decode([token]) if known is None else known


def token_notes(data: DataConfig, tokenizer: Tokenizer) -> list[str]:
    """What to tell of the tokens that begin and end the texts of a training run.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    ends_texts = data.train_jsonl is not None or data.eod_mask_loss or data.reset_position_ids \
        or data.reset_attention_mask
    begins_texts = data.train_jsonl is not None or data.bos_token is not None  # a corpus has what it was written with
    _, of_bos = chosen_bos(tokenizer, data.bos_token)
    return [text for text, applies in ((of_bos, begins_texts), (tokenizer.remark, ends_texts))
            if applies and text is not None]
