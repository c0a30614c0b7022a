"""What follows from a `RunConfig` and the number of processes: plain arithmetic, shared by all who need it.

The functions expect settings that `megatron_ltd.settings.checks.all` accepts, except where they raise.
"""

import re
from functools import lru_cache

from megatron_ltd.config import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.batch_ramp import BatchRamp
from megatron_ltd.plan.layer_tokens import LayerTokens
from megatron_ltd.token_drop.schedule import KeptLength, KeptSchedule, ListedLength

_STEP_LENGTH = re.compile(r"\s*([0-9]{1,18})\s*:\s*([0-9]{1,9})\s*")
_RANGE = re.compile(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?")
MAX_LISTED_LAYER = 9999


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Processes that share the batch."""
    parallel = config.parallel
    return world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def global_batch_size(config: RunConfig, dp: int) -> int:
    """Samples of one optimizer step, once a ramp is over."""
    given = config.training.global_batch_size
    return given if given is not None else config.training.micro_batch_size * dp


def batch_ramp(config: RunConfig, dp: int) -> BatchRamp:
    """The global batch size as a function of consumed samples."""
    full = global_batch_size(config, dp)
    if config.training.rampup_batch_size is None:
        return BatchRamp(full)
    start, increment, samples = config.training.rampup_batch_size
    return BatchRamp(full, start, increment, samples)


def total_steps(config: RunConfig, dp: int) -> int:
    """Steps of the run: as given, or as many whole steps as fit in the budget of samples, raw or layer tokens, or as
    many as it takes to read all epochs."""
    training = config.training
    if training.train_iters is not None:
        return training.train_iters
    if training.train_tokens is not None and training.token_budget == "layer":
        return layer_tokens(config, dp).steps_within(training.train_tokens)
    if training.train_epochs is not None:
        assert training.epoch_samples is not None, "finetuning counts the samples of an epoch before it asks"
        return batch_ramp(config, dp).steps_covering(training.train_epochs * training.epoch_samples)
    samples = training.train_samples
    if samples is None:
        assert training.train_tokens is not None, "the checks require a budget"
        if has_curriculum(config):
            return layer_tokens(config, dp).steps_within_raw(training.train_tokens)
        samples = training.train_tokens // config.model.seq_length
    return batch_ramp(config, dp).steps_within(samples)


def length_is_given(config: RunConfig) -> bool:
    """Whether the settings alone say how long the run is: epochs do once their samples are counted."""
    return config.training.train_epochs is None or config.training.epoch_samples is not None


def total_samples(config: RunConfig, dp: int) -> int:
    """Samples that the whole run consumes."""
    return batch_ramp(config, dp).samples_after(total_steps(config, dp))


@lru_cache(maxsize=16)
def layer_tokens(config: RunConfig, dp: int) -> LayerTokens:
    """Tokens that the run reads, and those it processes, summed over layers, as a function of the step. Layers that
    LayerDrop skips are counted as if it did not, since they follow from its draws."""
    return LayerTokens(batch_ramp(config, dp), kept_length(config), sequence_length(config), config.model.num_layers,
                       len(dropped_layers(config)))


def parse_layer_list(text: str, flag: str = "--random-ltd-layers") -> tuple[int, ...]:
    """Layer numbers of a text such as `1-22` or `1,3,5-9`, in the order given.

    Args:
        flag: the setting it is of, for the message.

    Raises:
        ConfigError: it is not such a text; doubled layers are not looked for.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if match is None or last < first or last > MAX_LISTED_LAYER:
            raise ConfigError(f"{flag} = {text!r}: {part.strip()!r} is neither a layer nor an ascending "
                              f"range up to layer {MAX_LISTED_LAYER}; write for example 1-22 or 1,3,5-9")
        layers.extend(range(first, last + 1))
    return tuple(layers)


def dropped_layers(config: RunConfig) -> tuple[int, ...]:
    """Global ids of the layers that drop tokens, ascending; none without a token-drop policy."""
    if config.token_drop.policy == "none":
        return ()
    layers = config.model.num_layers
    if config.token_drop.random_ltd_layers is None:
        first = layers // 2 - 1 if config.token_drop.policy == "importance" else 1
        return tuple(range(max(1, first), layers - 1))
    return tuple(sorted(parse_layer_list(config.token_drop.random_ltd_layers)))


def skippable_layers(config: RunConfig) -> tuple[int, ...]:
    """Global ids of the layers that LayerDrop may skip, ascending; none without it."""
    drop = config.token_drop
    if drop.layer_drop_rate == 0.0:
        return ()
    if drop.layer_drop_layers is None:
        return tuple(range(config.model.num_layers))
    return tuple(sorted(parse_layer_list(drop.layer_drop_layers, "--layer-drop-layers")))


def cross_layer(config: RunConfig) -> int | None:
    """The dropped layer in which kept tokens attend to all tokens: the first one of the importance policy
    (https://arxiv.org/abs/2203.13240, section 3)."""
    drop = config.token_drop
    dropped = dropped_layers(config)
    return dropped[0] if drop.policy == "importance" and dropped and not drop.token_drop_no_cross_layer else None


def start_length(config: RunConfig) -> int:
    """Tokens of a sample that a dropped layer keeps at the first step."""
    given, listed = config.token_drop.random_ltd_start_length, config.token_drop.random_ltd_length_list
    if given is not None:
        return given
    if listed is not None:
        return parse_length_list(listed)[0][1]
    return config.model.seq_length // 2 if config.token_drop.policy == "importance" else 128


def kept_length(config: RunConfig) -> KeptSchedule:
    """The kept length over the run; the whole sequence without a token-drop policy."""
    full, drop = config.model.seq_length, config.token_drop
    if drop.policy == "none":
        return KeptLength(full, full)
    if drop.random_ltd_length_list is not None:
        return ListedLength(parse_length_list(drop.random_ltd_length_list))
    return KeptLength(start_length(config), full, drop.random_ltd_steps, drop.random_ltd_length_step,
                      drop.random_ltd_root_degree)


def has_curriculum(config: RunConfig) -> bool:
    """Whether training samples are cut short at first."""
    return config.token_drop.seq_length_curriculum_start_length is not None


def sequence_length(config: RunConfig) -> KeptSchedule:
    """Tokens of a sample that are read, over the run: all, or what a sequence curriculum has grown to."""
    full, drop = config.model.seq_length, config.token_drop
    if drop.seq_length_curriculum_start_length is None:
        return KeptLength(full, full)
    return KeptLength(drop.seq_length_curriculum_start_length, full, drop.seq_length_curriculum_steps,
                      drop.seq_length_curriculum_length_step)


def parse_length_list(text: str) -> tuple[tuple[int, int], ...]:
    """(step, kept tokens) of a text such as `0:128,1000:256`.

    Raises:
        ConfigError: it is not such a text, or steps do not ascend from 0, or a length falls.
    """
    matches = [_STEP_LENGTH.fullmatch(part) for part in text.split(",")]
    entries = tuple((int(match[1]), int(match[2])) for match in matches if match)
    steps, lengths = [step for step, _ in entries], [length for _, length in entries]
    if len(entries) < len(matches) or steps != sorted(set(steps)) or steps[0] != 0 or lengths != sorted(lengths) \
            or lengths[0] < 1:
        raise ConfigError(f"--random-ltd-length-list = {text!r}: it must be STEP:LENGTH pairs between commas, steps "
                          "ascending from 0, lengths from 1 and never falling; write for example 0:128,1000:256")
    return entries


def predictions_per_sample(config: RunConfig) -> int | None:
    """Tokens of a sample that BERT predicts at most; None for other models."""
    if config.model.family != "bert":
        return None
    return max(1, round(config.data.mask_prob * config.model.seq_length))


def parse_pipeline_split(text: str) -> tuple[int, ...] | None:
    """Layers of each stage in order of depth; None for `uniform` and `auto`.

    Raises:
        ConfigError: it is neither of them nor a list of whole numbers.
    """
    if text in ("uniform", "auto"):
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,6}", part) for part in parts):
        raise ConfigError(f"--pipeline-split = {text!r}: it must be `uniform`, `auto` or the layers of each stage; "
                          "write for example 5,7,7,5")
    return tuple(int(part) for part in parts)


