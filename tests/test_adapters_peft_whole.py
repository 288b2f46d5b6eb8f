"""Biases and whole modules in PEFT's files: written by PEFT, read here, and equal in logits."""

import dataclasses

import numpy as np
import peft
import pytest
import torch
from quantised_models import quantise_int8
from test_adapters_peft import TOKENS, assert_equals_peft, refused
from transformers_models import tiny, written

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import adapter_directory, bank, merging
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input
from moe_reduce.storage.tensors import TensorFiles

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # remarks of PEFT
]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt_neox": ["query_key_value", "dense_h_to_4h"]}


def by_peft(directory, kind, **settings):
    """Train nothing, disturb everything that PEFT would train, and let PEFT save it."""
    config = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", target_modules=TARGETS[kind], **settings)
    model = peft.get_peft_model(tiny(kind), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(str(directory))
    return directory


CASES = [
    ("gpt_neox", {"bias": "all"}, "input_layernorm.bias"),
    ("gpt_neox", {"bias": "lora_only"}, "query_key_value.base_layer.bias"),
    ("llama", {"bias": "all"}, None),
    ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}, "lm_head.weight"),
    ("llama", {"modules_to_save": ["input_layernorm"]}, "input_layernorm.weight"),
    ("gpt_neox", {"modules_to_save": ["attention.dense"], "bias": "all"}, "attention.dense.bias"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(kind): the directory of a tiny model."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            written(made[kind], kind)
        return made[kind]

    return of


@pytest.mark.parametrize(("kind", "settings", "holds"), CASES)
def test_what_peft_saved_is_read(tmp_path, base, kind, settings, holds):
    directory = by_peft(tmp_path / "adapter", kind, **settings)
    names = TensorFiles(directory, "adapter_model.safetensors").entries
    assert holds is None or any(name.endswith(holds) for name in names)
    assert_equals_peft(kind, base(kind), directory)


def test_the_command_merges_and_measures_it(tmp_path, base):
    directory = by_peft(tmp_path / "adapter", "llama", modules_to_save=["lm_head"])
    assert main(["merge", f"--model={base('llama')}", f"--adapter={directory}", f"--out={tmp_path / 'out'}"]) == 0
    old, new = moe_reduce.load(base("llama")), moe_reduce.load(tmp_path / "out")
    assert not np.array_equal(old.params["unembedding"]["table"], new.params["unembedding"]["table"])
    adapter = adapter_directory.load(directory, old.config, None)
    with pytest.raises(UserError, match="has been merged into this model before"):
        merging.merge(new, adapter)
    changed = {slot: value + 1 for slot, value in adapter.replaced.items()}
    assert merging.digest(dataclasses.replace(adapter, replaced=changed)) != merging.digest(adapter)
    assert adapters.count(adapter) == adapters.count(dataclasses.replace(adapter, replaced={})) + 61 * 24


def test_where_it_cannot_be_applied_it_is_refused(tmp_path, base):
    directory = by_peft(tmp_path / "adapter", "llama", modules_to_save=["lm_head"])
    model = moe_reduce.load(base("llama"))
    adapter = adapter_directory.load(directory, model.config, None)
    with pytest.raises(UserError, match="unembedding/table, which is quantised"):
        adapters.activate(quantise_int8(model), adapter)
    with pytest.raises(UserError, match="unembedding/table, which all rows share"):
        bank.activate(model, [adapter, None])
    with pytest.raises(UserError, match="keep its own files"):
        adapter_directory.save(adapter, model.config, Input("base", "0" * 64), tmp_path)
    tied = dataclasses.replace(model.config, tied_embeddings=True)
    with pytest.raises(UserError, match="ties to each other"):
        adapter_directory.load(directory, tied, None)


def test_a_whole_tensor_that_no_key_names_is_refused(tmp_path, base):
    directory = by_peft(tmp_path / "adapter", "gpt_neox", bias="all")
    text = (directory / "adapter_config.json").read_text()
    (directory / "adapter_config.json").write_text(text.replace('"bias": "all"', '"bias": "none"'))
    refused(directory, base("gpt_neox"), ".bias, which bias in adapter_config.json does not cover")
    (directory / "adapter_config.json").write_text(text.replace('"bias": "all"', '"bias": "lora_only"'))
    refused(directory, base("gpt_neox"), ".bias, which bias in adapter_config.json does not cover")


def test_logits_of_the_base_are_not_changed(tmp_path, base):
    directory = by_peft(tmp_path / "adapter", "llama", modules_to_save=["lm_head"])
    model = moe_reduce.load(base("llama"))
    before = np.asarray(model(TOKENS))
    adapters.activate(model, adapter_directory.load(directory, model.config, None))
    assert np.array_equal(np.asarray(model(TOKENS)), before)
