"""Families of models: how each spells its config.json and names its tensors, one module each.

`read_config` sets `ModelConfig.family`. A config without a stated family, such as that of a fresh training run, belongs
to the one family that takes such configs and represents it exactly. When a transform leads out of a family, as pooling
does, the model becomes one of our own (families/own.py). To add a family, write its module and list it below.
"""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_reduce.core import disk, hub, json_files
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.gguf_file import ARCHITECTURE, SUFFIX, is_gguf, read_gguf
from moe_reduce.data.tokenizer_files import READ_AS
from moe_reduce.families import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_neox,
    gpt_oss,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    olmoe,
    own,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    text_part,
)
from moe_reduce.families.family import CARRIED, Family
from moe_reduce.families.gguf import EXPERTS, Gguf
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.families.layout import ParameterLayout, layouts, to_stored

__all__ = [
    "CONFIG_FILE", "FAMILIES", "MODEL_TYPE", "QUANTISATION", "QUANTISATION_METHOD", "ParameterLayout", "by_path",
    "dumps", "from_hf", "gguf_layouts", "gguf_values", "named", "of_config", "own_config", "parameter_layouts",
    "read_config", "to_hf", "to_stored", "unwritten",
]  # fmt: skip

CONFIG_FILE = "config.json"
MODEL_TYPE = "model_type"  # key of config.json that names the family
QUANTISATION = "quantization_config"  # key of config.json that says how quantised weights are stored
QUANTISATION_METHOD = "quant_method"  # key of the layout's name within it
# of quantised weights that are read (storage/quantised.py)
LAYOUTS = ("moe_reduce", "compressed-tensors", "fp8", "mxfp4", "gptq", "awq")
# Our own is last: it represents every config, and is asked after all others.
FAMILIES: tuple[Family, ...] = (
    llama.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY, gpt_neox.FAMILY, olmoe.FAMILY, qwen2.FAMILY, mistral.FAMILY,
    mixtral.FAMILY, qwen2_moe.FAMILY, gpt_oss.FAMILY, glm4_moe.FAMILY, deepseek_v3.FAMILY, deepseek_v2.FAMILY,
    minimax_m2.FAMILY, qwen3_next.FAMILY, qwen3_5_moe.FAMILY, own.FAMILY,
)  # fmt: skip


def named(name: Any) -> Family:
    """The family of this name; UserError names those that are known."""
    found = {family.name: family for family in FAMILIES}
    if not isinstance(name, str) or name not in found:
        message = f"{MODEL_TYPE} {name!r} is not supported; known: {', '.join(found)}"
        raise UserError(message + _nearest(name, found))
    return found[name]


