"""config.json of Hugging Face <-> ModelConfig.

Architectures that transformers knows keep its spelling; everything else is `"model_type": "moe_reduce"`, whose
config.json holds the fields of ModelConfig under their own names. What a ModelConfig cannot represent is refused.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from moe_reduce.core import config as configuration
from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError

CONFIG_FILE = "config.json"
OWN_TYPE = "moe_reduce"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    OWN_TYPE: "MoeReduceForCausalLM",
}
Fields = dict[str, tuple[str, type]]
FIELDS: Fields = {  # field of ModelConfig -> (key, type); tables of their own for what only dense or expert models have
    "vocab_size": ("vocab_size", int),
    "layers": ("num_hidden_layers", int),
    "width": ("hidden_size", int),
    "query_heads": ("num_attention_heads", int),
    "key_value_heads": ("num_key_value_heads", int),
    "head_width": ("head_dim", int),
    "tied_embeddings": ("tie_word_embeddings", bool),
    "rope_theta": ("rope_theta", float),
    "norm_epsilon": ("rms_norm_eps", float),
    "max_positions": ("max_position_embeddings", int),
    "init_std": ("initializer_range", float),
}
NEOX_FIELDS: Fields = {
    **{field: FIELDS[field] for field in FIELDS if field not in ("key_value_heads", "head_width")},
    "rope_theta": ("rotary_emb_base", float),
    "rotary_share": ("rotary_pct", float),
    "norm_epsilon": ("layer_norm_eps", float),
    "parallel_residual": ("use_parallel_residual", bool),
}
NEOX_FIXED = {"norm": "layer", "biases": True, "feed_forward": "gelu"}
ROPE_KEYS = {  # key of published files -> the same within rope_parameters, as transformers 5 writes it
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}
DENSE_FIELDS: Fields = {"feed_forward_width": ("intermediate_size", int)}
MOE_FIELDS: Fields = {
    "experts": ("num_experts", int),
    "active": ("num_experts_per_tok", int),
    "width": ("moe_intermediate_size", int),
    "normalize": ("norm_topk_prob", bool),
}
COMMON_DEFAULTS = {  # what transformers assumes where a file leaves a key out
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
DEFAULTS = {
    "llama": COMMON_DEFAULTS | {"max_position_embeddings": 2048},
    "qwen3": COMMON_DEFAULTS | {"max_position_embeddings": 32_768, "head_dim": 128},
    "qwen3_moe": COMMON_DEFAULTS | {"max_position_embeddings": 32_768, "norm_topk_prob": False},
    "gpt_neox": {
        "tie_word_embeddings": False,
        "rotary_emb_base": 10_000.0,
        "rotary_pct": 0.25,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
    },
}
# Keys that change what a model computes, with the only values that the decoder computes.
REQUIRED_VALUES = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0,),
}
NEOX_VALUES = {
    "attention_bias": (True,),
    "hidden_act": ("gelu",),
    "quantization_config": (None,),
    # spellings of other families, which transformers does not read here
    "num_key_value_heads": (None,),
    "head_dim": (None,),
    "rope_theta": (None,),
    "partial_rotary_factor": (None,),
}
# Fields that models of our own had no choice of at first: their config.json holds those that differ from the default.
LATER_FIELDS = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name
    in ("norm", "biases", "parallel_residual", "feed_forward", "rotary_share", "qk_norm_scope", "clip_qkv")
}
# Keys that describe the tokenizer and the weights rather than the architecture: they survive a change of model_type.
CARRIED = ("bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version")


def read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """(ModelConfig, config.json as it is) of a model directory; raises UserError naming the key and the file."""
    file = directory / CONFIG_FILE
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give a model directory, with {CONFIG_FILE} and safetensors")
    if not file.is_file():
        raise UserError(f"{directory} has no {CONFIG_FILE}: give a model directory, as transformers or we write it")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): fetch it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(raw).__name__}: fetch it again")
    try:
        return from_hf(raw), raw
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that a config.json describes; raises UserError on what it cannot represent."""
    kind = _value(raw, "model_type", str)
    if kind not in ARCHITECTURES:
        raise UserError(f"model_type {kind!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    if kind == OWN_TYPE:
        model = _own_config(raw)
    else:
        _check_values(raw)
        model = _known_config(_flat(raw))
    model.check()
    return model


def _own_config(raw: dict[str, Any]) -> ModelConfig:
    outside = {"architectures", "model_type", *CARRIED}
    inside = {key: value for key, value in raw.items() if key not in outside}
    return configuration.model_from_dict(LATER_FIELDS | inside, OWN_TYPE)


def _check_values(raw: dict[str, Any]) -> None:
    neox = raw["model_type"] == "gpt_neox"
    for key, accepted in (NEOX_VALUES if neox else REQUIRED_VALUES).items():
        if key in raw and raw[key] not in accepted:
            raise UserError(f"{key}={raw[key]!r} is not supported, only {accepted[0]!r}")
    for key in ("rope_scaling", "rope_parameters"):
        if key in raw and raw[key] is not None:
            _check_rope(key, raw[key], neox)
    types = ({"layer_types": None} | raw)["layer_types"]
    if types is not None and (not isinstance(types, list) or any(one != "full_attention" for one in types)):
        raise UserError(f"layer_types={raw['layer_types']!r} is not supported, only 'full_attention' in every layer")


def _check_rope(key: str, rope: Any, neox: bool) -> None:
    if not isinstance(rope, dict):
        raise UserError(f"{key} must be an object, got {rope!r}")
    for name, value in rope.items():
        plain = name in ("rope_type", "type") and value == "default"
        if neox:
            readable = key == "rope_parameters" and name in ROPE_KEYS.values()
        else:
            readable = name == "rope_theta" or (name == "partial_rotary_factor" and value == 1)
        if not plain and not readable:
            raise UserError(f"{key}.{name}={value!r} is not supported, only rope_theta with rope_type 'default'")


def _flat(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys in the spelling of published files, with those left out filled in as transformers fills them."""
    given = {key: value for key, value in raw.items() if value is not None}
    defaults = DEFAULTS[raw["model_type"]]
    if "rope_parameters" in given:
        rope = given["rope_parameters"]
        given |= {key: rope[name] for key, name in ROPE_KEYS.items() if key in defaults and name in rope}
    if "num_local_experts" in given:
        given["num_experts"] = given["num_local_experts"]
    flat = defaults | given
    heads, width = _value(flat, "num_attention_heads", int), _value(flat, "hidden_size", int)
    return {"num_key_value_heads": heads, "head_dim": width // max(heads, 1)} | flat


def _known_config(flat: dict[str, Any]) -> ModelConfig:
    if flat["model_type"] == "gpt_neox":
        values = {field: _value(flat, *spelling) for field, spelling in (NEOX_FIELDS | DENSE_FIELDS).items()}
        heads, head_width = flat["num_key_value_heads"], flat["head_dim"]
        if heads * head_width != values["width"] and heads > 0:
            raise UserError(f"hidden_size ({values['width']}) must be a multiple of num_attention_heads ({heads})")
        return ModelConfig(**values, **NEOX_FIXED, key_value_heads=heads, head_width=head_width)
    values = {field: _value(flat, *spelling) for field, spelling in FIELDS.items()}
    values["qk_norm"] = flat["model_type"] != "llama"
    if flat["model_type"] == "qwen3_moe":
        moe = MoEConfig(**{field: _value(flat, *spelling) for field, spelling in MOE_FIELDS.items()})
        return ModelConfig(**values, moe=moe)
    return ModelConfig(**values, **{field: _value(flat, *spelling) for field, spelling in DENSE_FIELDS.items()})


def _value(flat: dict[str, Any], key: str, kind: type) -> Any:
    if key not in flat:
        raise UserError(f"{key} is missing: add it")
    value = flat[key]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{key} must be {kind.__name__}, got {value!r}")
    return value


def model_type(model: ModelConfig) -> str:
    """The architecture of transformers that computes this model, or our own name for it."""
    if model.embedding_factor is not None:
        return OWN_TYPE
    if any(getattr(model, name) != default for name, default in LATER_FIELDS.items()):
        return "gpt_neox" if _is_neox(model) else OWN_TYPE
    if model.moe is None:
        return "qwen3" if model.qk_norm else "llama"
    known = MoEConfig(
        experts=model.moe.experts,
        active=model.moe.active,
        width=model.moe.width,
        normalize=model.moe.normalize,
        init_scale=model.moe.init_scale,  # concerns only a training start, which no file repeats
    )
    return "qwen3_moe" if model.qk_norm and model.moe == known else OWN_TYPE


def _is_neox(model: ModelConfig) -> bool:
    whole = model.key_value_heads == model.query_heads and model.head_width * model.query_heads == model.width
    fixed = all(getattr(model, name) == value for name, value in NEOX_FIXED.items())
    return fixed and whole and model.moe is None and not model.qk_norm


def to_hf(model: ModelConfig, original: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    """The content of config.json. Of the `original`, what still holds is kept, key by key.

    dtype: of the weights, for readers that allocate before they look at them.
    """
    kind = model_type(model)
    original = {"dtype": dtype} if original is None else original
    if "model_type" in original and original["model_type"] == kind:
        raw = dict(original)
        if not same_architecture(from_hf(raw), model):
            raw = _rewritten(raw, model)
    else:
        carried = {key: value for key, value in original.items() if key in CARRIED}
        raw = _fresh(model, kind) | carried | {"model_type": kind, "architectures": [ARCHITECTURES[kind]]}
    for key in {"dtype", "torch_dtype"} & set(raw):
        raw[key] = dtype
    return raw


def same_architecture(left: ModelConfig, right: ModelConfig) -> bool:
    """Equal in everything that a file of transformers can say: all but the experts' initial scale."""
    if left.moe is not None and right.moe is not None and model_type(left) != OWN_TYPE:
        left = dataclasses.replace(left, moe=dataclasses.replace(left.moe, init_scale=right.moe.init_scale))
    return left == right


def _fresh(model: ModelConfig, kind: str) -> dict[str, Any]:
    if kind == OWN_TYPE:
        return _own_fields(model)
    values, neox = _values(model, kind), kind == "gpt_neox"
    raw = {key: value for key, value in values.items() if key not in ROPE_KEYS}
    rope = {name: values[key] for key, name in ROPE_KEYS.items() if key in values}
    raw |= {"rope_parameters": {"rope_type": "default"} | rope, "bos_token_id": None, "eos_token_id": None}
    raw |= {"attention_bias": neox, "hidden_act": "gelu" if neox else "silu"}
    if model.moe is None:
        return raw
    # transformers wants a dense width even where no layer is dense.
    return raw | {"intermediate_size": model.moe.width, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _own_fields(model: ModelConfig) -> dict[str, Any]:
    fields = configuration.to_dict(model)
    return {key: value for key, value in fields.items() if key not in LATER_FIELDS or value != LATER_FIELDS[key]}


def _values(model: ModelConfig, kind: str) -> dict[str, Any]:
    """What the model says under the keys of published files of its kind."""
    fields = NEOX_FIELDS if kind == "gpt_neox" else FIELDS
    values = {key: getattr(model, field) for field, (key, _) in fields.items()}
    if model.moe is None:
        return values | {key: getattr(model, field) for field, (key, _) in DENSE_FIELDS.items()}
    return values | {key: getattr(model.moe, field) for field, (key, _) in MOE_FIELDS.items()}


def _rewritten(raw: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """`raw` with the keys of the fields that changed; keys it left out are given, since a default may not fit."""
    if raw["model_type"] == OWN_TYPE:
        return {key: value for key, value in raw.items() if key not in LATER_FIELDS} | _own_fields(model)
    flat, raw = _flat(raw), dict(raw)
    for key, value in _values(model, raw["model_type"]).items():
        if key in ROPE_KEYS and "rope_parameters" in raw and raw["rope_parameters"] is not None:
            if flat[key] != value:
                raw["rope_parameters"] = raw["rope_parameters"] | {ROPE_KEYS[key]: value}
            continue
        spelling = "num_local_experts" if key == "num_experts" and "num_local_experts" in raw else key
        if flat[key] != value or spelling not in raw:
            raw[spelling] = value
    if "layer_types" in raw and raw["layer_types"] is not None:
        raw["layer_types"] = ["full_attention"] * model.layers
    return raw


def dumps(raw: dict[str, Any]) -> str:
    """As transformers writes it."""
    return json.dumps(raw, indent=2, sort_keys=True) + "\n"
