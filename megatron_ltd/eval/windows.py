"""Cutting a text that is longer than the model's positions into rows that predict each token exactly once.

`tokens[0]` is context only (the end-of-document token, or the first token of a stream); all others are
predicted. For 9 predicted tokens and 4 positions, with c for context and p for predicted:

    rolling   | c p p p p           |      sliding, stride 2   | c p p p p           |
              |         c p p p p   |                          |     c c c p p       |
              |           c c c c p |                          |         c c c p p   |
                                                               |             c c c p |
"""

from collections.abc import Iterator

from megatron_ltd.errors import ConfigError
from megatron_ltd.eval.requests import ScoreRow


def rolling_windows(tokens: list[int], max_length: int) -> Iterator[ScoreRow]:
    """Windows that share one token; the last one is moved back to be full, and predicts only what is left.

    The windows of lm-evaluation-harness's `loglikelihood_rolling`.
    """
    predicted_up_to = 1
    while predicted_up_to < len(tokens):
        end = min(predicted_up_to + max_length, len(tokens))
        start = max(0, end - max_length - 1)
        yield ScoreRow(tokens[start:end], first_scored=predicted_up_to - start)
        predicted_up_to = end


def sliding_windows(tokens: list[int], max_length: int, stride: int) -> Iterator[ScoreRow]:
    """Windows that start `stride` tokens apart; each after the first predicts its last `stride` positions.

    The windows of Megatron-LM's `--overlapping-eval`: a token is predicted from at least max_length - stride
    + 1 others, at max_length / stride times the cost of disjoint windows.

    Raises:
        ConfigError: the stride is no number from 1 to max_length.
    """
    if not 1 <= stride <= max_length:
        raise ConfigError(
            f"--overlapping-eval = {stride} does not fit the model's {max_length} positions: windows would leave "
            f"tokens out. Choose a stride from 1 to {max_length}."
        )
    predicted_up_to, start = 1, 0
    while predicted_up_to < len(tokens):
        end = min(start + max_length + 1, len(tokens))
        yield ScoreRow(tokens[start:end], first_scored=predicted_up_to - start)
        predicted_up_to, start = end, start + stride


def text_windows(tokens: list[int], max_length: int, stride: int | None) -> Iterator[ScoreRow]:
    """Sliding windows where a stride is given, else rolling ones."""
    return rolling_windows(tokens, max_length) if stride is None else sliding_windows(tokens, max_length, stride)
