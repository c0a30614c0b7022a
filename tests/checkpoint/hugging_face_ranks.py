"""An imported model saved again by several ranks; apart from the tests, whose imports a rank would have to repeat."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_ltd.checkpoint.layout import find_checkpoint
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import OptimizerConfig
from megatron_ltd.lm_eval.scorer import scoring_config
from megatron_ltd.train import state
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.setup import build_model
from megatron_ltd.train.state import TrainState


def save_again(rank: int, world_size: int, init_method: str, source: str, target: str, tp: int, pp: int) -> None:
    """Load on tp x pp and save, as a run would that has not taken a step."""
    path = find_checkpoint(Path(source))
    saved = RunConfig.from_dict(read_manifest(path).config)
    # Whatever the model predicts: the layout's checks know nothing of it.
    config = scoring_config(replace(saved, model=replace(saved.model, family="gpt"), optimizer=OptimizerConfig(lr=1.0)),
                            tensor_parallel=tp, pipeline_parallel=pp, batch_rows=1, world_size=world_size)
    config = replace(config, model=saved.model)
    runtime = launch.start(config, Launch(rank, rank, world_size, init_method))
    model = build_model(config, runtime.mesh, runtime.device, draw=False)
    state.load(path, model, None, dist.group.WORLD)
    writer = CheckpointWriter(Path(target), dist.group.WORLD)
    writer.save(0, state.named_tensors(model, None, 0), config=saved.to_dict(), counters=TrainState().counters())
    writer.close()
    launch.stop()
