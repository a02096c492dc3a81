"""Loads the names data set. Sources are untrusted, so their content and size are checked.

Sources are tried in this order: the folder or zip that the caller names, the folder or zip that
`NAMERNN_FAST_DATA` names, the cached download, a new download, and the embedded sample. A named
source that cannot be read is an error; only a failed download falls back to the sample, with a
warning.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .download import DownloadError, stream
from .files import cache_folder, replacing
from .folding import why_unusable
from .sample import SAMPLE
from .text import MAX_LANGUAGES, InputError, is_language

DATA_URL = "https://download.pytorch.org/tutorial/data.zip"
DATA_SHA256 = "fb317e80248faeb62dc25ef3390ae24ca34b94e276bbc5141fd8862c2200bff5"
DATA_VARIABLE = "NAMERNN_FAST_DATA"

# The archive is 3 MB, and its largest file of names is 86 KB. These limits stop zip bombs.
MAX_ARCHIVE_BYTES = 32 * 2**20
MAX_FILE_BYTES = 4 * 2**20
MAX_TOTAL_BYTES = 16 * 2**20

_MEMBER = re.compile(r"data/names/([^/\\.][^/\\]*)\.txt")
# Names, without suffix, of text files that contain no surnames, such as README.txt.
_NO_LANGUAGE = re.compile(r"readme|licen[cs]e|copying|notice|changelog|authors", re.IGNORECASE)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamesData:
    """Surnames with their languages, and where they came from."""

    source: str
    """A description of where the names came from."""
    languages: tuple[str, ...]
    """The names of the languages, sorted."""
    rows: tuple[tuple[str, int], ...]
    """Pairs (name, index into `languages`) in the order of the files, repeats included. Every name
    is usable (see `folding.why_unusable`)."""
    is_sample: bool = False
    """Whether this is the small embedded sample instead of the data set."""

    def counts(self) -> dict[str, int]:
        """Returns the number of rows of each language."""
        counts = dict.fromkeys(self.languages, 0)
        for _, language in self.rows:
            counts[self.languages[language]] += 1
        return counts

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the UTF-8 lines "language, tab, name", in the order of the rows."""
        lines = (f"{self.languages[language]}\t{name}\n" for name, language in self.rows)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_names(
    path: str | os.PathLike[str] | None = None,
    *,
    url: str | None = None,
    allow_sample: bool = True,
) -> NamesData:
    """Loads the names from the first available source; see the module's docstring for the order.

    Args:
        path: a folder with one file `<Language>.txt` for each language, or a zip with files
            `data/names/<Language>.txt`.
        url: the URL to download from; `DATA_URL` if None.
        allow_sample: whether a failed download falls back to the embedded sample. Otherwise
            `load_names` raises a DownloadError.

    Raises:
        InputError: a named source is missing or broken.
        DownloadError: the download failed, and the sample is not allowed.
        OSError: a file could not be read or written.
        ModuleNotFoundError: a download needs a package that is not installed.
    """
    named, where = path, ""
    if named is None:
        named, where = os.environ.get(DATA_VARIABLE) or None, f"{DATA_VARIABLE}: "
    if named is not None:
        try:
            if not os.fspath(named):
                raise InputError("the path of the data is empty")
            return read_names(Path(named).expanduser())
        # expanduser raises a RuntimeError for `~` if there is no home folder.
        except (InputError, RuntimeError) as error:
            raise InputError(f"{where}{error}") from error
    cached = cache_folder() / "data.zip"
    if cached.is_file():
        try:
            return read_names(cached, f"the cached download {cached}")
        except InputError as error:
            _log.warning("%s; downloading it again", error)
    try:
        return download_names(url or DATA_URL, cached)
    except DownloadError as error:
        if not allow_sample:
            raise
        _log.warning("%s; using the small embedded sample, not the data set", error)
        return embedded_sample()


def embedded_sample() -> NamesData:
    """Returns the surnames of `sample.SAMPLE`, without file or network access.

    Example:
        >>> data = embedded_sample()
        >>> data.is_sample, data.languages[:3]
        (True, ('Arabic', 'Chinese', 'Czech'))
    """
    files = ((language, "\n".join(names).encode()) for language, names in SAMPLE.items())
    return _parse(files, "the embedded sample", is_sample=True)


