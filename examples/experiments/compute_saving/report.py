"""Table, pictures and verdict of the runs that are complete."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.experiments.budget import Arm
from examples.experiments.compute_saving.verdict import compute_saved, difference, estimate, in_words
from examples.experiments.prepare import run_checked
from examples.experiments.runs import ROOT, digest

CLAIM, DENSE, CUT = "ltd", "dense", "dense_cut"


@dataclass(frozen=True)
class ArmResult:
    """The complete runs of an arm.

    Args:
        losses: final validation losses by seed.
        costs: raw tokens, layer tokens and FLOPs at the end, mean over seeds.
    """

    arm: Arm
    losses: Mapping[int, float]
    rate: float
    costs: Mapping[str, float]


def report(known: Mapping[str, Arm], output_dir: Path, say: Callable[[str], None]) -> None:
    """Write OUTPUT_DIR/report from all complete runs there, and print the verdict."""
    folder = output_dir / "report"
    folder.mkdir(exist_ok=True)
    found = {name: _read_arm(arm, paths) for name, arm in known.items() if (paths := _complete(output_dir, name))}
    if DENSE not in found:
        say("no report yet: the dense runs are what others are compared with")
        return
    names = [f"{result.arm.title}@{seed}={output_dir / 'runs' / f'{name}-seed{seed}' / 'metrics.jsonl'}"
             for name, result in found.items() for seed in result.losses]
    run_checked([sys.executable, str(ROOT / "tools" / "compare_runs.py"), "--output-dir", str(folder), "--baseline",
                 known[DENSE].title, "--title", "Validation loss by compute", *names])
    text = verdict_text(found) + "\n" + _runs_text(output_dir, found)
    (folder / "verdict.md").write_text(text)
    say(verdict_text(found))
    say(f"tables and pictures: {folder}/comparison.html, table.md, verdict.md")


def verdict_text(found: Mapping[str, ArmResult]) -> str:
    """The verdict as Markdown: every arm against the dense run, and against dense of equal FLOPs."""
    dense = found[DENSE]
    lines = ["| arm | peak rate | steps | raw tokens | layer tokens | FLOPs | loss | minus dense | minus dense, fewer "
             "steps | FLOPs saved at equal loss |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for result in found.values():
        shares = " | ".join(f"{result.costs[cost] / dense.costs[cost]:.3f}" for cost in COSTS)
        lines.append(f"| {result.arm.title} | {result.rate:g} | {result.arm.steps} | {shares} | "
                     f"{estimate(list(result.losses.values())).text(sign='')} | {_against(result, found.get(DENSE))} | "
                     f"{_against(result, found.get(CUT))} | {_saved(result, found)} |")
    if CLAIM in found:
        against = difference(found[CLAIM].losses, dense.losses)
        share = {cost: 1.0 - found[CLAIM].costs[cost] / dense.costs[cost] for cost in COSTS}
        lines += ["", f"Equal loss with {100 * share['consumed_layer_tokens']:.1f}% fewer layer tokens, "
                  f"{100 * share['consumed_flops']:.1f}% fewer FLOPs? {against.text()} nats against dense; "
                  f"{in_words(against)}."]
        if CUT in found:
            cut = difference(found[CLAIM].losses, found[CUT].losses)
            lines.append(f"Against dense with the same FLOPs: {cut.text()} nats; {in_words(cut)}.")
    return "\n".join(lines) + "\n"


COSTS = ("consumed_tokens", "consumed_layer_tokens", "consumed_flops")


def _against(result: ArmResult, other: ArmResult | None) -> str:
    return "" if other is None or other is result else difference(result.losses, other.losses).text()


def _saved(result: ArmResult, found: Mapping[str, ArmResult]) -> str:
    if CUT not in found or result.arm.name in (DENSE, CUT):
        return ""
    short, long = ((found[name].losses, found[name].costs["consumed_flops"]) for name in (CUT, DENSE))
    saved = compute_saved(result.losses, result.costs["consumed_flops"], short, long)
    return "" if saved is None else saved.text(1, scale=100.0, unit="%")


def _complete(output_dir: Path, name: str) -> list[Path]:
    return sorted(path.parent for path in (output_dir / "runs").glob(f"{name}-seed*/done.json"))


def _read_arm(arm: Arm, folders: list[Path]) -> ArmResult:
    identities = [json.loads((folder / "run.json").read_text()) for folder in folders]
    losses = {identity["seed"]: json.loads((folder / "done.json").read_text())["validation_loss"]
              for identity, folder in zip(identities, folders, strict=True)}
    ends = [_last_step(folder / "metrics.jsonl") for folder in folders]
    costs = {cost: estimate([end[cost] for end in ends]).mean for cost in COSTS}
    return ArmResult(arm, losses, identities[0]["rate"], costs)


def _last_step(path: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    last: dict[str, Any] = [record for record in records if "lm_loss" in record][-1]
    return last


def _runs_text(output_dir: Path, found: Mapping[str, ArmResult]) -> str:
    lines = ["| run | commit | loss | SHA-256 of metrics.jsonl |", "|---|---|--:|---|"]
    for name, result in found.items():
        for seed, loss in result.losses.items():
            folder = output_dir / "runs" / f"{name}-seed{seed}"
            commit = json.loads((folder / "run.json").read_text())["commit"]
            lines.append(f"| {folder.name} | {commit} | {loss:.6f} | {digest(folder / 'metrics.jsonl')} |")
    return "\n".join(lines) + "\n"
