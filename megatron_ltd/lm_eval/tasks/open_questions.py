"""Questions that the model answers in its own words, such as TriviaQA's."""

from itertools import compress
from pathlib import Path

from tqdm import tqdm

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.lm_eval.requests import SLAB_ROWS, TokenScorer, before_stops, stopped_by
from megatron_ltd.lm_eval.results import EvalOptions, TaskResult, aligned, mean_and_stderr
from megatron_ltd.lm_eval.rows import RowEncoder
from megatron_ltd.lm_eval.tasks.choices import ChoiceTask
from megatron_ltd.lm_eval.tasks.questions import without_punctuation

STOPS = ("\n", ".", ",")
"""An answer ends before the first of these."""
ANSWER_TOKENS = 256


class AnswerTask(ChoiceTask):
    """A task whose answers are generated; an answer is right if it equals a given one but for case and punctuation."""

    def evaluate(self, path: Path, scorer: TokenScorer, tokenizer: Tokenizer, options: EvalOptions) -> TaskResult:
        examples, prompts, shown = self.questions(path, options)
        encoder = RowEncoder(tokenizer, scorer.max_length, options.bos, options.overlong)
        # At most half of the positions, so that enough of the question remains.
        new_tokens = min(ANSWER_TOKENS, scorer.max_length // 2)
        encoded = [[encoder.open_prompt(prompt + example.pairs[0][0], new_tokens, example.place)]
                   for example, prompt in zip(examples, prompts, strict=True)]
        notes, kept = encoder.notes(encoded), encoder.fits(encoded, path.name)
        examples, texts = list(compress(examples, kept)), [one.row.tokens for [one] in compress(encoded, kept)]
        answers: list[list[int]] = []
        with tqdm(total=len(texts), desc=path.name, unit="answer", disable=not options.show_progress) as bar:
            for start in range(0, len(texts), SLAB_ROWS):
                slab = texts[start:start + SLAB_ROWS]
                answers += scorer.generate(slab, new_tokens, tokenizer.eod, stopped_by(STOPS, tokenizer))
                bar.update(len(slab))
        hits = [float(without_punctuation(spoken(tokenizer.decode(answer)))
                      in [without_punctuation(right) for _, right in example.pairs])
                for example, answer in zip(examples, answers, strict=True)]
        cut = sum(one.cut for [one] in compress(encoded, kept))
        return TaskResult({"exact_match": mean_and_stderr(hits)}, len(examples), "questions", cut,
                          f"greedy answers up to a new line, full stop or comma, {self.protocol}; {shown}",
                          {"generated_tokens": sum(map(len, answers))}, notes, {"exact_match": aligned(hits, kept)})


def spoken(text: str) -> str:
    """An answer without what follows its end, and without the space around it."""
    return before_stops(text, STOPS).strip()
