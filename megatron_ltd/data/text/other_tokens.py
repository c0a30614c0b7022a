"""Whether a tokenizer's ids stand for the text that a model was trained with."""

from dataclasses import replace

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.tokenizer import Tokenizer, tokenizer_of_model
from megatron_ltd.errors import UserError

COMPARED = 4096
"""Of so many ids at most, evenly spaced, the texts are compared."""
TOLERATED = 0.25
"""Share of them that may differ: a tokenizer may rename tokens, or show some of them otherwise."""


def other_tokens(tokenizer: Tokenizer, own: DataConfig) -> str | None:
    """A sentence about a tokenizer that is neither the model's own nor that with tokens added, as far as that can still
    be read.

    Args:
        own: settings of the model's own, as a checkpoint records them.
    """
    if own.tokenizer_type in (None, "NullTokenizer") or not tokenizer.files:
        return None  # ids that stand for no text
    try:
        models = tokenizer_of_model(replace(own, eod_token=None), None)
    except UserError:  # its files have moved, which is why another is named
        return None
    if models.digest == tokenizer.digest:
        return None
    common = min(models.vocab_size, tokenizer.vocab_size)
    ids = range(0, common, max(1, common // COMPARED))
    different = sum(_shown(models, token) != _shown(tokenizer, token) for token in ids)
    if different <= TOLERATED * len(ids):
        return None
    return (f"{different / len(ids):.0%} of the token ids stand for other text in {', '.join(tokenizer.files)} than in "
            f"the model's own tokenizer, {', '.join(models.files)}: the model takes them for its own, so its output "
            "means nothing until it has learned them anew")


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """Its text, without the space before a word, which tokenizers show in several ways."""
    return tokenizer.decode([token]).strip(" \u0120\u2581")
