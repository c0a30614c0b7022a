"""Settings that can run, for tests that break one of them."""

import dataclasses
from typing import Any

from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig

RUNNABLE = RunConfig(
    model=ModelConfig(num_layers=24, hidden_size=96, num_attention_heads=12, seq_length=256, vocab_size=1000),
    token_drop=TokenDropConfig(random_ltd=True, random_ltd_start_length=64, random_ltd_steps=50),
    parallel=ParallelConfig(),
    training=TrainingConfig(micro_batch_size=2, global_batch_size=48, train_iters=100),
    optimizer=OptimizerConfig(lr=1e-3, lr_warmup_iters=10),
    data=DataConfig(data_path=("corpus",), tokenizer_type="HuggingFaceTokenizer", tokenizer_model="tokenizer.json"),
)

SECTION_OF = {field.name: section.name for section in dataclasses.fields(RunConfig)
              for field in dataclasses.fields(getattr(RUNNABLE, section.name))}


def with_settings(config: RunConfig = RUNNABLE, **settings: Any) -> RunConfig:
    """The configuration with these fields changed, whatever section they are in."""
    for field, value in settings.items():
        section = dataclasses.replace(getattr(config, SECTION_OF[field]), **{field: value})
        config = dataclasses.replace(config, **{SECTION_OF[field]: section})
    return config
