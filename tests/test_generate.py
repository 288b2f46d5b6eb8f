"""Generation: the cache against the whole forward and transformers, batches, sampling, stopping, and the command."""

import contextlib
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import text
from test_adapters import ADAPTER_METHODS, disturbed
from training_runs import MODELS, initial_params
from transformers_models import CLASSES, written

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.adapters import adapter as adapters
from moe_reduce.core.config import ExecutionConfig, GenerateConfig, MeshConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.generate_config import CacheDtype
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.inference import generate as generation
from moe_reduce.inference.chat import chat_prompt
from moe_reduce.inference.generate import bucket, chunks, compile_for, generate, ready
from moe_reduce.inference.sampling import Choice, Sampler, choose
from moe_reduce.inference.text import Continuation, complete, end_ids, stream
from moe_reduce.models import cache, deltas
from moe_reduce.models.attention import softmax
from moe_reduce.models.decoder import STACK
from moe_reduce.models.model import Model
from moe_reduce.planning.compiled_step import collectives
from moe_reduce.training.sharding import make_mesh

PROMPTS = [[5, 7, 9], list(range(20)), [1]]
LENGTHS = [3, 7]


def model_of(kind: str, platform: str = "cpu", **execution) -> Model:
    """Far from uniform, so that an argmax is no accident. A platform other than the CPU's scans stacked layers."""
    config = dataclasses.replace(MODELS[kind], init_std=0.3)
    return Model(
        config, initial_params(config), ExecutionConfig(platform=platform, block_rows=8, **execution).resolve("cpu")
    )


def cached_logits(model: Model, rows_BT: np.ndarray, dtype: CacheDtype = "auto") -> tuple[list[np.ndarray], dict]:
    """Logits of each row from the last place of its prompt (of LENGTHS) on, token by token; and the cache."""
    found = ready(model)
    program = generation.Program(found.config, found.execution, Sampler(True, None, False), "auto")
    lengths_B, longest = jnp.asarray(LENGTHS), max(LENGTHS)

    @jax.jit
    def prefill(tokens_BT):
        logits_B1V, new = program.run(found.params, {"tokens": tokens_BT, "last": lengths_B - 1})
        return logits_B1V, cache.of_prompts(new, 16, dtype, STACK in found.params)

    @jax.jit
    def step(held, tokens_B, positions_B):
        batch = {"tokens": tokens_B[:, None], "positions": positions_B[:, None]}
        logits_B1V, new = program.run(found.params, batch, held)
        return logits_B1V, cache.written(held, new, positions_B, STACK in found.params)

    padded = np.where(np.arange(longest)[None] < np.array(LENGTHS)[:, None], rows_BT[:, :longest], 0)
    logits_B1V, held = prefill(jnp.asarray(padded))
    made = [logits_B1V]
    for number in range(5):
        positions_B = lengths_B + number
        logits_B1V, held = step(held, jnp.asarray(rows_BT)[jnp.arange(2), positions_B], positions_B)
        made.append(logits_B1V)
    return list(np.concatenate(made, axis=1)), held


def whole_logits(model: Model, rows_BT: np.ndarray) -> list[np.ndarray]:
    logits_BTV = np.asarray(model(rows_BT))
    return [logits[length - 1 : length + 5] for logits, length in zip(logits_BTV, LENGTHS, strict=True)]


def random_rows(model: Model) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12), dtype=np.int32)


@pytest.mark.parametrize(
    ("kind", "platform"), [*((kind, "cpu") for kind in MODELS), ("neox", "tpu"), ("shared", "tpu"), ("layer", "tpu")]
)
def test_cached_logits_are_those_of_the_whole_forward(kind, platform):
    model = model_of(kind, platform)
    rows_BT = random_rows(model)
    for found, expected in zip(cached_logits(model, rows_BT)[0], whole_logits(model, rows_BT), strict=True):
        np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["blocks", "splash"])
