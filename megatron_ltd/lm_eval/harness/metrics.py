"""Metrics as lm-evaluation-harness writes them."""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_ltd.lm_eval.results import Metric, Samples


def metrics_of(numbers: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics of a task: `acc,none` is called acc, `exact_match,strict-match` exact_match (strict-match)."""
    metrics = {}
    for key, value in numbers.items():
        metric, _, rule = key.partition(",")
        if rule and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = numbers.get(f"{metric}_stderr,{rule}")
            shown = metric if rule == "none" else f"{metric} ({rule})"
            metrics[shown] = Metric(float(value), float(error) if isinstance(error, int | float) else None)
    return metrics


def samples_of(examples: Iterable[Mapping[str, Any]], metrics: Iterable[str]) -> dict[str, Samples]:
    """What each example adds to each of these metrics that is made of numbers."""
    ordered = sorted(examples, key=lambda example: example["doc_id"])
    found: dict[str, Samples] = {}
    for metric in metrics:
        name, _, rule = metric.removesuffix(")").partition(" (")
        values = [example.get(name) for example in ordered if example["filter"] == (rule or "none")]
        pairs = [value if isinstance(value, tuple | list) else (value,) for value in values]
        if pairs and all(1 <= len(pair) <= 2 and all(isinstance(one, int | float) for one in pair) for pair in pairs):
            found[metric] = [float(pair[0]) if len(pair) == 1 else [float(one) for one in pair] for pair in pairs]
    return found
