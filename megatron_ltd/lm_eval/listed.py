"""From a list of tasks to what is scored: tasks of this package, and all others of lm-evaluation-harness."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megatron_ltd.errors import ConfigError
from megatron_ltd.lm_eval.harness.tasks import plan_harness
from megatron_ltd.lm_eval.tasks.names import TASKS, TaskRun, plan_tasks


def plan_listed(listed: str, folder: Path | None, num_fewshot: int | None, *, flag: str,
                all_of_harness: bool = False) -> list[TaskRun]:
    """The runs of `lambada,perplexity=FILE,mmlu`, in this order.

    Args:
        folder: of the tasks' files.
        num_fewshot: solved examples before a question; None: the harness's tasks have their own number.
        flag: that gave the list, for messages.
        all_of_harness: the harness also scores the tasks that this package has under the same name.

    Raises:
        ConfigError: an unknown task, a task listed twice, or a task of the harness without the harness.
    """
    items = [item.strip() for item in listed.split(",") if item.strip()]
    others = [item for item in items if all_of_harness or item.partition("=")[0] not in TASKS]
    try:
        if not items:
            raise ConfigError("names no task")
        if others and not all_of_harness and importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(f"there is no task {others[0]!r} here, and lm-evaluation-harness, which has others, is "
                              "not installed: pip install 'megatron_ltd[eval]'")
        own = iter(plan_tasks([item for item in items if item not in others], folder))
        of_harness: Iterator[TaskRun] = iter(plan_harness(others, folder, num_fewshot) if others else ())
    except ConfigError as error:
        here = "" if all_of_harness else f" Tasks of this package are {', '.join(TASKS)}."
        raise ConfigError(f"{flag} = {listed!r}: {str(error).rstrip('.')}.{here}") from error
    return [next(of_harness if item in others else own) for item in items]
