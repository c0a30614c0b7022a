"""What is planned: the settings of a run, the cluster, and the layout, from a command line."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ltd.checkpoint.convert.huggingface.config import model_config
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from megatron_ltd.plan.derived import data_parallel_size
from megatron_ltd.plan.layouts.cluster import Cluster, known_cluster, read_cluster
from megatron_ltd.plan.layouts.search import given_settings, laid_out
from megatron_ltd.settings.checks.all import BUDGETS, check
from megatron_ltd.settings.checks.rules import given
from megatron_ltd.settings.cli import parse_run_config
from megatron_ltd.train.process.recipe import Recipe
from tools.commands.run_flags import completed, flags_of, with_learning_rate, without_files

RECIPES = {"pretrain_gpt": Recipe("gpt"), "pretrain_bert": Recipe("bert"),
           "finetune_gpt": Recipe("gpt", finetuning=True), "finetune_vit": Recipe("vit", finetuning=True)}
"""Programs whose runs can be planned, by the name of their module."""


@dataclass(frozen=True)
class Planned:
    """Args:
        config: complete enough to calculate with.
        given: as they were given, with files and without what was completed.
        recipe: name of the program.
        has_budget: the length of the run is given.
        searches: the layout is to be found.
        gpus_follow: the number of accelerators is that of one replica.
    """

    config: RunConfig
    given: RunConfig
    cluster: Cluster
    recipe: str
    has_budget: bool
    searches: bool
    gpus_follow: bool = False


def read_plan(flags: list[str], *, recipe: str, gpus: int | None, gpu: str, cluster_file: str | None,
              hf_config: str | None, epoch_samples: int | None, searches: bool, console: Console) -> Planned:
    """Raises:
        ConfigError: settings or a cluster that cannot be.
        CheckpointError: the settings are to be a checkpoint's, which cannot be read.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"--script: it runs {recipe}, which is not planned here; name with --program what it is "
                          f"like: {', '.join(RECIPES)}")
    if cluster_file is None:
        cluster = known_cluster(1 if gpus is None else gpus, gpu)
    else:
        cluster = read_cluster(Path(cluster_file), gpus)
    given_run, config = _read_run(flags, RECIPES[recipe], hf_config, console)
    config, has_budget = _with_length(config, epoch_samples, console)
    config = with_learning_rate(without_files(config))
    if searches:
        _tell_ignored(config, console)
        config = laid_out(config, given_settings(RunConfig(model=config.model)))
        if config.training.global_batch_size is None:
            raise ConfigError("--search needs --global-batch-size, the samples of a step, so that layouts are compared "
                              "on equal steps; add it")
    elif gpus is None and cluster_file is None:
        cluster = replace(cluster, gpus=config.parallel.tensor_model_parallel_size
                          * config.parallel.pipeline_model_parallel_size)
    world_size = 1 if searches else cluster.gpus
    check(config, world_size)
    if RECIPES[recipe].finetuning:
        from megatron_ltd.train.finetune import with_epoch  # imports torch

        config = with_epoch(config, epoch_samples or 1, data_parallel_size(config, world_size))
        check(config, world_size)
    return Planned(config, given_run, cluster, recipe, has_budget, searches,
                   gpus is None and cluster_file is None and not searches)


def _read_run(flags: list[str], recipe: Recipe, hf_config: str | None,
              console: Console) -> tuple[RunConfig, RunConfig]:
    """The settings of the run as given, and completed. What the user should be told about them is printed."""
    given_names = {word.split("=")[0].replace("_", "-") for word in flags if word.startswith("--")}
    words = [] if hf_config is None else shlex.split(" ".join(described_by(Path(hf_config), given_names)))
    config, notes = parse_run_config([*words, *flags], recipe.family, finetuning=recipe.finetuning)
    for note in notes:
        console.line(note)
    return config, completed(recipe, config, console)


def _tell_ignored(config: RunConfig, console: Console) -> None:
    """Which settings of a layout are given beside a search."""
    found = given(config, " ".join((*given_settings(config), "use_distributed_optimizer", "recompute_activations")))
    if found:
        names = ", ".join(flag.spoken(flag.of(config)) for flag in found)
        console.line(f"--search chooses the layout, so these have no effect on it: {names}. Without --search they are "
                     "planned as they are")


def _with_length(config: RunConfig, epoch_samples: int | None, console: Console) -> tuple[RunConfig, bool]:
    """The settings of a run whose length can be told, and whether it is the real one."""
    training = config.training
    if epoch_samples is not None:
        if training.train_epochs is None or epoch_samples < 1:
            raise ConfigError(f"--epoch-samples = {epoch_samples}: the samples of an epoch, at least 1, for a run of "
                              "--train-epochs; add that, or leave it out")
        return replace(config, training=replace(training, epoch_samples=epoch_samples)), True
    if training.train_epochs is not None:
        console.line(f"--train-epochs = {training.train_epochs}: how many steps that is follows from the data, which "
                     "are not read; one step is planned. For the whole run give --epoch-samples N")
        training = replace(training, train_epochs=None)
    if given(replace(config, training=training), BUDGETS):
        return config, True
    return replace(config, training=replace(training, train_iters=1)), False


def described_by(path: Path, given_names: set[str]) -> list[str]:
    """The flags of the model that a Hugging Face config.json describes, without those that are given.

    Raises:
        ConfigError: the file cannot be read.
        CheckpointError: the model is not supported.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--hf-config = {path}: cannot be read as JSON: {error}; give a model's config.json"[:500]
                          ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"--hf-config = {path}: holds no JSON object; give a model's config.json")
    model: ModelConfig = model_config(content, path)
    if "--seq-length" in given_names:
        model = replace(model, max_position_embeddings=max(model.max_positions, 1))
    return [text for text in flags_of(RunConfig(model=model), ("model",)) if text.split()[0] not in given_names]
