"""What a model is finetuned to say, from loose JSON, as tokens.

    {"prompt": "Name a colour.\\n", "response": "Blue."}
    {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]}

Prompt and response are tokenised apart, so that where one ends does not depend on the other, and the end-of-document
token follows: it is how a model says that its response is over. A conversation is tokenised as the text that its chat
template makes of it. Blank lines are skipped.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.finetuning.conversations import conversation, conversation_problem
from megatron_ltd.data.preprocess.documents import BadLine, json_object, text_problem
from megatron_ltd.data.preprocess.text_input import Block, TextInput, expand_inputs
from megatron_ltd.data.text.chat_template import Chat
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
        messages_key: of a conversation; a line with prompt and response is none.
        chat: how a conversation becomes a text.
        bos: the token with which every prompt begins; a conversation begins as its template says.
    """

    prompt_key: str
    response_key: str
    longest: int
    skip_overlong: bool = False
    messages_key: str = "messages"
    chat: Chat | None = None
    bos: int | None = None


@dataclass(frozen=True, eq=False)
class Responses:
    """Examples one after the other.

    Args:
        tokens: of all examples.
        starts: where each begins, and the end.
        learned: which tokens the model is to say; bool.
        skipped: lines that were too long.
        conversations: how many of the examples are.
        chat: where their template was found.
    """

    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]
    learned: NDArray[np.bool_]
    skipped: int
    digest: str
    conversations: int = 0
    chat: str = ""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that each takes of a sample."""
        return np.diff(self.starts) - 1

    def example(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens, and which of them the model is to say."""
        here = slice(self.starts[index], self.starts[index + 1])
        return self.tokens[here], self.learned[here]


@dataclass(frozen=True)
class _Example:
    """One line.

    Args:
        size: its tokens, in words.
    """

    place: str
    tokens: list[int]
    learned: list[bool]
    size: str
    is_conversation: bool = False


def read_responses(flag: str, patterns: Sequence[str], tokenizer: Tokenizer, form: ResponseForm) -> Responses:
    """Read all lines.

    Raises:
        DataError: a file is missing, or holds a line that is no example, or has nothing to learn, or is too long; or
            there is no example at all.
    """
    examples: list[_Example] = []
    overlong: list[str] = []
    named = f"{flag} = {' '.join(patterns)}"
    for path in _files(flag, patterns):
        for block in TextInput(path).blocks():
            for example in _examples(block, tokenizer, form):
                if len(example.tokens) - 1 > form.longest:
                    overlong.append(f"{example.place}: {example.size}")
                else:
                    examples.append(example)
    if overlong and not form.skip_overlong:
        more = [f"and {len(overlong) - _TOLD} more"] if len(overlong) > _TOLD else []
        raise DataError(f"{named}: {len(overlong)} lines do not fit into --seq-length = {form.longest}; raise it, "
                        "shorten them, or leave them out with --overlong-samples skip:\n  "
                        + "\n  ".join([*overlong[:_TOLD], *more]))
    if not examples:
        raise DataError(f"{named}: no line with a prompt and a response, or with messages"
                        + (f", that fits into --seq-length = {form.longest}" if overlong else "")
                        + ". Name files that hold some.")
    starts = np.zeros(len(examples) + 1, dtype=np.int64)
    np.cumsum([len(example.tokens) for example in examples], out=starts[1:])
    tokens = np.concatenate([np.array(example.tokens, dtype=np.int64) for example in examples])
    learned = np.concatenate([np.array(example.learned, dtype=np.bool_) for example in examples])
    digest = hashlib.sha256(tokens.tobytes() + starts.tobytes() + learned.tobytes()).hexdigest()
    return Responses(tokens, starts, learned, len(overlong), digest,
                     sum(example.is_conversation for example in examples), form.chat.source if form.chat else "")


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


def _examples(block: Block, tokenizer: Tokenizer, form: ResponseForm) -> Iterator[_Example]:
    """The examples of a block, in order."""
    rows = list(_rows(block, form))
    pairs = [row for _, row, is_conversation in rows if not is_conversation]
    encoded = zip(*(tokenizer.encode_batch([row[key] for row in pairs])
                    for key in (form.prompt_key, form.response_key)), strict=True)
    for place, row, is_conversation in rows:
        if is_conversation:
            assert form.chat is not None
            try:
                tokens, learned = conversation(row[form.messages_key], form.chat, tokenizer)
            except DataError as error:
                raise DataError(f"{place}: {error}.") from error
            yield _Example(place, tokens, learned, f"the conversation takes {len(tokens) - 1} tokens", True)
            continue
        prompt, response = next(encoded)
        if form.bos is not None and prompt[:1] != [form.bos]:  # which a template may have written
            prompt = [form.bos, *prompt]
        if not response:
            raise DataError(f"{place}: {form.response_key!r} is empty, so that there is nothing to learn; remove "
                            "this line.")
        yield _Example(place, [*prompt, *response, tokenizer.eod], [False] * len(prompt) + [True] * (len(response) + 1),
                       f"prompt and response take {len(prompt)} + {len(response)} tokens")


def _rows(block: Block, form: ResponseForm) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Where each line stands, the object that it is, and whether that is a conversation."""
    first_byte = block.first_byte
    for number, line in enumerate(block.lines(), start=block.first_line):
        if line.strip():
            found = json_object(line)
            if isinstance(found, str):
                raise _refusal(BadLine(block.path, number, first_byte, found, line))
            is_conversation = form.messages_key in found and form.response_key not in found
            if is_conversation:
                problem, remedy = conversation_problem(found[form.messages_key]), "another key with --messages-key"
            else:
                problems = (text_problem(found, key, line) for key in (form.prompt_key, form.response_key))
                problem, remedy = next(filter(None, problems), None), "other keys with --prompt-key and --response-key"
            if problem is not None:
                problem = problem.replace(" (--json-keys)", "")
                raise _refusal(BadLine(block.path, number, first_byte, problem, line), f", or name {remedy}")
            yield f"{block.path}:{number}", found, is_conversation
        first_byte += len(line) + 1


def _refusal(bad: BadLine, remedy: str = "") -> DataError:
    return DataError(f"{bad} Correct or remove this line (file:line:byte){remedy}.")
