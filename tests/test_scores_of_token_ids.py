"""Scores on token ids (.npy): every token given is run and counted, and the file says how long a sequence is."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model

SEQUENCES, LENGTH = 6, 40


@pytest.fixture
def model(tmp_path, tiny_layer_moe):
    """A mixture on disk as tmp_path/model, beside token ids in tmp_path/ids.npy."""
    moe = dataclasses.replace(tiny_layer_moe.moe, experts=8)
    config = dataclasses.replace(tiny_layer_moe, init_std=0.3, moe=moe)
    made = Model(config, init_params(config, jax.random.key(0)), ExecutionConfig().resolve("cpu"))
    moe_reduce.save(made, tmp_path / "model")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (SEQUENCES, LENGTH), dtype=np.int32)
    np.save(tmp_path / "ids.npy", ids)
    return made


def score(tmp_path, *more):
    """Run the command; return its content of scores.json."""
    out = tmp_path / "scores.json"
    given = [f"--model={tmp_path / 'model'}", f"--data={tmp_path / 'ids.npy'}", f"--out={out}", "--overwrite"]
    assert main(["score", *given, "--criteria=reap,frequency", *more]) == 0
    return json.loads(out.read_text())


def reap(model, ids):
    """(number of tokens, REAP) by layer and expert, in float64 and plain numpy from the router's inputs."""
    moe, flat = (
        model.config.moe,
        {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(model.params).items()},
    )
    hidden = model.apply({"tokens": ids}, collect=("hidden",)).collected["hidden"]["router_input"]
    inputs = np.asarray(hidden, np.float64).reshape(model.config.layers, ids.size, model.config.width)
    count, total = (np.zeros((model.config.layers, moe.experts)) for _ in range(2))
    for layer, inputs_SD in enumerate(inputs):
        logits_SE = inputs_SD @ flat["layers/router/weight"][layer]
        for x, z in zip(inputs_SD, logits_SE, strict=True):
            chosen = np.argsort(-z, kind="stable")[: moe.active]
            shares = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            weights = shares / shares[chosen].sum() if moe.normalize else shares
            for expert in chosen:
                gate, up, down = (flat[f"layers/experts/{name}"][layer, expert] for name in ("gate", "up", "down"))
                output = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
                count[layer, expert] += 1
                total[layer, expert] += weights[expert] * np.sqrt(np.sum(output**2))
    return count, total / np.maximum(count, 1)


@pytest.mark.parametrize("how", [[], ["--batch-size=4"], ["--layer-wise"], [f"--sequence-length={LENGTH}"]])
def test_reap_of_every_token_equals_a_plain_reference(model, tmp_path, how):
    found = score(tmp_path, *how)
    count, expected = reap(model, np.load(tmp_path / "ids.npy"))
    assert found["tokens"] == SEQUENCES * LENGTH
    np.testing.assert_array_equal(found["counts"], count)
    assert np.sum(found["counts"]) == SEQUENCES * LENGTH * model.config.moe.active * model.config.layers
    np.testing.assert_allclose(found["scores"]["reap"], expected, rtol=1e-5)


@pytest.mark.usefixtures("model")
def test_the_file_says_how_long_a_sequence_is_to_every_command(tmp_path, capsys):
    given = [f"--model={tmp_path / 'model'}", f"--data={tmp_path / 'ids.npy'}"]
    assert main(["evaluate", *given, f"--out={tmp_path / 'evaluation'}"]) == 0
    summary = json.loads((tmp_path / "evaluation/summary.json").read_text())
    assert (summary["tokens"], summary["sequence_length"]) == (SEQUENCES * (LENGTH - 1), LENGTH)  # targets
    assert main(["drop-layers", *given, "--count=1", f"--out={tmp_path / 'dropped'}"]) == 0
    for command in (["score"], ["evaluate"], ["drop-layers", "--count=1"]):
        capsys.readouterr()
        assert main([*command, *given, "--sequence-length=20", f"--out={tmp_path / 'other.json'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "ids.npy has sequences of 40 tokens" in line
        assert "--sequence-length" in line
