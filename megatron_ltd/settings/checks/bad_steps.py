"""Settings of steps that are skipped, tried again or taken back."""

from collections.abc import Iterator

from megatron_ltd.config import RunConfig


def bad_step_violations(config: RunConfig) -> Iterator[str]:
    """What is wrong with them."""
    training = config.training
    if training.iterations_to_skip and min(training.iterations_to_skip) < 0:
        yield (f"--iterations-to-skip = {min(training.iterations_to_skip)}: steps are counted from 0; give the number of "
               "steps before the one to skip")
