"""Dropout whose mask is a function of (seed, layer, site, sample, position, channel).

There is no generator, so recomputation, resume and every parallel layout draw the same mask: a slice of the sequence,
or some of the heads, hashes the global coordinates of what it holds.
"""

import torch

from megatron_ltd.token_drop.sampling import splitmix64, stream_state

_GOLDEN_32 = 0x9E3779B9 - (1 << 32)
_MURMUR_1 = 0x85EBCA6B - (1 << 32)
_MURMUR_2 = 0xC2B2AE35 - (1 << 32)
_SITE = 0x632BE59BD9B4E019


def token_keys(seed: int, layer: int, site: int, sample_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A 31-bit key for each token at one place in the network.

    Args:
        site: which of a layer's dropouts, so that their draws are independent.

    Shapes:
        sample_ids [b], positions [s, b] or [s, 1] -> [s, b] int32
    """
    layers = torch.full((1,), layer, dtype=torch.int64, device=sample_ids.device)
    state = stream_state(seed ^ ((site + 1) * _SITE & (1 << 62) - 1), sample_ids, layers)[0]  # [b]
    return (splitmix64(state + positions * -7046029254386353131) & 0x7FFFFFFF).to(torch.int32)


def _murmur(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser of MurmurHash3 on int32, in place."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_MURMUR_1)
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(_MURMUR_2)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def keep_mask(keys: torch.Tensor, channels: torch.Tensor, probability: float) -> torch.Tensor:
    """True where dropout keeps a value, each independently with probability 1 - `probability`.

    Shapes:
        keys [..., 1] int32, channels [c] int32 -> [..., c] bool
    """
    noise = _murmur(_murmur(keys + channels * _GOLDEN_32).bitwise_xor_(channels))
    return noise.bitwise_and_(0x7FFFFFFF) >= int(probability * (1 << 31))


def dropout(x: torch.Tensor, keys: torch.Tensor | None, probability: float) -> torch.Tensor:
    """x with channels zeroed at random and the rest scaled by 1 / (1 - p); x itself if keys is None.

    Shapes:
        x [s, b, h], keys [s, b] int32 -> [s, b, h]
    """
    if keys is None:
        return x
    channels = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    return x * keep_mask(keys[..., None], channels, probability) * (1.0 / (1.0 - probability))
