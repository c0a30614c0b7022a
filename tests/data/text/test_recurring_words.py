"""Words that were seen before have the ids that their whole text would give them."""

import itertools
import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from megatron_ltd.data.text import recurring_words
from megatron_ltd.data.text.recurring_words import RecurringWords, cut_at_spaces
from megatron_ltd.data.text.tokenizer import HuggingFaceEngine

HERE = Path(__file__).read_text(encoding="utf-8")
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [" ", " ", " ", "  ", " the", "the ", "'s", " 's", "<|endoftext|>", "[SEP]", "\n", " \n", "\u00a0", "e\u0301",
     "é ", "語 ", "(a) b"]), max_size=14).map("".join)


def byte_level() -> HuggingFaceEngine:
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.train_from_iterator([HERE] * 2, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return HuggingFaceEngine(engine, ("test",), ("<|endoftext|>",))


def word_pieces() -> HuggingFaceEngine:
    """Letters, and every other word, of this file. The library's trainer would number them otherwise in each run."""
    text = HERE.lower()
    words, letters = sorted(set(re.findall("[a-z]+", text)))[::2], sorted(set(text) - set(string.whitespace))
    pieces = ["[UNK]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *words]
    engine = tokenizers.Tokenizer(models.WordPiece(
        {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    engine.normalizer, engine.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    engine.add_special_tokens(["[UNK]", "[SEP]"])
    return HuggingFaceEngine(engine, ("test",), ("[SEP]",))


EXACT = {"byte-level": byte_level(), "word pieces": word_pieces()}
REMEMBERING = {name: RecurringWords(exact) for name, exact in EXACT.items()}


def assert_same(remembering: RecurringWords, exact: HuggingFaceEngine, texts: list[str]) -> None:
    ids, lengths = remembering.encode_flat(texts)
    expected = exact.encode_batch(texts)
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == list(itertools.chain.from_iterable(expected))


@pytest.mark.parametrize("name", EXACT)
@given(texts=st.lists(TEXTS, max_size=6))
def test_any_texts_have_the_ids_of_the_library(name: str, texts: list[str]) -> None:
    assert cut_at_spaces(EXACT[name].settings)
    assert_same(REMEMBERING[name], EXACT[name], texts)


def test_ids_are_right_after_many_words_and_after_they_were_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, remembering = EXACT["byte-level"], RecurringWords(EXACT["byte-level"])
    monkeypatch.setattr(recurring_words, "_ROOM", 4)
    remembering._forget()
    for round_ in range(3):
        monkeypatch.setattr(recurring_words, "_MOST_WORDS", 1000 if round_ < 2 else 5)
        for number in range(0, 400, 40):
            assert_same(remembering, exact, [f"the word{i} and word{i // 2}" for i in range(number, number + 40)])
    assert len(remembering._numbers) < 200


def changed(definition: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**definition, **changes}


def test_tokenizers_that_may_join_words_are_not_trusted() -> None:
    definition = json.loads(EXACT["byte-level"].definition)
    added, before = definition["added_tokens"][0], definition["pre_tokenizer"]
    assert cut_at_spaces(definition)
    for other in (changed(definition, normalizer={"type": "NFC"}), changed(definition, pre_tokenizer=None),
                  changed(definition, pre_tokenizer={"type": "Metaspace"}),
                  changed(definition, pre_tokenizer=changed(before, add_prefix_space=True)),
                  changed(definition, pre_tokenizer=changed(before, use_regex=False)),
                  changed(definition, added_tokens=[changed(added, lstrip=True)]),
                  changed(definition, added_tokens=[changed(added, content="a b")]),
                  changed(definition, model=changed(definition["model"], dropout=0.1))):
        assert not cut_at_spaces(other)
