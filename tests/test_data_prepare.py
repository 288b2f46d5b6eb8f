"""Preparation: real parallel runs from every kind of file, the cache, kills, full disks, and bounded memory."""

import dataclasses
import errno
import gzip
import json
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from moe_reduce.core.config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data import prepare as prepare_module
from moe_reduce.data import sources, tokenizing
from moe_reduce.data.pieces import TRAIN, VALIDATION
from moe_reduce.data.prepare import prepare
from moe_reduce.data.tokenizer_training import train_tokenizer

VOCABULARY = 500
RUN = """
import sys
from moe_reduce.core.config import DataConfig
from moe_reduce.data.prepare import prepare
prepare(DataConfig(source=sys.argv[1], cache=sys.argv[2], tokenizer=sys.argv[3]), int(sys.argv[4]))
"""  # as a user's script would: without `if __name__ == "__main__"`


@pytest.fixture(scope="module")
def texts():
    return list(sources.documents(DataConfig(max_documents=16)))


@pytest.fixture(scope="module")
def tokenizer_file(texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, VOCABULARY).save(directory)
    return str(directory / "tokenizer.model")


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    """The texts divided over files of every kind, in order."""
    directory = tmp_path_factory.mktemp("corpus")
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in texts[start : start + 4]) for start in (1, 5)]
    (directory / "0.txt").write_text(texts[0])
    (directory / "1.jsonl.gz").write_bytes(gzip.compress(lines[0].encode()))
    (directory / "2.jsonl.zst").write_bytes(zstandard.compress(lines[1].encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[9:]}), directory / "3.parquet")
    return directory


@pytest.fixture
def config(corpus, tokenizer_file, tmp_path):
    return DataConfig(source=str(corpus), cache=str(tmp_path / "cache"), tokenizer=tokenizer_file, workers=1)


def entries(config):
    return sorted(os.listdir(config.cache)) if os.path.exists(config.cache) else []


