"""Conversations as texts, by the Jinja template that lies beside a tokenizer's files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ltd.errors import DataError


@dataclass(frozen=True)
class Chat:
    """A template, and the special tokens that it may name."""

    template: str
    tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def beside(cls, tokenizer_file: Path) -> "Chat":
        """The template of chat_template.jinja, or of tokenizer_config.json, in the folder of a tokenizer's file.

        Raises:
            DataError: there is none.
        """
        config_file, template_file = (tokenizer_file.with_name(name)
                                      for name in ("tokenizer_config.json", "chat_template.jinja"))
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
        if isinstance(template, list):
            template = next((each["template"] for each in template if each["name"] == "default"), None)
        if not isinstance(template, str):
            raise DataError(f"--apply_chat_template: looked for {template_file} and for chat_template in {config_file}."
                            " Put the model's template there, or leave the flag out.")
        tokens = {name: value["content"] if isinstance(value, dict) else value for name, value in config.items()
                  if name.endswith("_token") and value is not None and not isinstance(value, bool)}
        return cls(template, tokens)

    def text(self, messages: Sequence[dict[str, str]], answer_follows: bool) -> str:
        """The text of a conversation.

        Args:
            answer_follows: the model answers next; otherwise it goes on with the last message.

        Raises:
            DataError: the template refuses the conversation.
        """
        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = refuse
        try:
            text = environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=answer_follows, **self.tokens)
        except TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}. Leave out --system_instruction, or "
                            "--fewshot_as_multiturn.") from error
        if answer_follows:
            return text
        last = messages[-1]["content"].strip()
        return text[:text.rindex(last) + len(last)]
