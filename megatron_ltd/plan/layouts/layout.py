"""How a run is laid out over its processes, as the numbers from which memory and time follow."""

from dataclasses import dataclass
from functools import cached_property

from megatron_ltd.config.run import RunConfig
from megatron_ltd.parallel.partition import ZERO_BUBBLE, stage_spans, stages_of_rank
from megatron_ltd.plan.derived import global_batch_size, virtual_chunks, whole_backward
from megatron_ltd.plan.layouts.in_flight import Schedule
from megatron_ltd.plan.layouts.pipeline_costs import pipeline_layers


@dataclass(frozen=True)
class Layout:
    """Args:
        tp, pp, dp: sizes of the axes.
        schedule: a value of --pipeline-schedule.
        split: layers of each stage, in order of depth.
        sharding: a value of --data-parallel-sharding-strategy.
        recompute: a value of --recompute-granularity.
        micro_samples: samples of a microbatch.
        microbatches: of a step, on each process.
        splits_backward: a zero-bubble schedule runs the weights' part of the backward pass later.
    """

    tp: int
    pp: int
    dp: int
    schedule: str
    split: tuple[int, ...]
    sharding: str
    sequence_parallel: bool
    recompute: str
    micro_samples: int
    microbatches: int
    splits_backward: bool = False

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> "Layout":
        """That of settings which pass the checks."""
        parallel, micro = config.parallel, config.training.micro_batch_size
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        dp = world_size // (tp * pp)
        zero_bubble = pp > 1 and parallel.pipeline_schedule in ZERO_BUBBLE
        split = pipeline_layers(config, dp) if pp > 1 else (config.model.num_layers,)
        assert len(split) == pp * virtual_chunks(config)
        return cls(tp, pp, dp, parallel.pipeline_schedule if pp > 1 else "1f1b", split, parallel.sharding,
                   parallel.sequence_parallel and tp > 1, parallel.recompute, micro,
                   max(1, global_batch_size(config, dp) // (micro * dp)),
                   zero_bubble and not whole_backward(config, dp))

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def shares(self) -> int:
        """In how many parts data parallelism shards gradients and the optimizer's state."""
        return 1 if self.sharding == "no_shard" else self.dp

    @property
    def slices(self) -> int:
        """In how many parts the residual stream is split."""
        return self.tp if self.sequence_parallel else 1

    @property
    def chunks(self) -> int:
        """Model chunks of a process."""
        return len(self.split) // self.pp

    @property
    def order(self) -> Schedule:
        return Schedule(self.schedule, self.pp, self.chunks, self.microbatches, self.splits_backward)

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        return stage_spans(list(self.split))

    def stages(self, rank: int) -> list[tuple[int, int]]:
        """First layer and end of each stage of a process of the pipeline, in order of depth."""
        return [self._spans[stage] for stage in stages_of_rank(self.schedule, rank, self.pp, self.chunks)]
