"""A pretrained model is given rows for new tokens, on several layouts, and `transformers` is told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron_ltd.checkpoint.convert.huggingface.importing import import_model
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.checkpoint.saved_settings import saved_config
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError
from megatron_ltd.train.state import TrainState, check_model_settings
from tests.checkpoint.hugging_face import lively, llama, saved, write_out
from tests.data.text.test_special_tokens import folder_of
from tests.train.refusals import CONFIG, assert_clear, refused_in_this_process
from tests.train.runs import run, saved_tensors

NEW = ["<|user|>", "<|answer|>", "<|end|>"]


def names(tokens: int) -> list[str]:
    return ["<unk>", "<eos>", *(f"<{number}>" for number in range(tokens - 4))]


def imported(folder: Path, model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    """A model whose tokenizer has so many tokens, the same tokenizer with new ones behind, and finetuning flags."""
    declared = {"eos_token": "<eos>"}
    folder_of(saved(model, folder / "hf"), names(tokens), False, tokenizer_config=declared)
    import_model(folder / "hf", folder / "base", TrainState().counters())
    (folder / "more").mkdir()
    larger = json.loads((folder / "hf" / "tokenizer.json").read_text())
    larger["added_tokens"] += [{**larger["added_tokens"][0], "id": tokens + place, "content": name}
                               for place, name in enumerate(NEW)]
    (folder / "more" / "tokenizer.json").write_text(json.dumps(larger))
    (folder / "more" / "tokenizer_config.json").write_text(
        json.dumps(declared | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "train.jsonl").write_text('{"prompt": "<|user|> a b", "response": "<|answer|> b <|end|>"}\n' * 8)
    return {"recipe": "finetune_gpt", "load": str(folder / "base"), "finetune": True, "use_checkpoint_args": True,
            "train_jsonl": str(folder / "train.jsonl"), "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": str(folder / "more"), "seq_length": 16, "global_batch_size": 2, "train_iters": 1,
            "lr": 1e-12, "save": str(folder / "tuned")}


@pytest.mark.parametrize(("model", "tokens", "layout", "world_size"), [
    ({"vocab_size": 9}, 9, {"tensor_model_parallel_size": 2}, 2),
    ({"vocab_size": 127, "tie_word_embeddings": True}, 127, {"pipeline_model_parallel_size": 2}, 2),
    ({"vocab_size": 20, "tie_word_embeddings": True}, 9, {}, 1),
], ids=["our-padding", "beyond-it", "the-model's-padding"])
def test_new_tokens_start_at_the_mean_of_the_others_and_change_nothing_for_them(
    tmp_path: Path, model: dict[str, Any], tokens: int, layout: dict[str, int], world_size: int,
) -> None:
    source = lively(llama(**model, num_hidden_layers=2))
    flags = imported(tmp_path, source, tokens)
    run(tmp_path, flags | layout | {"resize_vocabulary": True}, world_size)
    before, after = saved_tensors(tmp_path / "base", 0), saved_tensors(tmp_path / "tuned", 1)
    rows = max(model["vocab_size"], tokens + len(NEW))
    for name in ("model.embedding.word.weight", *(() if model.get("tie_word_embeddings") else ("model.head.weight",))):
        mean = sum(before[name][row].double() for row in range(tokens)) / tokens
        for row in range(rows):
            is_new = tokens <= row < tokens + len(NEW)
            wanted = mean.float() if is_new else before[name][row]
            torch.testing.assert_close(after[name][row], wanted, rtol=0, atol=1e-7)
    assert write_out(tmp_path / "tuned", tmp_path / "out") == 0
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert opened.config.vocab_size == rows
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a <|end|>")["input_ids"] == [tokens - 2, tokens + 2]
    ids = torch.tensor([[1, 4, tokens - 1, 2]])
    with torch.no_grad():
        found, wanted = opened(ids).logits[..., :tokens], source(ids).logits[..., :tokens]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_without_the_flag_every_way_leads_to_it(tmp_path: Path) -> None:
    flags = imported(tmp_path, lively(llama(vocab_size=9, num_hidden_layers=2)), 9)
    ending = refused_in_this_process(flags)
    assert ending.code == CONFIG
    assert_clear(ending.said, ["has 12 ids, and the model rows for 9", "--finetune --resize-vocabulary"])
    path = tmp_path / "base" / "iter_0000000"
    manifest = read_manifest(path)
    model = saved_config(manifest, path).model
    with pytest.raises(CheckpointError, match="has rows for 9 tokens, .* has 12.*--finetune --resize-vocabulary"):
        check_model_settings(RunConfig(model=replace(model, vocab_size=12)), manifest, path)


def test_a_tokenizer_that_is_not_the_models_is_warned_of(tmp_path: Path) -> None:
    flags = imported(tmp_path, lively(llama(vocab_size=12, num_hidden_layers=1)), 12)
    for name, tokens, is_told in (("moved", names(12), False), ("other", list(reversed(names(12))), True)):
        (tmp_path / name).mkdir()
        folder_of(tmp_path / name, tokens, False, tokenizer_config={"eos_token": "<eos>"})
        done = run(tmp_path, flags | {"tokenizer_model": str(tmp_path / name)})
        assert any("of the token ids stand for other text" in line for line in done.endings[0].said.splitlines()) \
            == is_told