def test_prompts_are_read_as_the_platform_does_it(attention, monkeypatch):
    """Whose attention holds no score of a long prompt's every pair; and on a mesh."""
    monkeypatch.setattr(softmax, "SMALLEST_TILE", 2)
    model = model_of("dense", attention="xla")
    rows_BT = random_rows(model)
    found = dataclasses.replace(model, execution=dataclasses.replace(model.execution, attention=attention))
    assert ready(found).execution.attention == attention
    for logits, expected in zip(cached_logits(found, rows_BT)[0], whole_logits(model, rows_BT), strict=True):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    settings = GenerateConfig(max_tokens=8)
    split = ready(found, make_mesh(MeshConfig(data=1, tensor=2)))
    assert generate(split, PROMPTS, settings) == generate(model, PROMPTS, settings)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_an_int8_cache_is_close(platform):
    model = model_of("dense", platform)
    rows_BT = random_rows(model)
    logits, held = cached_logits(model, rows_BT, dtype="int8")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(held)} == {"int8", "float32"}
    for found, expected in zip(logits, whole_logits(model, rows_BT), strict=True):
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        assert 0 < difference < 0.03


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("dtype", "stored", "worst"), [("fp8", "float8_e4m3fn", 0.1), ("int4", "uint8", 0.4)])
def test_smaller_caches_are_as_close_as_their_steps(platform, dtype, stored, worst):
    model = model_of("dense", platform)
    rows_BT = random_rows(model)
    logits, held = cached_logits(model, rows_BT, dtype=dtype)
    _, whole = cached_logits(model, rows_BT)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(held)} == {stored, "float32"}
    for (small, exact), name in itertools.product(layers_of(held, whole)[:1], cache.SCALES):
        scale = np.asarray(small[cache.SCALES[name]])[..., None]
        found = np.asarray(cache.values(small, name, jnp.float32)) * scale
        largest = {"fp8": 448, "int4": 7.5}[dtype]  # codes -8 to 7: both ends are half a step off
        np.testing.assert_allclose(scale[..., 0], np.abs(exact[name]).max(-1) / largest, rtol=1e-5)
        # later layers read what the first has rounded; only its keys and values are those of the exact cache
        half_step = scale / 2 if dtype == "int4" else np.maximum(np.abs(exact[name]) / 16, scale * 2.0**-10)
        assert np.all(np.abs(found - exact[name]) <= 1.001 * half_step + 1e-6), name
    for found, expected in zip(logits, whole_logits(model, rows_BT), strict=True):
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        assert 0 < difference < worst


def layers_of(*caches):
    """The layers of several caches side by side, whether they are stacked or not."""
    if "keys" not in caches[0]:
        return [pair for name in caches[0] for pair in layers_of(*(one[name] for one in caches))]
    if caches[0]["keys"].ndim == 4:
        return [caches]
    numbers = range(len(caches[0]["keys"]))
    return [tuple({name: leaf[number] for name, leaf in one.items()} for one in caches) for number in numbers]


def test_a_bfloat16_cache_is_close():
    exact, half = (model_of("dense", compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
    rows_BT = random_rows(exact)
    logits, held = cached_logits(half, rows_BT)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(held)} == {"bfloat16"}
    for found, expected in zip(logits, whole_logits(exact, rows_BT), strict=True):
        assert found.dtype == np.float32
        assert 0 < np.abs(found - expected).max() / np.abs(expected).max() < 0.05


def whole_greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    ids = np.zeros((1, len(prompt) + count), np.int32)
    ids[0, : len(prompt)] = prompt
    for place in range(len(prompt), ids.shape[1]):
        ids[0, place] = np.asarray(model(ids))[0, place - 1].argmax()
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("kind", "platform"), [("dense", "cpu"), ("neox", "cpu"), ("pool", "cpu"), ("layer", "tpu")])
def test_unequal_prompts_are_continued_as_each_alone(kind, platform):
    model = ready(model_of(kind, platform))
    settings = GenerateConfig(max_tokens=8)
    together = generate(model, PROMPTS, settings)
    assert together == [generate(model, [prompt], settings)[0] for prompt in PROMPTS]
    assert together == [whole_greedy(model_of(kind, platform), prompt, 8) for prompt in PROMPTS]


@contextlib.contextmanager
def compilations():
    """What jax says that it compiles."""
    events, listening = [], [True]
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: listening and events.append(event))
    yield events
    listening.clear()


