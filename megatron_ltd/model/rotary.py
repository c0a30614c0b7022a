"""Rotary position embedding (https://arxiv.org/abs/2104.09864), for tokens that bring their positions with them."""

import torch


def rotary_angles(positions: torch.Tensor, channels: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position's angle at each frequency, in fp32.

    Args:
        positions: true positions of the tokens, whatever order or subset they come in.
        channels: rotated channels of a head; even.

    Shapes:
        positions [s, b] (or [s, 1] where all samples agree) -> two of [s, b, 1, channels / 2]
    """
    exponents = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels
    angles = positions[..., None, None].float() * (1.0 / base**exponents)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first channels of each head: channel i of the rotated ones pairs with channel i + half.

    Shapes:
        x [s, b, n, d], cos and sin [s, b, 1, r / 2] with r <= d -> [s, b, n, d]
    """
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
