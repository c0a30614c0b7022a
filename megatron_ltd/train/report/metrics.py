"""What a run reports about itself, as numbers and as a log line.

    consumed_flops        forward and backward FLOPs of the run so far, after dropping
    tokens_per_second     raw tokens read of the global batch / seconds of the step
    model_flops           forward and backward FLOPs of the step, after dropping (`megatron_ltd.model.arithmetic.flops`)
    tflops_per_device     model_flops / seconds / devices / 1e12
    mfu                   tflops_per_device / peak TFLOP/s of a device, if known
    theoretical_saving    share of the step's FLOPs that dropping and skipped layers left out, against the same tokens
                          read; tokens that a sequence curriculum does not read are no saving
    cumulative_saving     the same for the run so far
    z_loss                with --z-loss-coeff: its mean, which lm_loss does not contain
    loss_z_score          with --on-loss-spike: how many standard deviations the loss lies above the median of the steps
                          before it, both estimated robustly
    sequence_length       with a sequence curriculum: tokens read of each sample
    skipped_layers        where layers are skipped at random: those that the step skipped
    token_superposition   with token superposition: tokens in a bag; above 1, lm_loss is the mean over the tokens of the
                          next bag, which is not comparable with the loss of the next token
    own_seconds           median over the processes of the time that each spends on forward passes and reading, a step
    own_seconds_slowest, slowest_rank    the longest, and whose it is
    stragglers            the processes that take much longer than others of their stage: rank and host
    host_memory_free      the smallest share of a host's memory that is available
    clock_skew_seconds    how far a host's clock is from the median of all

The loss is that of the logged step, not a mean since the last line, so that a resumed run logs the same numbers.
"""

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from megatron_ltd.token_drop.accounting import Consumed
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.train.result import HeldOut
from megatron_ltd.train.task_scores import TaskScores


@dataclass(frozen=True)
class StepReport:
    """The measurements of a step."""

    consumed: Consumed
    total_steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    global_batch_size: int
    plan: StepPlan
    loss_scale: float
    skipped: bool
    step_seconds: float
    devices: int
    step_flops: int
    full_step_flops: int
    peak_tflops: float | None
    sentence_order_loss: float | None = None
    z_loss: float | None = None
    decoupled_learning_rate: float | None = None
    loss_z_score: float | None = None
    of_policies: dict[str, Any] = field(default_factory=dict)
    of_peers: dict[str, Any] = field(default_factory=dict)
    loss_name: str = "lm loss"

    def fields(self) -> dict[str, Any]:
        """One line of the metrics file."""
        seconds = max(self.step_seconds, 1e-9)
        tflops = self.step_flops / seconds / self.devices / 1e12
        optional = {"sentence_order_loss": self.sentence_order_loss, "z_loss": self.z_loss,
                    "decoupled_learning_rate": self.decoupled_learning_rate, "loss_z_score": self.loss_z_score}
        return {
            "step": self.consumed.steps,
            "consumed_samples": self.consumed.samples,
            "consumed_tokens": self.consumed.tokens,
            "consumed_layer_tokens": self.consumed.layer_tokens(len(self.plan.layers)),
            "consumed_flops": self.consumed.flops,
            "lm_loss": self.loss,
            **{name: value for name, value in optional.items() if value is not None},
            "grad_norm": self.gradient_norm,
            "learning_rate": self.learning_rate,
            "global_batch_size": self.global_batch_size,
            "kept_length": self.plan.kept_tokens,
            **self.of_policies,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.global_batch_size * self.plan.text_tokens / seconds,
            "model_flops": self.step_flops,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
            "theoretical_saving": 1.0 - self.step_flops / self.full_step_flops,
            "cumulative_saving": self.consumed.saving,
            "loss_scale": self.loss_scale,
            "skipped": self.skipped,
            **self.of_peers,
        }

    def line(self) -> str:
        """Megatron-LM's log line, with the fields that token dropping adds."""
        f = self.fields()
        order = "" if self.sentence_order_loss is None else f" sop loss: {self.sentence_order_loss:.6E} |"
        order += "" if self.z_loss is None else f" z loss: {self.z_loss:.6E} |"
        length = f" sequence length: {self.plan.read_tokens:5d} |" if "sequence_length" in f else ""
        bags = "" if self.plan.fold == 1 else f" the loss is of bags of {self.plan.fold} tokens |"
        rate = f" learning rate: {self.learning_rate:.6E} |"
        if self.decoupled_learning_rate is not None:
            rate += f" decoupled learning rate: {self.decoupled_learning_rate:.6E} |"
        mfu = "" if f["mfu"] is None else f" MFU: {100 * f['mfu']:.1f}% |"
        return (
            f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {self.consumed.steps:8d}/{self.total_steps:8d} |"
            f" consumed samples: {self.consumed.samples:12d} |"
            f" elapsed time per iteration (ms): {1000 * self.step_seconds:.1f} |"
            f" throughput per GPU (TFLOP/s/GPU): {f['tflops_per_device']:.3g} |"
            f"{rate} global batch size: {self.global_batch_size:5d} |"
            f" {self.loss_name}: {self.loss:.6E} |{bags}{order} loss scale: {self.loss_scale:.1f} |"
            f" grad norm: {self.gradient_norm:.3f} |"
            f" number of skipped iterations: {int(self.skipped):3d} |"
            f" number of nan iterations: {int(not math.isfinite(self.loss)):3d} |"
            f"{length} kept length: {self.plan.kept_tokens:5d}/{self.plan.read_tokens:5d} |"
            f" consumed tokens: {self.consumed.tokens:12d} |"
            f" layer tokens: {self.consumed.layer_tokens(len(self.plan.layers)):12d} |"
            f" tokens/s: {f['tokens_per_second']:.0f} |{mfu}"
            f" saving: {100 * f['theoretical_saving']:.1f}% (run {100 * self.consumed.saving:.1f}%) |")


