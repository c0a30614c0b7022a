"""Scores rows of tokens with the model of a checkpoint, on any tensor x pipeline x data layout.

Rows are sorted by length and cut into batches, the data-parallel ranks take batches in turn, and each token is scored
on exactly one process. Padding stands on the right, where a causal model cannot see it, so the answer to a row does not
depend on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_ltd.checkpoint.agreement import checkpoint_group
from megatron_ltd.checkpoint.io import agree_on_checkpoint
from megatron_ltd.checkpoint.layout import find_checkpoint
from megatron_ltd.checkpoint.manifest import Manifest, read_manifest
from megatron_ltd.checkpoint.saved_settings import saved_config
from megatron_ltd.config.files import CheckpointConfig, DataConfig, LoggingConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.lm_eval.decode import GREEDY, Decoder, Sampling
from megatron_ltd.lm_eval.requests import Finished, ScoredRow, ScoreRow, by_length
from megatron_ltd.log import Console
from megatron_ltd.parallel.agreement import gather_json
from megatron_ltd.settings.checks.all import check
from megatron_ltd.train import state
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.setup import Model, build_model

SPARE = ScoreRow([0, 0], 1)
"""What a data-parallel rank runs that has no batch while the others have one."""


class ModelScorer:
    """A model on this process and its peers, as the tasks see it; every process calls `score` with the same rows.

    Args:
        batch_rows: rows that a data-parallel rank runs at once; None: as many as have the tokens of a microbatch.
    """

    def __init__(self, model: Model, runtime: Runtime, config: RunConfig, batch_rows: int | None = None):
        self.model, self.runtime, self.config, self.batch_rows = model, runtime, config, batch_rows
        parallel = config.parallel
        # Between tensor-parallel regions each rank then holds an equal share of a row.
        self.slices = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        # Gathering sharded parameters takes all data-parallel ranks at once.
        self.in_step = parallel.sharding != "no_shard"
        self.decoder = Decoder(model, runtime.device, self.max_length)

    @property
    def max_length(self) -> int:
        return self.config.model.max_positions // self.slices * self.slices

    @property
    def tokenizer_config(self) -> DataConfig:
        return self.config.data

    def score(self, rows: list[ScoreRow]) -> list[ScoredRow]:
        """Answers in the order of the rows."""
        counts = [len(row.tokens) - row.first_scored for row in rows]
        starts = np.concatenate(([0], np.cumsum(counts)))
        answers = torch.zeros(2, int(starts[-1]), device=self.runtime.device)
        self.model.eval_mode()
        mesh, batches = self.runtime.mesh, self._batches([row.tokens for row in rows])
        batches += [[]] * (-len(batches) % mesh.dp_size if self.in_step else 0)
        for batch in batches[mesh.dp_rank::mesh.dp_size]:
            scored = self._forward([rows[i] for i in batch] or [SPARE])
            if scored is None or mesh.tp_rank != 0:
                continue
            for line, i in enumerate(batch):
                first, stop = rows[i].first_scored, len(rows[i].tokens)
                answers[:, starts[i]:starts[i + 1]] = scored[:, line, first - 1:stop - 1]
        self.model.after_evaluation()
        # Every place was filled by one process, and is zero on the others.
        dist.all_reduce(answers)
        logprobs, greedy = answers.cpu().numpy()
        return [ScoredRow(logprobs[starts[i]:starts[i + 1]], greedy[starts[i]:starts[i + 1]] > 0.5)
                for i in range(len(rows))]

    def generate(self, texts: list[list[int]], new_tokens: int, eod: int, finished: Finished,
                 sampling: Sampling = GREEDY) -> list[list[int]]:
        """What follows each text; data-parallel ranks take batches in turn, or each all of them if they must gather
        parameters together for every token."""
        mine: list[tuple[int, list[int]]] = []
        mesh, batches = self.runtime.mesh, self._batches(texts, new_tokens)
        for batch in batches if self.in_step else batches[mesh.dp_rank::mesh.dp_size]:
            answers = self.decoder.generate([texts[i] for i in batch], new_tokens, sampling, eod=eod,
                                            finished=finished)
            mine += zip(batch, answers, strict=True)
        found = {i: answer for answers in gather_json(mine) for i, answer in answers}
        return [found[i] for i in range(len(texts))]

    def _batches(self, texts: Sequence[Sequence[int]], new_tokens: int = 0) -> list[list[int]]:
        """The places of the texts that are run together: those of similar length."""
        order, batches = by_length(texts), []
        microbatch_tokens = self.config.training.micro_batch_size * self.config.model.seq_length
        while order:
            rows = self.batch_rows or max(1, microbatch_tokens // (len(texts[order[0]]) + new_tokens))
            batches.append(order[:rows])
            order = order[rows:]
        return batches

    def _forward(self, rows: Sequence[ScoreRow]) -> torch.Tensor | None:
        """Log-probability and greediness of the scored tokens, at the place before each; None off the last stage.

        Shapes:
            -> [2, rows, longest - 1]
        """
        length = -(-(len(rows[0].tokens) - 1) // self.slices) * self.slices
        tokens = torch.zeros(len(rows), length + 1, dtype=torch.int64)
        scored = torch.zeros(len(rows), length)
        for line, row in enumerate(rows):
            tokens[line, :len(row.tokens)] = torch.tensor(row.tokens)
            scored[line, row.first_scored - 1:len(row.tokens) - 1] = 1.0
        tokens = tokens.to(self.runtime.device)
        facts = {"labels": tokens[:, 1:].contiguous(), "loss_mask": scored.to(self.runtime.device),
                 "sample_ids": torch.zeros(len(rows), dtype=torch.int64, device=self.runtime.device)}
        return self.model.pipeline.forward(tokens[:, :-1].contiguous(), facts)


class CheckpointScorer(ModelScorer):
    """A model that was loaded from a checkpoint."""

    def __init__(self, model: Model, runtime: Runtime, config: RunConfig, batch_rows: int, manifest: Manifest):
        super().__init__(model, runtime, config, batch_rows)
        self.manifest = manifest


def scoring_config(saved: RunConfig, *, tensor_parallel: int, pipeline_parallel: int, batch_rows: int,
                   world_size: int) -> RunConfig:
    """The saved run's model and precision on another layout.

    Raises:
        ConfigError: the model does not fit the layout, or predicts no next token.
    """
    if saved.model.family != "gpt":
        raise ConfigError(f"the checkpoint holds a model of the family {saved.model.family}, which does not predict "
                          "the next token; score a GPT")
    dp = max(1, world_size // (tensor_parallel * pipeline_parallel))
    config = replace(
        saved, token_drop=TokenDropConfig(), checkpoint=CheckpointConfig(), logging=LoggingConfig(),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor_parallel,
                                pipeline_model_parallel_size=pipeline_parallel,
                                distributed_timeout_minutes=saved.parallel.distributed_timeout_minutes),
        training=replace(saved.training, micro_batch_size=batch_rows, rampup_batch_size=None, compile=False,
                         global_batch_size=batch_rows * dp * pipeline_parallel, train_iters=1, train_samples=None,
                         train_tokens=None, train_epochs=None),
        optimizer=OptimizerConfig(lr=1.0))
    try:
        # What an imported model does not say, budget, learning rate and corpus, plays no part here.
        check(replace(config, data=DataConfig(mock_data=True)), world_size)
    except ConfigError as error:
        raise ConfigError(f"the checkpoint's model cannot be scored on this layout.\n{error}") from error
    return config


def build_scorer(load_dir: str, *, step: int | None, tensor_parallel: int, pipeline_parallel: int,
                 micro_batch_size: int) -> CheckpointScorer:
    """Start the process group and load the model that a checkpoint's manifest describes.

    Args:
        step: this checkpoint rather than the newest.
        micro_batch_size: rows that a data-parallel rank runs at once.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigError: its model does not fit the layout, or these processes have a model already.
    """
    place = Launch.from_environment()
    console = Console(place.rank == 0)
    if place.world_size == 1:
        launch.stop()  # one process may score checkpoints in turn
    elif dist.is_initialized():
        raise ConfigError(f"{load_dir} cannot be loaded: these {place.world_size} processes have a model already. "
                          "Score one checkpoint a command, or several on one process.")
    path = find_checkpoint(Path(load_dir), step, console)
    config = scoring_config(saved_config(read_manifest(path), path), tensor_parallel=tensor_parallel,
                            pipeline_parallel=pipeline_parallel, batch_rows=micro_batch_size,
                            world_size=place.world_size)
    runtime = launch.start(config, place)
    group = checkpoint_group(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    path = agree_on_checkpoint(Path(load_dir), group, step, Console(False))
    model = build_model(config, runtime.mesh, runtime.device, draw=False, decodes=True)
    manifest = state.load(path, model, None, group)
    return CheckpointScorer(model, runtime, config, micro_batch_size, manifest)
