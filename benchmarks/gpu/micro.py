"""Single operations of a step on a GPU, each against another way to compute it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.bench import Bench
from benchmarks.ours import OurModel
from megatron_ltd.model.attention.convolution import convolved, reading_of
from megatron_ltd.model.attention.documents import attend_in_documents, find_documents, has_kernel, most_documents
from megatron_ltd.model.dropout import dropout, token_keys
from megatron_ltd.optim.clip import gradient_norm
from megatron_ltd.parallel.cross_entropy import head_loss
from megatron_ltd.parallel.layers import local
from megatron_ltd.token_drop.sampling import kept_positions, stream_rows
from megatron_ltd.token_drop.stream import add, own, release, take

Tensor = torch.Tensor


def micro(bench: Bench) -> None:
    """Head and loss, stream, norm, sampling, dropout, convolutions, masked attention."""
    for part in (_head, _stream, _norm, _sampling, _dropout, _convolution, _attention):
        part(bench)
        bench.free()


def _rows(bench: Bench, name: str, rows: dict[str, Callable[[], Any]]) -> None:
    for row, call in rows.items():
        bench.write(f"{name}, {row}", ms=1e3 * bench.average(call))


def _head(bench: Bench) -> None:
    for name in ("125m", "125m, vocabulary 50257"):
        shape = bench.shape(name)
        ours = OurModel(bench.config(shape), bench.runtime, on_device=True)
        (stage,) = ours.model.stages
        tokens, device = shape.samples * shape.sequence_tokens, bench.runtime.device
        hidden = torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        table = torch.randn(stage.vocab.rows, shape.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        labels, mask = torch.randint(shape.vocabulary, (tokens,), device=device), torch.ones(tokens, device=device)
        _rows(bench, f"head and loss, {shape.vocabulary}", {
            "ours": lambda hidden=hidden, table=table, labels=labels, mask=mask, vocab=stage.vocab: head_loss(
                hidden, table, labels, mask, vocab)[0].backward(),
            "plain": lambda hidden=hidden, table=table, labels=labels: F.cross_entropy(
                F.linear(hidden, table), labels, reduction="sum").backward()})


def _stream(bench: Bench) -> None:
    shape, device = bench.shape("350m"), bench.runtime.device
    length, samples, kept = shape.sequence_tokens, shape.samples, shape.sequence_tokens // 4
    stream = torch.randn(length, samples, shape.hidden, device=device, dtype=torch.bfloat16)
    positions = kept_positions(1, torch.arange(samples, device=device), torch.arange(1, device=device),
                               sequence_tokens=length, kept_tokens=kept, strata=1)[0]
    rows = stream_rows(positions)
    update = torch.randn(len(rows), shape.hidden, device=device, dtype=torch.bfloat16)
    flat = stream.view(-1, shape.hidden)

    def through() -> None:
        leaf = stream.detach().requires_grad_()
        ours, taken = take(own(leaf), rows)
        release(add(ours, rows, taken * 0.5)).sum().backward()

    _rows(bench, "stream, 1/4 kept", {
        "forward and backward": through, "gather": lambda: flat.index_select(0, rows),
        "index_add": lambda: flat.index_add_(0, rows, update),
        "index_copy of the sum": lambda: flat.index_copy_(0, rows, flat.index_select(0, rows) + update)})


def _norm(bench: Bench) -> None:
    ours = OurModel(bench.config(bench.shape("350m")), bench.runtime, on_device=True)
    ours.step(ours.config.model.seq_length)
    parameters = [named.parameter for named in ours.model.parameters]
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    _rows(bench, "gradient norm", {
        "ours": lambda: gradient_norm(parameters),
        "foreach, last sum in fp64": lambda: torch.stack(torch._foreach_norm(gradients)).double().square().sum()})


def _sampling(bench: Bench) -> None:
    shape, device = bench.shape("350m"), bench.runtime.device
    samples, layers = torch.arange(shape.samples, device=device), torch.arange(1, shape.layers - 1, device=device)
    _rows(bench, f"kept positions of {len(layers)} layers", {
        f"kept 1/{share}": lambda share=share: kept_positions(  # type: ignore[misc]
            1, samples, layers, sequence_tokens=shape.sequence_tokens, kept_tokens=shape.sequence_tokens // share,
            strata=1) for share in (2, 4)})


def _dropout(bench: Bench) -> None:
    shape, device = bench.shape("350m"), bench.runtime.device
    x = torch.randn(shape.sequence_tokens, shape.samples, shape.hidden, device=device, dtype=torch.bfloat16)
    keys = token_keys(1, 0, 0, torch.arange(shape.samples, device=device),
                      torch.arange(shape.sequence_tokens, device=device)[:, None])
    _rows(bench, "dropout", {"ours": lambda: dropout(x, keys, 0.1), "torch's": lambda: F.dropout(x, 0.1)})


def _convolution(bench: Bench) -> None:
    """Of queries, keys and values, forward and backward."""
    shape, device = bench.shape("350m"), bench.runtime.device
    x = torch.randn(shape.sequence_tokens, shape.samples, 3 * shape.hidden, device=device, dtype=torch.bfloat16,
                    requires_grad=True)
    weight = torch.randn(3 * shape.hidden, 3, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    kept = torch.arange(0, shape.sequence_tokens, 4, device=device)[:, None] + torch.arange(
        shape.samples, device=device) % 4
    reading = reading_of(kept, 3)
    compiled = torch.compile(convolved)

    def conv1d() -> Tensor:
        filters = F.pad(weight.flip(1), (0, 1), value=1.0).to(x.dtype)[:, None]
        return F.conv1d(F.pad(x.permute(1, 2, 0), (3, 0)), filters, groups=len(filters)).permute(2, 0, 1)

    _rows(bench, f"convolution of {shape.sequence_tokens} tokens", {
        "ours": lambda: convolved(x, weight, None).backward(grad),
        "ours, compiled": lambda: compiled(x, weight, None).backward(grad),
        "torch's, with transpositions": lambda: conv1d().backward(grad),
        "ours, 1/4 kept": lambda: convolved(x[:len(kept)], weight, reading).backward(grad[:len(kept)])})


def _attention(bench: Bench) -> None:
    shape, device = bench.shape("350m"), bench.runtime.device
    tokens, heads, groups = shape.sequence_tokens, shape.heads, max(shape.heads // 4, 1)

    def random(count: int) -> Tensor:
        return torch.randn(shape.samples, count, tokens, 64, device=device, dtype=torch.bfloat16, requires_grad=True)

    query, key, value = (random(heads) for _ in range(3))
    few_keys, few_values = (random(groups) for _ in range(2))
    documents = (torch.arange(tokens, device=device) * 4 // tokens)[None]
    mask = (documents[:, :, None] == documents[:, None]) & torch.ones(
        tokens, tokens, dtype=torch.bool, device=device).tril()
    mask = mask[:, None].expand(shape.samples, 1, tokens, tokens)

    def attend(keys: Tensor, values: Tensor, **how: Any) -> Callable[[], None]:
        return lambda: F.scaled_dot_product_attention(query, keys, values, **how).sum().backward()

    def repeated() -> None:
        keys, values = (part.repeat_interleave(heads // groups, dim=1) for part in (few_keys, few_values))
        F.scaled_dot_product_attention(query, keys, values, is_causal=True).sum().backward()

    each = documents.expand(shape.samples, -1)
    found = find_documents(each, most_documents(each), causal=True)
    packed = {"documents by their kernel": lambda: attend_in_documents(query, key, value, found).sum().backward()}
    _rows(bench, f"attention of {tokens} tokens, forward and backward", {
        "causal": attend(key, value, is_causal=True), "mask of documents": attend(key, value, attn_mask=mask),
        **(packed if has_kernel(device, query.dtype, 64) else {}),
        "grouped, repeated": repeated,
        "grouped, enable_gqa": attend(few_keys, few_values, is_causal=True, enable_gqa=True)})
