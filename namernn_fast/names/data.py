"""The names data set: where it is looked for, and how it is read without trusting it.

In order: the folder or zip that the caller names, the one in `NAMERNN_FAST_DATA`, the cached
download, a download, and the embedded sample. A source that was asked for is used or is an error;
only a failed download leads to the sample, and that is said.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import os
import re
import secrets
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .sample import SAMPLE
from .text import InputError, fold

DATA_URL = "https://download.pytorch.org/tutorial/data.zip"
DATA_SHA256 = "fb317e80248faeb62dc25ef3390ae24ca34b94e276bbc5141fd8862c2200bff5"
DATA_VARIABLE = "NAMERNN_FAST_DATA"

# The archive has 3 MB, its largest file of names 86 KB: room for growth, none for a bomb.
MAX_ARCHIVE_BYTES = 32 * 2**20
MAX_FILE_BYTES = 4 * 2**20
MAX_TOTAL_BYTES = 16 * 2**20

_MEMBER = re.compile(r"data/names/([^/\\.][^/\\]*)\.txt")
_CHUNK_BYTES = 2**16

_log = logging.getLogger(__name__)


class DownloadError(OSError):
    """The data could not be fetched; the message says from where and why."""


@dataclass(frozen=True)
class NamesData:
    """Surnames with their languages, and where they came from.

    source: the origin in words.
    languages: the language names, sorted.
    rows: (name, index into `languages`), in the order of the files, repeats included.
    is_sample: whether this is the small embedded sample and not the data set.
    """

    source: str
    languages: tuple[str, ...]
    rows: tuple[tuple[str, int], ...]
    is_sample: bool = False

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each language."""
        counts = dict.fromkeys(self.languages, 0)
        for _, language in self.rows:
            counts[self.languages[language]] += 1
        return counts


def load_names(
    path: str | os.PathLike[str] | None = None,
    *,
    url: str | None = None,
    allow_sample: bool = True,
) -> NamesData:
    """Load the names from the first source there is, in the order that this module gives.

    path: a folder with one `<Language>.txt` a language, or a zip with `data/names/<Language>.txt`.
    url: where to download from, `DATA_URL` when None.
    allow_sample: whether a failed download leads to the embedded sample or is an error.

    Raises InputError for a named source that is missing or broken, DownloadError for a failed
    download when there is no sample to be had, another OSError when the disk fails, and
    ModuleNotFoundError when a download needs a package that is not installed.
    """
    if path is not None:
        return _read_named(os.fspath(path), "")
    if named := os.environ.get(DATA_VARIABLE):
        return _read_named(named, f"{DATA_VARIABLE}: ")
    cached = cache_folder() / "data.zip"
    if cached.is_file():
        try:
            return read_names(cached, f"the cached download {cached}")
        except InputError as error:
            _log.warning("%s; downloading it anew", error)
    try:
        return download_names(url or DATA_URL, cached)
    except DownloadError as error:
        if not allow_sample:
            raise
        _log.warning("%s; going on with the small embedded sample, not the data set", error)
        return embedded_sample()


def cache_folder() -> Path:
    """Return the folder for what is downloaded and trained; it need not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "namernn_fast"


def embedded_sample() -> NamesData:
    """Return the surnames of `sample.SAMPLE`."""
    files = ((language, "\n".join(names).encode()) for language, names in SAMPLE.items())
    return _parse(files, "the embedded sample", is_sample=True)


def read_names(path: str | os.PathLike[str], source: str | None = None) -> NamesData:
    """Read a folder or a zip, described as `source` (its path when None).

    Raises InputError when it is neither, holds no names, is damaged, too large or not UTF-8.
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


def _read_named(path: str, prefix: str) -> NamesData:
    try:
        if not path:
            raise InputError("the path of the data is empty")
        return read_names(Path(path).expanduser())
    except InputError as error:
        raise InputError(f"{prefix}{error}") from error


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (language, content) of a folder's text files, hidden ones left out."""
    paths = [
        path for path in folder.glob("*.txt") if path.is_file() and not path.name.startswith(".")
    ]
    if not paths:
        raise InputError(f"{folder}: no names here; one <Language>.txt for each language is needed")
    for path in sorted(paths, key=lambda path: path.stem):
        with path.open("rb") as file:
            yield path.stem, _limited(file, MAX_FILE_BYTES, str(path))