def read_names(path: str | os.PathLike[str], source: str | None = None) -> NamesData:
    """Reads names from a folder or a zip.

    Args:
        path: a folder or a zip.
        source: the value of `NamesData.source`; if None, a description that contains `path`.

    Raises:
        InputError: `path` is neither a folder nor a zip, holds no names, or is damaged, too large
            or not UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        return _parse(_folder_files(path), source or f"the folder {path}")
    if not path.exists():
        raise InputError(f"{path}: there is no such folder or file")
    if not path.is_file():
        raise InputError(f"{path}: neither a folder nor a zip")
    with path.open("rb") as file:
        archive = _limited(file, MAX_ARCHIVE_BYTES, str(path))
    return _parse(_zip_files(archive, str(path)), source or f"the zip {path}")


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (language, content) for each text file in `folder` that is named after a language."""
    paths = [
        path
        for path in folder.glob("*.txt")
        if path.is_file() and not path.name.startswith(".") and _is_language(path.stem, folder)
    ]
    if not paths:
        raise InputError(f"{folder}: no names here; expected one <Language>.txt per language")
    for path in sorted(paths, key=lambda path: path.stem):
        with path.open("rb") as file:
            yield path.stem, _limited(file, MAX_FILE_BYTES, str(path))


def _is_language(name: str, where: object) -> bool:
    """Returns whether `name`.txt can be the file of a language; logs a warning if it cannot."""
    if _NO_LANGUAGE.fullmatch(name):
        _log.warning("%s: %s.txt is not taken for a language", where, name)
        return False
    return True


def _zip_files(archive: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """Yields (language, content) for each expected member of a zip, and reads no other member."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            members: dict[str, zipfile.ZipInfo] = {}
            for member in file.infolist():
                match = _MEMBER.fullmatch(member.filename)
                if match is None or not _is_language(match[1], where):
                    continue
                if match[1] in members:
                    raise InputError(f"{where}: {member.filename} occurs more than once in the zip")
                members[match[1]] = member
            if not members:
                raise InputError(f"{where}: no names here; expected data/names/<Language>.txt")
            for language, member in sorted(members.items()):
                name = f"{where}: {member.filename}"
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError(f"{name}: unsupported compression")
                with file.open(member) as content:
                    yield language, _limited(content, MAX_FILE_BYTES, name)
    except InputError:
        raise
    # Encrypted members raise RuntimeError; invalid headers raise ValueError or NotImplementedError.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise InputError(f"{where}: not a readable zip ({error})") from error


def _limited(file: Any, limit: int, where: str) -> bytes:
    """Returns the content of `file`, or raises an error if it is larger than `limit` bytes.

    Counts the bytes instead of trusting the header, which may state the wrong size.
    """
    content: bytes = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{where}: too large, more than {limit / 2**20:g} MiB")
    return content


def _parse(
    files: Iterable[tuple[str, bytes]], source: str, *, is_sample: bool = False
) -> NamesData:
    """Parses (language, content) pairs with one name per line; skips lines without usable names."""
    languages: list[str] = []
    rows: list[tuple[str, int]] = []
    total = empty = unusable = 0
    for language, content in files:
        total += len(content)
        if total > MAX_TOTAL_BYTES:
            raise InputError(f"{source}: too large, more than {MAX_TOTAL_BYTES / 2**20:g} MiB")
        if not is_language(language):
            raise InputError(f"{source}: {language!r:.150} cannot be the name of a language")
        try:
            # Accept the line ends of Unix (LF), Windows (CRLF) and classic Mac OS (CR).
            text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{source}: {language}.txt is not UTF-8 ({error})") from error
        lines = text.strip().split("\n")
        names = [line for line in lines if line.strip()]
        usable = [name for name in names if why_unusable(name) is None]
        if not usable:
            reason = f"usable name: {why_unusable(names[0])}" if names else "names"
            raise InputError(f"{source}: {language}.txt holds no {reason}")
        empty += len(lines) - len(names)
        unusable += len(names) - len(usable)
        rows += [(name, len(languages)) for name in usable]
        languages.append(language)
        if len(languages) > MAX_LANGUAGES:
            raise InputError(f"{source}: more than {MAX_LANGUAGES:,} languages")
    if empty or unusable:
        _log.warning(
            "%s: skipped %d empty lines and %d unusable names",
            source,
            empty,
            unusable,
        )
    return NamesData(source, tuple(languages), tuple(rows), is_sample)


def download_names(
    url: str, path: Path, *, timeout: tuple[float, float] = (10, 30), retries: int = 3
) -> NamesData:
    """Downloads the zip at `url`, returns its names, and saves the zip at `path` if it is valid.

    Logs a warning if the checksum is not `DATA_SHA256`. See `stream` for the other arguments.

    Raises:
        DownloadError: the network failed, or the download is not a zip of names.
        OSError: the file could not be written.
    """
    with replacing(path) as file:
        digest = hashlib.sha256()
        for chunk in stream(url, MAX_ARCHIVE_BYTES, timeout, retries):
            digest.update(chunk)
            file.write(chunk)
        file.seek(0)
        try:
            names = _parse(_zip_files(file.read(), url), f"a download of {url}")
        except InputError as error:
            raise DownloadError(str(error)) from error
    if digest.hexdigest() != DATA_SHA256:
        _log.warning("%s: not the known version (sha256 %s)", url, digest.hexdigest())
    return names
