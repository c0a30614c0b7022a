"""Conversations as tokens, of which those that the assistant says are learned."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.beginning import name_of
from megatron_ltd.data.text.chat_template import (
    PLAIN,
    Chat,
    Message,
    Span,
    chat_beside,
    read_template,
    special_tokens,
)
from megatron_ltd.data.text.sentence_piece import SentencePieceTokenizer
from megatron_ltd.data.text.tokenizer import HuggingFaceEngine, Tokenizer

ROLES = ("system", "user", "assistant")


def chat_of(settings: DataConfig, tokenizer: Tokenizer) -> Chat:
    """The template of --chat-template, or the one beside the tokenizer's files, or else the plain one.

    Raises:
        DataError: a file cannot be read.
    """
    file = Path(tokenizer.files[0]) if tokenizer.files else None
    tokens = {"eos_token": name_of(tokenizer, tokenizer.eod)}
    if settings.chat_template is not None:
        beside = special_tokens(file) if file is not None else {}
        return Chat(read_template(Path(settings.chat_template)), tokens | beside, settings.chat_template)
    found = chat_beside(file) if file is not None else None
    return found or Chat(PLAIN, tokens, "the plain template, as the tokenizer has none")


def conversation_problem(messages: Any) -> str | None:
    """Why the value is no conversation that a model can learn from."""
    if not isinstance(messages, list) or not messages:
        return f"{type(messages).__name__} in place of messages; they must be a list of role and content"
    for number, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            return f"message {number} has role {role!r}; it must be one of {', '.join(ROLES)}"
        if not isinstance(content, str):
            return f"message {number} has {type(content).__name__} as content; it must hold a string"
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"message {number} holds half of a surrogate pair ({content[error.start]!a})"
        if role == "assistant" and not content.strip():
            return f"message {number}, of the assistant, is empty"
    if not any(message["role"] == "assistant" for message in messages):
        return "no message of the assistant, so that there is nothing to learn"
    return None


def conversation(messages: list[Message], chat: Chat, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them the assistant says.

    Raises:
        DataError: the template refuses it.
    """
    text, said = chat.learned(messages)
    if isinstance(tokenizer, HuggingFaceEngine):
        inside = np.zeros(len(text), dtype=np.bool_)
        for begin, end in said:
            inside[begin:end] = True
        tokens, spans = tokenizer.encode_with_spans(text)
        return tokens, [bool(inside[begin:end].any()) for begin, end in spans]
    tokens, learned = [], []
    for part, is_said in _parts(text, said):
        ids = _encode(part, tokenizer)
        tokens += ids
        learned += [is_said] * len(ids)
    return tokens, learned


def _parts(text: str, said: list[Span]) -> Iterator[tuple[str, bool]]:
    """The text cut where the assistant begins and ends, for tokenizers that do not tell where a token stands."""
    place = 0
    for begin, end in said:
        yield text[place:begin], False
        yield text[begin:end], True
        place = end
    yield text[place:], False


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text in which SentencePiece's control tokens stand for themselves."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.encode_with_symbols(text)
    return tokenizer.encode(text)
