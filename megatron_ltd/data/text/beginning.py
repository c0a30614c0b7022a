"""Which token a run begins its texts with."""

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
            f"texts begin without token {tokenizer.bos}, which the tokenizer's files say to add; --bos-token auto adds "
            "it")
    if choice == AUTO:
        if not tokenizer.adds_bos:
            return None, "--bos-token = auto: none, since the tokenizer's files do not say to add one"
        return tokenizer.bos, f"--bos-token = auto: token {tokenizer.bos} begins texts, as the tokenizer's files say"
    bos = tokenizer.token_to_id(choice)
    if bos is None:
        raise ConfigError(f"--bos-token = {choice}: the tokenizer has no such token; name one of its tokens, or auto "
                          "for the one that its files say to add.")
    return bos, None
