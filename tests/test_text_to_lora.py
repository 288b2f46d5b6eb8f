"""Runs of Text-to-LoRA through the command line: oracles, reconstruction, supervised learning, use and comparison."""

import dataclasses
import hashlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hypernetwork_tasks import content, write
from training_runs import MODELS, ONE_DEVICE, assert_close, unmeasured_peak

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import adapter_directory, bank
from moe_reduce.adapters.adapter import Adapter
from moe_reduce.adapters.hypernetwork import conditioning, encoders, tasks
from moe_reduce.adapters.hypernetwork.rows import TaskRows, Turns, encode, short, training_batches, validation_batches
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, TrainConfig
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.inference import described_tasks
from moe_reduce.models.decoder import init_params
from moe_reduce.models.deltas import ADAPTER, BANK
from moe_reduce.models.model import Model
from moe_reduce.runs.text_to_lora import material, objectives
from moe_reduce.storage import manifest
from moe_reduce.training import job, losses, optimizer, sharding, steps
from moe_reduce.training.task import Task, join, partition

CONFIG = """
from moe_reduce.core import config as defaults


def get_config():
    config = defaults.text_to_lora_base()
    config.model = {base!r}
    config.mesh.data = 1
    config.generated_tokens = 4
    config.hypernetwork.encoder = "hashed"
    config.hypernetwork.adapter.rank = 2
    config.tasks.update(
        directory={tasks!r}, splits={splits!r}, held_out=4, sequence_length=128, cache={cache!r}
    )
    config.train.update(
        steps=8, batch_size=4, learning_rate=1e-2, evaluate_every=4, evaluate_batches=1, checkpoint_every=4
    )
    return config
"""
ROOT = Path(__file__).parent.parent
NAMES = [f"task{number}" for number in range(6)]


class Hashed:
    """An encoder for tests: random numbers, decided by the text."""

    name, width, hash = "hashed", 8, "0" * 64

    def encode(self, texts):
        seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
        return np.stack([np.random.default_rng(seed).standard_normal(8).astype(np.float32) for seed in seeds])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    patched(monkeypatch)


def patched(patch):
    patch.setattr(job, "peak", unmeasured_peak)
    for module in (material, conditioning, encoders):
        patch.setattr(module, "open_encoder", lambda _, cache: encoders.Cached(Hashed(), cache))


