"""A GPT in plain PyTorch, to be compiled as a whole: what a good single-device program without this project reaches.

The model of nanoGPT, and the same interface, so that `benchmarks.nanogpt` trains it too: learned positions, LayerNorm
before attention and MLP, exact GELU, biases, one table for input and output, cross-entropy of all logits at once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True


class Layer(nn.Module):
    """Attention and MLP. Shapes: [b, s, h] -> the same"""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_embd
        self.heads = config.n_head
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                             for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


class GPT(nn.Module):
    """The model.

    Shapes:
        tokens, labels [b, s] -> logits [b, s, v], mean cross-entropy
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.words, self.positions = (nn.Embedding(size, config.n_embd) for size in (config.vocab_size,
                                                                                    config.block_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        for table in (self.words, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.words(tokens) + self.positions.weight[:tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.words.weight)
        return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())
