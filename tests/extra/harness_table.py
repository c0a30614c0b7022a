"""Every task of lm-evaluation-harness that the public test data can feed: this project on four layouts beside the
harness's own Hugging Face backend on the exported model. Writes the table of docs/evaluation.md.

    python -m tests.extra.harness_table --data DIR --limit 50 --work /tmp/table --output table.md

Takes some minutes on an idle machine, so it is no test. The tasks are loaded once; every row is a fork that builds its
model and scores all tasks, and its time is the processor seconds of the scoring in all its processes. Needs lm-eval,
transformers and protobuf.
"""

import argparse
import gzip
import importlib
import json
import multiprocessing
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast, PreTrainedModel

from benchmarks.together import run_together
from megatron_ltd.lm_eval.harness.metrics import metrics_of
from megatron_ltd.lm_eval.harness.tasks import Harness
from megatron_ltd.lm_eval.table import table
from megatron_ltd.lm_eval.tasks.wikitext import split_articles
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.lm_eval import harness, stories
from tests.train.runs import launched

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


def write_tasks(shared_tasks: Path, folder: Path, examples: int | None) -> list[str]:
    """Write the first examples of every task as TASK/SPLIT.jsonl, and return their names."""
    def put(name: str, split: str, lines: Iterable[str]) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    for name, (split, docs) in FED.items():
        put(name, split, map(json.dumps, docs(shared_tasks)[:examples]))
    paradigms = []
    with zipfile.ZipFile(shared_tasks / "blimp/blimp.zip") as archive:
        for member in sorted(name for name in archive.namelist() if name.endswith(".jsonl")):
            paradigms.append(f"blimp_{Path(member).stem}")
            put(paradigms[-1], "train", archive.read(member).decode().splitlines()[:examples])
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
    spread(GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=512))).save_pretrained(folder)
    copy_gpt2_tokenizer(data, folder)


def smollm2_shaped(data: Path, folder: Path) -> None:
    """SmolLM2 in small: grouped queries three to one, tied embeddings, rotary positions of base 100,000."""
    spread(LlamaForCausalLM(LlamaConfig(
        vocab_size=50257, hidden_size=72, intermediate_size=192, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=50256,
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
    """What one model on one layout found, and the processor seconds of all its processes, without their start."""

    metrics: dict[str, dict[str, float]]
    seconds: float


def load_tasks(folder: Path, names: list[str]) -> list[Any]:
    """The harness's tasks on these files."""
    manager = Harness(folder, None).manager
    return [*manager.load(names)["tasks"].values()]


def hf_model(folder: Path) -> Any:
    """The harness's own backend on the exported model."""
    return importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=str(folder / "exported"), dtype="float32", device="cpu", batch_size=8)


def our_model(folder: Path, tp: int, pp: int) -> Any:
    plugin = importlib.import_module("megatron_ltd.lm_eval.harness.plugin")
    return plugin.MegatronLtd(str(folder / "ours"), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
                              batch_size=8)


def one_process(rank: int, world_size: int, meeting: Path, build: Callable[[], Any], tasks: list[Any], limit: int,
                output: Path) -> None:
    """What a forked process does: build its model, score all tasks at once, write what it found."""
    torch.set_num_threads(1)
    place = Launch(rank, rank, world_size, f"file://{meeting}" if world_size > 1 else None)
    with launched(place):
        model = build()
        started = time.process_time()
        found = importlib.import_module("lm_eval.evaluator").simple_evaluate(
            model=model, tasks=tasks, limit=limit, log_samples=False, bootstrap_iters=0)
    seconds = time.process_time() - started
    launch.stop()
    metrics = {task: {name: metric.value for name, metric in metrics_of(numbers).items()}
               for task, numbers in found["results"].items()}
    output.with_suffix(f".{rank}").write_text(json.dumps([metrics, seconds]))


def scored(work: Path, name: str, world_size: int, build: Callable[[], Any], tasks: list[Any], limit: int) -> Found:
    """One evaluation in processes forked from this one, which has loaded the tasks."""
    output = work / f"{name.replace(' ', '_')}.json"
    meeting = output.with_suffix(".meeting")
    meeting.unlink(missing_ok=True)
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=one_process, args=(rank, world_size, meeting, build, tasks, limit, output))
                 for rank in range(world_size)]
    run_together(processes, name)
    answers = [json.loads(output.with_suffix(f".{rank}").read_text()) for rank in range(world_size)]
    return Found(answers[0][0], sum(seconds for _, seconds in answers))


def convert(*flags: str) -> None:
    subprocess.run([sys.executable, "tools/convert_checkpoint.py", *flags], cwd=ROOT, check=True, capture_output=True)


def compared(name: str, args: argparse.Namespace, names: list[str], tasks: list[Any]) -> list[list[str]]:
    """The rows of one model."""
    work = args.work / name
    if not work.is_dir():
        MODELS[name](args.data, work / "source")
        convert("--from-hf", str(work / "source"), "--save", str(work / "ours"))
        convert("--load", str(work / "ours"), "--to-hf", str(work / "exported"))
    theirs = scored(work, "hf", 1, lambda: hf_model(work), tasks, args.limit)
    rows = [[name, "harness, hf", "", "", f"{theirs.seconds:.1f}"]]
    for layout in args.layouts.split(","):
        ranks, tp, pp = LAYOUTS[layout]
        ours = scored(work, layout, ranks, lambda tp=tp, pp=pp: our_model(work, tp, pp), tasks, args.limit)
        pairs = [(task, metric, ours.metrics[task][metric], value) for task in names
                 for metric, value in theirs.metrics[task].items()]
        differing = [(task, metric, mine, value) for task, metric, mine, value in pairs
                     if f"{mine:.4f}" != f"{value:.4f}"]
        for task, metric, mine, value in differing:
            print(f"{name}, {layout}, {task} {metric}: {mine!r} here, {value!r} there", flush=True)
        largest = max((abs(mine / value - 1.0) for _, _, mine, value in differing), default=0.0)
        rows.append([name, layout, f"{len(pairs) - len(differing)} of {len(pairs)}",
                     f"{largest:.0e}" if differing else "-", f"{ours.seconds:.1f}"])
        print(rows[-1], flush=True)
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "work", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = write_tasks(args.data / "tasks", args.work / "tasks", args.limit)
    tasks = load_tasks(args.work / "tasks", names)
    head = ["model", "scored by", "metrics equal in all printed digits", "largest relative difference",
            "CPU seconds"]
    rows = [head]
    for name in args.models.split(","):
        rows += compared(name, args, names, tasks)
        text = f"{len(names)} tasks, the first {args.limit} examples of each\n\n{table(rows, '<<>>>')}\n"
        args.output.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
