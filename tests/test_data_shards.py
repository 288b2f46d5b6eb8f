"""Token files: windows across shards, types, and every kind of damage."""

import json

import numpy as np
import pytest

from moe_reduce.core.errors import UserError
from moe_reduce.data.shards import FORMAT_VERSION, Manifest, ShardWriter, TokenStore, token_dtype

TOKENS = 1000


def store_at(directory, vocab_size=100, shard_tokens=300):
    """Training tokens 0, 1, 2 … in several shards, and no validation."""
    directory.mkdir()
    dtype = token_dtype(vocab_size)
    writer = ShardWriter(directory, "train", dtype, shard_tokens)
    for part in np.split(np.arange(TOKENS), range(70, TOKENS, 70)):
        writer.append(part)
    splits = {"train": writer.close(), "validation": []}
    manifest = Manifest(FORMAT_VERSION, "t", "c", vocab_size, dtype.str, 0, 1, TOKENS, 1, splits)
    manifest.save(directory)
    return directory


def refusal(directory):
    with pytest.raises(UserError) as caught:
        TokenStore(directory)
    assert f"delete {directory}" in str(caught.value)
    return str(caught.value)


def test_windows_cross_the_borders_of_shards(tmp_path):
    store = TokenStore(store_at(tmp_path / "s"))
    assert len(list(store.directory.glob("train-*.bin"))) == 3
    assert store.length("train") == TOKENS
    assert store.length("validation") == store.rows("validation", 10) == 0
    for start, length in ((0, TOKENS), (0, 1), (345, 10), (349, 2), (350, 1), (290, 500), (999, 1)):
        window = store.window("train", start, length)
        assert window.dtype == np.int32
        np.testing.assert_array_equal(window, np.arange(start, start + length))
    with pytest.raises(IndexError):
        store.window("train", 990, 11)


@pytest.mark.parametrize(("length", "rows"), [(999, 1), (1000, 0), (100, 9), (111, 9), (499, 2)])
def test_rows_are_whole_windows_that_share_only_their_last_target(tmp_path, length, rows):
    store = TokenStore(store_at(tmp_path / "s"))
    assert store.rows("train", length) == rows
    for index in range(rows):
        tokens, counts = store.row("train", index, length)
        np.testing.assert_array_equal(tokens, np.arange(index * length, index * length + length + 1))
        assert counts.tolist() == [1.0] * length


def test_ids_beyond_two_bytes_get_four(tmp_path):
    assert token_dtype(1 << 16).itemsize == 2
    assert token_dtype((1 << 16) + 1).itemsize == 4
    directory = tmp_path / "s"
    directory.mkdir()
    writer = ShardWriter(directory, "train", token_dtype(150_000))
    writer.append(np.array([149_999, 3]))
    splits = {"train": writer.close(), "validation": []}
    Manifest(FORMAT_VERSION, "t", "c", 150_000, "<u4", 0, 1, 2, 1, splits).save(directory)
    assert TokenStore(directory).window("train", 0, 2).tolist() == [149_999, 3]


@pytest.mark.parametrize("change", [b"", b"\x00" * 701])
def test_a_truncated_or_grown_shard_says_how_many_bytes_are_missing(tmp_path, change):
    directory = store_at(tmp_path / "s")
    (directory / "train-00001.bin").write_bytes(change)
    message = refusal(directory)
    assert f"train-00001.bin is truncated: expected 700 bytes, found {len(change)}" in message


def test_a_missing_shard_is_named(tmp_path):
    directory = store_at(tmp_path / "s")
    (directory / "train-00002.bin").unlink()
    assert "train-00002.bin is truncated" in refusal(directory)


def test_a_damaged_missing_or_future_manifest_is_named(tmp_path):
    directory = store_at(tmp_path / "s")
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"format_version": 99}))
    assert "has format 99" in refusal(directory)
    path.write_text(json.dumps({"format_version": 1}))
    assert "missing or damaged" in refusal(directory)
    path.write_text(path.read_text()[:-3])
    assert "missing or damaged" in refusal(directory)
    path.unlink()
    assert "missing or damaged" in refusal(directory)
