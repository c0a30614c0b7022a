"""Native tasks on gloo ranks; apart from the tests, whose imports a rank would have to repeat."""

from pathlib import Path

from megatron_ltd.data.text.tokenizer import hugging_face_tokenizer
from megatron_ltd.eval.results import EvalOptions, TaskResult
from megatron_ltd.eval.scorer import build_scorer
from megatron_ltd.eval.tasks.names import TASKS
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.train.runs import launched


def evaluate(rank: int, world_size: int, init_method: str, checkpoints: str, tokenizer_file: str,
             files: dict[str, Path], options: EvalOptions, tp: int, pp: int, batch_rows: int) -> dict[str, TaskResult]:
    """The results of all tasks as one rank sees them."""
    with launched(Launch(rank, rank, world_size, init_method if world_size > 1 else None)):
        scorer = build_scorer(checkpoints, step=None, tensor_parallel=tp, pipeline_parallel=pp,
                              micro_batch_size=batch_rows)
    tokenizer = hugging_face_tokenizer(tokenizer_file)
    found = {name: TASKS[name].evaluate(path, scorer, tokenizer, options) for name, path in files.items()}
    launch.stop()
    return found
