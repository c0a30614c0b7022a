"""Initial weights: a function of (seed, parameter name), then sliced, so that every mesh starts from the same bits.

    parameter                                              distribution
    word, position and output embedding                    normal(0, std)
    weights of qkv, fc1, gate, up                          normal(0, std)
    weights of proj, fc2 (into the residual stream)        normal(0, std / sqrt(2 layers))
    weights of norms                                       1, or 0 with --apply-layernorm-1p
    biases, embeddings of n-grams, convolutions            0

std is --init-method-std; the division is GPT-2's, as in Megatron-LM's scaled initialisation, unless --no-scaled-init
is given. With --parametrization completep (`optim/parametrization.py`) the weights of layers are divided by
sqrt(width / base width) as well, and the layers above are those of the base model.
"""

import hashlib
import math
import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.shapes import CONVOLUTION, NGRAMS
from megatron_ltd.parallel.layers import local_part

_INTO_RESIDUAL_STREAM = ("attention.proj.weight", "mlp.fc2.weight")


def global_name(name: str, config: ModelConfig) -> str:
    """The name of a stage's parameter in every layout, such as `layers.7.mlp.fc1.weight`; the copy of a tied embedding
    has the embedding's name."""
    if name == "head.weight" and config.tied:
        return "embedding.word.weight"
    return re.sub(r"^stack\.routers\.(\d+)", r"layers.\1.router", name.replace("stack.blocks.", "layers.", 1))


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> torch.Tensor:
    """The whole parameter in fp32 on the CPU."""
    if name.endswith(("bias", CONVOLUTION)) or name == NGRAMS:
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.zeros(shape) if config.apply_layernorm_1p else torch.ones(shape)
    std = config.init_method_std
    if name.startswith("layers."):
        std /= math.sqrt(config.width_multiplier)
    if config.scaled_init and name.endswith(_INTO_RESIDUAL_STREAM):
        std /= math.sqrt(2.0 * config.num_layers / config.depth_multiplier)
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def materialize(module: nn.Module, config: ModelConfig, *, prefix: str, seed: int, device: torch.device,
                draw: bool = True) -> None:
    """Allocate the module's parameters on the device and fill them; a no-op for those already allocated.

    Args:
        prefix: of the module's parameter names, e.g. "stack.blocks.3.".
        draw: fill with the initial values; False: leave the content undefined, to be loaded from a checkpoint.
    """
    for owner_name, owner in module.named_modules():
        for parameter_name, parameter in list(owner.named_parameters(recurse=False)):
            assert isinstance(parameter, DTensor)
            if not parameter.is_meta:
                continue
            local_shape = parameter.to_local().shape
            data = torch.empty(local_shape, dtype=torch.float32, device=device)
            if draw:
                name = ".".join(part for part in (prefix.rstrip("."), owner_name, parameter_name) if part)
                full = initial_value(global_name(name, config), parameter.shape, config, seed)
                data.copy_(local_part(full, parameter))
            value = DTensor.from_local(data, parameter.device_mesh, parameter.placements, run_check=False,
                                       shape=parameter.shape, stride=parameter.stride())
            setattr(owner, parameter_name, nn.Parameter(value))
