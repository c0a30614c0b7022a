"""Merges several .bin/.idx corpora into one, in order.

    python tools/merge_datasets.py --input data/part-0_text_document data/part-1_text_document --output data/all
    python tools/merge_datasets.py --input parts --output data/all      # all corpora in a folder, by name

All corpora must have the same token type, and the same tokenizer if their manifests name one; otherwise the exit code
is 21 and the message names the difference.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.data.corpus.merge import corpora_in, merge_corpora
from tools.commands.command_line import add_output, exit_code_of, parser_of


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH",
                        help="corpora without .bin or .idx, or folders of corpora")
    add_output(parser, "--output-prefix", required=True, metavar="PREFIX", help="path of the output without suffix")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    prefixes = [prefix for path in options.input for prefix in (corpora_in(path) if os.path.isdir(path) else [path])]
    corpus = merge_corpora(prefixes, options.output)
    print(f"Wrote {corpus.prefix}.bin and .idx from {len(prefixes)} corpora: {corpus.documents} "
          f"documents, {len(corpus)} sequences, {corpus.tokens} tokens of type {corpus.dtype.name}.")


def main(arguments: list[str]) -> int:
    return exit_code_of(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
