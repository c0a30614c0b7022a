"""The model of a checkpoint as a model of lm-evaluation-harness, for any of its tasks (extra `eval`).

Every process runs the harness on the same requests and sees the same answers, while the scorer shares the work out:
each request is scored once, under any tensor x pipeline x data layout. To the harness there is one process.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from megatron_ltd.data.text.chat_template import Chat, chat_beside
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.lm_eval.decode import GREEDY, Sampling
from megatron_ltd.lm_eval.requests import ScoredRow, ScoreRow, before_stops, score_by_length, stopped_by
from megatron_ltd.lm_eval.rows import Encoded, RowEncoder
from megatron_ltd.lm_eval.scorer import ModelScorer
from megatron_ltd.parallel.agreement import gather_json

NEW_TOKENS = 256
"""Generated at most where a task does not say."""
KNOWN_SETTINGS = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "do_sample",
                  "temperature", "top_k", "top_p", "num_beams"}


class HarnessModel(LM):
    """Answers the harness's requests.

    Args:
        bos: id of a token that every text begins with.
        overlong: what happens to an example that is longer than the model's positions: truncate or error.
        seed: of sampled texts.
        show_progress: whether this process draws progress bars.
    """

    def __init__(self, scorer: ModelScorer, tokenizer: Tokenizer, *, bos: int | None = None,
                 overlong: str = "truncate", seed: int = 1234, show_progress: bool = False):
        super().__init__()
        self.scorer, self.tokens, self.seed = scorer, tokenizer, seed
        self.encoder = RowEncoder(tokenizer, scorer.max_length, bos, overlong)
        self.show_progress = show_progress
        self.forget()

    def forget(self) -> None:
        """Count anew: the examples of each task that were cut, and that were encoded apart."""
        self.cut: defaultdict[str | None, set[int | None]] = defaultdict(set)
        self.apart: defaultdict[str | None, set[int | None]] = defaultdict(set)
        self.scoring = False

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether the model would have said it."""
        self._agree(requests)
        rows = []
        for request in requests:
            context, continuation = request.args
            if continuation:
                one = self.encoder.pair(context, continuation, _place(request))
                rows.append(one.row)
                self._count(request, one)
        answers = iter(self._score(rows))
        # No text is certain.
        found = [next(answers) if request.args[1] else None for request in requests]
        return [(0.0, True) if one is None else (one.logprob, bool(one.greedy.all())) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        self._agree(requests)
        # With a beginning-of-text token the harness predicts it too, from itself.
        windows = [list(self.encoder.windows(self.encoder.prompt(request.args[0]))) for request in requests]
        answers = iter(self._score([row for rows in windows for row in rows]))
        return [sum(next(answers).logprob for _ in rows) for rows in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the task's stops."""
        self._agree(requests)
        together: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            together.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        answers: dict[int, str] = {}
        for places in together.values():
            settings = requests[places[0]].args[1]
            answers |= dict(zip(places, self._generate([requests[i] for i in places], settings), strict=True))
        return [answers[i] for i in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:
        """Tells the harness's cache of requests which tokenizer they were written for."""
        return f"megatron_ltd-{self.tokens.digest[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results besides the model's arguments."""
        return {"bos_token_id": self.encoder.bos, "overlong": self.encoder.overlong}

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that lies beside the tokenizer's files."""
        return self.chat.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, up to where the model goes on."""
        try:
            return self.chat.text(chat_history, add_generation_prompt)
        except DataError as error:
            raise DataError(f"{error}. Leave out --system_instruction, or --fewshot_as_multiturn.") from error

    @cached_property
    def chat(self) -> Chat:
        file = Path(self.tokens.files[0])
        found = chat_beside(file)
        if found is None:
            raise DataError(f"--apply_chat_template: looked for {file.with_name('chat_template.jinja')} and for "
                            f"chat_template in {file.with_name('tokenizer_config.json')}. Put the model's template "
                            "there, or leave the flag out.")
        return found

    def _score(self, rows: list[ScoreRow]) -> list[ScoredRow]:
        with self._at_work():
            return score_by_length(self.scorer, rows, "harness", self.show_progress)

    def _agree(self, requests: list[Instance]) -> None:
        """Check that every process was given the same requests, since they share the work.

        Raises:
            DataError: they were not.
        """
        digest = hashlib.sha256(repr([request.args for request in requests]).encode()).hexdigest()
        with self._at_work():
            different = len(set(gather_json(digest))) > 1
        if different:
            raise DataError("The processes were given different requests. If --use_cache or --cache_requests is on, "
                            "delete its files: they are from a run that was cut off, or not the same on each machine.")

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """What fails in here may have failed on this process alone, while its peers wait for it."""
        self.scoring = True
        yield
        self.scoring = False

    def _count(self, request: Instance, one: Encoded) -> None:
        for counted, is_so in ((self.cut, one.cut), (self.apart, one.apart)):
            if is_so:
                counted[request.task_name].add(request.doc_id)

    def _generate(self, requests: Sequence[Instance], settings: dict[str, Any]) -> list[str]:
        unknown = sorted(set(settings) - KNOWN_SETTINGS)
        if unknown or settings.get("num_beams", 1) != 1:
            raise ConfigError(f"the task asks for generation with {', '.join(unknown) or 'num_beams'}, which is not "
                              "supported; leave the task out")
        settings = normalize_gen_kwargs(settings, NEW_TOKENS)
        stops = [stop for stop in settings["until"] if stop]
        new_tokens = min(settings["max_gen_toks"], self.scorer.max_length - 1)
        if new_tokens < 1:
            return [""] * len(requests)
        texts = []
        for request in requests:
            one = self.encoder.open_prompt(request.args[0], new_tokens, _place(request))
            texts.append(one.row.tokens)
            self._count(request, one)
        with self._at_work():
            answers = self.scorer.generate(texts, new_tokens, self.tokens.eod, stopped_by(stops, self.tokens),
                                           self._sampling(settings))
        return [before_stops(self.tokens.decode(answer), stops) for answer in answers]

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        if not settings["do_sample"]:
            return GREEDY
        return Sampling(float(settings.get("temperature", 1.0)), settings.get("top_k"),
                        float(settings.get("top_p", 1.0)), self.seed)


def _place(request: Instance) -> str:
    return f"{request.task_name}, example {request.doc_id}"