def virtual_chunks(config: RunConfig) -> int:
    """Model chunks of one pipeline rank: 2 under zbv, several under the interleaved schedules, else 1.

    Under the interleaved schedules the number follows from --num-layers-per-virtual-pipeline-stage, or, where
    that is not given, from the length of --pipeline-split. A pipeline of one rank has one chunk under every
    schedule.
    """
    parallel = config.parallel
    pp = parallel.pipeline_model_parallel_size
    if pp == 1 or parallel.pipeline_schedule == "1f1b":
        return 1
    if parallel.pipeline_schedule == "zbv":
        return 2
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        return config.model.num_layers // (pp * parallel.num_layers_per_virtual_pipeline_stage)
    split = parse_pipeline_split(parallel.pipeline_split)
    return len(split) // pp if split is not None else 1


def whole_backward(config: RunConfig) -> bool:
    """Whether zero-bubble schedules run the backward pass whole, since splitting it in two does not work together with
    recomputation, compiled layers, or parameters that are freed after the forward pass."""
    parallel = config.parallel
    return parallel.recompute != "none" or config.training.compile or parallel.sharding == "optim_grads_params"


def pipeline_stages(config: RunConfig) -> int:
    """Stages of the pipeline, all chunks of all ranks counted."""
    return config.parallel.pipeline_model_parallel_size * virtual_chunks(config)
