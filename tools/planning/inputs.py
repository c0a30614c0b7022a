"""What is planned: the settings of a run, the cluster, and the layout, from a command line."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ltd.checkpoint.convert.huggingface.config import model_config
from megatron_ltd.config import ModelConfig, RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from megatron_ltd.plan.cluster import Cluster, known_cluster, read_cluster
from megatron_ltd.settings.checks.all import BUDGETS, check
from megatron_ltd.settings.checks.rules import given
from megatron_ltd.settings.cli import parse_run_config
from tools.run_flags import flags_of, with_learning_rate, without_files


@dataclass(frozen=True)
class Planned:
    """Args:
        config: complete enough to calculate with.
        has_budget: the length of the run is given.
        has_rate: the learning rate is given.
        searches: the layout is to be found.
    """

    config: RunConfig
    cluster: Cluster
    family: str
    has_budget: bool
    has_rate: bool
    searches: bool


def read_plan(flags: list[str], *, family: str, gpus: int | None, gpu: str, cluster_file: str | None,
              hf_config: str | None, searches: bool, console: Console) -> Planned:
    """Raises:
        ConfigError: settings or a cluster that cannot be.
    """
    if cluster_file is None:
        cluster = known_cluster(1 if gpus is None else gpus, gpu)
    else:
        cluster = read_cluster(Path(cluster_file), gpus)
    given_names = {word.split("=")[0].replace("_", "-") for word in flags if word.startswith("--")}
    words = [] if hf_config is None else [word for text in described_by(Path(hf_config), given_names)
                                          for word in text.split(" ", 1)]
    config, notes = parse_run_config([*words, *flags], family)  # type: ignore[arg-type]
    for note in notes:
        console.line(note)
    has_rate = config.optimizer.lr is not None
    config = with_learning_rate(without_files(config))
    has_budget = bool(given(config, BUDGETS))
    if not has_budget:
        config = replace(config, training=replace(config.training, train_iters=1))
    if searches:
        config = replace(config, parallel=type(config.parallel)(), training=replace(
            config.training, micro_batch_size=1))
        if config.training.global_batch_size is None:
            raise ConfigError("--search needs --global-batch-size, the samples of a step, so that layouts are compared "
                              "on equal steps; add it")
        check(config, 1)
    else:
        replica = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
        if gpus is None and cluster_file is None:
            cluster = replace(cluster, gpus=replica)
        check(config, cluster.gpus)
    return Planned(config, cluster, family, has_budget, has_rate, searches)


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
