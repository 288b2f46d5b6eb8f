"""Next-token cross-entropy with balancing terms and distillation, as a loss and as a task for the loop."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core import trees
from moe_reduce.core.config import BalanceConfig, ExecutionConfig, ModelConfig, MoEConfig
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import ROUTER_BIAS, Records, by_path, nested_under
from moe_reduce.training.distillation import Distillation
from moe_reduce.training.task import TEACHER, Batch, Params, Sums, Task, never, no_change, split_teacher
from moe_reduce.training.validation import Mean

LossAndMetrics = tuple[jax.Array, dict[str, jax.Array]]


def language_model_task(
    model: ModelConfig, execution: ExecutionConfig, balance: BalanceConfig, distillation: Distillation | None = None
) -> Task:
    """Pretraining task: every leaf of the model trains on `next_token_loss`."""
    skeleton = Model(model, {}, execution)

    def after_step(params: Params, metrics: dict[str, jax.Array]) -> Params:
        return move_bias(params, metrics["counts_NE"], balance)

    return Task(
        loss=partial(next_token_loss, skeleton, balance, distillation),
        evaluate=evaluator(skeleton),
        records={**by_path(model), **teacher_records(distillation)},
        after_step=after_step if balance.bias_rate > 0 else no_change,
        stop=partial(collapse, balance) if model.moe else never,
    )


def next_token_loss(
    student: Model, balance: BalanceConfig, distillation: Distillation | None, params: Params, batch: Batch
) -> LossAndMetrics:
    """Cross-entropy, mixed with the divergence from the teacher if there is one, plus the balancing penalty.

    student: without parameters, which are in `params`, with those of a live teacher below TEACHER.
    """
    own, teachers = split_teacher(params)
    logits_BTV, penalty, metrics = predict(student.with_params(own), balance, batch)
    if distillation is None:
        return metrics["loss"] + penalty, metrics
    divergence = distillation.divergence(teachers, logits_BTV, batch)
    return distillation.mixed(metrics["loss"], divergence) + penalty, metrics | {"teacher_divergence": divergence}


def teacher_records(distillation: Distillation | None) -> Records:
    """Records of a live teacher's leaves, below TEACHER; {} without one."""
    if distillation is None or distillation.teacher is None:
        return {}
    return nested_under(TEACHER, by_path(distillation.teacher.config))


def predict(model: Model, balance: BalanceConfig, batch: Batch) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Run the model on a batch: (logits_BTV, balancing penalty, metrics); metrics["loss"] is the mean nll."""
    moe = model.config.moe
    logits_BTV, collected = model.apply(batch, collect=() if moe is None else ("routing",))
    metrics = {"loss": mean_nll(logits_BTV, batch)}
    if moe is None:
        return logits_BTV, jnp.zeros(()), metrics
    penalty, statistics = balance_terms(collected["routing"], balance, moe)
    return logits_BTV, penalty, metrics | statistics


def mean_nll(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Mean negative log likelihood of the counted targets, nats a token."""
    nll_BT = negative_log_likelihood(logits_BTV, batch["targets"])
    return jnp.sum(nll_BT * batch["weights"]) / jnp.maximum(jnp.sum(batch["weights"]), 1.0)


