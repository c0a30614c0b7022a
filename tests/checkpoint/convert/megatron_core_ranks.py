"""megatron-core's models on CPU ranks: written as distributed checkpoints, and what they compute. Apart from the tests,
whose imports a rank would have to repeat."""

import argparse
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

LAYERS, HIDDEN, HEADS, ROWS, POSITIONS = 4, 32, 4, 64, 24
ARGS: dict[str, Any] = {
    "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "ffn_hidden_size": 4 * HIDDEN,
    "seq_length": POSITIONS, "max_position_embeddings": POSITIONS, "padded_vocab_size": ROWS, "vocab_size": 61,
    "bias_gelu_fusion": False, "position_embedding_type": "learned_absolute"}
LLAMA: dict[str, Any] = {
    "ffn_hidden_size": 48, "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
    "add_bias_linear": False, "group_query_attention": True, "num_query_groups": 2,
    "untie_embeddings_and_output_weights": True}
TODAY: dict[str, Any] = {
    "qk_layernorm": True, "window_size": (5, 0), "window_attn_skip_freq": [1, 0, 1, 1], "no_rope_freq": [0, 0, 1, 0]}
ONE_PLUS: dict[str, Any] = {"qk_layernorm": True, "apply_layernorm_1p": True, "window_size": (3, 0),
                            "window_attn_skip_freq": 2}
KINDS: dict[str, dict[str, Any]] = {"gpt": ARGS, "llama": ARGS | LLAMA, "bert": ARGS, "today": ARGS | LLAMA | TODAY,
                                    "one-plus": ARGS | ONE_PLUS}
SAME_NAME = ("ffn_hidden_size", "normalization", "num_query_groups", "add_bias_linear", "qk_layernorm", "window_size",
             "window_attn_skip_freq", "no_rope_freq")
"""Of a TransformerConfig."""


class Affine:
    """apex's layer norm, without which megatron-core computes no 1 + weight."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shape: torch.Size,
                eps: float) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    apply = forward


def without_gpu() -> None:
    """megatron-core asks for a GPU here and there, where the CPU would do."""
    import megatron.core.tensor_parallel as tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.fusions import fused_layer_norm

    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    on_device = torch.ones
    torch.ones = lambda *sizes, device=None, **more: on_device(*sizes, **more)  # type: ignore[assignment]
    filesystem_async._process_memory = lambda: 0
    fused_layer_norm.HAVE_FUSED_LAYER_NORM = True
    fused_layer_norm.FusedLayerNormAffineFunction = Affine
    tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=contextlib.nullcontext)


def model_of(kind: str, tp: int, pp: int) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.models import backends
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = KINDS[kind]
    one_plus = settings.get("apply_layernorm_1p", False)
    backends.LNImpl = transformer_block.LayerNormImpl = FusedLayerNorm if one_plus else WrappedTorchNorm
    swiglu = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, use_cpu_initialization=True, pipeline_dtype=torch.float32,
        attention_dropout=0.0, hidden_dropout=0.0, init_method_std=0.2, layernorm_zero_centered_gamma=one_plus,
        **{name: settings[name] for name in SAME_NAME if name in settings}, **(swiglu if "swiglu" in settings else {}))
    stage = {"pre_process": parallel_state.is_pipeline_first_stage(), "parallel_output": False,
             "post_process": parallel_state.is_pipeline_last_stage(),
             "share_embeddings_and_output_weights": "untie_embeddings_and_output_weights" not in settings}
    if kind == "bert":
        return BertModel(config, 2, bert_layer_local_spec, ROWS, POSITIONS, add_binary_head=True, **stage)
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    return GPTModel(config, spec, vocab_size=ROWS, max_sequence_length=POSITIONS,
                    position_embedding_type=settings["position_embedding_type"], **stage)


@torch.no_grad()
def loaded(kind: str, folder: str, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of a whole model that megatron-core has loaded from a folder. Shapes: tokens [b, s] -> [b, s, v]"""
    from megatron.core import dist_checkpointing, parallel_state

    parallel_state.initialize_model_parallel(1, 1)
    model = model_of(kind, 1, 1)
    with torch.serialization.safe_globals([getattr]):  # by which Python up to 3.11.3 pickles an enum's member
        found = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)  # type: ignore[operator]
    model.load_state_dict(found["model"])
    if kind == "bert":
        logits = model(tokens, torch.ones_like(tokens), torch.zeros_like(tokens))[0]
    else:
        length = tokens.shape[1]
        later = torch.ones(length, length).triu(1).bool()[None, None]
        logits = model(tokens, torch.arange(length)[None].expand_as(tokens), later)
    parallel_state.destroy_model_parallel()
    return logits


def written(rank: int, world_size: int, folder: str, kinds: list[str], tokens: torch.Tensor) -> list[torch.Tensor]:
    """Write models of tensor 2 x pipeline 2, and say what they compute."""
    without_gpu()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.transformer.enums import AttnBackend

    answers = []
    for kind in kinds:
        parallel_state.initialize_model_parallel(2, 2)
        torch.manual_seed(1 + rank)
        model = model_of(kind, 2, 2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.fill_(0.1)
                elif "layernorm" in name:
                    parameter.copy_(torch.linspace(-0.5, 1.5, len(parameter)))
        args = argparse.Namespace(**KINDS[kind], attention_backend=AttnBackend.auto)
        for wanted in (kind, f"pickled-{kind}"):
            Path(folder, wanted).mkdir(exist_ok=True)
        of_rank = Path(folder, f"pickled-{kind}", f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}_"
                       f"{parallel_state.get_pipeline_model_parallel_rank():03d}")
        of_rank.mkdir()
        layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
        torch.save({"args": argparse.Namespace(**KINDS[kind], **layout), "checkpoint_version": 3.0, "iteration": 5,
                    "model": model.state_dict_for_save_checkpoint()},  # type: ignore[operator]
                   of_rank / "model_optim_rng.pt")
        dist.barrier()
        dist_checkpointing.save({"model": model.sharded_state_dict(), "args": args,  # type: ignore[operator]
                                 "iteration": 5, "checkpoint_version": 3.0}, str(Path(folder, kind)))
        dist.barrier()
        parallel_state.destroy_model_parallel()
        answers.append(loaded(kind, str(Path(folder, kind)), tokens))
    return answers


def answered(rank: int, world_size: int, folders: dict[str, str], tokens: torch.Tensor) -> list[torch.Tensor]:
    """What models in folders compute."""
    without_gpu()
    return [loaded(kind, folder, tokens) for kind, folder in folders.items()]
