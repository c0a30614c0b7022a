"""The decoder on gloo ranks; apart from the tests, whose imports a rank would have to repeat."""

from megatron_ltd.lm_eval.decode import Sampling
from megatron_ltd.lm_eval.scorer import build_scorer
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.train.runs import launched


def decode(rank: int, world_size: int, init_method: str, checkpoints: str, texts: list[list[int]], new_tokens: int,
           samplings: list[Sampling], tp: int, pp: int, eod: int) -> list[list[list[int]]]:
    """What follows the texts under each sampling, first as the layout is, then with sequence parallelism."""
    with launched(Launch(rank, rank, world_size, init_method if world_size > 1 else None)):
        scorer = build_scorer(checkpoints, step=None, tensor_parallel=tp, pipeline_parallel=pp, micro_batch_size=1)
    answers = []
    for sequence_parallel in (False, True):
        scorer.model.tp.sequence_parallel = sequence_parallel
        answers += [scorer.decoder.generate(texts, new_tokens, sampling, eod=eod) for sampling in samplings]
    launch.stop()
    return answers
