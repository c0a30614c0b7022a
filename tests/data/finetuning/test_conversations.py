"""Conversations against `transformers`: the ids of a chat template, and which of them the assistant says."""

import io
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.finetuning.build import describe, text_epoch
from megatron_ltd.data.finetuning.conversations import chat_of, conversation
from megatron_ltd.data.finetuning.packing import PackedDataset
from megatron_ltd.data.finetuning.responses import ResponseForm, Responses, read_responses
from megatron_ltd.data.text.chat_template import PLAIN, Chat, chat_beside
from megatron_ltd.data.text.sentence_piece import SentencePieceTokenizer
from megatron_ltd.data.text.tokenizer import NullTokenizer, Tokenizer, build_tokenizer
from megatron_ltd.errors import DataError

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ THINK + message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] | trim + '<|im_end|>' }}{% endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LAST_THINKS = CHATML.replace("THINK", "('<think>\\n\\n</think>\\n\\n' if loop.last else '')")
CHATML = CHATML.replace("THINK + ", "")
TALKS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Grüße \U0001f389"},
     {"role": "assistant", "content": "日本語 \U0001f389 é"}, {"role": "user", "content": "a"},
     {"role": "assistant", "content": "a"}, {"role": "user", "content": "<|im_end|>"},
     {"role": "assistant", "content": "for x in y:\n    pass"}],
    [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": ""},
     {"role": "assistant", "content": "and end"}, {"role": "user", "content": "the last word is mine"}],
]


def unmarked(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with ChatML's special tokens."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.train_from_iterator(list(topics.values())[:10], trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    path = tmp_path_factory.mktemp("tokenizer")
    engine.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def ours(folder: Path) -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder)), None)


def with_template(folder: Path, template: str) -> PreTrainedTokenizerFast:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=SPECIAL[2])
    theirs.chat_template = template
    return theirs


@pytest.mark.parametrize("talk", TALKS, ids=["one-turn", "hard-texts", "begun-by-the-assistant"])
@pytest.mark.parametrize("template", [CHATML, LAST_THINKS, PLAIN], ids=["chatml", "last-thinks", "plain"])
def test_tokens_and_what_is_learned_of_them_are_those_of_transformers(
    folder: Path, ours: Tokenizer, template: str, talk: list[dict[str, str]],
) -> None:
    expected = with_template(folder, template).apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
    for text in (template, unmarked(template)):
        if text == unmarked(LAST_THINKS) and talk[-1]["role"] == "assistant" and len(talk) > 2:
            continue  # which words are the header is not to be seen; below
        tokens, learned = conversation(talk, Chat(text, {"eos_token": SPECIAL[2]}, "here"), ours)
        assert tokens == expected["input_ids"]
        assert learned == [bool(flag) for flag in expected["assistant_masks"]]


def test_spaces_that_a_tokenizer_leaves_out_of_the_spans_of_its_tokens_are_learned(
    folder: Path, tmp_path: Path,
) -> None:
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-NeoX's tokenizer.json has it
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(
        DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path)), None)
    code = [{"role": "user", "content": "Two  spaces"},
            {"role": "assistant", "content": "for x in y:\n      pass\n\n   \n  # two"}]
    expected = with_template(tmp_path, CHATML).apply_chat_template(
        code, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    tokens, learned = conversation(code, Chat(CHATML, {}, "here"), tokenizer)
    assert tokens == expected["input_ids"]
    assert learned == [bool(flag) for flag in expected["assistant_masks"]]
    said = tokenizer.decode([token for token, flag in zip(tokens, learned, strict=True) if flag])
    assert said == code[1]["content"] + "<|im_end|>"


def test_a_template_that_changes_earlier_turns_is_followed_without_marks(folder: Path, ours: Tokenizer) -> None:
    tokens, learned = conversation(TALKS[1], Chat(unmarked(LAST_THINKS), {}, "here"), ours)
    said = ours.decode([token for token, flag in zip(tokens, learned, strict=True) if flag])
    assert said == ("日本語 \U0001f389 é<|im_end|>a<|im_end|><think>\n\n</think>\n\nfor x in y:\n    pass<|im_end|>")


def test_a_template_that_rewrites_what_the_assistant_says_is_refused_with_the_remedy(ours: Tokenizer) -> None:
    shouts = "{% for m in messages %}{{ m['content'] if loop.last else m['content'] | upper }}{% endfor %}"
    with pytest.raises(DataError, match=r"message 3, of the assistant, in another way.*{% generation %}"):
        conversation(TALKS[1], Chat(shouts, {}, "here"), ours)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ raise_exception('never') }}",
    "{{ 1 + 'a' }}", "{% for m in %}", "{{ strftime_now('%Y') }}", "{% include 'tokenizer.json' %}", "{{ nowhere.x }}",
])
def test_a_template_can_neither_leave_the_sandbox_nor_end_in_a_traceback(ours: Tokenizer, template: str) -> None:
    with pytest.raises(DataError, match="the chat template refuses the conversation"):
        conversation(TALKS[0], Chat(template, {}, "here"), ours)


