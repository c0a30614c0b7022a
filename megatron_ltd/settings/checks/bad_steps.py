"""Settings of steps that are skipped, tried again or taken back."""

from collections.abc import Iterator

from megatron_ltd.config.run import RunConfig


def bad_step_violations(config: RunConfig) -> Iterator[str]:
    """What is wrong with them."""
    training = config.training
    if training.iterations_to_skip and min(training.iterations_to_skip) < 0:
        yield (f"--iterations-to-skip = {min(training.iterations_to_skip)}: steps are counted from 0; give the number "
               "of steps before the one to skip")
    settings = config.checkpoint
    if training.on_loss_spike == "skip" and (settings.save is None or settings.save_interval is None):
        yield ("--on-loss-spike = skip: it goes back to a checkpoint of the run; give --save and --save-interval, or "
               "choose warn")
    elif training.on_loss_spike == "skip" and settings.no_save_optim:
        yield ("--on-loss-spike = skip: it goes back to a checkpoint, which with --no-save-optim lacks the optimizer's "
               "state; leave one of them out")