def text_to_lora(directory, name, *more):
    keys = [f"--config={directory / 'config.py'}", f"--workdir={directory / name}"]
    assert main(["text-to-lora", *keys, *(f"--config.{key}" for key in more)]) == 0
    return json.loads((directory / name / "summary.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base with a tokenizer, six tasks in three splits, and a configuration."""
    directory = tmp_path_factory.mktemp("text_to_lora")
    write(directory / "tasks", {name: content(number) for number, name in enumerate(NAMES)})
    found = tasks.read_tasks(directory / "tasks")
    texts = ["".join(pair) for task in found for pair in tasks.pairs(task, task.descriptions[0])]
    tokenizer = train_tokenizer(texts * 4, 320)
    (directory / "tokenizer").mkdir()
    tokenizer.save(directory / "tokenizer")
    config = dataclasses.replace(MODELS["dense"], vocab_size=320, init_std=0.3, max_positions=512)
    params = init_params(config, jax.random.key(0))
    moe_reduce.save(Model(config, params, ExecutionConfig(), directory / "tokenizer"), directory / "base")
    splits = {"train": NAMES[:4], "validation": NAMES[4:5], "unseen": NAMES[5:]}
    (directory / "splits.json").write_text(json.dumps(splits))
    (directory / "swapped.json").write_text(json.dumps({"train": NAMES[1:2], "unseen": NAMES[:1]}))
    keys = {name: str(directory / name) for name in ("base", "tasks", "cache")} | {
        "splits": str(directory / "splits.json")
    }
    (directory / "config.py").write_text(CONFIG.format(**keys))
    return directory


@pytest.fixture(scope="module")
def runs(place):
    """Oracles of four tasks, a hypernetwork that reconstructs them, and one that learned the tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patched(patch)
        found = {
            "oracles": text_to_lora(place, "oracles", "objective=oracles", "train.batch_size=8", "rows_per_task=2")
        }
        library = f"library={place / 'oracles'}"
        found["copy"] = text_to_lora(
            place, "copy", "objective=reconstruction", library, "train.learning_rate=1e-3", "train.steps=60",
            "train.evaluate_every=60", "train.checkpoint_every=60",
        )  # fmt: skip
        found["learned"] = text_to_lora(place, "learned")
    return found


def test_oracles_are_adapters_of_each_task(place, runs):
    assert runs["oracles"]["tasks"] == 4
    base = moe_reduce.load(place / "base")
    found = [
        adapter_directory.load(place / "oracles/adapters" / name, base.config, manifest.input_of(place / "base"))
        for name in NAMES[:4]
    ]
    assert all(
        np.any(np.asarray(x)) for a in found for path, x in trees.flatten(a.tree).items() if path.endswith("out/matrix")
    )
    assert sorted(json.loads((place / "oracles/splits.json").read_text())["train"]) == sorted(NAMES[:4])


def test_an_oracle_in_the_bank_trains_as_it_would_alone():
    """Four steps of AdamW on three tasks at once, and on each task alone with an ordinary adapter."""
    config = dataclasses.replace(MODELS["dense"], init_std=0.3)
    base = Model(config, init_params(config, jax.random.key(0)), ExecutionConfig(platform="cpu").resolve("cpu"))
    lora = AdapterConfig(targets="q,v", rank=2, alpha=4.0)
    new = adapters.init(lora, base)
    draw = np.random.default_rng(0)
    rows = [random_rows(draw, number) for number in range(3)]
    task, tree = objectives.oracles(base, [new] * 3)
    together = trained(task, base.params | tree, training_batches(rows, 6, 2, 0))[BANK]
    for number in range(3):
        alone = Task(
            loss=lambda params, batch: alone_loss(base.with_params(params), batch),
            evaluate=lambda *_: {},
            records=objectives.hypernetworks.replicated({ADAPTER: new.tree}) | dict(task.records),
            trainable=lambda path: path.startswith(ADAPTER) and adapters.trained(lora, path),
        )
        expected = trained(alone, base.params | {ADAPTER: new.tree}, of_task(rows, number))[ADAPTER]
        assert_close(bank.entry(together, number), expected, rtol=1e-6, atol=1e-7)
        before, after = (trees.flatten(tree)["layers/attention/query/in/matrix"] for tree in (new.tree, expected))
        assert not np.allclose(before, after), "it trains"


def alone_loss(model, batch):
    logits = model.apply({name: batch[name] for name in ("tokens", "weights")}).logits_BTV
    loss = losses.mean_nll(logits, batch)
    return loss, {"loss": loss}


def of_task(rows, number):
    """The rows of one task, from the batches of all tasks."""
    for batch in training_batches(rows, 6, 2, 0):
        yield {name: array[batch["task"] == number] for name, array in batch.items()}


def random_rows(draw, number, count=5, length=9):
    ids = draw.integers(0, 61, (count, length + 1)).astype(np.int32)
    weights = (draw.random((count, length)) < 0.6).astype(np.float32)
    weights[:, 0] = 1
    return TaskRows(f"task{number}", ids[:, :-1], ids[:, 1:], weights, draw.random((2, 3)).astype(np.float32))


def trained(task, params, batches, count=4):
    settings = TrainConfig(steps=count, batch_size=6, learning_rate=1e-2, weight_decay=0.0, clip_norm=1e9)
    mesh = sharding.make_mesh(ONE_DEVICE)
    train, frozen = partition(params, task.trainable)
    program = steps.program(task, settings, mesh, train)
    state = jax.jit(program.new_state, out_shardings=program.shardings)(jax.tree.map(jnp.copy, train))
    for _, batch in zip(range(count), batches, strict=False):
        state, _ = program.step(state, frozen, {name: jnp.asarray(array) for name, array in batch.items()})
    return join(state.params, frozen)


def test_tasks_and_instances_take_turns():
    rows = [random_rows(np.random.default_rng(n), n, count=4 + n) for n in range(3)]
    turns = Turns(rows, rows_per_task=2, seed=0)
    order = [int(turns[index]["task"]) for index in range(24)]
    assert order[::2] == order[1::2], "the rows of a task are neighbours"
    assert all(sorted(order[start : start + 6 : 2]) == [0, 1, 2] for start in range(0, 24, 6))
    assert len({tuple(order[start : start + 6]) for start in range(0, 24, 6)}) > 1, "each turn has its own order"
    seen = [turns[index]["tokens"].tobytes() for index in range(24) if order[index] == 0][:4]
    assert len(set(seen)) == 4, "every instance comes once before any comes again"
    assert Turns(rows, 2, 1)[0]["tokens"].tobytes() != turns[0]["tokens"].tobytes()


def test_batches_resume_and_divide_over_hosts():
    rows = [random_rows(np.random.default_rng(n), n) for n in range(3)]
    batches = training_batches(rows, 4, 1, 0)
    first, state = next(batches), batches.get_state()
    after = next(batches)
    again = training_batches(rows, 4, 1, 0)
    again.set_state(state)
    assert_close(next(again), after)
    halves = [next(training_batches(rows, 4, 1, 0, (index, 2))) for index in range(2)]
    assert_close(
        {name: np.stack([half[name] for half in halves], 1).reshape(first[name].shape) for name in first}, first
    )


def test_validation_takes_each_task_once_and_fills_up():
    rows = [random_rows(np.random.default_rng(n), n) for n in range(3)]
    found = validation_batches(rows, 4, 2)
    assert [batch["task"].tolist() for batch in found] == [[0, 0, 1, 1], [2, 2, 0, 0]]
    assert found[1]["weights"][2:].sum() == 0


def test_long_instances_are_left_out(place):
    (task, *_) = tasks.read_tasks(place / "tasks")
    tokenizer = moe_reduce_tokenizer(place)
    lengths = sorted(len(tokenizer.encode_pair(*pair)[0]) for pair in tasks.pairs(task))
    rows = encode(short(task, tokenizer, lengths[9]), tokenizer, lengths[9], np.zeros((1, 1), np.float32))
    assert len(rows.tokens_XT) == sum(length <= lengths[9] for length in lengths)
    for x, target in zip(rows.weights_XT, rows.targets_XT, strict=True):
        learned = target[x > 0]
        assert learned[-1] == tokenizer.end_of_text
        assert tokenizer.decode(learned[:-1].tolist()).strip().isdigit()


def moe_reduce_tokenizer(place):
    from moe_reduce.data.tokenizers import load_tokenizer

    return load_tokenizer(place / "base")


def test_reconstruction_comes_near_its_library(place, runs):
    assert runs["copy"]["validation"]["relative_l1"] < 0.6
    config = json.loads((place / "copy/hypernetwork/config.json").read_text())
    assert sorted(config["tasks"]) == NAMES[:4]
    assert config["encoder"]["name"] == "hashed"


def test_supervised_learning_lowers_the_loss(place, runs):
    lines = [json.loads(line) for line in (place / "learned/metrics.jsonl").read_text().splitlines()]
    validation = [line["loss"] for line in lines if line["split"] == "validation"]
    assert validation[-1] < validation[0]
    assert runs["learned"]["validation"]["loss"] == pytest.approx(validation[-1])
    assert main(["text-to-lora", f"--config={place / 'config.py'}", f"--workdir={place / 'learned'}"]) == 0, "done"


@pytest.mark.usefixtures("runs")
def test_one_adapter_learns_all_tasks(place):
    text_to_lora(place, "multitask", "objective=multitask", "train.steps=6")
    base = moe_reduce.load(place / "base")
    found = adapter_directory.load(
        place / "multitask/adapters/multitask", base.config, manifest.input_of(place / "base")
    )
    assert np.any(trees.flatten(found.tree)["layers/attention/query/out/matrix"])


@pytest.mark.usefixtures("runs")
def test_the_comparison_has_every_condition(place, capsys):
    out = place / "figures.json"
    arguments = [
        "evaluate-tasks", f"--model={place / 'base'}", f"--run={place / 'oracles'}", f"--out={out}", "--examples=2",
        "--max-tokens=4", "--batch-size=4", "--overwrite",
        f"--adapter-cache={place / 'cache'}",
    ]  # fmt: skip
    more = [f"--hypernetwork=ours={place / 'learned/hypernetwork'}", f"--average={place / 'oracles'}"]
    assert main([*arguments, *more, f"--adapter=first={place / 'oracles/adapters/task0'}"]) == 0
    names = [
        "base", "description in the prompt", "2 examples", "average of oracles", "first", "ours, own description",
        "ours, another task's description", "ours, random description",
    ]  # fmt: skip
    conditions = json.loads(out.read_text())["conditions"]
    assert [condition["name"] for condition in conditions] == names
    assert all(set(condition["tasks"]) == {NAMES[5]} for condition in conditions)
    assert len({condition["loss"] for condition in conditions}) >= 7, "one unseen task: its neighbour is itself"
    assert main([*arguments, "--split=train", f"--oracles={place / 'oracles'}"]) == 0
    found = {condition["name"]: condition["loss"] for condition in json.loads(out.read_text())["conditions"]}
    assert found["oracles"] < found["base"]
    assert "loss (nats)" in capsys.readouterr().out


def test_losses_of_the_comparison_are_those_of_the_model(place):
    base, tokenizer = moe_reduce.load(place / "base"), moe_reduce_tokenizer(place)
    (task,) = (tasks.divided(t, 3)[1] for t in tasks.read_tasks(place / "tasks", ["task5"]))
    (condition,) = described_tasks.prompted([task], 0)[:1]
    found = described_tasks.measure(base, tokenizer, [task], condition, described_tasks.Settings(2, 0))
    total = count = 0
    for prompt, completion in tasks.pairs(task):
        ids, length = tokenizer.encode_pair(prompt, completion)
        ids = [*ids, tokenizer.end_of_text]
        log = np.asarray(jax.nn.log_softmax(base(np.asarray([ids]))[0]), np.float64)
        total -= sum(float(log[place_ - 1, ids[place_]]) for place_ in range(length, len(ids)))
        count += len(ids) - length
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)


def test_answers_are_scored():
    assert described_tasks.exact_match(" The cat. ", "the  cat") == 1
    assert described_tasks.exact_match("the cats", "the cat") == 0
    assert described_tasks.rouge_l("the cat sat", "the cat") == pytest.approx(0.8)
    assert described_tasks.rouge_l("dogs", "the cat") == 0


@pytest.mark.usefixtures("runs")
def test_generate_writes_adapters_for_descriptions(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    given = [
        "generate",
        f"--model={place / 'base'}",
        f"--hypernetwork={place / 'learned/hypernetwork'}",
        "--max-tokens=6",
    ]
    texts = ["--prompt=the cat of number 7 sat", "--prompt=the cat of number 7 sat"]
    assert main([*given, *texts, "--task=Count the cats.", "--task=Name the bird."]) == 0
    both = capsys.readouterr().out
    cached = sorted((place / "runs/written_adapters").glob("*/adapter.json"))
    assert len(cached) == 2
    for number, task in enumerate(("Count the cats.", "Name the bird.")):
        assert f"[{task}]" in both
        out = place / f"written{number}"
        words = [f"--model={place / 'base'}", f"--task={task}", f"--out={out}"]
        assert main(["adapt", given[2], *words]) == 0
        assert main([*given[:2], texts[0], f"--adapter={out}", "--max-tokens=6"]) == 0
        alone = capsys.readouterr().out.splitlines()[-1]
        assert alone.strip() in both
        assert (
            main(["merge", f"--model={place / 'base'}", f"--adapter={out}", f"--out={place / f'merged{number}'}"]) == 0
        )
        assert (out / "adapter_config.json").is_file(), "PEFT opens it"
    assert sorted((place / "runs/written_adapters").glob("*/adapter.json")) == cached, "written once"


TEMPLATE = """{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}
{% endfor %}assistant:"""
CHAT = """/task Count the cats.
the cat of number 7 sat
the bird?
/task
/adapter nowhere
/new
/task Name the bird.
the cat of number 7 sat

/adapter none
/new
the cat of number 7 sat
/quit
not read
"""


@pytest.fixture(scope="module")
def chat(place):
    """Arguments of a chat with the base."""
    shutil.copytree(place / "tokenizer", place / "chat")
    (place / "chat/tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return [f"--model={place / 'base'}", f"--tokenizer={place / 'chat'}"]


@pytest.mark.usefixtures("runs")
def test_a_chat_changes_its_task_between_turns(place, chat, capsys, monkeypatch):
    monkeypatch.chdir(place)
    hypernetwork = f"--hypernetwork={place / 'learned/hypernetwork'}"

    def answer(message, *more):
        assert main(["generate", *chat, "--chat", f"--prompt={message}", "--max-tokens=6", *more]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    question = "the cat of number 7 sat"
    tasks_ = [(hypernetwork, f"--task={task}") for task in ("Count the cats.", "Name the bird.")]
    first, other, base = (answer(question, *more) for more in (*tasks_, ()))
    # the same text as of three messages
    second = answer(f"{question}\nassistant: {first}\nuser: the bird?", *tasks_[0])
    assert first != other != base

    monkeypatch.setattr("sys.stdin", io.StringIO(CHAT))
    assert main(["chat", *chat, "--max-tokens=6", hypernetwork]) == 0
    found = capsys.readouterr()
    assert found.out == "".join(f"{text}\n" for text in (first, second, other, base, ""))
    errors = [line for line in found.err.splitlines() if line.startswith("moe-reduce chat: ")]
    assert len(errors) == 2
    assert "description 1 is empty" in errors[0]
    assert "nowhere is not a directory" in errors[1]


@pytest.mark.parametrize(
    ("words", "lines", "part"),
    [
        (["--max-tokens=600"], "hello\n", "exceed the model's context of 512: /new starts another"),
        ([], "/task Count.\n", "a task needs --hypernetwork=DIR"),
        ([], "/help\n", "/task DESCRIPTION"),
        (["--adapter=nowhere"], "", "nowhere is not a directory"),
        (["--task=a", "--task=b"], "", "there are 2 --task: give one"),
        (["--task=a", "--adapter=b"], "", "choose one"),
        ([], "\udcff\n", "is not UTF-8"),
    ],
)
def test_what_a_chat_answers_to_mistakes(chat, capsys, monkeypatch, words, lines, part):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", *chat, *words]) == (0 if lines else 2)
    assert part in capsys.readouterr().err


@pytest.fixture
def steering(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import text_to_lora_steering

    return text_to_lora_steering


@pytest.mark.usefixtures("runs")
def test_steering_asks_for_adapters_of_both_wordings(place, tmp_path, steering, capsys):
    run, out = [f"--model={place / 'base'}", f"--run={place / 'learned'}"], tmp_path / "steering.json"
    assert steering.main([*run, f"--out={out}", "--inputs=2"]) == 0
    found = json.loads(out.read_text())["rates"]
    assert [(one["by"], one["inputs"]) for one in found] == [("hypernetwork", 2), ("description in the prompt", 2)] * 3
    asked = steering.Asked.of(SimpleNamespace(model=place / "base", run=place / "learned", inputs=1))
    (row,) = steering.rows(asked.adapted, asked.tasks[0], steering.PAIRS[0])
    description = asked.tasks[0].descriptions[0]
    words = [f"--hypernetwork={place / 'learned/hypernetwork'}", f"--adapter-cache={tmp_path}"]
    words += [f"--prompt={row['prompt']}", f"--max-tokens={steering.MAX_TOKENS}"]
    words += [f"--stop={stop}" for stop in described_tasks.STOPS]
    for answer, ending in ((row["first"], steering.PAIRS[0].first), (row["second"], steering.PAIRS[0].second)):
        capsys.readouterr()
        assert main(["generate", run[0], *words, f"--task={description} {ending}"]) == 0
        assert capsys.readouterr().out.strip() == answer
    assert steering.main([run[0], f"--run={tmp_path}", f"--out={out}"]) == 2
    assert "no workdir of text-to-lora" in capsys.readouterr().err


def test_rates_of_steering(steering):
    answers = [
        {"first": first, "second": second} for first, second in (("a", "a b"), ("a b", "a"), ("a", "a"), ("", "c"))
    ]
    found = steering.result(steering.PAIRS[0], "x", answers)
    assert (found["followed"], found["opposed"], found["same_answer"]) == (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--task=x"], "--hypernetwork=DIR writes adapters for --task=DESCRIPTION: give both"),
        (["--hypernetwork={0}/learned/hypernetwork", "--task= "], "description 1 is empty"),
        (["--hypernetwork={0}/learned/hypernetwork", "--task=a", "--task=b"], "2 --task and 1 --prompt"),
        (["--hypernetwork={0}/base", "--task=a"], "does not describe a hypernetwork"),
        (["--hypernetwork={0}/one_hot/hypernetwork", "--task=a"], "trained on task numbers"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_what_generate_refuses(place, capsys, words, part):
    if "one_hot" in "".join(words):
        text_to_lora(place, "one_hot", "conditioning=one_hot", "train.steps=2")
    given = ["generate", f"--model={place / 'base'}", "--prompt=a", f"--adapter-cache={place / 'written'}"]
    assert main([*given, *(word.format(place) for word in words)]) == 2
    found = capsys.readouterr().err.strip()
    assert part in found.splitlines()[-1]


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        (["objective=reconstruction"], "library is the workdir of an oracles run"),
        (["objective=oracles"], "set train.batch_size=4, or lower tasks.train"),
        (["split=unseen"], "split=unseen is for objective=oracles"),
        (["tasks.train=9"], "there are 4 training tasks"),
        (
            ["tasks.sequence_length=5"],
            "no task has more than tasks.held_out=4 instances of at most",
        ),
        (["hypernetwork.adapter.method=dora"], "hypernetwork.head=L writes lora or rslora"),
        (["tasks.directory=nowhere"], "nowhere holds no task"),
        (["train.batch_size=6", "rows_per_task=4"], "must be a multiple of rows_per_task"),
    ],
)
def test_what_a_run_refuses(place, tmp_path, capsys, keys, part):
    if keys == ["objective=oracles"]:
        keys = [*keys, "train.batch_size=8"]
    words = [f"--config={place / 'config.py'}", f"--workdir={tmp_path / 'run'}", *(f"--config.{key}" for key in keys)]
    assert main(["text-to-lora", *words]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.usefixtures("runs")
def test_a_task_that_trained_is_not_unseen(place, capsys):
    text_to_lora(place, "swapped", f"tasks.splits={place / 'swapped.json'}", "objective=multitask", "train.steps=2")
    words = [f"--model={place / 'base'}", f"--run={place / 'swapped'}", f"--out={place / 'swapped_figures.json'}"]
    words += [f"--hypernetwork={place / 'learned/hypernetwork'}", f"--adapter-cache={place / 'cache'}"]
    assert main(["evaluate-tasks", *words]) == 2
    assert "task task0 trained this hypernetwork, so it is not unseen" in capsys.readouterr().err


def test_a_line_down_from_the_warm_up():
    train = TrainConfig(
        steps=10, batch_size=1, warmup_steps=2, learning_rate=1.0, final_learning_rate=0.2, decay="linear"
    )
    rates = [float(optimizer.learning_rate(train)(count)) for count in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])


def test_label_smoothing_is_that_of_torch():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    logits, targets = draw.standard_normal((2, 3, 7)).astype(np.float32), draw.integers(0, 7, (2, 3))
    nll = losses.negative_log_likelihood(jnp.asarray(logits), jnp.asarray(targets, jnp.int32))
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits).reshape(-1, 7), torch.tensor(targets).reshape(-1), label_smoothing=0.2, reduction="none"
    )
    np.testing.assert_allclose(losses.smoothed(nll, logits, 0.2).reshape(-1), wanted, rtol=1e-5)


def test_noise_moves_the_embeddings():
    config = dataclasses.replace(MODELS["dense"], init_std=0.3)
    model = Model(config, init_params(config, jax.random.key(0)), ExecutionConfig(platform="cpu").resolve("cpu"))
    tokens = jnp.asarray([[1, 2, 3]], jnp.int32)
    table = model.params["embedding"]["table"]
    noise = jnp.asarray(table[jnp.asarray([[4, 5, 6]])] - table[tokens])
    found = model.apply({"tokens": tokens, "noise": noise}).logits_BTV
    np.testing.assert_allclose(found, model(np.asarray([[4, 5, 6]])), rtol=1e-4, atol=1e-5)


def test_the_average_of_a_library():
    config = dataclasses.replace(MODELS["dense"], init_std=0.3)
    base = Model(config, init_params(config, jax.random.key(0)), ExecutionConfig())
    new = adapters.init(AdapterConfig(targets="q", rank=2), base)
    moved = Adapter(new.config, jax.tree.map(lambda x: x + 2 if x.dtype == jnp.float32 else x, new.tree))
    found = described_tasks.average([new, moved])
    old, mean = trees.flatten(new.tree), trees.flatten(found.tree)
    for path, leaf in old.items():
        np.testing.assert_allclose(mean[path], leaf + 1 if leaf.dtype == jnp.float32 else leaf, rtol=1e-6)
