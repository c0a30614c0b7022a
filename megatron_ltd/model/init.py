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
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.shapes import CONVOLUTION, NGRAMS
from megatron_ltd.parallel.layers import local_part
from megatron_ltd.parallel.turns import Turns

_INTO_RESIDUAL_STREAM = ("attention.proj.weight", "mlp.fc2.weight")


def global_name(name: str, config: ModelConfig) -> str:
    """The name of a stage's parameter in every layout, such as `layers.7.mlp.fc1.weight`; the copy of a tied embedding
    has the embedding's name."""
    if name == "head.weight" and config.tied:
        return "embedding.word.weight"
    return re.sub(r"^stack\.routers\.(\d+)", r"layers.\1.router", name.replace("stack.blocks.", "layers.", 1))


def constant_value(name: str, config: ModelConfig) -> float | None:
    """The value of all numbers of a parameter; None if they are drawn."""
    if name.endswith(("bias", CONVOLUTION)) or name == NGRAMS:
        return 0.0
    if name.endswith("norm.weight"):
        return 0.0 if config.apply_layernorm_1p else 1.0
    return None


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> torch.Tensor:
    """The whole parameter in fp32 on the CPU."""
    constant = constant_value(name, config)
    if constant is not None:
        return torch.full(shape, constant)
    std = config.init_method_std
    if name.startswith("layers."):
        std /= math.sqrt(config.width_multiplier)
    if config.scaled_init and name.endswith(_INTO_RESIDUAL_STREAM):
        std /= math.sqrt(2.0 * config.num_layers / config.depth_multiplier)
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@dataclass(frozen=True)
class Unallocated:
    """A parameter on the device `meta`.

    `module` has it by the name `attribute`; `name` is its name in the stage.
    """

    module: nn.Module
    attribute: str
    name: str
    parameter: DTensor


def unallocated(module: nn.Module, prefix: str) -> list[Unallocated]:
    """The module's parameters that have no memory yet.

    Args:
        prefix: of their names, e.g. "stack.blocks.3.".
    """
    found = []
    for owner_name, owner in module.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            assert isinstance(parameter, DTensor)
            if parameter.is_meta:
                name = ".".join(part for part in (prefix.rstrip("."), owner_name, attribute) if part)
                found.append(Unallocated(owner, attribute, name, parameter))
    return found


def draw_in_turns(modules: Iterable[tuple[nn.Module, str]], config: ModelConfig, seed: int,
                  group: dist.ProcessGroup) -> Turns:
    """The drawn values of a stage's parameters, which `materialize` will ask for.

    Args:
        modules: in the order in which they will be allocated, with the prefixes of their names. A parameter belongs to
            the first module that has it.
        group: processes that hold the same stage, and the same parts of it.
    """
    shapes = {found.name: found.parameter.shape for module, prefix in modules for found in unallocated(module, prefix)
              if constant_value(global_name(found.name, config), config) is None}
    makers = [partial(initial_value, global_name(name, config), shape, config, seed) for name, shape in shapes.items()]
    return Turns(group, makers, [shape.numel() for shape in shapes.values()])


@torch.no_grad()
def materialize(module: nn.Module, config: ModelConfig, *, prefix: str, seed: int, device: torch.device,
                draw: bool = True, turns: Turns | None = None) -> None:
    """Allocate the module's parameters on the device and fill them; a no-op for those already allocated.

    Args:
        prefix: of the module's parameter names, e.g. "stack.blocks.3.".
        draw: fill with the initial values; False: leave the content undefined, to be loaded from a checkpoint.
        turns: what others draw as well, from `draw_in_turns`; None: this process draws everything itself.
    """
    for found in unallocated(module, prefix):
        parameter = found.parameter
        data = torch.empty(parameter.to_local().shape, dtype=torch.float32, device=device)
        if draw:
            _fill(data, parameter, global_name(found.name, config), config, seed, turns)
        value = DTensor.from_local(data, parameter.device_mesh, parameter.placements, run_check=False,
                                   shape=parameter.shape, stride=parameter.stride())
        setattr(found.module, found.attribute, nn.Parameter(value))


def _fill(data: torch.Tensor, parameter: DTensor, name: str, config: ModelConfig, seed: int,
          turns: Turns | None) -> None:
    constant = constant_value(name, config)
    if constant is not None:
        data.fill_(constant)
    elif turns is None:
        data.copy_(local_part(initial_value(name, parameter.shape, config, seed), parameter))
    else:
        turns.fill(data, lambda whole: local_part(whole, parameter))
