"""What becomes of a step that is not finite, and of one whose loss jumps: the next one, a rollback, or the end.

Decisions follow from numbers that all processes share, so all of them decide alike.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.errors import DivergenceError, HardwareError, UserError
from megatron_ltd.log import Console
from megatron_ltd.train.faults.retry import Retry, Verdict
from megatron_ltd.train.faults.spikes import ROLLBACKS, SpikeWatch, suspects
from megatron_ltd.train.result import Launched
from megatron_ltd.train.state import TrainState

PASSING_FAULTS = 2
"""In one place, at the last of which it is taken for broken."""


class RollBack(Exception):
    """Return to the newest checkpoint, and go on from there without the samples of some steps."""

    def __init__(self, skip: range):
        super().__init__(f"return to the newest checkpoint and skip steps {skip}")
        self.skip = skip


@dataclass
class BadSteps:
    """Judges the steps of a run.

    Args:
        spikes: None without --on-loss-spike.
        passed: faults that had passed when their step was computed again, by place.
        rollbacks: because of a spike, to the newest checkpoint.
    """

    config: TrainingConfig
    console: Console
    retry: Retry
    spikes: SpikeWatch | None
    passed: Counter[str] = field(default_factory=Counter)
    rollbacks: int = 0
    in_spike: bool = False

    def saved(self) -> None:
        """There is a new checkpoint."""
        self.rollbacks = 0

    def nonfinite(self, launched: Launched, scale: float, state: TrainState, checkpoint: int | None) -> None:
        """Judge a step that was not finite and so was not applied.

        Args:
            checkpoint: step of the newest one that the run can return to; None without.

        Raises:
            RollBack: it was a fault that has passed.
            HardwareError: it was not the first of its place.
            DivergenceError: it was the data, or the model, and too often in a row.
        """
        result, allowed, in_a_row = launched.result, self.config.skip_nonfinite, state.faults.nonfinite + 1
        found = (f"step {launched.step}: loss {result.loss}, gradient norm {result.gradient_norm}, loss scale {scale}: "
                 "not finite, so the step was not applied")
        verdict = self.retry.judge(launched)
        if verdict.passed:
            self._passing_fault(launched.step, f"{found}. Computed again it is finite, so it is not the data but a "
                                f"fault of {verdict.place}", verdict, checkpoint)
        elif verdict.is_hardware:
            raise _at(launched.step, HardwareError(
                f"{found}. {verdict.place.capitalize()} is not finite with other samples either, and the others are: "
                "replace this machine, and continue with the same command"))
        elif in_a_row > allowed:
            newest = "newest checkpoint" if checkpoint is None else f"checkpoint of step {checkpoint}"
            raise _at(launched.step, DivergenceError(
                f"{found}, and it is not finite when it is computed again. Continue from the {newest} with a lower "
                "--lr, a smaller --clip-grad, or --bf16; or skip the samples of the step with --iterations-to-skip "
                f"{launched.step - 1}"))
        else:
            state.faults = replace(state.faults, nonfinite=in_a_row)
            self.console.warn(f"{found}; {in_a_row} of at most {allowed} in a row (--skip-nonfinite)")

    def _passing_fault(self, step: int, found: str, verdict: Verdict, checkpoint: int | None) -> None:
        self.passed[verdict.place] += 1
        if self.passed[verdict.place] >= PASSING_FAULTS:
            raise _at(step, HardwareError(f"{found}, for the second time: replace this machine, and continue with the "
                                          "same command"))
        if checkpoint is None:
            self.console.warn(f"{found}. There is no checkpoint to return to, so the run goes on without this update")
            return
        self.console.warn(f"{found}. The run returns to the checkpoint of step {checkpoint}")
        raise RollBack(range(0))

    def score(self, launched: Launched, state: TrainState) -> float | None:
        """How far the loss of a step that was applied lies above those before it, in standard deviations; None if that
        is not asked or cannot be told yet. The loss is added to those that later ones are compared with."""
        state.faults = replace(state.faults, nonfinite=0)
        if self.spikes is None:
            return None
        state.faults, score = self.spikes.after(state.faults, launched.step, launched.result.loss)
        return score

    def spike(self, launched: Launched, score: float | None, checkpoint: int | None) -> None:
        """Judge a step by its score.

        Raises:
            RollBack: with --on-loss-spike skip.
        """
        was_in_spike, self.in_spike = self.in_spike, score is not None and score > self.config.loss_spike_threshold
        if not self.in_spike or (was_in_spike and self.config.on_loss_spike == "warn"):
            return
        found = (f"step {launched.step}: loss {launched.result.loss:.6f} lies {score:.1f} standard deviations above "
                 "the median of the steps before it (--on-loss-spike)")
        if self.config.on_loss_spike == "warn":
            self.console.warn(found)
        elif checkpoint is None or self.rollbacks == ROLLBACKS:
            why = "there is no checkpoint to return to" if checkpoint is None else \
                f"it still does after {ROLLBACKS} returns to the checkpoint of step {checkpoint}"
            self.console.warn(f"{found}; {why}, so the run goes on")
        else:
            skip = suspects(launched.step, checkpoint, self.rollbacks)
            self.rollbacks += 1
            self.console.warn(f"{found}; the run returns to the checkpoint of step {checkpoint} and skips the samples "
                              f"of steps {skip.start} to {skip.stop - 1}")
            raise RollBack(skip)


def _at(step: int, error: UserError) -> UserError:
    error.step = step
    return error
