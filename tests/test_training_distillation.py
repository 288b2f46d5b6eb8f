"""Distillation: the divergences by hand, the gradients that reach the student alone, and stored distributions."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import (
    MODELS,
    ONE_DEVICE,
    assert_close,
    initial_params,
    losses,
    metrics,
    random_batch,
    run_config,
    unmeasured_peak,
)
from training_runs import token_data as token_rows

import moe_reduce
from moe_reduce.core import trees
from moe_reduce.core.config import AdaptConfig, BalanceConfig, DistillConfig, ExecutionConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.batches import fingerprint
from moe_reduce.data.prepare import prepare
from moe_reduce.data.teacher_logits import IDS, LOG_PROBABILITIES, Origin, TeacherLogits
from moe_reduce.models.model import Model
from moe_reduce.runs import adapt as run_adapt
from moe_reduce.runs import teaching
from moe_reduce.runs.train import pretraining, train
from moe_reduce.storage import manifest
from moe_reduce.training import job, sharding
from moe_reduce.training.distillation import Distillation, mean_stored_divergence, most_probable
from moe_reduce.training.losses import language_model_task, next_token_loss
from moe_reduce.training.task import TEACHER

EXECUTION = ExecutionConfig(dispatch="reference").resolve("cpu")
NO_BALANCE = BalanceConfig(weight=0.0)


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(job, "peak", unmeasured_peak)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher of another family than the students, with predictions that are far from even."""
    directory = tmp_path_factory.mktemp("teacher") / "model"
    params = jax.tree.map(lambda leaf: leaf * 30 if leaf.ndim > 1 else leaf, initial_params(MODELS["neox"], 3))
    moe_reduce.save(Model(MODELS["neox"], params, ExecutionConfig()), directory)
    return directory


def probabilities(logits, temperature=1.0):
    shifted = np.asarray(logits, np.float64) / temperature
    powers = np.exp(shifted - shifted.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def divergence(p, q):
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_by_hand(temperature):
    """λ·τ²·KL(teacher ‖ student) + (1 − λ)·cross-entropy, in float64."""
    batch = random_batch(rows=2, masked=True)
    student, teacher = (Model(MODELS[kind], initial_params(MODELS[kind]), EXECUTION) for kind in ("dense", "neox"))
    distillation = Distillation(DistillConfig("any", None, 0.25, temperature), teacher.with_params({}))
    params = student.params | {TEACHER: jax.tree.map(lambda leaf: leaf * 4, teacher.params)}
    total, found = jax.jit(partial(next_token_loss, student.with_params({}), NO_BALANCE, distillation))(params, batch)
    logits = [np.asarray(model.apply(batch).logits_BTV) for model in (student, teacher.with_params(params[TEACHER]))]
    q, p = (probabilities(values, temperature) for values in logits)
    weights = np.asarray(batch["weights"])
    mean = lambda values: np.sum(values * weights) / weights.sum()  # noqa: E731
    nll = -np.log(np.take_along_axis(probabilities(logits[0]), np.asarray(batch["targets"])[..., None], -1)[..., 0])
    assert float(found["teacher_divergence"]) == pytest.approx(mean(divergence(p, q)), rel=1e-4)
    expected = 0.25 * temperature**2 * mean(divergence(p, q)) + 0.75 * mean(nll)
    assert float(total) == pytest.approx(expected, rel=1e-5)


def _distributions(vocabulary=300, seed=0):
    generator = np.random.default_rng(seed)
    return (generator.normal(0, 3, (2, 5, vocabulary)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_stored_distribution_has_the_tokens_beyond_the_64_in_one_bucket(temperature):
    wanted, found = _distributions()
    batch = {"weights": jnp.asarray([[1.0, 1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 1.0]])}
    ids, values = most_probable(jnp.asarray(wanted), temperature)
    assert (ids.shape, ids.dtype, values.dtype) == ((2, 5, 64), jnp.int32, jnp.float16)
    stored = mean_stored_divergence(ids, values, jnp.asarray(found) / temperature, batch)
    p, q = probabilities(wanted, temperature), probabilities(found, temperature)
    order = np.argsort(-p, axis=-1, kind="stable")[..., :64]
    np.testing.assert_array_equal(np.sort(ids, axis=-1), np.sort(order, axis=-1))
    buckets = []
    for x in (p, q):
        kept = np.take_along_axis(x, order, -1)
        buckets.append(np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], axis=-1))
    weights = np.asarray(batch["weights"])
    expected, whole = (np.sum(values * weights) / weights.sum() for values in (divergence(*buckets), divergence(p, q)))
    assert float(stored) == pytest.approx(expected, rel=2e-3)  # float16 has 11 bits
    assert float(stored) <= whole * (1 + 2e-3)
    assert whole > 1.01 * expected


def test_a_whole_vocabulary_of_64_has_no_bucket():
    wanted, found = _distributions(vocabulary=40)
    batch = {"weights": jnp.ones((2, 5))}
    ids, values = most_probable(jnp.asarray(wanted), 1.0)
    assert ids.shape == (2, 5, 40)
    stored = mean_stored_divergence(ids, values, jnp.asarray(found), batch)
    assert float(stored) == pytest.approx(divergence(probabilities(wanted), probabilities(found)).mean(), rel=2e-3)


def test_a_student_that_is_its_teacher_learns_nothing_and_a_certain_teacher_gives_finite_gradients():
    wanted, _ = _distributions()
    batch = {"weights": jnp.ones((2, 5))}
    certain = jnp.asarray(wanted).at[..., 7].set(80.0)  # the stored probabilities sum to 1
    for logits in (jnp.asarray(wanted), certain):
        ids, values = most_probable(logits, 1.0)
        divergence_of = partial(mean_stored_divergence, ids, values, batch=batch)
        loss, slope = jax.value_and_grad(divergence_of)(logits)
        assert float(loss) == pytest.approx(0.0, abs=1e-3)
        assert np.all(np.isfinite(slope))
        assert float(jnp.max(jnp.abs(slope))) < 1e-3


def test_the_teacher_is_frozen_sharded_and_not_in_the_optimiser(teacher, tmp_path):
    distill = DistillConfig(str(teacher), weight=1.0)
    run = dataclasses.replace(run_config("dense", token_rows(tmp_path)), distill=distill)
    run = dataclasses.replace(run, execution=EXECUTION)
    planned = pretraining(run)
    assert planned.frozen[TEACHER].keys() == initial_params(MODELS["neox"]).keys()
    mesh = sharding.make_mesh(dataclasses.replace(ONE_DEVICE, fsdp=2))
    placed = sharding.shardings(mesh, planned.frozen, planned.task.records)
    assert "fsdp" in str(placed[TEACHER]["embedding"]["table"].spec)
    params = initial_params(MODELS["dense"]) | {TEACHER: moe_reduce.load(teacher).params}
    slopes = jax.jit(
        jax.grad(lambda own, frozen: planned.task.loss({**own, TEACHER: frozen}, random_batch(rows=2))[0], (0, 1))
    )({name: leaf for name, leaf in params.items() if name != TEACHER}, params[TEACHER])
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(slopes[0]))
    assert all(float(jnp.max(jnp.abs(leaf))) == 0 for leaf in jax.tree.leaves(slopes[1]))


