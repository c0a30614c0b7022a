"""Missing files are told together, and beside what else is wrong."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ltd import finetune_gpt, pretrain_gpt
from megatron_ltd.errors import CheckpointError, ConfigError, DataError
from megatron_ltd.log import Console

SIZES = "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --lr 1 "
GPT2 = "--tokenizer-type GPT2BPETokenizer --vocab-file no.json --merge-file no.txt "


@pytest.mark.parametrize(("recipe", "words", "kind", "missing"), [
    (pretrain_gpt, SIZES + GPT2 + "--train-iters 1 --load gone --data-path 0.5 a 0.5 b@0:0.5", DataError,
     ["--load = gone", "no.json", "no.txt", "a.idx", "b.idx"]),
    (pretrain_gpt, SIZES + GPT2 + "--train-iters 1 --train-data-path here --valid-data-path x=here y=there", DataError,
     ["no.json", "no.txt", "there.idx"]),
    (finetune_gpt, "--pretrained-checkpoint gone --load new --use-checkpoint-args --train-epochs 1 --train-jsonl "
     "*.jsonl x.jsonl --chat-template no.jinja", DataError, ["--pretrained-checkpoint = gone", "no.jinja", "x.jsonl"]),
    (pretrain_gpt, SIZES + GPT2 + "--train-iters 1 --data-path a --bf16 --fp16", ConfigError,
     ["--fp16", "no.json", "no.txt", "a.idx"]),
    (pretrain_gpt, "--lr abc " + GPT2 + "--train-iters 1 --data-path here " + SIZES[:-7], ConfigError,
     ["--lr = abc", "no.json", "no.txt"]),
    (pretrain_gpt, SIZES + "--train-iters 1 --data-path a --vocab-file no.json --tokenizer-model no.model", ConfigError,
     ["--tokenizer-type is required", "--tokenizer-model: no file no.model", "--vocab-file: no file no.json", "a.idx"]),
    (pretrain_gpt, "--load gone --use-checkpoint-args --train-iters 1 --data-path here", CheckpointError, []),
])
def test_every_missing_file_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Any, words: str, kind: type[Exception], missing: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here.idx", "a.jsonl"):
        Path(name).touch()
    with pytest.raises(kind) as refusal:
        recipe.RECIPE.checked(recipe.RECIPE.read_settings(words.split(), Console(False), 1), 1)
    lines = [line for line in str(refusal.value).splitlines() if line.startswith("  - ")]
    assert len(lines) == len(missing), str(refusal.value)
    assert [name for name, line in zip(missing, lines, strict=True) if name not in line] == []
