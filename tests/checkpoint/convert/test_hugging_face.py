"""Hugging Face models come in, compute the same, and go out bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForPreTraining, AutoTokenizer, PreTrainedModel

from megatron_ltd.checkpoint.convert.huggingface.importing import SOURCE
from megatron_ltd.checkpoint.convert.huggingface.tokenizer import carry_out
from megatron_ltd.checkpoint.manifest import read_manifest, write_manifest
from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.text.tokenizer import build_tokenizer
from megatron_ltd.errors import EXIT_COMPLETE
from megatron_ltd.model.bert import BERT
from megatron_ltd.model.gpt import GPT
from megatron_ltd.parallel.collectives import TensorParallel
from tests.checkpoint.hugging_face import (
    MODELS,
    check_bert,
    gpt2,
    lively,
    llama,
    our_model,
    read_in,
    saved,
    weights,
    write_out,
)
from tests.gloo import launch_ranks
from tests.model.tiny import whole_parameters
from tests.train.runs import TINY, pretrain, saved_tensors


@pytest.fixture(scope="module")
def tp() -> Iterator[TensorParallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield TensorParallel(init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
    dist.destroy_process_group()


@pytest.fixture(params=MODELS)
def theirs(request: pytest.FixtureRequest) -> PreTrainedModel:
    return lively(MODELS[request.param]())


def opened(folder: Path) -> PreTrainedModel:
    """As a user opens it, with nothing missing and nothing left over."""
    bert = json.loads((folder / "config.json").read_text())["model_type"] == "megatron-bert"
    kind = AutoModelForPreTraining if bert else AutoModelForCausalLM
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def assert_same_weights(found: Path, wanted: Path) -> None:
    ours, reference = weights(found), weights(wanted)
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def test_what_comes_in_goes_out_bit_for_bit(theirs: PreTrainedModel, tmp_path: Path) -> None:
    source = saved(theirs, tmp_path / "source")
    assert read_in(source, tmp_path / "ours") == EXIT_COMPLETE
    assert write_out(tmp_path / "ours", tmp_path / "back") == EXIT_COMPLETE
    assert_same_weights(tmp_path / "back", source)
    tokens = torch.arange(10)[None] % 61
    with torch.no_grad():
        wanted, found = theirs(tokens), opened(tmp_path / "back")(tokens)
    for name in wanted.keys() & {"logits", "prediction_logits", "seq_relationship_logits"}:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)
    settings = [AutoConfig.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "back")]
    before, after = ({k: v for k, v in table.items() if k != "_name_or_path"} for table in settings)
    assert before == after


def test_a_model_without_its_original_settings_is_described_so_that_it_computes_the_same(
    theirs: PreTrainedModel, tmp_path: Path,
) -> None:
    read_in(saved(theirs, tmp_path / "source"), tmp_path / "ours")
    forget_origin(tmp_path / "ours")
    assert write_out(tmp_path / "ours", tmp_path / "back") == EXIT_COMPLETE
    assert_same_weights(tmp_path / "back", tmp_path / "source")
    tokens = torch.arange(10)[None] % 61
    with torch.no_grad():
        torch.testing.assert_close(opened(tmp_path / "back")(tokens)[0], theirs(tokens)[0], rtol=1e-6, atol=1e-6)


def forget_origin(save_dir: Path) -> None:
    """What a run does that goes on from imported weights: its counters are its own."""
    folder = save_dir / "iter_0000000"
    manifest = read_manifest(folder)
    del manifest.counters[SOURCE]
    write_manifest(folder, manifest)


@torch.no_grad()
def test_logits_are_those_of_transformers(theirs: PreTrainedModel, tp: TensorParallel, tmp_path: Path) -> None:
    read_in(saved(theirs, tmp_path / "source"), tmp_path / "ours")
    model = our_model(tmp_path / "ours", 0, tp)
    config = model.config
    assert config.vocab_size is not None
    word = saved_tensors(tmp_path / "ours", 0)["model.embedding.word.weight"]
    assert config.padded_vocab_size % 128 == 0 and not word[config.vocab_size:].any()
    tokens = torch.randint(0, config.vocab_size, (3, config.seq_length), generator=torch.Generator().manual_seed(5))
    if isinstance(model, BERT):
        check_bert(model, theirs, tokens)
    else:
        check_gpt(model, theirs, tokens)


@torch.no_grad()
def test_the_multipliers_of_completep_and_the_one_of_norms_are_folded_into_the_weights(
    tp: TensorParallel, tmp_path: Path,
) -> None:
    completep = {"parametrization": "completep", "base_hidden_size": 8, "base_num_layers": 4, "init_method_std": 0.5,
                 "apply_layernorm_1p": True}
    [ending] = launch_ranks(pretrain, 1, {**TINY, **completep, "mock_data": True, "vocab_size": 61, "train_iters": 2,
                                          "lr_warmup_iters": 0, "eval_iters": 0, "save": str(tmp_path / "ours")})
    assert ending.code == EXIT_COMPLETE, ending.said
    assert write_out(tmp_path / "ours", tmp_path / "back") == EXIT_COMPLETE
    model = our_model(tmp_path / "ours", 2, tp)
    tokens = torch.randint(0, 61, (3, 32), generator=torch.Generator().manual_seed(5))
    labels = tokens.roll(-1, 1)
    found = model(tokens, labels=labels, loss_mask=torch.ones(tokens.shape), sample_ids=torch.zeros(3).long())
    wanted = opened(tmp_path / "back")(tokens).logits
    assert float(wanted.std()) > 0.3, "logits near zero would agree whatever the model does"
    expected = wanted.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


def check_gpt(model: GPT, theirs: PreTrainedModel, tokens: torch.Tensor) -> None:
    hidden: list[torch.Tensor] = []
    assert model.final_norm is not None
    model.final_norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    labels = tokens.roll(-1, 1)
    found = model(tokens, labels=labels, loss_mask=torch.ones(tokens.shape), sample_ids=torch.zeros(3).long())
    wanted = theirs(tokens).logits
    assert float(wanted.std()) > 0.3, "logits near zero would agree whatever the model does"
    table = whole_parameters(model)
    output = table.get("head.weight", table["embedding.word.weight"])
    logits = (hidden.pop().transpose(0, 1) @ output.T)[..., :wanted.shape[-1]]
    torch.testing.assert_close(logits, wanted, rtol=0.0, atol=1e-5 * float(wanted.abs().max()))
    expected = wanted.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_half_precision_goes_out_as_it_came_in(dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(lively(llama()).to(dtype), tmp_path / "source")
    read_in(source, tmp_path / "ours")
    assert {tensor.dtype for tensor in saved_tensors(tmp_path / "ours", 0).values()} == {torch.float32}
    write_out(tmp_path / "ours", tmp_path / "back")
    assert_same_weights(tmp_path / "back", source)
    assert opened(tmp_path / "back").dtype == dtype
    write_out(tmp_path / "ours", tmp_path / "wide", "--dtype", "fp32")
    wide, wanted = weights(tmp_path / "wide"), weights(source)
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in wanted.items())


def test_sharded_files_are_read_and_written(tmp_path: Path) -> None:
    theirs = lively(gpt2())
    source = saved(theirs, tmp_path / "source", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    read_in(source, tmp_path / "ours")
    write_out(tmp_path / "ours", tmp_path / "back", "--max-shard-bytes", "20000")
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_weights(tmp_path / "back", source)
    with torch.no_grad():
        torch.testing.assert_close(opened(tmp_path / "back")(torch.arange(9)[None]).logits,
                                   theirs(torch.arange(9)[None]).logits, rtol=1e-6, atol=1e-6)


def test_names_without_the_base_models_prefix_and_buffers_of_old_files_are_understood(tmp_path: Path) -> None:
    source = saved(lively(gpt2()), tmp_path / "source")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights(source).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8)
    wanted = weights(source)
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    assert read_in(source, tmp_path / "ours") == EXIT_COMPLETE
    write_out(tmp_path / "ours", tmp_path / "back")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(tmp_path / "back").items())


def test_files_of_a_download_cache_may_be_links(tmp_path: Path) -> None:
    source = saved(lively(gpt2()), tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert read_in(snapshot, tmp_path / "ours") == EXIT_COMPLETE


def test_the_length_to_train_on_may_be_less_than_the_positions(tmp_path: Path) -> None:
    source = saved(gpt2(), tmp_path / "source")
    assert read_in(source, tmp_path / "ours", "--seq-length", "8") == EXIT_COMPLETE
    model = RunConfig.from_dict(read_manifest(tmp_path / "ours" / "iter_0000000").config).model
    assert (model.seq_length, model.max_positions) == (8, 24)
    assert write_out(tmp_path / "ours", tmp_path / "back") == EXIT_COMPLETE
    assert_same_weights(tmp_path / "back", source)


@pytest.mark.parametrize("kind", ["BertWordPieceLowerCase", "BertWordPieceCase"])
def test_an_exported_vocabulary_is_opened_as_the_tokenizer_it_was(tmp_path: Path, kind: str) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "Dog", "##s", "a"]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    (tmp_path / "out").mkdir()
    settings = DataConfig(tokenizer_type=kind, vocab_file=str(tmp_path / "vocab.txt"))  # type: ignore[arg-type]
    assert carry_out(settings, tmp_path / "out", None) == ["vocab.txt"]
    opened_again = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = build_tokenizer(settings, None)
    assert opened_again("a Dogs", add_special_tokens=False)["input_ids"] == ours.encode("a Dogs")
    assert ours.encode("a Dogs") == ([8, 5, 7] if kind == "BertWordPieceLowerCase" else [8, 6, 7])
