"""What a step computes, by hand; and a training step with skipped layers or cut samples against a plain loop."""

from collections.abc import Collection
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.model.arithmetic.flops import head_flops, layer_flops
from megatron_ltd.model.attention.context import ContextMaker, Microbatch
from megatron_ltd.model.gpt import GPT
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.optim.loss_scale import LossScale, after_step
from megatron_ltd.parallel.gradients import local_gradient
from megatron_ltd.parallel.layers import local
from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.flops import step_flops, whole_step_flops
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.train.setup import Model, build_model
from megatron_ltd.train.step import train_step
from tests.gloo import run_ranks
from tests.plans import plan_of
from tests.runnable_settings import with_settings

LENGTH, LAYERS = 16, 4
DEVICE = torch.device("cpu")
CONFIG = RunConfig(
    model=ModelConfig(num_layers=LAYERS, hidden_size=16, num_attention_heads=2, seq_length=LENGTH, vocab_size=40,
                      make_vocab_size_divisible_by=8, init_method_std=0.2),
    token_drop=TokenDropConfig(layer_drop_rate=0.5), parallel=ParallelConfig(),
    training=TrainingConfig(micro_batch_size=2), optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.0))
DROPPING = with_settings(layer_drop_rate=0.3, seq_length_curriculum_start_length=32, seq_length_curriculum_steps=40,
                         seq_length_curriculum_length_step=32)


def test_the_work_of_a_step_is_its_lengths_and_its_draws() -> None:
    """Kept: 64 + 192 t / 50 in steps of 16; read: 32 + 224 t / 40 in steps of 32; layers 1 to 22 drop."""
    works = [policies(DROPPING).plan(step) for step in range(60)]
    assert [(works[step].read_tokens, works[step].kept_tokens) for step in (0, 5, 6, 12, 30, 40, 50)] == [
        (32, 32), (32, 32), (64, 64), (96, 96), (192, 176), (256, 208), (256, 256)]
    assert works == [policies(with_settings(DROPPING)).plan(step) for step in range(60)]
    drawn = [work.skipped_layers for work in works]
    assert len(set(drawn)) == 60 and set().union(*drawn) == set(range(24))
    other = policies(with_settings(DROPPING, seed=4321))
    assert other.plan(3).skipped_layers != drawn[3]


def test_only_listed_layers_are_skipped_and_without_a_rate_none() -> None:
    listed = policies(with_settings(layer_drop_rate=0.9, layer_drop_layers="2,7-9"))
    assert set().union(*(listed.plan(step).skipped_layers for step in range(40))) == {2, 7, 8, 9}
    assert policies(with_settings()).plan(0).skipped_layers == ()


def test_the_flops_of_a_step_are_those_of_what_runs_at_the_length_that_is_read() -> None:
    model = with_settings(seq_length=128).model
    work = plan_of(128, 24, 64, range(1, 23), skipped=(0, 5, 6))
    head = head_flops(model)
    assert head == 2 * 128 * 96 * 1000
    assert step_flops(DROPPING, work) == 3 * (layer_flops(model, 128) + 20 * layer_flops(model, 64) + head)
    assert whole_step_flops(DROPPING, work) == 3 * (24 * layer_flops(model, 128) + head)


