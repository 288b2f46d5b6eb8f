"""Corpus sources: each kind of file, the standard library, the hub's code path, and every refusal."""

import gzip
import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from moe_reduce.core.config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data import sources
from moe_reduce.data.sources.hub import parse_name
from moe_reduce.data.sources.local_files import LocalFiles
from moe_reduce.data.sources.standard_library import StandardLibrary

TEXTS = ["One document.\nTwo lines, naïve ﬁ.\n", "\tAnother  one\r\n", "last"]


def jsonl(texts, field="text"):
    return "".join(json.dumps({"title": "t", field: text}) + "\n" for text in texts).encode()


def write(path, content):
    path.write_bytes(content)
    return str(path)


def read(source, **settings):
    return list(sources.documents(DataConfig(source=source, **settings)))


def refusal(source, **settings):
    with pytest.raises(UserError) as caught:
        read(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_of_file_gives_its_documents_unchanged(tmp_path):
    assert read(write(tmp_path / "a.txt", TEXTS[1].encode())) == [TEXTS[1]]
    assert read(write(tmp_path / "a.txt.gz", gzip.compress(TEXTS[1].encode()))) == [TEXTS[1]]
    assert read(write(tmp_path / "a.jsonl", jsonl(TEXTS))) == TEXTS
    assert read(write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(TEXTS)))) == TEXTS
    assert read(write(tmp_path / "a.jsonl.zst", zstandard.compress(jsonl(TEXTS)))) == TEXTS
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": TEXTS}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet"), text_field="body") == TEXTS


MARKED = {"utf-8-sig": "utf-8-sig", "utf-16": "utf-16", "utf-32": "utf-32"} | {
    f"{name}, marked": name for name in ("utf-16-be", "utf-16-le")
}


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_a_byte_order_mark_decides_the_encoding_and_is_no_text(tmp_path, name, compress):
    mark = "\ufeff" if name.endswith("marked") else ""
    suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[compress]
    rows = mark + jsonl(TEXTS).decode()
    assert read(write(tmp_path / f"a.jsonl{suffix}", compress(rows.encode(MARKED[name])))) == TEXTS
    if suffix != ".zst":
        assert read(write(tmp_path / f"a.txt{suffix}", compress((mark + TEXTS[1]).encode(MARKED[name])))) == [TEXTS[1]]


def test_files_that_were_joined_with_their_marks_are_read(tmp_path):
    rows = jsonl(TEXTS[:1]).decode()
    assert read(write(tmp_path / "a.jsonl", rows.encode("utf-8-sig") * 2)) == TEXTS[:1] * 2


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # a frame of zstd that holds no text


def test_all_frames_and_members_are_read(tmp_path):
    half, rest = jsonl(TEXTS)[:20], jsonl(TEXTS)[20:]
    frames = SKIPPABLE + zstandard.compress(half) + SKIPPABLE + zstandard.compress(b"") + zstandard.compress(rest)
    assert read(write(tmp_path / "a.jsonl.zst", frames + SKIPPABLE)) == TEXTS
    assert read(write(tmp_path / "a.jsonl.gz", gzip.compress(half) + gzip.compress(rest) + bytes(512))) == TEXTS


def test_a_long_window_is_read(tmp_path):
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    writer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    assert read(write(tmp_path / "a.jsonl.zst", writer.compress(jsonl(TEXTS)) + writer.flush())) == TEXTS


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_compressed_file_cut_at_any_byte_is_refused(tmp_path, suffix, compress):
    whole = compress(jsonl(TEXTS)) + compress(jsonl(TEXTS))
    ends = {0, len(compress(jsonl(TEXTS)))}  # a cut between two members leaves a whole file
    for end in sorted(set(range(len(whole))) - ends | {0}):
        path = write(tmp_path / f"a.jsonl{suffix}", whole[:end])
        assert path in refusal(path), end
    if suffix == ".gz":
        path = write(tmp_path / "a.txt.gz", whole[:-1])
        assert path in refusal(path)


