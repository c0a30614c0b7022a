"""ViT: against `transformers`, on tensor-parallel layouts, its FLOPs, and its positions at another resolution."""

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import ViTConfig, ViTForImageClassification

from megatron_ltd.checkpoint.convert.huggingface.names import mapping
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.flops import plan_flops
from megatron_ltd.model.arithmetic.shapes import parameter_shapes
from megatron_ltd.model.init import global_name, materialize
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.model.vit import ViT, resized_positions
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.gradients import reduce_replicated
from tests.gloo import run_ranks
from tests.model.tiny import SEED, counted_flops, following, lively_weights, uniform_sets, whole_gradients
from tests.plans import plan_of

LAYERS, CLASSES = 4, 7


def vit_config(**settings: Any) -> ModelConfig:
    """Images of 12 x 12 pixels in 9 patches of 4 x 4, and the class token: 10 tokens."""
    defaults: dict[str, Any] = {
        "family": "vit", "num_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48,
        "img_h": 12, "img_w": 12, "patch_dim": 4, "num_channels": 3, "num_classes": CLASSES, "seq_length": 10}
    return ModelConfig(**(defaults | settings))


def build_vit(config: ModelConfig, tp: TensorParallel, *, dropped: tuple[int, ...] = (), kept: int = 10,
              strata: int = 1) -> ViT:
    model = ViT(config, tp, StageSpan(0, LAYERS, LAYERS), policies=uniform_sets(config, strata), seed=SEED)
    materialize(model, config, prefix="", seed=SEED, device=torch.device("cpu"), draw=False)
    fill(model, lively_weights(model))
    return following(model, plan_of(config.seq_length, LAYERS, kept, dropped)).train()


