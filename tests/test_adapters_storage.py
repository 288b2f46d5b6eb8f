"""Adapters on disk: our own directory, what is refused, and PEFT in both directions."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from test_adapters import ADAPTER_METHODS, disturbed, model_of
from training_runs import assert_close, random_batch
from transformers_models import tiny, written

import moe_reduce
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import adapter_directory, merging
from moe_reduce.adapters.peft_modules import CONFIG_FILE, WEIGHTS_FILE
from moe_reduce.core.config import AdapterConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input
from moe_reduce.storage import manifest
from moe_reduce.storage.tensors import TensorFiles, write_file

# PEFT asks transformers 5 by an older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

BASE = Input("base", "0" * 64)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))
PEFT_TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def saved(directory, method="skema", kind="dense", **changes):
    """(model, adapter), the adapter written to the directory."""
    model = model_of(kind)
    adapter = disturbed(adapters.init(dataclasses.replace(ADAPTER_METHODS[method], **changes), model))
    directory.mkdir(parents=True, exist_ok=True)
    adapter_directory.save(adapter, model.config, BASE, directory)
    return model, adapter


@pytest.mark.parametrize("method", list(ADAPTER_METHODS))
def test_round_trip_bit_for_bit(tmp_path, method):
    model, adapter = saved(tmp_path, method)
    again = adapter_directory.load(tmp_path, model.config, BASE)
    assert again.config == adapter.config
    assert_close(again.tree, adapter.tree)
    stored = set(TensorFiles(tmp_path, adapter_directory.WEIGHTS).entries)
    assert any("rows" in name or "in/matrix" in name for name in stored) == (
        "skema" not in method or method == "skema_trainable"
    ), "fixed projections are made again"


def test_experts_have_no_peft_files(tmp_path):
    model, adapter = saved(tmp_path, "lora", "layer", targets="q,mlp")
    assert not (tmp_path / WEIGHTS_FILE).exists()
    assert_close(adapter_directory.load(tmp_path, model.config, BASE).tree, adapter.tree)


def test_stored_projections(tmp_path):
    model, adapter = saved(tmp_path, stored_projections=True)
    assert_close(adapter_directory.load(tmp_path, model.config, BASE).tree, adapter.tree)
    assert "layers/attention/query/in/matrix" in TensorFiles(tmp_path, adapter_directory.WEIGHTS).entries


def test_what_was_tampered_with_is_refused(tmp_path):
    model, _ = saved(tmp_path)
    described = json.loads((tmp_path / adapter_directory.DESCRIPTION).read_text())

    def refused(part, **changes):
        (tmp_path / adapter_directory.DESCRIPTION).write_text(json.dumps(described | changes))
        with pytest.raises(UserError, match=part) as caught:
            adapter_directory.load(tmp_path, model.config, BASE)
        assert "\n" not in str(caught.value)

    refused("do not have the hash", projections={"sha256": "1" * 64, "stored": False})
    refused("do not have the hash", config=described["config"] | {"seed": 7})
    refused("does not describe the adapter", digest="1" * 64)
    refused("does not describe the adapter", config=described["config"] | {"alpha": 3.0})
    refused("adapter.seed must be at least 0", config=described["config"] | {"seed": -1})
    refused("is another model", base={"path": "elsewhere", "sha256": "1" * 64})
    refused("config key config.size is unknown", config=described["config"] | {"size": 7})
    refused("this base needs|has no place|do not have the hash", config=described["config"] | {"sketch_width": 4})
    refused("is not what adapt writes", files=None)
    (tmp_path / adapter_directory.DESCRIPTION).write_text(json.dumps(described))
    weights = bytearray((tmp_path / adapter_directory.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (tmp_path / adapter_directory.WEIGHTS).write_bytes(weights)
    with pytest.raises(UserError, match="has changed"):
        adapter_directory.load(tmp_path, model.config, BASE)
    (tmp_path / adapter_directory.WEIGHTS).unlink()
    with pytest.raises(UserError, match="is missing"):
        adapter_directory.load(tmp_path, model.config, BASE)


def torch_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS)).logits.numpy()


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * float(np.max(np.abs(expected))))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 8},
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True, "lora_alpha": 8},
        {"r": 20, "lora_alpha": 8},
        {"layers_to_transform": [1], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    ],
    ids=["lora", "rslora", "dora", "wasteful", "patterns"],
)
def test_peft_trained_it_and_we_compute_it(tmp_path, kind, changes):
    written(tmp_path / "base", kind)
    config = peft.LoraConfig(**{"r": 3} | changes, target_modules=PEFT_TARGETS, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny(kind), config)
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=3e-2)
    ids = torch.from_numpy(TOKENS)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    theirs.eval().save_pretrained(tmp_path / "adapter")
    model = moe_reduce.load(tmp_path / "base")
    adapter = adapter_directory.load(tmp_path / "adapter", model.config, None)
    expected = torch_logits(theirs)
    assert np.max(np.abs(expected - np.asarray(model(TOKENS)))) > 1e-2 * np.max(np.abs(expected))
    close(adapters.activate(model, adapter)(TOKENS), expected)
    close(merging.merge(model, adapter)(TOKENS), expected)
    (tmp_path / "again").mkdir()
    adapter_directory.save(adapter, model.config, manifest.input_of(tmp_path / "base"), tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path / "again")).eval()
    close(torch_logits(again), expected)


def test_one_module_for_queries_keys_and_values(tmp_path):
    """GPT-NeoX: PEFT adapts query_key_value as a whole, in both directions."""
    written(tmp_path / "base", "gpt_neox")
    model = moe_reduce.load(tmp_path / "base")
    for method, words in (("lora", "q,v,down"), ("rslora", "q,k,v"), ("skema", "q@1,v,up"), ("dora", "q,k,v,o")):
        adapter = disturbed(adapters.init(dataclasses.replace(ADAPTER_METHODS[method], targets=words), model))
        directory = tmp_path / method
        directory.mkdir()
        adapter_directory.save(adapter, model.config, manifest.input_of(tmp_path / "base"), directory)
        theirs = peft.PeftModel.from_pretrained(tiny("gpt_neox"), str(directory)).eval()
        close(torch_logits(theirs), adapters.activate(model, adapter)(TOKENS))
    partly = disturbed(adapters.init(dataclasses.replace(ADAPTER_METHODS["dora"], targets="q,v"), model))
    (tmp_path / "partly").mkdir()
    adapter_directory.save(partly, model.config, BASE, tmp_path / "partly")
    assert not (tmp_path / "partly" / WEIGHTS_FILE).exists(), "PEFT's DoRA rescales every output of a module"
    config = peft.LoraConfig(r=3, target_modules=["query_key_value", "dense"], init_lora_weights=False, use_dora=True)
    theirs = peft.get_peft_model(tiny("gpt_neox"), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = adapter_directory.load(tmp_path / "theirs", model.config, None)
    close(adapters.activate(model, adapter)(TOKENS), torch_logits(theirs))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("method", [name for name in ADAPTER_METHODS if name != "skema_trainable"])
def test_we_wrote_it_and_peft_computes_it(tmp_path, kind, method):
    written(tmp_path / "base", kind)
    model = moe_reduce.load(tmp_path / "base")
    words = dataclasses.replace(ADAPTER_METHODS[method], targets="q,k@1,o,down")
    adapter = disturbed(adapters.init(words, model))
    (tmp_path / "adapter").mkdir()
    adapter_directory.save(adapter, model.config, manifest.input_of(tmp_path / "base"), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path / "adapter")).eval()
    close(torch_logits(theirs), adapters.activate(model, adapter)(TOKENS))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"bias": "some"}, "bias='some' is not supported"),
        ({"modules_to_save": ["score"]}, "which this model does not have: it belongs to a model of another task"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is not supported"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"of_a_later_version": {"x": 1}}, "of_a_later_version"),
        ({"use_dora": True, "use_rslora": True}, "only one of them"),
        ({"use_dora": True}, "but no lora_magnitude_vector"),
        ({"lora_alpha": "16x"}, "must hold numbers"),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused(tmp_path, changes, part):
    model, _ = saved(tmp_path, "lora")
    (tmp_path / adapter_directory.DESCRIPTION).unlink()
    raw = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(raw | changes))
    with pytest.raises(UserError, match=part):
        adapter_directory.load(tmp_path, model.config, None)


def test_tensors_that_have_no_place_are_refused(tmp_path):
    model, _ = saved(tmp_path, "lora")
    (tmp_path / adapter_directory.DESCRIPTION).unlink()
    files = TensorFiles(tmp_path, WEIGHTS_FILE)
    items = [(name, entry.shape, entry.dtype, files.read(name).copy()) for name, entry in files.entries.items()]

    def refused(part, changed):
        write_file(tmp_path / WEIGHTS_FILE, changed)
        with pytest.raises(UserError, match=part):
            adapter_directory.load(tmp_path, model.config, None)

    extra = np.zeros((2, 2), np.float32)
    refused("is not part of a LoRA", [*items, ("base_model.model.lm_head.weight", (2, 2), extra.dtype, extra)])
    name = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    refused("does not have as a matrix", [*items, (name, (2, 2), extra.dtype, extra)])
    refused("but no lora_B.weight", [item for item in items if "0.self_attn.q_proj.lora_B" not in item[0]])
    wide = [(n, (shape[0], shape[1] + 1), d, np.pad(x, ((0, 0), (0, 1)))) for n, shape, d, x in items if "lora_A" in n]
    tall = [(n, (s[0] + 1, s[1]), d, np.pad(x, ((0, 1), (0, 0)))) for n, s, d, x in items if "v_proj.lora_B" in n]
    refused("this base needs", tall + [item for item in items if "v_proj.lora_B" not in item[0]])
    refused("this base needs", wide + [item for item in items if "lora_A" not in item[0]])


def test_adapted_models_are_saved_merged_only(tmp_path):
    model = model_of("dense")
    active = adapters.activate(model, adapters.init(AdapterConfig(rank=2), model))
    with pytest.raises(UserError, match="adapter"):
        moe_reduce.save(active, tmp_path / "model")
    assert float(jnp.sum(jnp.abs(active(random_batch()["tokens"]) - model(random_batch()["tokens"])))) == 0


def test_lora_is_known_again_in_the_form_of_peft(tmp_path):
    """Of which its own directory holds a copy, under another configuration."""
    model, adapter = saved(tmp_path, "lora")
    (tmp_path / adapter_directory.DESCRIPTION).unlink()
    again = adapter_directory.load(tmp_path, model.config, None)
    assert again.config != adapter.config
    with pytest.raises(UserError, match="has been merged into this model before"):
        merging.merge(merging.merge(model, adapter), again)