def held_out_fields(name: str, step: int, found: HeldOut) -> dict[str, Any]:
    """One line of the metrics file for a held-out set, `validation` or `test`."""
    if found.top1 is not None and found.top5 is not None:
        return {"step": step, f"{name}_loss": found.loss, f"{name}_top1": found.top1, f"{name}_top5": found.top5}
    fields = {"step": step, f"{name}_loss": found.loss, f"{name}_ppl": math.exp(min(found.loss, 700.0))}
    if found.sentence_order_loss is not None:
        fields[f"{name}_sentence_order_loss"] = found.sentence_order_loss
    return fields


def held_out_line(name: str, step: int, found: HeldOut) -> str:
    """Megatron-LM's line."""
    if found.top1 is not None and found.top5 is not None:
        return (f" {name} loss at iteration {step} | loss value: {found.loss:.6E} | top-1: {100 * found.top1:.2f}% |"
                f" top-5: {100 * found.top5:.2f}% |")
    order = "" if found.sentence_order_loss is None else f" sop loss value: {found.sentence_order_loss:.6E} |"
    return (f" {name} loss at iteration {step} | lm loss value: {found.loss:.6E} |"
            f" lm loss PPL: {math.exp(min(found.loss, 700.0)):.6E} |{order}")


def task_scores_fields(step: int, found: TaskScores) -> dict[str, Any]:
    """One line of the metrics file for the tasks: `eval/TASK/METRIC` with `_stderr`, and `eval/TASK/failed`."""
    fields: dict[str, Any] = {"step": step}
    for task, metrics in found.metrics.items():
        for name, (value, error) in metrics.items():
            fields |= {f"eval/{task}/{name}": value, f"eval/{task}/{name}_stderr": error}
    return fields | {f"eval/{task}/failed": 1 for task in found.failed}


def task_scores_line(step: int, found: TaskScores) -> str:
    """The headline of each task, with its standard error."""
    parts = []
    for task, metrics in found.metrics.items():
        name, (value, error) = next(iter(metrics.items()))
        parts.append(f" {task} {name}: {value:.4f}" + ("" if error is None else f" +- {error:.4f}") + " |")
    return f" task scores at iteration {step} |" + "".join(parts + [f" {task}: failed |" for task in found.failed])
