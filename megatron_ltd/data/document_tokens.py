"""The tokens around the documents of a run's corpora, as far as their manifests say."""

from typing import Any

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.blend import corpus_part
from megatron_ltd.data.build import sources
from megatron_ltd.data.corpus.manifest import read_manifest
from megatron_ltd.data.text.beginning import name_of
from megatron_ltd.data.text.special_tokens import AUTO
from megatron_ltd.data.text.tokenizer import Tokenizer

_LOOK_FOR_ENDS = {"--eod-mask-loss": "eod_mask_loss", "--reset-position-ids": "reset_position_ids",
                  "--reset-attention-mask": "reset_attention_mask"}


def bos_of_corpora(config: RunConfig, tokenizer: Tokenizer) -> str | None:
    """The token with which the training corpora's documents begin, by its text; None if their manifests name none."""
    ids = {settings.get("bos_token_id") for settings in _written_with(config).values()} - {None}
    names = [name_of(tokenizer, token) for token in ids if isinstance(token, int)]
    return AUTO if ids == {tokenizer.bos} and tokenizer.adds_bos else next(
        (name for name in names if len(names) == 1 and tokenizer.token_to_id(name) in ids), None)


def ends_not_found(config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """What to tell of training corpora whose documents do not end with the token that settings look for, as far as
    their manifests say."""
    flags = [flag for flag, field in _LOOK_FOR_ENDS.items() if getattr(config.data, field)]
    if not flags or config.model.family != "gpt":
        return []
    told, looks = [], f"{', '.join(flags)} look{'s' * (len(flags) == 1)} for"
    for prefix, settings in _written_with(config).items():
        written = settings.get("eod_token_id")
        if settings.get("append_eod") is False:
            told.append(f"{prefix} was written without --append-eod, and {looks} token {tokenizer.eod} at the ends of "
                        "documents: those that do not hold it themselves are read as one. Write the corpus with it")
        elif isinstance(written, int) and written != tokenizer.eod:
            told.append(f"the documents of {prefix} end with token {written}, and {looks} token {tokenizer.eod}, so "
                        f"they are read as one; give --eod-token {name_of(tokenizer, written)!r}")
    return told


def _written_with(config: RunConfig) -> dict[str, dict[str, Any]]:
    """How the training corpora were written, as far as they have a manifest."""
    no_corpus = config.data.mock_data or config.data.train_jsonl is not None
    training = {} if no_corpus else sources(config)[0]
    prefixes = [corpus_part(prefix)[0] for source, _ in training.values() for prefix in source.prefixes]
    return {prefix: manifest.settings for prefix in prefixes if (manifest := read_manifest(prefix)) is not None}
