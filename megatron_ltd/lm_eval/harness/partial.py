"""Lets the harness's own command score tasks whose data set lacks splits that the evaluation does not use."""

import importlib
from functools import wraps
from typing import Any

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.harness.local import scored_split


def allow_missing_splits() -> None:
    """Change the harness's tasks, in this process: it looks at the training split of each, also for no examples.

    A split that is not there is empty. It is an error where it is scored or solved examples are drawn from it, and so
    is a data set that cannot be loaded.
    """
    task = importlib.import_module("lm_eval.api.task").ConfigurableTask
    load, ask = task.download, task.fewshot_context

    @wraps(load)
    def download(self: Any, *arguments: Any, **settings: Any) -> None:
        try:
            load(self, *arguments, **settings)
        except Exception as error:  # a download fails in many ways, and a task may hold any code
            raise DataError(f"{self.config.task}: its data set {self.DATASET_PATH} cannot be loaded: "
                            f"{type(error).__name__}: {error}"[:600] + ". Check the path or the network.") from error
        if type(self.dataset) is importlib.import_module("datasets").DatasetDict:
            self.dataset = _partial(self.dataset, scored_split(self), self.config.task)

    @wraps(ask)
    def fewshot_context(self: Any, doc: Any, num_fewshot: int, *arguments: Any, **settings: Any) -> Any:
        if num_fewshot and hasattr(self, "sampler") and not self.sampler.df:
            raise DataError(f"{self.config.task}: {num_fewshot} solved examples are asked for, and the split that they "
                            f"are drawn from is not there; its data set has {', '.join(self.dataset)}. Add the split, "
                            "or use --num_fewshot 0.")
        return ask(self, doc, num_fewshot, *arguments, **settings)

    task.download, task.fewshot_context = download, fewshot_context


def _partial(splits: Any, scored: Any, name: str) -> Any:
    """The same splits, with empty ones for all others but the one that is scored."""
    kind = type(splits)

    class Partial(kind):  # type: ignore[misc, valid-type]
        def __missing__(self, split: str) -> Any:
            if split == scored:
                raise DataError(f"{name}: the split {split!r} is scored and is not there; its data set has "
                                f"{', '.join(self)}. Add it, or name another as test_split or validation_split.")
            return next(iter(self.values())).select([])

    return Partial(splits)
