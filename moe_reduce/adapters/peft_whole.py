"""Whole tensors in a PEFT adapter: biases (key `bias`), and modules that were trained whole (`modules_to_save`)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moe_reduce.adapters import replacements
from moe_reduce.adapters.peft_config import PeftConfig
from moe_reduce.adapters.peft_modules import PREFIX
from moe_reduce.adapters.replacements import Replacements
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.families import of_config

ORIGINAL = ".original_module."  # the base's own, which PEFT stores beside a trained copy if bias is all
INNER = ("base_layer.", "modules_to_save.")  # parts of names that PEFT adds to those of the model


def read(config: PeftConfig, tensors: Mapping[str, np.ndarray], model: ModelConfig, file: Path) -> Replacements:
    """The parameters that the whole tensors of a file replace. tensors: by the names in the file.

    Raises UserError for a tensor without a place in the model or in the configuration, and for a missing one.
    """
    places, by_name = replacements.places(model), _by_name(tensors, file)
    tables = (of_config(model).input_table, of_config(model).output_table)  # stored where a vocabulary was resized
    for name, stored in by_name.items():
        _check_known(name, stored, model, file)
        if name not in tables and not _asked(config, name):
            key = "bias" if name.endswith(".bias") else "modules_to_save"
            raise UserError(f"{file} has {stored}, which {key} in {config.file.name} does not cover: correct one")
        shape, wanted = tensors[stored].shape, places[name][0][0].stored_shape
        if shape != wanted:
            raise UserError(
                f"tensor {stored} in {file} is a whole matrix of shape {shape}, and this base has {wanted}: give the "
                "base that it was trained with, resized as it was"
            )
    for module in config.values["modules_to_save"] or ():
        if not any(f".{module}." in f".{name}" for name in places):
            raise UserError(
                f"{config.file}: modules_to_save names {module}, which this model does not have: it belongs to a model "
                "of another task, such as a classifier"
            )
    for name in places:
        if name not in by_name and _asked(config, name):
            raise UserError(f"{file} has no {PREFIX}{name}, which {config.file.name} calls for: fetch it again")
    return {
        (leaf.path, index): leaf.from_stored(tensors[stored])
        for name, stored in by_name.items()
        for leaf, index in places[name]
    }


def _by_name(tensors: Mapping[str, np.ndarray], file: Path) -> dict[str, str]:
    """Names of the tensors in the file, by the names that they have in the model's own files."""
    found: dict[str, str] = {}
    for stored in tensors:
        if ORIGINAL in stored:
            continue
        name = stored.removeprefix(PREFIX)
        for part in INNER:
            name = name.replace(part, "")
        if name in found and not np.array_equal(tensors[stored], tensors[found[name]]):
            raise UserError(f"{file} has {found[name]} and {stored}, which are one tensor and differ: fetch it again")
        found[name] = stored
    return found


def _check_known(name: str, stored: str, model: ModelConfig, file: Path) -> None:
    family = of_config(model)
    if model.tied_embeddings and name in (family.input_table, family.output_table):
        raise UserError(
            f"tensor {stored} in {file} is not part of a LoRA, and replaces one of two tables that this base ties to "
            "each other: merge the adapter with PEFT"
        )
    if name not in replacements.places(model):
        raise UserError(f"tensor {stored} in {file} is not part of a LoRA, and not of this model: give its own base")


def _asked(config: PeftConfig, name: str) -> bool:
    """True if the configuration says that the tensor of this name is replaced."""
    module, _, kind = name.rpartition(".")
    if config.saves(module):
        return True
    bias = config.values["bias"]
    return kind == "bias" and (bias == "all" or (bias == "lora_only" and config.targets(module)))
