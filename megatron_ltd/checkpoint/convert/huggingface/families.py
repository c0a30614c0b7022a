"""What is known of the models of `transformers`, as tables: which are read, under which names, with which defaults."""

from collections.abc import Callable, Mapping
from typing import Any

FAMILY_OF = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama",
             "smollm3": "llama", "olmo2": "olmo2", "bloom": "bloom",
             "megatron-bert": "megatron-bert", "vit": "vit"}
"""model_type -> how its weights are laid out."""

ARCHITECTURE = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
                "olmo2": "Olmo2ForCausalLM", "bloom": "BloomForCausalLM",
                "megatron-bert": "MegatronBertForPreTraining", "vit": "ViTForImageClassification"}
"""model_type -> the class that opens an exported model."""

OTHERS = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"),
                    "its embeddings are scaled and its norms multiply by 1 + weight"),
    "phi3": "its projections are fused and some channels of a head are not rotated",
    **dict.fromkeys(("phi", "gpt_neox", "gptj", "falcon", "cohere", "cohere2"), "attention and MLP run in parallel"),
    "starcoder2": "it has LayerNorm and GELU with rotary positions",
    "gpt_bigcode": "all queries share one key and value head beside learned positions",
    "opt": "its learned positions are offset",
    "mpt": "its norms have no biases",
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v2", "deepseek_v3", "gpt_oss"),
                    "it has experts"),
    "olmo3": "its layers with and without a window have different rotary frequencies",
    "olmo": "its norms have no weights",
    "granite": "it has multipliers on embeddings, attention, residuals and logits",
    **dict.fromkeys(("bert", "roberta"),
                    "its norms stand after the residual sum; only Megatron's pre-norm BERT is supported"),
}
"""model_type of well-known models -> why they are not supported."""

_LAYERS = {"num_hidden_layers": "num_layers", "hidden_size": "hidden_size",
           "num_attention_heads": "num_attention_heads"}
_DECODER = {**_LAYERS, "num_key_value_heads": "query_groups", "head_dim": "head_dim", "intermediate_size": "ffn",
            "max_position_embeddings": "max_positions", "rms_norm_eps": "norm_epsilon"}
SIZES: dict[str, dict[str, str]] = {
    "gpt2": {"n_layer": "num_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_inner": "ffn",
             "n_positions": "max_positions", "layer_norm_epsilon": "norm_epsilon"},
    "llama": _DECODER,
    "olmo2": _DECODER,
    "bloom": {"n_layer": "num_layers", "hidden_size": "hidden_size", "n_head": "num_attention_heads",
              "seq_length": "max_positions", "layer_norm_epsilon": "norm_epsilon"},
    "megatron-bert": {**_LAYERS, "intermediate_size": "ffn", "max_position_embeddings": "max_positions",
                      "layer_norm_eps": "norm_epsilon"},
    "vit": {**_LAYERS, "intermediate_size": "ffn", "image_size": "img_h", "patch_size": "patch_dim",
            "num_channels": "num_channels", "layer_norm_eps": "norm_epsilon"},
}
"""Family -> entry -> what it is of `ModelConfig`; in the order in which an export writes them."""

ALIASES = {"bloom": {"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}}
"""model_type -> entry of published files -> the entry that it stands for."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
              "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096,
              "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
              "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096,
              "max_window_layers": 28},
    "smollm3": {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
                "tie_word_embeddings": True, "use_sliding_window": False, "no_rope_layer_interval": 4},
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 8, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "megatron-bert": {"layer_norm_eps": 1e-12, "tie_word_embeddings": True},
    "vit": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
            "image_size": 224, "patch_size": 16, "num_channels": 3, "layer_norm_eps": 1e-12, "num_labels": 2},
}
"""model_type -> entry -> its value where the file leaves it out."""

DERIVED: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "seq_length": lambda read: 2048,  # of BLOOM; its positions are not limited
    "n_inner": lambda read: 4 * read["hidden_size"],
    "num_key_value_heads": lambda read: read["num_attention_heads"],
    "head_dim": lambda read: max(1, read["hidden_size"] // read["num_attention_heads"]),
}
"""Entry -> its value where the file says null, or leaves it out and there is no default."""

ROTARY_BASE = {"smollm3": 2_000_000}
"""model_type -> the base where the file names none, if it is not 10000."""

WITHOUT_MEANING = frozenset((
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "name_or_path", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "attention_dropout",
    "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "classifier_dropout", "gradient_checkpointing", "problem_type", "id2label",
    "label2id", "num_labels", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
    "summary_activation", "summary_first_dropout", "summary_last_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "init_std", "initializer_factor", "pretraining_tp"))
"""What classes read for training, generation, other heads and bookkeeping. Dropout is a setting of each run."""

REQUIRED: dict[str, dict[str, tuple[Any, ...]]] = {
    "any": {"is_encoder_decoder": (False,), "add_cross_attention": (False,), "is_decoder": (False,),
            "tie_encoder_decoder": (False,), "cross_attention_hidden_size": (None,), "pruned_heads": (None, {}),
            "quantization_config": (None,), "compression_config": (None,), "is_causal": (True, None),
            "attention_chunk_size": (None,)},
    "gpt2": {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "reorder_and_upcast_attn": (False,)},
    "llama": {"hidden_act": ("silu", "swish"), "rope_interleaved": (False,), "partial_rotary_factor": (None, 1.0)},
    "olmo2": {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (None, 1.0)},
    "bloom": {"apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False, True)},
    "megatron-bert": {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "type_vocab_size": (2,),
                      "embedding_size": (None,)},
    "vit": {"hidden_act": ("gelu",), "qkv_bias": (True,), "head_dim": (None,)},
}
"""Family -> entry -> values with which it means what we compute; where it is missing it has one of them. "any" also has
what loading, masks and caches read whatever the class."""

COMPUTED_ELSEWHERE = frozenset("""
    logit_scale logits_scaling embedding_multiplier residual_multiplier attention_multiplier final_logit_softcapping
    attn_logit_softcapping query_pre_attn_scalar num_experts num_local_experts n_routed_experts clip_qkv use_qk_norm
    qk_layernorm use_parallel_residual parallel_attn alibi rope_interleave moe_intermediate_size kv_lora_rank
    """.split())
"""Entries with which classes of other models compute; a model of ours that sets one is not what it says it is."""

REMOTE_CODE = "auto_map"
