"""The beginning-of-text token that a model's files declare."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.tokenizer import Tokenizer, build_tokenizer
from megatron_ltd.lm_eval.bos import choose_bos
from tests.lm_eval.stories import sentencepiece_model

WORDS = {"</s>": 0, "<s>": 1, "a": 2, "b": 3}
ADDS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}


def tokenizer_json(folder: Path, adds: bool) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": ADDS if adds else None,
        "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "a"}}))
    return build_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path)), None)


@pytest.mark.parametrize("adds", [True, False])
def test_an_imported_model_begins_texts_as_transformers_does(tmp_path: Path, adds: bool) -> None:
    ours = tokenizer_json(tmp_path, adds)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    bos, told = choose_bos(ours, None, False, trained_here=False)
    assert ([] if bos is None else [bos]) + ours.encode("a b") == theirs.encode("a b")
    assert (told is not None) == adds


def test_what_the_user_says_counts_and_a_model_trained_here_has_none(tmp_path: Path) -> None:
    tokenizer = tokenizer_json(tmp_path, True)
    assert choose_bos(tokenizer, 3, False, trained_here=False) == (3, None)
    assert choose_bos(tokenizer, None, True, trained_here=False) == (None, None)
    bos, told = choose_bos(tokenizer, None, False, trained_here=True)
    assert bos is None and told is not None and "--bos-token-id 1 adds it" in told


@pytest.mark.parametrize(("recorded", "bos"), [("auto", 1), ("b", 3)])
def test_a_model_is_scored_with_the_token_that_it_was_trained_with(tmp_path: Path, recorded: str, bos: int) -> None:
    found, told = choose_bos(tokenizer_json(tmp_path, True), None, False, trained_here=True, recorded=recorded)
    assert found == bos and told is not None and "as in training" in told


@pytest.mark.parametrize(("config", "expected"), [(None, None), ({"add_bos_token": True}, 1), ({}, None)])
def test_a_sentencepiece_model_says_so_in_the_file_beside_it(
    shared_data: Path, tmp_path: Path, config: dict[str, bool] | None, expected: int | None,
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(shared_data))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="SentencePieceTokenizer",
                                           tokenizer_model=str(tmp_path / "tokenizer.model")), None)
    bos, told = choose_bos(tokenizer, None, False, trained_here=False)
    assert bos == expected and told is not None and "token 1" in told
