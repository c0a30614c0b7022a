"""Numbers that functions other than products read and write for each token of a layer, each function by itself.

For the h channels of the stream; q of all queries and k of all keys, or values, of a process; f of its MLP:

                        forward                                        backward
    between the regions
        norms           2 x 2 h    input and output                    2 x 3 h    and the gradient of each
        sums            3 x 3 h    attention, the MLP, the stream      3 x 3 h    of gradients of what is read twice
        dropped tokens  9 h        taken and added, for one sum        9 h
    within
        biases                                                         q + 2 k + f + 2 h    read, to be summed
        convolution     (2 + 3 e) (q + 2 k)                            (2 + 7 e) (q + 2 k)      of e earlier tokens
        rotation        9 (q + k)  4 products, 2 sums, joined          19 (q + k)           2 of 3 parts filled up
        query groups    2 q        copied to be neighbours             2 q
        joining                                                        2 (q + 2 k)          query, key and value
        GELU            2 f                                            3 f
        SwiGLU          5 f        two functions                       9 f                  three

`tests/model/test_traffic.py` holds it against a count of every function that torch calls.
"""

from typing import NamedTuple

from megatron_ltd.config.model import ModelConfig


class Traffic(NamedTuple):
    """Numbers for each token.

    Args:
        between: where each process holds a slice of the sequence under sequence parallelism.
        within: where each process holds a share of the channels.
    """

    between: float
    within: float


def forward_traffic(model: ModelConfig, tp: int, *, dropped: bool) -> Traffic:
    """Of a layer's forward pass on one of `tp` processes.

    Args:
        dropped: whether the layer takes its tokens out of the stream and adds them to it.
    """
    h, (queries, keys, ffn) = model.hidden_size, _widths(model, tp)
    rotation = 9 * _rotated(model) * (queries + keys)
    groups = 2 * queries if _are_grouped(model, tp) else 0
    return Traffic((4 + 6 + (9 if dropped else 3)) * h,
                   _convolution(model, tp, 3) + rotation + groups + (5 if model.swiglu else 2) * ffn)


def backward_traffic(model: ModelConfig, tp: int, *, dropped: bool) -> Traffic:
    """The same of its backward pass."""
    h, (queries, keys, ffn) = model.hidden_size, _widths(model, tp)
    biases = model.qkv_bias * (queries + 2 * keys) + model.mlp_bias * ffn
    rotation = 19 * _rotated(model) * (queries + keys)
    groups = 2 * queries if _are_grouped(model, tp) else 0
    return Traffic((6 + 6 + (9 if dropped else 3) + model.proj_bias + model.mlp_bias) * h,
                   biases + _convolution(model, tp, 7) + rotation + groups + 2 * (queries + 2 * keys)
                   + (9 if model.swiglu else 3) * ffn)


def spared_traffic(model: ModelConfig, tp: int) -> Traffic:
    """What selective recomputation repeats: norms, and the MLP's activation function."""
    return Traffic(4 * model.hidden_size, (5 if model.swiglu else 2) * _widths(model, tp)[2])


def _widths(model: ModelConfig, tp: int) -> tuple[float, float, float]:
    """Channels of queries, of keys, and of the MLP."""
    return (model.num_attention_heads * model.head_dim / tp, max(1, model.query_groups / tp) * model.head_dim,
            model.ffn / tp)


def _convolution(model: ModelConfig, tp: int, each: int) -> float:
    """Args:
        each: of an earlier token, for each channel.
    """
    queries, keys, _ = _widths(model, tp)
    return 0.0 if model.qkv_conv_kernel is None else (2 + each * (model.qkv_conv_kernel - 1)) * (queries + 2 * keys)


def _rotated(model: ModelConfig) -> float:
    return model.rotary_percent if model.position_embedding_type == "rope" else 0.0


def _are_grouped(model: ModelConfig, tp: int) -> bool:
    """Whether queries of several groups lie apart."""
    return tp < model.query_groups < model.num_attention_heads
