"""The fast library gives the ids of the exact one, and who a tokenizer is does not depend on how it was given."""

import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.preprocess import encoding
from megatron_ltd.data.preprocess.encoding import EncodingPlan
from megatron_ltd.data.preprocess.pipeline import preprocess
from megatron_ltd.data.text.fast_bpe import FastBpe, with_engine
from megatron_ltd.data.text.recurring_words import RecurringWords
from megatron_ltd.data.text.tokenizer import HuggingFaceEngine, Tokenizer, build_tokenizer, gpt2_bpe_tokenizer
from megatron_ltd.errors import ConfigError


@pytest.fixture(scope="module")
def exact() -> HuggingFaceEngine:
    """A byte-level BPE of 400 ids with merges of many lengths."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
                                             initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    engine.train_from_iterator([Path(__file__).read_text(encoding="utf-8")] * 2, trainer)
    return HuggingFaceEngine(engine, ("test",), ("<|endoftext|>",))


@pytest.fixture(scope="module")
def fast(exact: HuggingFaceEngine) -> FastBpe:
    pytest.importorskip("gigatoken")
    return FastBpe(exact)


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["'s", "'re", " the", "<|endoftext|>", "12", "  ", "\n", "\u088f", "\U000323b1"]), max_size=12).map("".join)


@given(texts=st.lists(TEXTS, max_size=6))
def test_any_texts_have_the_ids_of_the_exact_library(
        fast: FastBpe, exact: HuggingFaceEngine, texts: list[str]) -> None:
    ids, lengths = fast.encode_flat(texts)
    expected = exact.encode_batch(texts)
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == list(itertools.chain.from_iterable(expected))
    assert fast.encode_batch(texts) == expected


def test_around_every_assigned_character_of_the_basic_plane_the_ids_are_the_same(
        fast: FastBpe, exact: HuggingFaceEngine) -> None:
    texts = [f"a{c}'s 1{c}'t {c}{c}\n{c}" for c in map(chr, range(0x10000)) if unicodedata.category(c) != "Cs"]
    ids, lengths = fast.encode_flat(texts)
    expected = exact.encode_batch(texts)
    assert lengths.tolist() == [len(row) for row in expected]
    assert (ids == np.fromiter(itertools.chain.from_iterable(expected), dtype=np.int64)).all()


def test_documents_of_a_corpus_have_the_ids_of_the_exact_library(shared_data: Path) -> None:
    pytest.importorskip("gigatoken")
    folder = shared_data / "tokenizers" / "gpt2"
    gpt2 = gpt2_bpe_tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    with zstandard.open(shared_data / "train" / "wiki.valid.jsonl.zst", "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in itertools.islice(stream, 200)]
    assert FastBpe(gpt2).encode_batch(texts) == gpt2.encode_batch(texts)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_does_not_depend_on_the_library(tmp_path: Path, exact: HuggingFaceEngine, workers: int) -> None:
    pytest.importorskip("gigatoken")
    (tmp_path / "tokenizer.json").write_text(exact.definition, encoding="utf-8")
    texts = ["the quick\u088f's brown fox", "", "<|endoftext|>", "I'll 12 go"] * 40
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json"))
    for engine in ("gigatoken", "tokenizers"):
        plan = EncodingPlan(config, None, append_eod=True, engine=engine)  # type: ignore[arg-type]
        preprocess(plan, [str(tmp_path / "in.jsonl")], str(tmp_path / engine / "c"), workers, lambda progress: None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "gigatoken").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "tokenizers").iterdir()}


def test_auto_takes_the_fast_library_only_where_text_is_cut_as_for_gpt2(exact: HuggingFaceEngine) -> None:
    pytest.importorskip("gigatoken")
    assert isinstance(with_engine(exact, "auto")[0], FastBpe)
    definition = json.loads(exact.definition)
    for changes in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"type": "Whitespace"}},
                    {"pre_tokenizer": {**definition["pre_tokenizer"], "add_prefix_space": True}},
                    {"added_tokens": [{**definition["added_tokens"][0], "lstrip": True}]}):
        engine = tokenizers.Tokenizer.from_str(json.dumps({**definition, **changes}))
        other: Tokenizer = HuggingFaceEngine(engine, ("test",), ("<|endoftext|>",))
        assert with_engine(other, "auto") == (other, None)


def test_what_the_fast_library_cannot_run_is_refused(exact: HuggingFaceEngine) -> None:
    null = build_tokenizer(DataConfig(tokenizer_type="NullTokenizer"), 10)
    with pytest.raises(ConfigError, match="--tokenizer-engine gigatoken runs byte-level BPE"):
        with_engine(null, "gigatoken")
    pytest.importorskip("gigatoken")
    engine = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    words = HuggingFaceEngine(engine, ("words.json",), ("<|endoftext|>",))
    with pytest.raises(ConfigError, match=r"gigatoken cannot run the tokenizer in words\.json: .*engine tokenizers"):
        with_engine(words, "gigatoken")


def test_without_the_fast_library_auto_goes_on_and_says_how_to_get_it(
        exact: HuggingFaceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tokenizer, remark = with_engine(exact, "auto")
    assert isinstance(tokenizer, RecurringWords) and remark is not None and "pip install gigatoken" in remark
    with pytest.raises(ConfigError, match="needs the package gigatoken"):
        with_engine(exact, "gigatoken")


def test_a_library_that_gives_other_ids_is_found_out(exact: HuggingFaceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    gigatoken = pytest.importorskip("gigatoken")
    original = gigatoken.Tokenizer.encode
    monkeypatch.setattr(gigatoken.Tokenizer, "encode", lambda self, text: original(self, text)[
        :-1 if b"\r\n" in text else None])
    with pytest.raises(ConfigError, match="it gives other ids for"):
        with_engine(exact, "gigatoken")
    tokenizer, remark = with_engine(exact, "auto")
    assert isinstance(tokenizer, RecurringWords) and remark is not None and "other ids" in remark


def test_the_digest_is_the_same_however_a_vocabulary_is_given(shared_data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    gpt2, bert = shared_data / "tokenizers" / "gpt2", shared_data / "tokenizers" / "bert"
    vocab = bert / "bert-large-uncased-vocab.txt"
    transformers.GPT2TokenizerFast.from_pretrained(str(gpt2)).save_pretrained(tmp_path / "gpt2")
    transformers.BertTokenizerFast(vocab=str(vocab)).save_pretrained(tmp_path / "bert")
    pairs = [({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": str(gpt2 / "vocab.json"),
               "merge_file": str(gpt2 / "merges.txt")}, "gpt2"),
             ({"tokenizer_type": "BertWordPieceLowerCase", "vocab_file": str(vocab)}, "bert")]
    digests = []
    for settings, name in pairs:
        by_files = build_tokenizer(DataConfig(**settings), None)  # type: ignore[arg-type]
        by_folder = build_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer",
                                               tokenizer_model=str(tmp_path / name)), None)
        assert by_files.digest == by_folder.digest
        digests.append(by_files.digest)
    cased = build_tokenizer(DataConfig(tokenizer_type="BertWordPieceCase", vocab_file=str(vocab)), None)
    assert len({*digests, cased.digest}) == 3


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_the_end_of_a_document_is_put_behind_each_however_long_they_are(lengths: list[int]) -> None:
    tokens = np.arange(sum(lengths), dtype=np.uint32)
    ended = encoding._with_token(tokens, np.cumsum(lengths), 7777)
    assert ended.dtype == tokens.dtype
    assert ended.tolist() == [token for part in np.split(tokens, np.cumsum(lengths)[:-1])
                              for token in [*part.tolist(), 7777]]
