"""What several ranks saved is exported as what one process imported."""

from pathlib import Path

import pytest
import torch

from megatron_ltd.checkpoint.layout import find_checkpoint
from megatron_ltd.checkpoint.manifest import read_manifest
from tests.checkpoint.hugging_face import MODELS, lively, llama, read_in, saved, weights, write_out
from tests.checkpoint.hugging_face_ranks import save_again
from tests.gloo import launch_ranks
from tests.train.runs import Corpus, pretrain, write_corpus


@pytest.mark.parametrize("name", ["gpt2", "llama-biases", "qwen2-qkv-biases", "megatron-bert"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 2)], ids=str)
def test_a_save_by_four_ranks_is_exported_bit_for_bit(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    source = saved(lively(MODELS[name]()), tmp_path / "source")
    read_in(source, tmp_path / "ours")
    launch_ranks(save_again, tp * pp, str(tmp_path / "ours"), str(tmp_path / "again"), tp, pp)
    assert len(read_manifest(find_checkpoint(tmp_path / "again")).files) == tp * pp
    assert write_out(tmp_path / "again", tmp_path / "back") == 0
    wanted, found = weights(source), weights(tmp_path / "back")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_an_imported_model_is_trained_on_and_exported_with_its_tokenizer(corpus: Corpus, tmp_path: Path) -> None:
    source = saved(lively(llama(vocab_size=323, num_key_value_heads=4)), tmp_path / "source")
    (source / "tokenizer.json").write_bytes(Path(corpus.tokenizer).read_bytes())
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert read_in(source, tmp_path / "ours") == 0
    settings = {**corpus.settings, "load": str(tmp_path / "ours"), "finetune": True, "use_checkpoint_args": True,
                "tokenizer_model": str(tmp_path / "ours" / "tokenizer" / "tokenizer.json"),
                "save": str(tmp_path / "trained"), "train_iters": 2, "lr": 1e-4, "eval_iters": 0}
    [ending] = launch_ranks(pretrain, 1, settings)
    assert ending.code == 0, ending.said
    assert write_out(tmp_path / "trained", tmp_path / "back") == 0
    before, after = weights(source), weights(tmp_path / "back")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        change = (after[name] - tensor).abs().max()
        assert 0 < change < 1e-3, name
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == Path(corpus.tokenizer).read_bytes()
    assert (tmp_path / "back" / "tokenizer_config.json").is_file()


def test_berts_tokenizer_is_its_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    source = saved(lively(MODELS["megatron-bert"]()), tmp_path / "source")
    words = (shared_data / "tokenizers" / "bert" / "bert-large-uncased-vocab.txt").read_bytes()
    (source / "vocab.txt").write_bytes(words)
    (source / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert read_in(source, tmp_path / "ours") == 0
    data = read_manifest(find_checkpoint(tmp_path / "ours")).config["data"]
    assert data["tokenizer_type"] == "BertWordPieceCase"
    assert Path(data["vocab_file"]).read_bytes() == words
    assert write_out(tmp_path / "ours", tmp_path / "back") == 0
    assert (tmp_path / "back" / "vocab.txt").read_bytes() == words
    assert (tmp_path / "back" / "tokenizer_config.json").is_file()
