"""The training loop.

    while steps remain:
        read the step's microbatches, a function of the samples consumed so far
        choose what to compute and the learning rate, functions of the counters
        launch the step, unless it is one to skip
        read the result of the step before, which is ready by now: count; log; judge it
        at intervals: read this step's result too; validate, score tasks, save
        stop if the run is complete or was asked to stop

A step that is judged bad is left out, ends the run, or takes it back to its newest checkpoint (`faults/bad_steps.py`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ltd.checkpoint.layout import checkpoint_path
from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.build import Datasets
from megatron_ltd.data.loader import Loader
from megatron_ltd.errors import EXIT_COMPLETE
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.optim.loss_scale import after_step
from megatron_ltd.parallel.agreement import gather_json
from megatron_ltd.plan.batch_ramp import BatchRamp
from megatron_ltd.plan.derived import batch_ramp, policies, total_steps
from megatron_ltd.plan.flops import step_flops, whole_step_flops
from megatron_ltd.plan.layouts.cluster import peak_tflops
from megatron_ltd.plan.learning_rate import LearningRate
from megatron_ltd.token_drop.accounting import Consumed
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.train.best import is_finetuning
from megatron_ltd.train.faults.bad_steps import BadSteps, RollBack
from megatron_ltd.train.faults.peers import OwnTime, Peers, free_memory
from megatron_ltd.train.faults.retry import Retry
from megatron_ltd.train.faults.spikes import SpikeWatch
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.process.stopping import StopWatcher
from megatron_ltd.train.report.banner import measured_memory
from megatron_ltd.train.report.log_writers import Metrics
from megatron_ltd.train.report.metrics import StepReport
from megatron_ltd.train.report.profiling import StepProfiler
from megatron_ltd.train.report.summary import StepTimes, summary
from megatron_ltd.train.result import HeldOut, Launched
from megatron_ltd.train.resume import roll_back
from megatron_ltd.train.setup import Model
from megatron_ltd.train.state import TrainState, named_tensors
from megatron_ltd.train.step import train_step
from megatron_ltd.train.task_scores import TaskScores
from megatron_ltd.train.validate import HeldOutSets

MEASURED_STEPS = 3
"""Steps after which memory has been allocated."""


@dataclass
class Trainer:
    """One run on this process.

    Args:
        state: counters of the run; advanced by `run`.
        writer: saves checkpoints; None without --save.
        best: saves the best model of a finetuning run; None otherwise.
        score_tasks: scores the model on tasks; None without --eval-tasks.
    """

    config: RunConfig
    runtime: Runtime
    model: Model
    optimizer: ShardedOptimizer
    datasets: Datasets
    state: TrainState
    metrics: Metrics
    writer: CheckpointWriter | None
    best: CheckpointWriter | None = None
    score_tasks: Callable[[], TaskScores] | None = None

    def __post_init__(self) -> None:
        dp = self.runtime.mesh.dp_size
        consumed = self.state.consumed
        self.ramp: BatchRamp = batch_ramp(self.config, dp).going_on(consumed.steps, consumed.samples)
        self.total_steps = total_steps(self.config, dp, self.ramp)
        self.rate = LearningRate.of_run(self.config, dp, self.ramp)
        self.decoupled = self.rate.decoupled()
        self.policies = policies(self.config)
        self.peak = self.config.logging.peak_tflops
        if self.peak is None and self.runtime.device.type == "cuda":
            self.peak = peak_tflops(torch.cuda.get_device_name(self.runtime.device))
        self.saved_step = self.state.consumed.steps
        self.unreported_seconds, self.unreported_steps = 0.0, 0
        whole = self.policies.whole
        self.launched: Launched | None = None
        self.finished = 0.0
        self.loss_scale = self.state.loss_scale.on(self.runtime.device)
        self.first_step = self.state.consumed.steps
        self.to_skip = {done + 1 for done in self.config.training.iterations_to_skip or ()}
        self.own_time = OwnTime(self.model.stages, self.runtime.device.type == "cuda")
        self.held_out = HeldOutSets(self.config, self.runtime, self.model, self.datasets, self.metrics,
                                    self.ramp.full_samples)
        self.peers = Peers(self.runtime.hosts, gather_json(self.runtime.mesh.pp_rank), self.metrics.console)
        self.met_at = 0.0
        training = self.config.training
        self.bad_steps = BadSteps(
            training, self.metrics.console, Retry(self.config, self.runtime, self.model, self.optimizer,
                                                  self.datasets.train),
            SpikeWatch(training.loss_spike_window, self.policies.changes) if training.on_loss_spike else None)
        self.times = StepTimes(whole.read_tokens, step_flops(self.config, whole))

    def run(self, watcher: StopWatcher) -> int:
        """Train to the end or until asked to stop, and return the exit code.

        Args:
            watcher: outlives this call, so that a second signal does not interrupt the last save.

        Raises:
            DivergenceError: the loss or a gradient is not finite. The step is not applied and nothing is saved.
            HardwareError: the same, and not because of the data.
            CheckpointError: a checkpoint could not be written.
            DataError: a sample could not be read.
        """
        mesh = self.runtime.mesh
        with Loader(self.datasets.train, self.config.training.micro_batch_size, mesh.dp_rank, mesh.dp_size,
                    self.config.data.num_workers) as loader:
            over = self.state.consumed.steps >= self.total_steps or self._gives_up()
            code = EXIT_COMPLETE if over else None
            if self.state.consumed.steps == 0 and is_finetuning(self.config) and code is None:
                self.held_out.validation(self.state.consumed.steps)  # what the finetuning starts from
            profiler = StepProfiler(self.config.logging, self.runtime.launch.rank, self.metrics.console)
            while code is None:
                try:
                    code = self._one_step(loader, watcher)
                except RollBack as request:
                    self._roll_back(request.skip)
                profiler.step()
            profiler.close()
        if self.writer is not None:
            if self.saved_step != self.state.consumed.steps:
                self._save()
            self.writer.finish()
        for line in summary(self.state.consumed, self.config.model.num_layers, self.times):
            self.metrics.console.line(line)
        self.metrics.close()
        return code

    def _one_step(self, loader: Loader, watcher: StopWatcher) -> int | None:
        """Train one step and do what is due after it; returns the exit code if the run must stop."""
        state, started = self.state, time.monotonic()
        samples = self.ramp.at(state.consumed.samples)
        plan = self.policies.plan(state.consumed.steps)
        skipped = state.consumed.steps + 1 in self.to_skip.union(state.faults.skipped)
        flops, whole_flops = (0, 0) if skipped else (step_flops(self.config, plan), whole_step_flops(self.config, plan))
        consumed = state.consumed.after_step(plan, samples=samples, sample_flops=flops, full_sample_flops=whole_flops)
        epoch_ends = self._epochs(consumed.samples) > self._epochs(state.consumed.samples)
        if skipped:
            self._settle()
            state.consumed = consumed
            self.metrics.console.line(f"step {consumed.steps}: its {samples} samples are skipped")
            code = watcher.exit_code(consumed.steps, self.total_steps, 0)
        else:
            launched = self._launch(loader, watcher, consumed, plan, samples, started)
            state.consumed = consumed
            self._settle()
            self.launched = launched
            code = watcher.exit_code(consumed.steps, self.total_steps, launched.result.stop_level)
        logging, save_interval = self.config.logging, self.config.checkpoint.save_interval
        intervals = logging.log_interval, logging.eval_interval, logging.eval_tasks_interval, save_interval
        if code is not None or epoch_ends or any(n and consumed.steps % n == 0 for n in intervals):
            self._settle()
        return self._after_step(consumed.steps, code, epoch_ends)

    def _launch(self, loader: Loader, watcher: StopWatcher, consumed: Consumed, plan: StepPlan, samples: int,
                started: float) -> Launched:
        """Launch the next step.

        Args:
            consumed: by the end of it.
        """
        rate, decoupled = self._rates(consumed, samples)
        loss_scale = self.loss_scale[0] if self.config.training.precision == "fp16" else 1.0
        batch = loader.step(self.state.consumed.samples, samples)
        seconds = time.monotonic() - started
        is_logged = consumed.steps % self.config.logging.log_interval == 0 or consumed.steps == self.total_steps
        result = train_step(
            self.model, self.optimizer, batch, self.config, plan, learning_rate=rate, loss_scale=loss_scale,
            stop_level=watcher.level(), device=self.runtime.device, decoupled_rate=decoupled,
            tell=(self.own_time.take(), free_memory(), self.met_at) if is_logged else ())
        self.own_time.step(seconds)
        self.met_at = result.met_at
        self.loss_scale = after_step(self.loss_scale, result.void, self.config.training)
        return Launched(result, consumed, plan, samples, rate, decoupled, loss_scale, started)

    def _settle(self) -> None:
        """Wait for the result of the step launched last, and count, report and judge it.

        Raises:
            DivergenceError, HardwareError: see `run`.
            RollBack: the run must return to its newest checkpoint.
        """
        if self.launched is None:
            return
        launched, self.launched = self.launched, None
        result, plan, step, scale = launched.result, launched.plan, launched.step, self.state.loss_scale
        seconds = result.finished - max(launched.started, self.finished)
        self.finished = result.finished
        self.times.add(plan, samples=launched.samples, seconds=seconds, sample_flops=step_flops(self.config, plan))
        self.unreported_seconds += seconds
        self.unreported_steps += 1
        self.state.updates += int(result.updated)
        self.state.loss_scale = scale.after_step(not result.updated, self.config.training)
        self.metrics.progress(step, self.total_steps, seconds)
        if self.times.steps == MEASURED_STEPS:
            self.metrics.console.line(measured_memory(self.runtime.device))
        settings = self.config.training
        score = self.bad_steps.score(launched, self.state) if result.updated else None
        diverged = not result.updated and (settings.precision != "fp16" or scale.exhausted(settings))
        if step % self.config.logging.log_interval == 0 or step == self.total_steps or diverged:
            self._report(launched, scale.scale, score)
        if diverged:
            self.bad_steps.nonfinite(launched, scale.scale, self.state, self._own_checkpoint())
        self.bad_steps.spike(launched, score, self._own_checkpoint())

    def _own_checkpoint(self) -> int | None:
        """The step of this run's newest checkpoint; None if there is none to return to."""
        settings = self.config.checkpoint
        if self.writer is None or settings.no_save_optim or not self.saved_step:
            return None
        resumes = settings.load is not None and Path(settings.load).resolve() == self.writer.save_dir.resolve()
        return self.saved_step if self.saved_step > self.first_step or resumes else None

    def _roll_back(self, skip: range) -> None:
        """Return to this run's newest checkpoint.

        Args:
            skip: steps after it whose samples are passed over from now on.
        """
        assert self.writer is not None
        self.writer.wait()
        record, self.launched = self.state.faults, None
        roll_back(checkpoint_path(self.writer.save_dir, self.saved_step), self.model, self.optimizer, self.writer.group,
                  self.state)
        self.state.faults = self.state.faults.without({*record.skipped, *skip})
        self.loss_scale = self.state.loss_scale.on(self.runtime.device)
        self.metrics.roll_back(self.saved_step)

    def _rates(self, after: Consumed, samples: int) -> tuple[float, float | None]:
        """The learning rate of the next step, and that of --decoupled-lr.

        Args:
            after: what is consumed after the step.
        """
        before = self.state.consumed
        progress = (before.steps, before.samples, samples, (before.layer_token_sum, after.layer_token_sum),
                    (before.tokens, after.tokens))
        return self.rate.at(*progress), None if self.decoupled is None else self.decoupled.at(*progress)

    def _after_step(self, step: int, code: int | None, epoch_ends: bool) -> int | None:
        # Before the save, so that a run resumed from it neither misses nor repeats these numbers.
        if code == EXIT_COMPLETE or epoch_ends or step % self.config.logging.eval_interval == 0:
            found = self.held_out.validation(step)
            if found is not None and is_finetuning(self.config):
                self._judge(step, found)
        if code is None and self._gives_up():
            code, best = EXIT_COMPLETE, self.state.best
            than = "" if best.loss is None else f" than {best.loss:.6f} of step {best.step}"
            self.metrics.console.line(
                f"stopped after {best.evaluations_since} evaluations without a lower validation loss{than}")
        if code == EXIT_COMPLETE:
            self.held_out.test(step)
        interval = self.config.logging.eval_tasks_interval
        if self.score_tasks is not None and (code == EXIT_COMPLETE or (interval and step % interval == 0)):
            self.metrics.task_scores(step, self.score_tasks())
        saving = self.config.checkpoint.save_interval
        if saving is not None and step % saving == 0:
            self._save()
        return code

    def _epochs(self, samples: int) -> int:
        """Complete epochs after this many samples; 0 if epochs are not counted."""
        epoch_samples = self.config.training.epoch_samples
        return 0 if epoch_samples is None else samples // epoch_samples

    def _gives_up(self) -> bool:
        return self.state.best.gives_up(self.config.training.early_stopping_patience)

    def _judge(self, step: int, found: HeldOut) -> None:
        """Record an evaluation of a finetuning run, and save the model if it is the best so far."""
        before, self.state.best = self.state.best, self.state.best.after(step, found.loss)
        if self.state.best.step != step:
            return
        than = "" if before.loss is None else f", after {before.loss:.6f} at step {before.step}"
        self.metrics.console.line(f"best model so far: validation loss {found.loss:.6f} at step {step}{than}")
        if self.best is None:
            return
        if self.writer is not None:
            self.writer.wait()  # the two share a process group
        self.best.save(step, named_tensors(self.model, None, self.state.updates), config=self.config.to_dict(),
                       counters=self.state.counters())

    def _report(self, launched: Launched, scale: float, score: float | None) -> None:
        result, plan, samples = launched.result, launched.plan, launched.samples
        self.metrics.step(StepReport(
            consumed=launched.consumed, total_steps=self.total_steps, loss=result.loss,
            gradient_norm=result.gradient_norm, learning_rate=launched.rate, decoupled_learning_rate=launched.decoupled,
            global_batch_size=samples, plan=plan, loss_scale=scale, skipped=not result.updated,
            step_seconds=self.unreported_seconds / max(1, self.unreported_steps),
            devices=self.runtime.launch.world_size, step_flops=samples * step_flops(self.config, plan),
            full_step_flops=samples * whole_step_flops(self.config, plan), peak_tflops=self.peak,
            sentence_order_loss=result.sentence_order_loss, z_loss=result.z_loss,
            of_policies=self.policies.log_fields(plan), loss_z_score=score,
            of_peers=self.peers.hear(result.told) if result.told and result.told[0] else {},
            loss_name="loss" if self.config.model.family == "vit" else "lm loss"))
        self.unreported_seconds, self.unreported_steps = 0.0, 0

    def _save(self) -> None:
        if self.writer is None:
            return
        optimizer = None if self.config.checkpoint.no_save_optim else self.optimizer
        step = self.state.consumed.steps
        self.writer.save(step, named_tensors(self.model, optimizer, self.state.updates), config=self.config.to_dict(),
                         counters=self.state.counters())
        self.saved_step = step
        self.bad_steps.saved()
