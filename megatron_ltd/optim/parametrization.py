"""CompleteP: settings tuned on a small model hold for larger ones (https://arxiv.org/abs/2505.01618, table 1).

With n = width / base width and l = layers / base layers:

    what                                     multiplied by                       where
    output of attention and of the MLP       1 / l                               model/block.py
    input of the head                        1 / n                               model/transformer.py
    initial weights of layers                1 / sqrt(n)                         model/init.py
    AdamW: rate of layers' matrices          1 / n                               here
           their weight decay                n                                   here
           epsilon                           1 / n, in layers 1 / (n l)          here
    Muon: rate of layers' matrices           1 / sqrt(n) or 1, by the scale mode here

Everything else keeps its value. At the base size nothing changes, not even GPT-2's division of the initial projections
into the residual stream, which the paper leaves out: here it uses the base model's number of layers. The paper scales
attention by 1 / d for heads of size d. As long as the size of a head stays that of the base model, this is the standard
scale up to a constant, so a model is widened by adding heads. Muon is not in the paper; its rates give updates of a
constant spectral norm (https://arxiv.org/abs/2310.17813).
"""

import math

from megatron_ltd.config.model import ModelConfig


def adam_factors(config: ModelConfig, in_layer: bool, is_matrix: bool) -> tuple[float, float]:
    """Factors on AdamW's learning rate and epsilon for a parameter.

    Args:
        in_layer: it belongs to a transformer layer.
        is_matrix: it is a matrix; otherwise a bias or the weight of a norm.
    """
    width, depth = config.width_multiplier, config.depth_multiplier
    return 1.0 / width if in_layer and is_matrix else 1.0, 1.0 / (width * depth if in_layer else width)


def muon_factor(config: ModelConfig, scale_mode: str) -> float:
    """The factor on Muon's learning rate. The first two modes make updates whose spectral norm grows as sqrt(width)."""
    return 1.0 / math.sqrt(config.width_multiplier) if scale_mode in ("match_rms_adamw", "spectral") else 1.0
