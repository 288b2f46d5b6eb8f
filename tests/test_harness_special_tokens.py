"""Special tokens in lm-eval's requests: the token before an empty context, and answers, are those of the `hf` model."""

import json

import numpy as np
import pytest
import torch
from conftest import text
from sentencepiece_like import write_tokenizer
from test_harness_parity import CONTEXT, VOCABULARY, WORDS, likelihoods, ours, phrases, requests, theirs
from transformers_models import written

from moe_reduce.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
TURN, MARK = "<|im_end|>", "<|mark|>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny random Llama that often writes a special token, and whose eos_token is not its end of text."""
    place = tmp_path_factory.mktemp("turns")
    write_tokenizer(place, text(documents=40, seed=0), VOCABULARY - 2, begins=False)
    content = json.loads((place / "tokenizer.json").read_text())
    size = len(content["model"]["vocab"])
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [added | {"id": size + at, "content": token} for at, token in enumerate((TURN, MARK))]
    (place / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((place / "tokenizer_config.json").read_text()) | {"eos_token": TURN}
    settings.pop("added_tokens_decoder", None)
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    model = written(place, "llama", vocab_size=size + 2, max_position_embeddings=CONTEXT, eos_token_id=size)
    with torch.no_grad():
        model.lm_head.weight[:259] = 0.0  # control tokens and bytes are never written
        model.lm_head.weight[size] = 0.0
        model.lm_head.weight[size + 1] *= 3
    model.save_pretrained(place)
    return place


def test_a_text_without_context_follows_the_eos_token(directory):
    tokenizer, harness, hf = load_tokenizer(directory), ours(directory), theirs(directory)
    assert tokenizer.decode([tokenizer.end_of_text]) == "</s>"
    assert harness.prefix_token_id == hf.prefix_token_id == tokenizer.end_of_turn != tokenizer.end_of_text
    assert harness.eot_token_id == hf.eot_token_id
    pairs = [("", " " + phrase) for phrase in phrases(6, 3)]
    found, expected = (likelihoods(lm, pairs) for lm in (harness, hf))
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("stop", [["\n"], [MARK], [WORDS[3][:2], MARK]])
def test_answers_have_no_special_tokens_and_end_where_a_stop_string_says(directory, stop):
    asked = [(prompt, {"until": stop, "max_gen_toks": 10}) for prompt in phrases(10, 4)]
    # one at a time: in a batch, the hf model goes on behind a stop string that is a special token
    found, expected = (
        lm(directory, 1).generate_until(requests("generate_until", asked), disable_tqdm=True) for lm in (ours, theirs)
    )
    assert found == expected
    assert len(set(found)) > 3
    harness, everything = ours(directory), {"until": [], "max_gen_toks": 10}
    texts = requests("generate_until", [(prompt, everything) for prompt, _ in asked])
    harness._answer = lambda ids, _: harness._text(ids)  # type: ignore[method-assign]
    assert sum(MARK in text for text in harness.generate_until(texts, disable_tqdm=True)) > 3
