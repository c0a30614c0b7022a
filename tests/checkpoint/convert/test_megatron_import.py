"""Classic Megatron-LM files, written here from known weights in every order and cut, come in bit for bit."""

import argparse
import hashlib
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.shapes import parameter_shapes
from tests.train.runs import saved_tensors
from tools import import_megatron_checkpoint as tool

GPT: dict[str, Any] = {}
LLAMA = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True,
         "untie_embeddings_and_output_weights": True, "group_query_attention": True, "num_query_groups": 2,
         "ffn_hidden_size": 48}
BERT = {"family": "bert"}
NAMES = {"attention_norm": "input_layernorm", "attention.qkv": "self_attention.query_key_value",
         "attention.proj": "self_attention.dense", "mlp_norm": "post_attention_layernorm",
         "mlp.fc1": "mlp.dense_h_to_4h", "mlp.fc2": "mlp.dense_4h_to_h"}


def config_of(settings: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**({"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 24,
                           "vocab_size": 61} | settings))


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Every tensor another one; what pads the vocabulary is zero, as after an import."""
    weights = {}
    for name, shape in parameter_shapes(config).items():
        seed = int(hashlib.md5(name.encode()).hexdigest()[:8], 16)
        weights[name] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if name in ("embedding.word.weight", "head.weight", "lm_head.bias"):
            weights[name][64:] = 0.0
    return weights


def reordered(rows: torch.Tensor, heads: int, version: float) -> torch.Tensor:
    """[n, 3, d] as older versions keep it."""
    apart = rows.unflatten(0, (heads, 3, -1))
    if version >= 2.0:
        return rows
    return (apart.transpose(1, 2) if version >= 1.0 else apart.transpose(0, 1)).reshape(rows.shape)


def cut(name: str, whole: torch.Tensor, rank: int, tp: int, config: ModelConfig, version: float) -> torch.Tensor:
    """A rank's part of a tensor, in Megatron-LM's order."""
    if name.endswith(("attention.proj.weight", "mlp.fc2.weight")):
        return whole.chunk(tp, dim=1)[rank].clone()
    if "attention.qkv" in name:
        part = whole.chunk(tp)[rank]
        return part.clone() if config.group_query_attention else reordered(
            part, config.num_attention_heads // tp, version).clone()
    if name in ("embedding.word.weight", "head.weight", "lm_head.bias"):
        return whole[:64].chunk(tp)[rank].clone()  # padded to a multiple of 32, not of 128
    return (whole.chunk(tp)[rank] if "mlp.fc1" in name else whole).clone()


def nested(state: dict[str, Any], name: str, value: torch.Tensor) -> None:
    """As in the files: dictionaries down to the module, dotted names inside it."""
    if name.startswith("language_model.encoder."):
        state.setdefault("language_model", {}).setdefault("encoder", {})[name.split(".", 2)[2]] = value
        return
    *path, last = name.split(".")
    for step in path:
        state = state.setdefault(step, {})
    state[last] = value


def rank_state(weights: dict[str, torch.Tensor], config: ModelConfig, rank: int, tp: int, stage: int, pp: int,
               version: float) -> dict[str, Any]:
    fixed = {"embedding.word.weight": "language_model.embedding.word_embeddings.weight",
             "embedding.position.weight": "language_model.embedding.position_embeddings.weight",
             "embedding.token_type.weight": "language_model.embedding.tokentype_embeddings.weight",
             "head.weight": "language_model.output_layer.weight", "lm_head.bias": "lm_head.bias"}
    modules = {"final_norm": "language_model.encoder.final_layernorm", "lm_head.dense": "lm_head.dense",
               "lm_head.norm": "lm_head.layernorm", "pooler": "language_model.pooler.dense",
               "binary_head": "binary_head"}
    state: dict[str, Any] = {}
    per_stage = config.num_layers // pp
    for name, whole in weights.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            if int(layer) // per_stage != stage or "mlp.up" in name:
                continue
            module, kind = rest.rsplit(".", 1)
            part = cut(name, whole, rank, tp, config, version)
            if module == "mlp.gate":
                up = weights[name.replace("gate", "up")].chunk(tp)[rank]
                module, part = "mlp.fc1", torch.cat((whole.chunk(tp)[rank], up))
            nested(state, f"language_model.encoder.layers.{int(layer) % per_stage}.{NAMES[module]}.{kind}", part)
        elif name.startswith("embedding."):
            if stage == 0:
                nested(state, fixed[name], cut(name, whole, rank, tp, config, version))
        elif stage == pp - 1:
            module, kind = name.rsplit(".", 1)
            theirs = fixed.get(name) or f"{modules[module]}.{kind}"
            nested(state, theirs, cut(name, whole, rank, tp, config, version))
    if pp > 1 and stage == pp - 1 and config.tied:
        word = cut("embedding.word.weight", weights["embedding.word.weight"], rank, tp, config, version)
        nested(state, "word_embeddings_for_head.weight", word)
    return state


def write_files(folder: Path, config: ModelConfig, tp: int, pp: int, version: float,
                **arguments: Any) -> dict[str, torch.Tensor]:
    """The files of all ranks; what they hold."""
    weights = weights_of(config)
    args = argparse.Namespace(**{
        "num_layers": config.num_layers, "hidden_size": 32, "ffn_hidden_size": config.ffn, "num_attention_heads": 4,
        "kv_channels": 8, "group_query_attention": config.group_query_attention,
        "num_query_groups": config.query_groups, "seq_length": 24, "max_position_embeddings": 24,
        "position_embedding_type": config.position_embedding_type, "normalization": config.normalization,
        "layernorm_epsilon": 1e-5, "swiglu": config.swiglu, "add_bias_linear": not config.disable_bias_linear,
        "untie_embeddings_and_output_weights": not config.tied, "padded_vocab_size": 64, "bias_gelu_fusion": True,
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "params_dtype": torch.float32,
    } | arguments)
    for rank in range(tp):
        for stage in range(pp):
            place = folder / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            place.mkdir(parents=True)
            torch.save({"args": args, "checkpoint_version": version, "iteration": 7,
                        "model": rank_state(weights, config, rank, tp, stage, pp, version)},
                       place / "model_optim_rng.pt")
    return weights


def run(folder: Path, save: Path, *more: str) -> int:
    return tool.main(["--from-megatron", str(folder), "--save", str(save), "--vocab-size", "61", *more])


@pytest.mark.parametrize("settings", [GPT, LLAMA, BERT, {**BERT, "bert_no_binary_head": True}],
                         ids=["gpt", "llama", "bert", "bert-no-binary-head"])
@pytest.mark.parametrize(("tp", "pp", "version"), [(1, 1, 3.0), (2, 2, 3.0), (2, 1, 1.0), (1, 2, 0.0), (2, 4, 2.0)])
def test_weights_come_in_bit_for_bit_from_every_cut_and_order(
    tmp_path: Path, settings: dict[str, Any], tp: int, pp: int, version: float,
) -> None:
    config = config_of(settings)
    weights = write_files(tmp_path / "theirs", config, tp, pp, version)
    assert run(tmp_path / "theirs", tmp_path / "ours") == 0
    found = saved_tensors(tmp_path / "ours", 0)
    assert found.keys() == {f"model.{name}" for name in weights}
    assert [name for name, tensor in weights.items() if not torch.equal(found[f"model.{name}"], tensor)] == []


def test_the_settings_are_those_of_the_file(tmp_path: Path) -> None:
    write_files(tmp_path / "theirs", config_of(GPT), 1, 1, 3.0)
    described = tool.read(tmp_path / "theirs" / "mp_rank_00" / "model_optim_rng.pt")
    found = tool_config(described)
    assert (found.family, found.openai_gelu, found.tied, found.vocab_size) == ("gpt", True, True, 61)
    assert found.num_layers == 4 and found.max_positions == 24


def tool_config(state: Any) -> ModelConfig:
    from megatron_ltd.checkpoint.convert.megatron.args import model_config
    return model_config(state, 61)


class Harmful:
    """What a hostile file would have called when it is opened."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('ran')",))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"num_experts": 8}, "--num-experts (experts)"),
    "later tokens": ({"window_size": (4, 4)}, "--window-size (4, 4): only a GPT's windows of earlier tokens"),
    "layers": ({"window_size": (4, 0), "window_attn_skip_freq": [1, 0]}, "must be 0 or 1 for each of 4 layers"),
    "softmax": ({"softmax_type": "learnable"}, "--softmax-type learnable: must be one of vanilla"),
    "padding": ({"padded_vocab_size": 32}, "--vocab-size = 61: the files tell only the padded size, 32"),
    "no layers": ({"num_layers": None}, "the file's args have no num_layers"),
    "other width": ({"ffn_hidden_size": 64}, "layers.0.mlp.fc1.weight has shape (128, 32), expected (64, 32)"),
    "other depth": ({"num_layers": 5}, "layers.4.attention_norm.weight is missing"),
    "ranks": ({"tensor_model_parallel_size": 2}, "has no mp_rank_01_000 or mp_rank_01/model_optim_rng.pt"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str,
) -> None:
    arguments, said = BAD[case]
    write_files(tmp_path / "theirs", config_of(GPT), 1, 1, 3.0, **arguments)
    assert run(tmp_path / "theirs", tmp_path / "ours") == 22
    assert said in capsys.readouterr().err
    assert not (tmp_path / "ours").exists() or list((tmp_path / "ours").iterdir()) == []


