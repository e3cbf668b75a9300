"""Text files that users wrote, read in one way everywhere: UTF-8, a byte order mark or not, any line ends."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from antlm_fast.types import InputError

_CHUNK_BYTES = 1 << 16
_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32LE"),
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
)


def read_text(path: Path, kind: str) -> str:
    r"""The whole text of a file, gzipped or not; a byte order mark is dropped, line ends become "\n".

    Args:
        kind: what the file is, for messages: "config file".

    Raises:
        InputError: it is not UTF-8 (the encoding it looks like is named), holds a NUL, or its gzip data are not whole.
        OSError: it cannot be read.
    """
    return "".join(_texts(path, kind))


def read_lines(path: Path, kind: str) -> Iterator[str]:
    """The lines of a file without their ends, streaming; everything else as `read_text`."""
    begun: list[str] = []
    for text in _texts(path, kind):
        first, *others = text.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if last := "".join(begun):
        yield last


def _texts(path: Path, kind: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    read = 0  # bytes so far
    try:
        with _open(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                data = chunk.removeprefix(codecs.BOM_UTF8) if read == 0 else chunk
                read += len(chunk)
                text = decoder.decode(data)
                if 0 in data:  # UTF-16 without a mark is often valid UTF-8
                    raise _not_utf8(path, kind, read - len(data) + data.index(0), data, data.index(0))
                yield line_ends.decode(text)
            yield line_ends.decode(decoder.decode(b"", final=True), final=True)
    except UnicodeDecodeError as error:  # its object is the chunk, after what the one before left over
        raise _not_utf8(path, kind, read - len(error.object) + error.start, error.object, error.start) from error
    except EOFError as error:
        raise InputError(f"{kind} must be whole; got {path}, whose gzip data ends too early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{kind} must be gzip data; got {path}: {error}") from error


def _not_utf8(path: Path, kind: str, at: int, data: bytes, place: int) -> InputError:
    encoding = _guessed_encoding(data)
    hint = f" (it looks like {encoding}; iconv -f {encoding} -t UTF-8 converts it)" if encoding else ""
    return InputError(f"{kind} must be UTF-8; got {path}, byte {at} is 0x{data[place]:02x}{hint}")


def _guessed_encoding(data: bytes) -> str | None:
    """What text that is not UTF-8 is likely to be, by its mark or by where its zeros are."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    zeros = [data[place::4].count(0) for place in range(4)]
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    if even + odd < 4 or 20 * (even + odd) < len(data):  # blanks alone are more, in any language that has them
        return None
    most = 0.9 * (len(data) // 4)
    if min(zeros[2:]) > most:
        return "UTF-32LE"
    if min(zeros[:2]) > most:
        return "UTF-32BE"
    if odd > 9 * even:
        return "UTF-16LE"
    return "UTF-16BE" if even > 9 * odd else None


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")
