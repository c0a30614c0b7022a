"""Split documents into those to train on and those to score with, both as .jsonl.

    python examples/hold_out.py --input texts/ --output-prefix run/text    # run/text.{train,heldout}.jsonl

Input is whatever tools/preprocess_data.py reads. Every twentieth document is held out; of fewer than twenty the last
twentieth of each is.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.data.preprocess.documents import sorted_documents
from megatron_ltd.data.preprocess.table_input import open_input
from megatron_ltd.data.preprocess.text_input import expand_inputs
from megatron_ltd.errors import DataError
from megatron_ltd.log import Console
from tools.commands.command_line import exit_code_of, parser_of

SHARE = 20
"""Every document of this number is held out."""


def documents(paths: list[str], key: str) -> Iterator[str]:
    """The texts of all files.

    Raises:
        DataError: a line holds no document.
    """
    for path in paths:
        for block in open_input(path, [key]).blocks():
            texts, bad = sorted_documents(block, [key], most_bad=1)
            if bad:
                raise DataError(f"{bad[0]} Correct or remove this line (file:line:byte).")
            yield from (text for text in texts[0] if text.strip())


def split(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Texts, and whether they are held out."""
    first = list(itertools.islice(texts, SHARE))
    if len(first) < SHARE:  # fewer documents are cut
        for text in first:
            cut = text.rfind("\n", 0, len(text) - len(text) // SHARE) + 1 or len(text) - len(text) // SHARE
            yield text[:cut], False
            yield text[cut:], True
        return
    for number, text in enumerate(itertools.chain(first, texts), start=1):
        yield text, number % SHARE == 0


def run(args: argparse.Namespace) -> None:
    counts = {False: 0, True: 0}
    parts = {held: Path(f"{args.output_prefix}.{name}.jsonl.partial")
             for held, name in ((False, "train"), (True, "heldout"))}
    parts[True].parent.mkdir(parents=True, exist_ok=True)
    with parts[False].open("w", encoding="utf-8") as train, parts[True].open("w", encoding="utf-8") as heldout:
        for text, is_held_out in split(documents(expand_inputs(args.input), args.json_key)):
            if text.strip():
                (heldout if is_held_out else train).write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                counts[is_held_out] += 1
    if not all(counts.values()):
        raise DataError(f"--input = {' '.join(args.input)}: too little text to hold some of it out; give more.")
    for part in parts.values():
        part.rename(part.with_suffix(""))
    Console().line(f"{args.output_prefix}: {counts[False]} documents to train on, {counts[True]} held out")


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key that holds the text of .jsonl")
    parser.add_argument("--output-prefix", required=True, metavar="PATH", help="path of the two files without suffix")
    args = parser.parse_args(argv)
    return exit_code_of(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
