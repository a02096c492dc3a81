"""Downloads over HTTP, with retries, a size limit, and a single type of error."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .files import require

_CHUNK_BYTES = 2**16


class DownloadError(OSError):
    """The data could not be downloaded; the message names the URL and the reason."""


def stream(url: str, limit: int, timeout: tuple[float, float], retries: int) -> Iterator[bytes]:
    """Yields the content of `url` in chunks; shows progress if standard error is a terminal.

    Args:
        url: the URL to download from.
        limit: the maximum size in bytes.
        timeout: seconds to wait for a connection, and for each block of the response.
        retries: the maximum number of retries after a failed connection or a server error.

    Raises:
        DownloadError: the network failed, or the response is an error, too large or incomplete.
    """
    requests, urllib3, tqdm = require("requests"), require("urllib3"), require("tqdm")
    retry = urllib3.Retry(
        retries,
        backoff_factor=0.5,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
        respect_retry_after_header=False,  # a server could ask us to wait for a year
    )
    try:
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
            # Without compression, the number of bytes received must equal Content-Length.
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
                        if max(received, expected or 0) > limit:
                            size = f"{limit / 2**20:g} MiB"
                            raise DownloadError(f"{url}: too large, more than {size}")
                        bar.update(len(chunk))
                        yield chunk
                if expected is not None and received != expected:
                    raise DownloadError(f"{url}: cut short after {received} of {expected} bytes")
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise DownloadError(f"{url}: download failed ({_cause(error)})") from error


def _cause(error: BaseException) -> BaseException:
    """Returns the innermost error, because requests and urllib3 wrap errors in other errors."""
    for inner in (getattr(error, "reason", None), *error.args):
        if isinstance(inner, BaseException):
            return _cause(inner)
    return error
