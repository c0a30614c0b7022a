"""Which tokens begin texts and end documents: what the files beside a tokenizer declare, as `transformers` reads it."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.corpus.merge import merge_corpora
from megatron_ltd.data.document_tokens import bos_of_corpora, ends_not_found
from megatron_ltd.data.finetuning.responses import ResponseForm, read_responses
from megatron_ltd.data.preprocess.encoding import EncodedBlock, EncodingPlan, encode_block
from megatron_ltd.data.preprocess.pipeline import preprocess
from megatron_ltd.data.preprocess.text_input import Block
from megatron_ltd.data.text.beginning import chosen_bos
from megatron_ltd.data.text.tokenizer import Tokenizer, build_tokenizer
from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.lm_eval.bos import choose_bos

SPECIAL = ["<unk>", "<s>", "<eos>", "<|endoftext|>", "<|im_end|>"]
ADDS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}


def folder_of(folder: Path, special: list[str], adds: bool, **files: dict[str, Any]) -> Path:
    """A tokenizer of words with its special tokens, and the files beside it."""
    vocabulary = {name: number for number, name in enumerate([*special, "a", "b"])}
    added = [{"id": number, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for number, name in enumerate(special)]
    files["tokenizer"] = {
        "version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": ADDS if adds else None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}}
    files.setdefault("tokenizer_config", {})
    files["tokenizer_config"] |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def lines(*documents: list[str]) -> Block:
    """A block of input, by the words of each document."""
    text = "".join(json.dumps({"text": " ".join(words)}) + "\n" for words in documents)
    return Block("x.jsonl", 1, 0, text.encode())


def encoded(plan: EncodingPlan, block: Block) -> EncodedBlock:
    return encode_block(plan, block, plan.choose_tokenizer()[0])


def opened(folder: Path, **settings: Any) -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder), **settings),
                           None)


@pytest.mark.parametrize(("files", "eod", "told"), [
    ({}, "<|endoftext|>", False),
    ({"tokenizer_config": {"eos_token": "<eos>"}}, "<eos>", True),
    ({"special_tokens_map": {"eos_token": {"content": "<eos>"}}}, "<eos>", True),
    ({"generation_config": {"eos_token_id": 2}}, "<eos>", True),
    ({"tokenizer_config": {"eos_token": "<|im_end|>"}, "generation_config": {"eos_token_id": [4, 3]}}, "<|endoftext|>",
     True),
    ({"tokenizer_config": {"eos_token": "<|endoftext|>"}}, "<|endoftext|>", False),
], ids=["nothing", "tokenizer-config", "special-tokens-map", "generation-config", "chat", "known"])
def test_documents_end_with_the_token_that_the_files_declare(tmp_path: Path, files: dict[str, Any], eod: str, told: bool
                                                             ) -> None:
    tokenizer = opened(folder_of(tmp_path, SPECIAL, False, **files))
    assert tokenizer.eod == SPECIAL.index(eod)
    assert (tokenizer.remark is not None and "--eod-token chooses another" in tokenizer.remark) == told
    if "tokenizer_config" in files and "generation_config" not in files:
        assert tokenizer.eod == AutoTokenizer.from_pretrained(tmp_path).eos_token_id


def test_documents_end_with_the_token_that_the_user_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, SPECIAL, False, tokenizer_config={"eos_token": "<eos>"})
    assert opened(folder, eod_token="<|im_end|>").eod == 4
    with pytest.raises(ConfigError, match=r"--eod-token = <end>: the tokenizer has no such token; .*<\|endoftext\|>"):
        opened(folder, eod_token="<end>")


def test_a_tokenizer_without_an_end_of_documents_is_of_use_where_none_is_needed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["<unk>", "<s>", "<stop>"], False)
    settings = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    block = lines(["a", "b"])
    assert encoded(EncodingPlan(settings, None), block).documents[0].tokens.tolist() == [3, 4]
    with pytest.raises(DataError, match="Name the token that ends documents: --eod-token"):
        encoded(EncodingPlan(settings, None, append_eod=True), block)


@pytest.mark.parametrize(("adds", "config"), [
    (True, {}), (False, {}), (False, {"bos_token": "<s>"}), (True, {"bos_token": "<s>"})])
def test_auto_begins_texts_as_transformers_does(tmp_path: Path, adds: bool, config: dict[str, Any]) -> None:
    tokenizer = opened(folder_of(tmp_path, SPECIAL, adds, tokenizer_config=config))
    bos, told = chosen_bos(tokenizer, "auto")
    assert ([] if bos is None else [bos]) + tokenizer.encode("a b") == AutoTokenizer.from_pretrained(tmp_path)(
        "a b")["input_ids"]
    assert told is not None
    assert chosen_bos(tokenizer, "<eos>") == (2, None)
    absent, told = chosen_bos(tokenizer, None)
    assert absent is None and (told is not None and "--bos-token auto adds it" in told) == adds
    with pytest.raises(ConfigError, match="--bos-token = <begin>: the tokenizer has no such token"):
        chosen_bos(tokenizer, "<begin>")


def test_a_corpus_has_the_tokens_around_every_document(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, SPECIAL, True, tokenizer_config={"eos_token": "<eos>"})
    plan = EncodingPlan(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder),
                                   bos_token="auto"), None, append_eod=True)
    documents = [["a", "b"], [], ["b"] * 300, ["a"]]
    [found] = encoded(plan, lines(*documents)).documents
    by_hand = [[1, *({"a": 5, "b": 6}[word] for word in words), 2] if words else [] for words in documents]
    assert found.tokens.tolist() == [token for document in by_hand for token in document]
    assert found.lengths.tolist() == [len(document) for document in by_hand if document]


def small_sentencepiece(folder: Path, **settings: Any) -> Path:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c ab bc <s>"] * 20), model_writer=written, vocab_size=20, model_type="bpe",
        minloglevel=2, hard_vocab_limit=False, **settings)
    path = folder / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


def test_a_control_symbol_of_sentencepiece_is_that_symbol_where_it_is_asked_for(tmp_path: Path) -> None:
    path = small_sentencepiece(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    letters, symbols = (build_tokenizer(DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path),
                                                   tokenizer_control_symbols=asked), None) for asked in (False, True))
    text = "<s>ab c</s><s> b"
    assert letters.encode(text) == library.encode(text) and letters.bos not in letters.encode(text)
    by_hand = [library.bos_id(), *library.encode("ab c"), library.eos_id(), library.bos_id(), *library.encode(" b")]
    assert symbols.encode(text) == by_hand == symbols.encode_batch([text])[0]
    assert symbols.encode("ab c") == letters.encode("ab c") and symbols.digest != letters.digest


def test_examples_begin_with_the_token_once(tmp_path: Path) -> None:
    tokenizer = opened(folder_of(tmp_path, SPECIAL, True, tokenizer_config={"eos_token": "<eos>"}))
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "response": "b"}) + "\n" for prompt in ("a", "<s> a", "")))
    form = ResponseForm("prompt", "response", 16, bos=chosen_bos(tokenizer, "auto")[0])
    found = read_responses("--train-jsonl", [str(path)], tokenizer, form)
    assert [found.example(number)[0].tolist() for number in range(3)] == [[1, 5, 6, 2], [1, 5, 6, 2], [1, 6, 2]]
    assert [found.example(number)[1].tolist().index(True) for number in range(3)] == [2, 2, 1]


@pytest.mark.parametrize("choice", ["auto", "<|im_end|>", None])
def test_a_run_records_the_token_that_begins_the_documents_of_its_corpora(tmp_path: Path, choice: str | None) -> None:
    folder = folder_of(tmp_path, SPECIAL, True)
    settings = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder), bos_token=choice)
    (tmp_path / "text.jsonl").write_text('{"text": "a b"}\n')
    prefix = str(tmp_path / "corpus")
    preprocess(EncodingPlan(settings, None), [str(tmp_path / "text.jsonl")], prefix, 1, lambda progress: None)
    run = RunConfig(data=DataConfig(train_data_path=("1", f"{prefix}_text_document")))
    assert bos_of_corpora(run, opened(folder)) == choice
    merge_corpora([f"{prefix}_text_document"] * 2, f"{prefix}_merged")
    assert bos_of_corpora(RunConfig(data=DataConfig(data_path=(f"{prefix}_merged",))), opened(folder)) == choice


@pytest.mark.parametrize("choice", ["<s>", "▁a"])
def test_a_run_records_a_token_of_sentencepiece_though_no_file_says_to_add_it(tmp_path: Path, choice: str) -> None:
    path = small_sentencepiece(tmp_path)
    settings = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path), bos_token=choice)
    tokenizer = build_tokenizer(settings, None)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "b c"}\n{"text": "c"}\n')
    [corpus] = preprocess(EncodingPlan(settings, None), [str(text)], str(tmp_path / "corpus"), 1, lambda progress: None)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [corpus.read(number)[0] for number in (0, 1)] == [library.piece_to_id(choice)] * 2
    recorded = bos_of_corpora(RunConfig(data=DataConfig(data_path=(corpus.prefix,))), tokenizer)
    assert choose_bos(tokenizer, None, none_wanted=False, trained_here=True, recorded=recorded)[0] == corpus.read(0)[0]


@pytest.mark.parametrize(("written", "looked_for", "told"), [
    (("--append-eod", None), None, None), (("--append-eod", "<|im_end|>"), "<|im_end|>", None),
    (("--append-eod", "<|im_end|>"), None,
     r"end with token 4, and --reset-attention-mask looks for token 3, so .* give --eod-token '<\|im_end\|>'"),
    (("", None), None, "written without --append-eod, and --reset-attention-mask looks for token 3 at"),
])
def test_a_run_that_looks_for_another_end_of_documents_than_its_corpora_have_says_so(
    tmp_path: Path, written: tuple[str, str | None], looked_for: str | None, told: str | None,
) -> None:
    folder = str(folder_of(tmp_path, SPECIAL, False))
    text, prefix = tmp_path / "text.jsonl", str(tmp_path / "corpus")
    text.write_text('{"text": "a b"}\n')
    wrote = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder, eod_token=written[1])
    preprocess(EncodingPlan(wrote, None, append_eod=bool(written[0])), [str(text)], prefix, 1, lambda progress: None)
    merge_corpora([f"{prefix}_text_document"] * 2, f"{prefix}_merged")
    for corpus in (f"{prefix}_text_document", f"{prefix}_merged"):
        reads = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder, eod_token=looked_for,
                           train_data_path=(f"{corpus}@0:1",), reset_attention_mask=True)
        tokenizer = build_tokenizer(reads, None)
        found = ends_not_found(RunConfig(data=reads), tokenizer)
        assert (found == []) if told is None else re.search(told, found[0]), found
        assert ends_not_found(RunConfig(data=replace(reads, reset_attention_mask=False)), tokenizer) == []
