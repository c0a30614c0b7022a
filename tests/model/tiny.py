"""Tiny models with lively weights, and batches for them."""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.bert import BERT
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.init import global_name, materialize
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.model.vit import ViT
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.policies.random_ltd import RandomLTD
from megatron_ltd.token_drop.policy import Shape
from megatron_ltd.token_drop.registry import Policies
from megatron_ltd.token_drop.schedule import KeptLength
from tests.plans import plan_of

SEED = 1234

GPT2_LIKE: dict[str, Any] = {}
LLAMA_LIKE: dict[str, Any] = {
    "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True, "group_query_attention": True, "num_query_groups": 2,
    "ffn_hidden_size": 48,
}
QWEN3_LIKE: dict[str, Any] = LLAMA_LIKE | {
    "qk_layernorm": True, "kv_channels": 12, "window_size": (5, 0), "window_attn_skip_freq": (3,)}
OLMO2_LIKE: dict[str, Any] = LLAMA_LIKE | {
    "qk_layernorm": True, "qk_layernorm_all_heads": True, "norm_placement": "after", "window_size": (6, 0)}
SMOLLM3_LIKE: dict[str, Any] = LLAMA_LIKE | {
    "no_rope_freq": (0, 1, 0, 1, 0), "window_size": (7, 0), "window_attn_skip_freq": (1, 0, 0, 1, 0),
    "rotary_seq_len_interpolation_factor": 4, "add_proj_bias": True, "add_mlp_bias": True}

BLOOM_LIKE: dict[str, Any] = {
    "position_embedding_type": "alibi", "embed_layernorm": True, "openai_gelu": True, "apply_layernorm_1p": True}

CONVOLUTION: dict[str, Any] = {"qkv_conv_kernel": 4}

NGRAMS: dict[str, Any] = {"ngram_rows": 40, "ngram_length": 3}


def tiny_config(**settings: Any) -> ModelConfig:
    """Five layers of width 32 with four heads, 24 tokens, an odd vocabulary of 61 in 64 rows."""
    defaults: dict[str, Any] = {
        "num_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 24, "vocab_size": 61,
        "make_vocab_size_divisible_by": 8,
    }
    return ModelConfig(**(defaults | settings))


def build_model(config: ModelConfig, tp: TensorParallel, *, dropped: Collection[int] = (), kept: int | None = None,
                strata: int = 1, shared: bool = False, cross_layer: int | None = None, recompute: str = "none",
                span: tuple[int, int] | None = None) -> GPT | BERT:
    """A model, or the stage of one that holds the layers of `span`, in training mode with lively weights."""
    first, stop = span if span is not None else (0, config.num_layers)
    kind = BERT if config.family == "bert" else GPT
    model = kind(config, tp, StageSpan(first, stop, config.num_layers), policies=uniform_sets(config, strata),
                 seed=SEED, recompute=recompute)
    materialize(model, config, prefix="", seed=SEED, device=torch.device("cpu"), draw=False)
    load(model, lively_weights(model))
    plan = plan_of(config.seq_length, config.num_layers, kept, dropped, shared=shared, attends_to_all=cross_layer)
    return following(model, plan).train()


def uniform_sets(config: ModelConfig, strata: int = 1) -> Policies:
    """Random-LTD's draws."""
    length = KeptLength(config.seq_length, config.seq_length)
    return Policies(Shape(config.family, config.num_layers, config.seq_length, SEED),
                    (RandomLTD((), length, SEED, strata),))


def following(model: Any, plan: StepPlan) -> Any:
    """The model, which computes this plan from now on, as if every call named it."""
    forward = type(model).forward
    model.forward = lambda *args, **batch: forward(model, *args, **{"plan": plan, **batch})
    return model


def build_gpt(config: ModelConfig, tp: TensorParallel, **settings: Any) -> GPT:
    """`build_model` for GPT."""
    model = build_model(config, tp, **settings)
    assert isinstance(model, GPT)
    return model


def lively_weights(model: GPT | BERT | ViT) -> dict[str, torch.Tensor]:
    """Whole weights by global name, the same on every layout, with which a mistake anywhere shows: norms and biases
    are not the neutral ones, and attention is far from uniform. Larger ones would magnify from layer to layer what is
    rounded, which differs between processors, until it is the tolerance."""
    weights = {}
    for name, parameter in model.named_parameters():
        name = global_name(name, model.config)
        generator = torch.Generator().manual_seed(int(hashlib.md5(name.encode()).hexdigest()[:8], 16))
        noise = torch.randn(parameter.shape, generator=generator)
        neutral = 0.0 if model.config.apply_layernorm_1p else 1.0
        size = 0.15 if "mlp" in name and noise.dim() > 1 else 0.2
        weights[name] = neutral + 0.2 * noise if name.endswith("norm.weight") else size * noise
    return weights


