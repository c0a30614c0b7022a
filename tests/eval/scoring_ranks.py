"""The scorer on gloo ranks; apart from the tests, whose imports a rank would have to repeat."""

from megatron_ltd.eval.requests import ScoredRow, ScoreRow
from megatron_ltd.eval.scorer import build_scorer
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.train.runs import launched


def score(rank: int, world_size: int, init_method: str, checkpoints: str, requests: list[list[ScoreRow]], tp: int,
          pp: int, batch_rows: int) -> list[list[ScoredRow]]:
    """What one rank is told of each request, by a scorer that is built from the newest checkpoint."""
    with launched(Launch(rank, rank, world_size, init_method if world_size > 1 else None)):
        scorer = build_scorer(checkpoints, step=None, tensor_parallel=tp, pipeline_parallel=pp,
                              micro_batch_size=batch_rows)
    answers = [scorer.score(rows) for rows in requests]
    launch.stop()
    return answers
