"""Text of local files: decompressed and decoded, and an error where a compressed file ends early.

Tokenizing processes import this module: keep it free of JAX.
"""

import codecs
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import zstandard

MARK = "\ufeff"  # byte order mark, as text
# by the bytes that a file starts with; UTF-32 comes first, because one of its marks begins like one of UTF-16's
ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
READ_BYTES = 1 << 13  # compressed bytes at a time, because what they expand to is in memory at once
LARGEST_WINDOW = 1 << 31  # bytes; the largest of the format, which zstd --long=31 writes


def open_text(path: Path) -> TextIO:
    """Open a file as text, with line ends as they are: UTF-8, or as its byte order mark says, which is no text.

    A name that ends in .gz or .zst is decompressed, through all its members or frames. Opening and reading raise
    OSError, EOFError, UnicodeError, zlib.error or ZstdError for a damaged file; EOFError if a member or frame is cut
    short, or if there is none.
    """
    content = _open_bytes(path)
    try:
        start = content.peek(4)
    except BaseException:
        content.close()
        raise
    encoding = next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(content, encoding=encoding, newline="")


def _open_bytes(path: Path) -> io.BufferedReader:
    name = path.name.lower()
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstandard(path))
    if name.endswith(".gz"):
        if path.stat().st_size == 0:
            raise EOFError("it holds no member")
        return io.BufferedReader(gzip.GzipFile(path))  # type: ignore[arg-type]
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """Decompressed bytes of all frames of a file.

    The library's own stream takes a frame that is cut short for the end of the file.
    """

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._chunks = _chunks(self._file)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    frame, whole = decompressor.decompressobj(), False
    while data := file.read(READ_BYTES):
        while data:
            yield frame.decompress(data)
            data, whole = frame.unused_data, frame.eof
            if whole:
                frame = decompressor.decompressobj()
    if not whole:
        raise EOFError("its last frame is cut short")
