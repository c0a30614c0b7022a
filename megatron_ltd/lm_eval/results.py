"""The numbers of a task, and the statistics they are made with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Samples = list[float | list[float] | None]
"""What each example adds to a metric: a value, or a value and its weight; None for an example that was left out.

A mean is sum value / sum weight, a perplexity exp(-that) of log-probabilities, where a weight that is not given is 1.
"""


@dataclass(frozen=True)
class Metric:
    """A number and its standard error, None where there is no estimate."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """What a task reports.

    Args:
        metrics: the headline first.
        n: examples, documents or articles scored.
        unit: what `n` counts.
        truncated: examples that are longer than the model's positions and were scored on their last tokens.
        protocol: how the numbers were made, in words.
        counts: normalisers, such as tokens and words.
        notes: what a reader of the numbers has to know besides.
        samples: by metric, in the order of the file; empty where they are not kept.
        num_fewshot: solved examples before each question; None where the task knows none.
        version: of the task, where it has one.
    """

    metrics: dict[str, Metric]
    n: int
    unit: str
    truncated: int
    protocol: str
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    samples: Mapping[str, Samples] = field(default_factory=dict)
    num_fewshot: int | None = None
    version: str | None = None


OVERLONG = ("truncate", "skip", "error")


@dataclass(frozen=True)
class EvalOptions:
    """What a user may choose about a task.

    Args:
        limit: score only the first so many examples, documents or articles.
        stride: predict so many tokens a window, with overlapping windows; None for disjoint predictions.
        show_progress: whether this process draws progress bars.
        num_fewshot: solved examples before each question.
        bos: id of a token that every text begins with, for models trained that way.
        overlong: one of `OVERLONG`: what happens to an example that is longer than the model's positions.
        log_samples: keep what each example adds to each metric.
    """

    limit: int | None = None
    stride: int | None = None
    show_progress: bool = False
    num_fewshot: int = 0
    bos: int | None = None
    overlong: str = "truncate"
    log_samples: bool = False


def mean_and_stderr(values: Sequence[float]) -> Metric:
    """The mean, and its standard error from the sample deviation (n - 1); no error for a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Metric(mean)
    return Metric(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n))


def perplexity(nll: float, units: int) -> float:
    """exp(nll / units), infinite where it leaves the floating-point range."""
    mean = nll / units
    return math.exp(mean) if mean < 709 else math.inf


def bits_per(nll: float, units: int) -> float:
    """Bits for each of `units`, from natural-logarithm `nll`."""
    return nll / units / math.log(2)


def aligned(values: Sequence[float], kept: Sequence[bool]) -> Samples:
    """The values of the examples that were kept, and None for the others."""
    each = iter(values)
    return [next(each) if is_kept else None for is_kept in kept]
