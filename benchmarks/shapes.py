"""Which models are timed, and the settings of a run with one of them."""

from dataclasses import dataclass

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig


@dataclass(frozen=True)
class Shape:
    """A GPT with learned positions, LayerNorm, GELU, biases and tied embeddings, and the batch of one step.

    The size of a head is `hidden` / `heads`: 64 in all shapes below, for us and for the peers.
    """

    layers: int
    hidden: int
    heads: int
    sequence_tokens: int
    vocabulary: int
    samples: int

    def describe(self) -> str:
        return (f"{self.layers} layers x {self.hidden}, {self.heads} heads of {self.hidden // self.heads}, sequence "
                f"{self.sequence_tokens:,}, vocabulary {self.vocabulary:,}, {self.samples} samples a step")


SHAPES = {
    "8x256": Shape(8, 256, 4, 512, 8192, 8),
    "12x512": Shape(12, 512, 8, 1024, 50304, 2),
    "125m": Shape(12, 768, 12, 1024, 50304, 16),
    "tiny": Shape(4, 128, 2, 64, 256, 2),
    "350m": Shape(24, 1024, 16, 1024, 50304, 16),
}


def run_config(shape: Shape, *, precision: str, device: str, compiled: bool = False, tensor_parallel: int = 1,
               pipeline_parallel: int = 1, microbatches: int = 1) -> RunConfig:
    """The settings of a run in which all layers but the first and the last may drop tokens.

    How many tokens a dropped layer keeps is said at each step.
    """
    return RunConfig(
        model=ModelConfig(num_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads,
                          seq_length=shape.sequence_tokens, vocab_size=shape.vocabulary),
        token_drop=TokenDropConfig(random_ltd=True, random_ltd_start_length=shape.sequence_tokens),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor_parallel,
                                pipeline_model_parallel_size=pipeline_parallel,
                                distributed_backend="gloo" if device == "cpu" else "auto"),
        training=TrainingConfig(micro_batch_size=shape.samples // microbatches, global_batch_size=shape.samples,
                                train_iters=1, bf16=precision == "bf16", compile=compiled),
        optimizer=OptimizerConfig(lr=1e-4, clip_grad=1.0))
