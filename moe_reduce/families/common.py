"""Keys and tensor names that families of the LLaMA line share."""

import re
from collections.abc import Mapping

from moe_reduce.families.key import Key
from moe_reduce.families.layout import Tensor

SIZES = {
    "vocab_size": Key("vocab_size", int),
    "layers": Key("num_hidden_layers", int),
    "width": Key("hidden_size", int),
    "query_heads": Key("num_attention_heads", int),
    "tied_embeddings": Key("tie_word_embeddings", bool),
    "max_positions": Key("max_position_embeddings", int),
    "init_std": Key("initializer_range", float),
}
KEYS = SIZES | {
    "key_value_heads": Key("num_key_value_heads", int),
    "rope_theta": Key("rope_theta", float),
    "norm_epsilon": Key("rms_norm_eps", float),
}
HEAD_WIDTH = {"head_width": Key("head_dim", int)}
DENSE_KEYS = {"feed_forward_width": Key("intermediate_size", int)}
EXPERT_KEYS = {
    "moe.experts": Key("num_experts", int),
    "moe.active": Key("num_experts_per_tok", int),
    "moe.normalize": Key("norm_topk_prob", bool),
}
EXPERT_ALIASES = {"num_local_experts": "num_experts"}
DEFAULTS = {
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
ACCEPTED = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "use_sliding_window": (False,),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False, None),
}
NO_WINDOW = frozenset({"sliding_window", "max_window_layers"})  # read only where use_sliding_window is true
# Extra layers that predict several tokens at once, which nothing here reads.
NEXT_TOKENS = frozenset(
    {"mtp_transformer_layers", "num_mtp_layers", "num_mtp_modules", "num_nextn_predict_layers", "use_mtp"}
)
CONSTANTS = {"attention_bias": False, "hidden_act": "silu"}

LAYER = "model.layers.{layer}"
ATTENTION = f"{LAYER}.self_attn"
EXPERT = f"{LAYER}.mlp.experts.{{expert}}"
TENSORS = {
    "embedding/table": Tensor("model.embed_tokens.weight"),
    "unembedding/table": Tensor("lm_head.weight"),
    "final_norm/scale": Tensor("model.norm.weight"),
    "layers/attention_norm/scale": Tensor(f"{LAYER}.input_layernorm.weight"),
    "layers/mlp_norm/scale": Tensor(f"{LAYER}.post_attention_layernorm.weight"),
    "layers/attention/query": Tensor(f"{ATTENTION}.q_proj.weight"),
    "layers/attention/key": Tensor(f"{ATTENTION}.k_proj.weight"),
    "layers/attention/value": Tensor(f"{ATTENTION}.v_proj.weight"),
    "layers/attention/output": Tensor(f"{ATTENTION}.o_proj.weight"),
}
INPUT_BIAS_TENSORS = {
    "layers/attention/query_bias": Tensor(f"{ATTENTION}.q_proj.bias"),
    "layers/attention/key_bias": Tensor(f"{ATTENTION}.k_proj.bias"),
    "layers/attention/value_bias": Tensor(f"{ATTENTION}.v_proj.bias"),
}
LATENT_TENSORS = {
    "layers/attention/query_down": Tensor(f"{ATTENTION}.q_a_proj.weight"),
    "layers/attention/query_down_norm/scale": Tensor(f"{ATTENTION}.q_a_layernorm.weight"),
    "layers/attention/query_up": Tensor(f"{ATTENTION}.q_b_proj.weight"),
    "layers/attention/latent": Tensor(f"{ATTENTION}.kv_a_proj_with_mqa.weight"),
    "layers/attention/latent_norm/scale": Tensor(f"{ATTENTION}.kv_a_layernorm.weight"),
    "layers/attention/latent_up": Tensor(f"{ATTENTION}.kv_b_proj.weight"),
}
QK_NORM_TENSORS = {
    "layers/attention/query_norm/scale": Tensor(f"{ATTENTION}.q_norm.weight"),
    "layers/attention/key_norm/scale": Tensor(f"{ATTENTION}.k_norm.weight"),
}
DENSE_TENSORS = {
    "layers/mlp/gate": Tensor(f"{LAYER}.mlp.gate_proj.weight"),
    "layers/mlp/up": Tensor(f"{LAYER}.mlp.up_proj.weight"),
    "layers/mlp/down": Tensor(f"{LAYER}.mlp.down_proj.weight"),
}
EXPERT_TENSORS = {
    "layers/experts/gate": Tensor(f"{EXPERT}.gate_proj.weight"),
    "layers/experts/up": Tensor(f"{EXPERT}.up_proj.weight"),
    "layers/experts/down": Tensor(f"{EXPERT}.down_proj.weight"),
    "layers/router/weight": Tensor(f"{LAYER}.mlp.gate.weight"),
}
SHARED_TENSORS = {
    "layers/shared_expert/gate": Tensor(f"{LAYER}.mlp.shared_experts.gate_proj.weight"),
    "layers/shared_expert/up": Tensor(f"{LAYER}.mlp.shared_experts.up_proj.weight"),
    "layers/shared_expert/down": Tensor(f"{LAYER}.mlp.shared_experts.down_proj.weight"),
}
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # transformers ignores them too


