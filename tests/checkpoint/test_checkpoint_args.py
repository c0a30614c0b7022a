"""--use-checkpoint-args: the model, and the tokenizer as far as no flag names another."""

import typing
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_ltd import finetune_gpt, finetune_vit, pretrain_bert, pretrain_gpt
from megatron_ltd.checkpoint.convert.huggingface.importing import import_model
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.config.model import Family, ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError
from megatron_ltd.log import Console
from megatron_ltd.train.process.recipe import Recipe, program_of
from megatron_ltd.train.state import TrainState, check_model_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose manifest names its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=40)).save_pretrained(folder)
    engine = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "<|endoftext|>": 2}, []))
    engine.add_special_tokens(["<|endoftext|>"])
    engine.save(str(folder / "tokenizer.json"))
    import_model(folder, folder / "ours", TrainState().counters())
    return folder


@pytest.mark.parametrize(("recipe", "words"), [
    (finetune_gpt.RECIPE, "--train-jsonl a.jsonl --train-epochs 1"),
    (pretrain_gpt.RECIPE, "--data-path a --train-iters 1"),
])
def test_the_tokenizer_is_the_checkpoints_unless_a_flag_names_another(base: Path, recipe: Recipe, words: str) -> None:
    flags = ["--load", str(base / "ours"), "--finetune", "--use-checkpoint-args", "--lr", "1", *words.split()]
    config, tokenizer = recipe.checked(recipe.read_settings(flags, Console(False), 1), 1)
    assert config.data.tokenizer_type == "HuggingFaceTokenizer"
    assert config.data.tokenizer_model == str(base / "ours" / "tokenizer" / "tokenizer.json")
    assert tokenizer is not None and tokenizer.encode("ab") == [0, 1] and config.model.vocab_size == 40
    moved = [*flags, "--tokenizer-model", str(base)]
    assert recipe.read_settings(moved, Console(False), 1).data.tokenizer_model == str(base)
    other = [*flags, "--tokenizer-type", "NullTokenizer"]
    assert recipe.checked(recipe.read_settings(other, Console(False), 1), 1)[1].eod == 39  # type: ignore[union-attr]


@pytest.mark.parametrize("starts", [["--finetune"], []], ids=["from its weights", "goes on"])
def test_a_model_setting_is_taken_as_a_new_part_or_told_to_have_no_effect(
        base: Path, starts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--load", str(base / "ours"), *starts, "--use-checkpoint-args", "--lr", "1", "--data-path", "a",
             "--recipe", "muon-conv-ngram", "--ngram-rows", "64", "--hidden-size", "64", "--seq-length", "16",
             "--position-embedding-type", "learned_absolute", "--hidden-dropout", "0.5"]
    model = pretrain_gpt.RECIPE.read_settings(flags, Console(), 1).model
    said = [line for line in capsys.readouterr().out.splitlines() if "has no effect" in line]
    hidden = "--hidden-size = 64 has no effect with --use-checkpoint-args: the checkpoint's model has --hidden-size = 8"
    assert model.hidden_size == 8 and model.hidden_dropout == 0.5
    if starts:
        assert (model.ngram_rows, model.qkv_conv_kernel) == (64, 4) and said == [hidden]
    else:
        none = "has no effect with --use-checkpoint-args: the checkpoint's model has none"
        assert (model.ngram_rows, model.qkv_conv_kernel) == (None, None)
        assert sorted(said) == sorted([hidden, f"--qkv-conv-kernel = 4 {none}", f"--ngram-rows = 64 {none}"])


def test_a_model_of_another_family_leads_to_a_program_that_there_is(base: Path) -> None:
    flags = ["--load", str(base / "ours"), "--finetune", "--lr", "1", "--train-data-path", "a", "--train-iters", "1"]
    for recipe, program in ((pretrain_bert.RECIPE, pretrain_gpt), (finetune_vit.RECIPE, finetune_gpt)):
        with pytest.raises(CheckpointError, match=f"continue it with {program.__name__}$"):
            recipe.read_settings([*flags, "--use-checkpoint-args"], Console(False), 1)
    path = base / "ours" / "iter_0000000"
    for family in typing.get_args(Family):
        assert find_spec(program_of(family, False)) and find_spec(program_of(family, True))
        if family != "gpt":
            with pytest.raises(CheckpointError, match=f"holds a gpt model, and this program trains a {family}"):
                check_model_settings(RunConfig(model=ModelConfig(family=family)), read_manifest(path), path)