@torch.no_grad()
def load(model: GPT | BERT, weights: dict[str, torch.Tensor]) -> None:
    """Fill the model from whole weights by global name; every name must be used."""
    unused = set(weights)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        name = global_name(name, model.config)
        unused.discard(name)
        parameter.copy_(distribute_tensor(weights[name], parameter.device_mesh, parameter.placements,
                                          src_data_rank=None))
    assert not unused


def whole_parameters(model: GPT | BERT) -> dict[str, torch.Tensor]:
    return {global_name(name, model.config): p.full_tensor().detach() for name, p in model.named_parameters()
            if isinstance(p, DTensor)}


def whole_gradients(model: GPT | BERT | ViT) -> dict[str, torch.Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor), f"{name} has no gradient"
        gradients[global_name(name, model.config)] = parameter.grad.full_tensor().clone()
    return gradients


def tiny_batch(config: ModelConfig, samples: int = 3, first_id: int = 40) -> dict[str, torch.Tensor]:
    """Random tokens and labels, a loss mask with gaps and weights other than one, and global sample indices."""
    generator = torch.Generator().manual_seed(first_id)
    shape = (samples, config.seq_length)
    assert config.vocab_size is not None
    tokens, labels = (torch.randint(0, config.vocab_size, shape, generator=generator) for _ in range(2))
    mask = torch.rand(shape, generator=generator)
    return {"tokens": tokens, "labels": labels, "loss_mask": torch.where(mask < 0.3, 0.0, mask.round(decimals=2)),
            "sample_ids": torch.arange(first_id, first_id + samples) * 7}


def tiny_bert_batch(config: ModelConfig, samples: int = 3, first_id: int = 40) -> dict[str, torch.Tensor]:
    """Sentence pairs of different lengths, the shortest much shorter than the others, with up to five predictions, of
    which some are padding."""
    generator = torch.Generator().manual_seed(first_id)
    assert config.vocab_size is not None
    length, most = config.seq_length, 5
    lengths = torch.tensor([length, length // 3, length - 3, 4])[:samples]
    everywhere = torch.arange(length)
    real = everywhere < lengths[:, None]
    tokens = torch.randint(1, config.vocab_size, (samples, length), generator=generator) * real
    counts = torch.tensor([5, 3, 4, 1])[:samples]
    positions = torch.stack([torch.randperm(int(n), generator=generator)[:most].sort().values if n >= most
                             else everywhere[:most].clamp(max=int(n) - 1) for n in lengths])
    counted = torch.arange(most) < counts[:, None]
    labels = torch.randint(1, config.vocab_size, (samples, most), generator=generator)
    batch = {"tokens": tokens, "padding_mask": real, "predicted_positions": positions * counted,
             "labels": labels * counted, "loss_mask": counted.float(),
             "sample_ids": torch.arange(first_id, first_id + samples) * 7}
    if not config.bert_no_binary_head:
        batch |= {"token_types": (everywhere >= lengths[:, None] // 2).long() * real,
                  # with fewer swapped ones the gradients of the head's bias all but cancel
                  "sentence_order": (torch.arange(samples) % 3 != 1).long()}
    return batch


def documents(config: ModelConfig, samples: int = 3) -> dict[str, torch.Tensor]:
    """Document ids of packed samples, each cut elsewhere, and positions that count from the start of each document."""
    document_ids = torch.zeros(samples, config.seq_length, dtype=torch.int64)
    position_ids = torch.zeros_like(document_ids)
    for b in range(samples):
        starts = [0, 5 + b, 6 + b, 15 - b, config.seq_length]
        for number, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            document_ids[b, start:stop] = number
            position_ids[b, start:stop] = torch.arange(stop - start)
    return {"document_ids": document_ids, "position_ids": position_ids}


def run(model: GPT | BERT, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model returns; the loss, its only term, as a scalar."""
    facts = {name: value for name, value in batch.items() if name != "tokens"}
    answer = model(batch["tokens"], **facts)
    return answer.squeeze(0) if answer.dim() == 1 else answer


def loss_and_gradients(model: GPT | BERT,
                       batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = run(model, batch)
    loss.backward()
    return loss.detach(), whole_gradients(model)


def assert_gradients_close(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor],
                           tolerance: float = 1e-5) -> None:
    """Every gradient, to a share of its largest entry."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        scale = float(expected.abs().max())
        assert scale > 0.0, f"the reference gradient of {name} is zero, which tests nothing"
        torch.testing.assert_close(ours[name].double(), expected.double(), rtol=0.0, atol=tolerance * scale,
                                   msg=partial("gradient of {}: {}".format, name))


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Torch's count of what a model multiplies; attention is spelled out, so of each head all k x k pairs."""
    def in_place_addmm(total: torch.Size, left: torch.Size, right: torch.Size, **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    # The counter knows the product below out of place only; the head adds up the gradient of its weight in place.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_addmm})
    with sdpa_kernel(SDPBackend.MATH), counter:
        yield counter
