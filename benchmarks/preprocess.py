"""How fast text becomes a corpus, against the tokenizer library alone and against a loop like Megatron-LM's.

    python -m benchmarks.preprocess --data DATA --rounds 5 --before ../earlier

DATA is a folder of .jsonl.zst files and of tokenizers/gpt2. Rows take turns within a round, medians are printed. Every
row reads plain .jsonl and is a process of its own; `ours` is timed from its start to its end, imports included, and so
is `before`, the same command of an earlier checkout (--before). The
library alone is timed from texts to ids in memory: nothing is read, parsed or written; or from the file, with the
library's own reader, to ids in memory. The loop stands in for
Megatron-LM's tools/preprocess_data.py with GPT2BPETokenizer: a pool of workers that parse and encode one line at a
time, and a parent that writes one document at a time. Slow rows get the first `--slow-megabytes` of the text.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gigatoken
import numpy as np
import zstandard

from megatron_ltd.data.text.fast_bpe import FastBpe
from megatron_ltd.data.text.tokenizer import HuggingFaceEngine, gpt2_bpe_tokenizer

ROOT = Path(__file__).resolve().parents[1]
ROWS = ("before", "ours", "before, tokenizers", "ours, tokenizers", "gigatoken alone",
        "gigatoken alone, with its own reader", "tokenizers alone", "Megatron-style loop")
SLOW = ("before, tokenizers", "ours, tokenizers", "tokenizers alone", "Megatron-style loop")


def gpt2(folder: str) -> HuggingFaceEngine:
    return gpt2_bpe_tokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")


def lines_of(data: Path, least_bytes: float) -> Iterator[bytes]:
    """Lines of the training files, of each file in turn, so that a part has some of all."""
    streams = [io.BufferedReader(zstandard.open(path, "rb")) for path in sorted(data.glob("train/*.train*.jsonl.zst"))]
    size = 0
    while streams and size < least_bytes:
        for stream in list(streams):
            line = stream.readline()
            if not line:
                streams.remove(stream)
            size += len(line)
            yield line


_encoder: HuggingFaceEngine | None = None


def start_worker(folder: str) -> None:
    global _encoder
    _encoder = gpt2(folder)


def encode_line(line: str) -> tuple[list[int], int]:
    assert _encoder is not None
    ids = _encoder.encode(json.loads(line)["text"])
    if ids:
        ids.append(_encoder.eod)
    return ids, len(line)


def megatron_style(source: str, folder: str, workers: int, output: str) -> None:
    """What Megatron-LM's tool does, document by document."""
    lengths: list[int] = []
    documents = [0]
    with (open(source, encoding="utf-8") as lines, open(f"{output}.bin", "wb") as stream,
          multiprocessing.Pool(workers, initializer=start_worker, initargs=(folder,)) as pool):
        for ids, _ in pool.imap(encode_line, lines, 32):
            stream.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))
            lengths.append(len(ids))
            documents.append(len(lengths))
    pointer, pointers = 0, []
    for length in lengths:
        pointers.append(pointer)
        pointer += 2 * length
    with open(f"{output}.idx", "wb") as stream:
        for values, kind in ((lengths, np.int32), (pointers, np.int64), (documents, np.int64)):
            stream.write(np.array(values, dtype=kind).tobytes(order="C"))


