"""A sequence curriculum (https://arxiv.org/abs/2108.06084, section 4): early in the run only the first tokens of each
training sample are read, and the rest is discarded."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.policy import ONE_OR_MORE, Policy, Range, Shape, misfits
from megatron_ltd.token_drop.schedule import KeptLength

UNFIT = {"bert": "a sequence curriculum cuts samples short, and one of BERT ends with [SEP] and has the tokens to "
                 "predict anywhere, which its heads are given as a fixed number of places",
         "vit": "a sequence curriculum reads the first tokens of a sample, and an image has no first ones"}


@dataclass(frozen=True, kw_only=True)
class SequenceCurriculumSettings:
    """Short samples first."""

    seq_length_curriculum_start_length: int | None = None
    """Sequence curriculum for GPT: tokens of each training sample that are read at the first step; the rest of the
    sample is discarded. Evaluation reads whole samples."""
    seq_length_curriculum_steps: int | None = None
    """Steps over which the sequence curriculum grows linearly to --seq-length."""
    seq_length_curriculum_length_step: int = 64
    """While the length of the sequence curriculum grows, it is a multiple of this."""


@dataclass(frozen=True)
class SequenceCurriculum(Policy):
    """How many tokens of a sample are read over the run. It comes first, since the other policies choose from these."""

    lengths: KeptLength

    name: ClassVar[str] = "sequence-curriculum"
    Settings: ClassVar[type] = SequenceCurriculumSettings
    switch: ClassVar[str] = "seq_length_curriculum_start_length"
    ranges: ClassVar[dict[str, Range]] = dict.fromkeys(
        ("seq_length_curriculum_start_length", "seq_length_curriculum_steps", "seq_length_curriculum_length_step"),
        ONE_OR_MORE)

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "SequenceCurriculum":
        return cls(KeptLength(settings.seq_length_curriculum_start_length, shape.tokens,
                              settings.seq_length_curriculum_steps, settings.seq_length_curriculum_length_step))

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        start = settings.seq_length_curriculum_start_length
        text = f"--seq-length-curriculum-start-length = {start}"
        if settings.seq_length_curriculum_steps is None:
            yield (f"{text} is given without --seq-length-curriculum-steps: a sequence curriculum needs a first length "
                   "and the steps until the full one; give both")
        if shape.family in UNFIT:
            yield f"{text}: {UNFIT[shape.family]}; leave it out"
        if start > shape.tokens:
            yield f"{text}: more than --seq-length = {shape.tokens}; choose at most {shape.tokens}"
        units = [(f"--tensor-model-parallel-size = {shape.slices}, with --sequence-parallel", shape.slices)]
        if settings.policy != "none":
            units.insert(0, (f"--random-ltd-strata = {settings.random_ltd_strata}", settings.random_ltd_strata))
        yield from misfits("--seq-length-curriculum-start-length", start, units)
        yield from misfits("--seq-length-curriculum-length-step", settings.seq_length_curriculum_length_step, units)

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        return StepPlan.whole(min(self.lengths.at(step), plan.read_tokens), len(plan.layers))

    def changes(self) -> Iterable[int]:
        return (step for step, _ in self.lengths.changes())

    def log_fields(self, plan: StepPlan) -> dict[str, Any]:
        return {"sequence_length": plan.read_tokens}