def test_the_template_is_the_given_one_or_the_tokenizers_or_a_plain_one(
    folder: Path, tmp_path: Path,
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    settings = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))

    def found(**more: Any) -> Chat:
        data = DataConfig(**{**vars(settings), **more})
        return chat_of(data, build_tokenizer(data, None))

    assert (found().template, found().tokens) == (PLAIN, {"eos_token": SPECIAL[2]})
    config = {"chat_template": "of the config", "eos_token": {"content": SPECIAL[1]}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert (found().template, found().tokens) == ("of the config", {"eos_token": SPECIAL[1]})
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert found().template == "y"
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert found().template == "of the file" and found().source.endswith("chat_template.jinja")
    (tmp_path / "mine.jinja").write_text("mine")
    assert found(chat_template=str(tmp_path / "mine.jinja")).template == "mine"
    with pytest.raises(DataError, match=r"nowhere\.jinja: the chat template cannot be read"):
        found(chat_template=str(tmp_path / "nowhere.jinja"))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "cut o')
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        found()


@pytest.mark.parametrize("config", [
    {}, {"bos_token": None, "eos_token": SPECIAL[2]},
    {"eos_token": SPECIAL[2], "added_tokens_decoder": {}},
], ids=["only-the-map", "both", "newer"])
def test_a_template_is_given_the_special_tokens_that_transformers_gives_it(
    folder: Path, tmp_path: Path, config: dict[str, Any],
) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **config}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(
        {"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[1], "lstrip": False}}))
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALKS[0], tokenize=False)
    found = chat_beside(tmp_path / "tokenizer.json")
    assert found is not None and found.learned(TALKS[0])[0] == theirs


NUMBERS = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}99 {% endif %}{% endfor %}"


def talk(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[number % 2], "content": content}
                         for number, content in enumerate(contents)]}


def read(path: Path, *lines: str | dict[str, Any]) -> Responses:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    form = ResponseForm("prompt", "response", 10, chat=Chat(NUMBERS, {}, "here"))
    return read_responses("--train-jsonl", [str(path)], NullTokenizer(99), form)


def test_every_turn_of_the_assistant_is_in_the_loss_of_a_sample_written_by_hand(tmp_path: Path) -> None:
    found = read(tmp_path / "a.jsonl", "", talk("1 2", "3", "4", "5 6"), "  ", "\r")
    sample = {name: values.tolist() for name, values in PackedDataset(found, 10, 0).sample(0).items()}
    assert sample["tokens"] == [1, 2, 3, 99, 4, 5, 6, 0, 0, 0]
    assert sample["labels"] == [2, 3, 99, 4, 5, 6, 99, 0, 0, 0]
    assert sample["loss_mask"] == [0, 1, 1, 0, 1, 1, 1, 0, 0, 0]
    assert found.conversations == len(found) == 1