def library_alone(source: str, folder: str, workers: int, fast: bool, reader: bool) -> None:
    """Prints the seconds, of the clock and of the processor, that encoding takes."""
    with open(source, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    exact = gpt2(folder)
    data = [text.encode() for text in texts]
    engine = FastBpe(exact)._fast if fast else None
    wall, cpu = time.perf_counter(), time.process_time()
    if engine is not None and reader:
        engine.encode_files(gigatoken.JsonlFileSource([source]), parallel=workers > 1)
    elif engine is not None:
        engine.encode_batch(data, parallel=workers > 1)
    else:
        exact.encode_batch(texts)
    print(time.perf_counter() - wall, time.process_time() - cpu)


def timed(row: str, source: Path, folder: Path, workers: int, before: Path | None) -> tuple[float, float]:
    """Seconds of the clock, and of all processors."""
    root = before.resolve() if before is not None and row.startswith("before") else ROOT
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "RAYON_NUM_THREADS": str(workers), "PYTHONPATH": paths,
                   "TOKENIZERS_PARALLELISM": "true" if row == "tokenizers alone" else "false"}
    with tempfile.TemporaryDirectory() as output:
        if row.startswith(("ours", "before")):
            engine = "tokenizers" if "tokenizers" in row else "gigatoken"
            command = [str(root / "tools" / "preprocess_data.py"), "--input", str(source), "--output-prefix",
                       f"{output}/c", "--append-eod", "--workers", str(workers), "--tokenizer-engine", engine,
                       "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(folder / "vocab.json"),
                       "--merge-file", str(folder / "merges.txt"), "--log-interval", "100000"]
        else:
            command = ["-m", "benchmarks.preprocess", "--row", row, "--source", str(source), "--data", str(folder),
                       "--workers", str(workers), "--output", f"{output}/c"]
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True,
                              check=False)
        wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(f"{row}: {done.stderr}")
    if "alone" in row:
        wall, cpu = map(float, done.stdout.split())
        return wall, cpu
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(options: argparse.Namespace, folder: Path, scratch: Path) -> None:
    from benchmarks.machine import describe  # imports torch, which must not count as the loop's time

    sources = {}
    for name, megabytes in (("all", options.megabytes), ("part", options.slow_megabytes)):
        path = scratch / f"{name}.jsonl"
        path.write_bytes(b"".join(lines_of(options.data, megabytes * 1e6)))
        texts = [json.loads(line)["text"] for line in path.read_bytes().splitlines()]
        ids, _ = FastBpe(gpt2(str(folder))).encode_flat(texts)
        sources[name] = path, sum(len(text.encode()) for text in texts) / 1e6, len(ids)
    print(f"{describe('cpu')}\n{sources['all'][1]:.0f} MB of text, {sources['all'][2]:,} tokens; slow rows "
          f"{sources['part'][1]:.0f} MB; {options.rounds} rounds\n")
    rows = [row for row in options.rows.split(";") if row in ROWS
            and (options.before is not None or not row.startswith("before"))]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for workers in options.workers:
            for row in rows:
                source, size, _ = sources["part" if row in SLOW else "all"]
                wall, cpu = timed(row, source, folder, workers, options.before)
                found.setdefault((row, workers), []).append((size / wall, size / cpu))
    print("| row | workers | MB/s | tokens/s | MB per CPU second | / loop, by clock | / loop, by CPU |\n"
          "|---|--:|--:|--:|--:|--:|--:|")
    for (row, workers), rates in found.items():
        tokens = sources["part" if row in SLOW else "all"][2] / sources["part" if row in SLOW else "all"][1]
        wall, cpu = (statistics.median(rate) for rate in zip(*rates, strict=True))
        loop = found.get(("Megatron-style loop", workers), rates)
        ratios = [statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
                  for ours, theirs in zip(zip(*rates, strict=True), zip(*loop, strict=True), strict=True)]
        print(f"| {row} | {workers} | {wall:.1f} | {wall * tokens / 1e6:.2f} M | {cpu:.1f} | {ratios[0]:.1f} | "
              f"{ratios[1]:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=1e9, help="of text; default: all there is")
    parser.add_argument("--slow-megabytes", type=float, default=20.0)
    parser.add_argument("--before", type=Path, metavar="DIR", help="a checkout of an earlier version, to time it too")
    parser.add_argument("--rows", default=";".join(ROWS), metavar="NAME;...", help="only these rows")
    for internal in ("--row", "--source", "--output"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    if options.row is None:
        with tempfile.TemporaryDirectory() as scratch:
            measure(options, options.data / "tokenizers" / "gpt2", Path(scratch))
    elif options.row == "Megatron-style loop":
        megatron_style(options.source, str(options.data), options.workers[0], options.output)
    else:
        library_alone(options.source, str(options.data), options.workers[0], options.row.startswith("gigatoken"),
                      "reader" in options.row)


if __name__ == "__main__":
    main()
