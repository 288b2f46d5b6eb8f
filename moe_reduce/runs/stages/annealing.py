"""The selection bias that holds a pool's foreign experts back, lowered while a stage trains.

The home layer of an expert is the layer that it came from; in every other layer it is foreign.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step, home_layers
from moe_reduce.core.stages import TuneStage
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import ROUTER_BIAS, by_path
from moe_reduce.reduction.transform import moe_of, transform
from moe_reduce.training.task import Params


def check_pool(config: ModelConfig) -> None:
    """Raises UserError unless the model is a pool whose layers have a selection bias."""
    moe = moe_of(config)
    if not (moe.placement == "shared" and moe.selection_bias):
        raise UserError("bias_from needs a pool, whose layers have a selection bias: put a pool stage before")


def foreign_experts(config: ModelConfig, chain: tuple[Step, ...]) -> np.ndarray:
    """Mask of the experts of a pool that are foreign in each layer, bool [N, E].

    Raises UserError when the chain does not name the home layer of each expert.
    """
    home_1E = home_layers(config, chain)
    if home_1E is None:
        raise UserError(
            "the manifest of this pool does not say which layer each expert came from, which bias_from needs: "
            "leave it out, or pool the model anew"
        )
    return home_1E != np.arange(config.expert_layers)[:, None]


def start_annealing(model: Model, stage: TuneStage, foreign_NE: np.ndarray) -> Model:
    """Set the bias of foreign experts to its value at the first step, -bias_from."""
    assert stage.bias_from is not None
    start = jnp.float32(-stage.bias_from)
    bias = by_path(model.config)[ROUTER_BIAS]
    return transform(
        model, model.config, [bias], lambda leaves: {bias.path: jnp.where(foreign_NE, start, leaves[bias.path])}
    )


def anneal(stage: TuneStage, foreign_NE: np.ndarray, params: Params, metrics: dict[str, jax.Array]) -> Params:
    """Move the bias of foreign experts one training step towards its final value, -bias_to."""
    del metrics
    assert stage.bias_from is not None
    step = (stage.bias_from - stage.bias_to) / max(1, round(stage.steps * stage.anneal_share))
    bias_NE = trees.flatten(params)[ROUTER_BIAS]
    moved_NE = jnp.minimum(bias_NE + jnp.float32(step), jnp.float32(-stage.bias_to))
    return trees.update(params, {ROUTER_BIAS: jnp.where(foreign_NE, moved_NE, bias_NE)})
