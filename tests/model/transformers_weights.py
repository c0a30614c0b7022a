"""How weights of `transformers` models are called and laid out here. The same mappings hold for gradients."""

from collections.abc import Mapping

import torch

from megatron_ltd.config.model import ModelConfig

Tensors = dict[str, torch.Tensor]


def grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rows of separate projections, put together by key/value head."""
    groups, d = config.query_groups, config.head_dim
    parts = [part.reshape(groups, -1, d, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def padded(table: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return torch.cat((table, table.new_zeros(config.padded_vocab_size - len(table), table.shape[1])))


def of_gpt2(theirs: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """GPT-2 keeps its matrices as [in, out], and queries, keys and values one after the other."""
    ours = {
        "embedding.word.weight": padded(theirs["transformer.wte.weight"], config),
        "embedding.position.weight": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"], "final_norm.bias": theirs["transformer.ln_f.bias"],
    }
    for i in range(config.num_layers):
        old, new = f"transformer.h.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            ours[f"{new}attention_norm.{kind}"] = theirs[f"{old}ln_1.{kind}"]
            ours[f"{new}mlp_norm.{kind}"] = theirs[f"{old}ln_2.{kind}"]
            query, key, value = theirs[f"{old}attn.c_attn.{kind}"].t().chunk(3)
            ours[f"{new}attention.qkv.{kind}"] = grouped(query, key, value, config)
            ours[f"{new}attention.proj.{kind}"] = theirs[f"{old}attn.c_proj.{kind}"].t()
            ours[f"{new}mlp.fc1.{kind}"] = theirs[f"{old}mlp.c_fc.{kind}"].t()
            ours[f"{new}mlp.fc2.{kind}"] = theirs[f"{old}mlp.c_proj.{kind}"].t()
    return ours


def of_llama(theirs: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    ours = {"embedding.word.weight": padded(theirs["model.embed_tokens.weight"], config),
            "final_norm.weight": theirs["model.norm.weight"]}
    if not config.tied:
        ours["head.weight"] = padded(theirs["lm_head.weight"], config)
    for i in range(config.num_layers):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        query, key, value = (theirs[f"{old}self_attn.{part}_proj.weight"] for part in "qkv")
        ours[f"{new}attention_norm.weight"] = theirs[f"{old}input_layernorm.weight"]
        ours[f"{new}attention.qkv.weight"] = grouped(query, key, value, config)
        ours[f"{new}attention.proj.weight"] = theirs[f"{old}self_attn.o_proj.weight"]
        ours[f"{new}mlp_norm.weight"] = theirs[f"{old}post_attention_layernorm.weight"]
        for part, name in (("gate", "gate"), ("up", "up"), ("down", "fc2")):
            ours[f"{new}mlp.{name}.weight"] = theirs[f"{old}mlp.{part}_proj.weight"]
    return ours


def of_gpt_neox(theirs: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """GPT-NeoX too keeps query, key and value of one head together."""
    ours = {"embedding.word.weight": padded(theirs["gpt_neox.embed_in.weight"], config),
            "head.weight": padded(theirs["lm_head.weight"], config)}
    names = {"attention_norm": "input_layernorm", "attention.qkv": "attention.query_key_value",
             "attention.proj": "attention.dense", "mlp_norm": "post_attention_layernorm",
             "mlp.fc1": "mlp.dense_h_to_4h", "mlp.fc2": "mlp.dense_4h_to_h"}
    for kind in ("weight", "bias"):
        ours[f"final_norm.{kind}"] = theirs[f"gpt_neox.final_layer_norm.{kind}"]
        for i in range(config.num_layers):
            for new, old in names.items():
                ours[f"layers.{i}.{new}.{kind}"] = theirs[f"gpt_neox.layers.{i}.{old}.{kind}"]
    return ours


def of_bloom(theirs: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """Bloom keeps query, key and value of one head together."""
    ours = {"embedding.word.weight": padded(theirs["transformer.word_embeddings.weight"], config)}
    names = {"attention_norm": "input_layernorm", "attention.qkv": "self_attention.query_key_value",
             "attention.proj": "self_attention.dense", "mlp_norm": "post_attention_layernorm",
             "mlp.fc1": "mlp.dense_h_to_4h", "mlp.fc2": "mlp.dense_4h_to_h"}
    for kind in ("weight", "bias"):
        ours[f"embedding.norm.{kind}"] = theirs[f"transformer.word_embeddings_layernorm.{kind}"]
        ours[f"final_norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for i in range(config.num_layers):
            for new, old in names.items():
                ours[f"layers.{i}.{new}.{kind}"] = theirs[f"transformer.h.{i}.{old}.{kind}"]
    return ours


def of_megatron_bert(theirs: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """`transformers` splits what Megatron-LM's BERT keeps in one projection; its norms lie in the same places."""
    ours = {
        "embedding.word.weight": padded(theirs["bert.embeddings.word_embeddings.weight"], config),
        "embedding.position.weight": theirs["bert.embeddings.position_embeddings.weight"],
        "lm_head.bias": padded(theirs["cls.predictions.bias"][:, None], config)[:, 0],
    }
    names = {"final_norm": "bert.encoder.ln", "lm_head.dense": "cls.predictions.transform.dense",
             "lm_head.norm": "cls.predictions.transform.LayerNorm"}
    if not config.bert_no_binary_head:
        ours["embedding.token_type.weight"] = theirs["bert.embeddings.token_type_embeddings.weight"]
        names |= {"pooler": "bert.pooler.dense", "binary_head": "cls.seq_relationship"}
    for i in range(config.num_layers):
        old, new = f"bert.encoder.layer.{i}.", f"layers.{i}."
        names |= {f"{new}attention_norm": f"{old}attention.ln", f"{new}attention.proj": f"{old}attention.output.dense",
                  f"{new}mlp_norm": f"{old}ln", f"{new}mlp.fc1": f"{old}intermediate.dense",
                  f"{new}mlp.fc2": f"{old}output.dense"}
        for kind in ("weight", "bias"):
            query, key, value = (theirs[f"{old}attention.self.{part}.{kind}"] for part in ("query", "key", "value"))
            ours[f"{new}attention.qkv.{kind}"] = grouped(query, key, value, config)
    return ours | {f"{new}.{kind}": theirs[f"{old}.{kind}"] for new, old in names.items()
                   for kind in ("weight", "bias")}
