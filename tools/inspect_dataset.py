"""Shows what a .bin/.idx corpus holds: counts, lengths, token ids, and the text of single documents.

    python tools/inspect_dataset.py --data-path data/books_text_document --verify --output lengths.png
    python tools/inspect_dataset.py --data-path data/books_text_sentence --documents 0 17 \\
        --tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt

Opening a corpus checks its header, its index and both file sizes, and its manifest if it has one; --verify reads
every token besides, and with a tokenizer checks it against the vocabulary, and with a manifest the digests of both
files. A corpus that fails ends the run with exit code 21, and with file and offset or what the manifest says.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.bert.mapping import LONGEST_SENTENCE_TOKENS
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.manifest import Manifest, check_manifest, verify_manifest
from megatron_ltd.data.text.tokenizer import Tokenizer, build_tokenizer
from megatron_ltd.errors import ConfigError, DataError
from tools.commands.command_line import add_output, exit_code_of, parser_of

SPANS = 64  # parts of the corpus in which token ids are checked without --verify
BAR = 40
SUFFIXES = (".png", ".svg", ".pdf")
LONGEST_TEXT = 2000


def document_tokens(corpus: IndexedCorpus) -> NDArray[np.int64]:
    """Tokens of each document."""
    before = np.zeros(len(corpus) + 1, dtype=np.int64)
    np.cumsum(corpus.sequence_lengths, dtype=np.int64, out=before[1:])
    return np.diff(before[corpus.document_indices])


def length_classes(tokens: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(shortest, longest, count) for lengths 0, 1, 2 to 3, 4 to 7 and so on, from the first that occurs."""
    classes = np.ceil(np.log2(tokens + 1.0)).astype(np.int64)  # bits of the length
    counts = np.bincount(classes)
    return [(1 << (number - 1) if number else 0, (1 << number) - 1, int(count)) for number, count in enumerate(counts)
            if counts[:number + 1].any()]


def spread(tokens: NDArray[np.integer]) -> str:
    """Mean, median, ninth decile and longest of lengths."""
    if not len(tokens):
        return "none"
    median, ninth = np.percentile(tokens, (50, 90))
    return f"mean {tokens.mean():,.1f}, median {median:,.0f}, 90% up to {ninth:,.0f}, longest {tokens.max():,}"


def describe(corpus: IndexedCorpus, ids: tuple[int, int], everything: bool) -> list[str]:
    """A summary of the corpus, as lines."""
    documents, tokens = corpus.documents, document_tokens(corpus)
    bin_bytes = corpus.tokens * corpus.dtype.itemsize
    lines = [corpus.prefix,
             f"  documents       {documents:,}, {int((tokens == 0).sum()):,} of them without a token",
             f"  sequences       {len(corpus):,}",
             f"  tokens          {corpus.tokens:,} of type {corpus.dtype.name}, {bin_bytes / 1e6:,.1f} MB",
             f"  token ids       {ids[0]} to {ids[1]}"
             + ("" if everything else f" (in {SPANS} spans; --verify reads all)"),
             f"  in a document   {spread(tokens)}"]
    sequences = np.diff(corpus.document_indices)
    if sequences.max(initial=0) > 1:
        too_long = np.flatnonzero(corpus.sequence_lengths > LONGEST_SENTENCE_TOKENS)
        owners = np.unique(np.searchsorted(corpus.document_indices, too_long, side="right"))
        lines += [f"  in a sequence   {spread(corpus.sequence_lengths)}",
                  f"  for BERT        {int((sequences >= 2).sum()):,} documents of two sentences or more; "
                  f"{len(owners):,} are left out for a sentence of more than {LONGEST_SENTENCE_TOKENS} tokens"]
    return [*lines, f"  digest          {corpus.content_digest}"]


def origin(manifest: Manifest | None, verified: bool) -> list[str]:
    """The origin of a corpus according to its manifest."""
    if manifest is None:
        return ["  manifest        none: the origin of the corpus is unknown"]
    kind = manifest.settings.get("tokenizer_type", "not known")
    size = sum(source.bytes for source in manifest.sources)
    return [f"  tokenizer       {kind}, {manifest.vocab_size} ids, digest {(manifest.tokenizer or 'not known')[:12]}",
            f"  made from       {len(manifest.sources)} files of {size / 1e6:,.1f} MB",
            f"  manifest        agrees with {'all of both files' if verified else 'the index and both sizes'}"]


