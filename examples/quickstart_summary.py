"""The quickstart's summary table, from the metrics file of its run and the results of its evaluation.

    python examples/quickstart_summary.py --metrics metrics.jsonl --results zero_shot.json --output summary.md
"""

import argparse
import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]

TASKS = {"lambada": "last word of held-out passages", "perplexity": "held-out text"}
"""What the quickstart's files for these tasks hold; its last-word set has LAMBADA's form, not LAMBADA's text."""


def read_metrics(path: Path) -> tuple[list[Record], list[Record]]:
    """(training, validation) records by step; if a step was repeated after an interruption, its last record counts."""
    training: dict[int, Record] = {}
    validation: dict[int, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "validation_loss" in record:
            validation[record["step"]] = record
        elif "lm_loss" in record:
            training[record["step"]] = record
    if not training or not validation:
        raise SystemExit(f"{path}: holds no training or no validation records; run the training step again.")
    return [training[step] for step in sorted(training)], [validation[step] for step in sorted(validation)]


def training_rows(training: list[Record], validation: list[Record]) -> list[tuple[str, str]]:
    first, last = training[0], training[-1]
    full, layer = last["consumed_tokens"], last["consumed_layer_tokens"]
    speed = sorted(record["tokens_per_second"] for record in training)[len(training) // 2]
    return [
        ("steps", f"{last['step']:,}"),
        ("tokens", f"{full:,}"),
        ("layer tokens (tokens a layer processed, averaged over layers)", f"{layer:,.0f} ({layer / full:.0%})"),
        ("kept length, first and last step", f"{first['kept_length']} -> {last['kept_length']}"),
        ("training loss, first and last step", f"{first['lm_loss']:.3f} -> {last['lm_loss']:.3f}"),
        ("tokens per second, median", f"{speed:,.0f}"),
        *((f"validation perplexity after step {record['step']:,}", f"{record['validation_ppl']:.2f}")
          for record in validation),
    ]


def zero_shot_rows(results: Record) -> list[tuple[str, str]]:
    return [(f"{TASKS.get(task, task)}: {name.replace('_', ' ')}",
             f"{number(name, metric['value'])} ({record['n']:,} {record['unit']})")
            for task, record in results["tasks"].items() for name, metric in record["metrics"].items()]


def number(name: str, value: float | None) -> str:
    if value is None:
        return "infinite"
    return f"{value:.1%}" if name == "accuracy" else f"{value:,.2f}"


def table(rows: list[tuple[str, str]]) -> str:
    left, right = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"| {name.ljust(left)} | {value.rjust(right)} |" for name, value in rows]
    return "\n".join([f"| {'what'.ljust(left)} | {'value'.rjust(right)} |",
                      f"|{'-' * (left + 2)}|{'-' * (right + 1)}:|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file")
    args = parser.parse_args()
    training, validation = read_metrics(args.metrics)
    results = json.loads(args.results.read_text(encoding="utf-8"))
    text = table(training_rows(training, validation) + zero_shot_rows(results))
    args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
