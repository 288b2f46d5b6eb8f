"""Tasks of the training loop: oracles, one adapter for all tasks, reconstruction, and supervised learning."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import bank
from moe_reduce.adapters.adapter import Adapter
from moe_reduce.adapters.dropout import key_of_step
from moe_reduce.adapters.hypernetwork import hypernetwork as hypernetworks
from moe_reduce.adapters.hypernetwork.hypernetwork import HYPERNETWORK, Hypernetwork
from moe_reduce.core import trees
from moe_reduce.core.config import TextToLoraConfig
from moe_reduce.models.deltas import ADAPTER, BANK
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import by_path
from moe_reduce.training.losses import smoothed, token_losses
from moe_reduce.training.task import Batch, Params, Sums, Task
from moe_reduce.training.validation import Mean

Metrics = dict[str, jax.Array]
LIBRARY = "library"  # key of the oracles that are reconstructed, [Z, ...] by path


def oracles(base: Model, library: Sequence[Adapter]) -> tuple[Task, dict[str, Any]]:
    """(task that trains an adapter for each described task, all in one bank; the bank below BANK).

    The loss is the sum over tasks of the mean loss of a task's completions, so that an adapter gets the gradient that
    it would get alone. library: new adapters of one configuration.
    """
    tree = {BANK: bank.stack_alike(library)}
    count, config = len(library), library[0].config
    skeleton = base.with_params({})

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        nll_BT, _, _ = _losses(skeleton.with_params(params), batch)
        total = partial(jax.ops.segment_sum, segment_ids=batch["task"], num_segments=count)
        sums_Z, weights_Z = (total(jnp.sum(x, axis=1)) for x in (nll_BT * batch["weights"], batch["weights"]))
        losses_Z = sums_Z / jnp.maximum(weights_Z, 1.0)
        return jnp.sum(losses_Z), {"loss": jnp.mean(losses_Z)}

    def trains(path: str) -> bool:
        return path.startswith(f"{BANK}/") and adapters.trained(config, path)

    task = Task(
        loss=loss,
        evaluate=lambda params, batch: _sums(skeleton.with_params(params), batch),
        records=dict(by_path(base.config)) | dict(hypernetworks.replicated(tree)),
        trainable=trains,
    )
    return task, tree


def multitask(base: Model, new: Adapter, run: TextToLoraConfig) -> Task:
    """Task that trains one adapter, below ADAPTER, on all described tasks, with the loss of `supervised`."""
    skeleton = base.with_params({})

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        trained = [leaf for path, leaf in trees.flatten(params[ADAPTER]).items() if adapters.trained(new.config, path)]
        return _supervised_loss(skeleton.with_params(params), batch, trained, run, key_of_step(run.train.seed, batch))

    return Task(
        loss=loss,
        evaluate=lambda params, batch: _sums(skeleton.with_params(params), batch),
        records=dict(by_path(base.config)) | dict(hypernetworks.replicated({ADAPTER: new.tree})),
        trainable=lambda path: path.startswith(f"{ADAPTER}/") and adapters.trained(new.config, path),
    )


def reconstruction(new: Hypernetwork, library: Sequence[Adapter], target: str) -> tuple[Task, dict[str, Any]]:
    """(task that writes the adapters of a library from the embeddings of their tasks; its frozen leaves).

    By L1, as in Text-to-LoRA (arXiv:2506.06105). new: with the library's statistics. target: `factors`, the z-scores of
    all emitted leaves, or `product`, each ΔW. Validation also gives `relative_l1`, Σ|ΔW − oracle's ΔW| divided by
    Σ|oracle's ΔW|.
    """
    emitted = [hypernetworks.emitted_of(new, adapter) for adapter in library]
    wanted = {path: jnp.stack([leaves[path] for leaves in emitted]) for path in emitted[0]}
    frozen = {LIBRARY: trees.unflatten(wanted)}  # not constants, which would be compiled into the program

    def compared(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(loss, Σ|ΔW − oracle's ΔW|, Σ|oracle's ΔW|)."""
        hypernetwork = hypernetworks.with_leaves(new, params)
        found = hypernetworks.emit(hypernetwork, batch["embedding"], key)
        chosen = {path: leaf[batch["task"]] for path, leaf in trees.flatten(params[LIBRARY]).items()}
        difference, size = _distance(hypernetwork.fixed, found, chosen)
        if target == "product":
            return difference / size, difference, size
        return _score_distance(hypernetwork, found, chosen), difference, size

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        error, _, _ = compared(params, batch, key_of_step(new.config.seed, batch))
        return error, {"loss": error}

    def evaluate(params: Params, batch: Batch) -> Sums:
        error, difference, size = compared(params, batch, None)
        return {"loss": Mean(error, jnp.ones(())), "relative_l1": Mean(difference, size)}

    records = dict(hypernetworks.records(new)) | dict(hypernetworks.replicated(frozen))
    task = Task(loss=loss, evaluate=evaluate, records=records, trainable=_of_hypernetwork)
    return task, frozen | hypernetworks.frozen(new)


