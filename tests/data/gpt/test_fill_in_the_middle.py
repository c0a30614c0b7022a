"""Fill-in-the-middle against the rules of megatron-core's `GPTFIMDataset` (which its package does not hold), written
out over lists, and the laws that follow from them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.data.build import build_datasets
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.writer import IndexedCorpusWriter
from megatron_ltd.data.gpt.dataset import GPTDataset
from megatron_ltd.data.gpt.fill_in_the_middle import FillInTheMiddle, fill_in_the_middle
from megatron_ltd.data.sample import GPTSampleForm
from megatron_ltd.data.text.tokenizer import HuggingFaceEngine, hugging_face_tokenizer
from megatron_ltd.errors import ConfigError

SPECIAL = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<file>"]
PLAIN = DataConfig(fim_data=True, fim_rate=0.7, fim_spm_rate=0.4)
SPLIT = replace(PLAIN, fim_split_sample="<file>", fim_fragment_rate=0.6, fim_no_prefix="ab")


def engine() -> tokenizers.Tokenizer:
    """Single letters, and a few pairs, which a cut may divide."""
    vocabulary = {token: number for number, token in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd"])}
    built = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b"), ("c", "d"), ("ab", "cd")]))
    built.decoder = decoders.Fuse()
    built.add_special_tokens(SPECIAL)
    return built


TOKENIZER = HuggingFaceEngine(engine(), ("no-folder/tokenizer.json",), tuple(SPECIAL[:1]))
EOD, PREFIX, MIDDLE, SUFFIX, PAD, FILE = (TOKENIZER.encode(name)[0] for name in SPECIAL)


def middle(data: DataConfig) -> FillInTheMiddle:
    built = fill_in_the_middle(data, TOKENIZER)
    assert built is not None
    return built


def documents(seed: int = 5, count: int = 80) -> list[list[int]]:
    """Text of documents, which end with the end-of-document token; some are empty, some have fragments."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        files = ["".join(random.choice(list("abcd"), size=random.integers(0, 30)))
                 for _ in range(random.integers(1, 4))]
        found.append(TOKENIZER.encode("" if number % 9 == 0 else "<file>".join(files)) + [EOD])
    return found


def by_hand(text: list[int], data: DataConfig, random: np.random.RandomState) -> list[int]:
    """What becomes of a sample, token by token."""

    def pieces(tokens: list[int], separator: int) -> list[tuple[list[int], bool]]:
        found: list[tuple[list[int], bool]] = []
        current: list[int] = []
        for token in tokens:
            if token != separator:
                current.append(token)
            elif current:
                found.append((current, True))
                current = []
        return found + ([(current, False)] if current else [])

    def moved(tokens: list[int], rate: float) -> list[int]:
        if not random.random_sample() < rate:
            return tokens
        letters = TOKENIZER.decode(tokens)
        if data.fim_no_prefix and letters.startswith(data.fim_no_prefix):
            return tokens
        cuts = random.randint(low=0, high=len(letters) + 1, size=2)
        low, high = min(cuts), max(cuts)
        head, body, tail = (TOKENIZER.encode(part) for part in (letters[:low], letters[low:high], letters[high:]))
        if random.random_sample() < data.fim_spm_rate:
            return [PREFIX, SUFFIX] + tail + [MIDDLE] + head + body
        return [PREFIX] + head + [SUFFIX] + tail + [MIDDLE] + body

    out: list[int] = []
    for document, ended in pieces(text, EOD):
        if data.fim_split_sample is None or FILE not in document:
            out += moved(document, data.fim_rate)
        elif random.random_sample() < data.fim_rate:
            for fragment, followed in pieces(document, FILE):
                out += moved(fragment, data.fim_fragment_rate or 0.0) + [FILE] * followed
        else:
            out += document
        out += [EOD] * ended
    return (out + [PAD] * len(text))[:len(text)]


@pytest.mark.parametrize("data", [PLAIN, SPLIT], ids=["documents", "fragments"])
def test_samples_are_those_of_the_rules_written_out(tmp_path: Path, data: DataConfig) -> None:
    corpus = write(tmp_path, documents())
    plain = GPTDataset(corpus, range(80), 60, 1, GPTSampleForm(48, TOKENIZER.vocab_size, EOD))
    rearranged = GPTDataset(corpus, range(80), 60, 1, plain.form, middle=middle(data))
    assert rearranged.digest != plain.digest
    changed = padded = 0
    for index in reversed(range(len(plain))):  # in any order: nothing depends on what was read before
        random = np.random.RandomState([1, int(corpus.content_digest[:8], 16), index])
        wanted = by_hand(plain.text(index).tolist(), data, random)
        sample = rearranged.sample(index)
        assert sample["tokens"].tolist() == wanted[:-1] and sample["labels"].tolist() == wanted[1:]
        assert sample["loss_mask"].tolist() == [float(label != PAD) for label in wanted[1:]]
        changed += wanted != plain.text(index).tolist()
        padded += PAD in wanted
    assert changed > 40 and padded > 0


def test_at_a_rate_of_zero_nothing_changes_and_a_text_can_be_put_together_again() -> None:
    text = np.array(TOKENIZER.encode("abcdabcaddcbabcdab") * 3, dtype=np.int64)
    never, always = (middle(replace(PLAIN, fim_rate=rate, fim_spm_rate=0.5)) for rate in (0.0, 1.0))
    orders = set()
    for seed in range(40):
        assert never.rearranged(text, np.random.RandomState(seed)).tolist() == text.tolist()
        long = np.concatenate([text, [EOD] * 20])  # room for what is added
        moved = TOKENIZER.decode(always.rearranged(long, np.random.RandomState(seed)).tolist()).split("<|endof")[0]
        assert moved.startswith("<fim_prefix>")
        rest, between = moved.removeprefix("<fim_prefix>").split("<fim_middle>")
        before, after = rest.split("<fim_suffix>")
        orders.add(moved.startswith("<fim_prefix><fim_suffix>"))
        whole = TOKENIZER.decode(text.tolist())
        assert before + between + after == whole or between + after == whole
    assert orders == {False, True}


def write(folder: Path, texts: list[list[int]]) -> IndexedCorpus:
    with IndexedCorpusWriter(str(folder / "corpus"), TOKENIZER.vocab_size) as writer:
        for text in texts:
            writer.add_document(text)
    return IndexedCorpus(str(folder / "corpus"))


def test_a_run_rearranges_training_and_validation(tmp_path: Path) -> None:
    write(tmp_path, documents())
    engine().save(str(tmp_path / "tokenizer.json"))
    tokenizer = hugging_face_tokenizer(str(tmp_path / "tokenizer.json"))
    data = replace(PLAIN, data_path=(str(tmp_path / "corpus"),), split="70,30,0", fim_rate=1.0)
    config = RunConfig(model=ModelConfig(seq_length=32), data=data, training=TrainingConfig(seed=3))
    train, valid, _ = build_datasets(config, tokenizer, 20, 5, 0)
    assert valid is not None
    for dataset in (train, valid):
        assert all(PREFIX in dataset.sample(index)["tokens"] for index in range(5))


@pytest.mark.parametrize("data", [replace(PLAIN, fim_middle_token="<mid>"), replace(PLAIN, fim_middle_token="abca")])
def test_a_name_that_is_not_one_token_is_refused(data: DataConfig) -> None:
    with pytest.raises(ConfigError, match=f"--fim-middle-token = {data.fim_middle_token}: not one token"):
        fill_in_the_middle(data, TOKENIZER)
