"""BLiMP: of two sentences that differ in one point of grammar, the right one must be more probable
(https://arxiv.org/abs/1912.00582)."""

from megatron_ltd.eval.tasks.choices import ChoiceTask, Example, choose
from megatron_ltd.eval.tasks.records import Record


def blimp(record: Record) -> Example:
    """A sentence and its ungrammatical neighbour."""
    return choose(record, "", [record.text("sentence_good"), record.text("sentence_bad")], 0)


TASKS = {
    "blimp": ChoiceTask(("blimp/blimp.zip", "blimp/blimp.jsonl"), blimp, ("acc",), by_group=True, fewshot=False,
                        protocol="mean over the paradigms, each as in lm-evaluation-harness"),
}
