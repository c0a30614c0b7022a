"""The model once more, in float64, one sample and one head at a time, with explicit masks and explicit subsets."""

import math

import torch

from megatron_ltd.config import ModelConfig

Weights = dict[str, torch.Tensor]


def leaves(weights: Weights) -> Weights:
    return {name: weight.double().requires_grad_() for name, weight in weights.items()}


def loss(weights: Weights, config: ModelConfig, batch: dict[str, torch.Tensor],
         kept: dict[int, list[list[int]]] | None = None) -> torch.Tensor:
    """Sum of the masked cross-entropy.

    Args:
        kept: for each dropped layer, the positions that each sample of the batch keeps.
    """
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(batch["tokens"])):
        of_sample = {layer: sets[b] for layer, sets in (kept or {}).items()}
        scores = sample_logits(weights, config, batch, b, of_sample)
        log_probability = scores.log_softmax(-1)[torch.arange(config.seq_length), batch["labels"][b]]
        total = total - (log_probability * batch["loss_mask"][b].double()).sum()
    return total


def sample_logits(weights: Weights, config: ModelConfig, batch: dict[str, torch.Tensor], b: int,
                  kept: dict[int, list[int]] | None = None) -> torch.Tensor:
    """Shapes: -> [s, v], padding rows left out"""
    everything = torch.arange(config.seq_length)
    positions = batch["position_ids"][b] if "position_ids" in batch else everything
    document_ids = batch["document_ids"][b] if "document_ids" in batch else torch.zeros_like(everything)
    stream = weights["embedding.word.weight"][batch["tokens"][b]]
    if config.position_embedding_type == "learned_absolute":
        stream = stream + weights["embedding.position.weight"][positions]
    for layer in range(config.num_layers):
        subset = torch.tensor((kept or {}).get(layer, everything.tolist()))
        of_layer = {name.removeprefix(f"layers.{layer}."): weight for name, weight in weights.items()
                    if name.startswith(f"layers.{layer}.")}
        stream = stream.index_put(
            (subset,), layer_output(of_layer, config, stream[subset], positions[subset], document_ids[subset]))
    table = weights["embedding.word.weight" if config.tied else "head.weight"]
    return normed(weights, "final_norm", config, stream) @ table[:config.vocab_size].T


def layer_output(weights: Weights, config: ModelConfig, x: torch.Tensor, positions: torch.Tensor,
                 document_ids: torch.Tensor) -> torch.Tensor:
    """A pre-norm layer with its residual connections. Shapes: x [k, h] -> [k, h]"""
    x = x + attention(weights, config, normed(weights, "attention_norm", config, x), positions, document_ids)
    y = normed(weights, "mlp_norm", config, x)
    if config.swiglu:
        gate = linear(weights, "mlp.gate", y)
        inner = gate * torch.sigmoid(gate) * linear(weights, "mlp.up", y)
    else:
        inner = gelu(linear(weights, "mlp.fc1", y), config.openai_gelu)
    return x + linear(weights, "mlp.fc2", inner)


def attention(weights: Weights, config: ModelConfig, x: torch.Tensor, positions: torch.Tensor,
              document_ids: torch.Tensor) -> torch.Tensor:
    d, groups = config.head_dim, config.query_groups
    queries = config.num_attention_heads // groups
    k = len(x)
    allowed = [[j <= i and bool(document_ids[i] == document_ids[j]) for j in range(k)] for i in range(k)]
    projected = linear(weights, "attention.qkv", x)
    contexts = []
    for group in range(groups):
        first = group * (queries + 2) * d
        parts = [projected[:, first + i * d:first + (i + 1) * d] for i in range(queries + 2)]
        key, value = turned(parts[queries], positions, config), parts[queries + 1]
        for query in parts[:queries]:
            scores = turned(query, positions, config) @ key.T / math.sqrt(d)
            scores = torch.where(torch.tensor(allowed), scores, torch.full_like(scores, -math.inf))
            contexts.append(scores.softmax(-1) @ value)
    return linear(weights, "attention.proj", torch.cat(contexts, dim=-1))


def turned(x: torch.Tensor, positions: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rotary positions as products of complex numbers. Shapes: [k, d] -> the same"""
    if config.position_embedding_type != "rope":
        return x
    half = int(config.head_dim * config.rotary_percent) // 2
    frequencies = torch.tensor([config.rotary_base ** (-i / half) for i in range(half)], dtype=torch.float64)
    angles = positions.double()[:, None] * frequencies
    product = torch.complex(x[:, :half], x[:, half:2 * half]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((product.real, product.imag, x[:, 2 * half:]), dim=-1)


def normed(weights: Weights, name: str, config: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    if config.normalization == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * weights[f"{name}.weight"]
    return x + weights[f"{name}.bias"] if config.normalization == "LayerNorm" else x


def gelu(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    if tanh:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y
