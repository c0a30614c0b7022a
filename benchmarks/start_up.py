"""How long a run takes to have its data, how much memory that needs, and how fast samples are read then.

    python -m benchmarks.start_up --rounds 3

Start-up: `build_datasets`, as a training run calls it, on made-up corpora: one blend of many, and one corpus of many
documents (a real .idx, a sparse .bin, which takes no disk). `no index cache` keeps the index in memory, `first` builds
and keeps it, `later` finds it. Each row is a process of its own. Memory is the peak of the process less what it had
with everything imported. Before `cold` rows the files are dropped from the page cache.

Reading: samples in a random order of a corpus in the page cache, by one thread, by its CPU time, against slices of a
memory map of as many tokens at random places, as they are and as int64, which training takes. megatron-core's rows
are left out where it is not installed.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.data.build import build_datasets
from megatron_ltd.data.corpus.indexed import HEADER, MAGIC, VERSION, IndexedCorpus
from megatron_ltd.data.gpt.dataset import GPTDataset
from megatron_ltd.data.loader import Loader
from megatron_ltd.data.sample import Dataset, GPTSampleForm
from megatron_ltd.data.text.tokenizer import NullTokenizer

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 50257
UINT16 = 8  # its code in .idx
CACHES = ("no index cache", "first", "later")
EPOCH_SHARE = 0.9  # of the tokens, which a run then reads
BLOCK = 1 << 22


def write_corpus(prefix: Path, documents: int, mean_tokens: int, seed: int, real: bool) -> int:
    """A corpus of one sequence a document; its tokens are zeros that take no disk, or random; how many."""
    random = np.random.default_rng(seed)
    lengths = np.concatenate([random.integers(1, 2 * mean_tokens, min(BLOCK, documents - begin), dtype=np.int32)
                              for begin in range(0, documents, BLOCK)])
    ends = np.zeros(documents + 1, dtype=np.int64)
    np.cumsum(lengths, dtype=np.int64, out=ends[1:])
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, UINT16, documents, documents + 1))
        stream.write(lengths.data)
        ends *= 2
        stream.write(ends[:-1].data)
        for begin in range(0, documents + 1, BLOCK):
            stream.write(np.arange(begin, min(begin + BLOCK, documents + 1), dtype=np.int64).data)
        stream.flush()
        os.fsync(stream.fileno())
    with open(f"{prefix}.bin", "wb") as stream:
        if real:
            stream.write(random.integers(0, VOCAB_SIZE, int(ends[-1]) // 2, dtype=np.uint16).data)
        stream.truncate(int(ends[-1]))
    return int(ends[-1]) // 2


def memory(name: str) -> float:
    """A line of /proc/self/status in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def start_up(folder: Path, seq_length: int, samples: int, cache: str | None) -> dict[str, float]:
    """What a training run does before its first step."""
    prefixes = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))
    values = [value for number, prefix in enumerate(prefixes) for value in (str(1 + number % 7), prefix)]
    config = RunConfig(model=ModelConfig(seq_length=seq_length), training=TrainingConfig(),
                       data=DataConfig(data_path=tuple(values if len(prefixes) > 1 else prefixes),
                                       split="99,1,0", data_cache_path=cache))
    before, begin, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    datasets = build_datasets(config, NullTokenizer(VOCAB_SIZE - 1), samples, max(samples // 1000, 1), 0)
    built, cpu = time.perf_counter() - begin, time.process_time() - cpu
    datasets.train.sample(len(datasets.train) // 2)
    return {"seconds": built, "cpu": cpu, "peak": memory("VmHWM") - before, "kept": memory("VmRSS") - before,
            "files": len(os.listdir("/proc/self/fd"))}


def megatron_start_up(folder: Path, seq_length: int, samples: int, cache: str | None) -> dict[str, float]:
    """megatron-core's builder on the same corpora."""
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset as Reference

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    prefixes = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))
    weights = [float(1 + number % 7) for number in range(len(prefixes))] if len(prefixes) > 1 else None
    config = megatron_config(seq_length, prefixes, weights, "99,1,0", cache)
    before, begin, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    train = BlendedMegatronDatasetBuilder(Reference, [samples, max(samples // 1000, 1), 0], lambda: True,
                                          config).build()[0]
    built, cpu = time.perf_counter() - begin, time.process_time() - cpu
    train[len(train) // 2]
    return {"seconds": built, "cpu": cpu, "peak": memory("VmHWM") - before, "kept": memory("VmRSS") - before,
            "files": len(os.listdir("/proc/self/fd"))}


def megatron_config(seq_length: int, prefixes: list[str], weights: list[float] | None, split: str,
                    cache: str | None) -> object:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    tokenizer = SimpleNamespace(vocab_size=VOCAB_SIZE, eod=VOCAB_SIZE - 1, eos=VOCAB_SIZE - 1, pad=-1,
                                unique_identifiers={"tokenizer": "none"})
    return GPTDatasetConfig(random_seed=1234, sequence_length=seq_length, blend=(prefixes, weights), split=split,
                            path_to_cache=cache, tokenizer=tokenizer, reset_position_ids=False, eod_mask_loss=False,
                            reset_attention_mask=False, create_attention_mask=False)


def has_megatron() -> bool:
    return importlib.util.find_spec("megatron") is not None \
        and importlib.util.find_spec("megatron.core") is not None


def child(folder: Path, row: str, samples: int, options: argparse.Namespace, cache: str | None) -> dict[str, float]:
    """A start-up row in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.start_up", "--row", row, "--folder", str(folder), "--samples",
               str(samples), "--seq-length", str(options.seq_length), *(("--cache", cache) if cache else ())]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row}: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_start_up(options: argparse.Namespace, scratch: Path) -> None:
    cases = {f"{options.corpora:,} corpora of {options.documents_each:,} documents":
             (options.corpora, options.documents_each),
             f"1 corpus of {options.documents:,} documents": (1, options.documents)}
    print("| data | samples | who | index cache | files | seconds | CPU s | peak, GB | kept, GB | open files |\n"
          "|---|--:|---|---|---|--:|--:|--:|--:|--:|")
    for number, (name, (corpora, documents)) in enumerate(cases.items()):
        folder = scratch / f"case{number}"
        folder.mkdir()
        tokens = sum(write_corpus(folder / f"c{i:05}", documents, options.mean_tokens, i, False)
                     for i in range(corpora))
        samples = int(tokens * EPOCH_SHARE) // options.seq_length
        found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            for who in ("ours", *(("megatron-core",) if has_megatron() and not options.ours_only else ())):
                with tempfile.TemporaryDirectory(dir=scratch) as cache:
                    for row in CACHES if who == "ours" else CACHES[1:]:  # megatron-core always keeps its index
                        for files in ("cold", "warm") if row != "first" else ("cold",):
                            if files == "cold":
                                drop_from_page_cache(folder)
                                drop_from_page_cache(Path(cache))
                            kept = None if row == "no index cache" else cache
                            found.setdefault((who, row, files), []).append(child(folder, who, samples, options, kept))
        for (who, row, files), rounds in found.items():
            seconds, cpu, peak, kept_gb, opened = (statistics.median(one[key] for one in rounds)
                                                   for key in ("seconds", "cpu", "peak", "kept", "files"))
            print(f"| {name} | {samples:,} | {who} | {row} | {files} | {seconds:.2f} | {cpu:.2f} | {peak:.2f} | "
                  f"{kept_gb:.2f} | {opened:.0f} |", flush=True)
        shutil.rmtree(folder)


Row = Callable[[int], int]
"""Reads sample i of a random order; its tokens."""


def readers(prefix: Path, seq_length: int, cache: Path) -> Iterator[tuple[str, Row, int]]:
    """Name, what reads, and how many samples a call reads."""
    corpus = IndexedCorpus(str(prefix))
    form = GPTSampleForm(seq_length, VOCAB_SIZE, VOCAB_SIZE - 1)
    ours = GPTDataset(corpus, range(len(corpus)), None, 1234, form)
    tokens = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
    starts = np.random.default_rng(0).permutation(len(tokens) // seq_length - 1) * seq_length
    stride = seq_length + 1
    yield "memory map, slice", lambda i: len(np.array(tokens[starts[i]:starts[i] + stride])), 1
    yield "memory map, slice as int64", lambda i: len(tokens[starts[i]:starts[i] + stride].astype(np.int64)), 1
    yield "dataset[i]", lambda i: len(ours.text(i)), 1
    yield "dataset.sample(i)", lambda i: len(ours.sample(i)["tokens"]), 1
    yield from loaders(ours)
    if has_megatron():
        from megatron.core.datasets.gpt_dataset import GPTDataset as Reference
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        theirs = Reference(IndexedDataset(str(prefix)), str(prefix), np.arange(len(corpus), dtype=np.int32), None,
                           Split.train, megatron_config(seq_length, [str(prefix)], None, "1,0,0", str(cache)))
        yield "megatron-core, dataset[i]", lambda i: len(theirs[i]["tokens"]), 1


def loaders(dataset: Dataset) -> Iterator[tuple[str, Row, int]]:
    loader, batch = Loader(dataset, 8, 0, 1), 64
    yield "loader", lambda i: loader.step(i, batch)[0]["tokens"].shape[1], batch


def measure_reading(options: argparse.Namespace, scratch: Path) -> None:
    prefix = scratch / "read"
    tokens = write_corpus(prefix, options.read_documents, options.mean_tokens, 1, True)
    print(f"\nReading from {tokens / 1e6:.0f} M tokens, documents of {options.mean_tokens} on average\n\n"
          "| tokens a sample | reader | samples / CPU s | MB of the corpus / CPU s | / slice | / slice as int64 |\n"
          "|--:|---|--:|--:|--:|--:|")
    for seq_length in options.read_lengths:
        cache = scratch / f"cache{seq_length}"
        rows = list(readers(prefix, seq_length, cache))
        count = min(options.read_samples, tokens // seq_length - 2)
        rates: dict[str, list[float]] = {name: [] for name, _, _ in rows}
        for round_ in range(options.rounds + 1):
            for name, row, each in rows:
                begin = time.process_time()
                for i in range(0, count - each + 1, each):
                    row(i)
                if round_:  # the first fills caches
                    rates[name].append(count // each * each / (time.process_time() - begin))
        plain, wide = rates["memory map, slice"], rates["memory map, slice as int64"]
        for name, _, _ in rows:
            rate = statistics.median(rates[name])
            ratios = [statistics.median(a / b for a, b in zip(rates[name], base, strict=True))
                      for base in (plain, wide)]
            print(f"| {seq_length} | {name} | {rate:,.0f} | {rate * (seq_length + 1) * 2 / 1e6:,.0f} | "
                  f"{ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--corpora", type=int, default=1000)
    parser.add_argument("--documents-each", type=int, default=10_000)
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--mean-tokens", type=int, default=500)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--read-documents", type=int, default=200_000)
    parser.add_argument("--read-samples", type=int, default=20_000)
    parser.add_argument("--read-lengths", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--part", choices=["all", "start-up", "reading"], default="all")
    parser.add_argument("--ours-only", action="store_true", help="leave out megatron-core's start-up, which takes long")
    parser.add_argument("--scratch", type=Path, help="folder on a disk with room for 25 bytes a document")
    for internal in ("--row", "--cache"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row is not None:
        built = megatron_start_up if options.row == "megatron-core" else start_up
        print(json.dumps(built(options.folder, options.seq_length, options.samples, options.cache)))
        return
    from benchmarks.machine import describe  # imports torch, which must not count as the rows' memory

    print(f"{describe('cpu')}\n{options.rounds} rounds\n")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        if options.part != "reading":
            measure_start_up(options, Path(scratch))
        if options.part != "start-up":
            measure_reading(options, Path(scratch))


if __name__ == "__main__":
    main(sys.argv[1:])
