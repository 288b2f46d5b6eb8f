"""Configurations: the dataclasses of every kind of run, their defaults, and the reader of ConfigDicts.

A file in configs/ starts from `base()`, `reduce_base()`, `adapt_base()` or `text_to_lora_base()`, which hold every key
with its default, and sets what differs. `parse` turns the result into dataclasses. An unknown, missing or ill-typed key
raises a UserError that names it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import ml_collections

from moe_reduce.core import config_dict
from moe_reduce.core.adapt_config import AdaptConfig, AdapterConfig
from moe_reduce.core.data_config import DataConfig
from moe_reduce.core.distill_config import DistillConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.execution import DISPATCH_BY_PLATFORM, ExecutionConfig
from moe_reduce.core.generate_config import GenerateConfig
from moe_reduce.core.model_config import ModelConfig, MoEConfig
from moe_reduce.core.qat_config import QATConfig
from moe_reduce.core.reduce_config import ReduceConfig
from moe_reduce.core.stages import STAGES
from moe_reduce.core.text_to_lora_config import TextToLoraConfig
from moe_reduce.core.train_config import BalanceConfig, MeshConfig, RunConfig, TrainConfig

__all__ = [
    "DISPATCH_BY_PLATFORM",
    "AdaptConfig",
    "AdapterConfig",
    "BalanceConfig",
    "DataConfig",
    "DistillConfig",
    "ExecutionConfig",
    "GenerateConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "QATConfig",
    "ReduceConfig",
    "RunConfig",
    "TextToLoraConfig",
    "TrainConfig",
    "adapt_base",
    "adapt_from_dict",
    "any_from_dict",
    "base",
    "in_order",
    "model_from_dict",
    "moe_base",
    "parse",
    "reduce_base",
    "reduce_from_dict",
    "run_from_dict",
    "stage",
    "text_to_lora_base",
    "text_to_lora_from_dict",
    "to_dict",
]

T = TypeVar("T")


def base() -> ml_collections.ConfigDict:
    """Defaults of `train`, every key.

    `variants` maps names to the keys that differ, for runs that are compared side by side.
    """
    return _with_variants(RunConfig())


def reduce_base() -> ml_collections.ConfigDict:
    """Defaults of `reduce`, every key; a variant's `stages` replace those of the configuration."""
    return _with_variants(ReduceConfig())


def adapt_base() -> ml_collections.ConfigDict:
    """Defaults of `adapt`, every key."""
    return _with_variants(AdaptConfig())


def text_to_lora_base() -> ml_collections.ConfigDict:
    """Defaults of `text-to-lora`, every key."""
    return _with_variants(TextToLoraConfig())


def moe_base() -> ml_collections.ConfigDict:
    """Defaults of `model.moe`, every key; `base()` describes a dense model, whose `moe` is None."""
    return config_dict.of(MoEConfig())


def _with_variants(defaults: Any) -> ml_collections.ConfigDict:
    config = config_dict.of(defaults)
    config.variants = ml_collections.ConfigDict()
    return config


def stage(kind: str, **changes: Any) -> dict[str, Any]:
    """Keys of a stage: the defaults of its kind, with some changed."""
    return to_dict(STAGES[kind](**changes))


def in_order(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Keys `order` and `stages` of a reduction, or of a variant, that runs these stages in this order."""
    return {"order": ",".join(stages), "stages": stages}


def parse(config: ml_collections.ConfigDict, reader: Callable[[dict[str, Any]], T]) -> dict[str, T]:
    """Read the runs that a configuration describes: {"": run}, or one entry for each variant.

    reader: makes one run from nested plain values, such as `run_from_dict`.
    """
    raw = config.to_dict()
    variants = raw.pop("variants", {})
    if not variants:
        return {"": reader(raw)}
    if not isinstance(variants, dict) or not all(isinstance(changes, dict) for changes in variants.values()):
        raise UserError(f"config key variants must map names to groups of keys, got {variants!r}")
    for name in variants:
        if not name.isidentifier():  # an override --config.variants.NAME.key=value could not address it
            raise UserError(f"variant {name!r} must be a word of letters, digits and _ that starts with no digit")
    return {name: reader(config_dict.merge(raw, changes, f"variants.{name}")) for name, changes in variants.items()}


def run_from_dict(raw: dict[str, Any]) -> RunConfig:
    """Read and check a RunConfig from nested plain values, as in a run's config.json."""
    run = config_dict.build(RunConfig, raw, "")
    run.check()
    return run


def reduce_from_dict(raw: dict[str, Any]) -> ReduceConfig:
    """Read and check a ReduceConfig from nested plain values; keeps the stages that `order` names, in that order."""
    run = config_dict.build(ReduceConfig, raw, "")
    names = run.order.split(",") if run.order else []
    if len(set(names)) < len(names) or not set(names) <= set(run.stages):
        known = ", ".join(run.stages) or "there is none"
        raise UserError(f"order={run.order!r} must name stages, each once; known: {known}")
    run = dataclasses.replace(run, stages={name: run.stages[name] for name in names})
    run.check()
    return run


def adapt_from_dict(raw: dict[str, Any]) -> AdaptConfig:
    """Read and check an AdaptConfig from nested plain values."""
    run = config_dict.build(AdaptConfig, raw, "")
    run.check()
    return run


def text_to_lora_from_dict(raw: dict[str, Any]) -> TextToLoraConfig:
    """Read and check a TextToLoraConfig from nested plain values."""
    run = config_dict.build(TextToLoraConfig, raw, "")
    run.check()
    return run


def any_from_dict(raw: dict[str, Any]) -> RunConfig | ReduceConfig | AdaptConfig:
    """Read a run of `train`, `reduce` or `adapt`, which its keys tell apart."""
    if "hypernetwork" in raw:
        raise UserError("hypernetwork belongs to text-to-lora: give a configuration of train, reduce or adapt")
    if "adapter" in raw:
        return adapt_from_dict(raw)
    return reduce_from_dict(raw) if "stages" in raw else run_from_dict(raw)


def model_from_dict(raw: dict[str, Any], path: str = "model") -> ModelConfig:
    """Read and check a ModelConfig from nested plain values; errors name keys below `path`."""
    model = config_dict.build(ModelConfig, raw, path)
    model.check()
    return model


def to_dict(value: Any) -> dict[str, Any]:
    """Convert a dataclass to nested plain values for JSON; `run_from_dict` and its siblings read them back."""
    return dataclasses.asdict(value)