def refusal(config, vocab_size=VOCABULARY):
    with pytest.raises(UserError) as caught:
        prepare(config, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parallel_preparation_keeps_every_document_in_order(config, texts):
    config = dataclasses.replace(config, tokenizer="train", workers=2, validation_fraction=0.0)
    store, tokenizer = prepare(config, VOCABULARY)
    assert tokenizer.vocab_size == VOCABULARY
    tokens = store.window("train", 0, store.length("train")).tolist()
    end = tokenizer.end_of_text
    assert tokens.count(end) == len(texts) == store.manifest.documents
    found, start = [], 0
    while start < len(tokens):
        stop = tokens.index(end, start)
        found.append(tokenizer.decode(tokens[start:stop]))
        start = stop + 1
    assert found == texts
    assert store.manifest.tokens == len(tokens)
    assert store.manifest.bytes_of_text == sum(len(text.encode()) for text in texts)
    assert store.manifest.tokenizer_hash == tokenizer.hash
    assert store.manifest.dtype == "<u2"


def test_splits_divide_the_text_and_end_documents_in_both(config, texts):
    store, tokenizer = prepare(dataclasses.replace(config, validation_fraction=0.3), VOCABULARY)
    decoded = {s: tokenizer.decode(store.window(s, 0, store.length(s)).tolist()) for s in ("train", "validation")}
    held_out = len(decoded["validation"]) / sum(map(len, texts))
    assert 0.05 < held_out < 0.7
    assert len(decoded["train"]) + len(decoded["validation"]) == sum(map(len, texts))
    assert store.window("train", 0, store.length("train"))[-1] == tokenizer.end_of_text
    assert store.window("validation", 0, store.length("validation"))[-1] == tokenizer.end_of_text


def test_a_document_that_is_in_both_splits_ends_in_both(config, texts, tmp_path):
    (tmp_path / "long.txt").write_text("".join(texts) * 2)  # many pieces
    config = dataclasses.replace(config, source=str(tmp_path / "long.txt"), validation_fraction=0.5)
    store, tokenizer = prepare(config, VOCABULARY)
    for split in ("train", "validation"):
        tokens = store.window(split, 0, store.length(split)).tolist()
        assert tokens.count(tokenizer.end_of_text) == 1
        assert tokens[-1] == tokenizer.end_of_text


def test_text_of_its_own_validates(config, tmp_path):
    (tmp_path / "held.txt").write_text("a text that is only validated on\n")
    own = dataclasses.replace(config, validation_source=str(tmp_path / "held.txt"))
    store, tokenizer = prepare(own, VOCABULARY)
    whole, _ = prepare(dataclasses.replace(config, validation_fraction=0.0), VOCABULARY)
    assert np.array_equal(*(each.window(TRAIN, 0, whole.length(TRAIN)) for each in (store, whole)))
    assert store.length(TRAIN) == whole.length(TRAIN)
    found = store.window(VALIDATION, 0, store.length(VALIDATION))
    assert tokenizer.decode(found[:-1].tolist()) == "a text that is only validated on\n"
    assert found[-1] == store.end_of_text
    (tmp_path / "held.txt").write_text("another\n")
    again, _ = prepare(own, VOCABULARY)
    assert again.length(VALIDATION) < store.length(VALIDATION)
    with pytest.raises(UserError, match="nothing matches '/nowhere"):
        prepare(dataclasses.replace(config, validation_source="/nowhere"), VOCABULARY)
    for changes in ({"source": "uuid-pairs:4"}, {"validation_source": ""}, {"validation_source": "x.npy"}):
        with pytest.raises(UserError, match="validation_source"):
            dataclasses.replace(own, **changes).check()


def test_validation_text_inside_the_training_text_is_not_trained_on(config, tmp_path, caplog):
    (tmp_path / "all").mkdir()
    long = "a line that both have\n" * 9000  # longer than a piece
    kept = ["public text", long + "and its own end\n", "secret text "]
    held_out = ["secret text", long, "", "another secret"]
    for name, found in (("kept.jsonl", kept), ("held.jsonl", held_out)):
        (tmp_path / "all" / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    (tmp_path / "all/held.txt").write_text(long)
    own = dataclasses.replace(
        config, source=str(tmp_path / "all"), validation_source=str(tmp_path / "all/held.jsonl"), text_field="text"
    )
    for _ in range(2):  # made, then found
        caplog.clear()
        store, tokenizer = prepare(own, VOCABULARY)
        assert "4 documents of data.source are left out of training" in caplog.text
    found = []
    for split in (TRAIN, VALIDATION):
        ids = store.window(split, 0, store.length(split))
        rows = np.split(ids, np.flatnonzero(ids == store.end_of_text) + 1)[:-1]
        found.append([tokenizer.decode(row[:-1].tolist()) for row in rows])
    assert found == [kept, [text for text in held_out if text]]


DAMAGED_MANIFESTS = {
    "a number as text": {"tokens": "7"},
    "less than nothing": {"end_of_text": -1},
    "another type of ids": {"dtype": "<f8"},
    "an unknown type": {"dtype": "nothing"},
    "shards that are none": {"splits": {"train": [7], "validation": []}},
    "a shard elsewhere": {"splits": {"train": [{"file": "../x.bin", "tokens": 1}], "validation": []}},
    "half a document": {"documents": 1.5},
    "an end beyond the vocabulary": {"end_of_text": 10**9},
    "an unknown key": {"more": 1},
}


def test_manifests_of_earlier_versions_are_read_and_damaged_ones_refused_by_name(config):
    store, _ = prepare(config, VOCABULARY)
    manifest = store.directory / "manifest.json"
    content = json.loads(manifest.read_text())
    for name, damage in DAMAGED_MANIFESTS.items():
        manifest.write_text(json.dumps(content | damage))
        message = refusal(config)
        assert str(manifest) in message, name
        assert "delete" in message, name
    manifest.write_text(json.dumps({key: value for key, value in content.items() if key != "left_out"}))
    assert prepare(config, VOCABULARY)[0].manifest.left_out == 0


def test_the_second_call_finds_the_tokens_and_any_change_does_not(config, monkeypatch, caplog):
    first, _ = prepare(config, VOCABULARY)

    def not_again(*_, **__):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(prepare_module, "tokenize", not_again)
    with caplog.at_level(logging.INFO):
        second, tokenizer = prepare(config, VOCABULARY)
    assert second.directory == first.directory
    assert tokenizer.hash == first.manifest.tokenizer_hash
    assert [record.name for record in caplog.records] == ["moe_reduce.data.prepare"]
    for change in ({"validation_fraction": 0.2}, {"max_documents": 3}, {"tokenizer": "train"}):
        with pytest.raises(AssertionError, match="tokenized again"):
            prepare(dataclasses.replace(config, **change), VOCABULARY)
    assert entries(config) == [first.directory.name]


def test_the_loser_of_a_race_uses_the_winners_tokens(config, monkeypatch):
    rename = os.rename

    def overtaken(source, target):
        rename(source, target)  # the other process was a moment faster
        os.mkdir(source)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(os, "rename", overtaken)
    store, _ = prepare(config, VOCABULARY)
    assert store.length("train") > 0
    assert entries(config) == [store.directory.name]


def test_a_kill_leaves_nothing_half_made_and_no_process(config, texts, tmp_path):
    large = tmp_path / "large.txt"
    large.write_text("".join(texts) * 10)
    (tmp_path / "script.py").write_text(RUN)
    command = [sys.executable, tmp_path / "script.py", large, config.cache, config.tokenizer, str(VOCABULARY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("cache/.*/train-*.bin")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=30)  # returns only when the tokenizing processes, which share stdout, have ended
    assert [name[0] for name in entries(config)] == ["."]
    store, _ = prepare(dataclasses.replace(config, source=str(large)), VOCABULARY)
    assert entries(config) == [store.directory.name]


def test_what_a_killed_run_left_is_cleared_by_the_next(config):
    store, _ = prepare(config, VOCABULARY)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    name = f".{store.directory.name}.{os.uname().nodename}."
    for process in (int(ended.stdout), os.getppid()):
        (store.directory.parent / f"{name}{process}").mkdir()
    store.directory.rename(store.directory.with_name("elsewhere"))
    prepare(config, VOCABULARY)
    assert f"{name}{int(ended.stdout)}" not in entries(config)
    assert f"{name}{os.getppid()}" in entries(config)  # still running: not ours to remove


def test_a_tokenizer_larger_than_the_model_is_refused_and_a_smaller_one_is_not(config):
    message = refusal(config, VOCABULARY - 1)
    assert f"has {VOCABULARY} pieces but model.vocab_size is {VOCABULARY - 1}" in message
    store, _ = prepare(config, VOCABULARY + 44)
    assert store.manifest.vocab_size == VOCABULARY


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused_and_leaves_nothing(config):
    assert "model.vocab_size=60000 is more than this corpus fills" in refusal(
        dataclasses.replace(config, tokenizer="train"), 60_000
    )
    assert entries(config) == []


def test_an_empty_corpus_is_refused(config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt' holds no text" in refusal(dataclasses.replace(config, source=str(tmp_path / "empty.txt")))
    assert entries(config) == []


def test_a_damaged_file_in_the_middle_leaves_nothing(config, corpus, tmp_path):
    (tmp_path / "z.jsonl").write_text('{"text": "fine"}\n{"text": "cut')
    assert "z.jsonl:2 is not JSON" in refusal(dataclasses.replace(config, source=f"{corpus},{tmp_path}/z.jsonl"))
    assert entries(config) == []


def test_a_truncated_shard_in_the_cache_is_refused(config):
    store, _ = prepare(config, VOCABULARY)
    shard = store.directory / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "train-00000.bin is truncated" in refusal(config)


def test_another_tokenizer_in_the_cache_is_refused(config, texts):
    store, _ = prepare(config, VOCABULARY)
    train_tokenizer(texts[:5], VOCABULARY).save(store.directory)
    assert "is not the one of its tokens" in refusal(config)


def test_a_cache_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(dataclasses.replace(config, cache=str(tmp_path / "file" / "cache")))
    assert f"cannot write tokens to {tmp_path}/file/cache" in message
    assert "data.cache" in message


def test_a_full_disk_is_named_and_leaves_nothing(config):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the tokenizer fits, the tokens do not
    try:
        message = refusal(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write tokens to {config.cache}" in message
    assert entries(config) == []


def test_a_killed_worker_is_an_error_not_a_hang(config, monkeypatch):
    def tasks(pieces):
        first = next(iter(pieces))
        yield [first]
        for child in multiprocessing.active_children():
            child.kill()
        yield from [[first]] * 10

    monkeypatch.setattr(tokenizing, "_tasks", tasks)
    assert "a tokenizing process was killed" in refusal(config)


def test_neither_the_room_nor_its_processes_import_what_they_do_not_need():
    code = (
        "import sys, moe_reduce.data.{}\n"
        "print([name for name in {} if name in sys.modules])"
    )  # fmt: skip
    for module, heavy in (
        ("prepare", ["torch", "transformers", "datasets"]),
        ("tokenizing", ["jax", "grain", "torch"]),
    ):
        command = [sys.executable, "-c", code.format(module, heavy)]
        assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == "[]\n"


@pytest.mark.slow
def test_300_megabytes_prepare_in_less_than_one_gigabyte(tmp_path):
    """Peak resident memory of the parent plus, for each of two processes, that of the largest."""
    texts = list(sources.documents(DataConfig()))
    size, number = 0, 0
    with open(tmp_path / "one.txt", "w") as whole, open(tmp_path / "rows.jsonl", "w") as rows:
        while size < 300_000_000:
            text = f"# copy {number}\n{texts[number % len(texts)]}"
            number += 1
            size += len(text.encode())
            if size < 150_000_000:
                whole.write(text)  # half of it a single document
            else:
                rows.write(json.dumps({"text": text}) + "\n")
    report = RUN + (
        "import resource\n"
        "print([resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)])"
    )
    command = [sys.executable, "-c", report, f"{tmp_path}/one.txt,{tmp_path}/rows.jsonl", f"{tmp_path}/cache", "train"]
    started = time.monotonic()
    result = subprocess.run([*command, "4096"], capture_output=True, check=True, text=True)
    parent, largest_child = json.loads(result.stdout)
    print(
        f"{size / 1e6 / (time.monotonic() - started):.1f} MB/s, {parent / 1024:.0f} + 2 x {largest_child / 1024:.0f} MB"
    )
    assert parent + 2 * largest_child < 1_000_000
