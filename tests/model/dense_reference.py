"""The model once more, in float64, one sample and one head at a time, with explicit masks and explicit subsets."""

import math
from collections.abc import Collection

import torch

from megatron_ltd.config.model import ModelConfig

Weights = dict[str, torch.Tensor]
Pair = tuple[int, int, int]
"""A token, an earlier one, as rows of what a layer processes, and the distance between them in the text."""


def leaves(weights: Weights) -> Weights:
    return {name: weight.double().requires_grad_() for name, weight in weights.items()}


def loss(weights: Weights, config: ModelConfig, batch: dict[str, torch.Tensor],
         kept: dict[int, list[list[int]]] | None = None, cross: int | None = None,
         factors: dict[int, float] | None = None, constant: Collection[int] = ()) -> torch.Tensor:
    """Sum of the masked cross-entropy.

    Args:
        kept: for each dropped layer, the positions that each sample of the batch keeps.
        cross: the dropped layer, if any, that attends to all tokens.
        factors: of what some layers add to the stream; 0 for a layer that is skipped.
        constant: layers whose update is a constant in the backward pass.
    """
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(batch["tokens"])):
        scores = sample_logits(weights, config, batch, b, of_sample(kept, b), cross, factors, constant)
        log_probability = scores.log_softmax(-1)[torch.arange(config.seq_length), batch["labels"][b]]
        total = total - (log_probability * batch["loss_mask"][b].double()).sum()
    return total


def bert_losses(weights: Weights, config: ModelConfig, batch: dict[str, torch.Tensor],
                kept: dict[int, list[list[int]]] | None = None, cross: int | None = None) -> torch.Tensor:
    """Sums of the masked cross-entropy and, with the binary head, of that of the sentence order. Shapes: -> [1 or 2]"""
    losses = torch.zeros(1 if config.bert_no_binary_head else 2, dtype=torch.float64)
    for b in range(len(batch["tokens"])):
        hidden = sample_hidden(weights, config, batch, b, of_sample(kept, b), cross)
        scores = masked_token_logits(weights, config, hidden[batch["predicted_positions"][b]])
        log_probability = scores.log_softmax(-1).gather(1, batch["labels"][b][:, None])[:, 0]
        terms = [-(log_probability * batch["loss_mask"][b].double()).sum()]
        if not config.bert_no_binary_head:
            order = sentence_order_logits(weights, hidden)
            terms.append(-order.log_softmax(-1)[batch["sentence_order"][b]])
        losses = losses + torch.stack(terms)
    return losses


def of_sample(kept: dict[int, list[list[int]]] | None, b: int) -> dict[int, list[int]]:
    return {layer: sets[b] for layer, sets in (kept or {}).items()}


def masked_token_logits(weights: Weights, config: ModelConfig, hidden: torch.Tensor) -> torch.Tensor:
    """Shapes: [p, h] -> [p, v], padding rows left out"""
    transformed = normed(weights, "lm_head.norm", config, gelu(linear(weights, "lm_head.dense", hidden), False))
    table = weights["embedding.word.weight" if config.tied else "head.weight"]
    return (transformed @ table.T + weights["lm_head.bias"])[:, :config.vocab_size]


