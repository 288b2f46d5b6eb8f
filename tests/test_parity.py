"""fp32 parity with transformers, on tiny random models and on a really trained one: logits and every gradient."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers_models import tensors_by_name, written

import moe_reduce
from moe_reduce.models.decoder import Decoder
from moe_reduce.storage.parameter_tensors import write_items

TOLERANCE = 1e-4  # of the largest absolute value of each tensor
STORIES = Path(__file__).resolve().parents[2] / "shared/data/models/stories260k"
CASES = [
    *[
        pytest.param("llama", {"num_key_value_heads": heads, "tie_word_embeddings": tied}, id=f"llama-{name}-{tied=}")
        for name, heads in (("mha", 4), ("gqa", 2), ("mqa", 1))
        for tied in (True, False)
    ],
    pytest.param("qwen3", {"tie_word_embeddings": True}, id="qwen3-tied"),
    pytest.param("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, id="qwen3-theta"),
    pytest.param("qwen3_moe", {"norm_topk_prob": True}, id="qwen3_moe-normalised"),
    pytest.param("qwen3_moe", {"norm_topk_prob": False, "rms_norm_eps": 1e-2}, id="qwen3_moe-raw-weights"),
    *[
        pytest.param(
            "gpt_neox", {"use_parallel_residual": parallel, "rotary_pct": share}, id=f"gpt_neox-{name}-{share}"
        )
        for name, parallel in (("parallel", True), ("sequential", False))
        for share in (0.25, 1.0)
    ],
    pytest.param("gpt_neox", {"tie_word_embeddings": True, "layer_norm_eps": 1e-2}, id="gpt_neox-tied"),
    pytest.param("gpt_neox", {"rotary_emb_base": 100, "rotary_pct": 0.5}, id="gpt_neox-theta"),
    pytest.param("olmoe", {"num_key_value_heads": 4, "norm_topk_prob": False}, id="olmoe-mha-raw-weights"),
    pytest.param(
        "olmoe",
        {"clip_qkv": 0.9, "norm_topk_prob": True, "rms_norm_eps": 1e-2, "tie_word_embeddings": True},
        id="olmoe-gqa-clipped-normalised-tied",
    ),
]


def assert_close(ours: np.ndarray, theirs: np.ndarray, name: str):
    assert ours.shape == theirs.shape, name
    scale = np.abs(theirs).max()
    assert scale > 0, f"{name} is zero throughout: the comparison would prove nothing"
    assert np.abs(ours - theirs).max() <= TOLERANCE * scale, name


def mean_loss(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits_BTV[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=-1))


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_logits_and_gradients(tmp_path: Path, kind: str, changes: dict):
    theirs = written(tmp_path, kind, **changes)
    model = moe_reduce.load(tmp_path)
    tokens_BT = np.random.default_rng(0).integers(0, 61, (3, 20), dtype=np.int32)

    output = theirs(torch.from_numpy(tokens_BT).long())
    flat = output.logits[:, :-1].reshape(-1, 61)
    torch.nn.functional.cross_entropy(flat, torch.from_numpy(tokens_BT[:, 1:]).long().reshape(-1)).backward()

    def loss(params):
        logits_BTV = Decoder(model.config, model.execution).apply({"params": params}, tokens_BT)
        return mean_loss(logits_BTV, jnp.asarray(tokens_BT)), logits_BTV

    gradients, logits_BTV = jax.jit(jax.grad(loss, has_aux=True))(model.params)
    assert_close(np.asarray(logits_BTV), output.logits.detach().numpy(), "logits")
    ours = {name: array() for name, _, _, array in write_items(gradients, model.config)}
    expected = tensors_by_name(theirs, gradients=True)
    assert set(ours) == set(expected)
    for name, array in expected.items():
        assert_close(ours[name], array, name)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here: the trained model is not part of the code")
def test_trained_model_loss():
    model = moe_reduce.load(STORIES)
    with gzip.open(STORIES / "sample.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) > 10
    longest = max(len(row["tokens"]) for row in rows)
    # Attention is causal: what follows the last token of a row does not touch the losses before it.
    tokens_BT = np.array([row["tokens"] + [0] * (longest - len(row["tokens"])) for row in rows], np.int32)
    log_p = jax.nn.log_softmax(model(tokens_BT)[:, :-1])
    nll_BT = -np.asarray(jnp.take_along_axis(log_p, jnp.asarray(tokens_BT[:, 1:, None]), axis=-1))[..., 0]
    means = [nll[: len(row["tokens"]) - 1].mean() for nll, row in zip(nll_BT, rows, strict=True)]
    np.testing.assert_allclose(means, [row["mean_nll"] for row in rows], rtol=0, atol=1e-4)
