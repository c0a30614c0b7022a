"""The policies against explicit loops in float64: which tokens each layer processes, which layers are skipped, and the
factor of what a layer adds; their FLOPs against torch's counter."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ltd.model.arithmetic.flops import plan_flops
from megatron_ltd.model.init import global_name
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.token_drop.plan import LayerPlan, StepPlan
from megatron_ltd.token_drop.policy import Shape
from megatron_ltd.token_drop.registry import Policies
from megatron_ltd.train.step import cut, in_bags
from tests.model import dense_reference
from tests.model.tiny import (
    CONVOLUTION,
    GPT2_LIKE,
    LLAMA_LIKE,
    NGRAMS,
    SEED,
    assert_gradients_close,
    build_gpt,
    counted_flops,
    loss_and_gradients,
    run,
    tiny_batch,
    tiny_config,
    whole_parameters,
)
from tests.runnable_settings import with_settings
from tests.token_drop import splitmix_reference

LAYERS, TOKENS = 5, 24
POLICIES: dict[str, dict[str, Any]] = {
    "tread": {"token_drop_policy": "tread", "random_ltd_start_length": 8, "random_ltd_strata": 2},
    "tread, a new set every two layers": {"token_drop_policy": "tread", "random_ltd_start_length": 6,
                                          "tread_set_layers": 2, "random_ltd_layers": "0-4"},
    "layer drop over tread": {"layer_drop_rate": 0.4, "layer_drop_layers": "0-3", "token_drop_policy": "tread",
                              "random_ltd_start_length": 8},
    "layer dropout": {"layer_dropout_rate": 0.8, "layer_dropout_steps": 40},
    "layer dropout over tread": {"layer_dropout_rate": 0.6, "layer_dropout_steps": 40, "token_drop_policy": "tread",
                                 "random_ltd_start_length": 8},
    "alternate": {"alternate_tokens": 3},
    "progressive layer dropping": {"pld_theta": 0.2, "pld_gamma": 0.1},
    "raptr over tread": {"raptr_stages": "0:3,20:4,39:5", "token_drop_policy": "tread", "random_ltd_start_length": 8},
    "drop backward over tread": {"drop_backward_rate": 0.5, "token_drop_policy": "tread", "random_ltd_start_length": 8},
}
NO_TOKENS_DROPPED = {"random_ltd": False, "random_ltd_start_length": None, "random_ltd_steps": None}


def policies_of(name: str) -> Policies:
    settings = with_settings(**{**NO_TOKENS_DROPPED, **POLICIES[name]}).token_drop
    return Policies.of(settings, Shape("gpt", LAYERS, TOKENS, SEED))


def explicit_sets(name: str, sample_ids: torch.Tensor) -> dict[int, list[list[int]]]:
    """The kept positions of each layer and sample, by hand."""
    def drawn(number: int, keep: int, strata: int = 1) -> list[list[int]]:
        return [splitmix_reference.kept(SEED, int(sample), number, tokens=TOKENS, keep=keep, strata=strata)
                for sample in sample_ids]

    if name == "tread":
        return dict.fromkeys((1, 2, 3), drawn(1, 8, 2))
    if name == "tread, a new set every two layers":
        return {0: drawn(0, 6), 1: drawn(0, 6), 2: drawn(2, 6), 3: drawn(2, 6), 4: drawn(4, 6)}
    if name.endswith("over tread"):
        return dict.fromkeys((1, 2, 3), drawn(1, 8))
    if name == "alternate":
        return {layer: [list(range(layer % 3, TOKENS, 3))] * len(sample_ids) for layer in (1, 2, 3)}
    return {}


def explicit_draw(step: int, layer: int, policy: int) -> float:
    state = splitmix_reference.state(SEED, step, layer + policy * 2**16 + 2**21)
    return (splitmix_reference.finalise(state) >> 11) / 2**53


def explicit_factors(name: str, step: int) -> dict[int, float]:
    """What each layer's update is multiplied by: 0, or one over the probability that it runs (RAPTR: its root)."""
    if name.startswith("raptr"):  # of layers 1, 2 and 3 one, two or three run: those with the largest draws
        running = 1 if step < 20 else 2 if step < 39 else 3
        largest = sorted((1, 2, 3), key=lambda layer: explicit_draw(step, layer, 4))[-running:]
        return {0: 1.0, 4: 1.0, **dict.fromkeys((1, 2, 3), 0.0), **dict.fromkeys(largest, (3 / running)**0.5)}
    if name.startswith("layer drop over"):
        return {layer: 0.0 if layer < 4 and explicit_draw(step, layer, 0) < 0.4 else 1.0 for layer in range(LAYERS)}
    peak, theta = POLICIES[name].get("layer_dropout_rate", 0.0), POLICIES[name].get("pld_theta", 1.0)
    factors = {}
    for layer in range(LAYERS):
        keep = 1.0 - peak * layer / (LAYERS - 1) * max(0.0, 1.0 - step / 40)
        if name.startswith("progressive"):
            keep = 1.0 - layer / LAYERS * (1.0 - ((1.0 - theta) * math.exp(-0.1 * step) + theta))
        drawn = explicit_draw(step, layer, 3 if name.startswith("progressive") else 1)
        factors[layer] = 0.0 if drawn < 1.0 - keep else 1.0 / keep
    return factors


