"""Tiny `transformers` models of each family, saved as users save them, and the tool that converts them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MegatronBertConfig,
    MegatronBertForPreTraining,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.checkpoint.whole_tensors import PREFIX
from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.bert import BERT
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.init import materialize
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import load, whole_parameters
from tests.train.runs import saved_tensors
from tools import convert_checkpoint

VOCABULARY, POSITIONS = 61, 24
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def gpt2(**changes: Any) -> PreTrainedModel:
    settings = TOKENS | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS, "resid_pdrop": 0.0,
                         "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**(settings | changes)))


def decoder_settings(**changes: Any) -> dict[str, Any]:
    settings = TOKENS | {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 8,
                         "num_key_value_heads": 8, "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    return settings | changes


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**decoder_settings(**changes)))


def mistral(**changes: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**decoder_settings(**({"sliding_window": POSITIONS} | changes))))


def qwen2(**changes: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**decoder_settings(**changes)))


def qwen3(**changes: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**decoder_settings(**({"num_key_value_heads": 4, "head_dim": 12} | changes))))


def olmo2(**changes: Any) -> PreTrainedModel:
    return Olmo2ForCausalLM(Olmo2Config(**decoder_settings(**({"num_key_value_heads": 4} | changes))))


def smollm3(**changes: Any) -> PreTrainedModel:
    settings = {"num_key_value_heads": 2, "no_rope_layer_interval": 2}
    return SmolLM3ForCausalLM(SmolLM3Config(**decoder_settings(**(settings | changes))))


def bloom(**changes: Any) -> PreTrainedModel:
    settings = TOKENS | {"hidden_size": 48, "n_layer": 3, "n_head": 6, "seq_length": POSITIONS}
    return BloomForCausalLM(BloomConfig(**(settings | changes)))


def scaled(rope_type: str, **entries: Any) -> dict[str, Any]:
    """Rotary parameters of a model that was first trained on fewer positions than it has."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0, **entries}}


