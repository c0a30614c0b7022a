"""Settings that belong to finetuning or to pretraining, and what finetuning asks of the others."""

from collections.abc import Iterator

from megatron_ltd.config import DataConfig, RunConfig


def pretraining_violations(config: RunConfig) -> Iterator[str]:
    """What only the finetuning entry points can do."""
    data, training = config.data, config.training
    given = {"--train-epochs": training.train_epochs is not None,
             "--early-stopping-patience": training.early_stopping_patience is not None,
             "--pretrained-checkpoint": config.checkpoint.pretrained_checkpoint is not None,
             "--train-jsonl": data.train_jsonl is not None, "--valid-jsonl": data.valid_jsonl is not None,
             "--test-jsonl": data.test_jsonl is not None}
    yield from (f"{flag} is given, but this is a pretraining run; leave it out, or use megatron_ltd.finetune_gpt"
                for flag, is_given in given.items() if is_given)


def finetuning_violations(config: RunConfig) -> Iterator[str]:
    """What finetuning cannot do, or needs."""
    if config.data.mock_data:
        yield "--mock-data is given, but finetuning needs a training set; name one, or use a pretraining entry point"
    if config.training.early_stopping_patience is not None and not _has_validation(config):
        yield (f"--early-stopping-patience = {config.training.early_stopping_patience}: there is no validation set "
               "that says when to stop; add --valid-jsonl or --valid-data-path, and leave --eval-iters above 0")
    for flag in ("train_data_path", "data_path"):
        values = getattr(config.data, flag)
        if values is not None and _weighted(values):
            yield (f"--{flag.replace('_', '-')} = {' '.join(values)}: with weights there is no epoch, which finetuning "
                   "reads whole; name the corpora without weights")


def _has_validation(config: RunConfig) -> bool:
    data: DataConfig = config.data
    shares = data.split.split(",")
    in_split = data.data_path is not None and len(shares) > 1 and shares[1].strip() not in ("", "0", "0.0")
    return config.logging.eval_iters > 0 and (
        in_split or data.valid_data_path is not None or data.valid_jsonl is not None)


def _weighted(values: tuple[str, ...]) -> bool:
    """Whether they are WEIGHT PREFIX pairs of several corpora."""
    try:
        return len(values) > 2 and len(values) % 2 == 0 and all(float(value) >= 0 for value in values[::2])
    except ValueError:
        return False
