"""Settings that enable each policy, and nothing else, in a model of 6 layers on samples of 32 tokens."""

from typing import Any

ENABLED: dict[str, dict[str, Any]] = {
    "superposition": {"token_superposition": 2, "token_superposition_steps": 20, "token_superposition_text": "more"},
    "sequence-curriculum": {"seq_length_curriculum_start_length": 8, "seq_length_curriculum_steps": 20,
                            "seq_length_curriculum_length_step": 8},
    "random": {"random_ltd": True, "random_ltd_start_length": 8},
    "importance": {"token_drop_policy": "importance", "random_ltd_start_length": 8, "random_ltd_layers": "1-4"},
    "tread": {"token_drop_policy": "tread", "random_ltd_start_length": 8},
    "alternate": {"alternate_tokens": 4},
    "layer-drop": {"layer_drop_rate": 0.5},
    "layer-dropout": {"layer_dropout_rate": 0.9, "layer_dropout_steps": 100},
    "progressive-layer-dropping": {"pld_theta": 0.1, "pld_gamma": 1.0},
    "raptr": {"raptr_stages": "0:2"},
    "drop-backward": {"drop_backward_rate": 0.6},
}
"""By the policy's name."""
