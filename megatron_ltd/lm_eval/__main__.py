"""lm-evaluation-harness's own command with models of this project: `python -m megatron_ltd.lm_eval`, also by torchrun.

    torchrun --nproc-per-node 2 -m megatron_ltd.lm_eval --model megatron-ltd \\
        --model_args load=checkpoints,tensor_model_parallel_size=2 --tasks piqa --output_path results
"""

import importlib
import importlib.util
import logging

from megatron_ltd.errors import ConfigError, UserError
from megatron_ltd.lm_eval.harness.partial import allow_missing_splits
from megatron_ltd.log import Console
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.exits import leave


def main() -> int:
    """Run the command; an error that the user can repair is one message."""
    console, failed = Console(False), True
    try:
        console.speaks = Launch.from_environment().rank == 0
        if not console.speaks:
            logging.disable(logging.WARNING)
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("lm-evaluation-harness is not installed: pip install 'megatron_ltd[eval]'.")
        importlib.import_module("lm_eval.models")  # registers the harness's own models, before ours
        importlib.import_module("megatron_ltd.lm_eval.harness.plugin")
        allow_missing_splits()
        importlib.import_module("lm_eval.__main__").cli_evaluate()
        failed = False
    except UserError as error:
        console.error(f"{type(error).__name__}: {error}")
        return error.exit_code
    finally:
        launch.stop(failed=failed)
    return 0


if __name__ == "__main__":
    leave(main())
