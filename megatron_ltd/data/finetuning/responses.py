"""Prompts and responses from loose JSON, as tokens.

    {"prompt": "Name a colour.\\n", "response": "Blue."}

Prompt and response are tokenised apart, so that where one ends does not depend on the other, and the end-of-document
token follows: it is how a model says that its response is over.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.preprocess.documents import sorted_documents
from megatron_ltd.data.preprocess.text_input import TextInput, expand_inputs
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import DataError

_TOLD = 5


@dataclass(frozen=True)
class ResponseForm:
    """How lines become examples.

    Args:
        longest: most tokens that an example may take part with in a sample: all of it but the last, which is only
            predicted.
        skip_overlong: leave longer ones out rather than refuse them.
    """

    prompt_key: str
    response_key: str
    longest: int
    skip_overlong: bool = False


@dataclass(frozen=True, eq=False)
class Responses:
    """Examples one after the other.

    Args:
        tokens: of all examples.
        starts: where each begins, and the end.
        prompts: tokens of the prompt of each.
        skipped: lines that were too long.
    """

    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]
    prompts: NDArray[np.int64]
    skipped: int
    digest: str

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that each takes of a sample."""
        return np.diff(self.starts) - 1

    def example(self, index: int) -> tuple[NDArray[np.int64], int]:
        """Tokens, and how many of them are the prompt."""
        return self.tokens[self.starts[index]:self.starts[index + 1]], int(self.prompts[index])


def read_responses(flag: str, patterns: Sequence[str], tokenizer: Tokenizer, form: ResponseForm) -> Responses:
    """Read all lines.

    Raises:
        DataError: a file is missing, or holds a line that is no JSON object with both texts, or an empty response, or
            one that is too long; or there is no example at all.
    """
    examples: list[list[int]] = []
    prompts: list[int] = []
    overlong: list[str] = []
    named = f"{flag} = {' '.join(patterns)}"
    for path in _files(flag, patterns):
        for place, prompt, response in _lines(path, tokenizer, form):
            taken = len(prompt) + len(response)
            if taken > form.longest:
                overlong.append(f"{place}: prompt and response take {len(prompt)} + {len(response)} tokens")
                continue
            examples.append([*prompt, *response, tokenizer.eod])
            prompts.append(len(prompt))
    if overlong and not form.skip_overlong:
        more = [f"and {len(overlong) - _TOLD} more"] if len(overlong) > _TOLD else []
        raise DataError(f"{named}: {len(overlong)} lines do not fit into --seq-length = {form.longest}; raise it, "
                        "shorten them, or leave them out with --overlong-samples skip:\n  "
                        + "\n  ".join([*overlong[:_TOLD], *more]))
    if not examples:
        raise DataError(f"{named}: no line with a prompt and a response"
                        + (f" that fits into --seq-length = {form.longest}" if overlong else "")
                        + ". Name files that hold some.")
    starts = np.zeros(len(examples) + 1, dtype=np.int64)
    np.cumsum([len(example) for example in examples], out=starts[1:])
    tokens = np.concatenate([np.array(example, dtype=np.int64) for example in examples])
    counts = np.array(prompts, dtype=np.int64)
    digest = hashlib.sha256(tokens.tobytes() + starts.tobytes() + counts.tobytes()).hexdigest()
    return Responses(tokens, starts, counts, len(overlong), digest)


def _files(flag: str, patterns: Sequence[str]) -> list[str]:
    try:
        paths = expand_inputs(patterns)
    except DataError as error:
        raise DataError(str(error).replace("--input", flag)) from error
    texts = [path for path in paths if TextInput(path).whole]
    if texts:
        raise DataError(f"{flag}: {texts[0]} is plain text; prompts and responses are read from files of one JSON "
                        "object a line, .jsonl")
    return paths


def _lines(path: str, tokenizer: Tokenizer, form: ResponseForm) -> Iterator[tuple[str, list[int], list[int]]]:
    """Where each line stands, its prompt and its response."""
    for block in TextInput(path).blocks():
        texts, bad = sorted_documents(block, (form.prompt_key, form.response_key), most_bad=1)
        if bad:
            problem = str(bad[0]).replace(" (--json-keys)", "")
            raise DataError(f"{problem} Correct or remove this line (file:line:byte), or name other keys with "
                            "--prompt-key and --response-key.")
        prompts, responses = (tokenizer.encode_batch(column) for column in texts)
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            place = f"{path}:{block.first_line + number}"
            if not response:
                raise DataError(f"{place}: {form.response_key!r} is empty, so that there is nothing to learn; remove "
                                "this line.")
            yield place, prompt, response
