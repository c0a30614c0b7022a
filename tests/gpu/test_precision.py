"""The GPU computes what the CPU computes; in bf16 it errs no more than plain PyTorch does."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.parallel.mesh import Mesh
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.setup import Model, build_model
from tests.gpu.small import LENGTH, batch, loss_and_gradients, losses, settings

LLAMA_LIKE: dict[str, Any] = {
    "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True, "group_query_attention": True, "num_query_groups": 2}
CPU = torch.device("cpu")


def plain_loss(weights: dict[str, torch.Tensor], config: ModelConfig, device: torch.device) -> torch.Tensor:
    """The model of `settings()` in plain PyTorch, batch first, in the weights' dtype; summed cross-entropy in fp32."""
    tokens, labels, mask = (batch()[name].to(device) for name in ("tokens", "labels", "loss_mask"))
    heads, width = config.num_attention_heads, (config.hidden_size,)
    x = weights["embedding.word.weight"][tokens] + weights["embedding.position.weight"]
    for layer in range(config.num_layers):
        w = {name.removeprefix(f"layers.{layer}."): tensor for name, tensor in weights.items()}
        y = F.layer_norm(x, width, w["attention_norm.weight"], w["attention_norm.bias"])
        qkv = F.linear(y, w["attention.qkv.weight"], w["attention.qkv.bias"]).unflatten(-1, (heads, 3, -1))
        y = F.scaled_dot_product_attention(*qkv.permute(3, 0, 2, 1, 4), is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(y, w["attention.proj.weight"], w["attention.proj.bias"])
        y = F.layer_norm(x, width, w["mlp_norm.weight"], w["mlp_norm.bias"])
        y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        x = x + F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    x = F.layer_norm(x, width, weights["final_norm.weight"], weights["final_norm.bias"])
    logits = F.linear(x, weights["embedding.word.weight"][:config.vocab_size]).float()
    return (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()


def plain_loss_and_gradients(model: Model, config: ModelConfig, device: torch.device,
                             dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    weights = {p.global_name: p.parameter.detach().to_local().to(device, dtype).requires_grad_()
               for p in model.parameters}
    loss = plain_loss(weights, config, device)
    loss.backward()
    gradients = {name: weight.grad.float().cpu() for name, weight in weights.items() if weight.grad is not None}
    return float(loss.detach()), gradients


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """By kind of parameter, all layers together: a single small vector's error is a matter of luck."""
    kinds: dict[str, list[str]] = {}
    for name in expected:
        kinds.setdefault(re.sub(r"^layers\.\d+\.", "", name), []).append(name)
    return {kind: float(torch.cat([(found[name] - expected[name]).flatten() for name in names]).norm()
                        / torch.cat([expected[name].flatten() for name in names]).norm())
            for kind, names in kinds.items()}


def test_bf16_errs_at_most_twice_as_much_as_plain_pytorch_in_bf16(gpu: Runtime, cpu_mesh: Mesh) -> None:
    config = settings()
    reference = build_model(config, cpu_mesh, CPU)
    loss, gradients = loss_and_gradients(reference, config, CPU, LENGTH)
    plain, plain_gradients = plain_loss_and_gradients(reference, config.model, gpu.device, torch.bfloat16)
    half = settings(bf16=True)
    ours, our_gradients = loss_and_gradients(build_model(half, gpu.mesh, gpu.device), half, gpu.device, LENGTH)
    # One bf16 rounding of the loss per token is the floor below which the plain error is an accident.
    assert abs(ours - loss) <= 2.0 * max(abs(plain - loss), abs(loss) * 2.0**-9)
    theirs = relative_errors(plain_gradients, gradients)
    for kind, error in relative_errors(our_gradients, gradients).items():
        assert error <= 2.0 * theirs[kind], f"{kind}: {error} against {theirs[kind]}"


def test_the_plain_model_is_the_model(cpu_mesh: Mesh) -> None:
    config = settings()
    reference = build_model(config, cpu_mesh, CPU)
    loss, gradients = loss_and_gradients(reference, config, CPU, LENGTH)
    plain, plain_gradients = plain_loss_and_gradients(reference, config.model, CPU, torch.float32)
    assert plain == pytest.approx(loss, rel=1e-5)
    assert max(relative_errors(plain_gradients, gradients).values()) < 1e-4


@pytest.mark.parametrize("model", [{}, LLAMA_LIKE, LLAMA_LIKE | {"qkv_conv_kernel": 4}],
                         ids=["gpt", "llama", "convolution"])
def test_the_loss_curve_with_dropped_tokens_is_that_of_the_cpu(gpu: Runtime, cpu_mesh: Mesh,
                                                              model: dict[str, Any]) -> None:
    config, kept = settings(model), [32, 32, 64, LENGTH, 48]
    assert losses(config, gpu.mesh, gpu.device, kept) == pytest.approx(losses(config, cpu_mesh, CPU, kept), rel=1e-4)
