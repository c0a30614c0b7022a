"""Which token begins texts and which ends documents, by what the owner of a tokenizer declares beside it."""

import json
from pathlib import Path
from typing import Any, Protocol

from megatron_ltd.errors import ConfigError, DataError

EOD_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>")
AUTO = "auto"
_NAMING = ("tokenizer_config.json", "special_tokens_map.json")


class Vocabulary(Protocol):
    """Looks up tokens by their text."""

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, id: int) -> str | None: ...


def end_of_document(vocabulary: Vocabulary, folder: Path, given: str | None, known: tuple[str, ...] = EOD_TOKENS
                    ) -> tuple[int | None, str | None]:
    """The id of the token that ends documents, if there is one, and what to tell the user where there are several.

    It is --eod-token; or what the files in the folder declare as the end of a text, and of several the first that is
    also `known`, since the others end the turns of a conversation; or the first `known` one in the vocabulary.

    Args:
        folder: holds tokenizer_config.json, special_tokens_map.json and generation_config.json, or some of them.
        given: --eod-token.
        known: names that end documents in widely used vocabularies.

    Raises:
        ConfigError: --eod-token is not in the vocabulary.
    """
    present = {name: token for name in known if (token := vocabulary.token_to_id(name)) is not None}
    if given is not None:
        token = vocabulary.token_to_id(given)
        if token is None:
            such = f", such as {', '.join(present)}" if present else ""
            raise ConfigError(f"--eod-token = {given}: the tokenizer has no such token; name one of its tokens{such}, "
                              "or leave the flag out.")
        return token, None
    declared = _declared_ends(vocabulary, folder)
    candidates = declared | {name: token for name, token in present.items() if name not in declared}
    chosen = next((name for name in known if name in declared), next(iter(candidates), None))
    if chosen is None:
        return None, None
    others = [f"{name!r} ({token})" for name, token in candidates.items() if name != chosen] if declared else []
    if not others:
        return candidates[chosen], None
    return candidates[chosen], (f"documents end with {chosen!r} (token {candidates[chosen]}); the tokenizer also has "
                                f"{', '.join(others)}: --eod-token chooses another")


def _declared_ends(vocabulary: Vocabulary, folder: Path) -> dict[str, int]:
    """The tokens that the files declare as the end of a text, by name."""
    names = [named_token(read_settings(folder / file).get("eos_token")) for file in _NAMING]
    ids = read_settings(folder / "generation_config.json").get("eos_token_id")
    names += [vocabulary.id_to_token(token) for token in (ids if isinstance(ids, list) else [ids])
              if type(token) is int and token >= 0]
    return {name: token for name in names if name is not None and (token := vocabulary.token_to_id(name)) is not None}


def declared_beginning(folder: Path) -> tuple[str | None, bool | None]:
    """The text of the token that begins texts, and whether to add it, as far as the files in the folder say."""
    names = [named_token(read_settings(folder / file).get("bos_token")) for file in _NAMING]
    adds = read_settings(folder / _NAMING[0]).get("add_bos_token")
    return next((name for name in names if name is not None), None), adds if isinstance(adds, bool) else None


def named_token(entry: Any) -> str | None:
    """The text of a token in such a file, which holds it as a string or as a table."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) and name else None


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON table beside a tokenizer; empty if there is no such file.

    Raises:
        DataError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no table of JSON: it holds a {type(found).__name__}.")
    return found