def test_a_conversation_of_one_turn_is_a_prompt_and_its_response(tmp_path: Path) -> None:
    pair = {"prompt": "1 2", "response": "3"}
    both = read(tmp_path / "a.jsonl", talk("1 2", "3"), pair, {**pair, **talk("7", "8")},
                {**talk("1 2", "3"), "prompt": "7"})
    assert [(tokens.tolist(), learned.tolist()) for tokens, learned in map(both.example, range(4))] \
        == [([1, 2, 3, 99], [False, False, True, True])] * 4
    assert both.conversations == 2


@pytest.mark.parametrize(("line", "fragments"), [
    ({"messages": []}, ["a.jsonl:2:", "they must be a list of role and content", "--messages-key"]),
    ({"messages": "Hello"}, ["str in place of messages"]),
    ({"messages": [{"role": "tool", "content": "1"}]}, ["message 1 has role 'tool'", "system, user, assistant"]),
    ({"messages": ["Hello"]}, ["message 1 has role None"]),
    ({"messages": [{"role": "user", "content": None}]}, ["message 1 has NoneType as content"]),
    (talk("1"), ["no message of the assistant", "nothing to learn"]),
    (talk("1", " "), ["message 2, of the assistant, is empty"]),
    (talk("1", "\ud800"), ["message 2 holds half of a surrogate pair"]),
    (talk("1", "\ufdd0"), ["a.jsonl:2: a message holds U+FDD0"]),
    (talk("1", "word"), ["NullTokenizer takes numbers"]),
    (talk("1 2 3 4 5 6", "7 8 9 10 11"), ["a.jsonl:2: the conversation takes 11 tokens", "--overlong-samples skip"]),
    ("[1]", ["a.jsonl:2:", "a JSON list, not an object"]),
])
def test_a_line_that_is_no_conversation_is_refused_with_its_place(
    tmp_path: Path, line: str | dict[str, Any], fragments: list[str],
) -> None:
    with pytest.raises(DataError) as refusal:
        read(tmp_path / "a.jsonl", talk("1", "2"), line)
    assert [part for part in fragments if part not in str(refusal.value)] == [], str(refusal.value)


def test_the_flags_reach_the_samples_and_the_log_counts_conversations(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(NUMBERS)
    (tmp_path / "a.jsonl").write_text(json.dumps({"talk": talk("1 2", "3")["messages"]}) + "\n\n")
    data = DataConfig(train_jsonl=(str(tmp_path / "a.jsonl"),), chat_template=str(tmp_path / "chat.jinja"),
                      messages_key="talk")
    epoch = text_epoch(RunConfig(model=ModelConfig(seq_length=3), data=data), NullTokenizer(99))
    assert epoch[0].sample(0)["labels"].tolist() == [2, 3, 99]
    assert describe(epoch) == [f"training: 1 examples in 1 samples, 100.0% full; 1 are conversations, written by "
                               f"{tmp_path}/chat.jinja"]


def test_sentencepiece_reads_control_tokens_of_the_plain_template(shared_data: Path) -> None:
    (model,) = (shared_data / "tokenizers" / "sentencepiece_1k").glob("*.model")
    tokenizer = SentencePieceTokenizer(str(model))
    tokens, learned = conversation(TALKS[0], chat_of(DataConfig(), tokenizer), tokenizer)
    said = [token for token, flag in zip(tokens, learned, strict=True) if flag]
    assert said == [*tokenizer.encode("Because."), tokenizer.eod]
    assert tokens == [*tokenizer.encode("user:\nWhy?\nassistant:\n"), *said]


def test_sentencepiece_without_control_symbols_reads_the_parts_of_a_conversation_whole(tmp_path: Path) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user:\nassistant:\nWhy? Because."] * 9), model_writer=written, vocab_size=60,
        hard_vocab_limit=False, minloglevel=2, bos_id=-1, eos_id=-1, user_defined_symbols=["<end>"])
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    tokenizer = SentencePieceTokenizer(str(tmp_path / "tokenizer.model"), "<end>")
    library = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    tokens, learned = conversation(TALKS[0], chat_of(DataConfig(), tokenizer), tokenizer)
    before, said = library.encode("user:\nWhy?\nassistant:\n"), library.encode("Because.<end>")
    assert (tokens, learned) == (before + said, [False] * len(before) + [True] * len(said))
