"""Turns text into a corpus to train on: `{output-prefix}_{key}_document.bin` and `.idx`, as Megatron-LM's tool does.

    python tools/preprocess_data.py --input books.jsonl.zst --output-prefix data/books --append-eod --workers 4 \\
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt

Input is loose JSON (an object a line) in plain, .gz or .zst files; a .txt file is one document. Each
--json-keys makes a corpus of its own. The output does not depend on --workers. A bad line ends the run with
exit code 21 and its place.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.config import DataConfig
from megatron_ltd.data.preprocess import EncodingPlan, Progress, preprocess
from megatron_ltd.data.text_input import expand_inputs
from megatron_ltd.errors import ConfigError, UserError

NOT_HERE = {
    "--split-sentences": "sentence corpora are not supported yet; leave the flag out for GPT",
    "--keep-newlines": "sentence corpora are not supported yet; text is kept as it is",
    "--lang": "sentence corpora are not supported yet; leave the flag out for GPT",
    "--partitions": "use --workers; the input is never copied into partitions",
    "--keep-sequential-samples": "documents always keep the order of the input; leave the flag out",
    "--dataset-impl": "there is one format, Megatron's mmap; leave the flag out",
    "--vocab": "it is called --vocab-file",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files or globs, in order")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--output-prefix", required=True, metavar="PATH", help="path of the output without suffix")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--log-interval", type=int, default=1000, help="documents between progress lines")
    parser.add_argument("--tokenizer-type", required=True, choices=[
        "GPT2BPETokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer"])
    parser.add_argument("--tokenizer-model", metavar="FILE", help="SentencePiece .model, tokenizer.json or its folder")
    parser.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT-2 BPE")
    parser.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT-2 BPE")
    parser.add_argument("--vocab-size", type=int, help="token ids of NullTokenizer")
    options, unknown = parser.parse_known_args(arguments)
    for flag in (word.split("=")[0] for word in unknown):
        if flag.startswith("-"):
            raise ConfigError(f"{flag}: {NOT_HERE.get(flag, 'there is no such flag; see --help')}.")
    if unknown:
        raise ConfigError(f"{unknown[0]} belongs to no flag. See --help.")
    for name in ("workers", "log_interval"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} = {getattr(options, name)} must be at least 1.")
    if len(set(options.json_keys)) < len(options.json_keys):
        raise ConfigError(f"--json-keys = {' '.join(options.json_keys)}: a key is given twice.")
    return options


def run(options: argparse.Namespace) -> None:
    tokenizer = DataConfig(tokenizer_type=options.tokenizer_type, tokenizer_model=options.tokenizer_model,
                           vocab_file=options.vocab_file, merge_file=options.merge_file)
    plan = EncodingPlan(tokenizer, options.vocab_size, tuple(options.json_keys), options.append_eod)

    def report(progress: Progress) -> None:
        print(progress.line(), file=sys.stderr, flush=True)

    for corpus in preprocess(plan, expand_inputs(options.input), options.output_prefix, options.workers, report,
                             options.log_interval):
        print(f"Wrote {corpus.prefix}.bin and .idx: {corpus.documents} documents, {corpus.tokens} tokens of "
              f"type {corpus.dtype}.")


def main(arguments: list[str]) -> int:
    try:
        run(parse(arguments))
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