def sentence_order_logits(weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """Shapes: [s, h] -> [2]"""
    return linear(weights, "binary_head", torch.tanh(linear(weights, "pooler", hidden[0])))


def sample_logits(weights: Weights, config: ModelConfig, batch: dict[str, torch.Tensor], b: int,
                  kept: dict[int, list[int]] | None = None, cross: int | None = None,
                  factors: dict[int, float] | None = None, constant: Collection[int] = ()) -> torch.Tensor:
    """Shapes: -> [s, v], padding rows left out"""
    table = weights["embedding.word.weight" if config.tied else "head.weight"]
    return sample_hidden(weights, config, batch, b, kept, cross, factors, constant) @ table[:config.vocab_size].T


def sample_hidden(weights: Weights, config: ModelConfig, batch: dict[str, torch.Tensor], b: int,
                  kept: dict[int, list[int]] | None = None, cross: int | None = None,
                  factors: dict[int, float] | None = None, constant: Collection[int] = ()) -> torch.Tensor:
    """The stream after the final norm. Shapes: -> [s, h]"""
    everything = torch.arange(config.seq_length)
    positions = batch["position_ids"][b] if "position_ids" in batch else everything
    stream = weights["embedding.word.weight"][batch["tokens"][b]]
    if config.ngram_rows is not None:
        documents = batch["document_ids"][b].tolist() if "document_ids" in batch else None
        stream = stream + ngram_vectors(weights, config, batch["tokens"][b].tolist(), documents)
    if config.embed_layernorm:
        stream = normed(weights, "embedding.norm", config, stream)
    if config.position_embedding_type == "learned_absolute":
        stream = stream + weights["embedding.position.weight"][positions]
    if "embedding.token_type.weight" in weights:
        stream = stream + weights["embedding.token_type.weight"][batch["token_types"][b]]
    for layer in range(config.num_layers):
        queries = torch.tensor((kept or {}).get(layer, everything.tolist()))
        keys = everything if layer == cross else queries
        of_layer = {name.removeprefix(f"layers.{layer}."): weight for name, weight in weights.items()
                    if name.startswith(f"layers.{layer}.")}
        updated = layer_output(of_layer, config, stream[queries], stream[keys], positions[queries], positions[keys],
                               allowed(config, batch, b, queries, keys, layer), layer,
                               (read(config, batch, b, queries), read(config, batch, b, keys)))
        factor = (factors or {}).get(layer, 1.0)
        stream = stream.index_put((queries,), stream[queries] + factor * (
            (updated - stream[queries]).detach() if layer in constant else updated - stream[queries]))
    return normed(weights, "final_norm", config, stream)


def ngram_vectors(weights: Weights, config: ModelConfig, tokens: list[int],
                  documents: list[int] | None) -> torch.Tensor:
    """Sums of the vectors of all runs of tokens that end at each place, hashed in plain Python. Shapes: -> [s, h]"""
    table, sums = weights["embedding.ngram.weight"], []
    assert config.ngram_rows is not None
    drawn = torch.randint(2, (1024, config.hidden_size), generator=torch.Generator().manual_seed(0))
    for place, token in enumerate(tokens):
        total = torch.zeros(config.hidden_size, dtype=torch.float64)
        for length in range(2, config.ngram_length + 1):
            key = token + 1
            for earlier in range(place - 1, place - length, -1):
                there = earlier >= 0 and (documents is None or documents[earlier] == documents[place])
                key = (key * 1103515245 + (tokens[earlier] + 1 if there else 0)) % 2147483647
            row = table[key * 48271 % 2147483647 % config.ngram_rows + (length - 2) * config.ngram_rows]
            total = total + row * (2 * drawn[key * 69621 % 2147483647 % 1024] - 1)
        sums.append(total)
    return torch.stack(sums)


def allowed(config: ModelConfig, batch: dict[str, torch.Tensor], b: int, queries: torch.Tensor,
            keys: torch.Tensor, layer: int) -> torch.Tensor:
    """Which key each query may see, pair by pair. Padding that has no real token to see sees everything."""
    if config.family == "bert":
        real = batch["padding_mask"][b]
        seen = [bool(real[j]) for j in keys.tolist()]
        return torch.tensor([seen if any(seen) else [True] * len(seen) for _ in queries])
    documents = batch["document_ids"][b] if "document_ids" in batch else torch.zeros(config.seq_length)
    reach = config.seq_length if layer in full_layers(config) or config.window_size is None else config.window_size[0]
    return torch.tensor([[i - reach <= j <= i and bool(documents[i] == documents[j]) for j in keys.tolist()]
                         for i in queries.tolist()])


def read(config: ModelConfig, batch: dict[str, torch.Tensor], b: int, tokens: torch.Tensor) -> list[Pair]:
    """The earlier tokens that a convolution reads, pair by pair: those just before in the text, if they are here."""
    here = tokens.tolist()
    documents = batch["document_ids"][b].tolist() if "document_ids" in batch else [0] * config.seq_length
    return [(here.index(token), here.index(token - distance), distance) for token in here
            for distance in range(1, config.qkv_conv_kernel or 1)
            if token - distance in here and documents[token] == documents[token - distance]]


def full_layers(config: ModelConfig) -> list[int]:
    """Layers without a window, counted out as Megatron-LM's documentation words it."""
    frequency = config.window_attn_skip_freq or ()
    if len(frequency) == 1:
        return [number - 1 for number in range(1, config.num_layers + 1) if number % frequency[0] == 0]
    return [layer for layer, windowed in enumerate(frequency) if not windowed]


def unrotated_layers(config: ModelConfig) -> list[int]:
    frequency = config.no_rope_freq or ()
    if len(frequency) == 1:
        return [number - 1 for number in range(1, config.num_layers + 1) if number % frequency[0] == 0]
    return [layer for layer, skips in enumerate(frequency) if skips]


def layer_output(weights: Weights, config: ModelConfig, x: torch.Tensor, context: torch.Tensor,
                 positions: torch.Tensor, key_positions: torch.Tensor, mask: torch.Tensor, layer: int,
                 pairs: tuple[list[Pair], list[Pair]] = ([], [])) -> torch.Tensor:
    """A layer with its residual connections.

    Args:
        pairs: those of x and of the context that a convolution reads.

    Shapes:
        x [k, h], context [c, h], mask [k, c] -> [k, h]
    """
    if config.norm_placement == "after":
        mixed = attention(weights, config, x, context, positions, key_positions, mask, layer, pairs)
        x = x + normed(weights, "attention_norm", config, mixed)
        return x + normed(weights, "mlp_norm", config, mlp(weights, config, x))
    x = x + attention(weights, config, normed(weights, "attention_norm", config, x),
                      normed(weights, "attention_norm", config, context), positions, key_positions, mask, layer, pairs)
    return x + mlp(weights, config, normed(weights, "mlp_norm", config, x))


def mlp(weights: Weights, config: ModelConfig, y: torch.Tensor) -> torch.Tensor:
    if config.swiglu:
        gate = linear(weights, "mlp.gate", y)
        inner = gate * torch.sigmoid(gate) * linear(weights, "mlp.up", y)
    else:
        inner = gelu(linear(weights, "mlp.fc1", y), config.openai_gelu)
    return linear(weights, "mlp.fc2", inner)


def attention(weights: Weights, config: ModelConfig, x: torch.Tensor, context: torch.Tensor, positions: torch.Tensor,
              key_positions: torch.Tensor, mask: torch.Tensor, layer: int,
              pairs: tuple[list[Pair], list[Pair]]) -> torch.Tensor:
    d, groups = config.head_dim, config.query_groups
    queries = config.num_attention_heads // groups
    of_queries, of_keys = (with_earlier(weights, linear(weights, "attention.qkv", rows), known)
                           for rows, known in zip((x, context), pairs, strict=True))
    starts = [group * (queries + 2) * d for group in range(groups)]
    query = [of_queries[:, start + i * d:start + (i + 1) * d] for start in starts for i in range(queries)]
    key = [of_keys[:, start + queries * d:start + (queries + 1) * d] for start in starts]
    value = [of_keys[:, start + (queries + 1) * d:start + (queries + 2) * d] for start in starts]
    if config.qk_layernorm and config.qk_layernorm_all_heads:
        query, key = (list(normed(weights, f"attention.{name}_norm", config, torch.cat(heads, -1)).split(d, -1))
                      for name, heads in (("query", query), ("key", key)))
    elif config.qk_layernorm:
        query, key = ([normed(weights, f"attention.{name}_norm", config, head) for head in heads]
                      for name, heads in (("query", query), ("key", key)))
    if layer not in unrotated_layers(config):
        query = [turned(head, positions, config) for head in query]
        key = [turned(head, key_positions, config) for head in key]
    mixed = []
    for number, head in enumerate(query):
        scores = head @ key[number // queries].T / math.sqrt(d)
        if config.position_embedding_type == "alibi":
            slope = alibi_slope(number, config.num_attention_heads)
            scores = scores + torch.tensor([[-slope * (i - j) for j in key_positions.tolist()]
                                            for i in positions.tolist()], dtype=torch.float64)
        scores = torch.where(mask, scores, torch.full_like(scores, -math.inf))
        mixed.append(scores.softmax(-1) @ value[number // queries])
    return linear(weights, "attention.proj", torch.cat(mixed, dim=-1))


def with_earlier(weights: Weights, rows: torch.Tensor, pairs: list[Pair]) -> torch.Tensor:
    total = list(rows)
    for row, earlier, distance in pairs:
        total[row] = total[row] + weights["attention.conv.weight"][:, distance - 1] * rows[earlier]
    return torch.stack(total)


def alibi_slope(head: int, heads: int) -> float:
    """The paper's geometric sequence (section 3); heads beyond a power of two have every other slope of twice as
    many."""
    power = 2 ** math.floor(math.log2(heads))
    if head < power:
        return 2.0 ** (-8.0 * (head + 1) / power)
    return 2.0 ** (-8.0 * (2 * (head - power) + 1) / (2 * power))


def turned(x: torch.Tensor, positions: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rotary positions as products of complex numbers. Shapes: [k, d] -> the same"""
    if config.position_embedding_type != "rope":
        return x
    half = int(config.head_dim * config.rotary_percent) // 2
    frequencies = torch.tensor([config.rotary_base ** (-i / half) for i in range(half)], dtype=torch.float64)
    angles = positions.double()[:, None] / (config.rotary_seq_len_interpolation_factor or 1) * frequencies
    product = torch.complex(x[:, :half], x[:, half:2 * half]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((product.real, product.imag, x[:, 2 * half:]), dim=-1)


def normed(weights: Weights, name: str, config: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    if config.normalization == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    factor = weights[f"{name}.weight"] + (1.0 if config.apply_layernorm_1p else 0.0)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * factor
    return x + weights[f"{name}.bias"] if config.normalization == "LayerNorm" else x


def gelu(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    if tanh:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y
