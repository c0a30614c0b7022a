"""The tokenizer of an exported folder gives in `transformers` the ids with which the model was trained."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ltd.checkpoint.convert.huggingface.tokenizer import carry_in, carry_out, make_agree
from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.tokenizer import build_tokenizer, hugging_face_tokenizer
from megatron_ltd.errors import CheckpointError
from tests.checkpoint.hugging_face import assert_logits_close, lively, qwen2, read_in, saved, write_out

WORDS = ["the", "ship", "sailed", "tomorrow", "and", "nobody", "knew", "whether", "it", "would", "return", "17",
         "caf\u00e9", "  ", "\n", "\t", "\u65e5\u672c", "\ufb01ne", "</s>", "<unk>", "Stop!", "it's", "\U0001f6a2",
         "\u00a0"]


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]


def sentencepiece_model(path: Path, **settings: Any) -> Path:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts(400, 1)), model_writer=written, minloglevel=2,
                                             **({"vocab_size": 120, "hard_vocab_limit": False} | settings))
    path.write_bytes(written.getvalue())
    return path


def exported(settings: DataConfig, folder: Path) -> Any:
    """The tokenizer of a Llama's folder, opened as a user opens it; it must give our ids for texts drawn afresh."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    carry_out(settings, folder, None)
    ours = build_tokenizer(settings, None)
    make_agree(folder, ours, settings.tokenizer_type or "")
    opened = AutoTokenizer.from_pretrained(folder)
    for text in texts(150, 2):
        assert opened(text, add_special_tokens=False)["input_ids"] == ours.encode(text), text
    assert opened.eos_token_id == ours.eod
    return opened


@pytest.mark.parametrize("settings", [
    {"model_type": "unigram"},
    {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 380,
     "remove_extra_whitespaces": False, "user_defined_symbols": ["ship"]},
    {"model_type": "bpe"},
    {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 380,
     "add_dummy_prefix": False, "split_digits": True},
], ids=["unigram", "unigram-bytes", "bpe", "bpe-bytes"])
def test_a_sentencepiece_model(settings: dict[str, Any], tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "tokenizer.model", **settings)
    opened = exported(DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model)), tmp_path / "out")
    assert opened.decode(opened("the ship sailed", add_special_tokens=False)["input_ids"]) == "the ship sailed"


def test_files_that_cannot_be_copied_are_told_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be copied to .*file/new.*Choose another --output"):
        carry_in(tmp_path, tmp_path / "file" / "new", "gpt")


def test_what_the_files_of_a_sentencepiece_model_declare_is_kept(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "tokenizer.model", model_type="unigram")
    declared = {"add_bos_token": True, "chat_template": "{{ messages }}", "tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    settings = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    opened, ours = exported(settings, tmp_path / "out"), build_tokenizer(settings, None)
    assert opened("the ship")["input_ids"] == [ours.bos, *ours.encode("the ship")]
    assert opened.bos_token_id == ours.bos == 1 and opened.chat_template == "{{ messages }}"
    again = hugging_face_tokenizer(str(tmp_path / "out"))
    assert (again.bos, again.adds_bos, again.eod) == (1, True, ours.eod)


@pytest.mark.parametrize("settings", [{"model_type": "char"}, {"model_type": "bpe", "user_defined_symbols": ["ship"]}])
def test_a_sentencepiece_model_of_another_kind_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "tokenizer.model", **settings)
    with pytest.raises(CheckpointError, match="only unigram models, and BPE models without user-defined symbols"):
        exported(DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model)), tmp_path / "out")


def test_gpt2_files_of_a_llama_with_another_tokenizer_beside_them(tmp_path: Path) -> None:
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.train_from_iterator(texts(400, 1), trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    engine.model.save(str(tmp_path))
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    settings = DataConfig(tokenizer_type="GPT2BPETokenizer", **files)  # type: ignore[arg-type]
    exported(settings, tmp_path / "alone")
    other = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "the": 1}, unk_token="<|endoftext|>"))
    other.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    exported(settings, tmp_path / "beside")


def test_what_lies_beside_the_vocabulary_is_taken_and_not_what_lies_beside_the_merges(tmp_path: Path) -> None:
    """Names of folders have no order of their own that is the same in every process, so there are many of them."""
    for number in range(12):
        there, elsewhere, out = (tmp_path / str(number) / name for name in ("there", "elsewhere", "out"))
        for folder in (there, elsewhere, out):
            folder.mkdir(parents=True)
            (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": folder.name}))
        (there / "vocab.json").write_text('{"a": 0}')
        (elsewhere / "merges.txt").write_text("")
        settings = DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(there / "vocab.json"),
                              merge_file=str(elsewhere / "merges.txt"))
        assert "special_tokens_map.json" in carry_out(settings, out, None)
        assert json.loads((out / "special_tokens_map.json").read_text()) == {"pad_token": "there"}


@pytest.mark.parametrize(("kind", "read"), [("Qwen2Tokenizer", None), ("GPT2Tokenizer", "GPT2BPETokenizer")])
def test_files_of_another_class_are_not_read_as_gpt2s(kind: str, read: str | None, tmp_path: Path) -> None:
    for name, text in (("vocab.json", '{"a": 0}'), ("merges.txt", ""), ("tokenizer_config.json",
                                                                        json.dumps({"tokenizer_class": kind}))):
        (tmp_path / name).write_text(text)
    assert carry_in(tmp_path, tmp_path / "ours", "gpt").tokenizer_type == read


@pytest.mark.parametrize("windows", [{}, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}],
                         ids=["llama", "smollm3"])
def test_a_qwen2_with_another_tokenizer_opens_with_its_ids_and_computes_the_same(tmp_path: Path, windows: dict[str, Any]
                                                                                 ) -> None:
    model = lively(qwen2(num_key_value_heads=2, vocab_size=130, num_hidden_layers=2, **windows))
    source = saved(model, tmp_path / "hf")
    sentencepiece_model(source / "tokenizer.model", model_type="unigram")
    assert read_in(source, tmp_path / "ours") == 0 and write_out(tmp_path / "ours", tmp_path / "out") == 0
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert opened.config.model_type == ("smollm3" if windows else "llama")
    library = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(tokenizer(text, add_special_tokens=False)["input_ids"] == library.encode(text) for text in texts(50, 3))
    tokens = torch.randint(0, 130, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert_logits_close(opened(tokens).logits, model(tokens).logits)
