"""Every family as transformers writes it: logits, gradients, generation, saving, scoring, pruning and pooling."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from families_cases import CASES, KINDS, VOCABULARY, tokens, written

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.config import GenerateConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.stages import PoolStage
from moe_reduce.families import of_config, text_part
from moe_reduce.inference.generate import generate
from moe_reduce.models.decoder import Decoder
from moe_reduce.reduction.pool import pool
from moe_reduce.reduction.prune import prune
from moe_reduce.storage.parameter_tensors import write_items
from moe_reduce.storage.tensors import SINGLE_FILE, TensorFiles

TOLERANCE = 1e-4  # of the largest absolute value of each tensor
TOKENS_BT = tokens()
DENSE = ("qwen2", "mistral")
MIXTURES = [(kind, number) for kind, number in KINDS if kind not in DENSE]
LONG = ("qwen3_next", "qwen3_5_moe_text")  # of four layers, of two kinds
FURTHEST = ("gpt_oss", "deepseek_v3")  # between them they have most of what a mixture may have


def slow_if(slow: Callable[[str, int], bool], cases: Sequence[tuple[str, int]]) -> list[Any]:
    """Cases, of which some are for the slow tests, because every family and configuration compiles programs anew."""
    return [pytest.param(*case, marks=[pytest.mark.slow] * slow(*case)) for case in cases]


LOGITS = slow_if(lambda _, number: number > 0, KINDS)
EVERY = slow_if(lambda kind, number: number > 0 or kind in LONG, KINDS)
LATER = slow_if(lambda kind, number: number > 0 or kind not in FURTHEST, MIXTURES)


def assert_close(ours: Any, theirs: Any, name: str, tolerance: float = TOLERANCE):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, name
    scale = np.abs(theirs).max()
    assert scale > 0, f"{name} is zero throughout: the comparison would prove nothing"
    assert np.abs(ours - theirs).max() <= tolerance * scale, name


def logits_of(theirs: Any, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens_BT).long()).logits.numpy()


def their_gradients(theirs: Any, directory: Path) -> dict[str, np.ndarray]:
    """Gradients by the name of their tensor on disk, written there by transformers in the place of the weights."""
    flat = theirs(torch.from_numpy(TOKENS_BT).long()).logits[:, :-1].reshape(-1, VOCABULARY)
    torch.nn.functional.cross_entropy(flat, torch.from_numpy(TOKENS_BT[:, 1:]).long().reshape(-1)).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(directory)
    files = TensorFiles(directory)
    return {name: np.array(files.read(name)) for name in files.entries}


@pytest.mark.parametrize(("kind", "number"), LOGITS)
def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path, kind: str, number: int):
    theirs = written(tmp_path / "model", kind, number)
    model = moe_reduce.load(tmp_path / "model")
    assert of_config(model.config).name == kind
    expected = logits_of(theirs, TOKENS_BT)

    def loss(params):
        logits_BTV = Decoder(model.config, model.execution).apply({"params": params}, TOKENS_BT)
        log_p = jax.nn.log_softmax(logits_BTV[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, jnp.asarray(TOKENS_BT)[:, 1:, None], axis=-1)), logits_BTV

    gradients, logits_BTV = jax.jit(jax.grad(loss, has_aux=True))(model.params)
    assert_close(logits_BTV, expected, "logits")
    wanted = their_gradients(theirs, tmp_path / "gradients")
    ours = {name: array() for name, _, _, array in write_items(gradients, model.config)}
    assert set(ours) == set(wanted)
    used = 0
    for name, array in wanted.items():
        if ".experts." in name and not array.any():  # no token was routed to this expert
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
        elif "e_score_correction_bias" not in name:  # learned without a gradient
            assert_close(ours[name], array, name)
            used += ".experts." in name
    experts = sum(".experts." in name for name in wanted)
    assert used >= 0.7 * experts


@pytest.mark.parametrize(("kind", "number"), EVERY)
def test_saving_gives_the_same_directory_and_transformers_opens_it(tmp_path: Path, kind: str, number: int):
    theirs = written(tmp_path / "theirs", kind, number)
    model = moe_reduce.load(tmp_path / "theirs")
    moe_reduce.save(model, tmp_path / "ours")
    ours, given = TensorFiles(tmp_path / "ours"), TensorFiles(tmp_path / "theirs")
    assert set(ours.entries) == set(given.entries)
    for name in given.entries:
        a, b = ours.read(name), given.read(name)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name
    assert (tmp_path / "ours/config.json").read_bytes() == (tmp_path / "theirs/config.json").read_bytes()
    moe_reduce.save(dataclasses.replace(model, hf_config=None, source=None), tmp_path / "fresh")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fresh", attn_implementation="eager").eval()
    assert type(opened) is type(theirs)
    assert_close(logits_of(opened, TOKENS_BT), logits_of(theirs, TOKENS_BT), "logits", 1e-6)


@pytest.mark.parametrize(("kind", "number"), EVERY)
def test_generation_with_a_cache_is_that_of_transformers(tmp_path: Path, kind: str, number: int):
    theirs = written(tmp_path, kind, number)
    model = moe_reduce.load(tmp_path)
    prompts = [TOKENS_BT[0, :9].tolist(), TOKENS_BT[1, :5].tolist()]
    found = generate(model, prompts, GenerateConfig(max_tokens=8))
    for prompt, row in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        given = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        assert row == theirs.generate(ids, **given)[0, len(prompt) :].tolist()


def scores_of(directory: Path, *more: str) -> Path:
    np.save(directory.parent / "tokens.npy", tokens(8, 16))
    out = directory.parent / f"scores{len(more)}.json"
    data = [f"--data={directory.parent / 'tokens.npy'}", "--sequence-length=16", "--batch-size=4", "--criteria=all"]
    assert main(["score", f"--model={directory}", *data, f"--out={out}", *more]) == 0
    return out


@pytest.mark.parametrize(("kind", "number"), LATER)
def test_layer_by_layer_scores_are_those_of_the_whole_model(tmp_path: Path, kind: str, number: int):
    written(tmp_path / "model", kind, number)
    whole, layers = (json.loads(scores_of(tmp_path / "model", *more).read_text()) for more in ([], ["--layer-wise"]))
    assert whole["counts"] == layers["counts"]
    for name, values in whole["scores"].items():
        np.testing.assert_allclose(layers["scores"][name], values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("kind", "number"), LATER)
def test_a_pruned_directory_is_the_transform_and_opens_in_transformers(tmp_path: Path, kind: str, number: int):
    written(tmp_path / "model", kind, number)
    model = moe_reduce.load(tmp_path / "model")
    assert model.config.moe is not None
    half = model.config.moe.experts // 2 + model.config.moe.experts // 2 % model.config.moe.groups
    arguments = [f"--scores={scores_of(tmp_path / 'model')}", f"--keep={half}", f"--out={tmp_path / 'out'}"]
    assert main(["prune", f"--model={tmp_path / 'model'}", *arguments]) == 0
    small = moe_reduce.load(tmp_path / "out")
    kept = tuple(tuple(index for _, index in row) for row in small.chain[-1].kept_experts or ())
    flat = trees.flatten(prune(model, kept).params)
    assert set(flat) == set(trees.flatten(small.params))
    for path, leaf in trees.flatten(small.params).items():
        np.testing.assert_array_equal(leaf, flat[path], err_msg=path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert_close(small(TOKENS_BT), logits_of(opened, TOKENS_BT), "logits")


@pytest.mark.parametrize(("kind", "number"), LATER)
@pytest.mark.parametrize("canonical", [False, True])
def test_a_pool_computes_the_same(tmp_path: Path, kind: str, number: int, canonical: bool):
    written(tmp_path / "model", kind, number)
    model = moe_reduce.load(tmp_path / "model")
    pooled = pool(model, PoolStage(canonical=canonical))
    assert of_config(pooled.config).name == "moe_reduce"
    moe_reduce.save(pooled, tmp_path / "pool")
    again = moe_reduce.load(tmp_path / "pool")
    assert again.config == pooled.config
    assert_close(again(TOKENS_BT), model(TOKENS_BT), "logits", 1e-5)


def test_layers_that_predict_further_tokens_are_named_and_carried_through_pruning(tmp_path: Path, capsys):
    written(tmp_path / "model", "deepseek_v3", 0)
    expected = moe_reduce.load(tmp_path / "model")
    file = tmp_path / "model" / SINGLE_FILE
    arrays = safetensors.numpy.load_file(file)
    extra = {f"model.layers.3.{name}": np.arange(6, dtype=np.float32) + 1 for name in ("eh_proj.weight", "norm.weight")}
    safetensors.numpy.save_file(arrays | extra, file)
    scores = scores_of(tmp_path / "model")
    capsys.readouterr()
    found = moe_reduce.load(tmp_path / "model")
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 tensors, such as model.layers.3.eh_proj.weight, predict further tokens and are not read" in line
    np.testing.assert_array_equal(found(TOKENS_BT), expected(TOKENS_BT))
    arguments = [f"--scores={scores}", "--keep=0.5", f"--out={tmp_path / 'out'}"]
    assert main(["prune", f"--model={tmp_path / 'model'}", *arguments]) == 0
    files = TensorFiles(tmp_path / "out")
    for name, array in extra.items():
        np.testing.assert_array_equal(files.read(name), array)
    safetensors.numpy.save_file(arrays | {"model.layers.2.eh_proj.weight": extra["model.layers.3.norm.weight"]}, file)
    with pytest.raises(UserError, match=r"model\.layers\.2\.eh_proj\.weight .* has no place in this model"):
        moe_reduce.load(tmp_path / "model")


@pytest.mark.parametrize("name_of", text_part.NAMES)
def test_the_language_model_of_a_multimodal_one_is_read(tmp_path: Path, capsys, name_of):
    written(tmp_path / "plain", "mistral", 0)
    expected = moe_reduce.load(tmp_path / "plain")
    arrays = safetensors.numpy.load_file(tmp_path / "plain" / SINGLE_FILE)
    whole = {name_of(name): array for name, array in arrays.items()} | {"vision_tower.weight": np.ones(3, np.float32)}
    (tmp_path / "model").mkdir()
    safetensors.numpy.save_file(whole, tmp_path / "model" / SINGLE_FILE)
    inner = json.loads((tmp_path / "plain/config.json").read_text())
    config = {"model_type": "mistral3", "architectures": ["X"], "text_config": inner, "vision_config": {"width": 3}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    model = moe_reduce.load(tmp_path / "model")
    assert "1 tensors, such as vision_tower.weight, are not of the language model" in capsys.readouterr().err
    np.testing.assert_array_equal(model(TOKENS_BT), expected(TOKENS_BT))
    moe_reduce.save(model, tmp_path / "again")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    assert type(opened) is transformers.MistralForCausalLM
    assert_close(model(TOKENS_BT), logits_of(opened, TOKENS_BT), "logits")


def test_every_family_has_its_cases():
    assert set(CASES) <= set(transformers.CONFIG_MAPPING)
