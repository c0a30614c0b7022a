"""Published configurations, with smaller sizes, compute what `transformers` computes beyond windows and original
positions; models trained here do so there."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForPreTraining, PreTrainedModel

from megatron_ltd.model.bert import BERT
from megatron_ltd.parallel.collectives import TensorParallel
from tests.checkpoint.hugging_face import (
    MODELS,
    assert_logits_close,
    check_bert,
    lively,
    our_logits,
    our_model,
    read_in,
    saved,
    write_out,
)
from tests.train.runs import TINY, Corpus, run, write_corpus, write_sentence_corpus

PUBLISHED = ("codellama-7b", "distilgpt2", "gpt2", "llama-2-7b", "llama-3-8b", "llama-3.1-8b", "longchat-linear",
             "mistral-7b-v0.1", "olmo2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "smollm2-135m", "tinyllama-1.1b")
LENGTH = 48
ROPE: dict[str, Any] = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
                        "disable_bias_linear": True, "group_query_attention": True, "num_query_groups": 2}
OLMO2 = {"norm_placement": "after", "qk_layernorm": True, "qk_layernorm_all_heads": True}
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", ROPE | {"use_rope_scaling": True, "untie_embeddings_and_output_weights": True}),
    "mistral": ("mistral", ROPE | {"window_size": (9, 0)}),
    "qwen2": ("qwen2", ROPE | {"add_qkv_bias": True, "rotary_seq_len_interpolation_factor": 2}),
    "qwen3": ("qwen3", ROPE | {"qk_layernorm": True, "kv_channels": 12, "window_size": (9, 0),
                               "window_attn_skip_freq": (3,)}),
    "olmo2": ("olmo2", ROPE | OLMO2 | {"rope_scaling": '{"type": "yarn", "factor": 4, '
                                                       '"original_max_position_embeddings": 8}'}),
    "bloom": ("bloom", {"position_embedding_type": "alibi", "embed_layernorm": True, "openai_gelu": True}),
    "smollm3": ("smollm3", ROPE | {"no_rope_freq": (2,), "add_mlp_bias": True}),
}
"""The type a model is exported as, and its settings."""


@pytest.fixture(scope="module")
def tp() -> Iterator[TensorParallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield TensorParallel(init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with small sizes in place of its own; all else as published."""
    sizes = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "n_embd": 32, "n_layer": 3,
             "n_head": 4, "n_positions": LENGTH, "n_ctx": LENGTH, "num_hidden_layers": 3, "hidden_size": 32,
             "intermediate_size": 40, "num_attention_heads": 4, "max_position_embeddings": LENGTH, "head_dim": 12,
             "max_window_layers": 2}
    small = config | {name: value for name, value in sizes.items() if name in config}
    if "num_key_value_heads" in config:
        small["num_key_value_heads"] = max(1, 4 * config["num_key_value_heads"] // config["num_attention_heads"])
    if config.get("sliding_window"):
        small["sliding_window"] = 13
    if "original_max_position_embeddings" in (config.get("rope_scaling") or {}):
        small["rope_scaling"] = config["rope_scaling"] | {"original_max_position_embeddings": 16}
    return small


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_computes_what_it_computes_there(
    name: str, shared_data: Path, tp: TensorParallel, tmp_path: Path,
) -> None:
    described = shrunk(json.loads((shared_data / "hf_configs" / f"{name}.json").read_text()))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(described))
    theirs = lively(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "config"),
                                                     dtype=torch.float32))
    source = saved(theirs, tmp_path / "source")
    (source / "config.json").write_text(json.dumps(described))
    assert read_in(source, tmp_path / "ours") == 0
    tokens = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert_logits_close(our_logits(tmp_path / "ours", 0, tp, tokens), theirs(tokens).logits)
    assert write_out(tmp_path / "ours", tmp_path / "back") == 0
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {**written, "torch_dtype": None} == {**described, "torch_dtype": None}


def test_a_dynamic_base_grows_with_sequences_beyond_the_positions(tp: TensorParallel, tmp_path: Path) -> None:
    theirs = lively(MODELS["llama-dynamic"]())
    assert read_in(saved(theirs, tmp_path / "source"), tmp_path / "ours", "--seq-length", "40") == 0
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for length in (40, 24, 33):
            found = our_logits(tmp_path / "ours", 0, tp, tokens[:, :length])
            fresh = lively(MODELS["llama-dynamic"]())  # theirs keeps the base of the longest sequence so far
            assert_logits_close(found, fresh(tokens[:, :length]).logits)


def test_longrope_has_other_frequencies_up_to_the_original_positions(tp: TensorParallel, tmp_path: Path) -> None:
    theirs = lively(MODELS["llama-longrope"]())
    assert read_in(saved(theirs, tmp_path / "source"), tmp_path / "ours") == 0
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for length in (8, 9, 24):
            assert_logits_close(our_logits(tmp_path / "ours", 0, tp, tokens[:, :length]),
                                theirs(tokens[:, :length]).logits)


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_trained_here_computes_the_same_there(
    name: str, corpus: Corpus, tp: TensorParallel, tmp_path: Path,
) -> None:
    kind, settings = TRAINED[name]
    run(tmp_path, {**TINY, **corpus.settings, **settings, "num_layers": 3, "random_ltd_strata": 1,
                   "init_method_std": 0.1, "global_batch_size": 2, "eval_iters": 0,
                   "save": str(tmp_path / "trained")})
    # `transformers` opens every Qwen2 with Qwen2's own tokenizer, so one with another goes out as another type.
    flags = ["--no-tokenizer"] if kind == "qwen2" else []
    if kind == "qwen2":
        assert write_out(tmp_path / "trained", tmp_path / "renamed") == 0
        assert json.loads((tmp_path / "renamed" / "config.json").read_text())["model_type"] == "llama"
    assert write_out(tmp_path / "trained", tmp_path / "there", *flags) == 0
    written = json.loads((tmp_path / "there" / "config.json").read_text())
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "there", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    tokens = torch.arange(2 * 32).reshape(2, 32) * 7 % 61
    with torch.no_grad():
        assert_logits_close(our_logits(tmp_path / "trained", 20, tp, tokens), theirs.eval()(tokens).logits)
    assert written["model_type"] == kind
    assert_known_there(written, theirs)


def assert_known_there(written: dict[str, Any], theirs: PreTrainedModel) -> None:
    """No entry of a config.json is ours alone."""
    theirs_alone = {"model_type", "architectures", "torch_dtype", "rope_theta", "rope_scaling", "head_dim",
                    "seq_length"}  # which BLOOM's own files name, and its class leaves to others
    assert written.keys() <= theirs_alone | {field.name for field in dataclasses.fields(theirs.config)}


def test_a_bert_trained_here_computes_the_same_there(tp: TensorParallel, tmp_path: Path) -> None:
    run(tmp_path, {**TINY, **write_sentence_corpus(tmp_path).settings, "family": "bert", "num_layers": 3,
                   "random_ltd_strata": 1, "init_method_std": 0.1, "global_batch_size": 2, "eval_iters": 0,
                   "save": str(tmp_path / "trained")})
    assert write_out(tmp_path / "trained", tmp_path / "there") == 0
    theirs, report = AutoModelForPreTraining.from_pretrained(tmp_path / "there", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model = our_model(tmp_path / "trained", 20, tp)
    assert isinstance(model, BERT)
    check_bert(model, theirs.eval(), torch.arange(3 * 32).reshape(3, 32) * 7 % 61)
    assert_known_there(json.loads((tmp_path / "there" / "config.json").read_text()), theirs)
