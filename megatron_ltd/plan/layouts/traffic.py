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
          compiled      2 (q + 2 k)    3 before a rotation             4 (q + 2 k)    `benchmarks/compiled_traffic.py`
          dropped       (2 + 5 p) (q + 2 k)                            (2 + 9 p) (q + 2 k)      of p pairs of an earlier
                                                                                     row and its distance, masked
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


def forward_traffic(model: ModelConfig, tp: int, *, dropped: bool, compiled: bool = False) -> Traffic:
    """Of a layer's forward pass on one of `tp` processes.

    Args:
        dropped: whether the layer takes its tokens out of the stream and adds them to it.
        compiled: whether torch.compile makes one function of a convolution's; what it saves elsewhere is the cluster's
            `fused`.
    """
    h, (queries, keys, ffn) = model.hidden_size, _widths(model, tp)
    rotation = 9 * _rotated(model) * (queries + keys)
    groups = 2 * queries if _are_grouped(model, tp) else 0
    convolution = _convolution(model, tp, 2 + (_rotated(model) if compiled else _earlier(model, dropped, 3)))
    return Traffic((4 + 6 + (9 if dropped else 3)) * h,
                   convolution + rotation + groups + (5 if model.swiglu else 2) * ffn)


def backward_traffic(model: ModelConfig, tp: int, *, dropped: bool, compiled: bool = False) -> Traffic:
    """The same of its backward pass."""
    h, (queries, keys, ffn) = model.hidden_size, _widths(model, tp)
    biases = model.qkv_bias * (queries + 2 * keys) + model.mlp_bias * ffn
    rotation = 19 * _rotated(model) * (queries + keys)
    groups = 2 * queries if _are_grouped(model, tp) else 0
    convolution = _convolution(model, tp, 4 if compiled else 2 + _earlier(model, dropped, 7))
    return Traffic((6 + 6 + (9 if dropped else 3) + model.proj_bias + model.mlp_bias) * h,
                   biases + convolution + rotation + groups + 2 * (queries + 2 * keys)
                   + (9 if model.swiglu else 3) * ffn)


def spared_traffic(model: ModelConfig, tp: int) -> Traffic:
    """What selective recomputation repeats: norms, and the MLP's activation function."""
    return Traffic(4 * model.hidden_size, (5 if model.swiglu else 2) * _widths(model, tp)[2])


def _widths(model: ModelConfig, tp: int) -> tuple[float, float, float]:
    """Channels of queries, of keys, and of the MLP."""
    return (model.num_attention_heads * model.head_dim / tp, max(1, model.query_groups / tp) * model.head_dim,
            model.ffn / tp)


def _convolution(model: ModelConfig, tp: int, each: float) -> float:
    """Args:
        each: for each channel.
    """
    queries, keys, _ = _widths(model, tp)
    return 0.0 if model.qkv_conv_kernel is None else each * (queries + 2 * keys)


def _earlier(model: ModelConfig, dropped: bool, each: int) -> int:
    """For a channel's earlier tokens.

    Args:
        each: for one of them; a mask is two more.
    """
    reach = (model.qkv_conv_kernel or 1) - 1
    return (each + 2) * reach * (reach + 1) // 2 if dropped else each * reach


def _rotated(model: ModelConfig) -> float:
    return model.rotary_percent if model.position_embedding_type == "rope" else 0.0


def _are_grouped(model: ModelConfig, tp: int) -> bool:
    """Whether queries of several groups lie apart."""
    return tp < model.query_groups < model.num_attention_heads
