"""A scorer's answers on gloo ranks; apart from the tests, whose imports a rank would have to repeat."""

from megatron_ltd.eval.scorer import build_scorer
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.train.runs import launched


def answer(rank: int, world_size: int, init_method: str, checkpoints: str, texts: list[list[int]], tp: int, pp: int,
           batch_rows: int) -> list[list[int]]:
    """What follows the texts, as one rank is told."""
    with launched(Launch(rank, rank, world_size, init_method if world_size > 1 else None)):
        scorer = build_scorer(checkpoints, step=None, tensor_parallel=tp, pipeline_parallel=pp,
                              micro_batch_size=batch_rows)
    answers = scorer.generate(texts, 7, 10**6, lambda tokens: tokens[-1] % 7 == 0)
    launch.stop()
    return answers