@pytest.mark.parametrize(
    ("kind", "platform", "cache_dtype", "compute_dtype"),
    [
        ("dense", "cpu", "auto", "float32"), ("neox", "tpu", "auto", "float32"), ("pool", "cpu", "auto", "float32"),
        ("layer", "tpu", "auto", "float32"), ("dense", "tpu", "int8", "float32"), ("shared", "cpu", "auto", "bfloat16"),
    ],
)  # fmt: skip
def test_two_devices_make_the_text_of_one_and_gather_no_weight(kind, platform, cache_dtype, compute_dtype):
    model, mesh = model_of(kind, platform, compute_dtype=compute_dtype), make_mesh(MeshConfig(data=1, tensor=2))
    settings = GenerateConfig(max_tokens=40, cache_dtype=cache_dtype)
    prepared = ready(model, mesh)
    found = generate(prepared, PROMPTS, settings)
    if compute_dtype == "float32":  # else sums in another order may change a choice
        assert found == generate(model, PROMPTS, settings)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(prepared.params)} == {2}
    request = generation._request(prepared, PROMPTS, settings, None)
    program, choice = request.program, request.choice
    generation._prefill.clear_cache()
    generation._decode.clear_cache()
    compile_for(prepared, PROMPTS, settings)
    with compilations() as events:
        generate(prepared, PROMPTS, settings)
    assert [event for event in events if "backend_compile" in event] == []
    with generation.on_mesh(prepared):
        state, _ = generation._prefill(program, request.slots, prepared.params, request.prompts, choice)
        text = generation._decode.lower(program, prepared.params, state, choice, jnp.int32(1)).compile().as_text()
    moved = collectives(text)
    assert moved["all-reduce"]["bytes"] > 0
    assert moved.get("all-gather", {"bytes": 0})["bytes"] < model.config.width**2  # of one square matrix, at least 2


def test_rows_keep_apart_within_the_mesh_of_a_training_run():
    """As recall asks in the middle of training: each device holds the cache of its own rows."""
    model, settings = ready(model_of("dense")), GenerateConfig(max_tokens=4)
    request = generation._request(model, [[1, 2]] * 4, settings, None)
    with jax.set_mesh(make_mesh(MeshConfig(data=4))):
        state, _ = generation._prefill(request.program, request.slots, model.params, request.prompts, request.choice)
    for leaf in jax.tree.leaves(state.cache):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 1


def test_the_command_splits_a_model(directory, capsys):
    arguments = ["generate", f"--model={directory}", "--prompt=one two", "--max-tokens=5"]
    assert main(arguments) == 0
    whole = capsys.readouterr().out
    assert main([*arguments, "--tensor=2"]) == 0
    assert capsys.readouterr().out == whole
    for value, part in (("0", "--tensor must be positive"), ("3", "must be a multiple of --tensor (3)")):
        assert main([*arguments, f"--tensor={value}"]) == 2
        assert part in capsys.readouterr().err


def test_an_active_adapter_takes_part():
    base = model_of("dense")
    adapter = disturbed(adapters.init(ADAPTER_METHODS["dora"], base))
    adapted = dataclasses.replace(base, params=base.params | {deltas.ADAPTER: adapter.tree})
    (found,) = generate(adapted, [[3, 4]], GenerateConfig(max_tokens=8))
    assert found == whole_greedy(adapted, [3, 4], 8)
    assert found != whole_greedy(base, [3, 4], 8)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in CLASSES),
        ("olmoe", {"clip_qkv": 0.9, "norm_topk_prob": True, "num_key_value_heads": 4}),
    ],
)
def test_greedy_text_is_that_of_transformers(tmp_path, kind, changes):
    theirs = written(tmp_path, kind, **changes)
    found = generate(moe_reduce.load(tmp_path), PROMPTS, GenerateConfig(max_tokens=20))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        inputs = torch.tensor([prompt])
        settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
        assert ids == expected[0, len(prompt) :].tolist()


