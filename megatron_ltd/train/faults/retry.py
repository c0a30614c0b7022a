"""Tells a hardware fault from bad data, by computing again a step whose loss or gradient norm was not finite.

    finite the second time                                 a fault that has passed; the data are sound
    not finite, and on other samples too, in one replica   that replica's hardware
    otherwise                                              the data, or weights that have diverged

Kernels may differ in the last bits from run to run, so finite is compared with not finite. Ordinary steps pay nothing:
each process keeps its own part of the loss on the device, and it is read and gathered only here.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.loader import microbatches
from megatron_ltd.data.sample import Dataset
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.agreement import gather_json
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.result import Launched, StepResult
from megatron_ltd.train.setup import Model
from megatron_ltd.train.step import train_step


@dataclass(frozen=True)
class Verdict:
    """Where numbers that are not finite came from.

    Args:
        passed: the step was finite the second time.
        is_hardware: one replica fails whatever its samples are.
        ranks: of the replicas whose part of the loss was not finite; empty if that is none or all of several, as when
            only the gradients were not finite, which are sums over replicas.
        hosts: of these.
    """

    passed: bool
    is_hardware: bool
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]

    @property
    def place(self) -> str:
        """In words."""
        if not self.ranks:
            return "a rank that cannot be told, since only sums over all were not finite"
        one_of = "rank" if len(self.ranks) == 1 else "one of the ranks"
        return f"{one_of} {', '.join(map(str, self.ranks))} on {', '.join(self.hosts)}"


@dataclass(frozen=True)
class Retry:
    """Computes steps of a run again, without an update; every method is called by all processes."""

    config: RunConfig
    runtime: Runtime
    model: Model
    optimizer: ShardedOptimizer
    dataset: Dataset

    def judge(self, launched: Launched) -> Verdict:
        """Where the numbers of this step that are not finite came from. The step after it may have been applied."""
        before = self._failing(launched.result)
        again = self._again(launched, 0)
        if again.updated:
            return self._verdict(before, passed=True, is_hardware=False)
        failing = self._failing(again)
        one_sided = 0 < len(failing) < self.runtime.mesh.dp_size
        stays = one_sided and self._failing(self._again(launched, 1)) == failing
        return self._verdict(failing, passed=False, is_hardware=stays)

    def _again(self, launched: Launched, shift: int) -> StepResult:
        """The result of the step if each replica takes the samples of the one so many places after it."""
        mesh, samples = self.runtime.mesh, launched.samples
        batch = microbatches(self.dataset, launched.consumed.samples - samples, samples,
                             self.config.training.micro_batch_size, (mesh.dp_rank + shift) % mesh.dp_size, mesh.dp_size)
        return train_step(self.model, self.optimizer, batch, self.config, launched.plan, learning_rate=launched.rate,
                          loss_scale=launched.loss_scale, stop_level=0, device=self.runtime.device,
                          decoupled_rate=launched.decoupled, update=False)

    def _failing(self, result: StepResult) -> set[int]:
        """The data-parallel ranks whose own part of the loss is not finite."""
        return {replica for replica, finite in gather_json([self.runtime.mesh.dp_rank, result.own_part_is_finite])
                if not finite}

    def _verdict(self, failing: Collection[int], *, passed: bool, is_hardware: bool) -> Verdict:
        replicas = gather_json(self.runtime.mesh.dp_rank)
        if self.runtime.mesh.dp_size == 1:
            failing = {0}
        elif len(failing) == self.runtime.mesh.dp_size:
            failing = ()
        ranks = tuple(rank for rank, replica in enumerate(replicas) if replica in failing)
        return Verdict(passed, is_hardware, ranks, tuple(dict.fromkeys(self.runtime.hosts[rank] for rank in ranks)))