def test_globs_lists_and_directories_are_read_in_order_each_file_once(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.txt", name.encode())
    write(tmp_path / "notes.md", b"not text")
    assert read(f"{tmp_path}/*.txt") == ["a", "b"]
    assert read(f"{tmp_path}/b.txt, {tmp_path}/*.txt") == ["b", "a"]
    assert read(str(tmp_path)) == ["a", "b"]
    assert read(str(tmp_path), max_documents=1) == ["a"]


def test_half_a_surrogate_pair_does_not_stop_the_corpus(tmp_path):
    assert read(write(tmp_path / "a.jsonl", b'{"text": "x\\ud800y"}\n')) == ["x?y"]


def test_standard_library_is_real_text_without_its_tests():
    paths = StandardLibrary("python-stdlib").paths()
    names = {path.name for path in paths}
    assert len(paths) > 300
    assert "argparse.py" in names
    assert not [path for path in paths if {"site-packages", "test", "__pycache__"} & set(path.parts)]
    first = next(sources.documents(DataConfig()))
    assert first == paths[0].read_text()


def test_the_hub_streams_rows_of_the_train_split(tmp_path):
    write(tmp_path / "a.jsonl", jsonl(TEXTS))
    assert read(f"hub:{tmp_path}") == TEXTS
    assert read(f"hub:{tmp_path}", max_documents=2) == TEXTS[:2]
    message = refusal(f"hub:{tmp_path}", text_field="body")
    assert "row 1" in message
    assert "title, text" in message


def test_the_hub_gives_the_split_that_is_named(tmp_path):
    write(tmp_path / "train.jsonl", jsonl(TEXTS))
    write(tmp_path / "test.jsonl", jsonl(["held out"]))
    assert read(f"hub:{tmp_path}") == TEXTS
    assert read(f"hub:{tmp_path}::test") == ["held out"]
    assert "::tset' cannot be read" in refusal(f"hub:{tmp_path}::tset")


def test_hub_names_have_a_config_a_split_and_a_revision():
    name = "Salesforce/wikitext"
    assert parse_name(f"hub:{name}:wikitext-2-v1@abc") == (name, "wikitext-2-v1", "train", "abc")
    assert parse_name(f"hub:{name}:wikitext-2-v1:test") == (name, "wikitext-2-v1", "test", None)
    assert parse_name(f"hub:{name}") == (name, None, "train", None)
    with pytest.raises(UserError, match="hub:OWNER/NAME"):
        parse_name("hub:")


def test_a_hub_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    assert f"hub:{tmp_path}/absent" in refusal(f"hub:{tmp_path}/absent")

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert "hub:someone/something' cannot be read: Couldn't reach the Hub" in refusal("hub:someone/something")


def test_hash_follows_content_and_limits_but_not_the_path(tmp_path):
    def digest(name, **settings):
        return sources.corpus_hash(DataConfig(source=str(tmp_path / name), **settings))

    write(tmp_path / "a.txt", b"same")
    write(tmp_path / "b.txt", b"same")
    write(tmp_path / "c.txt", b"other")
    assert digest("a.txt") == digest("b.txt")
    assert len({digest("a.txt"), digest("c.txt"), digest("*.txt"), digest("a.txt", max_documents=1)}) == 4


def test_an_empty_glob_is_refused_by_name(tmp_path):
    assert f"{tmp_path}/*.txt" in refusal(f"{tmp_path}/*.txt")


def test_an_unknown_kind_of_file_is_refused_by_name(tmp_path):
    assert "a.pdf is none of .txt" in refusal(write(tmp_path / "a.pdf", b"%PDF"))


def test_a_missing_field_names_file_line_and_fields(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(["x"]) + b'{"title": "t", "body": "y"}\n')
    message = refusal(path)
    assert f"{path}:2" in message
    assert "'text'" in message
    assert "title, body" in message
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    assert "a.parquet has no field 'text', only body" in refusal(str(tmp_path / "a.parquet"))
    assert "holds NoneType, not text" in refusal(write(tmp_path / "n.jsonl", b'{"text": null}\n'))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "naïve".encode("latin-1")),
        ("cut.txt.gz", gzip.compress(b"text " * 5000, mtime=0)[:-20]),
        ("plain.jsonl.gz", jsonl(TEXTS)),
        ("cut.jsonl", jsonl(TEXTS)[:-5]),
        ("list.jsonl", b"[1, 2]\n"),
        ("deep.jsonl", b"[" * 100_000 + b"\n"),
        ("digits.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n"),
        ("half.txt", "two".encode("utf-16")[:-1]),
        ("cut.jsonl.zst", zstandard.compress(jsonl(["text " * 50_000] * 2))[:-20]),
        ("plain.jsonl.zst", jsonl(TEXTS)),
        ("not.parquet", b"PAR1 not really"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content):
    assert str(tmp_path / name) in refusal(write(tmp_path / name, content))


def test_the_first_kind_that_recognises_a_name_reads_it(tmp_path, monkeypatch):
    class Reversed(LocalFiles):
        @classmethod
        def recognises(cls, name):
            return name.startswith("reversed:")

        def documents(self, text_field):
            paths = LocalFiles(self.name.removeprefix("reversed:"))
            return (("".join(fragments)[::-1],) for fragments in paths.documents(text_field))

    monkeypatch.setattr(sources, "KINDS", (Reversed, *sources.KINDS))
    path = write(tmp_path / "a.jsonl", jsonl(["abc", "def"]))
    assert read(f"reversed:{path}", max_documents=1) == ["cba"]
    assert read(path) == ["abc", "def"]


def test_a_known_text_keeps_its_hash(tmp_path):
    """Caches of prepared tokens are found again by it."""
    write(tmp_path / "a.txt", b"same")
    assert (
        sources.corpus_hash(DataConfig(source=str(tmp_path / "a.txt")))
        == hashlib.sha256(b"text\0None\0" + b".txt" + hashlib.sha256(b"same").digest()).hexdigest()
    )
    expected = hashlib.sha256(b"text\0None\0" + f"hub:{tmp_path}".encode() + b".txt" + hashlib.sha256(b"same").digest())
    assert sources.corpus_hash(DataConfig(source=f"hub:{tmp_path}")) == expected.hexdigest()
