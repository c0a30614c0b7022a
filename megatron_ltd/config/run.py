"""All settings of a run."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from megatron_ltd.config.files import CheckpointConfig, DataConfig, LoggingConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.token_drop.registry import POLICIES


@dataclass(frozen=True, kw_only=True)
class TokenDropConfig(*dict.fromkeys(policy.Settings for policy in reversed(POLICIES))):  # type: ignore[misc]
    """Ways to compute less: token dropping, skipped layers, short samples first. Each policy in `token_drop/policies`
    declares its own settings; the flags --random-ltd-... hold for every policy that chooses tokens."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    token_drop: TokenDropConfig = field(default_factory=TokenDropConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, dict[str, Any]]) -> "RunConfig":
        """The inverse of `to_dict`; unknown names raise TypeError."""
        sections = {}
        for section in dataclasses.fields(cls):
            kind: Any = section.default_factory
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.get(section.name, {}).items()}
            sections[section.name] = kind(**given)
        return cls(**sections)

    def digest(self) -> str:
        """SHA-256 of the whole configuration; it must be equal on all ranks."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
