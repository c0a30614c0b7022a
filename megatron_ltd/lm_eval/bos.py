"""The beginning-of-text token that texts are scored with."""

from megatron_ltd.data.text.beginning import chosen_bos
from megatron_ltd.data.text.tokenizer import Tokenizer


def choose_bos(tokenizer: Tokenizer, given: int | None, none_wanted: bool, trained_here: bool,
               recorded: str | None = None) -> tuple[int | None, str | None]:
    """The token that every text begins with, and what is to be told of it.

    Args:
        given: the user's choice.
        none_wanted: the user wants none.
        trained_here: the model has been trained by this project.
        recorded: --bos-token of the run that trained it.
    """
    bos, added = tokenizer.bos, tokenizer.adds_bos
    if given is not None or none_wanted:
        return given, None
    if recorded is not None:
        bos, _ = chosen_bos(tokenizer, recorded)
        return bos, None if bos is None else (f"every text begins with token {bos}, as in training; --no-bos leaves it "
                                              "out")
    if bos is None:
        return None, None
    if added and not trained_here:
        return bos, (f"every text begins with token {bos}, as the model's tokenizer files say; --no-bos leaves it out")
    reason = "the model was trained here, on texts without it" if trained_here else "they do not say to add it"
    return None, (f"texts begin without token {bos}, which the model's tokenizer files name as the beginning of texts: "
                  f"{reason}; --bos-token-id {bos} adds it")
