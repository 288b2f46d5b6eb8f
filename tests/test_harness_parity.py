"""Every request of lm-eval's tasks answered as its own `hf` model answers it, with a tokenizer like Llama 2's."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import text
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sentencepiece_like import BLANK, write_tokenizer
from transformers_models import written

import moe_reduce
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.inference.harness import Harness

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
BENCHMARKS = Path(__file__).parents[2] / "shared/data/benchmarks"
CONTEXT, VOCABULARY = 160, 520
WORDS = text(documents=30, seed=1).replace(".", "").split()
CHOICE_METRICS = [{"metric": "acc"}, {"metric": "acc_norm"}]


@pytest.fixture(scope="module", params=[pytest.param("begins", marks=pytest.mark.slow), "plain"])
def directory(tmp_path_factory, request):
    """A tiny random Llama of transformers, with a tokenizer that puts a blank, and `begins` <s>, before each text."""
    place = tmp_path_factory.mktemp(request.param)
    model = written(place, "llama", vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, eos_token_id=2)
    with torch.no_grad():
        model.lm_head.weight[:259] = 0.0  # control tokens and bytes are never written
    model.save_pretrained(place)
    write_tokenizer(place, text(documents=40, seed=0), VOCABULARY, begins=request.param == "begins")
    return place


def ours(directory, batch_size=4) -> Harness:
    model = moe_reduce.load(directory, execution=ExecutionConfig().resolve("cpu"))
    return Harness(model, load_tokenizer(directory), batch_size)


def theirs(directory, batch_size=4) -> HFLM:
    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=batch_size)


def phrases(count, seed, most=9):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, most))) for _ in range(count)]


def write_task(place, name, rows, **task):
    (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(place / f"{name}.jsonl")}}
    task |= {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    (place / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_choice(place, name, rows, **task):
    write_task(
        place, name, rows, output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}",
        doc_to_target="{{gold}}", metric_list=CHOICE_METRICS, **task,
    )  # fmt: skip


def seven_tasks(place, count):
    """Five multiple-choice tasks of other shapes, one that generates and one of whole texts."""
    answers = {
        "letters": lambda _: ["A", "B", "C", "D"],
        "phrases": lambda number: phrases(4, 10 * number),
        "yes_no": lambda _: ["yes", "no"],
        "sentences": lambda number: [f"{one}." for one in phrases(3, 10 * number + 1, most=20)],
        "cloze": lambda number: phrases(5, 10 * number + 2, most=1),
    }
    for kind, (name, choices) in enumerate(answers.items()):
        questions = phrases(count, 100 + kind, most=(40, 12, 60, 20, 6)[kind])
        rows = [
            {"question": question, "choices": choices(number), "gold": 0} for number, question in enumerate(questions)
        ]
        write_choice(place, name, rows, **({"target_delimiter": ""} if name == "cloze" else {}))
    texts = [{"question": question, "gold": "a"} for question in phrases(count, 200, most=90)]
    write_task(place, "texts", texts, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{question}}")
    write_task(
        place, "answers", texts, output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{gold}}",
        generation_kwargs={"until": ["\n", WORDS[3][:2]], "max_gen_toks": 12, "num_beams": 1},
    )  # fmt: skip
    return [*answers, "texts", "answers"]


def responses(lm, place, names, limit=None):
    """Every request with its response: (task, question, arguments, response)."""
    found = simple_evaluate(
        lm, tasks=list(names), task_manager=TaskManager(include_path=str(place)), limit=limit, bootstrap_iters=0
    )
    return [
        (name, sample["doc_id"], arguments, responded[0])
        for name in names
        for sample in found["samples"][name]
        for arguments, responded in zip(sample["arguments"], sample["resps"], strict=True)
    ]


def check_equal(found, expected):
    assert [request[:3] for request in found] == [request[:3] for request in expected]
    for (*request, mine), (*_, other) in zip(found, expected, strict=True):
        if isinstance(other, str):
            assert mine == other, request
        else:
            mine, other = np.atleast_1d(mine), np.atleast_1d(other)
            np.testing.assert_allclose(mine[0], other[0], rtol=1e-5, atol=1e-3, err_msg=str(request))
            assert mine[1:].tolist() == other[1:].tolist(), request


def test_every_request_of_seven_tasks_is_answered_as_by_the_hf_model(directory, tmp_path):
    names = seven_tasks(tmp_path, 6)
    if "begins" in directory.name:  # the hf model puts <s> before a whole text twice
        names.remove("texts")
    found = responses(ours(directory), tmp_path, names)
    check_equal(found, responses(theirs(directory), tmp_path, names))
    assert len({mine for name, *_, mine in found if name == "answers"}) > 1


def benchmark_tasks(place):
    """Five multiple-choice tasks, one that generates and one of whole texts, on published questions."""

    def rows(name):
        with gzip.open(BENCHMARKS / name, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file] if "jsonl" in name else json.load(file)

    endings = {
        "ARC-Easy": [f"answer{number}" for number in range(1, 5)],
        "ARC-Challenge": [f"the correct answer is answer{number}" for number in range(1, 5)],
        "boolq": ["true", "false"],
        "AQuA": list("ABCDE"),
        "SVAMP": [str(number) for number in range(1, 30, 4)],
    }
    for name, choices in endings.items():
        found = [
            {"question": row["instruction"], "choices": choices, "gold": 0} for row in rows(f"{name}/test.json.gz")
        ]
        write_choice(place, f"{name}_local", found)
    write_task(
        place, "gsm8k_local", rows("gsm8k/test.jsonl.gz"), output_type="generate_until", doc_to_target="{{answer}}",
        doc_to_text="Question: {{question}}\nAnswer:",
        generation_kwargs={"until": ["Question:", "</s>"], "do_sample": False, "max_gen_toks": 24},
    )  # fmt: skip
    passages = rows("lambada/lambada_test.jsonl.gz")
    write_task(
        place, "passages", passages, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}"
    )
    return [*(f"{name}_local" for name in endings), "gsm8k_local", "passages"]


@pytest.mark.slow
@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason=f"{BENCHMARKS} is not on this machine")
def test_every_request_of_published_tasks_is_answered_as_by_the_hf_model(directory, tmp_path):
    names = benchmark_tasks(tmp_path)
    if "begins" in directory.name:
        names.remove("passages")
    found = responses(ours(directory, 16), tmp_path, names, limit=100)
    check_equal(found, responses(theirs(directory, 16), tmp_path, names, limit=100))
    assert len(found) > 2000


def requests(kind, arguments):
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def likelihoods(lm, pairs):
    return lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


def direct(directory, context, continuation):
    """Σ log p of the ids after a context, by transformers."""
    model = theirs(directory).model
    with torch.no_grad():
        logits = torch.log_softmax(model(torch.tensor([[*context, *continuation[:-1]]])).logits[0], -1)
    places = range(len(context) - 1, len(context) - 1 + len(continuation))
    return sum(float(logits[place, token]) for place, token in zip(places, continuation, strict=True))


@pytest.mark.parametrize("context", ["", " ", "\n", " \n\t"])
def test_no_token_of_an_answer_is_free_behind_a_context_of_whitespace(directory, context):
    choices = ["A", "B", WORDS[0], f"{WORDS[0]} {WORDS[1]}"]
    found = likelihoods(ours(directory), [(context, " " + choice) for choice in choices])
    if context == "" or "begins" in directory.name:
        expected = likelihoods(theirs(directory), [(context, " " + choice) for choice in choices])
    else:  # the hf model ends with an assertion here: the token that it puts before an empty context is read
        tokenizer = load_tokenizer(directory)
        ids = [tokenizer.encode(context + " " + choice) for choice in choices]
        expected = [(direct(directory, [tokenizer.end_of_text], one), False) for one in ids]
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], atol=1e-3)
    assert all(likelihood < -1 for likelihood, _ in found)


def test_an_empty_answer_has_likelihood_one_and_ends_nothing(directory):
    pairs = [("", ""), (WORDS[0], ""), (WORDS[0], " " + WORDS[1])]
    found = likelihoods(ours(directory), pairs)
    assert found[:2] == [(0.0, True)] * 2
    np.testing.assert_allclose(found[2][0], likelihoods(theirs(directory), pairs[2:])[0][0], atol=1e-3)


def test_an_answer_within_the_last_token_of_its_context_is_scored_with_that_token(directory):
    tokenizer = load_tokenizer(directory)
    # of a word and its start that are equally long in tokens, nothing would be left for the answer
    cuts = ((word[:end], word[end:]) for word in WORDS for end in range(1, len(word)))
    start, end = next(
        (start, end) for start, end in cuts if len(tokenizer.encode(start + end)) <= len(tokenizer.encode(start))
    )
    context, whole = tokenizer.encode_prompt(start), tokenizer.encode_prompt(start + end)
    shared = next(index for index in range(len(whole)) if whole[index] != context[index])
    before = whole[:shared] or [tokenizer.end_of_text]
    found = likelihoods(ours(directory), [(start, end)])[0][0]
    np.testing.assert_allclose(found, direct(directory, before, whole[shared:]), atol=1e-3)


def test_a_text_that_spells_the_begin_token_has_it_once(directory):
    pairs = [(f"<s> {WORDS[0]}", f" {WORDS[1]}"), (f"</s> {WORDS[2]}", f" {WORDS[1]}")]
    found, expected = (likelihoods(lm(directory), pairs) for lm in (ours, theirs))
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], atol=1e-3)


def test_answers_begin_without_the_blank_between_prompt_and_answer(directory):
    asked = [(prompt, {"until": ["\n"], "max_gen_toks": 8}) for prompt in phrases(12, 8)]
    found, expected = (
        lm(directory).generate_until(requests("generate_until", asked), disable_tqdm=True) for lm in (ours, theirs)
    )
    assert found == expected
    backend = theirs(directory).tokenizer
    first = [backend.convert_ids_to_tokens(backend.encode(answer, add_special_tokens=False)[0]) for answer in found]
    assert any(token.startswith(BLANK) for token in first)
    assert not any(answer.startswith(" ") for answer in found)


def test_an_empty_prompt_is_continued_from_the_prefix_token(directory):
    asked = requests("generate_until", [("", {"until": [], "max_gen_toks": 4})])
    model = moe_reduce.load(directory)
    harness = ours(directory)
    ids = [harness.prefix_token_id]
    for _ in range(4):
        ids.append(int(np.argmax(np.asarray(model([ids]))[0, -1])))
    assert harness.generate_until(asked, disable_tqdm=True) == [harness._text(ids[1:])]


@pytest.mark.parametrize(
    "neutral",
    [
        {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0},
        {"temperature": None, "top_p": None, "eos_token_id": None},
        {"do_sample": False, "temperature": 0.7, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"num_return_sequences": 1, "n": 1, "best_of": 1, "frequency_penalty": 0.0, "use_cache": False},
    ],
)
def test_settings_that_change_nothing_are_accepted(directory, neutral):
    common = {"until": ["\n"], "max_gen_toks": 4}
    asked = requests("generate_until", [(WORDS[0], common), (WORDS[0], common | neutral)])
    plain, changed = ours(directory).generate_until(asked, disable_tqdm=True)
    assert plain == changed


@pytest.mark.parametrize(
    ("setting", "value"),
    [("num_beams", 10), ("repetition_penalty", 1.1), ("min_new_tokens", 3), ("min_p", 0.1), ("bad_words_ids", [[5]])],
)
def test_settings_that_generation_does_not_have_are_refused_by_name(directory, setting, value):
    settings = {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0, setting: value}
    with pytest.raises(UserError, match=f"{setting}="):
        ours(directory).generate_until(requests("generate_until", [("a", settings)]), disable_tqdm=True)


def test_the_first_named_length_counts(directory):
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    for number in range(4):
        settings = {"until": []} | {name: place + 2 for place, name in enumerate(names) if place >= number}
        asked = requests("generate_until", [(WORDS[0], settings)])
        found, expected = (lm(directory).generate_until(asked, disable_tqdm=True) for lm in (ours, theirs))
        assert found == expected
