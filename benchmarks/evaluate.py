"""Time zero-shot scoring against lm-evaluation-harness's Hugging Face backend: the same model, questions and machine.

    python -m benchmarks.evaluate --task-data DIR --vocab-file vocab.json --merge-file merges.txt --limit 50 --rounds 3

A GPT-2 with random weights is written as a Hugging Face folder, imported, and asked the first questions of each task by
both, in turns, in one process on one thread, timed by the time the process ran. Both answer from text: tokenizing is
included. Needs lm-eval and transformers.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from benchmarks import machine
from benchmarks.rounds import processor_seconds
from megatron_ltd.checkpoint.convert.huggingface.importing import import_model
from megatron_ltd.data.text.tokenizer import gpt2_bpe_tokenizer
from megatron_ltd.lm_eval.results import EvalOptions
from megatron_ltd.lm_eval.scorer import build_scorer
from megatron_ltd.lm_eval.tasks.choices import requests
from megatron_ltd.lm_eval.tasks.names import CHOICE_TASKS
from megatron_ltd.lm_eval.tasks.task_files import find_task_file
from megatron_ltd.train.process import launch
from megatron_ltd.train.state import TrainState

TASKS = ("hellaswag", "piqa", "arc_easy", "boolq")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--vocab-file", type=Path, required=True)
    parser.add_argument("--merge-file", type=Path, required=True)
    for name, default in (("layers", 6), ("hidden", 256), ("positions", 1024), ("limit", 50), ("batch-size", 8),
                          ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(argv)


def write_model(args: argparse.Namespace, folder: Path) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=50257, n_positions=args.positions, n_embd=args.hidden, n_layer=args.layers,
        n_head=args.hidden // 64, bos_token_id=50256, eos_token_id=50256)).eval()
    model.save_pretrained(folder / "hf")
    import_model(folder / "hf", folder / "ours", TrainState().counters())
    return model


def rows(args: argparse.Namespace, model: GPT2LMHeadModel, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: task, and whose answer."""
    scorer = build_scorer(str(folder / "ours"), step=None, tensor_parallel=1, pipeline_parallel=1,
                          micro_batch_size=args.batch_size)
    tokenizer = gpt2_bpe_tokenizer(str(args.vocab_file), str(args.merge_file))
    theirs = HFLM(pretrained=model, tokenizer=GPT2TokenizerFast(str(args.vocab_file), str(args.merge_file)),
                  batch_size=args.batch_size, device="cpu")
    options = EvalOptions(limit=args.limit)
    found: dict[str, Callable[[], Any]] = {}
    for name in TASKS:
        task = CHOICE_TASKS[name]
        path = find_task_file(name, args.task_data, task.files)
        examples, prompts, _ = task.questions(path, options)
        asked = [Instance("loglikelihood", {}, pair, 0) for example, prompt in zip(examples, prompts, strict=True)
                 for pair in requests(example, prompt)]
        found[f"{name}, ours"] = lambda task=task, path=path: task.evaluate(path, scorer, tokenizer, options)
        found[f"{name}, lm-eval"] = lambda asked=asked: theirs.loglikelihood(asked, disable_tqdm=True)
    return found


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        with contextlib.redirect_stderr(io.StringIO()):
            timed = rows(args, write_model(args, Path(temporary)), Path(temporary))
        seconds = processor_seconds(timed, args.rounds)
        launch.stop()
    print(f"\nGPT-2 of {args.layers} layers x {args.hidden}, first {args.limit} questions, batches of "
          f"{args.batch_size}; fp32, {args.rounds} rounds, cpu clock\n{machine.describe('cpu')}\n\n"
          "| task | ours, s | lm-eval, s | ours / lm-eval |\n|---|--:|--:|--:|")
    for name in TASKS:
        ours, theirs = seconds[f"{name}, ours"], seconds[f"{name}, lm-eval"]
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"| {name} | {statistics.median(ours):.2f} | {statistics.median(theirs):.2f} | {ratio:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