def test_sampling_follows_its_seed_whatever_the_steps():
    model = ready(model_of("dense"))
    settings = GenerateConfig(max_tokens=12, temperature=1.0, seed=3)
    first = generate(model, PROMPTS, settings)
    pieces = list(chunks(model, PROMPTS, settings, steps=5))
    assert [len(row) for row in first] == [12, 12, 12]
    assert [[len(row) for row in piece] for piece in pieces] == [[size] * 3 for size in (1, 5, 5, 1)]
    assert [[identity for piece in pieces for identity in piece[row]] for row in range(3)] == first
    assert generate(model, PROMPTS, dataclasses.replace(settings, seed=4)) != first
    twice = generate(model, [PROMPTS[0], PROMPTS[0]], settings)
    assert twice[0] != twice[1]


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"temperature": 1e-40}])
def test_narrow_sampling_is_greedy(changes):
    model = ready(model_of("dense"))
    greedy = generate(model, PROMPTS, GenerateConfig(max_tokens=8))
    assert generate(model, PROMPTS, GenerateConfig(**{"max_tokens": 8, "temperature": 1.5} | changes)) == greedy


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [0.5, 0.25, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.7}, [0.5, 0.25, 0, 0]),
        ({"top_p": 0.8}, [0.5, 0.25, 0.15, 0]),
        ({"top_p": 0.6, "top_k": 3}, [0.5, 0.25, 0, 0]),
    ],
)
def test_draws_have_the_probabilities_that_are_kept(changes, kept):
    rows, ids = 4000, [2, 0, 3, 1]  # the most probable first
    logits_V = np.zeros(4, np.float32)
    logits_V[ids] = 2 * np.log([0.5, 0.25, 0.15, 0.1])
    settings = GenerateConfig(temperature=2.0, **changes)
    choice = Choice(jnp.float32(2.0), jnp.float32(settings.top_p), jax.random.key(0), jnp.array([-1]))
    drawn = choose(jnp.tile(logits_V, (rows, 1)), Sampler.of(settings, 4), choice, jnp.int32(0))
    shares = np.bincount(np.asarray(drawn), minlength=4)[ids] / rows
    np.testing.assert_allclose(shares, np.array(kept) / sum(kept), atol=0.03)
    assert not shares[np.array(kept) == 0].any()


def test_a_row_ends_at_an_end_and_the_others_go_on():
    model = ready(model_of("neox"))
    free = generate(model, PROMPTS, GenerateConfig(max_tokens=10))
    end = free[0][4]
    wanted = [row[: row.index(end)] if end in row else row for row in free]
    assert len(wanted[0]) < 10 == max(map(len, wanted))
    assert generate(model, PROMPTS, GenerateConfig(max_tokens=10, end_ids=(end, 10**6))) == wanted
    assert generate(model, PROMPTS, GenerateConfig(max_tokens=1, end_ids=(free[0][0],)))[0] == []


def test_lengths_of_one_bucket_share_a_program():
    model = ready(model_of("dense"))
    settings = GenerateConfig(max_tokens=7, temperature=0.5, top_p=0.9)
    compile_for(model, [[1, 2]], settings)
    counters = (generation._prefill, generation._decode)
    generate(model, [[1, 2]], settings)
    before = [counter._cache_size() for counter in counters]
    generate(model, [[4] * 9], dataclasses.replace(settings, max_tokens=5, temperature=0.7, top_p=0.5, seed=9))
    assert [counter._cache_size() for counter in counters] == before
    generate(model, [[4] * 17], settings)
    assert [counter._cache_size() for counter in counters] == [count + 1 for count in before]
    assert [bucket(length) for length in (1, 16, 17, 24, 25, 32, 33, 48, 49, 1000)] == [
        16, 16, 24, 24, 32, 32, 48, 48, 64, 1024,
    ]  # fmt: skip


class Bytes:
    """A tokenizer whose tokens are bytes."""

    vocab_size, end_of_text = 256, 0

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_text_is_shown_when_it_is_certain():
    row = Continuation(Bytes(), b"ab", ["END", "xy"])  # type: ignore[arg-type]
    assert row.add(list("hé".encode())[:2]) == "h"
    assert row.add([*"é".encode()[1:], *b"oE"]) == "éo"  # it could be the start of END
    assert row.add(b"x") == "E"
    assert row.add([300, *b"-ENDmore"]) == "x-"  # an id that the tokenizer does not have
    assert row.stopped
    assert row.add(b"!") == row.rest() == ""
    assert row.text == "héoEx-"
    open_end = Continuation(Bytes(), b"ab", ["END"])  # type: ignore[arg-type]
    assert (open_end.add(b"oEN"), open_end.rest(), open_end.text) == ("o", "EN", "oEN")
    with pytest.raises(UserError, match="stop string is empty"):
        Continuation(Bytes(), b"ab", [""])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model of random weights with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("generate") / "model"
    config = dataclasses.replace(MODELS["dense"], vocab_size=400, init_std=0.3, max_positions=64)
    moe_reduce.save(Model(config, initial_params(config), ExecutionConfig().resolve("cpu")), path)
    train_tokenizer([text(80, 0)], 400).save(path)
    return path


def test_stop_strings_cut_every_text(directory):
    model, tokenizer = ready(moe_reduce.load(directory)), load_tokenizer(directory)
    settings, prompts = GenerateConfig(max_tokens=20), ["one", "another one"]
    free = complete(model, tokenizer, prompts, settings, [])
    stop = free[0][5:8]
    assert stop.strip()
    cut = complete(model, tokenizer, prompts, settings, [stop, "never"])
    assert cut == [found.split(stop)[0] for found in free]
    rows = [Continuation(tokenizer, tokenizer.encode_prompt(prompt), [stop]) for prompt in prompts]
    pieces = list(stream(model, rows, settings, steps=2))
    assert ["".join(texts) for texts in zip(*pieces, strict=True)] == cut


