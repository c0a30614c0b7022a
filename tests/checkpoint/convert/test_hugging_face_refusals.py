"""A model folder that is damaged, dangerous, or unsupported is rejected with what is wrong, and nothing is written."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_ltd.checkpoint.convert.huggingface.describe import describe
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError
from tests.checkpoint.hugging_face import (
    TOKENS,
    gpt2,
    lively,
    llama,
    megatron_bert,
    mistral,
    qwen2,
    read_in,
    saved,
    smollm3,
    weights,
    write_out,
)
from tests.checkpoint.layouts import plain
from tests.train.runs import saved_tensors
from tools import convert_checkpoint

DAMAGED = 22


def refused(source: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a folder that is refused."""
    target = source.parent / "ours"
    capsys.readouterr()
    assert read_in(source, target) == DAMAGED
    assert not target.exists() or not any(target.glob("*iter*"))
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(lively(llama()), tmp_path / "source")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("changes", "words"), [
    ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "rope_type = 'spiral': must be default, linear,"),
    ({"rope_scaling": {"type": "yarn", "factor": "large"}}, "factor = 'large': must be a number above 0"),
    ({"rope_scaling": [4.0]}, "rope_scaling = [4.0]: must be a table"),
    ({"rope_scaling": {"full_attention": {"rope_type": "linear"}}}, "tables for each kind of layer"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0}}, "llama3 needs low_freq_factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.5}}, "rope_theta = 500.5"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_theta = nan: must be a whole"),
    ({"layer_types": [["full_attention"]]}, "layer_types = [['full_attention']]: must be full"),
    ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias is missing"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
    ({"sliding_window": 8}, "sliding_window = 8: the classes of llama have no windows"),
    ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "must be full_attention"),
    ({"is_causal": False}, "is_causal = False: only True"),
    ({"num_local_experts": 8}, "num_local_experts = 8: models of another model_type compute with it"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"logit_scale": 0.5}, "logit_scale = 0.5: models of another model_type compute with it"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "auto_map names Python code"),
    ({"model_type": "mamba"}, "model_type = 'mamba'"),
    ({"model_type": "phi3", "auto_map": {}}, "model_type = 'phi3' is not supported, since its projections are fused"),
    ({"num_key_value_heads": 3}, "must divide num_attention_heads"),
    ({"hidden_size": "wide"}, "hidden_size = 'wide'"),
    ({"num_hidden_layers": None}, "num_hidden_layers = None"),
    ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
    ({"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight belongs to no layer"),
    ({"vocab_size": 62}, "model.embed_tokens.weight has shape (61, 32), expected (62, 32)"),
    ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
])
def test_a_variant_that_is_not_computed_is_refused(
    source: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str,
) -> None:
    change_config(source, **changes)
    assert words in refused(source, capsys)


@pytest.mark.parametrize(("build", "changes", "words"), [
    (gpt2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    (gpt2, {"activation_function": "relu"}, "activation_function = 'relu'"),
    (gpt2, {"activation_function": ["gelu"]}, "activation_function = ['gelu']: must be one of"),
    (gpt2, {"hidden_size": 64}, "hidden_size = 64: must equal n_embd = 32"),
    (mistral, {"sliding_window": "all"}, "sliding_window = 'all': must be a whole number"),
    (mistral, {"sliding_window": 16, "layer_types": ["full_attention"] * 3}, "every layer of this model has"),
    (qwen2, {"layer_types": ["sliding_attention"] * 3}, "sliding_attention needs a sliding_window"),
    (smollm3, {"no_rope_layers": [1, 2, 0]}, "no_rope_layers = [1, 2, 0]: must be 0 or 1 for each of 3 layers"),
    (megatron_bert, {"type_vocab_size": 3}, "type_vocab_size = 3"),
    (megatron_bert, {"is_decoder": True}, "is_decoder = True"),
])
def test_so_are_variants_of_the_other_families(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], build: Callable[[], Any], changes: dict[str, Any], words: str,
) -> None:
    source = saved(build(), tmp_path / "source")
    change_config(source, **changes)
    assert words in refused(source, capsys)


