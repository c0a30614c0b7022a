"""Tokenizes text into a training corpus: `{output}_{key}_document.bin` and `.idx`, as Megatron-LM's tool does.

    python tools/preprocess_data.py --input books.jsonl.zst --output data/books --append-eod --workers 4 \\
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt

For BERT, --split-sentences makes every sentence a sequence, in `{output}_{key}_sentence`:

    python tools/preprocess_data.py --input books.jsonl.zst --output data/books --split-sentences --workers 4 \\
        --tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt

Input is JSON lines in plain, .gz or .zst files, .parquet files (one document per row), .txt files (one document each),
or a Hugging Face dataset (--hf-dataset). Each of --json-keys becomes a separate corpus. The output does not depend on
--workers. A line without a valid document ends the run with exit code 21 and its position; with --on-bad-line such
lines are skipped (skip), or skipped and also written next to the output (quarantine: {output}_rejected.jsonl,
and .txt with the reasons).

A corpus gets its name when it is complete. After a kill or a failure the same command with --resume continues.
"""

import argparse
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.preprocess.encoding import EncodingPlan
from megatron_ltd.data.preprocess.pipeline import CHECKPOINT_SECONDS, Progress, preprocess
from megatron_ltd.data.preprocess.run_state import state_path
from megatron_ltd.data.preprocess.table_input import HfSource
from megatron_ltd.data.preprocess.text_input import expand_inputs
from megatron_ltd.data.text.fast_bpe import ENGINES
from megatron_ltd.data.text.sentences import SPLITTERS, SentencePlan
from megatron_ltd.errors import ConfigError, UserError, flag_name
from tools.commands.command_line import add_output, parser_of

