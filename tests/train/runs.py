"""Small training runs on a real corpus: what the command line runs, in gloo ranks of this machine.

The corpus is the text of Python's own documentation as far as it ships with the interpreter, in a byte-level BPE of
320 ids that is trained on it.
"""

import contextlib
import io
import itertools
import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest import mock

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_ltd import finetune_gpt, finetune_vit, pretrain_bert, pretrain_gpt
from megatron_ltd.checkpoint import io as checkpoint_io
from megatron_ltd.checkpoint.layout import checkpoint_path
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.data.corpus.writer import IndexedCorpusWriter
from megatron_ltd.data.text.sentences import RuleSplitter
from megatron_ltd.data.text.wordpiece import wordpiece_engine
from megatron_ltd.model.attention.context import ContextMaker
from megatron_ltd.model.stack import Stack
from megatron_ltd.token_drop.plan import StepPlan, TokenSet
from megatron_ltd.token_drop.registry import Policies
from megatron_ltd.train.process.environment import Launch
from tests.gloo import launch_ranks
from tools.train_tokenizer import train_wordpiece

RECIPES: dict[str, Any] = {"pretrain_gpt": pretrain_gpt, "pretrain_bert": pretrain_bert, "finetune_gpt": finetune_gpt,
                           "finetune_vit": finetune_vit}
VOCABULARY = 320
EOD = "<|endoftext|>"
TEXT_CHARACTERS = 150_000

