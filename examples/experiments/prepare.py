"""Tokenizer and corpora of an experiment, made once from text files by the tools that users have."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.experiments.runs import ROOT
from megatron_ltd.errors import ConfigError, DataError


@dataclass(frozen=True)
class Text:
    """Files of {"text": document} lines: .jsonl, .jsonl.gz, .jsonl.zst."""

    train: tuple[Path, ...]
    valid: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path) -> "Text":
        """The *.train*.jsonl* and *.valid*.jsonl* files of a folder.

        Raises:
            ConfigError: there are none.
        """
        train, valid = (tuple(sorted(folder.glob(f"*.{part}*.jsonl*"))) for part in ("train", "valid"))
        for name, found in (("train", train), ("valid", valid)):
            if not found:
                raise ConfigError(f"--text = {folder}: no file there is called *.{name}.jsonl, .jsonl.gz or "
                                  '.jsonl.zst; put {"text": "..."} lines into books.train.jsonl and books.valid.jsonl, '
                                  "say")
        return cls(train, valid)


@dataclass(frozen=True)
class Corpus:
    """What runs read."""

    tokenizer: Path
    train: Path
    valid: Path

    def flags(self) -> tuple[str, ...]:
        return ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.tokenizer),
                "--train-data-path", str(self.train), "--valid-data-path", str(self.valid))


def prepare(text: Text, vocab_size: int, folder: Path, say: Callable[[str], None]) -> Corpus:
    """The corpus, with a byte-level BPE of `vocab_size` tokens; what is there already is not made again.

    Args:
        folder: absolute, or relative to the checkout, which is where runs start.

    Raises:
        ConfigError: there is neither text nor corpus.
        DataError: a tool failed.
    """
    corpus = Corpus(folder / "tokenizer" / "tokenizer.json", folder / "train_text_document",
                    folder / "valid_text_document")
    if not text.train and not (ROOT / folder / "train_text_document.idx").exists():
        raise ConfigError(f"--text is not given, and there is no corpus in {folder}; give a folder of text")
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    if not (ROOT / corpus.tokenizer).exists():
        say(f"training a tokenizer of {vocab_size} tokens")
        _tool("train_tokenizer", "--input", *map(str, text.train), "--output", str(corpus.tokenizer.parent), "--type",
              "bpe", "--vocab-size", str(vocab_size))
    for part, files in (("train", text.train), ("valid", text.valid)):
        if not (ROOT / folder / f"{part}_text_document.idx").exists():
            say(f"tokenizing {len(files)} files of {part} text")
            _tool("preprocess_data", "--input", *map(str, files), "--output-prefix", str(folder / part),
                  "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(corpus.tokenizer),
                  "--append-eod")
    return corpus


def _tool(name: str, *arguments: str) -> None:
    run_checked([sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments])


def run_checked(command: Sequence[str]) -> None:
    """Run a program and show what it says only if it fails.

    Raises:
        DataError: it failed.
    """
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise DataError(f"{' '.join(command[1:3])} ... ended with exit code {done.returncode}:\n"
                        + "\n".join((done.stdout + done.stderr).splitlines()[-15:]))
