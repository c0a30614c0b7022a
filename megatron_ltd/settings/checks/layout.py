"""Whether model and batch fit the processes: tensor, pipeline and data parallelism, and the pipeline's schedule."""

import math
from collections.abc import Iterator

from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import (
    batch_ramp,
    data_parallel_size,
    global_batch_size,
    parse_pipeline_split,
    pipeline_stages,
)

MOST_INCREMENTS = 100_000
INTERLEAVED = ("interleaved", "interleaved-zero-bubble")


def layout_violations(config: RunConfig, world_size: int) -> Iterator[str]:
    """Everything about the layout, for settings that pass `value_violations`."""
    yield from _tensor_parallel(config)
    pipeline = _pipeline_problem(config)
    if pipeline is not None:
        yield pipeline
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp) or world_size < 1:
        yield (f"{world_size} processes: not divisible by --tensor-model-parallel-size = {tp} x "
               f"--pipeline-model-parallel-size = {pp}; launch a multiple of {tp * pp} processes, or lower the sizes")
        return
    dp = data_parallel_size(config, world_size)
    batch = list(_batch(config, dp))
    yield from batch
    if pipeline is None and not batch:
        yield from _microbatches(config, dp)


def _tensor_parallel(config: RunConfig) -> Iterator[str]:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    shared = {"--num-attention-heads": model.num_attention_heads, "--ffn-hidden-size": model.ffn}
    if model.ngram_rows is not None:
        shared["--ngram-rows"] = model.ngram_rows
    if config.parallel.sequence_parallel:
        shared["--seq-length"] = model.seq_length
    for flag, size in shared.items():
        if size % tp:
            what = ", with --sequence-parallel" if flag == "--seq-length" else ""
            yield (f"{flag} = {size}: not divisible by --tensor-model-parallel-size = {tp}{what}; "
                   f"choose {_multiples(size, tp)}, or another tensor-parallel size")
    groups = model.query_groups
    if groups % tp and tp % groups and groups != model.num_attention_heads:
        yield (f"--num-query-groups = {groups}: neither a multiple nor a divisor of --tensor-model-parallel-size = "
               f"{tp}; choose {math.gcd(groups, tp)} or {tp}, or another tensor-parallel size")
    elif groups < tp and groups * model.head_dim % tp:
        yield (f"--num-query-groups = {groups}: its heads of {model.head_dim} channels are not divisible by "
               f"--tensor-model-parallel-size = {tp}; choose more groups, or another tensor-parallel size")
    if model.vocab_size is not None and model.padded_vocab_size % tp:
        unit = model.make_vocab_size_divisible_by
        yield (f"--make-vocab-size-divisible-by = {unit}: the vocabulary of {model.vocab_size} is padded to "
               f"{model.padded_vocab_size} rows, not divisible by --tensor-model-parallel-size = {tp}; "
               f"use --make-vocab-size-divisible-by {math.lcm(unit, tp)}")


def _pipeline_problem(config: RunConfig) -> str | None:
    """Why the layers cannot be dealt to the stages."""
    parallel, layers = config.parallel, config.model.num_layers
    pp, schedule = parallel.pipeline_model_parallel_size, parallel.pipeline_schedule
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    try:
        split = parse_pipeline_split(parallel.pipeline_split)
    except ConfigError as error:
        return str(error)
    if pp > 1 and schedule not in INTERLEAVED and per_chunk is not None:
        chunks = "exactly two chunks" if schedule == "zbv" else "one chunk"
        return (f"--num-layers-per-virtual-pipeline-stage = {per_chunk}: with --pipeline-schedule = {schedule} every "
                f"process holds {chunks}; leave it out, or use --pipeline-schedule interleaved")
    if pp > 1 and schedule in INTERLEAVED:
        if per_chunk is not None and layers % (pp * per_chunk):
            return (f"--num-layers = {layers}: not divisible by --pipeline-model-parallel-size = {pp} x "
                    f"--num-layers-per-virtual-pipeline-stage = {per_chunk}; choose "
                    f"{_multiples(layers, pp * per_chunk)} layers, or other sizes")
        if per_chunk is None and split is None:
            return (f"--pipeline-schedule = {schedule} needs --num-layers-per-virtual-pipeline-stage, a divisor of "
                    f"--num-layers / --pipeline-model-parallel-size = {layers} / {pp}; for one chunk per process "
                    "use --pipeline-schedule 1f1b")
        if per_chunk is None and split is not None and len(split) % pp:
            return (f"--pipeline-split = {parallel.pipeline_split}: {len(split)} stages, not a multiple of "
                    f"--pipeline-model-parallel-size = {pp}; give {_multiples(len(split), pp)} numbers")
    stages = pipeline_stages(config)
    stage_text = f"--pipeline-model-parallel-size = {pp} with --pipeline-schedule = {schedule}"
    if split is not None and len(split) != stages:
        return (f"--pipeline-split = {parallel.pipeline_split}: {len(split)} stages, but {stage_text} has {stages}; "
                f"give {stages} numbers that add up to {layers}")
    if split is not None and (sum(split) != layers or min(split) < 1):
        return (f"--pipeline-split = {parallel.pipeline_split}: {sum(split)} layers, the fewest of a stage "
                f"{min(split)}; every stage needs one, and together they must be --num-layers = {layers}")
    if layers < stages:
        return (f"--num-layers = {layers}: fewer than the {stages} stages of {stage_text}; "
                "use more layers or a smaller pipeline")
    return None


