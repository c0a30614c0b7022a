"""The tasks that are built in, natively and through lm-evaluation-harness, in one process on the same model: processor
seconds from the files to the result. Writes the second table of docs/evaluation.md.

    python -m tests.extra.native_times --data DIR --load /tmp/table/GPT-2-shaped/ours --limit 100 \\
        --work /tmp/times --output times.md

The harness's index of tasks, which takes seconds more, is read beforehand. Tasks without a public file at hand have
invented examples. Needs lm-eval.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from megatron_ltd.data.text.tokenizer import tokenizer_of_model
from megatron_ltd.lm_eval.harness.tasks import plan_harness
from megatron_ltd.lm_eval.results import EvalOptions
from megatron_ltd.lm_eval.scorer import build_scorer
from megatron_ltd.lm_eval.table import table
from megatron_ltd.lm_eval.tasks.names import CHOICE_TASKS, TASKS
from megatron_ltd.lm_eval.tasks.task_files import find_task_file
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.extra.harness_table import FED, write_tasks
from tests.lm_eval import harness
from tests.train.runs import launched

NAMES = {**{name: name for name in reversed(CHOICE_TASKS)}, "lambada": "lambada_openai", "wikitext": "wikitext"}
"""Task here -> its name in the harness."""
SPLITS = {"race": "test", "multirc": "validation", "webqs": "test", "anli_r1": "test_r1"}
ROUNDS = 2
Found = TypeVar("Found")


def write_invented(folder: Path, count: int) -> None:
    """Examples for tasks without a public file, repeated."""
    for name, split in SPLITS.items():
        docs = harness.INVENTED[name]
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(docs[i % len(docs)]) + "\n" for i in range(count)]
        (folder / name / f"{split}.jsonl").write_text("".join(lines))


def seconds(run: Callable[[], Found]) -> tuple[float, Found]:
    """The shortest of some rounds in processor seconds, and the result."""
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        found = run()
        times.append(time.process_time() - started)
    return min(times), found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "load", "work", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    write_tasks(args.data / "tasks", args.work, args.limit)
    write_invented(args.work, args.limit)
    rows = [["task", "built in, s", "through the harness, s", "factor"]]
    with launched(Launch()):
        scorer = build_scorer(str(args.load), step=None, tensor_parallel=1, pipeline_parallel=1, micro_batch_size=8)
    tokens = tokenizer_of_model(scorer.tokenizer_config, scorer.config.model.vocab_size)
    names = {name: theirs for name, theirs in NAMES.items() if theirs in FED or name in SPLITS or name == "blimp"}
    for name, run in zip(names, plan_harness([*names.values()], args.work, None), strict=True):
        own, options = TASKS[name], EvalOptions(limit=2 if name == "wikitext" else args.limit)
        path = args.work / name / f"{SPLITS[name]}.jsonl" if name in SPLITS else find_task_file(
            name, args.data / "tasks", own.files)
        native, mine = seconds(partial(own.evaluate, path, scorer, tokens, options))
        other, found = seconds(partial(run.evaluate, scorer, tokens, options))
        print(name, mine.metrics, {task: result.metrics for task, result in found.items()}, flush=True)
        rows.append([name, f"{native:.2f}", f"{other:.2f}", f"{other / native:.1f}"])
        args.output.write_text(f"{args.limit} examples\n\n{table(rows, '<>>>')}\n")
    launch.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
