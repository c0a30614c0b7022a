"""Build a last-word-prediction set in LAMBADA's form from held-out documents.

    python tools/make_lastword_set.py --input valid.jsonl.zst --output lastword.jsonl.gz --count 1000

Inputs hold one {"text": document} per line (.jsonl, also .gz or .zst), the output one {"text": passage} per line. Score
it with `tools/evaluate_zeroshot.py --tasks lambada=lastword.jsonl.gz`. The same inputs give the same bytes.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.report import check_writable
from megatron_ltd.lm_eval.tasks.build_lastword import LastWordOptions, build_lastword_set
from megatron_ltd.lm_eval.tasks.task_files import read_json_lines
from megatron_ltd.log import Console
from tools.commands.command_line import add_output, exit_code_of, parser_of


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    defaults = LastWordOptions()
    parser.add_argument("--input", required=True, nargs="+", metavar="FILE", help="documents that no model trains on")
    add_output(parser, required=True, metavar="FILE", help="a .jsonl or .jsonl.gz file")
    parser.add_argument("--count", type=int, help="maximum number of passages (default: all)")
    parser.add_argument("--min-words", type=int, default=defaults.min_words, help="in the context (%(default)s)")
    parser.add_argument("--max-words", type=int, default=defaults.max_words, help="in the passage (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="chooses the passages (%(default)s)")
    return parser.parse_args(argv)


def documents_of(files: list[str]) -> Iterator[str]:
    for file in tqdm(files, desc="documents", unit="file", disable=len(files) < 2):
        yield from (record.text("text") for record in read_json_lines(Path(file)))


def encode_lines(passages: list[str], packed: bool) -> bytes:
    """The file's bytes; gzip without a time stamp, so that the same passages give the same file."""
    data = "".join(json.dumps({"text": passage}, ensure_ascii=False) + "\n" for passage in passages).encode()
    return gzip.compress(data, mtime=0) if packed else data


def run(args: argparse.Namespace) -> None:
    options = LastWordOptions(args.min_words, args.max_words, args.count, args.seed)
    output = Path(args.output)
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"--output = {output} must end in .jsonl or .jsonl.gz.")
    check_writable(output)
    passages = build_lastword_set(documents_of(args.input), options)
    if not passages:
        raise DataError(
            f"--input = {' '.join(args.input)}: no passage of {options.min_words} to {options.max_words} words ends in "
            "a word said before. Give more text, or a smaller --min-words."
        )
    partial = output.with_name(output.name + ".partial")
    try:
        partial.write_bytes(encode_lines(passages, output.suffix == ".gz"))
        partial.replace(output)
    except OSError as error:
        raise DataError(f"--output = {output} cannot be written: {error}. Choose another.") from error
    words = sum(len(passage.split()) for passage in passages) / len(passages)
    Console().line(f"{output}: {len(passages)} passages, {words:.0f} words on average")


def main(argv: list[str]) -> int:
    return exit_code_of(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
