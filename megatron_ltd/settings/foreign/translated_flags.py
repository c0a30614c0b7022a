"""Flags of Megatron-LM and Megatron-DeepSpeed that mean exactly what another flag means here."""

TRANSLATED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--zero-stage", "1"): ("--data-parallel-sharding-strategy", "optim_grads"),
    ("--zero-stage", "2"): ("--data-parallel-sharding-strategy", "optim_grads"),
    ("--zero-stage", "3"): ("--data-parallel-sharding-strategy", "optim_grads_params"),
    ("--checkpoint-activations",): ("--recompute-granularity", "full"),
    ("--use-rotary-position-embeddings",): ("--position-embedding-type", "rope"),
    ("--no-pipeline-parallel",): ("--pipeline-model-parallel-size", "1"),
    ("--muon-use-nesterov",): ("--muon-nesterov",),
    ("--muon-no-split-qkv",): ("--no-muon-split-qkv",),
}
"""A flag with its values -> the flag here with its values."""
