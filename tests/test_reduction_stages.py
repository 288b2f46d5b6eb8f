"""The plan of a reduction: what each stage makes of an architecture, and which stages cannot follow others."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from training_runs import MODELS

import moe_reduce
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, ReduceConfig, TrainConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.stages import STAGES, PoolStage, PruneStage, QuantizeStage, TuneStage
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameter_count
from moe_reduce.models.weights import Quantised
from moe_reduce.reduction.transform import abstract_model, expert_count
from moe_reduce.runs.stages import KINDS, StageContext, configurations, planned_jobs, stage_of
from moe_reduce.runs.stages.objectives import OBJECTIVES, Objective


def _first(layers, experts):
    moe = dataclasses.replace(MODELS["layer"].moe, experts=experts)
    return dataclasses.replace(MODELS["layer"], layers=layers, moe=moe)


def _run(**stages):
    train = TrainConfig(steps=4, batch_size=2)
    return ReduceConfig(model="nowhere", stages=stages, train=train, execution=ExecutionConfig().resolve("cpu"))


@pytest.mark.parametrize(("layers", "experts"), [(16, 4), (4, 16), (3, 5)])
@pytest.mark.parametrize("keep", [1.0, 0.75, 0.5])
def test_shares_are_of_a_model_of_any_size(layers, experts, keep):
    first = _first(layers, experts)
    total = layers * experts
    run = _run(prune=PruneStage(keep=keep), pool=PoolStage(), again=PruneStage(keep=keep / 2))
    by_layer, pooled, last = (config for _, config in configurations(first, run))
    assert by_layer.moe.experts == int(np.ceil(keep * experts))
    assert expert_count(pooled) == layers * by_layer.moe.experts
    assert pooled.moe.output_gain
    assert last.moe.experts == int(np.ceil(keep / 2 * total))


@pytest.mark.parametrize("keep", [180.0, 0.2])
def test_what_a_model_cannot_keep_names_the_range(keep):
    with pytest.raises(UserError, match="cannot be kept") as raised:
        list(configurations(_first(16, 4), _run(prune_it=PruneStage(keep=keep))))
    message = str(raised.value)
    assert message.startswith(f"stages.prune_it: keep={keep:g} asks for ")
    assert message.endswith("of the first model's 64 experts keep a share, such as 0.5, or from 32 to 64")


def test_a_number_that_is_no_number_of_experts_names_the_key():
    with pytest.raises(UserError, match=r"^stages.prune_it: keep=1.5 must be a share"):
        list(configurations(_first(4, 4), _run(prune_it=PruneStage(keep=1.5))))


def test_planned_jobs_are_those_of_the_stages_that_train():
    first = _first(4, 4)
    run = _run(
        pool=PoolStage(),
        distil=TuneStage(steps=2, objective="router"),
        anneal=TuneStage(steps=2, bias_from=4.0),
        half=PruneStage(keep=0.5),
        recover=TuneStage(steps=2, components="router,experts", teacher_weight=0.5, bias_from=1.0),
    )
    jobs = dict(planned_jobs(first, run, "bfloat16"))
    assert list(jobs) == ["distil", "anneal", "recover"]
    # the routers' teacher is in the canonical form of the pool, the other one as it was
    assert [job.frozen["teacher"]["layers"].keys() >= {"output_gain"} for job in (jobs["distil"], jobs["recover"])] == [
        True,
        False,
    ]
    assert "teacher" not in jobs["anneal"].frozen
    assert parameter_count(jobs["recover"].model) < parameter_count(jobs["anneal"].model)
    assert jobs["recover"].initial["experts"]["gate"].shape[0] == 8


def test_a_quantised_model_is_the_end_of_a_chain_of_stages(tmp_path):
    """Planned and run: the same schemes; experts of quantised models can still be pruned, but not trained."""
    first = _first(2, 4)
    stage = QuantizeStage(scheme="int8,attention=fp8", clip="mse")
    run = _run(pool=PoolStage(), quantise=stage, half=PruneStage(keep=0.5))
    assert [config.moe.experts for _, config in configurations(first, run)] == [8, 8, 4]
    model = Model(first, init_params(first, jax.random.key(0)), run.execution)
    context: Any = StageContext(run, "quantise", first, lambda: model, lambda _: model)
    result = stage_of(stage).run(model, context)
    moe_reduce.save(result.model, tmp_path / "model")
    found = trees.flatten(moe_reduce.load(tmp_path / "model").params)
    planned = trees.flatten(stage_of(stage).after(abstract_model(first), context).model.params)
    schemes = {path: str(leaf.scheme) for path, leaf in found.items() if isinstance(leaf, Quantised)}
    assert schemes == {path: str(leaf.scheme) for path, leaf in planned.items() if isinstance(leaf, Quantised)}
    assert {schemes["layers/attention/query"], schemes["layers/experts/up"]} == {"fp8", "int8"}
    assert "layers/router/weight" not in schemes
    assert 0 < result.figures["relative_errors"]["experts"] < 0.01
    with pytest.raises(UserError, match=r"quantise.scheme: scheme 'int5' is unknown"):
        QuantizeStage(scheme="int5").check("quantise", run.mesh, run.train)
    with pytest.raises(UserError, match="has no component 'mlp'"):
        list(configurations(first, _run(quantise=QuantizeStage(scheme="mlp=int8"))))


def test_a_stage_that_rounds_while_it_trains_makes_a_quantised_model():
    first = _first(2, 4)
    stage = TuneStage(steps=2, components="experts", qat="experts=int8")
    context: Any = StageContext(_run(learn=stage), "learn", first, lambda: None, lambda _: None)
    planned = trees.flatten(stage_of(stage).after(abstract_model(first), context).model.params)
    assert {path for path, leaf in planned.items() if isinstance(leaf, Quantised)} == {
        f"layers/experts/{name}" for name in ("gate", "up", "down")
    }
    with pytest.raises(UserError, match=r"^stages.learn: qat trains matrices that are not quantised: put the stage "):
        list(configurations(first, _run(quantise=QuantizeStage(scheme="attention=int8,experts=int8"), learn=stage)))
    with pytest.raises(UserError, match=r"^stages.learn: qat: the model has no component 'mlp'"):
        list(configurations(first, _run(learn=dataclasses.replace(stage, qat="mlp=int8"))))
    run = _run()
    for change, part in (
        ({"qat": "int5"}, r"^learn.qat: scheme 'int5' is unknown"),
        ({"adapter": AdapterConfig(rank=2)}, r"^learn.qat rounds what trains, and an adapter leaves its base frozen"),
    ):
        with pytest.raises(UserError, match=part):
            dataclasses.replace(stage, **change).check("learn", run.mesh, run.train)


def test_every_kind_of_configuration_has_a_stage():
    assert KINDS.keys() == STAGES.keys() == {"pool", "prune", "tune", "quantize"}


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"objective": "lm"}, "objective 'lm' is unknown; known: language_model, router"),
        ({"objective": "router", "teacher_weight": 0.5}, "teacher_weight is for objective=language_model"),
        ({"objective": "router", "adapter": AdapterConfig(rank=2)}, "adapter learns nothing from objective=router"),
        ({"objective": "router", "qat": "int8"}, "qat learns nothing from objective=router"),
        ({"objective": "router", "components": "router,norm"}, "objective=router trains routers only"),
        ({"components": "router,experts", "adapter": AdapterConfig(rank=2)}, "components names experts"),
    ],
)
def test_settings_that_an_objective_excludes_name_the_stage(settings, part):
    run = _run(pool=PoolStage(), learn=TuneStage(steps=2, **settings))
    with pytest.raises(UserError) as raised:
        list(configurations(_first(4, 4), run))
    assert str(raised.value).startswith(f"stages.learn: {part}")


@pytest.mark.parametrize("order", [("learn",), ("pool", "half", "learn"), ("pool", "learn", "again", "learn_too")])
def test_routers_are_imitated_by_a_whole_pool_only(order):
    stages = {
        "pool": PoolStage(),
        "half": PruneStage(keep=0.5),
        "learn": TuneStage(steps=2, objective="router"),
        "again": PruneStage(keep=0.5),
        "learn_too": TuneStage(steps=2, objective="router"),
    }
    with pytest.raises(UserError, match=rf"stages\.{order[-1]}: objective=router compares a whole pool"):
        list(configurations(_first(4, 4), _run(**{name: stages[name] for name in order})))


class _Nothing(Objective):
    """A loss of 7 that needs no teacher and excludes warm-up."""

    def check(self, stage, *_):
        if stage.warmup_steps:
            raise UserError("no warm-up")

    def loss(self, *_):
        return 7.0, {}

    def stop(self, *_):
        return str


def test_an_objective_is_one_entry(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "nothing", _Nothing())
    learn = TuneStage(steps=2, objective="nothing")
    run = _run(pool=PoolStage(), learn=learn)
    jobs = dict(planned_jobs(_first(4, 4), run, "bfloat16"))
    assert jobs["learn"].task.loss({}, {}) == (7.0, {})
    assert jobs["learn"].task.stop is str
    assert jobs["learn"].frozen == {}
    slow = _run(pool=PoolStage(), learn=dataclasses.replace(learn, steps=9, warmup_steps=1))
    with pytest.raises(UserError, match=r"stages\.learn: no warm-up"):
        list(configurations(_first(4, 4), slow))
