"""Safetensors files: what we write the library reads, and every fault is one line that names the file."""

import hashlib
import json
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from moe_reduce.core.errors import UserError
from moe_reduce.storage import tensors
from moe_reduce.storage.tensors import INDEX_FILE, SINGLE_FILE, WRITERS, TensorFiles, write_tensors

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(10, dtype=np.float16),
    "c": np.arange(6, dtype=np.int8).reshape(2, 3),
    "scalar": np.array(3.0, np.float32),
    "empty": np.empty((0, 4), np.float32),
}


def items(arrays: dict[str, np.ndarray]):
    return [(name, array.shape, array.dtype, array) for name, array in arrays.items()]


def sharded(directory: Path) -> dict[str, str]:
    """Two shards, one tensor each; returns the weight map."""
    write_tensors(directory, items({"a": ARRAYS["a"], "b": ARRAYS["b"]}), shard_bytes=50)
    return json.loads((directory / INDEX_FILE).read_text())["weight_map"]


def rewrite_header(file: Path, change) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def assert_refused(directory: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        TensorFiles(directory)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_library_reads_what_we_write(tmp_path: Path):
    write_tensors(tmp_path, items(ARRAYS))
    found = safetensors.numpy.load_file(tmp_path / SINGLE_FILE)
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with safetensors.safe_open(tmp_path / SINGLE_FILE, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / SINGLE_FILE)
    files = TensorFiles(tmp_path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(files.read(name), array)


def test_bytes_equal_the_library(tmp_path: Path):
    write_tensors(tmp_path, items(ARRAYS))
    expected = safetensors.numpy.save(ARRAYS, metadata={"format": "pt"})
    assert (tmp_path / SINGLE_FILE).read_bytes() == expected


def test_bfloat16_bit_for_bit(tmp_path: Path):
    tensor = torch.randn(5, 7).to(torch.bfloat16)
    safetensors.torch.save_file({"w": tensor}, tmp_path / SINGLE_FILE)
    array = TensorFiles(tmp_path).read("w")
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.view(np.int16), tensor.view(torch.int16).numpy())
    (tmp_path / SINGLE_FILE).unlink()
    write_tensors(tmp_path, items({"w": array}))
    assert torch.equal(safetensors.torch.load_file(tmp_path / SINGLE_FILE)["w"], tensor)


def test_unaligned_data_is_read(tmp_path: Path):
    write_tensors(tmp_path, items({"a": ARRAYS["a"]}))
    rewrite_header(tmp_path / SINGLE_FILE, lambda header: header | {"__metadata__": {"pad": "x" * 3}})
    np.testing.assert_array_equal(TensorFiles(tmp_path).read("a"), ARRAYS["a"])


@pytest.mark.parametrize(("shard_bytes", "files"), [(2000, 1), (200, WRITERS)])
def test_writing_holds_one_tensor_of_each_file_at_work(tmp_path: Path, shard_bytes: int, files: int):
    alive = 0
    most = 0
    lock = threading.Lock()

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            with lock:
                alive -= type(self) is Counted and self.base is None

    def make():
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        array = Counted((4, 4), np.float32)
        array[:] = 1.0
        return array

    write_tensors(tmp_path, [(f"t{i}", (4, 4), np.dtype(np.float32), make) for i in range(20)], shard_bytes=shard_bytes)
    assert 1 <= most <= files
    assert len(TensorFiles(tmp_path).entries) == 20


def test_files_are_written_beside_each_other_and_none_begins_behind_a_failure(tmp_path: Path):
    together = threading.Barrier(WRITERS)
    begun = []

    def make(number: int):
        begun.append(number)
        if number < WRITERS:
            together.wait(timeout=30)
        if number == 0:
            raise OSError("the disk is full")
        time.sleep(0.1)
        return np.zeros((4,), np.float32)

    described = [(f"t{i}", (4,), np.dtype(np.float32), lambda i=i: make(i)) for i in range(20 * WRITERS)]
    with pytest.raises(OSError, match="disk is full"):
        write_tensors(tmp_path, described, shard_bytes=16)
    assert WRITERS <= len(begun) < 20 * WRITERS


def test_shards_and_hashes(tmp_path: Path):
    hashes = write_tensors(tmp_path, items(ARRAYS), shard_bytes=50)
    assert set(hashes) == {file.name for file in tmp_path.iterdir()}
    files = TensorFiles(tmp_path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(files.read(name), array)


def test_what_is_copied_is_hashed_before_its_buffer_is_used_again(tmp_path: Path, monkeypatch):
    (tmp_path / "copied").mkdir()
    x = np.arange(1000, dtype=np.float32)
    write_tensors(tmp_path, [("x", x.shape, x.dtype, x)])
    real = hashlib.sha256

    class Slow:
        def __init__(self):
            self.found = real()

        def update(self, data):
            time.sleep(0.01)  # a buffer that is filled meanwhile would be hashed with what comes next
            self.found.update(data)

        def hexdigest(self):
            return self.found.hexdigest()

    monkeypatch.setattr(tensors, "COPY_BYTES", 512)
    monkeypatch.setattr(tensors.hashlib, "sha256", Slow)
    entry = TensorFiles(tmp_path).entries["x"]
    hashes = write_tensors(tmp_path / "copied", [("x", x.shape, x.dtype, entry)])
    assert hashes == {SINGLE_FILE: real((tmp_path / "copied" / SINGLE_FILE).read_bytes()).hexdigest()}
    np.testing.assert_array_equal(TensorFiles(tmp_path / "copied").read("x"), x)


def test_announced_shape_is_checked(tmp_path: Path):
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path, [("a", (2, 2), np.dtype(np.float32), lambda: np.zeros((2, 3), np.float32))])


def test_missing_shard(tmp_path: Path):
    file = sharded(tmp_path)["b"]
    (tmp_path / file).unlink()
    assert_refused(tmp_path, file, INDEX_FILE, "missing")


@pytest.mark.parametrize("cut", [1, 30])
def test_truncated_shard_names_the_tensor(tmp_path: Path, cut: int):
    file = tmp_path / sharded(tmp_path)["a"]
    file.write_bytes(file.read_bytes()[:-cut])
    assert_refused(tmp_path, str(file), "tensor a", "truncated")


@pytest.mark.parametrize("keep", [0, 5, 20])
def test_truncated_header(tmp_path: Path, keep: int):
    file = tmp_path / sharded(tmp_path)["a"]
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(tmp_path, str(file))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header | {"a": header["a"] | {"dtype": "F99"}},
        lambda header: header | {"a": header["a"] | {"shape": [3, 5]}},
        lambda header: header | {"a": {"dtype": "F32"}},
        lambda header: header | {"second": header["a"]},
        lambda header: [header],
    ],
)
def test_corrupt_header(tmp_path: Path, change):
    file = tmp_path / sharded(tmp_path)["a"]
    rewrite_header(file, change)
    assert_refused(tmp_path, str(file), "corrupt header")