Settings = Mapping[str, Any]
"""Settings of `megatron_ltd.config` by name of field; None for a flag that is not given."""


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk, and where its tokenizer is."""

    prefix: str
    tokenizer: str

    @property
    def settings(self) -> dict[str, Any]:
        return {"data_path": (self.prefix,), "split": "90,10,0", "tokenizer_type": "HuggingFaceTokenizer",
                "tokenizer_model": self.tokenizer}


def documents() -> list[str]:
    """Some hundred kilobytes of English prose with code in it."""
    texts: list[str] = []
    for name in sorted(topics):
        if sum(map(len, texts)) > TEXT_CHARACTERS:
            break
        texts.append(topics[name])
    return texts


def invented_documents() -> list[str]:
    """Made-up words, each followed by one of four others: the same in every version of Python, whose documentation is
    not."""
    words = ["".join(pair) for pair in itertools.product(("ba", "do", "ke", "lu", "mi", "ru", "sa", "ti"), repeat=3)]
    generator, word, texts = random.Random(1), 0, []
    for _ in range(100):
        said = []
        for _ in range(250):
            said.append(words[word])
            word = (word * 5 + int(generator.random() * 4)) % len(words)
        texts.append(" ".join(said))
    return texts


def write_corpus(folder: Path, texts: Sequence[str] = ()) -> Corpus:
    """Train the tokenizer and write the corpus.

    Args:
        texts: documents; none: those of `documents`.
    """
    texts = texts or documents()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOD], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    with IndexedCorpusWriter(str(folder / "corpus"), VOCABULARY) as writer:
        for text in texts:
            writer.add_document(tokenizer.encode(text + EOD).ids)
    return Corpus(str(folder / "corpus"), str(folder / "tokenizer.json"))


@dataclass(frozen=True)
class SentenceCorpus:
    """A corpus of sentences in WordPiece, for BERT."""

    prefix: str
    vocabulary: str

    @property
    def settings(self) -> dict[str, Any]:
        return {"data_path": (self.prefix,), "split": "90,10,0", "tokenizer_type": "BertWordPieceLowerCase",
                "vocab_file": self.vocabulary}


def write_sentence_corpus(folder: Path) -> SentenceCorpus:
    """Train the WordPiece vocabulary and write the corpus, with the rules for sentences that ship."""
    texts = documents()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    # By the tool: with the library alone, tokens and so the whole run would be others every time.
    listed = train_wordpiece([str(folder / "text.jsonl")], "text", VOCABULARY)["vocab.txt"]
    (folder / "vocab.txt").write_bytes(listed)
    engine = wordpiece_engine({token: number for number, token in enumerate(listed.decode().split())}, lowercase=True)
    splitter = RuleSplitter()
    with IndexedCorpusWriter(str(folder / "sentences"), VOCABULARY) as writer:
        for text in texts:
            parts = [ids for start, stop in splitter.spans(text)
                     if (ids := engine.encode(text[start:stop], add_special_tokens=False).ids)]
            writer.add_document(list(itertools.chain.from_iterable(parts)), [len(ids) for ids in parts])
    return SentenceCorpus(str(folder / "sentences"), str(folder / "vocab.txt"))


TINY: dict[str, Any] = {
    "num_layers": 6, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32,
    "make_vocab_size_divisible_by": 32,
    "random_ltd": True, "random_ltd_start_length": 8, "random_ltd_steps": 16, "random_ltd_length_step": 4,
    "random_ltd_strata": 2,
    "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 20, "seed": 7,
    "lr": 3e-3, "lr_warmup_iters": 2, "lr_decay_style": "cosine",
    # Above rounding, as 1e-8 is not: else a gradient of nothing but rounding moves its weight like any other.
    "adam_eps": 1e-6,
    "log_interval": 1, "eval_interval": 10, "eval_iters": 1,
}
"""GPT-2 in small, with dropping in layers 1 to 4 that ends after step 16."""


def words(settings: Settings) -> list[str]:
    """The command line of the settings."""
    line: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        line.append("--" + name.replace("_", "-"))
        if isinstance(value, tuple):
            line += [str(item) for item in value]
        elif value is not True:
            line.append(str(value))
    return line


@dataclass
class Ending:
    """How the command ended on one rank.

    `said` is what it wrote to stderr; `kept` the kept positions of each (layer, sample) that the rank drew.
    """

    code: int
    said: str
    kept: dict[tuple[int, int], list[int]] = field(default_factory=dict)


@contextlib.contextmanager
def recorded_draws() -> Iterator[dict[tuple[int, int], list[int]]]:
    """Meanwhile, the kept positions of each (layer, sample) that this process draws or a router chooses. A second time,
    for another stage or in a backward pass, they must be the same."""
    original = Policies.token_sets
    drawn: dict[tuple[int, int], list[int]] = {}

    def token_sets(self: Policies, plan: StepPlan, layers: Collection[int], sample_ids: torch.Tensor,
                   given: Mapping[TokenSet, torch.Tensor]) -> dict[TokenSet, torch.Tensor]:
        sets = original(self, plan, layers, sample_ids, given)
        for layer in layers:
            token_set = plan.layers[layer].token_set
            if token_set in sets and not plan.layers[layer].skipped:
                for sample, positions in zip(sample_ids.tolist(), sets[token_set].tolist(), strict=True):
                    assert drawn.setdefault((layer, sample), positions) == positions
        return sets

    of_tokens = Stack._on_some_tokens

    def on_some_tokens(self: Stack, stream: torch.Tensor, owned: bool, layers: list[int], plan: StepPlan,
                       kept: torch.Tensor, contexts: ContextMaker, *scores: torch.Tensor) -> torch.Tensor:
        for sample, positions in zip(contexts.batch.sample_ids.tolist(), kept.tolist() if scores else (), strict=False):
            assert drawn.setdefault((layers[0], sample), positions) == positions
        return of_tokens(self, stream, owned, layers, plan, kept, contexts, *scores)

    with mock.patch.object(Policies, "token_sets", token_sets), \
            mock.patch.object(Stack, "_on_some_tokens", on_some_tokens):
        yield drawn


@contextlib.contextmanager
def launched(place: Launch) -> Iterator[None]:
    """Meanwhile this process is at `place`, whatever its environment says."""
    with mock.patch.object(Launch, "from_environment", lambda: place):
        yield


def pretrain(rank: int, world_size: int, init_method: str, *settings: Settings) -> Ending:
    """`pretrain_gpt`, or `pretrain_bert` where the settings name its family, or the recipe that they name, on one rank.

    Args:
        settings: those of all ranks, or of each rank its own.
    """
    flags = dict(settings[rank % len(settings)])
    recipe = RECIPES[flags.pop("recipe", "pretrain_" + flags.pop("family", "gpt"))]
    place = Launch(rank, rank, world_size, init_method if world_size > 1 else None)
    with launched(place), contextlib.redirect_stderr(io.StringIO()) as said, recorded_draws() as kept:
        code = recipe.main(words(flags))
    return Ending(code, said.getvalue(), kept)


@dataclass(frozen=True)
class Run:
    """A finished run: how each rank ended, and the lines of its metrics file."""

    endings: list[Ending]
    lines: list[dict[str, Any]]

    @property
    def codes(self) -> set[int]:
        return {ending.code for ending in self.endings}

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training steps."""
        return [line for line in self.lines if "lm_loss" in line]

    def column(self, name: str) -> list[float]:
        """One number of every line that has it."""
        return [line[name] for line in self.lines if name in line]

    @property
    def kept(self) -> dict[tuple[int, int], list[int]]:
        """Kept positions of each (layer, sample), whichever ranks drew them; they must all have drawn the same."""
        merged: dict[tuple[int, int], list[int]] = {}
        for ending in self.endings:
            for place, positions in ending.kept.items():
                assert merged.setdefault(place, positions) == positions, place
        return merged


def run(folder: Path, settings: Settings, world_size: int = 1, *, code: int = 0, timeout: float = 120.0) -> Run:
    """Run the command on so many ranks, with its metrics file in `folder`; it must end with `code` on all of them."""
    path = folder / "metrics.jsonl"
    endings = launch_ranks(pretrain, world_size, {**settings, "metrics_file": str(path)}, timeout=timeout)
    assert {ending.code for ending in endings} == {code}, "\n".join(ending.said for ending in endings)
    return Run(endings, read_lines(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


TIMES = {"step_seconds", "tokens_per_second", "tflops_per_device", "mfu", "own_seconds", "own_seconds_slowest",
         "slowest_rank", "stragglers", "host_memory_free", "clock_skew_seconds"}
"""Numbers of a line that depend on the clock."""


def curve(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a metrics file without its times."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def saved_tensors(save_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint, whole, by global name."""
    path = checkpoint_path(save_dir, step)
    facts = read_manifest(path).tensors
    tensors = {name: torch.zeros(entry.shape) for name, entry in facts.items()}
    checkpoint_io.load(path, tensors, None)
    return tensors
