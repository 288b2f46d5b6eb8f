"""AdamW with a warm-up, a decaying learning rate and gradient clipping."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import jax
import optax

from moe_reduce.core import trees
from moe_reduce.core.config import TrainConfig
from moe_reduce.models.parameters import Records, record_at

F = TypeVar("F", bound=Callable[..., Any])


def _mixing(function: F) -> F:
    """Allow optax to multiply its integer step counts by floats, which strict promotion (used in tests) forbids."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **named)

    return call  # type: ignore[return-value]


def learning_rate(train: TrainConfig) -> optax.Schedule:
    """Learning rate after `count` steps: linear from 0 to the peak, then a cosine or a line down to the final rate."""
    if train.decay == "cosine":
        return _mixing(
            optax.warmup_cosine_decay_schedule(
                init_value=0.0 if train.warmup_steps else train.learning_rate,
                peak_value=train.learning_rate,
                warmup_steps=train.warmup_steps,
                decay_steps=train.steps,
                end_value=train.final_learning_rate,
            )
        )
    rising = optax.linear_schedule(0.0, train.learning_rate, train.warmup_steps)
    falling = optax.linear_schedule(train.learning_rate, train.final_learning_rate, train.steps - train.warmup_steps)
    return _mixing(optax.join_schedules([rising, falling], [train.warmup_steps]))


def decay_mask(params: trees.Tree, records: Records) -> dict[str, Any]:
    """Tree of booleans, True where weight decay applies; a leaf without a record raises UserError."""
    return trees.map_with_path(lambda path, _: record_at(records, path).decays, params)


def build(train: TrainConfig, params: trees.Tree, records: Records) -> optax.GradientTransformation:
    """Build the optimiser of a run. params: real or abstract leaves, whose records decide which of them decay."""
    parts = [
        optax.clip_by_global_norm(train.clip_norm),
        optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.epsilon),
        optax.add_decayed_weights(train.weight_decay, mask=decay_mask(params, records)),
        optax.scale_by_learning_rate(learning_rate(train)),
    ]
    if train.expert_learning_rate_scale != 1.0:
        experts = trees.map_with_path(lambda path, _: record_at(records, path).component == "experts", params)
        parts.append(optax.masked(optax.scale(train.expert_learning_rate_scale), experts))
    chain = optax.chain(*parts)
    return optax.GradientTransformation(chain.init, _mixing(chain.update))
