"""What follows from a `RunConfig` and the number of processes: plain arithmetic, shared by all who need it.

The functions expect settings that `megatron_ltd.config_checks` accepts, except where they raise.
"""

import re

from megatron_ltd.batch_ramp import BatchRamp
from megatron_ltd.config import RunConfig
from megatron_ltd.errors import ConfigError

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
    """Steps of the run: as given, or as many whole steps as fit in the budget of samples or raw tokens."""
    training = config.training
    if training.train_iters is not None:
        return training.train_iters
    samples = training.train_samples
    if samples is None:
        assert training.train_tokens is not None, "config_checks requires a budget"
        samples = training.train_tokens // config.model.seq_length
    return batch_ramp(config, dp).steps_within(samples)


def total_samples(config: RunConfig, dp: int) -> int:
    """Samples that the whole run consumes."""
    return batch_ramp(config, dp).samples_after(total_steps(config, dp))


def parse_layer_list(text: str) -> tuple[int, ...]:
    """Layer numbers of a text such as `1-22` or `1,3,5-9`, in the order given.

    Raises:
        ConfigError: it is not such a text; doubled layers are not looked for.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if match is None or last < first or last > MAX_LISTED_LAYER:
            raise ConfigError(f"--random-ltd-layers = {text!r}: {part.strip()!r} is neither a layer nor an ascending "
                              f"range up to layer {MAX_LISTED_LAYER}; write for example 1-22 or 1,3,5-9")
        layers.extend(range(first, last + 1))
    return tuple(layers)


def dropped_layers(config: RunConfig) -> tuple[int, ...]:
    """Global ids of the layers that drop tokens, ascending; none without a token-drop policy."""
    if config.token_drop.policy == "none":
        return ()
    if config.token_drop.random_ltd_layers is None:
        return tuple(range(1, config.model.num_layers - 1))
    return tuple(sorted(parse_layer_list(config.token_drop.random_ltd_layers)))


def parse_pipeline_split(text: str) -> tuple[int, ...] | None:
    """Layers of each stage in order of depth; None for `uniform`.

    Raises:
        ConfigError: it is neither `uniform` nor a list of whole numbers.
    """
    if text == "uniform":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,6}", part) for part in parts):
        raise ConfigError(f"--pipeline-split = {text!r}: it must be `uniform` or the layers of each stage; "
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


def pipeline_stages(config: RunConfig) -> int:
    """Stages of the pipeline, all chunks of all ranks counted."""
    return config.parallel.pipeline_model_parallel_size * virtual_chunks(config)