def megatron_bert(**changes: Any) -> PreTrainedModel:
    settings = TOKENS | {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
                         "max_position_embeddings": POSITIONS, "hidden_dropout_prob": 0.0, "layer_norm_eps": 1e-6,
                         "attention_probs_dropout_prob": 0.0}
    return MegatronBertForPreTraining(MegatronBertConfig(**(settings | changes)))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": gpt2,
    "gpt2-untied-exact-gelu": lambda: gpt2(tie_word_embeddings=False, activation_function="gelu", n_inner=72),
    "llama-ratio-1-untied": llama,
    "llama-ratio-3-tied": lambda: llama(num_attention_heads=6, num_key_value_heads=2, hidden_size=48, vocab_size=67,
                                        tie_word_embeddings=True),
    "llama-ratio-8-wide-heads": lambda: llama(num_key_value_heads=1, head_dim=12),
    "llama-biases": lambda: llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "mistral-ratio-4": lambda: mistral(num_key_value_heads=2, vocab_size=127),
    "qwen2-qkv-biases": lambda: qwen2(num_key_value_heads=2, tie_word_embeddings=True, vocab_size=129),
    "llama-linear": lambda: llama(**scaled("linear", factor=4.0)),
    "llama-dynamic": lambda: llama(**scaled("dynamic", factor=3.0)),
    "llama-3.1": lambda: llama(**scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                        original_max_position_embeddings=16), hidden_size=64),
    "llama-yarn": lambda: llama(**scaled("yarn", factor=3.0, original_max_position_embeddings=8), hidden_size=64),
    "llama-longrope": lambda: llama(**scaled("longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 5.0],
                                             original_max_position_embeddings=8)),
    "llama-attention-biases": lambda: llama(attention_bias=True),
    "llama-mlp-biases": lambda: llama(mlp_bias=True),
    "mistral-window": lambda: mistral(num_key_value_heads=2, sliding_window=7),
    "qwen2-mixed-windows": lambda: qwen2(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": qwen3,
    "qwen3-listed-windows-biases": lambda: qwen3(
        use_sliding_window=True, sliding_window=5, attention_bias=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "olmo2": olmo2,
    "olmo2-biases-yarn": lambda: olmo2(attention_bias=True, **scaled("yarn", factor=2.0, mscale=0.7,
                                                                     mscale_all_dim=0.4, truncate=False)),
    "smollm3": smollm3,
    "smollm3-windows-biases": lambda: smollm3(use_sliding_window=True, sliding_window=5, no_rope_layers=[0, 1, 0],
                                              mlp_bias=True, attention_bias=True),
    "bloom": bloom,
    "bloom-untied": lambda: bloom(tie_word_embeddings=False, n_head=4),
    "megatron-bert": megatron_bert,
}


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which attention is far from uniform and no bias is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = any(word in name.lower() for word in ("norm", "ln_", ".ln."))
            parameter.copy_(1.0 + 0.2 * noise if is_norm and name.endswith("weight") else 0.25 * noise)
    return model.eval()


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def our_model(checkpoints: Path, step: int, tp: TensorParallel) -> GPT | BERT:
    """The model of a checkpoint."""
    config = RunConfig.from_dict(read_manifest(checkpoints / f"iter_{step:07d}").config).model
    kind = BERT if config.family == "bert" else GPT
    model = kind(config, tp, StageSpan(0, config.num_layers, config.num_layers))
    materialize(model, config, prefix="", seed=1, device=torch.device("cpu"), draw=False)
    load(model, {name.removeprefix(PREFIX): tensor for name, tensor in saved_tensors(checkpoints, step).items()
                 if name.startswith(PREFIX)})
    return model.eval()


@torch.no_grad()
def our_logits(checkpoints: Path, step: int, tp: TensorParallel, tokens: torch.Tensor) -> torch.Tensor:
    """Of the GPT in a checkpoint. Shapes: tokens [b, s] -> [b, s, v]"""
    model = our_model(checkpoints, step, tp)
    hidden: list[torch.Tensor] = []
    assert model.final_norm is not None
    model.final_norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    model(tokens, labels=tokens, loss_mask=torch.ones(tokens.shape), sample_ids=torch.zeros(len(tokens)).long())
    table = whole_parameters(model)
    output = table.get("head.weight", table["embedding.word.weight"])
    return (hidden.pop().transpose(0, 1) @ output.T)[..., :model.config.vocab_size]


@torch.no_grad()
def check_bert(model: BERT, theirs: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Both heads predict what theirs predict. Shapes: tokens [3, s], s > 17"""
    types = (torch.arange(tokens.shape[1]) > 9).long().expand_as(tokens)
    real = torch.ones(tokens.shape, dtype=torch.bool)
    real[1, 17:] = False
    wanted = theirs(tokens, attention_mask=real.long(), token_type_ids=types)
    positions = torch.tensor([[0, 3, 16]] * 3)
    samples = torch.arange(3)[:, None]
    for order in (0, 1):
        found = model(tokens, padding_mask=real, predicted_positions=positions, labels=tokens[samples, positions],
                      loss_mask=torch.ones(3, 3), sample_ids=torch.zeros(3).long(), token_types=types,
                      sentence_order=torch.full((3,), order))
        words = wanted.prediction_logits.log_softmax(-1)[samples, positions, tokens[samples, positions]]
        torch.testing.assert_close(found[0, :, :3], words, rtol=1e-5, atol=1e-5)
        orders = wanted.seq_relationship_logits.log_softmax(-1)[:, order]
        torch.testing.assert_close(found[0, :, 3], orders, rtol=1e-5, atol=1e-5)


def assert_logits_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To 1e-5 of the largest."""
    assert float(wanted.std()) > 0.05, "logits near zero would agree whatever the model does"
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5 * float(wanted.abs().max()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def read_in(source: Path, save: Path, *flags: str) -> int:
    return convert_checkpoint.main(["--from-hf", str(source), "--save", str(save), *flags])


def write_out(load: Path, target: Path, *flags: str) -> int:
    return convert_checkpoint.main(["--load", str(load), "--to-hf", str(target), *flags])
