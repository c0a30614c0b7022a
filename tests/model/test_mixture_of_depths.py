"""Mixture-of-Depths against explicit loops in float64: which tokens a router chooses, what they become, what its
predictor learns; and that evaluation and generation see nothing of later tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.flops import plan_flops
from megatron_ltd.model.init import global_name
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.policies.mixture_of_depths import MixtureOfDepths
from tests.model import dense_reference
from tests.model.generated import assert_generated_as_evaluated
from tests.model.tiny import (
    GPT2_LIKE,
    LLAMA_LIKE,
    QWEN3_LIKE,
    assert_gradients_close,
    build_gpt,
    counted_flops,
    documents,
    run,
    tiny_batch,
    tiny_config,
    whole_parameters,
)

ROUTED, TOKENS, WEIGHT = (1, 3), 24, 0.3


def routed_config(**settings: Any) -> ModelConfig:
    return tiny_config(**{"mixture_of_depths_capacity": 0.25, **settings})


def routed_plan(config: ModelConfig) -> StepPlan:
    assert config.mixture_of_depths_capacity is not None
    policy = MixtureOfDepths(ROUTED, config.mixture_of_depths_capacity, config.mixture_of_depths_strata)
    return policy.plan(0, StepPlan.whole(config.seq_length, config.num_layers))


def chosen_tokens(scores: list[float], keep: int, strata: int) -> list[int]:
    """Those with the largest scores of each stratum."""
    span = len(scores) // strata
    return sorted(token for start in range(0, len(scores), span) for token in sorted(
        range(start, start + span), key=lambda t: -scores[t])[:keep // strata])


def explicit_hidden(weights: dense_reference.Weights, config: ModelConfig, batch: dict[str, torch.Tensor], b: int,
                    keep: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample, layer by layer: the stream after the final norm, and the sum of the predictors' losses.

    Args:
        keep: tokens that a routed layer chooses; None: those that its predictor chooses.
    """
    everything = torch.arange(config.seq_length)
    positions = batch["position_ids"][b] if "position_ids" in batch else everything
    stream = weights["embedding.word.weight"][batch["tokens"][b]]
    if config.position_embedding_type == "learned_absolute":
        stream = stream + weights["embedding.position.weight"][positions]
    losses = torch.zeros((), dtype=torch.float64)
    for layer in range(config.num_layers):
        of_layer = {name.removeprefix(f"layers.{layer}."): weight for name, weight in weights.items()
                    if name.startswith(f"layers.{layer}.")}
        chosen, factors = everything, torch.ones(config.seq_length, dtype=torch.float64)
        if layer in ROUTED:
            factors = stream @ of_layer["router.score.weight"][0]
            logits = stream.detach() @ of_layer["router.predictor.weight"][0] + of_layer["router.predictor.bias"]
            places = [t for t in range(config.seq_length) if logits[t] > 0] if keep is None else chosen_tokens(
                factors.tolist(), keep, config.mixture_of_depths_strata)
            for token in range(config.seq_length):
                probability = torch.sigmoid(logits[token])
                losses = losses - torch.log(probability if token in places else 1.0 - probability)
            chosen = torch.tensor(places, dtype=torch.int64)
        if len(chosen):
            mask = dense_reference.allowed(config, batch, b, chosen, chosen, layer)
            of_chosen = positions[chosen]
            updated = dense_reference.layer_output(of_layer, config, stream[chosen], stream[chosen], of_chosen,
                                                   of_chosen, mask, layer,
                                                   (dense_reference.read(config, batch, b, chosen),) * 2)
            update = factors[chosen, None] * (updated - stream[chosen])
            stream = stream.index_put((chosen,), stream[chosen] + update)
    return dense_reference.normed(weights, "final_norm", config, stream), losses


