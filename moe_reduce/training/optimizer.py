"""AdamW with a warm-up cosine schedule, clipping, and a weight-decay mask that must name every leaf."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import jax
import optax

from moe_reduce import planning, trees
from moe_reduce.config import TrainConfig

F = TypeVar("F", bound=Callable[..., Any])
DECAYED = {  # by component: matrices decay; norms, biases and gains do not
    "embedding": True,
    "unembedding": True,
    "attention": True,
    "feed_forward": True,
    "experts": True,
    "router": True,
    "router_bias": False,
    "score_offset": False,
    "output_gain": False,
    "norm": False,
    "adapter": True,
    "bias": False,
}


def _mixing(function: F) -> F:
    """optax multiplies its integer step counts with floats, which strict promotion (in our tests) refuses."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **named)

    return call  # type: ignore[return-value]


def learning_rate(train: TrainConfig) -> optax.Schedule:
    """Of the step that follows `count` steps: linear from 0 to the peak, then cosine towards the final rate."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if train.warmup_steps else train.learning_rate,
        peak_value=train.learning_rate,
        warmup_steps=train.warmup_steps,
        decay_steps=train.steps,
        end_value=train.final_learning_rate,
    )
    return _mixing(schedule)


def decay_mask(params: trees.Tree) -> dict[str, Any]:
    """True where weight decay applies; a leaf of an unknown component raises KeyError."""
    # DoRA's magnitudes are gains among matrices
    return trees.map_with_path(
        lambda path, _: DECAYED[planning.component(path)] and not path.endswith("/magnitude"), params
    )


def build(train: TrainConfig, params: trees.Tree) -> optax.GradientTransformation:
    """The optimiser of a run; `params` (real or abstract) only decides the masks."""
    parts = [
        optax.clip_by_global_norm(train.clip_norm),
        optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.epsilon),
        optax.add_decayed_weights(train.weight_decay, mask=decay_mask(params)),
        optax.scale_by_learning_rate(learning_rate(train)),
    ]
    if train.expert_learning_rate_scale != 1.0:
        experts = trees.map_with_path(lambda path, _: planning.component(path) == "experts", params)
        parts.append(optax.masked(optax.scale(train.expert_learning_rate_scale), experts))
    chain = optax.chain(*parts)
    return optax.GradientTransformation(chain.init, _mixing(chain.update))
