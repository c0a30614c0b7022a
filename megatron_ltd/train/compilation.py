"""torch.compile for layers whose input length changes over the run.

torch compiles a layer for its first length and, at the second, for any length; divisibility and the like may call for
more. After a number of recompilations it would go on without the compiler and say so once, if at all: the limits are
set so that one graph for each length fits, and beyond them torch raises an error.
"""

import torch

from megatron_ltd.config import RunConfig
from megatron_ltd.plan.derived import policies

GRAPHS_OF_A_LENGTH = 4
"""Training and evaluation, with and without what a cross layer attends to."""


def prepare_compilation(config: RunConfig) -> None:
    """Make room for as many graphs as the run has lengths, and let nothing run uncompiled beyond that."""
    if not config.training.compile:
        return
    graphs = GRAPHS_OF_A_LENGTH * (len(policies(config).lengths()) + 1)
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, graphs)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, graphs * config.model.num_layers)
    limits.fail_on_recompile_limit_hit = True
