"""A pretraining run of any model: settings, checks, process group, data, model, checkpoint, loop, exit code."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from megatron_ltd.checkpoint.agreement import checkpoint_group
from megatron_ltd.checkpoint.writer import CheckpointWriter, probe_writable
from megatron_ltd.config import Family, RunConfig
from megatron_ltd.data import native
from megatron_ltd.data.build import Datasets, build_datasets, datasets_digest
from megatron_ltd.data.text.tokenizer import NullTokenizer, Tokenizer, build_tokenizer
from megatron_ltd.errors import EXIT_COMPLETE, CheckpointError, ConfigError, DataError, UserError
from megatron_ltd.log import Console
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.agreement import gather_json
from megatron_ltd.plan.derived import global_batch_size, long_samples, predictions_per_sample, total_samples
from megatron_ltd.plan.pipeline_costs import describe as describe_pipeline
from megatron_ltd.settings.checks.all import check, refuse
from megatron_ltd.settings.checks.rules import pretraining_violations
from megatron_ltd.settings.cli import asks_for_help, parse_run_config
from megatron_ltd.train.best import best_writer
from megatron_ltd.train.importance import importance_table
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.exits import clear_exit_record, lost_peer, report, write_exit_record
from megatron_ltd.train.process.launch import Launch, Runtime
from megatron_ltd.train.process.siblings import end_soon
from megatron_ltd.train.process.stopping import StopWatcher
from megatron_ltd.train.report.log_writers import Metrics
from megatron_ltd.train.resume import check_samples_read, restore, with_checkpoint_model
from megatron_ltd.train.setup import build_model
from megatron_ltd.train.trainer import Trainer

T = TypeVar("T")
Prepare = Callable[[RunConfig, Runtime, Console], tuple[RunConfig, Datasets]]


def read_settings(arguments: list[str], family: Family, console: Console) -> RunConfig:
    """The unchecked settings of a run of this model family.

    Raises:
        UserError: flags or files that cannot be read, or a checkpoint of another family.
    """
    config, notes = parse_run_config(arguments, family)
    for note in notes:
        console.line(note)
    config = with_checkpoint_model(config)
    require_family(config, family, "pretrain")
    return config


def require_family(config: RunConfig, family: str, recipe: str) -> None:
    """Check that the checkpoint whose settings were taken holds a model of this family.

    Raises:
        CheckpointError: it does not.
    """
    if config.model.family != family:
        raise CheckpointError(f"--load = {config.checkpoint.load}: the checkpoint holds a {config.model.family} model; "
                              f"continue it with megatron_ltd.{recipe}_{config.model.family}")


def read_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer; for --mock-data without one, the numbers below --vocab-size."""
    kind, vocab_size = config.data.tokenizer_type, config.model.vocab_size
    made_up = config.data.mock_data and kind is None
    # A NullTokenizer adds an end-of-document token to --vocab-size; a checkpoint's vocabulary includes it.
    if vocab_size is not None and (made_up or (kind == "NullTokenizer" and config.checkpoint.use_checkpoint_args)):
        return NullTokenizer(vocab_size - 1)
    return build_tokenizer(config.data, vocab_size)


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The settings with the tokenizer's vocabulary size, unless a larger one was requested."""
    vocab_size = max(config.model.vocab_size or 0, tokenizer.vocab_size)
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def read_datasets(config: RunConfig, tokenizer: Tokenizer, runtime: Runtime) -> Datasets:
    """The run's samples.

    Raises:
        DataError: on every process, if one of them cannot read its data or reads other data.
    """
    dp = runtime.mesh.dp_size
    valid_samples = config.logging.eval_iters * global_batch_size(config, dp)
    test_samples = valid_samples if config.data.test_data_path is not None else 0
    return read_together(
        lambda: build_datasets(config, tokenizer, total_samples(config, dp), valid_samples, test_samples,
                               predictions_per_sample(config), long_samples(config, dp)),
        lambda datasets: datasets_digest(tokenizer, datasets))


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
        raise DataError("The processes read different corpora or tokenizers under the same names; copy the same files "
                        "to every machine")
    assert found is not None
    return found


