"""A pretraining run of any model: settings, checks, process group, data, model, checkpoint, loop, exit code."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from megatron_ltd.checkpoint.agreement import checkpoint_group
from megatron_ltd.checkpoint.writer import CheckpointWriter, open_uploader, probe_writable
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data import native
from megatron_ltd.data.build import Datasets, build_datasets, datasets_digest
from megatron_ltd.data.document_tokens import bos_of_corpora, ends_not_found
from megatron_ltd.data.held_out import in_whole_batches
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_ltd.log import Console
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.agreement import gather_json
from megatron_ltd.plan.batch_ramp import BatchRamp
from megatron_ltd.plan.derived import global_batch_size, long_samples, predictions_per_sample, total_samples
from megatron_ltd.plan.layouts.pipeline_costs import describe as describe_pipeline
from megatron_ltd.train.best import best_writer
from megatron_ltd.train.importance import importance_table
from megatron_ltd.train.process import launch, stacks
from megatron_ltd.train.process.elastic import tell_spares
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.exits import end, lost_peer, note_attempt, take_exit_record
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.process.siblings import end_soon
from megatron_ltd.train.process.sole import alone_in
from megatron_ltd.train.process.stopping import StopWatcher
from megatron_ltd.train.report.banner import banner
from megatron_ltd.train.report.log_writers import Metrics
from megatron_ltd.train.resume import batch_sizes, check_samples_read, restore, starts_fresh
from megatron_ltd.train.setup import build_model
from megatron_ltd.train.task_scores import TaskPlan
from megatron_ltd.train.trainer import Trainer

T = TypeVar("T")
Prepare = Callable[[RunConfig, Tokenizer | None, Runtime, Console, BatchRamp], tuple[RunConfig, Datasets]]


def prepare(config: RunConfig, tokenizer: Tokenizer | None, runtime: Runtime, console: Console,
            ramp: BatchRamp) -> tuple[RunConfig, Datasets]:
    """The settings, unchanged, and the run's samples.

    Args:
        ramp: the run's batch sizes.

    Raises:
        DataError: on every process, if one of them cannot read its data or reads other data.
    """
    assert tokenizer is not None
    dp = runtime.mesh.dp_size
    batch = global_batch_size(config, dp)
    scored = config.logging.eval_iters * batch
    whole = config.logging.full_validation and not config.data.mock_data
    test_samples = scored if config.data.test_data_path is not None else 0
    datasets = read_together(
        lambda: build_datasets(config, tokenizer, total_samples(config, dp, ramp), None if whole else scored,
                               test_samples, predictions_per_sample(config), long_samples(config, dp)),
        lambda datasets: datasets_digest(tokenizer, datasets))
    return config, datasets._replace(valid=in_whole_batches(datasets.valid, batch)) if whole else datasets


def read_together(read: Callable[[], T], digest_of: Callable[[T], str]) -> T:
    """The result of `read`, once all processes have verified that they read the same data.

    Raises:
        DataError: on every process, if one of them cannot read its data or reads other data.
    """
    problem, digest, found = None, None, None
    try:
        found = read()
        digest = digest_of(found)
    except UserError as error:
        problem = str(error)
    answers = gather_json([problem, digest])
    problems = {said for said, _ in answers if said is not None}
    if problems:
        raise DataError("\n".join(sorted(problems)))
    if len({read_there for _, read_there in answers}) > 1:
        raise DataError("The processes read different corpora, tokenizers or task files under the same names; copy "
                        "the same files to every machine")
    assert found is not None
    return found


def train(config: RunConfig, tokenizer: Tokenizer | None, place: Launch, prepare: Prepare, watcher: StopWatcher,
          tasks: TaskPlan | None = None) -> int:
    """Run this process and return its exit code.

    Args:
        tokenizer: None for models that read no text.
        prepare: reads the data once the process group exists, and completes the settings with what follows from it.
        watcher: of requests to stop; outlives the process group.
        tasks: those of --eval-tasks.

    Raises:
        UserError: an error that the user can fix.
    """
    runtime = launch.start(config, place)
    try:
        with alone_in(config.checkpoint.save, 60 * config.parallel.distributed_timeout_minutes):
            code = watched_train(config, tokenizer, runtime, prepare, watcher, tasks)
        tell_spares(place, runtime.store, code)
        return code
    except Exception as error:
        if lost_peer(error):
            stacks.tell(error, place.rank, runtime.processes, runtime.store, config.checkpoint.save)
            end_soon(runtime.siblings)
        raise


def watched_train(config: RunConfig, tokenizer: Tokenizer | None, runtime: Runtime, prepare: Prepare,
                  watcher: StopWatcher, tasks: TaskPlan | None) -> int:
    """The part of `train` after the process group exists."""
    place = runtime.launch
    console = Console(place.rank == 0)
    group = checkpoint_group(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    uploader, previous = None, None
    if config.checkpoint.save is not None:
        probe_writable(Path(config.checkpoint.save), group)
        uploader = open_uploader(config.checkpoint, group, console)
        if place.rank == 0:
            previous = take_exit_record(config.checkpoint.save)
    native.tell(console)
    ramp = batch_sizes(config, runtime.mesh.dp_size, group)
    config, datasets = prepare(config, tokenizer, runtime, console, ramp)
    for text in () if tokenizer is None else ends_not_found(config, tokenizer):
        console.warn(text)
    if tokenizer is not None and config.data.bos_token is None:
        config = with_bos_of_corpora(config, tokenizer, console)
    if tasks is not None:
        read_together(lambda: tasks, lambda tasks: tasks.digest)
    # What a checkpoint fills need not be drawn; finetuning may draw new heads.
    draw = starts_fresh(config) or config.checkpoint.finetune
    model = build_model(config, runtime.mesh, runtime.device, draw=draw, decodes=tasks is not None)
    if config.token_drop.policy == "importance" and tokenizer is not None:
        model.choose_by(importance_table(config, tokenizer, runtime.device))
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
    state = restore(config, model, optimizer, group, console)
    check_samples_read(config, runtime.mesh.dp_size, ramp, state, console)
    writer, best = None, None
    if config.checkpoint.save is not None:
        writer = CheckpointWriter(Path(config.checkpoint.save), group, config.checkpoint.async_save,
                                  config.checkpoint.save_retain_interval, console, uploader=uploader)
        best = best_writer(config, group, console)
    metrics = open_metrics(config, console, state.consumed.steps)
    mesh = runtime.mesh
    console.line(f"{launch.describe_host()}: {place.world_size} processes on {runtime.device.type}, "
                 f"tp {mesh.tp_size} x pp {mesh.pp_size} x dp {mesh.dp_size}, {config.training.precision}, "
                 f"{optimizer.description}, configuration {config.digest()[:12]}")
    for line in banner(config, datasets, mesh.dp_size, runtime.device.type, ramp):
        console.line(line)
    if mesh.pp_size > 1:
        line, warning = describe_pipeline(config, mesh.dp_size)
        console.line(line)
        if warning is not None:
            console.warn(warning)
    score_tasks = None
    if tasks is not None and tokenizer is not None:
        score_tasks = tasks.scores(model, runtime, config, tokenizer, console)
    first_step = state.consumed.steps
    trainer = Trainer(config, runtime, model, optimizer, datasets, state, metrics, writer, best, score_tasks)
    if place.rank == 0 and first_step < trainer.total_steps:
        note_attempt(config.checkpoint.save, first_step, place.world_size, previous)
    try:
        code = trainer.run(watcher)
    except UserError as error:
        if error.step is None:
            error.step = state.consumed.steps
        if writer is not None:
            finish_quietly(writer, console)
        raise
    end(config, code, place, first_step=first_step, step=state.consumed.steps, total_steps=trainer.total_steps)
    # A launcher kills all processes as soon as one exits with a code other than 0, so none exits before all are done.
    gather_json(code)
    return code


def with_bos_of_corpora(config: RunConfig, tokenizer: Tokenizer, console: Console) -> RunConfig:
    """The settings with the token that begins the corpora's documents, so that texts are scored with it later."""
    bos = bos_of_corpora(config, tokenizer)
    if bos is None:
        return config
    console.line(f"--bos-token is taken as {bos}, with which the documents of the corpus begin")
    return replace(config, data=replace(config.data, bos_token=bos))


def open_metrics(config: RunConfig, console: Console, resumed_step: int) -> Metrics:
    """Open the run's log.

    Raises:
        ConfigError: on every process, if the process that writes it cannot.
    """
    problem, metrics = None, None
    try:
        metrics = Metrics(config.logging, config.to_dict(), console, resumed_step)
    except ConfigError as error:
        problem = str(error)
    problems = [found for found in gather_json(problem) if found is not None]
    if problems:
        raise ConfigError(problems[0])
    assert metrics is not None
    return metrics


def finish_quietly(writer: CheckpointWriter, console: Console) -> None:
    """Finish a checkpoint that is being written in the background before the processes exit; the error that ended the
    run is reported in any case."""
    try:
        writer.close()
    except CheckpointError as error:
        console.warn(str(error))
