"""Scores on tasks during a run, as the trainer sees them. `lm_eval`, which stands above it, computes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.log import Console

if TYPE_CHECKING:  # settings are checked before torch is loaded
    from megatron_ltd.train.process.launch import Runtime
    from megatron_ltd.train.setup import Model


@dataclass(frozen=True)
class TaskScores:
    """The results of one evaluation.

    Args:
        metrics: task -> metric -> its value and standard error, None where there is no estimate; the headline first.
        failed: task -> why it has no result.
    """

    metrics: dict[str, dict[str, tuple[float, float | None]]]
    failed: dict[str, str]


class TaskPlan(Protocol):
    """The tasks of a run, before there is a model."""

    @property
    def digest(self) -> str:
        """Of names and files, which all processes must agree on."""

    def scores(self, model: "Model", runtime: "Runtime", config: RunConfig, tokenizer: Tokenizer,
               console: Console) -> Callable[[], TaskScores]:
        """What scores the model as it is when called; every process calls it at the same step."""


PlanTasks = Callable[[RunConfig], TaskPlan]
"""Raises a UserError where a task is unknown or its data are not there."""
