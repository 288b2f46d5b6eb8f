"""Seeded mutations of foreign files: each is read, and then written as it was read, or refused in one line."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers_models import CLASSES, SIZES_OF

from moe_reduce.adapters import peft_config
from moe_reduce.adapters.peft_modules import CONFIG_FILE
from moe_reduce.core.errors import UserError
from moe_reduce.families import from_hf, to_hf

VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**62, 10**400, -(10**30), 0.0, 1.0, 0.5, -0.5, 1e308, float("inf"),
    float("nan"), "", "a", "4096", "(", "[a-z]*", [], [0], [1, "a"], ["q_proj"], [[]], {}, {"a": 1}, {"q_proj": 3},
    {"rope_type": "default"}, {"rope_type": "yarn"}, {"rope_theta": 3}, {"rope_theta": None}, {"rope_theta": "x"},
    {"rope_type": ["default"]}, {"(": 3}, {"q_proj": None}, {"q_proj": [1]},
]  # fmt: skip
OTHER_KEYS = [
    "rope_scaling", "rope_theta", "rotary_pct", "rotary_emb_base", "num_local_experts", "num_experts", "clip_qkv",
    "layer_types", "of_a_later_version",
]  # fmt: skip
MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.3.gate_proj", "model.layers.1.mlp.gate"]


def mutated(raw: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A copy with up to three keys changed, added or removed."""
    found, keys = dict(raw), [*raw, *OTHER_KEYS]
    for _ in range(chance.choice((1, 1, 2, 3))):
        key = chance.choice(keys)
        if chance.random() < 0.1:
            found.pop(key, None)
        else:
            found[key] = chance.choice(VALUES)
    return found


def refused(read: Callable[[], object]) -> bool:
    """True if it is refused in one line; any other exception is a defect."""
    try:
        read()
    except UserError as error:
        return "\n" not in str(error)
    return False


@pytest.mark.parametrize("kind", CLASSES)
def test_config_json(kind: str):
    raw = CLASSES[kind][0](**SIZES_OF[kind]).to_dict()
    chance, refusals = random.Random(0), 0

    def read_and_write(changed: dict[str, Any]) -> None:
        shallow = dataclasses.replace(from_hf(changed), layers=1)
        written = to_hf(shallow, json.loads(json.dumps(changed)), "float32")
        assert from_hf(written) == shallow

    for _ in range(300):
        changed = mutated(raw, chance)
        refusals += refused(lambda changed=changed: read_and_write(changed))
    assert 50 < refusals < 280


def test_adapter_config_json(tmp_path: Path):
    raw = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    raw |= {"target_modules": ["q_proj"], "peft_type": "LORA"}
    chance, refusals = random.Random(0), 0

    def read_and_use() -> None:
        config = peft_config.read(tmp_path)
        for module in MODULES:
            assert config.targets(module) in (True, False)
            assert config.rank(module) > 0
            assert config.scale(module) > 0

    for _ in range(600):
        (tmp_path / CONFIG_FILE).write_text(json.dumps(mutated(raw, chance)))
        refusals += refused(read_and_use)
    assert 200 < refusals < 550