def table(tokens: NDArray[np.int64]) -> list[str]:
    """A histogram of document lengths, as a table with bars."""
    classes = length_classes(tokens)
    most = max((count for _, _, count in classes), default=0)
    lines = ["", f"  {'tokens':>21}  {'documents':>12}"]
    for shortest, longest, count in classes:
        span = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
        lines.append(f"  {span:>21}  {count:>12,}  {'#' * -(-count * BAR // most)}".rstrip())
    return lines


def draw(corpora: list[IndexedCorpus], output: Path) -> None:
    """The same as a plot.

    Raises:
        DataError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DataError("--output needs the package matplotlib. Install it: pip install matplotlib.") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for corpus in corpora:
        tokens = document_tokens(corpus)
        edges = [0.5, *(2.0 ** power for power in range(int(tokens.max(initial=1)).bit_length() + 1))]
        axes.hist(tokens[tokens > 0], bins=edges, histtype="step", label=Path(corpus.prefix).name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.legend()
    try:
        figure.savefig(output, dpi=160)
    except OSError as error:
        raise DataError(f"--output = {output} cannot be written: {error}.") from error
    finally:
        pyplot.close(figure)


def show(corpus: IndexedCorpus, number: int, tokenizer: Tokenizer | None) -> list[str]:
    """One document: its text if there is a tokenizer, else its token ids; one line per sequence.

    Raises:
        ConfigError: there is no such document.
    """
    documents = corpus.documents
    if not 0 <= number < documents:
        raise ConfigError(f"--documents = {number}: {corpus.prefix} has documents 0 to {documents - 1}.")
    first, end = corpus.document_indices[number:number + 2].tolist()
    sequences = f", sequences {first} to {end - 1}" if end > first else ": no sequence"
    lines = ["", f"  document {number}{sequences}"]
    for sequence in range(first, end):
        ids = corpus.read(sequence).tolist()
        text = tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))
        left_out = f" ... ({len(text) - LONGEST_TEXT:,} more characters)" if len(text) > LONGEST_TEXT else ""
        lines.append(f"    {text[:LONGEST_TEXT]!r}{left_out}")
    return lines


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--data-path", nargs="+", required=True, metavar="PREFIX", help="corpora, without .bin or .idx")
    parser.add_argument("--documents", nargs="+", type=int, default=[], metavar="N", help="show these, counted from 0")
    parser.add_argument("--verify", action="store_true", help="read every token")
    add_output(parser, "--histogram", type=Path, metavar="FILE", help="plot document lengths: .png, .svg or .pdf")
    parser.add_argument("--tokenizer-type", help="tokenizer that wrote the corpora")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="SentencePiece .model, tokenizer.json or its folder")
    parser.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT-2 BPE, or vocab.txt of BERT")
    parser.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT-2 BPE")
    parser.add_argument("--vocab-size", type=int, help="token ids of NullTokenizer")
    options = parser.parse_args(arguments)
    if options.output is not None and options.output.suffix not in SUFFIXES:
        raise ConfigError(f"--output = {options.output}: choose a name that ends in {', '.join(SUFFIXES)}.")
    return options


def run(options: argparse.Namespace) -> None:
    tokenizer = None
    if options.tokenizer_type is not None:
        tokenizer = build_tokenizer(DataConfig(
            tokenizer_type=options.tokenizer_type, tokenizer_model=options.tokenizer_model,
            vocab_file=options.vocab_file, merge_file=options.merge_file), options.vocab_size)
    corpora = [IndexedCorpus(prefix) for prefix in options.data_path]
    for corpus in corpora:
        check = verify_manifest if options.verify else check_manifest
        manifest = check(corpus, tokenizer.digest if tokenizer is not None else None)
        ids = corpus.token_id_range(spans=None if options.verify else SPANS)
        if manifest is not None and manifest.vocab_size is not None and ids[1] >= manifest.vocab_size:
            raise DataError(f"Corpus {corpus.prefix} holds token id = {ids[1]}, and its manifest says that there are "
                            f"{manifest.vocab_size}. Write it again.")
        if tokenizer is not None:
            corpus.check_ids(np.array(ids), tokenizer.vocab_size)
        lines = [*describe(corpus, ids, options.verify), *origin(manifest, options.verify),
                 *table(document_tokens(corpus))]
        for number in options.documents:
            lines += show(corpus, number, tokenizer)
        print("\n".join(lines))
    if options.output is not None:
        draw(corpora, options.output)
        print(f"Drew {options.output}.")


def main(arguments: list[str]) -> int:
    return exit_code_of(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
