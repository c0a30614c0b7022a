"""Token Dropping's table and choice, by hand, and each defect of the published implementations."""

import math

import pytest
import torch

from megatron_ltd.token_drop.importance_table import ImportanceTable, LossRecord

CPU = torch.device("cpu")
UNK, CLS, PAD = 1, 2, 0
VOCABULARY = 12


def table(values: list[float] | None = None, beta: float = 0.995, keep: tuple[int, ...] = (),
          drop: tuple[int, ...] = ()) -> ImportanceTable:
    made = ImportanceTable.initial(VOCABULARY if values is None else len(values), initial_importance=10.0, beta=beta,
                                   always_keep=keep, always_drop=drop, device=CPU)
    if values is not None:
        made.values.copy_(torch.tensor(values))
        made.pin()
    return made


def step(importance: ImportanceTable, ids: list[int], losses: list[float], mask: list[float] | None = None) -> None:
    record = LossRecord(len(importance.values), CPU)
    record.add(torch.tensor(ids), torch.tensor(losses), torch.tensor(mask or [1.0] * len(ids)))
    importance.update(record.sums)


def test_a_loss_of_nothing_takes_half_a_percent_of_the_importance() -> None:
    importance = table()
    step(importance, [5], [0.0])
    assert float(importance.values[5]) == pytest.approx(9.95, rel=1e-6)
    assert importance.values[[4, 6]].tolist() == [10.0, 10.0]


def test_an_id_that_is_predicted_twice_moves_once_by_the_mean() -> None:
    """A scattered write would take one of the two losses, whichever comes last."""
    importance = table(beta=0.9)
    step(importance, [5, 7, 5], [2.0, 1.0, 5.0])
    assert float(importance.values[5]) == pytest.approx(0.9 * 10 + 0.1 * 3.5, rel=1e-6)
    assert float(importance.values[7]) == pytest.approx(0.9 * 10 + 0.1 * 1.0, rel=1e-6)


def test_the_largest_are_kept_in_order_of_position() -> None:
    importance = table([0.0, 1.0, 2.0, 3.0, 4.0])
    kept = importance.kept_positions(torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]]), None, 2)
    assert kept.tolist() == [[2, 3], [0, 1]]


def test_among_equals_the_earlier_is_kept() -> None:
    kept = table().kept_positions(torch.full((1, 2000), 3), None, 700)
    assert kept.tolist() == [list(range(700))]


def test_padding_goes_first_whatever_its_id_and_fills_up_only_where_tokens_run_out() -> None:
    importance = table([0.0, 1.0, 2.0, 3.0, 4.0])
    tokens = torch.tensor([[1, 4, 4, 2, 4, 4]])
    real = torch.tensor([[True, True, False, True, False, False]])
    assert importance.kept_positions(tokens, real, 2).tolist() == [[1, 3]]
    assert importance.kept_positions(tokens, real, 4).tolist() == [[0, 1, 2, 3]]


def test_strata_keep_the_most_important_of_each_span() -> None:
    importance = table([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    tokens = torch.tensor([[5, 4, 3, 0, 0, 1, 2, 0]])
    assert importance.kept_positions(tokens, None, 4).tolist() == [[0, 1, 2, 6]]
    assert importance.kept_positions(tokens, None, 4, strata=2).tolist() == [[0, 1, 5, 6]]


def test_special_ids_stay_pinned_after_5000_updates() -> None:
    """With losses recorded for padded slots, [PAD] would pass ordinary ids after 1,343 steps; [UNK], which is predicted
    like any other token, would fall below them after 1,450."""
    importance = table(keep=(UNK, CLS), drop=(PAD,))
    before = importance.values.clone()
    record = LossRecord(VOCABULARY, CPU)
    ids, losses, mask = torch.tensor([UNK, 7, PAD, PAD]), torch.tensor([3.0, 3.0, 15.0, 15.0]), torch.tensor(
        [1.0, 1.0, 0.0, 1.0])
    for _ in range(5000):
        record.clear()
        record.add(ids, losses, mask)
        importance.update(record.sums)
    assert torch.equal(importance.values[[UNK, CLS, PAD]], before[[UNK, CLS, PAD]])
    assert float(importance.values[7]) == pytest.approx(3.0, abs=1e-3)
    tokens = torch.tensor([[PAD, 7, UNK, 8, CLS]])
    assert importance.kept_positions(tokens, None, 2).tolist() == [[2, 4]]
    assert importance.kept_positions(tokens, None, 4).tolist() == [[1, 2, 3, 4]]


def test_predictions_outside_the_loss_do_not_count() -> None:
    importance = table(beta=0.5)
    step(importance, [5, 5, 6], [2.0, 100.0, 100.0], mask=[1.0, 0.0, 0.0])
    assert importance.values[[5, 6]].tolist() == [6.0, 10.0]


def test_a_constant_loss_is_reached_in_fp32() -> None:
    """In half precision the average stops on the way, at 3.4 in fp16 and 4.0 in bf16."""
    importance = table(keep=(UNK,))
    for _ in range(6000):
        step(importance, [5], [3.0])
    assert float(importance.values[5]) == pytest.approx(3.0, abs=1e-4)


def test_sums_do_not_depend_on_order_or_on_how_the_batch_was_split() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (5000,), generator=generator)
    losses, mask = torch.rand(5000, generator=generator) * 12, torch.ones(5000)
    whole, parts = LossRecord(VOCABULARY, CPU), LossRecord(VOCABULARY, CPU)
    whole.add(ids, losses, mask)
    for rows in torch.randperm(5000, generator=generator).split(37):
        parts.add(ids[rows], losses[rows], mask[rows])
    assert torch.equal(whole.sums, parts.sums)
    for token in range(VOCABULARY):
        mean = float(whole.sums[0, token]) / 2**20 / int(whole.sums[1, token])
        assert mean == pytest.approx(math.fsum(losses[ids == token].tolist()) / int((ids == token).sum()), abs=1e-6)