def supervised(base: Model, new: Hypernetwork, run: TextToLoraConfig) -> Task:
    """Task that learns completions through the frozen base: every row runs with the adapter of its own description.

    The loss averages rows, so that tasks of long answers do not weigh more, and adds the mean squares of the emitted
    leaves. Label smoothing and the noise of NEFTune are for training only.
    """
    skeleton = base.with_params({})

    def activated(params: Params, batch: Batch, key: jax.Array | None) -> tuple[Model, Batch, Any]:
        hypernetwork = hypernetworks.with_leaves(new, params)
        emitted = hypernetworks.emit(hypernetwork, batch["embedding"], key)
        own = {name: tree for name, tree in params.items() if name not in (HYPERNETWORK, hypernetworks.FROZEN)}
        rows = jnp.arange(batch["tokens"].shape[0], dtype=jnp.int32)
        model = skeleton.with_params(own | {BANK: hypernetworks.bank(hypernetwork, emitted)})
        return model, {**batch, "task": rows}, emitted

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        key, noise_key = jax.random.split(key_of_step(new.config.seed, batch))
        model, batch, emitted = activated(params, batch, key)
        return _supervised_loss(model, batch, list(emitted.values()), run, noise_key)

    def evaluate(params: Params, batch: Batch) -> Sums:
        model, batch, _ = activated(params, batch, None)
        return _sums(model, batch)

    return Task(
        loss=loss,
        evaluate=evaluate,
        records=dict(by_path(base.config)) | dict(hypernetworks.records(new)),
        trainable=_of_hypernetwork,
    )


def _supervised_loss(
    model: Model, batch: Batch, emitted: Sequence[jax.Array], run: TextToLoraConfig, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """(smoothed loss under noise, averaged over rows, plus the penalty of the emitted leaves; metrics)."""
    batch = batch | {"noise": _noise(key, batch, model.config.width, run.embedding_noise)}
    nll_BT, _, logits_BTV = _losses(model, batch)
    loss_BT = smoothed(nll_BT, logits_BTV, run.label_smoothing)
    penalty = jnp.sum(jnp.stack([jnp.mean(jnp.square(leaf)) for leaf in emitted]))
    metrics = {"loss": _row_mean(nll_BT, batch["weights"]), "mean_squares": penalty}
    return _row_mean(loss_BT, batch["weights"]) + run.adapter_penalty * penalty, metrics


def _of_hypernetwork(path: str) -> bool:
    return path.startswith(f"{HYPERNETWORK}/")


def _losses(model: Model, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(negative log likelihood, 1 where the target is the most probable token, logits).

    With a bank, each row runs with the entry of its task.
    """
    entries = {"adapter": batch["task"]} if BANK in model.params else {}
    logits_BTV = model.apply(batch | entries).logits_BTV
    return *token_losses(logits_BTV, batch), logits_BTV


def _sums(model: Model, batch: Batch) -> Sums:
    nll_BT, correct_BT, _ = _losses(model, batch)
    weight = jnp.sum(batch["weights"])
    return {
        name: Mean(jnp.sum(x * batch["weights"]), weight) for name, x in (("loss", nll_BT), ("accuracy", correct_BT))
    }


def _row_mean(values_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Mean over rows of each row's mean over its counted targets."""
    return jnp.mean(jnp.sum(values_BT * weights_BT, axis=1) / jnp.maximum(jnp.sum(weights_BT, axis=1), 1.0))


def _noise(key: jax.Array, batch: Batch, width: int, alpha: float) -> jax.Array:
    """Noise of NEFTune (arXiv:2310.05914), uniform in ±α/√(T·D), [B, T, D]."""
    rows, length = batch["tokens"].shape
    bound = alpha / (length * width) ** 0.5
    return jax.random.uniform(key, (rows, length, width), jnp.float32, -bound, bound)


def _score_distance(
    hypernetwork: Hypernetwork, found: Mapping[str, jax.Array], wanted: Mapping[str, jax.Array]
) -> jax.Array:
    """Mean |z-score − wanted z-score|, a mean over leaves of means over their values."""
    assert hypernetwork.statistics is not None
    deviation = hypernetwork.statistics.deviation
    return jnp.mean(
        jnp.stack([jnp.mean(jnp.abs(found[path] - wanted[path]) / deviation[path][None]) for path in wanted])
    )


def _distance(
    fixed: Mapping[str, Any], found: Mapping[str, jax.Array], wanted: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(Σ|ΔW − wanted ΔW|, Σ|wanted ΔW|) over all adapted matrices."""
    difference = size = jnp.zeros(())
    for path in sorted({path.rsplit("/", 1)[0].removesuffix("/in").removesuffix("/out") for path in wanted}):
        ours, theirs = (_product(path, leaves) for leaves in (found, wanted))
        scale = jnp.max(jnp.abs(fixed[f"{path}/scale"]))
        difference = difference + scale * jnp.sum(jnp.abs(ours - theirs))
        size = size + scale * jnp.sum(jnp.abs(theirs))
    return difference, size


def _product(path: str, leaves: Mapping[str, jax.Array]) -> jax.Array:
    """ΔW of every adapter and layer, without its scale; of a core, which fixed projections surround, the core."""
    if f"{path}/core" in leaves:
        return leaves[f"{path}/core"]
    return jnp.matmul(leaves[f"{path}/in/matrix"], leaves[f"{path}/out/matrix"])
