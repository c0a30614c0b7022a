"""What the programs that train have in common: from the command line to the exit code.

Settings and tokenizer are read and checked before torch is imported, so that a mistake is answered at once.
"""

import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from megatron_ltd.checkpoint.layout import holds_nothing
from megatron_ltd.checkpoint.remote import with_local_checkpoint
from megatron_ltd.checkpoint.saved_settings import with_checkpoint_model
from megatron_ltd.config.model import Family
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.text.beginning import token_notes
from megatron_ltd.data.text.tokenizer import NullTokenizer, Tokenizer, build_tokenizer, tokenizer_of_model
from megatron_ltd.errors import EXIT_COMPLETE, EXIT_ON_INTERVAL, CheckpointError, ConfigError, UserError
from megatron_ltd.log import Console
from megatron_ltd.settings.checks.all import check, notes, refuse, violations
from megatron_ltd.settings.checks.files import misses_checkpoint, missing_files, refuse_missing_files
from megatron_ltd.settings.checks.idle import left_to_checkpoint
from megatron_ltd.settings.checks.rules import finetuning_violations, pretraining_violations
from megatron_ltd.settings.checks.vision import with_image_sizes
from megatron_ltd.settings.cli import asks_for_help, parse_run_config
from megatron_ltd.train.process.elastic import placed, wait_as_spare
from megatron_ltd.train.process.environment import Launch, end_restarts
from megatron_ltd.train.process.exits import leave, lost_peer, report
from megatron_ltd.train.process.stopping import StopWatcher
from megatron_ltd.train.task_scores import PlanTasks, TaskPlan

START_TOKENS = 128


@dataclass(frozen=True)
class Recipe:
    """A program that trains.

    Args:
        family: of its models.
        finetuning: whether it reads whole epochs and keeps the best model.
        plan_tasks: finds the tasks of --eval-tasks; None for models that are not scored.
    """

    family: Family
    finetuning: bool = False
    plan_tasks: PlanTasks | None = None

    def run(self, arguments: list[str] | None = None, place: Launch | None = None) -> NoReturn:
        """`main` as a program, which ends with the run. A signal that asks for a stop once the run has ended, while the
        process is on its way out, changes nothing."""
        leave(self.main(arguments, place, leaves=True))

    def main(self, arguments: list[str] | None = None, place: Launch | None = None, *, only_check: bool = False,
             leaves: bool = False) -> int:
        """Run a command line and return the exit code; errors the user can fix are printed as one message.

        Args:
            arguments: without the program's name; None: those of this process.
            place: of this process in the run; None: what the environment says.
            only_check: return once the settings are known to be sound, without a word.
            leaves: keep the run's handlers of signals when it has ended, for a process that ends with it.
        """
        here, save, failed = Launch(), None, True
        try:
            here = place or Launch.from_environment()
            arguments = sys.argv[1:] if arguments is None else arguments
            if here.rank != 0 and asks_for_help(arguments):
                return EXIT_COMPLETE  # one process prints it
            console = Console(here.rank == 0 and not only_check)
            if here.most is not None:
                here = self._placed(arguments, here)
            config = self.read_settings(arguments, console, here.world_size)
            save = config.checkpoint.save
            config, tokenizer = self.checked(config, here.world_size)
            of_tokens = [] if tokenizer is None else token_notes(config.data, tokenizer)
            for note in [*notes(config, here.world_size), *of_tokens]:
                console.line(note)
            tasks = self.plan_tasks(config) if self.plan_tasks and config.logging.eval_tasks is not None else None
            if only_check:
                return EXIT_COMPLETE
            timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
            spare = here.rank >= here.world_size
            code = wait_as_spare(here, timeout) if spare else self._train(config, tokenizer, here, tasks, leaves)
            if here.most is not None and code == EXIT_ON_INTERVAL:
                end_restarts(here)
            failed = False
            return code
        except Exception as error:
            code = report(error, here.rank, here.world_size, save)
            if isinstance(error, UserError) and error.everywhere and not lost_peer(error):
                end_restarts(here)
            return code
        finally:
            if "torch" in sys.modules:
                from megatron_ltd.train.process import launch

                launch.stop(failed=failed)

    def _placed(self, arguments: list[str], here: Launch) -> Launch:
        """This process's place in an elastic run; what is wrong for any number of processes is told later."""
        assert here.most is not None
        config = self.read_settings(arguments, Console(False), here.most)
        if self._violations(config, here.most):
            return here
        return placed(here, lambda processes: not self._violations(config, processes))

    def read_settings(self, arguments: list[str], console: Console, world_size: int) -> RunConfig:
        """The unchecked settings of a run.

        Raises:
            UserError: flags or files that cannot be read, or a checkpoint of another family.
        """
        config, said = parse_run_config(arguments, self.family, finetuning=self.finetuning,
                                        also=lambda config: self._problems(config, world_size))
        for note in said:
            console.line(note)
        return self.completed(config, console)

    def completed(self, config: RunConfig, console: Console) -> RunConfig:
        """The settings with those of the checkpoint that the run starts from, if it asks for them, and the recipe's own
        defaults.

        Raises:
            UserError: a checkpoint that is missing, damaged, or of another family.
        """
        config = with_local_checkpoint(config)
        if self.finetuning:
            config = from_pretrained(config, console)
        asked, given = config, config.model
        if config.checkpoint.use_checkpoint_args and misses_checkpoint(config):
            refuse_missing_files(config)
        config = with_checkpoint_model(config)
        if config.model.family != self.family:
            raise CheckpointError(f"--load = {config.checkpoint.load}: the checkpoint holds a {config.model.family} "
                                  f"model; continue it with {program_of(config.model.family, self.finetuning)}")
        if self.family == "vit":
            config = replace(config, model=with_image_sizes(config.model, given))
        if self.finetuning and config.checkpoint.use_checkpoint_args and self.family == "gpt" and given.seq_length:
            # Samples may be shorter than those the model was trained on; its number of positions stays.
            positions = config.model.max_positions
            config = replace(config, model=replace(config.model, seq_length=given.seq_length,
                                                   max_position_embeddings=positions))
        for note in left_to_checkpoint(asked, config):
            console.line(note)
        return with_start_length(config) if self.finetuning else config

    def _problems(self, config: RunConfig, world_size: int) -> list[str]:
        """Contradictions, and missing files beside them."""
        return [*self._violations(config, world_size), *missing_files(config)]

    def _violations(self, config: RunConfig, world_size: int) -> list[str]:
        of_recipe = finetuning_violations if self.finetuning else pretraining_violations
        return [*of_recipe(config), *violations(config, world_size)]

    def checked(self, config: RunConfig, world_size: int) -> tuple[RunConfig, Tokenizer | None]:
        """The settings with the size of the vocabulary, and the tokenizer; None for models that read no text.

        Raises:
            UserError: settings that cannot run on so many processes, or a tokenizer that cannot be read.
        """
        if self._violations(config, world_size):
            refuse(self._problems(config, world_size))
        refuse_missing_files(config)
        if self.family == "vit":
            return config, None
        tokenizer = read_tokenizer(config)
        vocab_size = max(config.model.vocab_size or 0, tokenizer.vocab_size)
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
        check(config, world_size)
        return config, tokenizer

    def _train(self, config: RunConfig, tokenizer: Tokenizer | None, place: Launch, tasks: TaskPlan | None,
               leaves: bool) -> int:
        from megatron_ltd.train import pretrain  # only here: it imports torch

        prepare = pretrain.prepare
        if self.finetuning:
            from megatron_ltd.train.finetune import prepare  # only here: it imports more than pretraining needs
        with StopWatcher(config.training, leaves) as watcher:
            return pretrain.train(config, tokenizer, place, prepare, watcher, tasks)


