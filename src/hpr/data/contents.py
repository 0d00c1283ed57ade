"""Opens data files: compressed files are unpacked, text is decoded, and a file that is no text is refused by what it is."""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import lzma
import os
import stat
import unicodedata
import zlib
from pathlib import Path
from typing import IO, Any

from hpr.errors import DataError

Source = str | os.PathLike[str]
_PACKED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TO_TEXT = "convert it to plain text"
_UNPACK = "unpack it"
# the first bytes of files that are no text, what the file is, and the mend
_BINARY = (
    (b"\x1f\x8b", "gzip data", "give its name the end .gz"),
    (b"BZh", "bzip2 data", "give its name the end .bz2"),
    (b"\xfd7zXZ\0", "xz data", "give its name the end .xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a", "a RAR archive", _UNPACK),
    (b"PK\x03\x04", "a zip archive (such as .docx, .xlsx, .npz or .pt)", "unpack or convert it"),
    (b"PK\x05\x06", "an empty zip archive", "give another file"),
    (b"\xd0\xcf\x11\xe0", "an old Office document (.doc or .xls)", _TO_TEXT),
    (b"PAR1", "a Parquet table", "give its name the end .parquet"),
    (b"ARROW1", "an Arrow table", "give its name the end .arrow"),
    (b"FEA1", "a Feather table", "give its name the end .feather"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "give its name the end .arrow"),
    (b"Obj\x01", "an Avro table", "convert it to .parquet"),
    (b"SQLite format 3\0", "an SQLite database", "write its texts to a .csv file"),
    (b"\x93NUMPY", "a NumPy array", "give its name the end .npy"),
    (b"\x89HDF", "an HDF5 file", "write its texts to a .csv file"),
    (b"\x80\x02", "a pickle", "write its texts to a .jsonl file"),
    (b"\x80\x03", "a pickle", "write its texts to a .jsonl file"),
    (b"\x80\x04", "a pickle", "write its texts to a .jsonl file"),
    (b"\x80\x05", "a pickle", "write its texts to a .jsonl file"),
    (b"GGUF", "a GGUF model", "give a file of texts"),
    (b"\x89PNG", "a PNG image", "give a file of texts"),
    (b"\xff\xd8\xff", "a JPEG image", "give a file of texts"),
    (b"GIF8", "a GIF image", "give a file of texts"),
    (b"II*\0", "a TIFF image", "give a file of texts"),
    (b"MM\0*", "a TIFF image", "give a file of texts"),
    (b"RIFF", "a WAV, AVI or WebP file", "give a file of texts"),
    (b"OggS", "an Ogg recording", "give a file of texts"),
    (b"fLaC", "a FLAC recording", "give a file of texts"),
    (b"ID3", "an MP3 recording", "give a file of texts"),
    (b"\x7fELF", "a program", "give a file of texts"),
)
# documents whose bytes may all be ASCII, but whose lines are markup
_MARKUP = (
    (b"%pdf-", "a PDF document", _TO_TEXT),
    (b"{\\rtf", "an RTF document", _TO_TEXT),
    (b"<!doctype html", "an HTML page", _TO_TEXT),
    (b"<html", "an HTML page", _TO_TEXT),
    (b"<?xml", "an XML document", _TO_TEXT),
)
_CONTROLS = bytes(code for code in range(32) if code not in b"\t\n\v\f\r\x1b") + b"\x7f"


def suffix_of(path: Source) -> str:
    """The suffix that names the format of a file, in lower case; that of the file inside for a compressed file."""
    inner = Path(path)
    if inner.suffix.lower() in _PACKED:
        inner = inner.with_suffix("")
    return inner.suffix.lower()


