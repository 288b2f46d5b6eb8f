"""config.json of Hugging Face <-> ModelConfig.

Architectures that transformers knows keep its spelling; everything else is `"model_type": "moe_reduce"`, whose
config.json holds the fields of ModelConfig under their own names. What a ModelConfig cannot represent is refused.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from moe_reduce import config as configuration
from moe_reduce import validation
from moe_reduce.config import ModelConfig, MoEConfig
from moe_reduce.errors import UserError

CONFIG_FILE = "config.json"
OWN_TYPE = "moe_reduce"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    OWN_TYPE: "MoeReduceForCausalLM",
}
FIELDS = {  # field of ModelConfig -> (key, type); tables of their own for what only dense or expert models have
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
DENSE_FIELDS = {"feed_forward_width": ("intermediate_size", int)}
MOE_FIELDS = {
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
    validation.check_model(model)
    return model


def _own_config(raw: dict[str, Any]) -> ModelConfig:
    outside = {"architectures", "model_type", *CARRIED}
    return configuration.model_from_dict({k: v for k, v in raw.items() if k not in outside}, OWN_TYPE)


def _check_values(raw: dict[str, Any]) -> None:
    for key, accepted in REQUIRED_VALUES.items():
        if key in raw and raw[key] not in accepted:
            raise UserError(f"{key}={raw[key]!r} is not supported, only {accepted[0]!r}")
    for key in ("rope_scaling", "rope_parameters"):
        if key in raw and raw[key] is not None:
            _check_rope(key, raw[key])
    if "layer_types" in raw and set(raw["layer_types"] or ()) - {"full_attention"}:
        raise UserError(f"layer_types={raw['layer_types']!r} is not supported, only 'full_attention' in every layer")


def _check_rope(key: str, rope: Any) -> None:
    if not isinstance(rope, dict):
        raise UserError(f"{key} must be an object, got {rope!r}")
    for name, value in rope.items():
        plain = name in ("rope_type", "type") and value == "default"
        if not plain and name != "rope_theta" and not (name == "partial_rotary_factor" and value == 1):
            raise UserError(f"{key}.{name}={value!r} is not supported, only rope_theta with rope_type 'default'")


def _flat(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys in the spelling of published files, with those left out filled in as transformers fills them."""
    given = {key: value for key, value in raw.items() if value is not None}
    if "rope_parameters" in given and "rope_theta" in given["rope_parameters"]:
        given["rope_theta"] = given["rope_parameters"]["rope_theta"]
    if "num_local_experts" in given:
        given["num_experts"] = given["num_local_experts"]
    flat = DEFAULTS[raw["model_type"]] | given
    heads, width = _value(flat, "num_attention_heads", int), _value(flat, "hidden_size", int)
    return {"num_key_value_heads": heads, "head_dim": width // max(heads, 1)} | flat


def _known_config(flat: dict[str, Any]) -> ModelConfig:
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
        return configuration.to_dict(model)
    raw = {key: getattr(model, field) for field, (key, _) in FIELDS.items()}
    del raw["rope_theta"]
    raw |= {"rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"}}
    raw |= {"attention_bias": False, "hidden_act": "silu", "bos_token_id": None, "eos_token_id": None}
    if model.moe is None:
        return raw | {"intermediate_size": model.feed_forward_width}
    raw |= {key: getattr(model.moe, field) for field, (key, _) in MOE_FIELDS.items()}
    # transformers wants a dense width even where no layer is dense.
    return raw | {"intermediate_size": model.moe.width, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _rewritten(raw: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """`raw` with the keys of the fields that changed; keys it left out are given, since a default may not fit."""
    if raw["model_type"] == OWN_TYPE:
        return raw | configuration.to_dict(model)
    flat, raw = _flat(raw), dict(raw)
    values = {key: getattr(model, field) for field, (key, _) in FIELDS.items()}
    if model.moe is None:
        values |= {key: getattr(model, field) for field, (key, _) in DENSE_FIELDS.items()}
    else:
        values |= {key: getattr(model.moe, field) for field, (key, _) in MOE_FIELDS.items()}
    for key, value in values.items():
        if key == "rope_theta" and "rope_parameters" in raw and raw["rope_parameters"] is not None:
            if flat[key] != value:
                raw["rope_parameters"] = raw["rope_parameters"] | {key: value}
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
