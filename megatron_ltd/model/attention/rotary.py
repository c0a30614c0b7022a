"""Rotary positions (https://arxiv.org/abs/2104.09864): frequencies, the angles of positions, and the rotation.

Frequencies are computed in fp32 in the order of operations of `transformers`, since at large positions the last bit of
a frequency shows in the angle.
"""

import math

import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.rope_scaling import RopeScaling, rope_scaling, rotated_channels
from megatron_ltd.token_drop.transfer import sent


def rotary_angles(positions: torch.Tensor, config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position's angle at each frequency, in fp32.

    Args:
        positions: true positions of the tokens, whatever order or subset they come in.
        length: of the sequence that they belong to, on which the frequencies of some scalings depend.

    Shapes:
        positions [s, b] (or [s, 1] where all samples agree) -> two of [s, b, 1, r / 2]
    """
    channels, scaling = rotated_channels(config), rope_scaling(config)
    base = float(config.rotary_base)
    if scaling is not None and scaling.kind == "dynamic" and length > config.max_positions:
        growth = scaling.factor * length / config.max_positions - (scaling.factor - 1.0)
        base *= growth ** (channels / (channels - 2))
    exponents = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels
    frequencies = 1.0 / base**exponents
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling, base, length)
    angles = positions[..., None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    factor = 1.0 if scaling is None else scaling.attention_factor
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling, base: float, length: int) -> torch.Tensor:
    """Shapes: [r / 2] -> the same"""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        factors = scaling.long_factor if length > scaling.original_positions else scaling.short_factor
        return 1.0 / (sent(torch.tensor(factors), frequencies.device) * (1.0 / frequencies))
    if scaling.kind == "llama3":
        rotations = scaling.original_positions / (2.0 * math.pi / frequencies)
        share = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return _mixed(frequencies, share.clamp(0.0, 1.0), scaling.factor)
    if scaling.kind == "yarn":
        return _mixed(frequencies, _yarn_share(frequencies, scaling, base), scaling.factor)
    return frequencies


def _mixed(frequencies: torch.Tensor, kept: torch.Tensor, factor: float) -> torch.Tensor:
    """Frequencies of which a share is kept and the rest is divided by the factor."""
    return (1.0 - kept) * frequencies / factor + kept * frequencies


def _yarn_share(frequencies: torch.Tensor, scaling: RopeScaling, base: float) -> torch.Tensor:
    """1 for the frequencies that turn more than `beta_fast` times within the original positions, 0 for those that turn
    less than `beta_slow` times, and a linear ramp over the channels between."""
    channels = 2 * len(frequencies)
    low, high = (channels * math.log(scaling.original_positions / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))
                 for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    pairs = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    return 1.0 - ((pairs - low) / (high - low if high != low else 0.001)).clamp(0.0, 1.0)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first channels of each head; channel i of the rotated ones pairs with channel i + half.

    Shapes:
        x [s, b, n, d], cos and sin [s, b, 1, r / 2] with r <= d -> [s, b, n, d]
    """
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
