import base64
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.tokenizer import MaskedTokenizer, Tokenizer, build_tokenizer, tokenizer_of_model
from megatron_ltd.data.text.wordpiece import read_vocabulary, wordpiece_engine
from megatron_ltd.errors import ConfigError, DataError

TEXTS = ["", " ", "Hello world", "  two  spaces\n\n\ttab", "naïve café — “quotes” 日本語 😀", "it's 1234567890 don't",
         "<|endoftext|>", "a<|endoftext|>b </s> <s>", "\x00\x7f\u200b", "x" * 1000, "A\r\nB\u2028C"]


def small_files(folder: Path, special: str | None = "<|endoftext|>") -> tuple[Path, Path]:
    """A byte-level vocab.json and merges.txt with one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "he", *([special] if special else [])])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n", encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


def gpt2(vocab: Path, merges: Path, vocab_size: int | None = None) -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges)),
                           vocab_size)


def from_model(kind: Any, path: Path) -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer_type=kind, tokenizer_model=str(path)), None)


def hugging_face_json(folder: Path, special: list[str], **settings: Any) -> Path:
    """A word tokenizer that would add a token at the start, cut to 3 tokens and pad, if it were left to."""
    words = ["[UNK]", "one", "two", "three", "four", *special]
    engine = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens(special)
    engine.post_processor = processors.TemplateProcessing(single="[UNK] $A", special_tokens=[("[UNK]", 0)])
    engine.enable_truncation(3)
    engine.enable_padding(length=8)
    engine.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_gpt2_ids_equal_those_of_transformers(shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "tokenizers" / "gpt2"
    reference = transformers.GPT2TokenizerFast.from_pretrained(str(folder))
    with gzip.open(shared_data / "train" / "tinyshakespeare.txt.gz", "rt", encoding="utf-8") as stream:
        texts = [*TEXTS, stream.read()[:60000]]
    ours = gpt2(folder / "vocab.json", folder / "merges.txt")
    expected = [reference(text).input_ids for text in texts]
    assert [ours.encode(text) for text in texts] == expected
    assert ours.encode_batch(texts) == expected
    assert (ours.vocab_size, ours.eod, ours.pad) == (50257, 50256, None)
    assert [ours.decode(ids) for ids in expected] == texts


def test_a_small_gpt2_vocabulary_worked_out_by_hand(tmp_path: Path) -> None:
    files = small_files(tmp_path)
    ours, vocab = gpt2(*files), json.loads(files[0].read_text())
    assert ours.encode("he eh") == [vocab["he"], vocab["Ġ"], vocab["e"], vocab["h"]]
    assert ours.encode("h<|endoftext|>") == [vocab["h"], 257]
    assert (ours.vocab_size, ours.eod) == (258, 257)
    assert all(ours.decode(ours.encode(text)) == text for text in TEXTS)
    assert ours.files == tuple(map(str, files))


@pytest.mark.parametrize("name", ["mistral_v1/tokenizer.model", "sentencepiece_1k/test_model.model"])
def test_sentencepiece_ids_equal_those_of_the_library(shared_data: Path, name: str) -> None:
    import sentencepiece

    path = shared_data / "tokenizers" / name
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = from_model("SentencePieceTokenizer", path)
    assert ours.vocab_size == reference.get_piece_size()
    assert ours.eod == reference.eos_id() == reference.piece_to_id("</s>")
    expected = [reference.encode_as_ids(text) for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == expected
    assert ours.encode_batch(TEXTS) == expected
    assert all(ours.decode(ids) == reference.decode_ids(ids) for ids in expected)
    assert ours.eod not in ours.encode("</s>")


def test_a_sentencepiece_model_without_end_of_sentence_is_refused_where_it_is_needed(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c a b"] * 20), model_prefix=str(tmp_path / "m"), vocab_size=8, model_type="char",
        eos_id=-1, minloglevel=2)
    ours = from_model("SentencePieceTokenizer", tmp_path / "m.model")
    with pytest.raises(DataError, match=r"m\.model: the SentencePiece model has no end-of-sentence token"):
        assert ours.eod


def test_a_hugging_face_tokenizer_adds_cuts_and_pads_nothing(tmp_path: Path) -> None:
    path = hugging_face_json(tmp_path, ["<pad>", "</s>"])
    for given in (path, tmp_path):
        ours = from_model("HuggingFaceTokenizer", given)
        assert ours.encode("one two three four five") == [1, 2, 3, 4, 0]
        assert ours.encode_batch(["one two three four", "two"]) == [[1, 2, 3, 4], [2]]
        assert ours.encode("one </s>") == [1, 6]
        assert (ours.vocab_size, ours.eod, ours.pad) == (7, 6, 5)
        assert ours.decode([1, 6]) == "one </s>"


def test_hugging_face_ids_equal_those_of_transformers(shared_data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.GPT2TokenizerFast.from_pretrained(str(shared_data / "tokenizers" / "gpt2"))
    reference.save_pretrained(str(tmp_path))
    ours = from_model("HuggingFaceTokenizer", tmp_path)
    assert ours.encode_batch(TEXTS) == [reference(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert (ours.vocab_size, ours.eod) == (len(reference), reference.eos_token_id)


@pytest.mark.parametrize(("special", "eod"), [
    (["<|end_of_text|>"], 5), (["</s>", "<|endoftext|>"], 6), (["<|end_of_text|>", "</s>"], 6)])
def test_the_end_of_document_token_is_the_first_known_name(tmp_path: Path, special: list[str], eod: int) -> None:
    assert from_model("HuggingFaceTokenizer", hugging_face_json(tmp_path, special)).eod == eod


@pytest.mark.parametrize("declared", ["<eos>", {"content": "<eos>", "lstrip": False}], ids=["name", "table"])
def test_without_a_known_name_it_is_the_one_that_the_tokenizers_files_declare(tmp_path: Path, declared: Any) -> None:
    path = hugging_face_json(tmp_path, ["<pad>", "<eos>"])
    with pytest.raises(DataError, match="Name the token that ends documents: --eod-token"):
        assert from_model("HuggingFaceTokenizer", path).eod
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
    assert from_model("HuggingFaceTokenizer", path).eod == 6
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="is no table of JSON"):
        from_model("HuggingFaceTokenizer", path)


def test_ids_beyond_the_number_of_tokens_count_for_the_vocabulary(tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 90}, unk_token="a"))
    engine.save(str(tmp_path / "tokenizer.json"))
    assert from_model("HuggingFaceTokenizer", tmp_path).vocab_size == 91


def bert_vocabulary(folder: Path, *more: str) -> Path:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##related", "the", "The", ",", "e", "##e", *more]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return folder / "vocab.txt"


def bert(path: Path, kind: Any = "BertWordPieceLowerCase") -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer_type=kind, vocab_file=str(path)), None)


@pytest.mark.parametrize(("kind", "lower"), [("BertWordPieceLowerCase", True), ("BertWordPieceCase", False)])
def test_wordpiece_ids_equal_those_of_transformers(shared_data: Path, kind: str, lower: bool) -> None:
    transformers = pytest.importorskip("transformers")
    path = shared_data / "tokenizers" / "bert" / "bert-large-uncased-vocab.txt"
    reference = transformers.BertTokenizerFast(vocab=str(path), do_lower_case=lower)
    with gzip.open(shared_data / "train" / "tinyshakespeare.txt.gz", "rt", encoding="utf-8") as stream:
        texts = [*TEXTS, "Hello [MASK] [SEP]world [UNK][PAD]", "naïve Çà 中文字 \u200b x\x00y\ufffd \u00a0 ##ing",
                 "A" * 150, stream.read()[:60000]]
    ours = bert(path, kind)
    expected = [reference(text, add_special_tokens=False).input_ids for text in texts]
    assert [ours.encode(text) for text in texts] == expected
    assert ours.encode_batch(texts) == expected
    assert isinstance(ours, MaskedTokenizer)
    assert (ours.pad, ours.unk, ours.cls, ours.sep, ours.mask) == (
        reference.pad_token_id, reference.unk_token_id, reference.cls_token_id, reference.sep_token_id,
        reference.mask_token_id)
    assert ours.vocab_size == len(reference) == len(ours.continues_word) and ours.eod == ours.sep
    continuing = [token.startswith("##") for token in reference.convert_ids_to_tokens(range(ours.vocab_size))]
    assert ours.continues_word.tolist() == continuing


def test_a_small_wordpiece_vocabulary_worked_out_by_hand(tmp_path: Path) -> None:
    lower, cased = bert(bert_vocabulary(tmp_path)), bert(bert_vocabulary(tmp_path), "BertWordPieceCase")
    assert lower.encode("Unrelated, THE éE the") == [5, 6, 9, 7, 10, 11, 7]
    assert cased.encode("Unrelated, The THE the") == [1, 9, 8, 1, 7]
    assert isinstance(lower, MaskedTokenizer)
    assert np.flatnonzero(lower.continues_word).tolist() == [6, 11]
    assert lower.digest != cased.digest
    assert lower.decode([5, 6, 9]) == "unrelated,"


def test_a_wordpiece_in_a_tokenizer_json_serves_bert_too(tmp_path: Path) -> None:
    pieces = bert(bert_vocabulary(tmp_path))
    engine = wordpiece_engine(read_vocabulary(str(tmp_path / "vocab.txt")), lowercase=True)
    engine.save(str(tmp_path / "tokenizer.json"))
    ours = from_model("HuggingFaceTokenizer", tmp_path)
    assert isinstance(ours, MaskedTokenizer) and isinstance(pieces, MaskedTokenizer)
    assert (ours.pad, ours.cls, ours.sep, ours.mask, ours.eod) == (0, 2, 3, 4, 3)
    assert ours.continues_word.tolist() == pieces.continues_word.tolist()
    assert ours.encode("Unrelated [MASK]") == pieces.encode("Unrelated [MASK]") == [5, 6, 4]


def test_a_tokenizer_without_berts_special_tokens_is_not_for_bert(tmp_path: Path) -> None:
    assert not isinstance(gpt2(*small_files(tmp_path)), MaskedTokenizer)
    assert not isinstance(from_model("HuggingFaceTokenizer", hugging_face_json(tmp_path, ["</s>"])), MaskedTokenizer)


@pytest.mark.parametrize(("content", "words"), [
    (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n", r"no \[MASK\] among its 5 tokens"),
    (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\na\nthe\n", r"vocab\.txt:8: the token 'the' is also on line 6"),
    (b"[PAD]\n\xff", "not UTF-8 at byte 6"),
    (b"", r"no \[PAD\], \[UNK\]"),
])
def test_a_vocab_txt_that_is_none_is_explained(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        bert(tmp_path / "vocab.txt")


def test_a_null_tokenizer_takes_numbers() -> None:
    ours = build_tokenizer(DataConfig(tokenizer_type="NullTokenizer"), 100)
    assert ours.encode(" 1 99\n100 ") == [1, 99, 100]
    assert ours.encode_batch(["1", ""]) == [[1], []]
    assert ours.decode([1, 2]) == "1 2"
    assert (ours.vocab_size, ours.eod, ours.pad) == (101, 100, None)
    for text, words in [("1 x", "takes numbers"), ("101", r"token id = 101 is outside \[0, 101\)"),
                        ("-1", "token id = -1")]:
        with pytest.raises(DataError, match=words):
            ours.encode(text)


@pytest.mark.parametrize(("settings", "vocab_size", "kind", "words"), [
    ({}, None, ConfigError, "--tokenizer-type = None: choose one of GPT2BPETokenizer"),
    ({"tokenizer_type": "TikTokenizer"}, None, ConfigError, "--tokenizer-type = TikTokenizer: choose one of"),
    ({"tokenizer_type": "NullTokenizer"}, None, ConfigError, "--vocab-size = None: NullTokenizer needs"),
    ({"tokenizer_type": "NullTokenizer"}, 0, ConfigError, "--vocab-size = 0"),
    ({"tokenizer_type": "NullTokenizer"}, 2**31, ConfigError, "--vocab-size = 2147483648.*at most 2147483647"),
    ({"tokenizer_type": "GPT2BPETokenizer"}, None, ConfigError, "--vocab-file is not given"),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "V"}, None, ConfigError, "--merge-file is not given"),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "no", "merge_file": "M"}, None, DataError,
     "--vocab-file: no file"),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "V", "merge_file": "no"}, None, DataError,
     "--merge-file: no file"),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "M", "merge_file": "V"}, None, DataError,
     "are no vocab.json"),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "V", "merge_file": "M"}, 257, ConfigError,
     "--vocab-size = 257 is less than the 258 ids"),
    ({"tokenizer_type": "BertWordPieceCase"}, None, ConfigError, "--vocab-file is not given"),
    ({"tokenizer_type": "BertWordPieceCase", "vocab_file": "no"}, None, DataError, "--vocab-file: no file"),
    ({"tokenizer_type": "SentencePieceTokenizer"}, None, ConfigError, "--tokenizer-model is not given"),
    ({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "no"}, None, DataError,
     "--tokenizer-model: no file"),
    ({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "M"}, None, DataError,
     "is no SentencePiece model"),
    ({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "V"}, None, DataError, "is no tokenizer.json"),
    ({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "."}, None, DataError, "no file .*tokenizer.json"),
])
def test_a_tokenizer_that_cannot_be_built_is_explained(
        tmp_path: Path, settings: dict[str, str], vocab_size: int | None, kind: type[Exception], words: str) -> None:
    vocab, merges = small_files(tmp_path)
    places = {"V": str(vocab), "M": str(merges), "no": str(tmp_path / "no"), ".": str(tmp_path)}
    config = DataConfig(**{name: places.get(value, value) for name, value in settings.items()})
    with pytest.raises(kind, match=words):
        build_tokenizer(config, vocab_size)


def test_a_vocabulary_without_end_of_document_is_refused_where_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no end-of-document token; looked for <\|endoftext\|>, and for what"):
        assert gpt2(*small_files(tmp_path, special=None)).eod
    with pytest.raises(DataError, match=r"looked for <\|endoftext\|>, </s>, <\|end_of_text\|>"):
        assert from_model("HuggingFaceTokenizer", hugging_face_json(tmp_path, ["[SEP]"])).eod


def test_a_model_vocabulary_may_be_larger_than_the_tokenizers(tmp_path: Path) -> None:
    assert gpt2(*small_files(tmp_path), vocab_size=300).vocab_size == 258


def test_the_digest_follows_content_and_kind_but_not_place(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a", "b", "c")]
    for place in places:
        place.mkdir()
    first, second = gpt2(*small_files(places[0])), gpt2(*small_files(places[1]))
    assert first.digest == second.digest and first.files != second.files
    vocab, merges = small_files(places[2])
    merges.write_text("#version: 0.2\n", encoding="utf-8")
    assert gpt2(vocab, merges).digest != first.digest
    null = [build_tokenizer(DataConfig(tokenizer_type="NullTokenizer"), size).digest for size in (10, 11)]
    assert len({*null, first.digest}) == 3


def test_the_vocabulary_of_a_model_counts_the_end_of_document_that_the_null_tokenizer_adds() -> None:
    settings = DataConfig(tokenizer_type="NullTokenizer")
    assert build_tokenizer(settings, 100).vocab_size == 101
    found = tokenizer_of_model(settings, 101)
    assert (found.vocab_size, found.eod) == (101, 100)


def merged_by_rank(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's definition: of all neighbours that together are a token, those of the least rank merge first."""
    parts = [word[i:i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def test_llama_3s_file_of_tokens_and_ranks_merges_by_rank(tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"he", b" t", b"the", b" the", b"er", b"ere", b"12"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(file)), None)
    words = ["the", " there", " other", "é", " 12", "1234", "!!"]
    assert tokenizer.encode("there") == merged_by_rank(b"there", ranks)
    assert tokenizer.encode("the there other") == [i for word in ("the", " there", " other")
                                                   for i in merged_by_rank(word.encode(), ranks)]
    assert tokenizer.encode("1234") == merged_by_rank(b"123", ranks) + merged_by_rank(b"4", ranks)
    assert (tokenizer.vocab_size, tokenizer.eod) == (len(tokens) + 256, len(tokens) + 1)
    assert tokenizer.encode("<|begin_of_text|>") == [len(tokens)]
    assert tokenizer.decode(tokenizer.encode("".join(words))) == "".join(words)