def explicit_constants(name: str, step: int) -> set[int]:
    """Layers without a backward pass."""
    rate = POLICIES[name].get("drop_backward_rate", 0.0)
    return {layer for layer in range(LAYERS - 1) if explicit_draw(step, layer, 2) < rate}


@pytest.mark.parametrize("settings", [GPT2_LIKE, LLAMA_LIKE], ids=["learned", "rotary"])
@pytest.mark.parametrize("name", POLICIES)
def test_loss_and_gradients_are_those_of_explicit_loops(tp: TensorParallel, settings: dict[str, Any],
                                                        name: str) -> None:
    config, found = tiny_config(**settings), policies_of(name)
    batch = tiny_batch(config)
    model = build_gpt(config, tp)
    model.stack.policies = found
    skipped = set()
    for step in (0, 7, 25, 39):
        weights = dense_reference.leaves(whole_parameters(model))
        expected = dense_reference.loss(weights, config, batch, explicit_sets(name, batch["sample_ids"]),
                                        factors=explicit_factors(name, step), constant=explicit_constants(name, step))
        expected.backward()
        plan = found.plan(step)
        skipped |= set(plan.skipped_layers)
        model.zero_grad()
        loss = run(model, {**batch, "plan": plan})
        loss.backward()
        torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=0.0)
        gradients = {global_name(n, config): p.grad.full_tensor() for n, p in model.named_parameters()
                     if p.grad is not None}
        wanted = {n: w.grad for n, w in weights.items() if w.grad is not None and bool(w.grad.any())}
        assert_gradients_close({n: g for n, g in gradients.items() if n in wanted}, wanted)
    assert bool(skipped) == any(skipping in name for skipping in ("layer drop", "raptr"))


@pytest.mark.parametrize("name", POLICIES)
def test_flops_are_those_that_torch_counts(tp: TensorParallel, name: str) -> None:
    config, found = tiny_config(vocab_size=64), policies_of(name)
    model = build_gpt(config, tp)
    model.stack.policies = found
    plan = found.plan(7)
    with counted_flops() as counter:
        run(model, {**tiny_batch(config, 2), "plan": plan}).backward()
    per_pair = 2 * 2 * config.head_dim * config.num_attention_heads
    not_causal = sum((3 if layer.backward else 1) * per_pair * (k * k - k * (k + 1) // 2) for layer in plan.layers
                     if (k := layer.processed_tokens))
    assert counter.get_total_flops() == 2 * (plan_flops(config, plan) + not_causal)


def test_short_samples_have_the_loss_and_the_gradients_of_explicit_loops_over_their_first_tokens(
    tp: TensorParallel,
) -> None:
    config = tiny_config(**LLAMA_LIKE)
    settings = with_settings(**NO_TOKENS_DROPPED, seq_length_curriculum_start_length=8, seq_length_curriculum_steps=30,
                             seq_length_curriculum_length_step=8).token_drop
    plan = Policies.of(settings, Shape("gpt", LAYERS, TOKENS, SEED)).plan(20)
    assert plan.read_tokens == 16  # 8 + 16 x 20 / 30, in whole eights
    batch, model = tiny_batch(config), build_gpt(config, tp)
    first = {name: tensor[:, :16] if tensor.dim() == 2 else tensor for name, tensor in batch.items()}
    weights = dense_reference.leaves(whole_parameters(model))
    expected = dense_reference.loss(weights, replace(config, seq_length=16), first)
    expected.backward()
    loss = run(model, {**cut(batch, 16), "plan": plan})
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=0.0)
    assert_gradients_close({global_name(n, config): p.grad.full_tensor() for n, p in model.named_parameters()},  # type: ignore
                           {n: w.grad for n, w in weights.items() if w.grad is not None})


def test_evaluation_uses_every_layer_on_every_token(tp: TensorParallel) -> None:
    config = tiny_config()
    batch = tiny_batch(config)
    with torch.no_grad():
        plain = run(build_gpt(config, tp).eval(), batch)
        for name in POLICIES:
            model = build_gpt(config, tp)
            model.stack.policies = policies_of(name)
            assert torch.equal(run(model.eval(), {**batch, "plan": policies_of(name).plan(0)}), plain)


