"""Every task of lm-evaluation-harness that the public test data can feed: this project on four layouts beside the
harness's own Hugging Face backend on the exported model. Writes the table of docs/evaluation.md.

    python -m tests.extra.harness_table --data DIR --limit 50 --work /tmp/table --output table.md

Takes a quarter of an hour on two cores, so it is no test. Every row is a command of its own; times are the processor
seconds of all its processes, start included. Needs lm-eval and transformers.
"""

import argparse
import gzip
import importlib
import json
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast, PreTrainedModel

from megatron_ltd.lm_eval.harness.local import LocalSplits
from megatron_ltd.lm_eval.harness.metrics import metrics_of
from megatron_ltd.lm_eval.table import table
from megatron_ltd.lm_eval.tasks.wikitext import split_articles
from tests.lm_eval import harness, stories

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {"one process": (1, 1, 1), "tp 2": (2, 2, 1), "pp 2": (2, 1, 2), "dp 2": (2, 1, 1)}
"""Processes, tensor parallel, pipeline parallel."""
Doc = dict[str, Any]


def lambada(tasks: Path) -> list[Doc]:
    return harness.jsonl(tasks / "lambada/lambada_test.jsonl.gz")


def wikitext(tasks: Path) -> list[Doc]:
    with gzip.open(tasks / "wikitext2/wiki.test.raw.gz", "rt", encoding="utf-8") as file:
        return [{"page": article} for article in split_articles(file.read())]


def triviaqa(tasks: Path) -> list[Doc]:
    return [{"question": doc["question"], "answer": {"aliases": doc["answer"]["aliases"]}}
            for doc in harness.jsonl(tasks / "triviaqa/wikipedia-nocontext-dev.jsonl.gz")]


def wsc273(tasks: Path) -> list[Doc]:
    """The published sentences have the options in place already; here they are taken out again, for a neutral word."""
    docs = []
    for doc in harness.jsonl(tasks / "wsc273/winograd_wsc.jsonl"):
        one, other = doc["context_options"]
        same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        start = one.rfind(" ", 0, same) + 1
        docs.append({"text": f"{one[:start]}it {doc['continuation']}", "pronoun": "it", "pronoun_loc": start,
                     "options": [one[start:], other[start:]], "label": doc["gold"]})
    return docs


FED: dict[str, tuple[str, Callable[[Path], list[Doc]]]] = {
    "arc_easy": ("test", harness.DOCS["arc_easy"]), "arc_challenge": ("test", harness.DOCS["arc_challenge"]),
    "arc_challenge_chat": ("test", harness.DOCS["arc_challenge"]), "boolq": ("validation", harness.DOCS["boolq"]),
    "boolq-seq2seq": ("validation", harness.DOCS["boolq"]), "copa": ("validation", harness.DOCS["copa"]),
    "hellaswag": ("validation", harness.DOCS["hellaswag"]), "lambada_openai": ("test", lambada),
    "lambada_openai_cloze_yaml": ("test", lambada), "openbookqa": ("test", harness.DOCS["openbookqa"]),
    "piqa": ("validation", harness.DOCS["piqa"]), "rte": ("validation", harness.DOCS["rte"]),
    "sciq": ("test", harness.DOCS["sciq"]), "triviaqa": ("validation", triviaqa), "wikitext": ("test", wikitext),
    "winogrande": ("validation", harness.DOCS["winogrande"]), "wsc273": ("test", wsc273),
}
"""Task -> its split, and the examples in the harness's columns."""