def _distilling(directory, teacher, steps=12, **distill):
    run = run_config("dense", token_rows(directory), steps=steps, warmup_steps=0, learning_rate=3e-2)
    return dataclasses.replace(run, distill=DistillConfig(str(teacher), weight=1.0, **distill))


@pytest.fixture(scope="module")
def live(teacher, tmp_path_factory):
    directory = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "peak", unmeasured_peak)
        return directory, train(_distilling(directory, teacher), directory / "run")


def test_a_run_with_a_live_teacher(live, teacher):
    directory, summary = live
    values = [line["teacher_divergence"] for line in metrics(directory / "run")]
    assert np.mean(values[-3:]) < np.mean(values[:3])
    assert summary["parameters"] == trees.size(initial_params(MODELS["dense"]))
    (step,) = manifest.read_chain(directory / "run/model")
    assert manifest.input_of(teacher) in step.inputs
    saved = json.loads((directory / "run/config.json").read_text())
    assert saved["distill"]["teacher_sha256"] == manifest.input_of(teacher).sha256


def test_a_stored_teacher_trains_as_a_live_one_and_is_made_once(live, teacher, tmp_path, monkeypatch):
    """To the precision of float16 and of one bucket for 320 of 384 tokens."""
    store = tmp_path / "logits"
    train(_distilling(tmp_path, teacher, logits=str(store)), tmp_path / "run")
    stored, run = ([line["teacher_divergence"] for line in metrics(one / "run")] for one in (tmp_path, live[0]))
    np.testing.assert_allclose(stored, run, rtol=0.1)
    assert np.all(np.asarray(stored) <= np.asarray(run) * 1.01)
    rows, length = 48, 32
    sizes = {file.name: file.stat().st_size for file in store.glob("*.npy")}
    assert abs(sum(sizes.values()) - rows * length * 384) < 1024  # two headers
    monkeypatch.setattr(teaching, "load_teacher", None)  # the teacher is not needed again
    train(_distilling(tmp_path, teacher, logits=str(store)), tmp_path / "again")
    np.testing.assert_array_equal(losses(tmp_path / "again"), losses(tmp_path / "run"))


