"""Text files in and out: strict JSON and CSV, all problems of a file in one error, no half-written file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tad.errors import AnnotationError

LIMIT_S = 1e300  # sums of times beyond this overflow; no video has them
SHOWN = 5  # problems that an error spells out; the rest is counted

# A field of CSV with the blanks around it: a quoted one up to the separator behind it, or one without quotes.
_FIELD = re.compile(r'[^\S\r\n]*("[^"]*(?:""[^"]*)*")[^\S\r\n]*(?=[,\r\n]|\Z)|[^,\r\n]+')
_BLANKS = re.compile(r"(?:\A|[,\r\n])[^\S\r\n]|[^\S\r\n](?:[,\r\n]|\Z)")  # where a field begins or ends


class Problems:
    """What is wrong with one file, collected so that a user mends it in one go."""

    def __init__(self, path: object) -> None:
        self.path = path
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}" if where else what)

    def raise_if_any(self) -> None:
        """Raises AnnotationError with the first problems and the number of all."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise AnnotationError(f"{self.path}: {self.found[0]}")
        lines = [f"{self.path}: {len(self.found)} problems"]
        lines += [f"  {index}. {text}" for index, text in enumerate(self.found[:SHOWN], start=1)]
        if len(self.found) > SHOWN:
            lines.append(f"  ... and {len(self.found) - SHOWN} more")
        raise AnnotationError("\n".join(lines))


def read_text(path: str | Path) -> str:
    """The text of a file, unpacked when it is gzip, without a byte-order mark.

    Raises
    ------
    AnnotationError : absent, unreadable, empty, not UTF-8, or a damaged gzip file.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise AnnotationError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise AnnotationError(f"{path} is a folder; name the file inside it") from None
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path
        raise AnnotationError(f"{str(path)!r} is no path: {error}") from None
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise AnnotationError(f"{path} is a damaged gzip file ({error}); fetch or write it again") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); save it again as UTF-8"
        ) from None
    if not text.strip():
        raise AnnotationError(f"{path} is empty; fetch or write it again")
    return text


def is_json(text: str) -> bool:
    """Whether a text is meant as JSON: the first character decides, not the file's name."""
    return text.lstrip()[:1] in ("{", "[")


def parse_json(text: str, path: object) -> Any:
    """JSON in which no key may occur twice in one object.

    Python keeps the last of two equal keys and says nothing, which would lose a video; hence the check.

    Raises
    ------
    AnnotationError : truncated or malformed JSON, repeated keys, or nesting too deep to be an annotation.
    """
    problems = Problems(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    problems.add(
                        f"key {key!r}", "occurs twice in one JSON object (a video id listed twice?); remove one"
                    )
                seen.add(key)
        return found

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        cut = " (the file ends too early: was it cut off while copying?)" if error.pos >= len(text.rstrip()) else ""
        raise AnnotationError(f"{path} is not valid JSON: {error.msg} at {where}{cut}") from None
    except RecursionError:
        raise AnnotationError(f"{path} is nested too deeply for an annotation or prediction file") from None
    except ValueError as error:  # an integer of thousands of digits
        raise AnnotationError(f"{path} is not valid JSON: {error}") from None
    problems.raise_if_any()
    return content


def parse_csv(text: str, path: object) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the rows of a CSV file, each row with the number of the line on which it ends.

    Blanks around a field are no part of it, as in ``a, 0, 10``; those between quotes are.

    Raises
    ------
    AnnotationError : no header, a column name twice, or rows with more or fewer fields than the header.
    """
    problems = Problems(path)
    if _BLANKS.search(text):  # csv cannot say which fields were quoted, so the blanks go before it reads
        text = _FIELD.sub(lambda field: field[1] or field[0].strip(), text)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    header: list[str] | None = None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                continue
            if len(row) != len(header):
                problems.add(f"line {reader.line_num}", f"has {len(row)} fields, the header has {len(header)}")
                continue
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise AnnotationError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
    if header is None:
        raise AnnotationError(f"{path} has no header line")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        problems.add("header", f"column {', '.join(map(repr, twice))} occurs more than once")
    problems.raise_if_any()
    return header, rows


def as_number(value: object) -> float | None:
    """A float from a number or a numeric text (the field stores both); None for anything else, booleans included."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return float("inf")
    if isinstance(value, str) and "_" not in value:  # Python reads 1_000 as a number, nobody else does
        try:
            return float(value)
        except ValueError:
            return None
    return None


def bad_text(value: object, name: str) -> str | None:
    """Why a value cannot serve as an id or label, or None when it can."""
    if not isinstance(value, str):
        return f"{name} must be text, got {shown(value)}"
    if not value.strip():
        return f"{name} is empty"
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return f"{name} {value!r} is not valid Unicode text"
    return None


def shown(value: object) -> str:
    """A value as an error prints it: never longer than a line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_atomically(path: str | Path, chunks: Iterator[str]) -> None:
    """Write UTF-8 text so that the file is there whole or not at all: a file beside it, flushed, then renamed over it.

    Raises
    ------
    AnnotationError : the folder or the file cannot be written.
    """
    path = Path(path)
    scratch = path.with_name(f".{uuid.uuid4().hex}.tmp")  # short: a name may have 255 bytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(scratch, "x", encoding="utf-8", newline="") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise AnnotationError(f"{path} cannot be written: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path
        raise AnnotationError(f"{str(path)!r} is no path: {error}") from None