def program_of(family: Family, finetuning: bool) -> str:
    """The program that trains models of a family; BERT is only pretrained, ViT has one for both."""
    kind = {"bert": "pretrain", "vit": "finetune"}.get(family, "finetune" if finetuning else "pretrain")
    return f"megatron_ltd.{kind}_{family}"


def read_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer; for --mock-data without one, the numbers below --vocab-size."""
    kind, vocab_size = config.data.tokenizer_type, config.model.vocab_size
    if vocab_size is not None and config.data.mock_data and kind is None:
        return NullTokenizer(vocab_size - 1)
    if config.checkpoint.use_checkpoint_args:
        grows = config.checkpoint.finetune and config.checkpoint.resize_vocabulary
        return tokenizer_of_model(config.data, vocab_size, grows=grows)
    return build_tokenizer(config.data, vocab_size)


def from_pretrained(config: RunConfig, console: Console) -> RunConfig:
    """With --pretrained-checkpoint, the run starts from it as long as --load holds no checkpoint."""
    settings = config.checkpoint
    if settings.pretrained_checkpoint is None:
        return config
    if settings.finetune and settings.load is not None:
        raise ConfigError(f"--finetune is given with --pretrained-checkpoint = {settings.pretrained_checkpoint}: the "
                          f"model to start from would be both that and --load = {settings.load}; leave --finetune out")
    if settings.load is not None and not holds_nothing(Path(settings.load)):
        console.line(f"continuing from --load = {settings.load}; --pretrained-checkpoint is ignored")
        return config
    return replace(config, checkpoint=replace(settings, load=settings.pretrained_checkpoint, finetune=True))


def with_start_length(config: RunConfig) -> RunConfig:
    """By default random-LTD keeps 128 tokens at first, or half of a shorter sample, in whole strata."""
    drop, length = config.token_drop, config.model.seq_length
    if drop.policy != "random" or drop.random_ltd_start_length is not None or drop.random_ltd_length_list is not None:
        return config
    strata = max(1, drop.random_ltd_strata)
    start = max(strata, min(START_TOKENS, length // 2) // strata * strata)
    return replace(config, token_drop=replace(drop, **{"random_ltd_start_length": start}))