def of_dense_layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layouts of the same parameters in dense layers before experts, which have the same names on disk."""
    return {f"dense_{path}": tensor for path, tensor in tensors.items() if path.startswith("layers/")}


# GGUF files: key of config.json -> key of the metadata, after the name of the architecture
GGUF_KEYS = {
    "num_hidden_layers": Key("block_count", int),
    "hidden_size": Key("embedding_length", int),
    "num_attention_heads": Key("attention.head_count", int),
    "num_key_value_heads": Key("attention.head_count_kv", int, optional=True),
    "max_position_embeddings": Key("context_length", int),
    "rms_norm_eps": Key("attention.layer_norm_rms_epsilon", float),
    "rope_theta": Key("rope.freq_base", float, optional=True),
    "head_dim": Key("attention.key_length", int, optional=True),
}
GGUF_DENSE_KEYS = {"intermediate_size": Key("feed_forward_length", int)}
GGUF_EQUAL = {"rope.dimension_count": "head_dim", "attention.value_length": "head_dim", "vocab_size": "vocab_size"}
GGUF_ACCEPTED = {
    "attention.causal": (True,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}
BLOCK = "blk.{layer}"
GGUF_TENSORS = {
    "embedding/table": Tensor("token_embd.weight"),
    "unembedding/table": Tensor("output.weight"),
    "final_norm/scale": Tensor("output_norm.weight"),
    "layers/attention_norm/scale": Tensor(f"{BLOCK}.attn_norm.weight"),
    "layers/mlp_norm/scale": Tensor(f"{BLOCK}.ffn_norm.weight"),
    "layers/attention/query": Tensor(f"{BLOCK}.attn_q.weight"),
    "layers/attention/key": Tensor(f"{BLOCK}.attn_k.weight"),
    "layers/attention/value": Tensor(f"{BLOCK}.attn_v.weight"),
    "layers/attention/output": Tensor(f"{BLOCK}.attn_output.weight"),
}
GGUF_DENSE_TENSORS = {
    "layers/mlp/gate": Tensor(f"{BLOCK}.ffn_gate.weight"),
    "layers/mlp/up": Tensor(f"{BLOCK}.ffn_up.weight"),
    "layers/mlp/down": Tensor(f"{BLOCK}.ffn_down.weight"),
}
GGUF_QK_NORM_TENSORS = {
    "layers/attention/query_norm/scale": Tensor(f"{BLOCK}.attn_q_norm.weight"),
    "layers/attention/key_norm/scale": Tensor(f"{BLOCK}.attn_k_norm.weight"),
}
GGUF_INPUT_BIAS_TENSORS = {
    "layers/attention/query_bias": Tensor(f"{BLOCK}.attn_q.bias"),
    "layers/attention/key_bias": Tensor(f"{BLOCK}.attn_k.bias"),
    "layers/attention/value_bias": Tensor(f"{BLOCK}.attn_v.bias"),
}
# llama.cpp rotates neighbours in a head in `llama` files, as in the first LLaMA, and halves of a head in all others.
GGUF_NEIGHBOURS = {
    path: GGUF_TENSORS[path]._replace(rotary_pairs=True) for path in ("layers/attention/query", "layers/attention/key")
}
# Of files that state it, how a router scores: softmax is 1 in llama.cpp.
GGUF_EXPERT_ACCEPTED = GGUF_ACCEPTED | {"expert_gating_func": (1,), "expert_weights_scale": (1.0,)}
GGUF_EXPERT_TENSORS = {
    "layers/experts/gate": Tensor(f"{BLOCK}.ffn_gate_exps.weight", "E F D"),
    "layers/experts/up": Tensor(f"{BLOCK}.ffn_up_exps.weight", "E F D"),
    "layers/experts/down": Tensor(f"{BLOCK}.ffn_down_exps.weight", "E D F"),
    "layers/router/weight": Tensor(f"{BLOCK}.ffn_gate_inp.weight"),
}


def gguf_expert_keys(experts: str = "num_experts", width: str = "moe_intermediate_size") -> dict[str, Key]:
    """Keys of a mixture in GGUF files, by those of config.json."""
    names = {
        experts: "expert_count",
        "num_experts_per_tok": "expert_used_count",
        width: "expert_feed_forward_length" if width == "moe_intermediate_size" else "feed_forward_length",
    }
    return GGUF_KEYS | {name: Key(key, int) for name, key in names.items()}