def test_stored_rows_are_those_of_the_text_and_an_unfinished_store_goes_on(teacher, tmp_path, monkeypatch):
    data, mesh = token_rows(tmp_path), sharding.make_mesh(ONE_DEVICE)
    tokens, _ = prepare(data, 384)
    text, distill = teaching.Text(tokens, data, 8), DistillConfig(str(teacher), logits=str(tmp_path / "logits"))
    write, calls = TeacherLogits.write, []

    def killed(self, first, arrays):
        calls.append(first)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, first, arrays)

    monkeypatch.setattr(TeacherLogits, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        teaching.stored(distill, text, EXECUTION, mesh)
    taught = teaching.stored(distill, text, EXECUTION, mesh)
    assert calls == [0, 8, 16, 16, 24, 32, 40]
    model = moe_reduce.load(teacher, execution=EXECUTION)
    for row in (0, 17, 47):
        tokens_T = tokens.row("train", row, 32)[0][:-1]
        ids, values = most_probable(model.apply({"tokens": jnp.asarray(tokens_T[None])}).logits_BTV, 1.0)
        found = taught.beside("train", row)
        np.testing.assert_allclose(found[LOG_PROBABILITIES], values[0], atol=2e-2)
        assert np.mean(found[IDS] == np.asarray(ids[0])) > 0.95  # ties of float16 may change places
    assert taught.beside("validation", 0) == {}


def test_a_store_of_anything_else_is_refused(tmp_path):
    data = token_rows(tmp_path)
    tokens, _ = prepare(data, 384)
    origin = Origin("a", fingerprint(tokens, data), 1.0, 32, False, 48, 64)
    TeacherLogits(tmp_path / "logits", origin)
    for changes, part in (
        ({"teacher": "b"}, "of another teacher"),
        ({"corpus": "c"}, "of another text"),
        ({"temperature": 2.0}, "of another temperature"),
        ({"rows": 47}, "with another rows"),
    ):
        with pytest.raises(UserError, match=part) as raised:
            TeacherLogits(tmp_path / "logits", dataclasses.replace(origin, **changes))
        assert "\n" not in str(raised.value)
    (tmp_path / "logits/ids.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="is damaged"):
        TeacherLogits(tmp_path / "logits", origin)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds letter\.txt and no teacher's logits"):
        TeacherLogits(tmp_path / "mine", origin)


def test_what_a_teacher_cannot_be(teacher, tmp_path):
    run = _distilling(tmp_path, teacher)
    other = dataclasses.replace(MODELS["dense"], vocab_size=400)
    for changes, part in (
        ({"model": other}, "has a vocabulary of 384 tokens and the model one of 400"),
        ({"distill": DistillConfig("nowhere/model")}, "distill.teacher: nowhere/model"),
        ({"distill": DistillConfig(str(teacher), "0" * 64)}, "is another one than distill.teacher_sha256 says"),
    ):
        with pytest.raises(UserError, match=part) as raised:
            train(dataclasses.replace(run, **changes), tmp_path / "run")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("distill", "part"),
    [
        (DistillConfig("x", weight=1.5), "distill.weight must be from 0 to 1"),
        (DistillConfig("x", temperature=0.0), "distill.temperature must be positive"),
        (DistillConfig(logits="y"), "distill.logits needs distill.teacher"),
        (DistillConfig(""), "distill.teacher is empty"),
    ],
)
def test_settings_that_cannot_work(distill, part):
    with pytest.raises(UserError, match=part):
        distill.check()


def test_a_tokenizer_with_other_tokens_is_another_vocabulary():
    class Letters:
        def __init__(self, first):
            self.hash, self.vocab_size, self._first = first, 26, ord(first)

        def decode(self, ids):
            return chr(self._first + ids[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "load_tokenizer", lambda _: Letters("a"))
        teaching.check_vocabulary(DistillConfig("x"), Letters("a"))
        with pytest.raises(UserError, match="its token 0 is 'a', not 'A'"):
            teaching.check_vocabulary(DistillConfig("x"), Letters("A"))


def test_an_adapter_learns_from_a_teacher(teacher):
    """The task of adapt is that of train with other leaves, and evaluates the student alone."""
    run = AdaptConfig(model="any", execution=EXECUTION, distill=DistillConfig(str(teacher), weight=1.0))
    run = dataclasses.replace(run, adapter=None)
    task = run_adapt.adapt_task(run, MODELS["dense"])
    params = initial_params(MODELS["dense"]) | {TEACHER: moe_reduce.load(teacher).params}
    plain = language_model_task(MODELS["dense"], EXECUTION, NO_BALANCE)
    total, found = jax.jit(task.loss)(params, random_batch())
    assert float(total) == float(found["teacher_divergence"]) > 0
    alone = jax.jit(plain.evaluate)(initial_params(MODELS["dense"]), random_batch())
    assert_close(
        {"loss": np.asarray(jax.jit(task.evaluate)(params, random_batch())["loss"].total)},
        {"loss": np.asarray(alone["loss"].total)},
    )
