"""What a model goes on with is what `transformers` goes on with, on every layout and in every batch."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from megatron_ltd.errors import ConfigError
from megatron_ltd.lm_eval.decode import Sampling, next_tokens
from megatron_ltd.train.process.environment import Launch
from tests.checkpoint.hugging_face import gpt2, lively, llama, read_in, saved, smollm3
from tests.gloo import launch_ranks
from tests.lm_eval import stories
from tests.lm_eval.decoding_ranks import decode
from tests.train.runs import TINY, invented_documents, launched, run, write_corpus
from tools import generate

TEXTS = [[5, 9, 3, 44, 21, 7], [8], [11, 2, 60], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
NEW, NEVER = 9, 10**6
MODELS = {"gpt2": lambda: gpt2(n_layer=4), "llama": lambda: llama(num_hidden_layers=4, num_key_value_heads=4),
          "smollm3": lambda: smollm3(num_hidden_layers=4, use_sliding_window=True, sliding_window=5)}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, str]:
    theirs = lively(MODELS[request.param]())
    folder = tmp_path_factory.mktemp(request.param)
    assert read_in(saved(theirs, folder / "source"), folder / "ours") == 0
    return theirs, str(folder / "ours")


@torch.no_grad()
def greedy(theirs: PreTrainedModel, text: list[int], count: int) -> list[int]:
    """One token after the other, without a cache, as a person would write it down."""
    tokens = list(text)
    for _ in range(count):
        tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(text):]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_greedy_texts_are_those_of_transformers_on_every_layout(
    model: tuple[PreTrainedModel, str], tp: int, pp: int,
) -> None:
    theirs, checkpoints = model
    drawn = Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=3)
    ranks = launch_ranks(decode, tp * pp, checkpoints, TEXTS, NEW, [Sampling(), drawn], tp, pp, NEVER)
    wanted = [greedy(theirs, text, NEW) for text in TEXTS]
    assert all(answers[0] == answers[2] == wanted for answers in ranks)
    [[_, alone, *_]] = launch_ranks(decode, 1, checkpoints, TEXTS, NEW, [Sampling(), drawn], 1, 1, NEVER)
    assert all(answers[1] == answers[3] == alone for answers in ranks)


def test_a_text_ends_with_its_document_and_the_others_go_on(model: tuple[PreTrainedModel, str]) -> None:
    theirs, checkpoints = model
    wanted = [greedy(theirs, text, NEW) for text in TEXTS]
    eod = wanted[0][4]
    [[found, _]] = launch_ranks(decode, 1, checkpoints, TEXTS, NEW, [Sampling()], 1, 1, eod)
    assert found == [tokens[:tokens.index(eod)] if eod in tokens else tokens for tokens in wanted]
    assert len(found[0]) <= 4


def test_a_long_text_is_cut_on_the_left(model: tuple[PreTrainedModel, str]) -> None:
    theirs, checkpoints = model
    text = [i * 7 % 61 for i in range(40)]
    [[found, _]] = launch_ranks(decode, 1, checkpoints, [text], NEW, [Sampling()], 1, 1, NEVER)
    assert found == [greedy(theirs, text[-(24 - NEW):], NEW)]


@pytest.mark.parametrize("part", [{"ngram_rows": 4096, "ngram_length": 3}, {"qkv_conv_kernel": 4}],
                         ids=["n-grams", "convolution"])
def test_texts_of_a_model_that_reads_earlier_tokens_depend_on_no_layout_and_on_no_other_text(
    tmp_path: Path, part: dict[str, int],
) -> None:
    corpus = write_corpus(tmp_path, invented_documents())
    # With large weights at first, each text goes on in its own way.
    run(tmp_path, {**TINY, **corpus.settings, **part, "init_method_std": 0.5, "train_iters": 10, "lr": 2e-2,
                   "save": str(tmp_path / "ours")})
    checkpoints, samplings = str(tmp_path / "ours"), [Sampling(), Sampling(temperature=0.8, seed=3)]
    [[together, drawn, *_]] = launch_ranks(decode, 1, checkpoints, TEXTS, NEW, samplings, 1, 1, NEVER)
    for text, found in zip(TEXTS, together, strict=True):
        [[alone, _]] = launch_ranks(decode, 1, checkpoints, [text], NEW, [Sampling()], 1, 1, NEVER)
        assert alone == [found]
    assert len({tuple(text) for text in together}) == len(TEXTS)
    for answers in launch_ranks(decode, 4, checkpoints, TEXTS, NEW, samplings, 2, 2, NEVER):
        assert answers == [together, drawn] * 2


def test_the_trained_model_tells_the_recorded_story(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (stories.folder(shared_data) / "hf").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(stories.sentencepiece_model(shared_data))
    read_in(tmp_path, tmp_path / "ours")
    recorded = stories.reference(shared_data)
    count = len(recorded["greedy_ids"]) - 2
    capsys.readouterr()
    with launched(Launch()):
        code = generate.main(["--load", str(tmp_path / "ours"), "--prompt", "Once", "--bos-token-id", "1",
                              "--max-new-tokens", str(count)])
    assert code == 0
    said = capsys.readouterr().out
    assert recorded["greedy_text"].strip().startswith(said.strip()[:400]) and len(said) > 400


def test_draws_have_the_probabilities_that_were_asked_for() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = probabilities.log().expand(40_000, 4)

    def shares(sampling: Sampling) -> list[float]:
        drawn = next_tokens(logits, sampling, torch.Generator().manual_seed(0))
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    assert shares(Sampling(temperature=1.0)) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.01)
    assert shares(Sampling(temperature=1.0, top_k=2)) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.01)
    assert shares(Sampling(temperature=1.0, top_p=0.76)) == pytest.approx([5 / 9, 2.5 / 9, 1.5 / 9, 0], abs=0.01)
    assert shares(Sampling(temperature=1.0, top_p=0.1)) == [1.0, 0, 0, 0]
    squared = torch.tensor([0.25, 0.0625, 0.0225, 0.01])
    assert shares(Sampling(temperature=0.5)) == pytest.approx((squared / squared.sum()).tolist(), abs=0.01)
    assert shares(Sampling()) == [1.0, 0, 0, 0]


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1},
                                      {"temperature": float("nan")}])
def test_settings_of_sampling_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Sampling(**settings)  # type: ignore[arg-type]


def test_processes_must_fit_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with launched(Launch()):
        assert generate.main(["--load", "none", "--prompt", "a", "--tensor-model-parallel-size", "2"]) == 20
    assert "start exactly 2" in capsys.readouterr().err
