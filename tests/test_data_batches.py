"""Batches: every sequence once an epoch, the same for any number of processes, resumable, masked by document."""

import json

import numpy as np
import pytest

from moe_reduce.core.config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.batches import array_types, train_batches, validation_batches
from moe_reduce.data.rows import TokenRows
from moe_reduce.data.shards import FORMAT_VERSION, Manifest, ShardWriter, TokenStore

LENGTH = 8
WINDOWS = 30
END = 0
CONFIG = DataConfig(sequence_length=LENGTH)
MASKED = DataConfig(sequence_length=LENGTH, document_mask=True)


def store_of(directory, train, validation=()):
    directory.mkdir()
    splits = {}
    for split, tokens in (("train", train), ("validation", validation)):
        writer = ShardWriter(directory, split, np.dtype("<u2"), shard_tokens=100)
        writer.append(np.asarray(tokens))
        splits[split] = writer.close()
    Manifest(FORMAT_VERSION, "t", "c", 1000, "<u2", END, 1, len(train) + len(validation), 1, splits).save(directory)
    return TokenStore(directory)


@pytest.fixture
def store(tmp_path):
    """Token = its place + 1, so a row's first token tells its window."""
    return store_of(tmp_path / "s", np.arange(WINDOWS * LENGTH + 3) + 1, np.arange(5 * LENGTH + 1) + 500)


def windows_of(batch):
    return [(int(row[0]) - 1) // LENGTH for row in batch["tokens"]]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal_batches(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_targets_are_the_tokens_behind(store):
    batch = next(train_batches(store, CONFIG, 4, seed=0))
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "tokens": ("int32", (4, LENGTH)),
        "targets": ("int32", (4, LENGTH)),
        "weights": ("float32", (4, LENGTH)),
    }
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    assert batch["weights"].min() == 1


