import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.tokenizer import MaskedTokenizer, build_tokenizer
from tools import train_tokenizer

TOOL = Path(__file__).resolve().parents[3] / "tools" / "train_tokenizer.py"
STORY = ["The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
         "She sells sea shells by the sea shore; the shells she sells are sea shells.",
         "How much wood would a woodchuck chuck if a woodchuck could chuck wood?\n\nAs much as 12345 woodchucks."]
TEXTS = ["the sea, the sea!", "  wood\n\nchuck 678", "naïve 😀 <x>", ""]


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True,
                          check=False)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORY * 20), encoding="utf-8")
    return path


def test_both_forms_of_a_trained_bpe_give_the_same_ids(tmp_path: Path, story: Path) -> None:
    folder = tmp_path / "tokenizer"
    run = run_tool("--input", story, "--output", folder, "--type", "bpe", "--vocab-size", 300)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["merges.txt", "tokenizer.json", "vocab.json"]
    whole = build_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder)), None)
    pair = build_tokenizer(DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"),
                                      merge_file=str(folder / "merges.txt")), None)
    texts = [*STORY, *TEXTS, "a<|endoftext|>b"]
    assert whole.encode_batch(texts) == pair.encode_batch(texts)
    assert whole.vocab_size == pair.vocab_size == 300
    assert whole.eod == pair.eod == whole.encode("<|endoftext|>")[0]
    assert [whole.decode(ids) for ids in whole.encode_batch(texts)] == texts
    assert len(whole.encode(STORY[1])) < len(STORY[1]) / 2


def test_a_trained_sentencepiece_model_keeps_every_text(tmp_path: Path, story: Path) -> None:
    run = run_tool("--input", story, "--output", tmp_path / "t", "--type", "sentencepiece", "--vocab-size", 320)
    assert run.returncode == 0, run.stderr
    ours = build_tokenizer(DataConfig(tokenizer_type="SentencePieceTokenizer",
                                      tokenizer_model=str(tmp_path / "t" / "tokenizer.model")), None)
    assert (ours.vocab_size, ours.eod) == (320, 2)
    assert [ours.decode(ids) for ids in ours.encode_batch(STORY + TEXTS)] == STORY + TEXTS
    assert len(ours.encode(STORY[1])) < len(STORY[1]) / 2


def test_a_trained_wordpiece_is_a_vocab_txt_for_bert(tmp_path: Path, story: Path) -> None:
    run = run_tool("--input", story, "--output", tmp_path / "t", "--type", "wordpiece", "--vocab-size", 120)
    assert run.returncode == 0, run.stderr
    tokens = (tmp_path / "t" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(set(tokens)) == 120
    ours = build_tokenizer(DataConfig(tokenizer_type="BertWordPieceLowerCase",
                                      vocab_file=str(tmp_path / "t" / "vocab.txt")), None)
    assert isinstance(ours, MaskedTokenizer)
    assert [ours.decode(ours.encode(text)) for text in ("The sea shells", "Woodchuck")] == [
        "the sea shells", "woodchuck"]
    assert ours.unk not in ours.encode(STORY[0]) and len(ours.encode(STORY[1])) < len(STORY[1]) / 2


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "wordpiece"])
def test_training_twice_gives_the_same_files(tmp_path: Path, story: Path, kind: str) -> None:
    found = []
    for name in ("one", "two"):
        run = run_tool("--input", story, "--output", tmp_path / name, "--type", kind,
                       "--vocab-size", 110 if kind == "wordpiece" else 310)
        assert run.returncode == 0, run.stderr
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert found[0] == found[1]


def test_long_lines_are_not_left_out_of_training(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("zebra " * 3000 + "q" * 9000, encoding="utf-8")
    run = run_tool("--input", tmp_path / "long.txt", "--output", tmp_path / "t", "--type", "sentencepiece",
                   "--vocab-size", 275)
    assert run.returncode == 0, run.stderr
    ours = build_tokenizer(DataConfig(tokenizer_type="SentencePieceTokenizer",
                                      tokenizer_model=str(tmp_path / "t" / "tokenizer.model")), None)
    assert len(ours.encode("zebra zebra")) <= 4


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["--type", "bpe", "--vocab-size", 256], 20, "--vocab-size = 256: byte-level BPE has 256 bytes"),
    (["--type", "bpe", "--vocab-size", 50000], 21, "yields only"),
    (["--type", "sentencepiece", "--vocab-size", 50000], 21, "SentencePiece cannot train --vocab-size = 50000"),
    (["--type", "wordpiece", "--vocab-size", 5], 21, "yields 7 tokens, --vocab-size = 5 were requested"),
    (["--type", "wordpiece", "--vocab-size", 5000], 21, "--vocab-size = 5000 were requested"),
    (["--type", "sentencepiece", "--vocab-size", 20], 21, "SentencePiece cannot train --vocab-size = 20"),
    (["--type", "bpe", "--vocab-size", 300, "--json-key", "body"], 21,
     "story.jsonl:1:0: no key 'body'; it must hold a string (--json-key):"),
])
def test_a_tokenizer_that_cannot_be_trained_is_explained(
        tmp_path: Path, story: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], code: int,
        words: str) -> None:
    assert train_tokenizer.main(["--input", str(story), "--output", str(tmp_path / "t"), *map(str, arguments)]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