def _zip_files(archive: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """Yield (language, content) of a zip's expected members; no other member is looked at."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            members = {
                match[1]: member
                for member in file.infolist()
                if (match := _MEMBER.fullmatch(member.filename))
            }
            if not members:
                raise InputError(f"{where}: no names here; data/names/<Language>.txt are needed")
            for language, member in sorted(members.items()):
                name = f"{where}: {member.filename}"
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError(f"{name}: compressed in an unknown way")
                with file.open(member) as content:
                    yield language, _limited(content, MAX_FILE_BYTES, name)
    except InputError:
        raise
    # Encrypted members are a RuntimeError, odd headers a ValueError or NotImplementedError.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise InputError(f"{where}: not a readable zip ({error})") from error


def _limited(file: Any, limit: int, where: str) -> bytes:
    """Read `file` to its end, refusing more than `limit` bytes whatever a header says."""
    content: bytes = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{where}: too large, more than {limit / 2**20:g} MiB")
    return content


def _parse(
    files: Iterable[tuple[str, bytes]], source: str, *, is_sample: bool = False
) -> NamesData:
    languages: list[str] = []
    rows: list[tuple[str, int]] = []
    total = empty = unusable = 0
    for language, content in files:
        total += len(content)
        if total > MAX_TOTAL_BYTES:
            raise InputError(f"{source}: too large, more than {MAX_TOTAL_BYTES / 2**20:g} MiB")
        if not language.isprintable():
            raise InputError(f"{source}: {language!r} cannot be the name of a language")
        try:
            text = content.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{source}: {language}.txt is not UTF-8 ({error})") from error
        lines = text.strip().split("\n")
        names = [line for line in lines if line.strip()]
        usable = [name for name in names if fold(name)]
        if not usable:
            raise InputError(f"{source}: {language}.txt holds no names")
        empty += len(lines) - len(names)
        unusable += len(names) - len(usable)
        rows += [(name, len(languages)) for name in usable]
        languages.append(language)
    if empty or unusable:
        _log.warning(
            "%s: skipped %d empty lines and %d names with no usable character",
            source,
            empty,
            unusable,
        )
    return NamesData(source, tuple(languages), tuple(rows), is_sample)


def download_names(
    url: str, path: Path, *, timeout: tuple[float, float] = (10, 30), retries: int = 3
) -> NamesData:
    """Download the zip at `url` to `path` and read it; `path` is written only once it is good.

    timeout: seconds to wait for a connection, and for each part of the answer.
    retries: how often a connection or a server's error is tried again.

    Raises DownloadError when the network or what it gave is bad, another OSError when the disk
    fails, ModuleNotFoundError when requests or tqdm is not installed. A checksum other than
    `DATA_SHA256` is logged as a warning.
    """
    with replacing(path) as file:
        digest = hashlib.sha256()
        for chunk in _stream(url, timeout, retries):
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


def _stream(url: str, timeout: tuple[float, float], retries: int) -> Iterator[bytes]:
    """Yield the body at `url`, showing progress; every failure of the network is DownloadError."""
    requests, urllib3, tqdm = require("requests"), require("urllib3"), require("tqdm")
    retry = urllib3.Retry(
        retries,
        backoff_factor=0.5,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
        respect_retry_after_header=False,  # a server could ask for a year
    )
    try:
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
            # Sizes are compared with Content-Length, so the body must come as it is.
            headers = {"Accept-Encoding": "identity"}
            with session.get(url, stream=True, timeout=timeout, headers=headers) as response:
                response.raise_for_status()
                stated = response.headers.get("Content-Length", "")
                expected = int(stated) if re.fullmatch("[0-9]{1,18}", stated) else None
                received = 0
                with tqdm.tqdm(
                    total=expected, unit="B", unit_scale=True, desc="names", disable=None
                ) as bar:
                    for chunk in response.iter_content(_CHUNK_BYTES):
                        received += len(chunk)
                        if max(received, expected or 0) > MAX_ARCHIVE_BYTES:
                            raise DownloadError(
                                f"{url}: too large, more than {MAX_ARCHIVE_BYTES / 2**20:g} MiB"
                            )
                        bar.update(len(chunk))
                        yield chunk
                if expected is not None and received != expected:
                    raise DownloadError(f"{url}: cut short after {received} of {expected} bytes")
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise DownloadError(f"{url}: download failed ({_cause(error)})") from error


def _cause(error: BaseException) -> BaseException:
    """Return the innermost of the errors that requests and urllib3 wrap in one another."""
    for inner in (getattr(error, "reason", None), *error.args):
        if isinstance(inner, BaseException):
            return _cause(inner)
    return error


def check_replaceable(path: Path) -> None:
    """Raise now what `replacing` would raise later, making the folder of `path` if need be.

    InputError when `path` is there and is not a plain file, for replacing a folder or a device
    does harm; OSError when its folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a plain file")
    tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` which takes its place when the block succeeds.

    When the block fails nothing is left behind and `path` is as it was. Raises what
    `check_replaceable` does.
    """
    check_replaceable(path)
    # Not made by tempfile, whose files no other user may read.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("x+b") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def require(module: str) -> Any:
    """Import an optional dependency; ModuleNotFoundError says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} is not installed; run: pip install 'namernn_fast[names]'", name=module
        ) from error