def test_each_epoch_has_every_window_once_in_its_own_order(store):
    iterator = train_batches(store, CONFIG, 5, seed=0)
    epochs = [[window for batch in take(iterator, WINDOWS // 5) for window in windows_of(batch)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(WINDOWS))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]


def test_neighbouring_seeds_share_no_epoch(store):
    orders = []
    for seed in (0, 1):
        iterator = train_batches(store, CONFIG, 5, seed)
        orders.append([windows_of(batch) for batch in take(iterator, 3 * WINDOWS // 5)])
    epoch = WINDOWS // 5
    assert orders[0][epoch : 2 * epoch] != orders[1][:epoch]
    assert orders[0][:epoch] != orders[1][:epoch]


def test_a_batch_may_span_two_epochs_and_loses_nothing(store):
    batches = take(train_batches(store, CONFIG, 4, seed=3), WINDOWS // 2)  # two epochs
    seen = [window for batch in batches for window in windows_of(batch)]
    assert sorted(seen) == sorted([*range(WINDOWS), *range(WINDOWS)])


@pytest.mark.parametrize("processes", [2, 4])
def test_a_step_has_the_same_windows_on_any_number_of_processes(store, processes):
    alone = take(train_batches(store, CONFIG, 4, seed=1), 20)
    shared = [take(train_batches(store, CONFIG, 4, 1, index, processes), 20) for index in range(processes)]
    for step in range(20):
        parts = [shared[index][step] for index in range(processes)]
        assert all(len(part["tokens"]) == 4 // processes for part in parts)
        assert sorted(w for part in parts for w in windows_of(part)) == sorted(windows_of(alone[step]))


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_a_restored_state_goes_on_bit_for_bit(store, steps):
    iterator = train_batches(store, MASKED, 4, seed=2, shard_index=1, shard_count=2)
    take(iterator, steps)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 12)
    again = train_batches(store, MASKED, 4, seed=2, shard_index=1, shard_count=2)
    take(again, 3)
    again.set_state(state)
    assert_equal_batches(take(again, 12), expected)


@pytest.mark.parametrize("config", [CONFIG, MASKED])
def test_array_types_are_those_of_the_batches(store, config):
    expected = array_types(config, rows=4)
    for batch in (next(train_batches(store, config, 4, seed=0)), validation_batches(store, config, 4, batches=1)[0]):
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected


def test_document_mask_separates_documents(tmp_path):
    row = [5, 6, END, 7, END, END, 8, 9, 3]
    store = store_of(tmp_path / "s", row, row)
    for batch in (next(train_batches(store, MASKED, 1, seed=0)), *validation_batches(store, MASKED, 1, 1)):
        assert batch["tokens"].tolist() == [row[:-1]]
        assert batch["targets"].tolist() == [row[1:]]
        assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 3, 4, 4]]
        assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
        assert batch["weights"].tolist() == [[1, 1, 0, 1, 0, 0, 1, 1]]
        assert batch["segments"].dtype == batch["positions"].dtype == np.int32
        assert batch["weights"].dtype == np.float32
    assert next(train_batches(store, CONFIG, 1, seed=0))["weights"].tolist() == [[1] * LENGTH]


def test_validation_is_fixed_spread_and_without_repeats(tmp_path):
    store = store_of(tmp_path / "s", np.arange(9), np.arange(20 * LENGTH + 1) + 1)
    batches = validation_batches(store, CONFIG, 2, 2)
    assert_equal_batches(batches, validation_batches(store, CONFIG, 2, 2))
    assert [windows_of(batch) for batch in batches] == [[0, 5], [10, 15]]
    everything = validation_batches(store, CONFIG, 8, 100)
    assert [window for batch in everything for window in windows_of(batch)][:20] == list(range(20))
    assert [batch["weights"].sum() for batch in everything] == [8 * LENGTH, 8 * LENGTH, 4 * LENGTH]


def test_validation_rows_are_shared_among_processes(store):
    alone = validation_batches(store, CONFIG, 4, 2)  # 5 windows: the second batch has 3 rows of filler
    shared = [validation_batches(store, CONFIG, 4, 2, index, 2) for index in range(2)]
    assert [len(part) for part in shared] == [2, 2]
    for step, batch in enumerate(alone):
        for name in ("tokens", "weights"):
            rows = [row.tolist() for part in shared for row in part[step][name]]
            assert sorted(rows) == sorted(batch[name].tolist())
    assert alone[1]["weights"].sum(axis=1).tolist() == [LENGTH, 0, 0, 0]


def test_too_small_a_corpus_says_what_it_has(store, tmp_path):
    with pytest.raises(UserError, match=r"243 tokens for training, 30 sequences of 8, fewer than train.batch_size=31"):
        train_batches(store, CONFIG, 31, seed=0)
    short = store_of(tmp_path / "short", np.arange(100), np.arange(LENGTH))
    with pytest.raises(UserError, match=r"8 tokens for validation, less than one sequence of 8.*validation_fraction"):
        validation_batches(short, CONFIG, 1, 1)
    with pytest.raises(UserError, match=r"train.batch_size \(5\) must be a multiple of the number of hosts \(2\)"):
        train_batches(store, CONFIG, 5, 0, 0, 2)


def rows_at(path, tokens, vocab_size=100, **settings):
    np.save(path, tokens)
    return TokenRows(DataConfig(source=str(path), sequence_length=LENGTH, **settings), vocab_size)


def test_rows_of_token_ids_are_sequences(tmp_path):
    tokens = np.arange(10 * LENGTH, dtype=np.int32).reshape(10, LENGTH)
    source = rows_at(tmp_path / "ids.npy", tokens, validation_fraction=0.11)
    batches = take(train_batches(source, CONFIG, 4, seed=0), 2)
    assert sorted(w for batch in batches for w in (batch["tokens"][:, 0] // LENGTH).tolist()) == list(range(8))
    for batch in batches:
        np.testing.assert_array_equal(batch["targets"][:, :-1], batch["tokens"][:, 1:])
        assert batch["weights"].tolist() == [[1] * (LENGTH - 1) + [0]] * 4
    (held_out,) = validation_batches(source, CONFIG, 2, 5)
    np.testing.assert_array_equal(held_out["tokens"], tokens[8:])


def test_rows_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "ids.npy"
    good = np.ones((4, LENGTH), np.int32)
    with pytest.raises(UserError, match=r"sequences of 7 tokens but data.sequence_length is 8"):
        rows_at(path, good[:, 1:])
    with pytest.raises(UserError, match=r"token id 100 but model.vocab_size is 100"):
        rows_at(path, np.where(np.eye(4, LENGTH), 100, good))
    with pytest.raises(UserError, match=r"token id -1 "):
        rows_at(path, -good)
    with pytest.raises(UserError, match=r"float32 \[4, 8\]"):
        rows_at(path, good.astype(np.float32))
    with pytest.raises(UserError, match=r"document_mask"):
        rows_at(path, good, document_mask=True)
    with pytest.raises(UserError, match=r"int32 \[4, 1\]"):
        rows_at(path, good[:, :1])
    with pytest.raises(UserError, match=r"int32 \[4, 8, 1\]"):
        rows_at(path, good[:, :, None])
    np.savez(path.with_suffix(".npz"), good)
    path.with_suffix(".npz").rename(path)
    with pytest.raises(UserError, match=r"ids.npy is an archive of arrays"):
        TokenRows(DataConfig(source=str(path), sequence_length=LENGTH), 100)
    np.save(path, np.array([[None]]), allow_pickle=True)
    with pytest.raises(UserError, match=r"cannot read .*ids.npy"):
        TokenRows(DataConfig(source=str(path), sequence_length=LENGTH), 100)
    np.save(path, good)
    whole = path.read_bytes()
    for end in (0, 5, 9, 60, len(whole) - 10):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"cannot read .*ids.npy"):
            TokenRows(DataConfig(source=str(path), sequence_length=LENGTH), 100)
    path.write_bytes(whole.replace(b"(4, 8)", b"(4, 9" + b"9" * 20, 1))
    with pytest.raises(UserError, match=r"cannot read .*ids.npy"):
        TokenRows(DataConfig(source=str(path), sequence_length=LENGTH), 100)
    with pytest.raises(UserError, match=r"cannot read .*absent.npy"):
        TokenRows(DataConfig(source="absent.npy", sequence_length=LENGTH), 100)
