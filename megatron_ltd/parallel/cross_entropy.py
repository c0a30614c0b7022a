"""The head's projection and the cross-entropy, in one function over chunks of tokens.

The logits of a whole microbatch are often the largest tensor of the last stage. Here a chunk of tokens is projected,
turned into its loss and its gradient, and discarded, so that full logits never exist: neither gathered over the
tensor-parallel axis nor on one rank, neither in forward nor in backward.

    l = x W^T          loss = sum_i m_i (logsumexp(l_i) - l_i[y_i])          dl = m (softmax(l) - onehot(y))
    dx = dl W          dW = dl^T x                                           formed in the forward pass

The z-loss (https://arxiv.org/abs/2204.02311, section 5) keeps logits from drifting, by c times the square of the
logarithm of the softmax's denominator:

    z_i = c logsumexp(l_i)^2                dz_i = 2 c logsumexp(l_i) softmax(l_i)

A row may have several labels, each with a mask of its own: their losses share its logits and are summed.

The vocabulary (the rows of W) is sharded; per chunk the ranks exchange, for each token, one maximum and one sum of two
numbers (vocab-parallel cross-entropy of https://arxiv.org/abs/1909.08053, section 3).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_ltd.parallel.collectives import TensorParallel, all_reduce
from megatron_ltd.parallel.logit_chunks import chunk_tokens
from megatron_ltd.parallel.logit_passes import LogitPasses

_TILE_ROWS = 4096
"""Rows of the weight gradient that are accumulated at once in half precision on CPU, so that the update stays in
cache."""


@dataclass(frozen=True)
class VocabShard:
    """The rows of a vocabulary-sharded table that this process holds.

    Args:
        first: global id of the first local row.
        rows: local rows, the same on every rank.
        valid: local rows that are tokens; the rest is padding and is excluded from the softmax.
        tp: the axis over which the table is sharded.
        passes: compiled arithmetic on logits; None: operation by operation.
    """

    first: int
    rows: int
    valid: int
    tp: TensorParallel
    passes: LogitPasses | None = None

    @classmethod
    def of(cls, rows: int, vocab_size: int, tp: TensorParallel) -> "VocabShard":
        first, count = tp.shard_span(rows)
        return cls(first, count, max(0, min(count, vocab_size - first)), tp)

    def reduce(self, x: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        return x if self.tp.size == 1 else all_reduce(x, self.tp.group, op)

    def chunk_tokens(self, device: torch.device) -> int:
        """Tokens of one chunk: the same on every rank, since the ranks reduce chunk by chunk."""
        return chunk_tokens(device.type, self.rows)

    def without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits with those of the padding set to minus infinity, in place: rows as wide as the table stay aligned,
        and matrix products fast, whatever the size of the vocabulary.

        Shapes:
            [c, v/t] -> the same
        """
        if self.valid < self.rows:
            logits[:, self.valid:].fill_(float("-inf"))
        return logits

    def local_row(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Local row of each id (0 if another rank holds it), and whether this rank holds it."""
        row = ids - self.first
        here = (row >= 0) & (row < self.valid)
        return torch.where(here, row, 0), here


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
                loss_mask: torch.Tensor, shard: VocabShard, z_coefficient: float) -> tuple[torch.Tensor, ...]:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_gradient else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        z_total = losses.new_zeros(())
        step = min(shard.chunk_tokens(hidden.device), hidden.shape[0])
        # Allocated once: on a CPU, fresh memory of this size costs more than the arithmetic on it.
        product = torch.empty(step, shard.rows, dtype=hidden.dtype, device=hidden.device)
        is_half, fused = hidden.dtype != torch.float32, shard.passes is not None
        wide = torch.empty_like(product, dtype=torch.float32) if is_half and not fused else product
        for start in range(0, hidden.shape[0], step):
            chunk = slice(start, start + step)
            x, mask = hidden[chunk], loss_mask[chunk]  # [c, h], [c, k]
            row, here = shard.local_row(labels[chunk])
            gradient = torch.mm(x, weight.t(), out=product[:len(x)])  # [c, v/t]
            if not fused and is_half:
                gradient = wide[:len(x)].copy_(gradient)
            losses[chunk], z_loss = _to_gradient(gradient, bias, row, here, mask, shard, z_coefficient)
            z_total += z_loss
            if grad_hidden is not None and grad_weight is not None:
                if grad_bias is not None:
                    grad_bias += gradient.sum(dim=0, dtype=torch.float32)
                if not fused and is_half:
                    gradient = product[:len(x)].copy_(gradient)
                torch.mm(gradient, weight, out=grad_hidden[chunk])
                _accumulate_outer(grad_weight, gradient, x)
        if needs_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(losses, z_total)
        ctx.set_materialize_grads(False)
        return (losses * loss_mask).sum(), losses, z_total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        # The gradients were formed without the loss scale, so that half precision neither overflows nor underflows
        # there. Saved tensors are not overwritten: a split backward pass runs this code twice.
        factor = grad.float().reshape(1)  # with a dim, since a GPU rounds a scalar tensor to the other factor's dtype
        grad_bias = None if grad_bias is None else (grad_bias * factor).to(bias_dtype)
        return ((grad_hidden * factor).to(grad_hidden.dtype), (grad_weight * factor).to(weight_dtype), grad_bias,
                None, None, None, None)


def _to_gradient(logits: torch.Tensor, bias: torch.Tensor | None, row: torch.Tensor, here: torch.Tensor,
                 mask: torch.Tensor, shard: VocabShard, z_coefficient: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite logits, without their bias, with their gradient.

    Args:
        row: of each label; here: whether this process holds it.

    Returns:
        the loss of each label, and the sum of the z-loss.

    Shapes:
        logits [c, v/t], bias [v/t], row, here and mask [c, k] -> [c, k], scalar
    """
    if shard.passes is not None:
        local_largest, total, of_label = shard.passes.statistics(logits, bias, row, shard.valid)
        largest = shard.reduce(local_largest, dist.ReduceOp.MAX)
        total, target = total * (local_largest - largest).exp(), (of_label - largest).where(here, 0.0)
    else:
        if bias is not None:
            logits += bias
        largest = shard.reduce(shard.without_padding(logits).amax(dim=1, keepdim=True), dist.ReduceOp.MAX)
        logits -= largest
        target = logits.gather(1, row).where(here, 0.0)
        total = logits.exp_().sum(dim=1, keepdim=True)
    sums = shard.reduce(torch.cat((total, target), dim=1))  # [c, 1 + k]
    denominator, target = sums[:, :1], sums[:, 1:]
    of_softmax = mask.sum(dim=1, keepdim=True)
    z_loss = of_softmax.new_zeros(())
    if z_coefficient > 0.0:
        log_sum = denominator.log() + largest
        z_loss = z_coefficient * (of_softmax * log_sum.square()).sum()
        of_softmax = of_softmax * (1.0 + 2.0 * z_coefficient * log_sum)
    factor = of_softmax / denominator
    if shard.passes is not None:
        shard.passes.to_gradient(logits, bias, row, shard.valid, largest, factor, mask * here)
    else:
        logits.mul_(factor).scatter_add_(1, row, -(mask * here))
    return denominator.log() - target, z_loss


def _accumulate_outer(total: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor) -> None:
    """total += gradient^T x in fp32. Shapes: total [v/t, h], gradient [c, v/t], x [c, h]"""
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.t(), x)
    elif gradient.device.type == "cpu":
        for part, columns in zip(total.split(_TILE_ROWS), gradient.split(_TILE_ROWS, dim=1), strict=True):
            part += columns.t() @ x
    else:
        # The product is not rounded to half precision before it is added, and needs no memory of its own.
        torch.addmm(total, gradient.t(), x, out_dtype=torch.float32, out=total)


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor,
              shard: VocabShard, bias: torch.Tensor | None = None,
              z_coefficient: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the masked cross-entropy over tokens and, without gradient, the cross-entropy of each token, and the sum
    of the masked z-loss.

    The gradient of the first sum is that of both: they have the same mask, and so the same weight. The gradient of
    `hidden` is this rank's part; the caller's `TensorParallel.enter` sums the parts.

    Args:
        hidden: after `TensorParallel.enter`, the same on all ranks.
        weight: local rows of the output embedding.
        labels: global token ids, all below the vocabulary size.
        loss_mask: fp32 weight of each label.
        bias: local rows of the logits' bias.
        z_coefficient: c; 0 for no z-loss.

    Shapes:
        hidden [n, h], weight [v/t, h], labels and loss_mask [n], or [n, k] with several labels a row, bias [v/t] ->
        scalar fp32, the shape of labels in fp32, scalar fp32
    """
    rows = len(hidden)
    total, losses, z_total = _HeadLoss.apply(hidden, weight, bias, labels.reshape(rows, -1),
                                             loss_mask.reshape(rows, -1), shard, z_coefficient)
    return total, losses.view(labels.shape), z_total


@torch.no_grad()
def token_log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, shard: VocabShard,
                            bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label, and whether it is the most probable token (ties go to the lowest id).

    Shapes:
        hidden [n, h], weight [v/t, h], labels [n], bias [v/t] -> [n] fp32, [n] bool
    """
    log_probabilities, greedy = [], []
    step = shard.chunk_tokens(hidden.device)
    for start in range(0, hidden.shape[0], step):
        chunk = slice(start, start + step)
        logits = (hidden[chunk] @ weight.t()).float()
        if bias is not None:
            logits += bias
        row, here = shard.local_row(labels[chunk])
        local_largest = shard.without_padding(logits).amax(dim=1, keepdim=True)
        largest = shard.reduce(local_largest, dist.ReduceOp.MAX)
        nowhere = torch.iinfo(row.dtype).max
        best = (logits.argmax(dim=1) + shard.first).where(local_largest[:, 0] == largest[:, 0], nowhere)
        target = (logits.gather(1, row[:, None])[:, 0] - largest[:, 0]).where(here, 0.0)
        exponential_sum = (logits - largest).exp_().sum(dim=1)
        sums = shard.reduce(torch.stack((exponential_sum, target), dim=1))
        log_probabilities.append(sums[:, 1] - sums[:, 0].log())
        greedy.append(shard.reduce(best, dist.ReduceOp.MIN) == labels[chunk])
    return torch.cat(log_probabilities), torch.cat(greedy)
