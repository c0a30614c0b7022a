"""A comparison as tables for people and as values for programs."""

from dataclasses import asdict
from typing import Any

from tools.comparison.curves import COSTS
from tools.comparison.seed_statistics import ArmSummary, Comparison, Difference, Estimate
from tools.pages.report_page import Table, markdown_table

NOTHING = "-"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def tables(comparison: Comparison) -> list[Table]:
    """One row an arm in each: the losses, what they cost, and what the baseline's loss costs."""
    rows = comparison.summaries
    losses = Table("Final validation loss",
                   ("arm", "seeds", "steps", "loss", "perplexity", "minus baseline", "error by"),
                   tuple(_loss_row(row) for row in rows))
    spent = Table("What the runs consumed (and in units of the baseline's)", ("arm", *COSTS.values()),
                  tuple((row.name, *(_cost(name, row.costs.get(name), row.ratios.get(name)) for name in COSTS))
                        for row in rows))
    target = "" if comparison.target is None else f", {comparison.target:.4f}"
    reaching = Table(f"Consumed until the baseline's final loss{target} (and in units of all the baseline consumed)",
                     ("arm", "runs that reach it", *COSTS.values()), tuple(_reach_row(row) for row in rows))
    return [losses, spent, reaching]


def markdown(comparison: Comparison, title: str) -> str:
    """All tables and notes; columns are aligned, so that it is read as it is too."""
    parts = [f"# {title}"]
    for table in tables(comparison):
        parts += [f"## {table.title}", markdown_table(table)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in comparison.notes)]) + "\n"


def values(comparison: Comparison, title: str) -> dict[str, Any]:
    """All numbers, unrounded, ready for JSON; null where there is none."""
    return {"title": title, "baseline": comparison.baseline, "baseline_final_loss": comparison.target,
            "arms": [asdict(row) for row in comparison.summaries], "notes": list(comparison.notes)}


def estimate_text(found: Estimate | Difference, digits: int, sign: str = "") -> str:
    """`mean ± standard error`."""
    error = "" if found.standard_error is None else f" ± {found.standard_error:.{digits}f}"
    return f"{found.mean:{sign}.{digits}f}{error}"


def cost_text(name: str, value: float) -> str:
    """Three digits: FLOPs as a power of ten, tokens with a unit."""
    if name == "flops":
        return f"{value:.2e}".replace("e+", "e")
    if name == "hours":
        return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
    size, unit = next(((size, unit) for size, unit in UNITS if value >= size), (1.0, ""))
    digits = f"{value / size:#.3g}".rstrip(".") if value / size < 999.5 else f"{value / size:.0f}"
    return digits + unit


def _loss_row(row: ArmSummary) -> tuple[str, ...]:
    if row.loss is None or row.steps is None:
        return (row.name, _seeds(row), NOTHING, "diverged", *[NOTHING] * 3)
    steps = str(row.steps[0]) if row.steps[0] == row.steps[1] else f"{row.steps[0]} to {row.steps[1]}"
    alone = " (one seed: no error)" if row.loss.standard_error is None else ""
    perplexity = NOTHING if row.perplexity is None else estimate_text(row.perplexity, 2)
    apart, method = NOTHING, NOTHING
    if row.difference is not None:
        apart, method = estimate_text(row.difference, 4, "+"), row.difference.method
        if method.startswith("paired"):
            method += f", {row.difference.count} pairs"
    return (row.name, _seeds(row), steps, estimate_text(row.loss, 4) + alone, perplexity, apart, method)


def _seeds(row: ArmSummary) -> str:
    return f"{row.seeds}, {row.diverged} diverged" if row.diverged else str(row.seeds)


def _cost(name: str, found: Estimate | None, ratio: float | None, error: bool = False) -> str:
    if found is None:
        return NOTHING
    text = cost_text(name, found.mean)
    if error and found.standard_error is not None:
        text += f" ± {100 * found.standard_error / found.mean:.1f}%" if found.mean else ""
    return text if ratio is None else f"{text} ({ratio:.2f})"


def _reach_row(row: ArmSummary) -> tuple[str, ...]:
    finite = row.seeds - row.diverged
    if not row.reached:
        return (row.name, f"0 of {finite}", *["not reached" if finite else NOTHING] * len(COSTS))
    return (row.name, f"{row.reached} of {finite}",
            *(_cost(name, row.reach[name], row.reach_ratios[name], error=True) for name in COSTS))
