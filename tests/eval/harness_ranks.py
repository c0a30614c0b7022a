"""lm-evaluation-harness on gloo ranks; apart from the tests, whose imports a rank would have to repeat."""

import importlib
from pathlib import Path
from typing import Any

from megatron_ltd.eval.scorer import build_scorer
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.eval.gpt2_scorer import gpt2_tokenizer
from tests.train.runs import launched


def ask(rank: int, world_size: int, init_method: str, checkpoints: str, shared_data: Path, tp: int, pp: int,
        requests: list[tuple[str, list[tuple[Any, ...]]]]) -> list[Any]:
    """What one rank is told of each kind of requests, and how many rows it ran."""
    with launched(Launch(rank, rank, world_size, init_method if world_size > 1 else None)):
        scorer = build_scorer(checkpoints, step=None, tensor_parallel=tp, pipeline_parallel=pp, micro_batch_size=3)
    model = importlib.import_module("megatron_ltd.eval.harness.model").HarnessModel(scorer, gpt2_tokenizer(shared_data))
    instance = importlib.import_module("lm_eval.api.instance").Instance
    answers = []
    for kind, arguments in requests:
        instances = [instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]
        answers.append(getattr(model, kind)(instances))
    launch.stop()
    return answers