NOT_HERE = {
    "--partitions": "use --workers; the input is never copied into partitions",
    "--keep-sequential-samples": "documents always keep the order of the input; leave the flag out",
    "--dataset-impl": "there is one format, Megatron's mmap; leave the flag out",
    "--vocab": "it is called --vocab-file",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--input", nargs="+", metavar="PATH", help="files, folders or globs, in order")
    parser.add_argument("--hf-dataset", metavar="NAME", help="instead of --input, a Hugging Face dataset: "
                        "a folder written by save_to_disk, a folder or file of data, or a name on the hub")
    parser.add_argument("--hf-config", metavar="NAME", help="configuration of --hf-dataset")
    parser.add_argument("--hf-split", metavar="SPLIT", help="split of --hf-dataset (default: train)")
    parser.add_argument("--hf-streaming", action="store_true",
                        help="read --hf-dataset without copying it to this machine")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--bos-token", metavar="TOKEN", help="begin each document with this token; auto: with the one "
                        "that the tokenizer's files say to add, if any (Llama, Mistral)")
    parser.add_argument("--eod-token", metavar="TOKEN", help="the token that ends documents; default: the one that the "
                        "tokenizer's files declare, or a widely used one")
    parser.add_argument("--split-sentences", action="store_true", help="make every sentence a separate sequence (BERT)")
    parser.add_argument("--keep-newlines", action="store_true",
                        help="with --split-sentences: sentences keep the white space that follows them")
    parser.add_argument("--sentence-splitter", choices=SPLITTERS, default="auto",
                        help="the built-in rules, nltk's punkt, or punkt if nltk has its data (auto)")
    parser.add_argument("--lang", default="english", metavar="LANGUAGE",
                        help="nltk's name for the language of the text; the rules know English abbreviations")
    add_output(parser, "--output-prefix", required=True, metavar="PREFIX", help="path of the output without suffix")
    parser.add_argument("--on-bad-line", choices=["fail", "skip", "quarantine"], default="fail",
                        help="what to do with lines without a valid document")
    parser.add_argument("--workers", type=int, default=1, help="number of tokenizing processes (a short run needs one)")
    parser.add_argument("--tokenizer-engine", choices=ENGINES, default="auto",
                        help="library for byte-level BPE; the ids are the same (auto: gigatoken where it can)")
    parser.add_argument("--resume", action="store_true", help="continue a run that was killed or failed")
    parser.add_argument("--checkpoint-seconds", type=float, default=CHECKPOINT_SECONDS, metavar="SECONDS",
                        help="time between two records of the progress, for --resume")
    parser.add_argument("--log-interval", type=int, default=1000, help="documents between progress lines")
    parser.add_argument("--tokenizer-type", required=True, choices=[
        "GPT2BPETokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer", "BertWordPieceLowerCase",
        "BertWordPieceCase", "NullTokenizer"], help="kind of tokenizer")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="SentencePiece .model, tokenizer.json or its folder")
    parser.add_argument("--tokenizer-control-symbols", action="store_true", help="read the names of a SentencePiece "
                        "model's control symbols in the text, such as <s>, as these symbols")
    parser.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT-2 BPE, or vocab.txt of BERT")
    parser.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT-2 BPE")
    parser.add_argument("--vocab-size", type=int, help="token ids of NullTokenizer")
    options, unknown = parser.parse_known_args(arguments)
    for flag in (word.split("=")[0] for word in unknown):
        if flag.startswith("-"):
            raise ConfigError(f"{flag}: {NOT_HERE.get(flag, 'there is no such flag; see --help')}.")
    if unknown:
        raise ConfigError(f"{unknown[0]} does not belong to a flag. See --help.")
    for name in ("workers", "log_interval"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{flag_name(name)} = {getattr(options, name)} must be at least 1.")
    if not options.checkpoint_seconds >= 0:
        raise ConfigError(f"--checkpoint-seconds = {options.checkpoint_seconds} must be at least 0.")
    if not options.split_sentences:
        given = {"--keep-newlines": options.keep_newlines, "--sentence-splitter": options.sentence_splitter != "auto",
                 "--lang": options.lang != "english"}
        for flag in (flag for flag in given if given[flag]):
            raise ConfigError(f"{flag} has no effect without --split-sentences; add that, or leave {flag} out: whole "
                              "documents are kept unchanged.")
    if (options.input is None) == (options.hf_dataset is None):
        raise ConfigError("Give either --input or --hf-dataset.")
    for flag in ("--hf-config", "--hf-split", "--hf-streaming"):
        if getattr(options, flag[2:].replace("-", "_")) and options.hf_dataset is None:
            raise ConfigError(f"{flag} has no effect without --hf-dataset; add that, or leave {flag} out.")
    if len(set(options.json_keys)) < len(options.json_keys):
        raise ConfigError(f"--json-keys = {' '.join(options.json_keys)}: a key is given twice.")
    return options


def sentence_plan(options: argparse.Namespace) -> SentencePlan:
    """The sentence splitter, chosen once so that all workers use the same one."""
    plan = SentencePlan(options.sentence_splitter, options.lang, options.keep_newlines)
    name = plan.build().name
    if options.sentence_splitter == "auto":
        reason = "found" if name == "punkt" else f"nltk or its data punkt_tab for {options.lang} is not installed"
        print(f"Sentences are split by {name} ({reason}).", file=sys.stderr, flush=True)
    return replace(plan, splitter=name)


def run(options: argparse.Namespace) -> None:
    tokenizer = DataConfig(tokenizer_type=options.tokenizer_type, tokenizer_model=options.tokenizer_model,
                           vocab_file=options.vocab_file, merge_file=options.merge_file, bos_token=options.bos_token,
                           eod_token=options.eod_token,
                           tokenizer_control_symbols=options.tokenizer_control_symbols)
    plan = EncodingPlan(tokenizer, options.vocab_size, tuple(options.json_keys), options.append_eod,
                        sentence_plan(options) if options.split_sentences else None, options.on_bad_line,
                        options.tokenizer_engine)

    rejected = 0

    def report(progress: Progress) -> None:
        nonlocal rejected
        rejected = progress.rejected
        print(progress.line(), file=sys.stderr, flush=True)

    inputs: list[str | HfSource] = list(expand_inputs(options.input)) if options.hf_dataset is None else \
        [HfSource(options.hf_dataset, options.hf_config, options.hf_split or "train", options.hf_streaming)]
    written = preprocess(plan, inputs, options.output, options.workers, report,
                         options.log_interval, options.resume, options.checkpoint_seconds)
    if rejected:
        kept = f"; they are in {options.output}_rejected.jsonl, the reasons in .txt" \
            if options.on_bad_line == "quarantine" else ""
        print(f"Skipped {rejected} lines without a valid document{kept}.")
    for corpus in written:
        print(f"Wrote {corpus.prefix}.bin and .idx: {corpus.documents} documents, "
              f"{len(corpus)} sequences, {corpus.tokens} tokens of type {corpus.dtype.name}.")


def main(arguments: list[str]) -> int:
    options = None
    try:
        options = parse(arguments)
        run(options)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        code = 128 + signal.SIGINT
    else:
        return 0
    if options is not None and os.path.exists(state_path(options.output)):
        print("The work so far is kept: the same command with --resume continues from there.", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