def test_not_json_header_and_trailing_bytes(tmp_path: Path):
    file = tmp_path / sharded(tmp_path)["a"]
    whole = file.read_bytes()
    file.write_bytes(whole[:8] + b"#" + whole[9:])
    assert_refused(tmp_path, str(file), "corrupt header")
    file.write_bytes(whole + b"more")
    assert_refused(tmp_path, str(file), "bytes")


def test_index_places_tensor_elsewhere(tmp_path: Path):
    weight_map = sharded(tmp_path)
    weight_map["ghost"] = weight_map["a"]
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(tmp_path, "ghost", weight_map["a"])


def test_duplicate_tensor(tmp_path: Path):
    weight_map = sharded(tmp_path)
    safetensors.numpy.save_file(ARRAYS, tmp_path / weight_map["b"])
    assert_refused(tmp_path, "tensor a", *weight_map.values())


def test_twice_in_one_header(tmp_path: Path):
    write_tensors(tmp_path, items({"a": ARRAYS["a"], "z": ARRAYS["a"]}))
    file = tmp_path / SINGLE_FILE
    file.write_bytes(file.read_bytes().replace(b'"z"', b'"a"'))
    assert_refused(tmp_path, str(file), "twice")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_corrupt_index(tmp_path: Path, content: str):
    sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text(content)
    assert_refused(tmp_path, INDEX_FILE)


def test_no_weights_and_two_kinds(tmp_path: Path):
    assert_refused(tmp_path, str(tmp_path), SINGLE_FILE)
    sharded(tmp_path)
    safetensors.numpy.save_file(ARRAYS, tmp_path / SINGLE_FILE)
    assert_refused(tmp_path, SINGLE_FILE, INDEX_FILE)


def test_an_index_beside_a_single_file_is_ignored_unless_its_shards_exist(tmp_path: Path):
    """As mlx-lm writes one shard, and as it is left behind when shards are joined."""
    write_tensors(tmp_path, items(ARRAYS))
    for name in (SINGLE_FILE, "model-00001-of-00002.safetensors"):
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(ARRAYS, name)}))
        files = TensorFiles(tmp_path)
        for tensor, array in ARRAYS.items():
            np.testing.assert_array_equal(files.read(tensor), array)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    safetensors.numpy.save_file(ARRAYS, shard)
    assert_refused(tmp_path, SINGLE_FILE, INDEX_FILE, shard.name)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", "", 3, None])
def test_an_index_names_files_beside_it(tmp_path: Path, name):
    weight_map = sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map | {"a": name}}))
    assert_refused(tmp_path, INDEX_FILE, "tensor a", repr(name))


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_dtypes_that_are_not_read_are_named_as_such(tmp_path: Path, dtype: str):
    write_tensors(tmp_path, items(ARRAYS))
    file = tmp_path / SINGLE_FILE
    rewrite_header(file, lambda header: header | {"a": header["a"] | {"dtype": dtype}})
    message = assert_refused(tmp_path, str(file), "tensor a", f"dtype {dtype}", "not supported")
    assert "corrupt" not in message
    assert "fetch" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-3, -4]}, {"shape": [3.0, 4]}, {"shape": [True, 12]}, {"shape": ["3", 4]}, {"shape": 12},
        {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, {"data_offsets": [-48, 0]}, {"data_offsets": [0.0, 48.0]},
        {"data_offsets": [0]}, {"data_offsets": None}, {"dtype": ["F32"]}, {"dtype": None}, {"shape": [10**30]},
    ],
)  # fmt: skip
def test_shapes_and_offsets_that_are_no_sizes(tmp_path: Path, change: dict):
    write_tensors(tmp_path, items({"a": np.zeros((3, 4), np.float32)}))
    rewrite_header(tmp_path / SINGLE_FILE, lambda header: header | {"a": header["a"] | change})
    assert_refused(tmp_path, str(tmp_path / SINGLE_FILE), "corrupt header")


def test_headers_and_indices_nested_without_end(tmp_path: Path):
    deep = "[" * 100_000 + "]" * 100_000
    sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text(f'{{"weight_map": {deep}}}')
    assert_refused(tmp_path, INDEX_FILE, "nested too deeply")
    text = f'{{"a": {deep}}}'.encode()
    (tmp_path / INDEX_FILE).unlink()
    (tmp_path / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text)
    assert_refused(tmp_path, SINGLE_FILE, "nested too deeply")