def _batch(config: RunConfig, dp: int) -> Iterator[str]:
    """Whether every global batch is a whole number of microbatches on every process."""
    training = config.training
    unit, full = training.micro_batch_size * dp, global_batch_size(config, dp)
    unit_text = f"--micro-batch-size = {training.micro_batch_size} x data-parallel size = {dp}"
    if full % unit:
        yield (f"--global-batch-size = {full}: not divisible by {unit_text}; choose {_multiples(full, unit)}, "
               "or another micro-batch size")
    if training.rampup_batch_size is None:
        return
    start, increment, samples = training.rampup_batch_size
    text = f"--rampup-batch-size = {start} {increment} {samples}"
    if start < 1 or increment < 1 or samples < 0:
        yield f"{text}: START and INCREMENT must be at least 1, and SAMPLES at least 0; give such numbers"
    elif start > full:
        yield f"{text}: START is more than --global-batch-size = {full}; begin with at most {full}"
    elif (full - start) // increment > MOST_INCREMENTS:
        yield (f"{text}: {(full - start) // increment} increments up to --global-batch-size = {full}, at most "
               f"{MOST_INCREMENTS} are possible; choose a larger INCREMENT")
    elif (full - start) % increment:
        yield (f"{text}: {increment} samples do not divide the way from {start} to --global-batch-size = {full}; "
               f"choose an increment that divides {full - start}")
    elif start % unit or (start < full and increment % unit):
        yield (f"{text}: START and INCREMENT must be multiples of {unit_text} = {unit}; "
               f"choose {_multiples(start, unit)} and {_multiples(increment, unit)}")


def _microbatches(config: RunConfig, dp: int) -> Iterator[str]:
    """Whether the schedule can run every number of microbatches that the run comes to."""
    unit = config.training.micro_batch_size * dp
    pp, schedule = config.parallel.pipeline_model_parallel_size, config.parallel.pipeline_schedule
    for batch in batch_ramp(config, dp).sizes():
        count = batch // unit
        wanted = needed_microbatches(schedule, pp, count)
        if wanted != count:
            where = "--global-batch-size" if config.training.rampup_batch_size is None else "a step of the batch ramp"
            yield (f"{where} = {batch}: {count} microbatches a process, which --pipeline-schedule = {schedule} cannot "
                   f"run on --pipeline-model-parallel-size = {pp}; use for example {wanted * unit} samples "
                   f"({wanted} microbatches), or another micro-batch size")
            return


def needed_microbatches(schedule: str, pp: int, count: int) -> int:
    """`count` if the schedule can run so many microbatches, else the next number that it can.

    torch asks of 1f1b at least one microbatch a stage; of the interleaved schedules that rounds of about `pp`
    microbatches divide them evenly; of zbv nothing (it fills up with idle slots).
    """
    if pp == 1 or schedule == "zbv":
        return count
    if schedule in INTERLEAVED:
        while count % max(1, count // pp):
            count += 1
        return count
    return max(count, pp)


def _multiples(value: int, unit: int) -> str:
    """The multiples of `unit` next to `value`, in words."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"