def test_windows_that_reach_every_position_are_full_attention(tmp_path: Path) -> None:
    source = saved(mistral(), tmp_path / "source")
    assert json.loads((source / "config.json").read_text())["sliding_window"] == 24
    assert read_in(source, tmp_path / "ours") == 0


NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop(NAME), f"{NAME} is missing"),
    (lambda t: t.update(extra=torch.ones(2)), "extra belongs to no layer"),
    (lambda t: t.update({NAME: t[NAME][:-1].clone()}), f"{NAME} has shape (31, 32), expected (32, 32)"),
    (lambda t: t[NAME].view(-1)[7].fill_(float("nan")), "model.layers.1.attention.qkv.weight has NaN"),
    (lambda t: t[NAME].view(-1)[7].fill_(float("inf")), "model.layers.1.attention.qkv.weight has NaN or infinity"),
    (lambda t: t.update({NAME: t[NAME].double()}), f"{NAME} has dtype F64"),
    (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), f"{NAME} has dtype I8"),
])
def test_tensors_that_do_not_fit_are_named(
    source: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, torch.Tensor]], Any], words: str,
) -> None:
    change_weights(source, change)
    assert words in refused(source, capsys)


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_is_refused_with_a_remedy_and_never_opened(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    said = refused(source, capsys)
    assert "pytorch_model.bin" in said and "save_pretrained" in said
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "", "x.bin", 3,
                                  "..\\x.safetensors", ".hidden.safetensors"])
def test_an_index_may_name_files_of_its_folder_alone(
    source: Path, capsys: pytest.CaptureFixture[str], file: Any,
) -> None:
    (source.parent / "secret.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    assert "must be the plain name of a .safetensors file" in refused(source, capsys)


@pytest.mark.parametrize(("index", "words"), [
    ("{", "is not JSON"), ("[]", "must hold a JSON object"), ("{}", "has no weight_map"),
    ('{"weight_map": {"a": "missing.safetensors"}}', "is missing"),
    ('{"weight_map": {"a": "model.safetensors"}}', "which the index places in no file"),
])
def test_a_damaged_index_is_refused(
    source: Path, capsys: pytest.CaptureFixture[str], index: str, words: str,
) -> None:
    (source / "model.safetensors.index.json").write_text(index)
    if "missing" in index:
        (source / "model.safetensors").rename(source / "other.safetensors")
    assert words in refused(source, capsys)


def test_of_two_saves_in_a_folder_the_whole_one_is_read_and_two_whole_ones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    model, folder = lively(llama()), tmp_path / "source"
    model.save_pretrained(folder, max_shard_size="20KB")
    [first, *_] = sorted(folder.glob("model-*.safetensors"))
    kept = first.read_bytes()
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    model.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file() and not first.is_file(), "only the index is left"
    theirs = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
    assert read_in(folder, tmp_path / "ours") == 0
    [ours] = {tensor for name, tensor in saved_tensors(tmp_path / "ours", 0).items() if "final_norm" in name}
    assert torch.equal(ours, theirs)

    first.write_bytes(kept)
    (tmp_path / "ours").rename(tmp_path / "before")
    said = refused(folder, capsys)
    assert "holds the model twice: as model.safetensors, and as model.safetensors.index.json" in said


@pytest.mark.parametrize(("damage", "words"), [
    (lambda data: data[:4], "model.safetensors is damaged or cut short"),
    (lambda data: b"\xff" * 8 + data[8:], "header too large"),
    (lambda data: data[:-3], "file not fully covered"),
    (lambda data: data + b"more", "file not fully covered"),
    (lambda data: data[:8] + b"!" + data[9:], "invalid JSON in header"),
    (lambda data: data.replace(b'"F32"', b'"F33"', 1), "unknown variant `F33`"),
    (lambda data: data.replace(b'"shape":[', b'"shope":[', 1), "missing field `shape`"),
], ids=["short", "huge header", "cut", "longer", "no JSON", "no dtype", "no shape"])
def test_a_damaged_file_is_refused(
    source: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes], words: str,
) -> None:
    path = source / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert words in refused(source, capsys)