def _nearest(name: Any, known: Iterable[str]) -> str:
    """The end of a message: which known name is the nearest to one that is unknown."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else ""


def of_config(config: ModelConfig) -> Family:
    """The family that a model is saved as: the stated one if it represents the config, else our own.

    Without a stated family, the first with `takes_unstated` that represents the config. UserError for an unknown name.
    """
    return _family(config.family, config)


@functools.cache  # by the stated family as well, since equal configs may state different ones
def _family(stated: str | None, config: ModelConfig) -> Family:
    if stated is None:
        return next(family for family in FAMILIES if family.takes_unstated and family.represents(config))
    family = named(stated)
    return family if family.represents(config) else own.FAMILY


def own_config(config: ModelConfig) -> ModelConfig:
    """The same architecture, stated to be of our own family, which no other program opens."""
    return dataclasses.replace(config, family=own.FAMILY.name)


def parameter_layouts(config: ModelConfig) -> tuple[ParameterLayout, ...]:
    """Layout of every parameter on disk, in path order."""
    return tuple(by_path(config).values())


def by_path(config: ModelConfig) -> Mapping[str, ParameterLayout]:
    """The layouts of `parameter_layouts` by path."""
    return _layouts(config.family, config)


@functools.cache
def _layouts(stated: str | None, config: ModelConfig) -> dict[str, ParameterLayout]:
    return layouts(_family(stated, config).tensors, config)


def gguf_layouts(config: ModelConfig) -> tuple[ParameterLayout, ...]:
    """Layout of every parameter in a GGUF file, in path order, for a config that `read_config` read from one."""
    gguf = of_config(config).gguf
    assert gguf is not None, config.family
    return tuple(layouts(gguf.tensors, config).values())


def read_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """(ModelConfig, content of config.json) of a model directory or a GGUF file; UserError names the file and the key.

    A GGUF file has no config.json; its content is then what the file's metadata says in those words.
    """
    return _read_gguf(path) if is_gguf(path) else _read_directory(disk.restored(path))


def _read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    file = read_gguf(path)
    try:
        family, gguf = _gguf_family(file.metadata)
        raw = {MODEL_TYPE: family.name, "architectures": [family.architecture], **gguf.read(file)}
        return from_hf(raw), raw
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _gguf_family(metadata: Mapping[str, Any]) -> tuple[Family, Gguf]:
    """The family of a GGUF file; two share an architecture, one of them with experts."""
    found = [(family, family.gguf) for family in FAMILIES if family.gguf is not None]
    stated, known = str(metadata.get(ARCHITECTURE)), list(dict.fromkeys(gguf.architecture for _, gguf in found))
    if stated not in known:
        message = f"{ARCHITECTURE} {stated!r} is not supported as GGUF; known: {', '.join(known)}"
        raise UserError(message + _nearest(stated, known))
    alike = [(family, gguf) for family, gguf in found if gguf.architecture == stated]
    mixture = bool(metadata.get(f"{stated}.{EXPERTS}"))
    return next((pair for pair in alike if pair[1].has_experts == mixture), alike[0])


def unwritten(config: ModelConfig) -> str | None:
    """Field of a config that a GGUF file of its family cannot state, as "field=value"; None if there is none."""
    family = of_config(config)
    assert isinstance(family, HuggingFaceFamily)
    assert family.gguf is not None
    values = gguf_values(config)
    names = ("vocab_size", "tie_word_embeddings")  # which the tensors of a file tell
    raw = family.gguf.described(family.gguf.write(values)) | {name: values[name] for name in names}
    read = family.read({MODEL_TYPE: family.name} | family.gguf.in_config(raw))
    for field in dataclasses.fields(config):
        left, right = getattr(config, field.name), getattr(read, field.name)
        if field.name == "moe" and left is not None:
            right = dataclasses.replace(right, init_scale=left.init_scale)
        if left != right and field.compare and field.name != "init_std":
            return f"{field.name}={left!r}"
    return None


def gguf_values(config: ModelConfig) -> dict[str, Any]:
    """Keys of config.json that the metadata of a GGUF file are made of."""
    family = of_config(config)
    assert isinstance(family, HuggingFaceFamily)
    return family.published(config) | {"head_dim": config.head_width}


def _read_directory(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    file = directory / CONFIG_FILE
    if not directory.exists() and hub.NAME.fullmatch(str(directory)):
        raise UserError(
            f"{directory} is not a directory: give a model directory; if this is a name on the Hugging Face hub, "
            f"hf download {directory} fetches the model and prints its directory"
        )
    if not directory.is_dir():
        raise UserError(
            f"{directory} is not a directory: give a model directory, with {CONFIG_FILE} and safetensors, or a "
            f"{SUFFIX} file"
        )
    if not file.is_file():
        raise UserError(f"{directory} has no {CONFIG_FILE}: give a model directory, as transformers or we write it")
    whole = json_files.read_object(file)
    try:
        raw = text_part.config_of(whole)
        config = from_hf(raw)
        if raw != whole:  # a file of the language model alone names its class
            raw["architectures"] = [named(config.family).architecture]
        return config, raw
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that the content of a config.json describes; UserError for anything it cannot represent."""
    family = named(raw.get(MODEL_TYPE))
    config = family.read(_without_layout(raw))
    try:
        config.check()
    except UserError as error:
        fields = dict.fromkeys(re.findall(r"\bmodel\.((?:moe\.)?[a-z_]+)", str(error)))
        keys = [family.key_of(field) for field in fields if family.key_of(field) != field]
        if not keys:
            raise
        raise UserError(f"{error} ({' and '.join(keys)} in this file)") from None
    return config


def _without_layout(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of config.json without the layout of quantised weights, if that is one that is read."""
    stated = raw.get(QUANTISATION)
    read = isinstance(stated, Mapping) and stated.get(QUANTISATION_METHOD) in LAYOUTS
    return {key: value for key, value in raw.items() if key != QUANTISATION} if read else raw


def to_hf(config: ModelConfig, original: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """The content of config.json. Keys of `original` that still hold are kept as they are.

    dtype: dtype of the weights, for readers that allocate before they open the tensors.
    """
    family = of_config(config)
    original = {"dtype": dtype} if original is None else original
    if original.get(MODEL_TYPE) == family.name:
        raw = dict(original)
        if not family.same(from_hf(raw), config):
            raw = family.update(raw, config)
    else:
        carried = {key: value for key, value in original.items() if key in CARRIED}
        if family is own.FAMILY and MODEL_TYPE in original:  # transformers reads tokenizers by the type of their model
            carried.setdefault(READ_AS, original[MODEL_TYPE])
        raw = family.write(config) | carried | {MODEL_TYPE: family.name, "architectures": [family.architecture]}
    for key in {"dtype", "torch_dtype"} & set(raw):
        raw[key] = dtype
    return raw


def dumps(raw: Mapping[str, Any]) -> str:
    """The text of config.json, in the format of transformers."""
    return json.dumps(raw, indent=2, sort_keys=True) + "\n"
