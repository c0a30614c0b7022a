"""How many tokens the head turns into logits at once."""

_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits per chunk: on a CPU few enough to stay close to the cache, on a GPU enough to keep the matrix units busy."""

_LEAST_CHUNK_TOKENS = 256
"""With fewer tokens per chunk, the pass over the whole weight gradient costs as much as the matrix products."""

_CHUNK_MULTIPLE = 128
"""Chunks are multiples of the tiles of a GPU's matrix products."""


def chunk_tokens(device_type: str, rows: int) -> int:
    """Tokens of one chunk.

    Args:
        rows: of the output embedding that this process holds.
    """
    tokens = _CHUNK_LOGITS.get(device_type, 1 << 24) // rows
    return max(_LEAST_CHUNK_TOKENS, tokens // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE)