@torch.no_grad()
def fill(model: ViT, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        parameter.copy_(distribute_tensor(weights[global_name(name, model.config)], parameter.device_mesh,
                                          parameter.placements, src_data_rank=None))


def images(config: ModelConfig, samples: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    assert config.img_h is not None and config.img_w is not None
    return {"x": torch.rand(samples, 3, config.img_h, config.img_w, generator=generator) * 2 - 1,
            "labels": torch.randint(0, CLASSES, (samples, 1), generator=generator),
            "loss_mask": torch.tensor([[1.0], [0.0], [1.0]])[:samples],
            "sample_ids": torch.arange(40, 40 + samples)}


def counterpart(model: ViT) -> ViTForImageClassification:
    """The model of `transformers` with the same weights."""
    config = model.config
    theirs = ViTForImageClassification(ViTConfig(
        hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48, image_size=config.img_h,
        patch_size=4, num_channels=3, num_labels=CLASSES, layer_norm_eps=config.norm_epsilon))
    weights = lively_weights(model)
    known = dict(theirs.named_parameters())
    theirs.load_state_dict({inside(name, known): view.reshape(shape) for entry in mapping("vit", config)
                            for name, (view, shape) in entry.parts(weights[entry.ours]).items()})
    return theirs.eval()


def inside(name: str, known: Collection[str]) -> str:
    """What the library calls a tensor of a file: from version 5 on something else."""
    if name in known:
        return name
    for old, new in (("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
                     ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
                     ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
                     ("output.dense", "mlp.fc2")):
        name = name.replace(old, new)
    return name


def test_logits_loss_and_gradients_are_those_of_transformers(tp: TensorParallel) -> None:
    model = build_vit(vit_config(), tp)
    theirs, batch = counterpart(model), images(model.config)
    logits = theirs(batch["x"]).logits
    torch.testing.assert_close(model.logits(batch["x"], batch["sample_ids"]), logits, rtol=1e-5, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(logits[[0, 2]], batch["labels"][[0, 2], 0], reduction="sum")
    loss = model(**batch)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    ours = whole_gradients(model)
    gradients = dict(theirs.named_parameters())
    for entry in mapping("vit", model.config):
        for name, (view, shape) in entry.parts(ours[entry.ours]).items():
            wanted = gradients[inside(name, gradients)].grad
            scale = float(ours[entry.ours].abs().max())
            torch.testing.assert_close(view.reshape(shape), wanted, rtol=0.0, atol=1e-5 * scale, msg=name)


def test_evaluation_says_how_likely_a_class_is_and_whether_it_comes_first_or_among_five(tp: TensorParallel) -> None:
    model = build_vit(vit_config(), tp).eval()
    batch = images(model.config)
    logits = model.logits(batch["x"], batch["sample_ids"])
    for place in range(CLASSES):
        ranked = logits.argsort(dim=1, descending=True)[:, place:place + 1]
        scored = model(**{**batch, "labels": ranked})
        torch.testing.assert_close(scored[0], logits.log_softmax(dim=1).gather(1, ranked))
        assert scored[1].flatten().tolist() == [float(place == 0)] * 3
        assert scored[2].flatten().tolist() == [float(place < 5)] * 3


def test_another_resolution_interpolates_positions_as_transformers_does(tp: TensorParallel) -> None:
    small = build_vit(vit_config(), tp)
    theirs = counterpart(small)
    large_config = vit_config(img_h=20, img_w=16, seq_length=21)
    large = build_vit(large_config, tp)
    weights = lively_weights(small)
    weights["embedding.position.weight"] = resized_positions(weights["embedding.position.weight"], (3, 3), (5, 4))
    fill(large, weights)
    batch = images(large_config)
    expected = theirs(batch["x"], interpolate_pos_encoding=True).logits
    torch.testing.assert_close(large.logits(batch["x"], batch["sample_ids"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dropped", "kept"), [((), 10), ((1, 2), 3), ((1, 2), 7)])
def test_flops_are_those_that_torch_counts(tp: TensorParallel, dropped: tuple[int, ...], kept: int) -> None:
    config = vit_config()
    model, batch = build_vit(config, tp, dropped=dropped, kept=kept), images(config)
    with counted_flops() as counter:
        model(**batch).sum().backward()
    assert counter.get_total_flops() == 3 * plan_flops(config, plan_of(config.seq_length, LAYERS, kept, dropped))


def test_parameters_have_the_names_and_shapes_that_arithmetic_says(tp: TensorParallel) -> None:
    model = build_vit(vit_config(), tp)
    assert {global_name(name, model.config): tuple(p.shape) for name, p in model.named_parameters()} == \
        parameter_shapes(model.config)


def test_the_class_token_is_dropped_like_any_other(tp: TensorParallel) -> None:
    config = vit_config(hidden_dropout=0.1, attention_dropout=0.1)
    model = build_vit(config, tp, dropped=(1, 2), kept=3)
    ids = torch.arange(600)
    facts_of = {"labels": torch.zeros(600, 1, dtype=torch.int64), "loss_mask": torch.ones(600, 1), "sample_ids": ids}
    drawn: list[torch.Tensor] = []
    original = model.stack._rows

    def record(kept: torch.Tensor, facts: Any) -> torch.Tensor:
        drawn.append(kept)
        return original(kept, facts)

    model.stack._rows = record  # type: ignore[method-assign]
    model(torch.zeros(600, 3, 12, 12), **facts_of)
    shares = [float((kept == 0).any(dim=1).float().mean()) for kept in drawn]
    assert len(shares) == 2 and all(abs(share - 0.3) < 0.06 for share in shares)


def one_layout(rank: int, world_size: int, sequence_parallel: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tp = TensorParallel(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)), sequence_parallel)
    model = build_vit(vit_config(hidden_dropout=0.1), tp, dropped=(1, 2), kept=4, strata=2)
    loss = model(**images(model.config)).sum()
    loss.backward()
    reduce_replicated(model.parameters(), tp)
    return loss.detach(), whole_gradients(model)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_layouts_give_the_loss_and_gradients_of_one_process(sequence_parallel: bool) -> None:
    ((loss, gradients),) = run_ranks(one_layout, 1, False)
    layouts = run_ranks(one_layout, 2, sequence_parallel)
    torch.testing.assert_close(layouts[0][0], loss, rtol=1e-5, atol=1e-5)
    for _, found in layouts:
        assert found.keys() == gradients.keys()
        for name, wanted in gradients.items():
            torch.testing.assert_close(found[name], wanted, rtol=0.0, atol=2e-5 * float(wanted.abs().max()), msg=name)
