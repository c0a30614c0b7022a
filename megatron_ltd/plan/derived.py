"""Values that follow from a `RunConfig` and the number of processes: plain arithmetic.

The functions expect settings that `megatron_ltd.settings.checks.all` accepts, except where they document errors.
"""

import re
from functools import lru_cache

from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.batch_ramp import BatchRamp
from megatron_ltd.plan.layer_tokens import LayerTokens
from megatron_ltd.token_drop.policies.mixture_of_depths import MixtureOfDepths
from megatron_ltd.token_drop.policy import Shape
from megatron_ltd.token_drop.registry import Policies


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Processes that share the batch."""
    parallel = config.parallel
    return world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def global_batch_size(config: RunConfig, dp: int) -> int:
    """Samples of one optimizer step, after any batch size ramp."""
    return config.training.global_batch_size or config.training.micro_batch_size * dp


def batch_ramp(config: RunConfig, dp: int) -> BatchRamp:
    """The global batch size as a function of consumed samples."""
    full = global_batch_size(config, dp)
    return BatchRamp(full, *(config.training.rampup_batch_size or ()))


def total_steps(config: RunConfig, dp: int, ramp: BatchRamp | None = None) -> int:
    """Steps of the run: as given, or the number of whole steps that fit in the budget of samples, raw tokens or layer
    tokens, or the number needed to read all epochs; of several budgets the one that is used up first.

    Args:
        ramp: batch sizes of a run that goes on with others than it had (`BatchRamp.going_on`); None: those of these
            settings from the first step on.
    """
    training, ramp = config.training, ramp or batch_ramp(config, dp)
    found = [] if training.train_iters is None else [training.train_iters]
    if training.train_epochs is not None:
        assert training.epoch_samples is not None, "finetuning counts the samples of an epoch before it asks"
        found.append(ramp.steps_covering(training.train_epochs * training.epoch_samples))
    if training.train_samples is not None:
        found.append(ramp.steps_within(training.train_samples))
    if training.train_tokens is not None:
        if training.token_budget == "layer":
            found.append(layer_tokens(config, dp, ramp).steps_within(training.train_tokens))
        elif reads_vary(config):
            found.append(layer_tokens(config, dp, ramp).steps_within_raw(training.train_tokens))
        else:
            found.append(ramp.steps_within(training.train_tokens // config.model.seq_length))
    return min(found)


def length_is_given(config: RunConfig) -> bool:
    """Whether the settings alone determine the length of the run; with epochs they do once the samples are counted."""
    return config.training.train_epochs is None or config.training.epoch_samples is not None


def total_samples(config: RunConfig, dp: int, ramp: BatchRamp | None = None) -> int:
    """Samples that the whole run consumes. Args: see `total_steps`."""
    return (ramp or batch_ramp(config, dp)).samples_after(total_steps(config, dp, ramp))


@lru_cache(maxsize=16)
def layer_tokens(config: RunConfig, dp: int, ramp: BatchRamp | None = None) -> LayerTokens:
    """Tokens read, and tokens processed summed over layers, as functions of the step. Layers that are skipped at random
    are counted as if they were not skipped, since the draws have no closed form. Args: see `total_steps`."""
    return LayerTokens(ramp or batch_ramp(config, dp), policies(config))


@lru_cache(maxsize=64)
def policies(config: RunConfig) -> Policies:
    """The run's policies.

    Raises:
        ConfigError: their settings cannot be parsed.
    """
    model = config.model
    routed = tuple(layer for layer in range(model.num_layers) if model.is_routed(layer))
    of_model = () if model.mixture_of_depths_capacity is None else (
        MixtureOfDepths(routed, model.mixture_of_depths_capacity, model.mixture_of_depths_strata),)
    return Policies.of(config.token_drop, policy_shape(config), of_model)


def policy_shape(config: RunConfig) -> Shape:
    """The facts about the run that policies may use."""
    slices = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    return Shape(config.model.family, config.model.num_layers, config.model.seq_length, config.training.seed, slices,
                 predictions_per_sample(config))


def has_curriculum(config: RunConfig) -> bool:
    """Whether training samples are truncated early in the run."""
    return config.token_drop.seq_length_curriculum_start_length is not None


def reads_vary(config: RunConfig) -> bool:
    """Whether the number of tokens read of a sample depends on the step."""
    return has_curriculum(config) or _reads_more(config)


def _reads_more(config: RunConfig) -> bool:
    return config.token_drop.token_superposition is not None and config.token_drop.token_superposition_text == "more"


def long_samples(config: RunConfig, dp: int) -> tuple[int, int] | None:
    """How many samples the run reads with --token-superposition-text more, and how many times as long they are; None
    without."""
    drop = config.token_drop
    if not _reads_more(config):
        return None
    assert drop.token_superposition is not None and drop.token_superposition_steps is not None
    return batch_ramp(config, dp).samples_after(drop.token_superposition_steps), drop.token_superposition


def predictions_per_sample(config: RunConfig) -> int | None:
    """Maximum number of tokens that BERT predicts per sample; None for other models."""
    if config.model.family != "bert":
        return None
    return max(1, round(config.data.mask_prob * config.model.seq_length))


def parse_pipeline_split(text: str) -> tuple[int, ...] | None:
    """Layers of each stage in order of depth; None for `uniform` and `auto`.

    Raises:
        ConfigError: it is neither of these nor a list of integers.
    """
    if text in ("uniform", "auto"):
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,6}", part) for part in parts):
        raise ConfigError(f"--pipeline-split = {text!r}: it must be `uniform`, `auto` or the layers of each stage; "
                          "write for example 5,7,7,5")
    return tuple(int(part) for part in parts)


def muon_precision(config: RunConfig) -> str:
    """In which Muon iterates: as given, or bf16 unless the run computes in fp32."""
    return config.optimizer.muon_precision or ("fp32" if config.training.precision == "fp32" else "bf16")


def virtual_chunks(config: RunConfig) -> int:
    """Model chunks of one pipeline rank: 2 under zbv, several under the interleaved schedules, else 1.

    Under the interleaved schedules the number follows from --num-layers-per-virtual-pipeline-stage or, if that is not
    given, from the length of --pipeline-split. A pipeline of one rank has one chunk under every schedule.
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


def whole_backward(config: RunConfig, dp: int) -> bool:
    """Whether zero-bubble schedules run the backward pass as a whole, since splitting it does not work with
    recomputation, compiled layers, parameters that are freed after the forward pass, or gradients that are reduced
    during the backward pass."""
    parallel = config.parallel
    sharded = parallel.sharding == "optim_grads_params" or (parallel.sharding == "optim_grads" and dp > 1)
    return parallel.recompute != "none" or config.training.compile or sharded


def pipeline_stages(config: RunConfig) -> int:
    """Stages of the pipeline: all chunks of all ranks."""
    return config.parallel.pipeline_model_parallel_size * virtual_chunks(config)