def write_tasks(shared_tasks: Path, folder: Path) -> list[str]:
    """Write TASK/SPLIT.jsonl for every task, and return their names."""
    def put(name: str, split: str, lines: Iterable[str]) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    for name, (split, docs) in FED.items():
        put(name, split, map(json.dumps, docs(shared_tasks)))
    paradigms = []
    with zipfile.ZipFile(shared_tasks / "blimp/blimp.zip") as archive:
        for member in sorted(name for name in archive.namelist() if name.endswith(".jsonl")):
            paradigms.append(f"blimp_{Path(member).stem}")
            put(paradigms[-1], "train", archive.read(member).decode().splitlines())
    return [*FED, *paradigms]


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """With random weights large enough that choices differ by more than rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def gpt2_shaped(data: Path, folder: Path) -> None:
    spread(GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=1024))).save_pretrained(folder)
    copy_gpt2_tokenizer(data, folder)


def smollm2_shaped(data: Path, folder: Path) -> None:
    """SmolLM2 in small: grouped queries three to one, tied embeddings, rotary positions of base 100,000."""
    spread(LlamaForCausalLM(LlamaConfig(
        vocab_size=50257, hidden_size=72, intermediate_size=192, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=50256,
        eos_token_id=50256, rope_parameters={"rope_type": "default", "rope_theta": 1e5}))).save_pretrained(folder)
    copy_gpt2_tokenizer(data, folder)


def copy_gpt2_tokenizer(data: Path, folder: Path) -> None:
    from transformers import GPT2TokenizerFast

    source = data / "tokenizers" / "gpt2"
    GPT2TokenizerFast(str(source / "vocab.json"), str(source / "merges.txt")).save_pretrained(folder)


def stories260k(data: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in (stories.folder(data) / "hf").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "spm").mkdir(exist_ok=True)
    (folder / "spm" / "tokenizer.model").write_bytes(stories.sentencepiece_model(data))
    LlamaTokenizerFast.from_pretrained(folder / "spm", add_bos_token=True).save_pretrained(folder)


MODELS: dict[str, Callable[[Path, Path], None]] = {
    "stories260K": stories260k, "SmolLM2-shaped": smollm2_shaped, "GPT-2-shaped": gpt2_shaped}


@dataclass(frozen=True)
class Found:
    """What one command found, and the processor seconds that it took."""

    metrics: dict[str, dict[str, float]]
    seconds: float


def timed(command: list[str]) -> float:
    """Run a command; its processor seconds, with those of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def score_here(args: argparse.Namespace, work: Path, tasks: list[str], layout: str) -> Found:
    ranks, tp, pp = LAYOUTS[layout]
    output = work / f"{layout.replace(' ', '_')}.json"
    seconds = timed([
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "tools/evaluate_zeroshot.py",
        "--load", str(work / "ours"), "--harness", "--tasks", ",".join(tasks), "--task-data", str(args.work / "tasks"),
        "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp),
        "--limit", str(args.limit), "--output", str(output)])
    found = json.loads(output.read_text())["tasks"]
    return Found({task: {name: metric["value"] for name, metric in found[task]["metrics"].items()} for task in tasks},
                 seconds)


def score_there(args: argparse.Namespace, work: Path, tasks: list[str]) -> Found:
    seconds = timed(["-m", "tests.extra.harness_table", "--data", str(args.data), "--work", str(args.work), "--limit",
                     str(args.limit), "--hf", str(work)])
    return Found(json.loads((work / "hf.json").read_text()), seconds)


def run_hf(args: argparse.Namespace) -> None:
    """The harness's own backend on the exported model, in a process of its own."""
    model = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=str(args.hf / "exported"), dtype="float32", device="cpu", batch_size=8)
    manager = importlib.import_module("lm_eval.tasks").TaskManager()
    evaluate = importlib.import_module("lm_eval.evaluator").simple_evaluate
    found = {}
    for task in sorted(path.name for path in (args.work / "tasks").iterdir()):
        local = LocalSplits(args.work / "tasks" / task)
        # As in megatron_ltd.lm_eval.harness.tasks.
        group = manager.load([{"group": "chosen", "task": [
            {"task": task, "custom_dataset": lambda local=local, **settings: local}]}])["groups"]["chosen"]
        results = evaluate(model=model, tasks=[group], limit=args.limit, log_samples=False, task_manager=manager)
        found[task] = {name: metric.value for name, metric in metrics_of(results["results"][task]).items()}
    (args.hf / "hf.json").write_text(json.dumps(found))


def compared(name: str, args: argparse.Namespace, tasks: list[str]) -> list[list[str]]:
    """The rows of one model."""
    work = args.work / name
    MODELS[name](args.data, work / "source")
    timed(["tools/convert_checkpoint.py", "--from-hf", str(work / "source"), "--save", str(work / "ours")])
    timed(["tools/convert_checkpoint.py", "--load", str(work / "ours"), "--to-hf", str(work / "exported")])
    theirs = score_there(args, work, tasks)
    rows = [[name, "harness, hf", "", "", f"{theirs.seconds:.0f}"]]
    for layout in LAYOUTS:
        ours = score_here(args, work, tasks, layout)
        pairs = [(task, metric, ours.metrics[task][metric], value) for task in tasks
                 for metric, value in theirs.metrics[task].items()]
        differing = [(task, metric, mine, value) for task, metric, mine, value in pairs
                     if f"{mine:.4f}" != f"{value:.4f}"]
        for task, metric, mine, value in differing:
            print(f"{name}, {layout}, {task} {metric}: {mine!r} here, {value!r} there", flush=True)
        largest = max((abs(mine / value - 1.0) for _, _, mine, value in differing), default=0.0)
        rows.append([name, layout, f"{len(pairs) - len(differing)} of {len(pairs)}",
                     f"{largest:.0e}" if differing else "-", f"{ours.seconds:.0f}"])
        print(rows[-1], flush=True)
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "work", "output", "hf"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.hf is not None:
        run_hf(args)
        return 0
    tasks = write_tasks(args.data / "tasks", args.work / "tasks")
    head = ["model", "scored by", "metrics equal in all printed digits", "largest relative difference",
            "processor seconds"]
    rows = [row for name in args.models.split(",") for row in compared(name, args, tasks)]
    text = f"{len(tasks)} tasks, the first {args.limit} examples of each\n\n{table([head, *rows], '<<>>>')}\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
