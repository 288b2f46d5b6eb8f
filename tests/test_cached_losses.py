"""Losses of tokens that are read from the KV cache: those of the whole text at once, and what rounding it adds."""

import numpy as np
import pytest
from training_runs import MODELS, initial_params, random_batch

from moe_reduce.core.config import ExecutionConfig
from moe_reduce.inference.cached_losses import cached_losses
from moe_reduce.inference.generate import prepared, ready
from moe_reduce.models.model import Model
from moe_reduce.training.losses import token_losses

START = 8


@pytest.mark.parametrize("prepare", [prepared, ready])
def test_losses_through_a_cache_are_those_without_one(prepare):
    config = MODELS["dense"]
    model = Model(config, initial_params(config), ExecutionConfig().resolve("cpu"))
    batch = random_batch(rows=3)
    logits_BTV, _ = model.apply(batch)
    expected = np.asarray(token_losses(logits_BTV, batch)[0])[:, START:]
    found = {dtype: cached_losses(prepare(model), batch, START, dtype) for dtype in ("auto", "int8", "int4")}
    np.testing.assert_allclose(found["auto"], expected, rtol=1e-4)
    errors = [np.abs(found[dtype] - expected).max() for dtype in ("auto", "int8", "int4")]
    assert errors[0] < errors[1] < errors[2] < 0.1