def batch(step: int) -> list[dict[str, torch.Tensor]]:
    """Two microbatches of two samples; a fifth of the tokens is masked out of the loss."""
    generator = torch.Generator().manual_seed(step)
    microbatches = []
    for number in range(2):
        text = torch.randint(40, (2, LENGTH + 1), generator=generator)
        mask = (torch.rand(2, LENGTH, generator=generator) > 0.2).float()
        ids = torch.stack([torch.arange(LENGTH) // 5, torch.arange(LENGTH) // 9])
        microbatches.append({
            "tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "document_ids": ids,
            "position_ids": torch.arange(LENGTH).repeat(2, 1), "sample_ids": torch.arange(2) + 4 * step + 2 * number})
    return microbatches


def built() -> Model:
    mesh = build_mesh("cpu", pp=1, dp=1, tp=1, shard_parameters=False, timeout=timedelta(seconds=60))
    return build_model(CONFIG, mesh, DEVICE)


def plain_loss(model: Model, step: int, work: StepPlan) -> torch.Tensor:
    """The mean loss over the tokens that are read and that count, by a loop over the layers that run."""
    (stage,) = model.stages
    assert isinstance(stage, GPT) and stage.embedding is not None and stage.final_norm is not None
    total, counted, end = torch.zeros(()), 0.0, work.read_tokens
    for part in batch(step):
        batch_of = Microbatch(end, part["sample_ids"], part["position_ids"][:, :end], part["document_ids"][:, :end])
        tokens = ContextMaker(stage.config, stage.tp, 0, True, batch_of).whole
        x = stage.embedding(part["tokens"][:, :end], batch_of.positions(), None)
        for layer, block in stage.stack.blocks.items():
            if int(layer) not in work.skipped_layers:
                x = x + block(x, tokens)
        logits = stage.final_norm(x).transpose(0, 1) @ local(stage.output_weight()).t()
        losses = torch.nn.functional.cross_entropy(logits[..., :40].flatten(0, 1), part["labels"][:, :end].flatten(),
                                                   reduction="none")
        mask = part["loss_mask"][:, :end].flatten()
        total, counted = total + (losses * mask).sum(), counted + float(mask.sum())
    return total / counted


def reading(tokens: int, skipped: Collection[int] = ()) -> StepPlan:
    return plan_of(tokens, LAYERS, skipped=skipped)


WORKS = {"skipped": [reading(16, (1, 3)), reading(16, (2,)), reading(16, range(LAYERS))],
         "cut": [reading(5), reading(8), reading(16)],
         "both": [reading(6, (0,)), reading(6), reading(12, (0, 1))]}


def steps_of_both(rank: int, ranks: int, works: list[StepPlan]) -> dict[str, Any]:
    """Losses and weights of the same steps, by `train_step` and by torch's AdamW on a loop over layers."""
    model, reference = built(), built()
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], CONFIG)
    shards = {p.name: local(p.parameter).detach() for p in reference.parameters}
    adam = torch.optim.AdamW([{"params": [t for t in shards.values() if t.dim() > 1], "weight_decay": 0.1},
                              {"params": [t for t in shards.values() if t.dim() == 1], "weight_decay": 0.0}], lr=1e-2)
    found: dict[str, Any] = {"losses": [], "plain_losses": [], "zero": [], "weights": []}
    for step, work in enumerate(works):
        found["losses"].append(train_step(model, optimizer, batch(step), CONFIG, work, learning_rate=1e-2,
                                          loss_scale=1.0, stop_level=0, device=DEVICE).loss)
        found["zero"].append({p.layer for p in model.parameters
                              if not local_gradient(p.parameter).any() and not p.name.endswith("bias")})
        for p in reference.parameters:
            p.parameter.grad = None
        loss = plain_loss(reference, step, work)
        loss.backward()
        found["plain_losses"].append(float(loss.detach()))
        for p in reference.parameters:
            shard = shards[p.name]
            shard.grad = torch.zeros_like(shard) if p.parameter.grad is None else local_gradient(p.parameter).clone()
        adam.step()
        found["weights"].append([(p.name, local(p.parameter).detach().clone(), shards[p.name].clone())
                                 for p in model.parameters])
    return found


@pytest.mark.parametrize("name", WORKS)
def test_steps_are_those_of_a_plain_loop_and_of_torchs_adam_with_zero_gradients(name: str) -> None:
    (found,) = run_ranks(steps_of_both, 1, WORKS[name])
    assert found["losses"] == pytest.approx(found["plain_losses"], rel=1e-6)
    assert found["zero"] == [set(work.skipped_layers) for work in WORKS[name]]
    for step, weights in enumerate(found["weights"]):
        for parameter, ours, plain in weights:
            if not parameter.endswith("qkv.bias"):  # a key's bias has a gradient of nothing but rounding
                torch.testing.assert_close(ours, plain, rtol=0.0, atol=2e-5, msg=f"{parameter} after step {step}")


def gradients_after_losing_one(rank: int, ranks: int) -> str:
    model = built()
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], CONFIG)
    train_step(model, optimizer, batch(0), CONFIG, reading(16, (1,)), learning_rate=1e-2,
               loss_scale=1.0, stop_level=0, device=DEVICE)
    for parameter in model.parameters:
        if parameter.layer in (1, 2):
            parameter.parameter.grad = None
    try:
        model.finish_gradients(reading(16, (1,)))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_gradient_that_is_missing_elsewhere_is_still_found() -> None:
    (said,) = run_ranks(gradients_after_losing_one, 1)
    assert said.startswith("no gradient for stack.blocks.2.") and "blocks.1." not in said


def scaled_steps(rank: int, ranks: int) -> tuple[list[bool], list[float], list[bool]]:
    """Steps in fp16 from a scale at which gradients overflow: whether they updated, and changed, the weights, and their
    scales, which the device and the host must agree on."""
    training = TrainingConfig(micro_batch_size=2, fp16=True, initial_loss_scale=2.0**40, hysteresis=1)
    config = replace(CONFIG, training=training)
    mesh = build_mesh("cpu", pp=1, dp=1, tp=1, shard_parameters=False, timeout=timedelta(seconds=60))
    model = build_model(config, mesh, DEVICE)
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
    known = LossScale.initial(training)
    scale, updated, scales, changed = known.on(DEVICE), [], [], []
    while not any(updated):
        before = [local(p.parameter).clone() for p in model.parameters]
        result = train_step(model, optimizer, batch(0), config, reading(16), learning_rate=1e-2, loss_scale=scale[0],
                            stop_level=0, device=DEVICE)
        scales.append(known.scale)
        assert float(scale[0]) == known.scale
        scale = after_step(scale, result.void, training)
        known = known.after_step(not result.updated, training)
        updated.append(result.updated)
        changed.append(not all(torch.equal(old, local(p.parameter))
                               for old, p in zip(before, model.parameters, strict=True)))
    return updated, scales, changed


def test_the_loss_scale_falls_without_an_update_until_gradients_are_finite() -> None:
    ((updated, scales, changed),) = run_ranks(scaled_steps, 1)
    assert 1 < len(scales) < 40 and scales == [2.0**(40 - step) for step in range(len(scales))]
    assert updated == changed == [False] * (len(scales) - 1) + [True]
