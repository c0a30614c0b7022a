"""Trains a tokenizer on the text of a corpus; the same input gives the same files.

    python tools/train_tokenizer.py --input 'data/*.jsonl.zst' --output tokenizer --type bpe --vocab-size 8192

`bpe` is GPT-2's byte-level BPE: tokenizer.json (--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR),
and vocab.json with merges.txt (GPT2BPETokenizer --vocab-file --merge-file), which give the same ids.
`sentencepiece` is BPE with byte fallback as in Llama: tokenizer.model (SentencePieceTokenizer
--tokenizer-model DIR/tokenizer.model).
`wordpiece` is BERT's, without upper case: vocab.txt (BertWordPieceLowerCase --vocab-file DIR/vocab.txt).
"""

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_ltd.data.preprocess.documents import sorted_documents
from megatron_ltd.data.preprocess.table_input import open_input
from megatron_ltd.data.preprocess.text_input import expand_inputs
from megatron_ltd.data.text.wordpiece import CONTINUATION, SPECIAL_TOKENS, wordpiece_engine
from megatron_ltd.errors import ConfigError, DataError
from tools.commands.command_line import add_output, exit_code_of, parser_of

EOD = "<|endoftext|>"
BYTES = 256
SENTENCE_BYTES = 4000  # SentencePiece skips longer sentences


def texts(paths: list[str], key: str) -> Iterator[str]:
    """The documents of all files."""
    for path in paths:
        for block in open_input(path, (key,)).blocks():
            found, bad = sorted_documents(block, (key,), most_bad=1)
            if bad:
                told = str(bad[0]).replace(" (--json-keys)", " (--json-key)")
                raise DataError(f"{told} Correct or remove this line (file:line:byte) and run again; nothing was "
                                "written.")
            yield from found[0]


def sentences(paths: list[str], key: str) -> Iterator[str]:
    """Lines of the documents, split where they are too long for SentencePiece."""
    for text in texts(paths, key):
        for line in text.split("\n"):
            while len(line.encode()) > SENTENCE_BYTES:
                cut = line.rfind(" ", 1, SENTENCE_BYTES // 4)  # a character has at most 4 bytes
                cut = cut if cut > 0 else SENTENCE_BYTES // 4
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line


def train_bpe(paths: list[str], key: str, vocab_size: int) -> dict[str, bytes]:
    """Files of a byte-level BPE tokenizer, by name."""
    if vocab_size <= BYTES:
        raise ConfigError(f"--vocab-size = {vocab_size}: byte-level BPE has {BYTES} bytes and {EOD} to "
                          f"begin with, so at least {BYTES + 1}.")
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOD], show_progress=sys.stderr.isatty(),
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    engine.train_from_iterator(texts(paths, key), trainer)
    if engine.get_vocab_size() < vocab_size:
        raise DataError(f"The input yields only {engine.get_vocab_size()} tokens, --vocab-size = "
                        f"{vocab_size} were requested. Give more text or a smaller --vocab-size.")
    model = json.loads(engine.to_str())["model"]
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    return {"tokenizer.json": engine.to_str(pretty=True).encode(),
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False).encode(),
            "merges.txt": ("\n".join(merges) + "\n").encode()}


def train_wordpiece(paths: list[str], key: str, vocab_size: int) -> dict[str, bytes]:
    """Files of a WordPiece tokenizer, by name.

    At most half of the vocabulary is single characters, at the start of a word or inside it; words with rarer
    characters are ignored. The library numbers characters in an order that changes from run to run and breaks ties by
    these numbers, so the characters are passed to it first.
    """
    engine = wordpiece_engine({token: number for number, token in enumerate(SPECIAL_TOKENS)}, lowercase=True)
    words: Counter[str] = Counter()
    for text in texts(paths, key):
        words.update(word for word, _ in engine.pre_tokenizer.pre_tokenize_str(engine.normalizer.normalize_str(text)))
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for piece in (word[0], *(f"{CONTINUATION}{character}" for character in word[1:])):
            pieces[piece] += count
    kept = sorted(sorted(pieces), key=lambda piece: -pieces[piece])[:vocab_size // 2]
    alphabet = [*SPECIAL_TOKENS, *sorted(kept, key=lambda piece: (piece.startswith(CONTINUATION), piece))]
    known = set(alphabet)
    lessons = (" ".join([word] * count) for word, count in sorted(words.items())
               if word[0] in known and all(f"{CONTINUATION}{character}" in known for character in word[1:]))
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=alphabet, min_frequency=1,
                                        show_progress=sys.stderr.isatty(), continuing_subword_prefix=CONTINUATION)
    engine.train_from_iterator(lessons, trainer)
    tokens = [token for token, _ in sorted(engine.get_vocab().items(), key=lambda item: item[1])]
    if len(tokens) != vocab_size:
        raise DataError(f"The input yields {len(tokens)} tokens, --vocab-size = {vocab_size} were requested. Give more "
                        "text, or another --vocab-size.")
    return {"vocab.txt": ("\n".join(tokens) + "\n").encode()}


def train_sentencepiece(paths: list[str], key: str, vocab_size: int) -> dict[str, bytes]:
    """Files of a SentencePiece tokenizer, by name."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(paths, key), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, character_coverage=0.99995, input_sentence_size=0,
            max_sentence_length=SENTENCE_BYTES + 8, num_threads=1, minloglevel=1)
    except RuntimeError as error:
        raise DataError(f"SentencePiece cannot train --vocab-size = {vocab_size} on this input: {error}. It "
                        "needs at least 259 tokens and one for each character, and enough text.") from error
    return {"tokenizer.model": model.getvalue()}


TRAINERS = {"bpe": train_bpe, "sentencepiece": train_sentencepiece, "wordpiece": train_wordpiece}


def write(folder: str, files: dict[str, bytes]) -> None:
    """Writes each file under a temporary name, then renames all of them."""
    try:
        os.makedirs(folder, exist_ok=True)
        for name, data in files.items():
            with open(os.path.join(folder, f"{name}.partial"), "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        for name in files:
            os.replace(os.path.join(folder, f"{name}.partial"), os.path.join(folder, name))
    except OSError as error:
        raise DataError(f"--output = {folder} cannot be written: {error}.") from error


def run(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE",
                        help="files, folders or globs, as for tools/preprocess_data.py")
    add_output(parser, required=True, metavar="DIR", help="folder for the tokenizer")
    parser.add_argument("--type", choices=list(TRAINERS), default="bpe", help="kind of tokenizer")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of tokens, including special ones")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key that holds text")
    options = parser.parse_args(arguments)
    files = TRAINERS[options.type](expand_inputs(options.input), options.json_key, options.vocab_size)
    write(options.output, files)
    print(f"Wrote {', '.join(os.path.join(options.output, name) for name in files)}: {options.vocab_size} tokens.")


def main(arguments: list[str]) -> int:
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
