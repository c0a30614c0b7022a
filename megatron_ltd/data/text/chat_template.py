"""Conversations as texts, by a Jinja template: a file's, the one that lies beside a tokenizer's files, or a plain one.

A template is code from strangers. It runs in Jinja's sandbox, without access to files, to the program or to the date,
on which the tokens of a run must not depend.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ltd.data.text.special_tokens import named_token, read_settings
from megatron_ltd.errors import DataError

PLAIN = """\
{%- for message in messages %}
    {%- if not loop.first %}{{ '\\n' }}{% endif %}
    {{- message['role'] + ':\\n' }}
    {%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {%- else %}{{ message['content'] }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ('\\n' if messages else '') + 'assistant:\\n' }}{% endif %}"""
"""For tokenizers without a template: role, colon and content on lines of their own; an answer ends its document."""
BEGIN, END = "\ufdd0", "\ufdd1"
"""Around what the model is to say, while a text is made; Unicode reserves both as no characters."""

Message = Mapping[str, Any]
Span = tuple[int, int]


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model is to say."""

    tags = {"generation"}  # noqa: RUF012 - the library's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        return f"{BEGIN}{caller()}{END}"


class Chat:
    """A template.

    Args:
        tokens: the special tokens that it may name, such as `eos_token`.
        source: where it was found.
    """

    def __init__(self, template: str, tokens: Mapping[str, str], source: str):
        self.template, self.tokens, self.source = template, dict(tokens), source

    @functools.cached_property
    def _program(self) -> Any:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols", _Generation])
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _json
        return environment.from_string(self.template)

    @functools.cached_property
    def _marks(self) -> bool:
        """Whether the template says what the model is to say."""
        return "endgeneration" in self.template

    def text(self, messages: Sequence[Message], answer_follows: bool) -> str:
        """The text of a conversation.

        Args:
            answer_follows: the model answers next; otherwise it goes on with the last message.

        Raises:
            DataError: the template refuses the conversation.
        """
        text = self._render(messages, answer_follows).replace(BEGIN, "").replace(END, "")
        if answer_follows:
            return text
        last = messages[-1]["content"].strip()
        return text[:text.rindex(last) + len(last)]

    def learned(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of a whole conversation, and what of it the assistant says: from its header to the end of its turn.

        Raises:
            DataError: the template refuses the conversation, or leaves out or changes what the assistant says.
        """
        if any(mark in message["content"] for message in messages for mark in (BEGIN, END)):
            raise DataError("a message holds U+FDD0 or U+FDD1, which are no characters; remove them")
        marked = self._render(messages)
        if not self._marks:
            return marked, list(self._turns(marked, messages))
        parts, text, spans = marked.replace(END, BEGIN).split(BEGIN), "", []
        for number, part in enumerate(parts):  # outside and inside, in turn
            if number % 2 and part:
                spans.append((len(text), len(text) + len(part)))
            text += part
        if not spans:
            raise DataError("the chat template marks nothing as said by the assistant")
        return text, spans

    def _turns(self, text: str, messages: Sequence[Message]) -> Iterator[Span]:
        """Where the assistant speaks in the text of a template without marks. A turn begins where the template asks for
        it, and ends with what the template writes after its content when it is the last."""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, content = self._render(messages[:number], True), message["content"].strip()
            begin = len(before) if text.startswith(before) else -1
            alone = self._render(messages[:number + 1])
            ending = alone[alone.rfind(content) + len(content):].rstrip() if content in alone else ""
            at = text.find(content + ending, begin)
            if begin < 0 or at < 0:
                raise DataError(f"the chat template writes message {number + 1}, of the assistant, in another way once "
                                "others follow; put {% generation %} and {% endgeneration %} around what it says in a "
                                "copy, and name that by --chat-template")
            yield begin, at + len(content) + len(ending)

    def _render(self, messages: Sequence[Message], answer_follows: bool = False) -> str:
        try:
            text: str = self._program.render(messages=messages, add_generation_prompt=answer_follows, **self.tokens)
        except Exception as error:  # a template can raise anything
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return text


def chat_beside(tokenizer_file: Path) -> Chat | None:
    """The template of chat_template.jinja, or of tokenizer_config.json, in the folder of a tokenizer's file.

    Raises:
        DataError: a file cannot be read.
    """
    config = _config_beside(tokenizer_file)
    source = tokenizer_file.with_name("chat_template.jinja")
    if source.is_file():
        template: Any = read_template(source)
    else:
        template, source = config.get("chat_template"), tokenizer_file.with_name("tokenizer_config.json")
    if isinstance(template, list):
        template = next((each.get("template") for each in template
                         if isinstance(each, dict) and each.get("name") == "default"), None)
    return Chat(template, special_tokens(tokenizer_file), str(source)) if isinstance(template, str) else None


def special_tokens(tokenizer_file: Path) -> dict[str, str]:
    """The special tokens that the files beside a tokenizer's file name, as `transformers` reads them: those of a
    special_tokens_map.json count, unless tokenizer_config.json lists added tokens, as newer ones do."""
    config = _config_beside(tokenizer_file)
    older = {} if "added_tokens_decoder" in config else \
        read_settings(tokenizer_file.with_name("special_tokens_map.json"))
    tokens = {name: named_token(value) for name, value in (config | older).items() if name.endswith("_token")}
    return {name: token for name, token in tokens.items() if token is not None}


def read_template(path: Path) -> str:
    """Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the chat template cannot be read: {error}; name a Jinja template") from error


def _config_beside(tokenizer_file: Path) -> dict[str, Any]:
    path = tokenizer_file.with_name("tokenizer_config.json")
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}; copy it again, or remove it") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is no table of JSON; copy it again, or remove it")
    return config


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
          sort_keys: bool = False) -> str:
    """Jinja's own filter writes `<` as an escape, since it is made for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