def test_a_file_with_code_in_it_is_refused_before_the_code_runs(tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path / "theirs", config_of(GPT), 1, 1, 3.0, hook=Harmful())
    assert run(tmp_path / "theirs", tmp_path / "ours") == 22
    assert "cannot be opened without trusting it" in capsys.readouterr().err  # rather than SystemExit from the file


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 do a value of an enumeration."""

    def __init__(self, owner: type, name: str):
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def test_values_of_enumerations_are_read_and_nothing_else_is_taken_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = type("ModelType", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    for name in ("megatron", "megatron.core", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    write_files(tmp_path / "theirs", config_of(GPT), 1, 1, 3.0, model_type=ByName(module.ModelType, "retro"))
    assert run(tmp_path / "theirs", tmp_path / "ours") == 0
    write_files(tmp_path / "bad", config_of(GPT), 1, 1, 3.0, hook=ByName(argparse.Namespace, "__init__"))
    assert run(tmp_path / "bad", tmp_path / "refused") == 22
    assert "cannot be opened without trusting it" in capsys.readouterr().err
    with pytest.raises(pickle.UnpicklingError, match="it takes '__init__' of something that is no enumeration"):
        tool.member(argparse.Namespace, "__init__")


def test_damaged_and_missing_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, tmp_path / "ours") == 22
    assert "mp_rank_00/model_optim_rng.pt. Name the folder of one iteration" in capsys.readouterr().err
    write_files(tmp_path / "theirs", config_of(GPT), 1, 1, 3.0)
    file = tmp_path / "theirs" / "mp_rank_00" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:5000])
    assert run(tmp_path / "theirs", tmp_path / "ours") == 22
    assert f"{file} cannot be opened" in capsys.readouterr().err
