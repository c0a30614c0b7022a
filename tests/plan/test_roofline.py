"""The time of a step on a cluster of round numbers, by hand."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.layouts.cluster import Cluster, known_cluster, read_cluster
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.roofline import Parts, Roofline, StepTime
from megatron_ltd.plan.layouts.run_cost import run_cost, step_shares
from megatron_ltd.token_drop.plan import StepPlan
from tests.plans import plan_of
from tests.runnable_settings import with_settings

H, L, S, B, V, F = 64, 4, 128, 2, 512, 256
MODEL = ModelConfig(num_layers=L, hidden_size=H, num_attention_heads=4, seq_length=S, vocab_size=V)
PEAK, MEMORY, NODE, NETWORK = 1e12, 1e9, 2e9, 1e8
CLUSTER = Cluster(8, "round", 1.0, PEAK / 1e12, MEMORY / 1e9, 4, NODE / 1e9, NETWORK / 1e9, 0.5, 0.25, 1.0, 1.0)
WHOLE = StepPlan.whole(S, L)


def roofline(dp: int = 1, microbatches: int = 1, cluster: Cluster = CLUSTER, **parallel: Any) -> Roofline:
    config = RunConfig(model=MODEL, parallel=ParallelConfig(**parallel),
                       training=TrainingConfig(micro_batch_size=B, global_batch_size=B * microbatches * dp))
    sizes = config.parallel
    world = dp * sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size
    return Roofline(config, Layout.of(config, world), cluster, policies(config))


def products(tokens: int) -> float:
    """Seconds of the forward products of a layer."""
    return 2 * tokens * 12 * H * H / (PEAK * 0.5)


def test_products_and_attention_by_hand() -> None:
    fast = replace(CLUSTER, memory_gb_per_second=1e6)  # reading the weights takes no time
    parts = roofline(cluster=fast).parts(WHOLE)
    head = 3 * 2 * B * S * H * V / (PEAK * 0.5)
    assert parts.products == pytest.approx(L * 3 * products(B * S) + head)
    scores = sum(4 * H * (query + 1) for query in range(S))  # one product for the scores, one with the values
    assert parts.attention == pytest.approx(L * 3.5 * B * scores / (PEAK * 0.25))
    again = roofline(cluster=fast, recompute_granularity="full").parts(WHOLE)
    # The MLP's second product, a third of a layer's, is not repeated.
    assert again.products == pytest.approx(L * (4 - 1 / 3) * products(B * S) + head)


def test_small_microbatches_wait_for_the_weights() -> None:
    weights = 4 * (12 * H * H + 13 * H) / MEMORY
    assert weights > products(B * S)
    head = 3 * 2 * B * S * H * V / (PEAK * 0.5)
    assert roofline().parts(WHOLE).products == pytest.approx(L * 3 * weights + head)


def test_tensor_parallel_communication_by_hand() -> None:
    stream = 4 * B * S * H
    all_reduce = 2 * (4 - 1) / 4 * stream / NODE
    layers, head = L * (2 + 2) * all_reduce, 2 * all_reduce
    assert roofline(tensor_model_parallel_size=4).parts(WHOLE).tensor == pytest.approx(layers + head)


def test_data_parallel_communication_that_computation_hides_takes_no_time() -> None:
    numbers = (V + S) * H + L * (12 * H * H + 13 * H) + 2 * H
    share = (8 - 1) / 8 / min(NODE, 4 * NETWORK)  # rings over two nodes of four use four adapters
    hidden = replace(CLUSTER, overlap=1.0)
    exposed = replace(CLUSTER, overlap=1e-9)
    assert roofline(8, cluster=exposed).step(WHOLE).data == pytest.approx(2 * 4 * numbers * share)
    sharded = {"data_parallel_sharding_strategy": "optim_grads"}
    assert roofline(8, 3, exposed, **sharded).step(WHOLE).data == pytest.approx((3 + 1) * 4 * numbers * share)
    slow = replace(hidden, peak_tflops=1e-6)
    assert roofline(8, cluster=slow).step(WHOLE).data == 0.0


def test_a_reduce_scatter_that_is_an_all_reduce_costs_as_much() -> None:
    numbers = (V + S) * H + L * (12 * H * H + 13 * H) + 2 * H
    gloo = replace(CLUSTER, scatter_cost=2.0, overlap=1e-9)
    share = 4 * numbers * (4 - 1) / 4 / NODE
    assert roofline(4, 3, gloo, data_parallel_sharding_strategy="optim_grads").step(WHOLE).data == pytest.approx(
        (3 * 2 + 1) * share)
    split = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
    ring, whole = (roofline(cluster=replace(gloo, scatter_cost=cost), **split).parts(WHOLE).tensor
                   for cost in (1.0, 2.0))
    # A layer gathers six times, two of these for the gradients of weights, and scatters four times; the embedding and
    # the head once each.
    gather = (4 - 1) / 4 * 4 * B * S * H / NODE
    assert ring == pytest.approx((L * (6 + 4) + 2 + 2) * gather)
    assert whole == pytest.approx((L * (6 + 8) + 2 + 4) * gather)
    hidden = roofline(cluster=replace(CLUSTER, overlap=1.0, peak_tflops=1e-3), **split).parts(WHOLE).tensor
    assert hidden == pytest.approx((L * (4 + 4) + 2 + 2) * gather)


@pytest.mark.parametrize(("dp", "microbatches", "sharding", "each"), [
    (1, 1, "no_shard", 0),
    (1, 4, "no_shard", 9),  # three of four microbatches read one gradient, and read and write the sum
    (2, 1, "no_shard", 32),  # weights copied; gradients copied, divided and copied
    (2, 4, "no_shard", 8 + 9),
    (2, 4, "optim_grads", (8 + 4) / 4 + 8 + 4.5),  # weights copied into a buffer, half of them, and out; gradients in;
    (2, 4, "optim_grads_params", 2 * (8 + 4) + 8 + 4.5)])  # half of them added up in three of four
def test_weights_and_gradients_are_copied_and_added_up(dp: int, microbatches: int, sharding: str, each: float) -> None:
    """Bytes for each number of the weights and each microbatch."""
    numbers = (V + S) * H + L * (12 * H * H + 13 * H) + 2 * H
    found = roofline(dp, microbatches, data_parallel_sharding_strategy=sharding).parts(WHOLE).memory
    alone = roofline(1, 1).parts(WHOLE).memory
    assert found == pytest.approx(microbatches * (alone + each * numbers / MEMORY))


def muon_update(dp: int, **parallel: Any) -> float:
    model = roofline(dp, **parallel)
    model.config = replace(model.config, optimizer=OptimizerConfig(optimizer="muon"))
    return model.step(WHOLE).update


def test_muon_multiplies_the_matrices_of_a_process_and_exchanges_them() -> None:
    matrices, others = L * 12 * H * H, (V + S) * H + L * 13 * H + 2 * H
    # Query, key, value and projection are four squares; the MLP's two are four times as long. Five iterations.
    square, long = 6 * H**3, 4 * 4 * H**3 + 2 * H**3
    alone = (106 * matrices + 40 * others) / MEMORY + 5 * L * (4 * square + 2 * long) / (PEAK * 0.5)
    assert muon_update(1) == pytest.approx(alone)
    # Of sixteen weights each of four processes owns four: two of the MLP, one attention of each kind.
    shared = (106 * matrices + 40 * others) / MEMORY + 5 * L * (4 * square + 2 * long) / 4 / (PEAK * 0.5)
    moved = 3 / 4 * 4 * (matrices + matrices) / NODE  # every replica is sent all
    found = muon_update(4)
    assert found == pytest.approx(shared + moved, rel=0.05) and found > shared
    assert muon_update(4, use_distributed_optimizer=True) < found


def test_a_pipeline_waits_as_long_as_all_others_work_on_a_microbatch() -> None:
    model = roofline(pipeline_model_parallel_size=2, microbatches=6)
    works = [sum(model._seconds(rank, WHOLE)) for rank in range(2)]
    time: StepTime = model.step(WHOLE)
    assert time.seconds == pytest.approx(6 * max(works) + min(works) + time.update)
    assert time.bubble == pytest.approx(1 - 6 * sum(works) / 2 / (time.seconds - time.update))


def test_the_parts_of_the_busiest_process_add_up_to_its_work() -> None:
    for plan in (WHOLE, plan_of(S, L, 32, [1, 2])):
        model = roofline(pipeline_model_parallel_size=2, microbatches=3)
        assert model.parts(plan).total == pytest.approx(model.step(plan).busiest)
    assert (Parts(1, 2, 3, 4, 5) * 2).total == 30


def test_a_run_costs_its_steps() -> None:
    config = with_settings(num_layers=6, seq_length=32, random_ltd_start_length=None, random_ltd_steps=None,
                           random_ltd_length_list="0:8,3:16,4:32", global_batch_size=2, train_iters=6,
                           lr_warmup_iters=0)
    layout = Layout.of(config, 1)
    cluster = replace(CLUSTER, gpus=1)
    step = Roofline(config, layout, cluster, policies(config)).step
    found = run_cost(config, layout, cluster)
    by_hand = sum(steps * step(plan_of(32, 6, kept, range(1, 5))).seconds
                  for steps, kept in ((3, 8), (1, 16), (2, 32)))
    assert found.seconds == pytest.approx(by_hand) and found.tokens == 6 * 2 * 32
    whole = run_cost(config, layout, cluster, whole=True)
    assert whole.seconds == pytest.approx(6 * step(StepPlan.whole(32, 6)).seconds) and whole.flops > found.flops
    assert sorted(step_shares(config, 1).values()) == [2, 4, 6]


@pytest.mark.parametrize(("text", "says"), [
    ("gpus = 8", "memory_gb is missing"), ('gpu = "h100"', "give it, or --gpus"),
    ('gpu = "h100"\ngpus = 8\noverlap = 2', "a share"), ('gpu = "h100"\ngpus = 8\nmemory = 2', "no entry"),
    ('gpu = "h100"\ngpus = 0.5', "whole number"), ("gpus = ", "TOML"), ('gpu = "h100"\ngpus = true', "above 0"),
    ("gpu = 3\ngpus = 8", "name of a kind")])
def test_a_file_that_describes_no_cluster_is_refused(tmp_path: Any, text: str, says: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_cluster(path, None)


def test_a_file_may_change_a_known_kind(tmp_path: Any) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text('gpu = "h100"\nnetwork_gb_per_second = 25\n')
    assert read_cluster(path, 64) == replace(known_cluster(64, "h100"), network_gb_per_second=25)
    with pytest.raises(ConfigError, match="in the table"):
        known_cluster(8, "h1000")