def check_file(path: Source) -> None:
    """Raise ``DataError`` if there is no file at a path, but nothing, a folder, a pipe or a device."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise DataError(f"{str(path)!r:.80} is no path ({error}): check the path") from error
    except OSError as error:
        if error.errno in _MISSING:
            raise DataError(f"no file at {path!s:.200}: check the path") from error
        raise DataError(f"{path} cannot be read ({error.strerror}): give a readable file") from error
    if stat.S_ISDIR(mode):
        saved = os.path.isfile(Path(path, "dataset_info.json"))
        mend = "in Python give datasets.load_from_disk(folder)" if saved else "give a file in it, or several"
        raise DataError(f"{str(path) or repr(path)} is a folder, which cannot be read as one file: {mend}")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is a pipe or a device, not a file: write its content to a file and give that")


def opened(path: Source) -> IO[bytes]:
    """A data file, open for reading its bytes; those of the file inside for a compressed file."""
    check_file(path)
    reader = _PACKED.get(Path(path).suffix.lower(), open)
    try:
        file: IO[bytes] = reader(path, "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a readable file") from error
    return file


def content_of(path: Source) -> bytes:
    """The bytes of a data file, unpacked. Raises ``DataError`` for a missing, unreadable or damaged file."""
    with opened(path) as file:
        try:
            return file.read()
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{path} cannot be read ({error.strerror}): give a readable file") from error
            raise DataError(f"{path} cannot be unpacked ({error}): it is damaged or not compressed, write it again") from error


def text_of(path: Source) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32; UTF-16 also without a byte-order mark.

    Raises ``DataError`` for an empty file and for a file that is no text; the message says what it is instead.
    """
    content = content_of(path)
    text = _decoded(path, content).lstrip("\ufeff")
    if not text.strip():
        raise DataError(f"{path} is empty: give at least one example")
    return text


def _decoded(path: Source, content: bytes) -> str:
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), None)
    start = content.lstrip()[:16].lower()
    _refuse(path, next((kind for kind in _MARKUP if start.startswith(kind[0])), None))
    try:
        text = content.decode(marked or "utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, _binary(content))
        text = "" if marked else _utf16(content)
        if not text:
            wanted = (
                "UTF-8"
                if marked in (None, "utf-8-sig")
                else f"{marked.upper()}, as its byte-order mark says,"
                if marked
                else ""
            )
            raise DataError(f"{path} is not {wanted} at byte {error.start}: convert it to UTF-8") from error
        return text
    controls = 0 if marked else len(content) - len(content.translate(None, _CONTROLS))
    if "\0" in text:
        _refuse(path, _binary(content))
        text = _utf16(content) if controls * 4 > len(content) else ""  # else text with a stray NUL
        if not text:
            raise DataError(f"{path} has a NUL at byte {content.index(0)}, so it is no text: give a file of text")
    elif controls * 10 > len(content):
        _refuse(path, _binary(content))
        raise DataError(
            f"{path} has {controls} control characters in {len(content)} bytes, so it is no text: give a file of text"
        )
    return text


def _refuse(path: Source, kind: tuple[bytes, str, str] | None) -> None:
    if kind is not None:
        raise DataError(f"{path} is {kind[1]}, not text: {kind[2]}")


def _binary(content: bytes) -> tuple[bytes, str, str] | None:
    """The kind of a file that is no text, by its first bytes."""
    if content[8:9] == b"{" and 0 < int.from_bytes(content[:8], "little") <= len(content):
        return b"", "a safetensors file", "give a file of texts"
    return next((kind for kind in _BINARY if content.startswith(kind[0])), None)


def _utf16(content: bytes) -> str:
    """The text of UTF-16 without a byte-order mark; an empty string if the bytes are no such text.

    The wrong byte order makes a line end the unassigned character U+0A00. In a text without a line end the bytes that are 0
    decide, because they are the high bytes of Latin letters and spaces.
    """
    high = {"utf-16-le": content[1::2].count(0), "utf-16-be": content[0::2].count(0)}
    for order in sorted(high, key=high.__getitem__, reverse=True):
        try:
            text = content.decode(order)
        except UnicodeDecodeError:
            continue
        if high[order] and not any(_no_character(character) for character in set(text)):
            return text
    return ""


def _no_character(character: str) -> bool:
    """Whether a character is unassigned, private or a control character other than white space."""
    return not character.isspace() and unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs")