def test_command_prints_what_python_gives(directory, capsys):
    arguments = ["generate", f"--model={directory}", "--max-tokens=12", "--temperature=0.8", "--seed=5", "--top-k=50"]
    assert main([*arguments, "--prompt=Once"]) == 0
    one = capsys.readouterr()
    model, tokenizer = moe_reduce.load(directory), load_tokenizer(directory)
    settings = GenerateConfig(12, 0.8, 50, seed=5, end_ids=end_ids(model, tokenizer))
    assert one.out == complete(model, tokenizer, ["Once"], settings, [])[0] + "\n"
    assert one.err.startswith("Once\n")
    assert "tokens/s; decode: 12 tokens" in one.err
    assert main([*arguments, "--prompt=Once", "--prompt=Or twice"]) == 0
    both = complete(model, tokenizer, ["Once", "Or twice"], settings, [])
    assert capsys.readouterr().out == f"== Once\n{both[0]}\n== Or twice\n{both[1]}\n"


TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.mark.parametrize("place", ["settings", "named", "file"])
def test_chat_follows_the_template_as_transformers_does(directory, tmp_path, capsys, place):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        settings["chat_template"] = TEMPLATE if place == "settings" else [{"name": "default", "template": TEMPLATE}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": " Hello "}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat_prompt(tmp_path, " Hello ") == expected
    assert "<|user|>Hello</s>" in expected
    assert main(["generate", f"--model={tmp_path}", "--chat", "--prompt=Hello", "--max-tokens=2"]) == 0
    read = len(theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    assert f"prompt: {read} tokens" in capsys.readouterr().err


EVERYTHING = """{% if bos_token is defined %}begins{% endif %}{% if tools is none %}{{ strftime_now('%Y') }}{% endif %}
{% for message in messages %}{% generation %}{{ message | tojson }}{% endgeneration %}{% endfor %}"""


def test_templates_have_what_transformers_gives_them(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    (tmp_path / "chat_template.jinja").write_text(EVERYTHING)
    messages = [{"role": "user", "content": "<é>"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert "<é>" in expected
    assert "begins" not in expected
    assert chat_prompt(tmp_path, "<é>") == expected
    file = f"--tokenizer={tmp_path / 'tokenizer.json'}"
    assert main(["generate", f"--model={directory}", "--chat", "--prompt=a", "--max-tokens=2", file]) == 0


def test_end_ids_are_those_of_all_files(directory, tmp_path):
    tokenizer = load_tokenizer(directory)
    model = dataclasses.replace(moe_reduce.load(directory), source=tmp_path, hf_config={"eos_token_id": 7})
    assert end_ids(model, tokenizer) == tuple(sorted({tokenizer.end_of_text, 7}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assert end_ids(model, tokenizer) == tuple(sorted({tokenizer.end_of_text, 7, 9, 11}))


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--prompt="], "prompt 1 is empty"),
        (["--prompt=x", "--max-tokens=0"], "max_tokens must be positive"),
        (["--prompt=x", "--temperature=-1"], "temperature"),
        (["--prompt=x", "--temperature=1", "--top-p=0"], "top_p"),
        (["--prompt=x", "--temperature=1", "--top-p=1.5"], "top_p"),
        (["--prompt=x", "--temperature=1", "--top-k=0"], "top_k"),
        (["--prompt=x", "--seed=-1"], "seed"),
        (["--prompt=x", "--stop="], "stop string"),
        (["--prompt=x", "--max-tokens=64"], "context of 64"),
        (["--prompt=x", "--tokenizer=nowhere"], "nowhere"),
        (["--prompt=x", "--chat"], "no chat template"),
        (["--prompt=x", "--chat", "--tokenizer=configs"], "leave out --chat"),
        ([], "--prompt"),
    ],
)
def test_mistakes_are_one_line(directory, arguments, culprit, capsys):
    assert main(["generate", f"--model={directory}", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert culprit in line


def test_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(UserError, match=r"prompt 2 has token ids 0\.\.384, the model has 0\.\.383"):
        generate(model_of("dense"), [[1], [0, 384]], GenerateConfig(max_tokens=1))