def train(config: RunConfig, tokenizer: Tokenizer | None, place: Launch, prepare: Prepare) -> int:
    """Run this process and return its exit code.

    Args:
        tokenizer: None for models that read no text.
        prepare: reads the data once the process group exists, and completes the settings with what follows from them.

    Raises:
        UserError: an error that the user can fix.
    """
    with StopWatcher(config.training) as watcher:
        runtime = launch.start(config, place)
        try:
            return watched_train(config, tokenizer, runtime, prepare, watcher)
        except Exception as error:
            if lost_peer(error):
                end_soon(runtime.siblings)
            raise


def watched_train(config: RunConfig, tokenizer: Tokenizer | None, runtime: Runtime, prepare: Prepare,
                  watcher: StopWatcher) -> int:
    """The part of `train` after the process group exists."""
    place = runtime.launch
    console = Console(place.rank == 0)
    group = checkpoint_group(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    if config.checkpoint.save is not None:
        probe_writable(Path(config.checkpoint.save), group)
        if place.rank == 0:
            clear_exit_record(config.checkpoint.save)
    native.tell(console)
    config, datasets = prepare(config, runtime, console)
    model = build_model(config, runtime.mesh, runtime.device)
    if config.token_drop.policy == "importance" and tokenizer is not None:
        model.choose_by(importance_table(config, tokenizer, runtime.device))
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
    state = restore(config, model, optimizer, group, console)
    check_samples_read(config, runtime.mesh.dp_size, state)
    writer, best = None, None
    if config.checkpoint.save is not None:
        writer = CheckpointWriter(Path(config.checkpoint.save), group, config.checkpoint.async_save,
                                  config.checkpoint.save_retain_interval, console)
        best = best_writer(config, group, console)
    metrics = open_metrics(config, console, state.consumed.steps)
    mesh = runtime.mesh
    console.line(f"{launch.describe_host()}: {place.world_size} processes on {runtime.device.type}, "
                 f"tp {mesh.tp_size} x pp {mesh.pp_size} x dp {mesh.dp_size}, {config.training.precision}, "
                 f"{optimizer.description}, configuration {config.digest()[:12]}")
    if mesh.pp_size > 1:
        line, warning = describe_pipeline(config, mesh.dp_size)
        console.line(line)
        if warning is not None:
            console.warn(warning)
    try:
        code = Trainer(config, runtime, model, optimizer, datasets, state, metrics, writer, best).run(watcher)
    except UserError:
        if writer is not None:
            finish_quietly(writer, console)
        raise
    if place.rank == 0:
        reasons = {EXIT_COMPLETE: "complete", 10: "stopped by a signal", 11: "interval or duration reached"}
        write_exit_record(config.checkpoint.save, code, state.consumed.steps, reasons[code])
    # A launcher kills all processes as soon as one exits with a code other than 0, so none exits before all are done.
    gather_json(code)
    return code


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


def main(arguments: list[str] | None, family: Family) -> int:
    """Run and return the exit code."""
    return run_recipe(arguments, lambda words, console: read_settings(words, family, console), pretraining_violations,
                      lambda config, tokenizer, runtime, _: (config, read_datasets(config, tokenizer, runtime)))


def run_recipe(arguments: list[str] | None, read: Callable[[list[str], Console], RunConfig],
               violations: Callable[[RunConfig], Iterable[str]],
               prepare: Callable[[RunConfig, Any, Runtime, Console], tuple[RunConfig, Datasets]]) -> int:
    """Run a command line and return the exit code; errors the user can fix are printed as one message.

    Args:
        arguments: command line without the program name; None: that of this process.
        read: parses the arguments into unchecked settings.
        violations: checks of this recipe, in addition to those of every run.
        prepare: reads the data and completes the settings; it receives the tokenizer, or None for images.
    """
    place, save = Launch(), None
    try:
        place = Launch.from_environment()
        arguments = sys.argv[1:] if arguments is None else arguments
        if place.rank != 0 and asks_for_help(arguments):
            return EXIT_COMPLETE  # one process prints it
        config = read(arguments, Console(place.rank == 0))
        save = config.checkpoint.save
        refuse(violations(config))
        check(config, place.world_size)
        tokenizer = None
        if config.model.family != "vit":
            tokenizer = read_tokenizer(config)
            config = with_vocabulary(config, tokenizer)
            check(config, place.world_size)
        return train(config, tokenizer, place,
                     lambda config, runtime, console: prepare(config, tokenizer, runtime, console))
    except Exception as error:
        code = report(error, place.rank, place.world_size, save)
        if isinstance(error, UserError) and error.everywhere and not lost_peer(error):
            launch.end_restarts(place)
        return code
    finally:
        launch.stop()
