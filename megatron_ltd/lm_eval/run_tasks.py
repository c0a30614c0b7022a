"""What the recipes know of `--eval-tasks` before torch is loaded."""

from megatron_ltd.config.run import RunConfig
from megatron_ltd.train.task_scores import TaskPlan


def plan_tasks(config: RunConfig) -> TaskPlan:
    """The tasks of a run.

    Raises:
        ConfigError: a task is unknown.
        DataError: the file of a task is not there.
    """
    from megatron_ltd.lm_eval import while_training  # only here: it imports torch

    return while_training.plan_tasks(config)