def log_probabilities(weights: dense_reference.Weights, config: ModelConfig, hidden: torch.Tensor,
                      labels: torch.Tensor) -> torch.Tensor:
    table = weights["embedding.word.weight" if config.tied else "head.weight"][:config.vocab_size]
    return (hidden @ table.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize(("settings", "extra", "recompute"), [
    (GPT2_LIKE, {}, "none"), (LLAMA_LIKE, {"mixture_of_depths_strata": 2}, "full"),
    (QWEN3_LIKE, {"mixture_of_depths_capacity": 0.5}, "selective"),
    (GPT2_LIKE, {"mixture_of_depths_capacity": 1.0}, "none"),
    (GPT2_LIKE, {"mixture_of_depths_capacity": 0.5, "qkv_conv_kernel": 3}, "none"),
], ids=["learned", "rotary-strata-recompute", "window-half", "all", "convolution"])
def test_loss_and_gradients_are_those_of_explicit_loops(tp: TensorParallel, settings: dict[str, Any],
                                                        extra: dict[str, Any], recompute: str) -> None:
    config = routed_config(**settings, **extra)
    batch = tiny_batch(config) | documents(config)
    model, plan = build_gpt(config, tp, recompute=recompute), routed_plan(config)
    keep = plan.layers[1].tokens
    assert keep == TOKENS * config.mixture_of_depths_capacity and plan.layers[0].tokens == TOKENS
    weights = dense_reference.leaves(whole_parameters(model))
    expected, predictors = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    for b in range(len(batch["tokens"])):
        hidden, losses = explicit_hidden(weights, config, batch, b, keep)
        found = log_probabilities(weights, config, hidden, batch["labels"][b])
        expected, predictors = expected - (found * batch["loss_mask"][b].double()).sum(), predictors + losses
    (expected + WEIGHT * predictors).backward()
    loss = run(model, {**batch, "plan": plan, "router_weight": WEIGHT})
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=0.0)
    gradients = {global_name(n, config): p.grad.full_tensor() for n, p in model.named_parameters()}  # type: ignore
    wanted = {n: w.grad for n, w in weights.items() if w.grad is not None}
    assert set(gradients) == set(wanted) and "layers.3.router.predictor.bias" in wanted
    assert_gradients_close(gradients, wanted, tolerance=3e-5)  # scores far above one magnify rounding


@pytest.mark.parametrize("settings", [GPT2_LIKE, LLAMA_LIKE, QWEN3_LIKE, LLAMA_LIKE | {"qkv_conv_kernel": 4}],
                         ids=["learned", "rotary", "window", "convolution"])
def test_evaluation_chooses_each_token_by_its_predictor_alone(tp: TensorParallel, settings: dict[str, Any]) -> None:
    config = routed_config(**settings)
    batch = tiny_batch(config) | documents(config) | {"loss_mask": torch.ones(3, TOKENS)}
    model = build_gpt(config, tp).eval()
    weights = dense_reference.leaves(whole_parameters(model))
    with torch.no_grad():
        scores = run(model, {**batch, "plan": routed_plan(config)})
        for b in range(3):
            hidden, _ = explicit_hidden(weights, config, batch, b, None)
            expected = log_probabilities(weights, config, hidden, batch["labels"][b])
            torch.testing.assert_close(scores[0, b].double(), expected, rtol=1e-5, atol=1e-5)
        # The second half is another text; the first does not notice.
        other = {**batch, "tokens": torch.cat((batch["tokens"][:, :12], batch["tokens"][:, 12:].flip(1)), 1)}
        assert torch.allclose(run(model, other)[:, :, :12], scores[:, :, :12], atol=1e-6)


@pytest.mark.parametrize("settings", [GPT2_LIKE, QWEN3_LIKE, QWEN3_LIKE | {"qkv_conv_kernel": 4}],
                         ids=["learned", "rotary-window", "convolution"])
def test_generation_reads_tokens_one_by_one_as_evaluation_reads_them_at_once(tp: TensorParallel,
                                                                             settings: dict[str, Any]) -> None:
    assert_generated_as_evaluated(routed_config(**settings), tp, first=6, stop=TOKENS, every=6)


def test_flops_are_those_that_torch_counts(tp: TensorParallel) -> None:
    config = routed_config(vocab_size=64)
    model, plan = build_gpt(config, tp), routed_plan(config)
    with counted_flops() as counter:
        run(model, {**tiny_batch(config, 2), "plan": plan, "router_weight": WEIGHT}).backward()
    per_pair = 2 * 2 * config.head_dim * config.num_attention_heads
    not_causal = sum(3 * per_pair * (k * k - k * (k + 1) // 2) for k in (layer.tokens for layer in plan.layers))
    assert counter.get_total_flops() == pytest.approx(2 * (plan_flops(config, plan) + not_causal), rel=1e-9)


def test_a_routed_layer_without_a_backward_pass_and_a_skipped_one_leave_their_routers_alone(tp: TensorParallel) -> None:
    config = routed_config()
    model, plan = build_gpt(config, tp), routed_plan(config)
    plan = plan.with_layers([(1, replace(plan.layers[1], backward=False)), (3, replace(plan.layers[3], skipped=True))])
    run(model, {**tiny_batch(config), "plan": plan, "router_weight": WEIGHT}).backward()
    assert all(p.grad is None for p in model.stack.routers.parameters())
    assert model.stack.blocks["0"].mlp.fc2.weight.grad is not None
