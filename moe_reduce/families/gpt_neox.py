"""GPT-NeoX (arXiv:2204.06745), such as Pythia: LayerNorm, biases, and a GELU block, parallel to attention or after it.

Queries, keys and values are one matrix whose rows are [heads, 3, head width].
"""

import re

from moe_reduce.families import common
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.families.key import Key
from moe_reduce.families.layout import Tensor

LAYER = "gpt_neox.layers.{layer}"
FUSED = f"{LAYER}.attention.query_key_value"

FAMILY = HuggingFaceFamily(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    takes_unstated=True,
    keys=common.SIZES
    | common.DENSE_KEYS
    | {
        "rope_theta": Key("rotary_emb_base", float),
        "rotary_share": Key("rotary_pct", float),
        "norm_epsilon": Key("layer_norm_eps", float),
        "parallel_residual": Key("use_parallel_residual", bool),
    },
    fixed={"norm": "layer", "biases": True, "feed_forward": "gelu"},
    defaults={
        "tie_word_embeddings": False,
        "rotary_emb_base": 10_000.0,
        "rotary_pct": 0.25,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
    },
    accepted={
        "attention_bias": (True,),
        "hidden_act": ("gelu",),
        "quantization_config": (None,),
        # keys of other families, which transformers does not read in this one
        "num_key_value_heads": (None,),
        "head_dim": (None,),
        "rope_theta": (None,),
        "partial_rotary_factor": (None,),
    },
    constants={"attention_bias": True, "hidden_act": "gelu"},
    rope={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    tensors={
        "embedding/table": Tensor("gpt_neox.embed_in.weight"),
        "unembedding/table": Tensor("embed_out.weight"),
        "final_norm/scale": Tensor("gpt_neox.final_layer_norm.weight"),
        "final_norm/bias": Tensor("gpt_neox.final_layer_norm.bias"),
        "layers/attention_norm/scale": Tensor(f"{LAYER}.input_layernorm.weight"),
        "layers/attention_norm/bias": Tensor(f"{LAYER}.input_layernorm.bias"),
        "layers/mlp_norm/scale": Tensor(f"{LAYER}.post_attention_layernorm.weight"),
        "layers/mlp_norm/bias": Tensor(f"{LAYER}.post_attention_layernorm.bias"),
        "layers/attention/query": Tensor(f"{FUSED}.weight", "H0C D"),
        "layers/attention/key": Tensor(f"{FUSED}.weight", "G1C D"),
        "layers/attention/value": Tensor(f"{FUSED}.weight", "G2C D"),
        "layers/attention/query_bias": Tensor(f"{FUSED}.bias", "H0C"),
        "layers/attention/key_bias": Tensor(f"{FUSED}.bias", "G1C"),
        "layers/attention/value_bias": Tensor(f"{FUSED}.bias", "G2C"),
        "layers/attention/output": Tensor(f"{LAYER}.attention.dense.weight"),
        "layers/attention/output_bias": Tensor(f"{LAYER}.attention.dense.bias"),
        "layers/mlp/up": Tensor(f"{LAYER}.mlp.dense_h_to_4h.weight"),
        "layers/mlp/up_bias": Tensor(f"{LAYER}.mlp.dense_h_to_4h.bias"),
        "layers/mlp/down": Tensor(f"{LAYER}.mlp.dense_4h_to_h.weight"),
        "layers/mlp/down_bias": Tensor(f"{LAYER}.mlp.dense_4h_to_h.bias"),
    },
    ignored=re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
)
