"""Makes the importance table of a run, with the vocabulary ids that are always kept or always dropped."""

import torch

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError
from megatron_ltd.token_drop.importance_table import ImportanceTable


def importance_table(config: RunConfig, tokenizer: Tokenizer, device: torch.device) -> ImportanceTable:
    """The table before the first step, with the special ids from the settings or, by default, the tokenizer.

    Raises:
        ConfigError: an id is not in the vocabulary, or is listed both to be kept and to be dropped.
    """
    drop, vocab_size = config.token_drop, config.model.vocab_size
    assert vocab_size is not None
    keep_ids, drop_ids = drop.token_drop_always_keep_ids, drop.token_drop_always_drop_ids
    if keep_ids is None:
        names = ("unk", "cls", "sep", "mask") if config.model.family == "bert" else ()
        keep_ids = tuple(getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None)
    if drop_ids is None:
        drop_ids = () if tokenizer.pad is None else (tokenizer.pad,)
    for flag, ids in (("--token-drop-always-keep-ids", keep_ids), ("--token-drop-always-drop-ids", drop_ids)):
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise ConfigError(f"{flag} = {' '.join(map(str, ids))}: the vocabulary has ids in [0, {vocab_size}), not "
                              f"{outside[0]}; name ids of the tokenizer")
    both = sorted(set(keep_ids) & set(drop_ids))
    if both:
        raise ConfigError(f"--token-drop-always-keep-ids and --token-drop-always-drop-ids both name {both[0]}; it can "
                          "be one of the two")
    return ImportanceTable.initial(vocab_size, initial_importance=drop.token_drop_initial_importance,
                                   beta=drop.token_drop_beta, always_keep=keep_ids, always_drop=drop_ids, device=device)
