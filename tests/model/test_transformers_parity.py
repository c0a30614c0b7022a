"""Logits, losses and gradients equal those of `transformers` models with the same weights."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.decoding import DecodeState, DecodingGPT
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.init import materialize
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import (
    LLAMA_LIKE,
    assert_gradients_close,
    build_gpt,
    load,
    loss_and_gradients,
    run,
    tiny_batch,
    tiny_config,
    whole_parameters,
)
from tests.model.transformers_weights import of_bloom, of_gpt2, of_gpt_neox, of_llama

Mapping = Callable[[dict[str, torch.Tensor], ModelConfig], dict[str, torch.Tensor]]
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}  # a padding token would get no gradient


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which attention is far from uniform and no bias is zero.

    Both models round in fp32, each in its own order, and other processors in other orders. With larger matrices a layer
    magnifies what the layers below it have rounded, until the difference at the top is the tolerance."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or "ln_" in name
            size = 0.15 if "mlp" in name and parameter.dim() > 1 else 0.2
            parameter.copy_(1.0 + 0.2 * noise if is_norm and name.endswith("weight") else size * noise)
    return model


def check(theirs: PreTrainedModel, config: ModelConfig, mapping: Mapping, tp: TensorParallel) -> None:
    lively(theirs)
    ours = build_gpt(config, tp)
    load(ours, mapping({name: p.detach() for name, p in theirs.named_parameters()}, config))
    assert ours.final_norm is not None
    hidden: list[torch.Tensor] = []
    ours.final_norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    batch = tiny_batch(config)
    logits = theirs(batch["tokens"]).logits
    assert float(logits.detach().std()) > 0.5, "logits near zero would agree whatever the model does"
    batch["labels"][:, ::2] = logits.detach().argmax(-1)[:, ::2]
    check_evaluation(ours.eval(), batch, logits.detach(), hidden)
    loss = (F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
            * batch["loss_mask"].flatten()).sum()
    loss.backward()
    our_loss, our_gradients = loss_and_gradients(ours.train(), batch)
    torch.testing.assert_close(our_loss, loss.detach(), rtol=1e-5, atol=0.0)
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert_gradients_close(our_gradients, mapping(their_gradients, config))


def check_evaluation(ours: GPT, batch: dict[str, torch.Tensor], logits: torch.Tensor,
                     hidden: list[torch.Tensor]) -> None:
    """The full logits from what the final norm gives, and what evaluation returns where the mask asks for it."""
    with torch.no_grad():
        log_probabilities, greedy = run(ours, batch)
    table = whole_parameters(ours)
    weight = table["head.weight" if "head.weight" in table else "embedding.word.weight"]
    our_logits = (hidden.pop().transpose(0, 1) @ weight.T)[..., :logits.shape[-1]]
    torch.testing.assert_close(our_logits, logits, rtol=1e-5, atol=1e-5)
    expected = logits.log_softmax(-1).gather(-1, batch["labels"][..., None])[..., 0]
    asked = batch["loss_mask"] > 0
    assert bool(asked.any()) and not bool(asked.all())
    torch.testing.assert_close(log_probabilities, expected.where(asked, 0.0), rtol=1e-5, atol=1e-5)
    right = logits.argmax(-1) == batch["labels"]
    assert torch.equal(greedy.bool(), right & asked)
    assert bool(right[:, ::2].all()) and not bool(right[asked].all())


def test_gpt2(tp: TensorParallel) -> None:
    config = tiny_config(openai_gelu=True, max_position_embeddings=40, norm_epsilon=1e-2)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=61, n_positions=40, n_embd=32, n_layer=5, n_head=4, activation_function="gelu_new", resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=1e-2, attn_implementation="eager", **TOKENS))
    check(theirs, config, of_gpt2, tp)


@pytest.mark.parametrize("heads", [4, 6])
def test_bloom(tp: TensorParallel, heads: int) -> None:
    check(bloom(heads), bloom_config(heads), of_bloom, tp)


def bloom(heads: int) -> BloomForCausalLM:
    return BloomForCausalLM(BloomConfig(
        vocab_size=61, hidden_size=48, n_layer=5, n_head=heads, layer_norm_epsilon=1e-3, hidden_dropout=0.0,
        attention_dropout=0.0, **TOKENS))


def bloom_config(heads: int) -> ModelConfig:
    return tiny_config(position_embedding_type="alibi", embed_layernorm=True, openai_gelu=True, hidden_size=48,
                       num_attention_heads=heads, norm_epsilon=1e-3)


@torch.no_grad()
def test_bloom_reads_on_from_what_it_has_cached(tp: TensorParallel) -> None:
    theirs, config = lively(bloom(6)), bloom_config(6)
    ours = DecodingGPT(config, tp, StageSpan(0, 5, 5))
    materialize(ours, config, prefix="", seed=1, device=torch.device("cpu"), draw=False)
    load(ours.eval(), of_bloom({name: p.detach() for name, p in theirs.named_parameters()}, config))
    tokens = tiny_batch(config)["tokens"]
    state = DecodeState(range(5), torch.zeros(3, dtype=torch.long), config.seq_length)
    expected = theirs(tokens).logits
    for part in tokens.split([7, 1, 1, 5, 10], dim=1):
        logits = ours(part, state=state)
        state.length += part.shape[1]
        torch.testing.assert_close(logits, expected[:, state.length - 1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_llama(tp: TensorParallel, groups: int, tied: bool) -> None:
    settings = LLAMA_LIKE | {"num_query_groups": groups, "untie_embeddings_and_output_weights": not tied,
                             "rotary_base": 500, "norm_epsilon": 1e-3}
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=groups, max_position_embeddings=24, rms_norm_eps=1e-3, attention_bias=False, mlp_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, tie_word_embeddings=tied,
        attn_implementation="eager", **TOKENS))
    check(theirs, tiny_config(**settings), of_llama, tp)


def test_llama_with_heads_that_do_not_add_up_to_the_width(tp: TensorParallel) -> None:
    settings = LLAMA_LIKE | {"kv_channels": 12}
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, head_dim=12,
        num_key_value_heads=2, max_position_embeddings=24, rms_norm_eps=1e-5, tie_word_embeddings=False,
        attn_implementation="eager", **TOKENS))
    check(theirs, tiny_config(**settings), of_llama, tp)


def test_gpt_neox_which_rotates_a_part_of_each_head(tp: TensorParallel) -> None:
    config = tiny_config(position_embedding_type="rope", rotary_percent=0.5, untie_embeddings_and_output_weights=True)
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4,
        max_position_embeddings=24, hidden_act="gelu", use_parallel_residual=False, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        attn_implementation="eager", **TOKENS))
    check(theirs, config, of_gpt_neox, tp)