def test_a_missing_folder_and_one_in_use_are_refused(source: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in refused(tmp_path / "none", capsys)
    assert read_in(source, tmp_path / "ours") == 0
    assert read_in(source, tmp_path / "ours") == DAMAGED
    assert "--output" in (told := capsys.readouterr().err) and "holds a checkpoint already" in told
    (tmp_path / "file").write_text("")
    assert read_in(source, tmp_path / "file") == DAMAGED
    assert f"--output = {tmp_path / 'file'} is not a folder" in capsys.readouterr().err
    assert write_out(tmp_path / "ours", source) == DAMAGED
    assert "exists already" in capsys.readouterr().err


def test_half_of_the_flags_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_checkpoint.main(["--from-hf", str(tmp_path)]) == 20
    assert "--from-hf DIR --output DIR" in capsys.readouterr().err
    assert convert_checkpoint.main(["--from-hf", "a", "--save", "b", "--load", "c", "--to-hf", "d"]) == 20


def test_numbers_that_a_precision_cannot_hold_are_not_written(tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(lively(llama()), tmp_path / "source")
    change_weights(source, lambda t: t[NAME].view(-1)[7].fill_(1e6))
    assert read_in(source, tmp_path / "ours") == 0
    assert write_out(tmp_path / "ours", tmp_path / "back", "--dtype", "fp16") == DAMAGED
    assert f"{NAME} does not fit F16" in capsys.readouterr().err
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".tmp*"))


def test_a_checkpoint_that_is_damaged_or_no_model_is_not_exported(tmp_path: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(lively(gpt2()), tmp_path / "source")
    read_in(source, tmp_path / "ours")
    file = tmp_path / "ours" / "iter_0000000" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert write_out(tmp_path / "ours", tmp_path / "back") == DAMAGED
    assert "SHA-256" in capsys.readouterr().err
    CheckpointWriter(tmp_path / "other", None).save(
        1, plain(), config=read_manifest(tmp_path / "ours" / "iter_0000000").config, counters={})
    assert write_out(tmp_path / "other", tmp_path / "back") == DAMAGED
    assert "lacks embedding.word.weight" in capsys.readouterr().err


ROPE = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True}


@pytest.mark.parametrize(("changes", "words"), [
    ({"position_embedding_type": "rope"}, "--normalization must be RMSNorm for llama"),
    ({"position_embedding_type": "none"}, "--position-embedding-type must be learned_absolute"),
    ({"disable_bias_linear": True}, "--disable-bias-linear must be off for gpt2"),
    ({"group_query_attention": True, "num_query_groups": 2}, "--group-query-attention must be off"),
    ({"kv_channels": 12}, "--kv-channels must be hidden size / heads"),
    (ROPE | {"rotary_percent": 0.5}, "--rotary-percent must be 1.0 for llama"),
    (ROPE | {"norm_placement": "after"}, "--norm-placement after needs --qk-layernorm"),
    (ROPE | {"qk_layernorm": True, "add_mlp_bias": True}, "--add-mlp-bias must be off for qwen3"),
    (ROPE | {"qk_layernorm": True, "no_rope_freq": (2,)}, "--no-rope-freq must be left out for qwen3"),
    ({"ngram_rows": 128}, "--ngram-rows = 128: no model there looks up runs of tokens"),
    ({"qkv_conv_kernel": 4}, "--qkv-conv-kernel = 4: no model there convolves"),
    ({"mixture_of_depths_capacity": 0.5}, "--mixture-of-depths-capacity = 0.5: no model there has routers"),
    ({"position_embedding_type": "alibi", "openai_gelu": True}, "--embed-layernorm must be on for bloom"),
    ({"embed_layernorm": True}, "--position-embedding-type must be alibi for bloom"),
    ({"position_embedding_type": "alibi", "embed_layernorm": True}, "--openai-gelu must be on for bloom"),
    ({"family": "bert", "embed_layernorm": True}, "--embed-layernorm must be off for megatron-bert"),
    ({"family": "bert", "bert_no_binary_head": True}, "--bert-no-binary-head must be off"),
])
def test_a_model_that_has_no_counterpart_is_not_exported_as_another(changes: dict[str, Any], words: str) -> None:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 24,
             "vocab_size": TOKENS["vocab_size"]}
    config = RunConfig(model=ModelConfig(**(sizes | changes))).model
    with pytest.raises(CheckpointError, match=words):
        describe(config)