@jax.custom_vjp
def negative_log_likelihood(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log likelihood of each target, nats, [B, T] fp32.

    Equals optax.softmax_cross_entropy_with_integer_labels, with a faster gradient: one pass over the logits instead of
    a scatter into zeros and a sum.
    """
    return _likelihood_forward(logits_BTV, targets_BT)[0]


def _likelihood_forward(logits_BTV, targets_BT):
    total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return total_BT - chosen_BT, (logits_BTV, targets_BT, total_BT)


def _likelihood_backward(saved, dnll_BT):
    logits_BTV, targets_BT, total_BT = saved
    right_BTV = targets_BT[..., None] == jax.lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, 2)
    return (jnp.exp(logits_BTV - total_BT[..., None]) - right_BTV.astype(jnp.float32)) * dnll_BT[..., None], None


negative_log_likelihood.defvjp(_likelihood_forward, _likelihood_backward)


def smoothed(nll_BT: jax.Array, logits_BTV: jax.Array, share: float) -> jax.Array:
    """Cross-entropy with label smoothing (arXiv:1512.00567), nats [B, T]: `share` of the target is spread evenly.

    nll_BT: negative log likelihood of the targets under these logits.
    """
    if share == 0:
        return nll_BT
    even_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.mean(logits_BTV, axis=-1)
    return (1.0 - share) * nll_BT + share * even_BT


def token_losses(logits_BTV: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(negative log likelihood, 1 if the target is the most probable token, else 0), each [B, T] fp32."""
    nll_BT = negative_log_likelihood(logits_BTV, batch["targets"])
    return nll_BT, (jnp.argmax(logits_BTV, axis=-1) == batch["targets"]).astype(jnp.float32)


def evaluator(model: Model) -> Callable[[Params, Batch], Sums]:
    """Make evaluate(params, batch) of a language model: the means loss and accuracy and, with experts, counts_NE."""

    def evaluate(params: Params, batch: Batch) -> Sums:
        moe = model.config.moe
        student = model.with_params(split_teacher(params)[0])
        logits_BTV, collected = student.apply(batch, collect=() if moe is None else ("routing",))
        nll_BT, correct_BT = token_losses(logits_BTV, batch)
        weights_BT = batch["weights"]
        weight = jnp.sum(weights_BT)
        sums: Sums = {
            "loss": Mean(jnp.sum(nll_BT * weights_BT), weight),
            "accuracy": Mean(jnp.sum(correct_BT * weights_BT), weight),
        }
        if moe is not None:
            sums["counts_NE"] = collected["routing"]["counts_E"]
        return sums

    return evaluate


def balance_terms(routing: Any, balance: BalanceConfig, moe: MoEConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted balancing penalty and its metrics. routing: statistics of all N layer calls, stacked.

    The GShard/Switch loss E · Σ_e f_e · P_e (arXiv:2006.16668, 2101.03961) is 1 when balanced. `per_call` averages the
    losses of all calls; `pooled` computes it from f and P averaged over all calls, so that a layer may specialise
    while the pool as a whole stays in use.
    """
    counts_NE, probability_NE = routing["counts_E"], routing["probability_E"]
    share_NE = counts_NE / jnp.sum(counts_NE, axis=1, keepdims=True)
    experts = counts_NE.shape[1]
    per_call = experts * jnp.mean(jnp.sum(share_NE * probability_NE, axis=1))
    pooled = experts * jnp.sum(jnp.mean(share_NE, axis=0) * jnp.mean(probability_NE, axis=0))
    z = jnp.mean(routing["z"])
    chosen = {"none": jnp.zeros(()), "pooled": pooled, "per_call": per_call}[balance.loss]
    metrics = {
        "balance_pooled": pooled,
        "balance_per_call": per_call,
        "router_z": z,
        "dropped_share": jnp.mean(routing["dropped"]),
        **_evenness(share_NE, moe),
        "counts_NE": counts_NE,
    }
    return balance.weight * chosen + balance.z_loss_weight * z, jax.lax.stop_gradient(metrics)


def _evenness(share_NE: jax.Array, moe: MoEConfig) -> dict[str, jax.Array]:
    """Evenness of expert use: entropy (0: all tokens choose the same experts, 1: even) and share of dead experts.

    An expert with under a tenth of the mean use is dead. A pool is measured as a whole, since a layer may specialise;
    otherwise each layer's experts are measured, and the entropies averaged.
    """
    rows = jnp.mean(share_NE, axis=0, keepdims=True) if moe.placement == "shared" else share_NE
    experts = rows.shape[1]
    entropy = jnp.ones(())  # if all experts are active
    if experts > moe.active:
        # a token's A experts are distinct, so the entropy is at least log A
        least, most = np.log(moe.active), np.log(experts)
        entropy = (jnp.mean(jnp.sum(jax.scipy.special.entr(rows), axis=1)) - least) / (most - least)
    return {"expert_entropy": entropy, "dead_expert_share": jnp.mean((rows < 0.1 / experts).astype(jnp.float32))}


def collapse(balance: BalanceConfig, metrics: dict[str, float]) -> str | None:
    """Message that routing has collapsed, judged by the metrics of one step; None while it has not."""
    if metrics["expert_entropy"] < balance.entropy_floor:
        return f"routing collapsed: expert_entropy {metrics['expert_entropy']:.3f} is under balance.entropy_floor"
    if metrics["dead_expert_share"] > balance.dead_share_limit:
        return (
            f"routing collapsed: dead_expert_share {metrics['dead_expert_share']:.3f} is over balance.dead_share_limit"
        )
    return None


def move_bias(params: Params, counts_NE: jax.Array, balance: BalanceConfig) -> Params:
    """Loss-free balancing (arXiv:2408.15664): raise the bias of experts used less than the mean, lower the others."""
    if balance.bias_scope == "pooled":
        counts_NE = jnp.broadcast_to(jnp.mean(counts_NE, axis=0, keepdims=True), counts_NE.shape)
    (path, bias_NE), *_ = trees.select(params, ROUTER_BIAS, expect=1).items()
    error_NE = jnp.mean(counts_NE, axis=1, keepdims=True) - counts_NE
    return trees.update(params, {path: bias_NE + balance.bias_rate * jnp.sign(error_NE)})