def test_a_layer_without_a_backward_pass_is_a_constant_of_the_step(tp: TensorParallel) -> None:
    """Its weights get no gradient, and those below it get the gradient of the path around it alone."""
    config = tiny_config()
    batch, model = tiny_batch(config), build_gpt(config, tp)
    whole = StepPlan.whole(TOKENS, LAYERS)
    plan = whole.with_layers([(2, LayerPlan(TOKENS, backward=False))])
    expected, gradients = loss_and_gradients(model, batch)
    model.zero_grad()
    loss = run(model, {**batch, "plan": plan})
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert all(p.grad is None for p in model.stack.blocks["2"].parameters())
    above = model.stack.blocks["4"].mlp.fc2.weight.grad
    assert torch.equal(above.full_tensor(), gradients["layers.4.mlp.fc2.weight"])


def loss_of_bags(weights: dense_reference.Weights, config: Any, batch: dict[str, torch.Tensor],
                 size: int) -> torch.Tensor:
    """Token by token: bag j is the mean of its embeddings and predicts the tokens after its last."""
    table, bags = weights["embedding.word.weight"], config.seq_length // size
    total = torch.zeros((), dtype=torch.float64)
    for b, tokens in enumerate(batch["tokens"].tolist()):
        vectors = table[tokens]
        if config.ngram_rows is not None:
            vectors = vectors + dense_reference.ngram_vectors(weights, config, tokens, None)
        means = torch.stack([sum(vectors[j * size:(j + 1) * size]) / size  # type: ignore[misc]
                             for j in range(bags)])
        # The reference looks its tokens up, so that each bag is a row of a table of its own.
        of_bags = {**batch, "tokens": torch.arange(bags).expand(len(batch["tokens"]), -1)}
        hidden = dense_reference.sample_hidden({**weights, "embedding.word.weight": means},
                                               replace(config, seq_length=bags, ngram_rows=None), of_bags, b)
        output = table if config.tied else weights["head.weight"]
        scores = (hidden @ output[:config.vocab_size].T).log_softmax(-1)
        for place in range(size - 1, config.seq_length):
            bag = (place + 1) // size - 1
            total = total - batch["loss_mask"][b, place].double() * scores[bag, batch["labels"][b, place]]
    return total


@pytest.mark.parametrize("settings", [GPT2_LIKE, LLAMA_LIKE, NGRAMS, CONVOLUTION],
                         ids=["learned", "rotary", "n-grams", "convolution"])
@pytest.mark.parametrize("size", [2, 4])
def test_bags_have_the_loss_and_the_gradients_of_explicit_loops(tp: TensorParallel, settings: dict[str, Any],
                                                                size: int) -> None:
    config = tiny_config(**settings)
    batch, model = tiny_batch(config), build_gpt(config, tp)
    weights = dense_reference.leaves(whole_parameters(model))
    expected = loss_of_bags(weights, config, batch, size)
    expected.backward()
    plan = StepPlan.whole(TOKENS // size, LAYERS, fold=size)
    loss = run(model, {**in_bags(batch, size), "plan": plan})
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=0.0)
    gradients = {global_name(n, config): p.grad.full_tensor() for n, p in model.named_parameters()}  # type: ignore
    wanted = {n: w.grad for n, w in weights.items() if w.grad is not None}
    assert_gradients_close(gradients, wanted)


def test_a_short_part_of_a_long_sample_is_read_in_bags_even_if_it_is_as_long_as_other_samples(
    tp: TensorParallel,
) -> None:
    """Half of the length, at first, of samples that are twice as long."""
    config = tiny_config()
    settings = with_settings(**NO_TOKENS_DROPPED, seq_length_curriculum_start_length=12, seq_length_curriculum_steps=30,
                             seq_length_curriculum_length_step=12, token_superposition=2, token_superposition_steps=40,
                             token_superposition_text="more").token_drop
    plan = Policies.of(settings, Shape("gpt", LAYERS, TOKENS, SEED)).plan(0)
    model, short = build_gpt(config, tp), tiny_batch(config)
    assert plan.text_tokens == short["tokens"].shape[1] == TOKENS
    long = {name: torch.cat((tensor, tensor.flip(1)), dim=1) if tensor.dim() == 2 else tensor
            for name, tensor in short.items()}
    expected = loss_of_bags(dense_reference.leaves(whole_parameters(model)), config, short, 2)
    loss = run(model, {**in_bags(cut(long, plan.text_tokens), plan.fold), "plan": plan})
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=0.0)


def test_flops_of_bags_are_those_that_torch_counts(tp: TensorParallel) -> None:
    config = tiny_config(vocab_size=64)
    batch, plan, bags = tiny_batch(config, 2), StepPlan.whole(TOKENS // 4, LAYERS, fold=4), TOKENS // 4
    with counted_flops() as counter:
        run(build_gpt(config, tp), {**in_bags(batch, 4), "plan": plan}).backward()
    not_causal = LAYERS * 3 * 4 * config.head_dim * config.num_attention_heads * (bags * bags - bags * (bags + 1) // 2)
    assert counter.get_total_flops() == 2 * (plan_flops(config, plan) + not_causal)
