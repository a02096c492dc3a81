"""Tests downloading the data from a local server."""

import hashlib
import io
import sys
import zipfile

import pytest

from namernn_fast.names import DownloadError, dataset, load_names

# The timeouts for connecting and for each read, in seconds.
ONCE = {"timeout": (300, 300), "retries": 0}


@pytest.fixture
def archive():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("data/names/Basque.txt", "Agirre\nEtxeberria\n" * 999)
        file.writestr("data/names/Welsh.txt", "Pugh")
    return buffer.getvalue()


def answer(content, stated=None, status=200):
    """Return a function that answers a request with `content`.

    `stated` replaces the actual Content-Length; "" omits this header.
    """

    def respond(handler):
        handler.send_response(status)
        if stated != "":
            handler.send_header("Content-Length", str(stated or len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return respond


def failure(url, path, **options):
    """Return the reason why a download fails, and check that it leaves no file behind."""
    with pytest.raises(DownloadError) as error:
        dataset.download_names(url, path, **(ONCE | options))
    assert list(path.parent.iterdir()) == []
    return str(error.value)


@pytest.fixture
def target(cache):
    return cache / "data.zip"


@pytest.mark.parametrize("stated", [None, ""], ids=["stated", "unstated"])
def test_a_download_is_cached_and_reused(serve, archive, target, caplog, monkeypatch, stated):
    monkeypatch.setattr(dataset, "DATA_SHA256", hashlib.sha256(archive).hexdigest())
    url = serve(answer(archive, stated))
    names = load_names(url=url)
    assert names.source == f"a download of {url}"
    assert names.counts() == {"Basque": 1998, "Welsh": 1}
    assert target.read_bytes() == archive
    assert list(target.parent.iterdir()) == [target]
    again = load_names(url=url)
    assert again.source == f"the cached download {target}"
    assert again.rows == names.rows
    assert serve.requests == 1
    assert caplog.records == []


def test_progress_is_shown_only_on_a_terminal(serve, archive, target, capsys, monkeypatch):
    url = serve(answer(archive))
    dataset.download_names(url, target, **ONCE)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    dataset.download_names(url, target, **ONCE)
    assert "names: 100%" in capsys.readouterr().err


def test_an_unknown_checksum_causes_a_warning(serve, archive, target, caplog):
    url = serve(answer(archive))
    assert dataset.download_names(url, target, **ONCE).languages == ("Basque", "Welsh")
    digest = hashlib.sha256(archive).hexdigest()
    assert [record.getMessage() for record in caplog.records] == [
        f"{url}: not the known version (sha256 {digest})"
    ]


def test_a_damaged_cached_file_is_downloaded_again(serve, archive, target, caplog):
    target.parent.mkdir(parents=True)
    target.write_bytes(archive[:50])
    assert load_names(url=serve(answer(archive))).languages == ("Basque", "Welsh")
    assert target.read_bytes() == archive
    assert caplog.records[0].getMessage() == (
        f"{target}: not a readable zip (File is not a zip file); downloading it again"
    )


def test_a_download_is_retried_once_after_a_server_error(serve, archive, target):
    statuses = iter((503, 200))
    url = serve(lambda handler: answer(archive, status=next(statuses))(handler))
    assert dataset.download_names(url, target, **ONCE | {"retries": 1}).counts()["Welsh"] == 1
    assert serve.requests == 2
    target.unlink()
    busy = serve(answer(b"busy", status=503))
    assert "503 Server Error: Service Unavailable" in failure(busy, target, retries=1)
    assert serve.requests == 4


def test_unreachable_and_invalid_addresses_are_errors(target):
    assert "Connection refused" in failure("http://127.0.0.1:1/data.zip", target)
    assert failure("data.zip", target).startswith("data.zip: download failed (Invalid URL")


@pytest.mark.parametrize("begun", [False, True])
def test_a_silent_server_causes_a_timeout(serve, archive, target, begun):
    def respond(handler):
        if begun:
            answer(archive[:100], stated=len(archive))(handler)
        serve.stop.wait(300)

    assert "Read timed out." in failure(serve(respond), target, timeout=(300, 0.3))


def test_a_truncated_body_is_an_error(serve, archive, target):
    url = serve(answer(archive[:-9], stated=len(archive)))
    reason = failure(url, target)
    assert reason.startswith(f"{url}: ")
    assert str(len(archive) - 9) in reason
    # Without a Content-Length, the truncation is noticed only when the zip is read.
    url = serve(answer(archive[:-9], stated=""))
    assert failure(url, target) == f"{url}: not a readable zip (File is not a zip file)"


@pytest.mark.parametrize("stated", [None, ""], ids=["stated", "unstated"])
def test_a_body_that_is_too_large_is_an_error(serve, target, monkeypatch, stated):
    monkeypatch.setattr(dataset, "MAX_ARCHIVE_BYTES", 2**18)
    url = serve(answer(bytes(2**18 + 1), stated))
    assert failure(url, target) == f"{url}: too large, more than 0.25 MiB"


def test_a_failed_download_falls_back_to_the_sample(serve, caplog, cache):
    url = serve(answer(b"no", status=404))
    names = load_names(url=url)
    assert names.is_sample
    assert names.source == "the embedded sample"
    assert [record.getMessage() for record in caplog.records] == [
        f"{url}: download failed (404 Client Error: Not Found for url: {url}); "
        "using the small embedded sample, not the data set"
    ]
    assert list(cache.iterdir()) == []


def test_a_disk_error_does_not_fall_back_to_the_sample(serve, archive, cache):
    cache.parent.write_text("a file in the place of a folder")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        load_names(url=serve(answer(archive)))
