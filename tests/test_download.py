"""common.download against a server on this machine that interrupts, forgets, damages and lies on request."""

import base64
import hashlib
import multiprocessing
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from common import download as download_module
from common.download import digest_of, download
from common.errors import UserError

CONTENT = bytes(i * 7 % 251 for i in range(100_000))
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; the attributes say how it misbehaves."""

    url: str
    content = CONTENT
    ranges = True  # honour Range requests
    declare = True  # send Content-Length
    piece: int | None = None  # close the connection after so many bytes of each answer
    goog_hash: list[str]
    requested: list[str | None]  # the Range header of every request
    answers: list[tuple[int, dict[str, str], bytes]]  # if not empty, the first is given instead, as it stands


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requested.append(wanted)
        if self.server.answers:
            status, headers, body = self.server.answers.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            return
        content, total = self.server.content, len(self.server.content)
        if self.path == "/missing.npz":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if self.server.declare:
            self.send_header("Content-Length", str(total - start))
        for value in self.server.goog_hash:
            self.send_header("x-goog-hash", value)
        self.end_headers()
        self.wfile.write(content[start:][: self.server.piece])

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        server = Server(("127.0.0.1", 0), Handler)
        server.url = f"http://127.0.0.1:{server.server_port}/file.npz"
        server.goog_hash, server.requested, server.answers = [], [], []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def only(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_downloads_into_a_new_folder_and_leaves_only_the_file(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.npz"
    assert download(server.url, target, md5=MD5.upper(), sha256=SHA256) == target
    assert target.read_bytes() == CONTENT
    assert only(target.parent, "file.npz")
    assert digest_of(target, "sha256") == SHA256


def test_does_not_fetch_a_file_that_is_there(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.npz"
    target.write_bytes(CONTENT)
    download(server.url, target, sha256=SHA256)
    assert server.requested == []


def test_names_a_file_that_is_there_with_another_checksum_and_leaves_it(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.npz"
    target.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"file\.npz has md5 .* instead of .* delete it"):
        download(server.url, target, md5=MD5)
    assert target.read_bytes() == b"something else"


def test_takes_up_a_broken_connection_again(server: Server, tmp_path: Path) -> None:
    server.piece = 30_000
    download(server.url, tmp_path / "file.npz", sha256=SHA256)
    assert server.requested == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]


def test_an_interrupted_download_is_resumed_by_the_next_call(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.npz.part").write_bytes(CONTENT[:77_777])
    download(server.url, tmp_path / "file.npz", sha256=SHA256)
    assert server.requested == ["bytes=77777-"]
    assert only(tmp_path, "file.npz")


def test_a_complete_part_is_only_renamed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.npz.part").write_bytes(CONTENT)
    assert download(server.url, tmp_path / "file.npz", sha256=SHA256).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_started_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.npz.part").write_bytes(CONTENT + b"more")
    assert download(server.url, tmp_path / "file.npz").read_bytes() == CONTENT
    assert server.requested == [f"bytes={len(CONTENT) + 4}-", None]


def test_starts_again_where_the_server_ignores_ranges(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "file.npz.part").write_bytes(b"wrong start")
    assert download(server.url, tmp_path / "file.npz").read_bytes() == CONTENT


def test_gives_up_where_no_attempt_gets_further_and_keeps_the_part(server: Server, tmp_path: Path) -> None:
    server.ranges, server.piece = False, 30_000
    with pytest.raises(UserError, match=r"the server stopped after 30000 of 100000 bytes.*run again"):
        download(server.url, tmp_path / "file.npz")
    assert only(tmp_path, "file.npz.part")


def test_a_server_that_declares_no_length_is_believed_when_the_checksum_is_right(
    server: Server, tmp_path: Path
) -> None:
    server.declare = False
    download(server.url, tmp_path / "file.npz", sha256=SHA256)


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_damaged_file_is_deleted(server: Server, tmp_path: Path, algorithm: str) -> None:
    server.content = CONTENT[:-1] + b"?"
    wanted = {"md5": MD5, "sha256": SHA256}[algorithm]
    with pytest.raises(UserError, match=f"has {algorithm} .* instead of {wanted}.*deleted"):
        download(server.url, tmp_path / "file.npz", **{algorithm: wanted})
    assert only(tmp_path)


@pytest.mark.parametrize("joined", [True, False])
def test_the_md5_of_google_storage_is_checked(server: Server, tmp_path: Path, joined: bool) -> None:
    announced = ["crc32c=AAAAAA==", "md5=" + base64.b64encode(hashlib.md5(CONTENT).digest()).decode()]
    server.goog_hash = [",".join(announced)] if joined else announced
    download(server.url, tmp_path / "good.npz")
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(UserError, match=f"instead of {MD5}"):
        download(server.url, tmp_path / "bad.npz")
    assert only(tmp_path, "good.npz")


def test_a_refusal_names_the_status(server: Server, tmp_path: Path) -> None:
    url = server.url.replace("file", "missing")
    with pytest.raises(UserError, match=r"could not download http.*missing\.npz \(the server answered 404"):
        download(url, tmp_path / "missing.npz")
    assert only(tmp_path)


def test_without_a_connection_the_sentence_names_url_and_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url, target = "http://127.0.0.1:9/ViT-B_16.npz", tmp_path / "ViT-B_16.npz"
    with pytest.raises(UserError) as caught:
        download(url, target)
    assert url in str(caught.value)
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_disk_that_cannot_be_written_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(url: str, part: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_module, "_fetch", full)
    with pytest.raises(UserError, match=r"could not write .*file\.npz\.part .*No space left"):
        download(server.url, tmp_path / "file.npz")


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(os.fstat(handle).st_size))
    monkeypatch.setattr(os, "replace", lambda source, target: (calls.append("rename"), replace(source, target)))
    download(server.url, tmp_path / "file.npz")
    assert calls == [len(CONTENT), "rename"]


# A server that lies


def refused(server: Server, folder: Path, match: str) -> None:
    """The download ends in one sentence, and no file has the name."""
    with pytest.raises(UserError, match=match) as caught:
        download(server.url, folder / "file.npz", sha256=SHA256)
    assert "\n" not in str(caught.value)
    assert server.url in str(caught.value)
    assert not (folder / "file.npz").exists()


def test_a_length_that_is_too_small_is_found_by_the_checksum(server: Server, tmp_path: Path) -> None:
    server.answers = [(200, {"Content-Length": "60000"}, CONTENT)]
    refused(server, tmp_path, "instead of")
    assert only(tmp_path)


def test_a_length_that_is_too_large_is_no_reason_to_wait(server: Server, tmp_path: Path) -> None:
    """The next request hears that there is nothing more."""
    server.answers = [(200, {"Content-Length": "100001"}, CONTENT)]
    download(server.url, tmp_path / "file.npz", sha256=SHA256)
    assert server.requested == [None, "bytes=100000-"]


@pytest.mark.parametrize("length", ["-5", "ten", "1e5", "", "5, 5"])
def test_a_length_that_is_none(server: Server, tmp_path: Path, length: str) -> None:
    """It counts as none: the body ends where the connection does."""
    server.answers = [(200, {"Content-Length": length}, CONTENT)]
    download(server.url, tmp_path / "file.npz", sha256=SHA256)
    assert (tmp_path / "file.npz").read_bytes() == CONTENT


def test_a_body_without_end_is_cut_off_behind_its_declared_length(server: Server, tmp_path: Path) -> None:
    """To a part of 10 bytes the server sends 50 MB where it said that 20 are left."""
    (tmp_path / "file.npz.part").write_bytes(CONTENT[:10])
    server.answers = [(206, {"Content-Range": "bytes 10-29/30"}, bytes(50 << 20))]
    written = 0
    write = download_module.tqdm.update

    def counted(self: Any, size: int = 1) -> Any:
        nonlocal written
        written += size
        return write(self, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download_module.tqdm, "update", counted)
        refused(server, tmp_path, "bytes came where 30 were announced")
    assert 0 < written <= download_module.CHUNK
    assert only(tmp_path)


@pytest.mark.parametrize("place", ["bytes 0-99999/100000", "bytes 50001-99999/100000", "nonsense", ""])
def test_other_bytes_than_were_asked_for_are_not_appended(server: Server, tmp_path: Path, place: str) -> None:
    (tmp_path / "file.npz.part").write_bytes(CONTENT[:50_000])
    server.answers = [(206, {"Content-Range": place}, CONTENT[50_000:])]
    refused(server, tmp_path, "where those from 50000 were asked for")
    download(server.url, tmp_path / "file.npz", sha256=SHA256)


def test_a_part_that_nobody_asked_for_is_not_the_whole(server: Server, tmp_path: Path) -> None:
    server.answers = [(206, {"Content-Range": "bytes 0-29999/100000", "Content-Length": "30000"}, CONTENT[:30_000])]
    download(server.url, tmp_path / "file.npz", sha256=SHA256)
    assert server.requested == [None, "bytes=30000-"]


def test_a_range_of_an_unknown_whole_is_as_long_as_its_length_says(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.npz.part").write_bytes(CONTENT[:50_000])
    headers = {"Content-Range": "bytes 50000-99999/*", "Content-Length": "50000"}
    server.answers = [(206, headers, CONTENT[50_000:70_000])]
    download(server.url, tmp_path / "file.npz", sha256=SHA256)
    assert server.requested == ["bytes=50000-", "bytes=70000-"]


@pytest.mark.parametrize("times", [1, 50])
def test_a_refused_range_ends(server: Server, tmp_path: Path, times: int) -> None:
    (tmp_path / "file.npz.part").write_bytes(b"something else")
    server.answers = [(416, {"Content-Range": "bytes */14"}, b"")] * times
    refused(server, tmp_path, "has sha256 .* deleted")
    server.answers = [(416, {"Content-Range": "bytes */7"}, b"")] * times
    (tmp_path / "file.npz.part").write_bytes(b"something else")
    if times > 1:
        refused(server, tmp_path, "416")
    else:
        download(server.url, tmp_path / "file.npz", sha256=SHA256)


@pytest.mark.parametrize(
    "place",
    ["file:///etc/passwd", "ftp://127.0.0.1/file.npz", "data:,x", "gopher://127.0.0.1", "javascript:1", "http://["],
)
def test_a_redirect_leads_nowhere_else(server: Server, tmp_path: Path, place: str) -> None:
    server.answers = [(302, {"Location": place}, b"")]
    refused(server, tmp_path, "could not download")
    assert only(tmp_path)


def test_a_redirect_from_https_to_http_is_not_followed() -> None:
    redirects = download_module._Redirects()
    request = urllib.request.Request("https://127.0.0.1/file.npz")
    with pytest.raises(urllib.error.HTTPError, match="where no redirect may lead"):
        redirects.redirect_request(request, None, 302, "Found", {}, "http://127.0.0.1/file.npz")
    followed = redirects.redirect_request(request, None, 302, "Found", {}, "https://127.0.0.1/other.npz")
    assert followed is not None
    assert followed.full_url == "https://127.0.0.1/other.npz"


def test_a_redirect_is_followed_and_a_circle_is_not(server: Server, tmp_path: Path) -> None:
    server.answers = [(302, {"Location": "/other"}, b"")]
    download(server.url, tmp_path / "file.npz", sha256=SHA256)
    (tmp_path / "file.npz").unlink()
    server.answers = [(302, {"Location": server.url}, b"")] * 30
    refused(server, tmp_path, "the server answered 302")


def test_a_checksum_that_is_none_is_a_sentence(server: Server, tmp_path: Path) -> None:
    server.goog_hash = ["md5=x"]
    with pytest.raises(UserError, match="could not download"):
        download(server.url, tmp_path / "file.npz")
    assert only(tmp_path, "file.npz.part")


def test_seeded_nonsense_ends_in_a_file_or_a_sentence(server: Server, tmp_path: Path) -> None:
    """300 answers made of bits of answers: whatever gets the name has the checksum."""
    choice = random.Random(0)
    lengths = ("0", "7", "99999", "100000", "100001", "999999999999", "-1", "x")
    ranges = (
        "bytes 0-99999/100000",
        "bytes 7-99999/100000",
        "bytes 7-99999/*",
        "bytes */7",
        "bytes 7-6/5",
        "7",
        "bytes",
    )
    places = (
        server.url,
        "http://127.0.0.1:x/",
        "//",
        "http://\x80/",
        "file:///dev/zero",
        "?",
        "http://127.0.0.1:99999/",
    )
    finished, sentences = 0, list[str]()
    for _ in range(300):
        for _ in range(choice.randrange(1, 4)):
            headers = {"Content-Length": choice.choice(lengths)} if choice.random() < 0.5 else {}
            headers |= {"Content-Range": choice.choice(ranges)} if choice.random() < 0.5 else {}
            headers |= {"Location": choice.choice(places)} if choice.random() < 0.2 else {}
            headers |= {"x-goog-hash": choice.choice(("md5=", "md5=x", "crc32c", "md5=====", ",,"))}
            status = choice.choice((200, 200, 206, 206, 301, 302, 307, 304, 416, 404, 500, 204))
            server.answers.append((status, headers, choice.choice((CONTENT, CONTENT[7:], CONTENT[:7], b""))))
        try:
            download(server.url, tmp_path / "file.npz", sha256=SHA256 if choice.random() < 0.5 else None, md5=MD5)
        except UserError as error:
            sentences.append(str(error))
            assert not (tmp_path / "file.npz").exists()
        else:
            assert (tmp_path / "file.npz").read_bytes() == CONTENT
            (tmp_path / "file.npz").unlink()
            finished += 1
        server.answers.clear()
    assert finished > 10
    assert not any("\n" in sentence for sentence in sentences)
    assert list(tmp_path.glob("*.lock")) == []


# Cut, killed, and by several processes at once


def test_cut_at_seeded_moments_and_called_again(server: Server, tmp_path: Path) -> None:
    """20 times: the connection breaks at random places, then the part itself is cut as a kill may leave it."""
    for seed in range(20):
        choice = random.Random(seed)
        server.requested.clear()
        server.ranges, server.piece = False, choice.randrange(1, len(CONTENT))
        refused(server, tmp_path, "the server stopped")
        part = tmp_path / "file.npz.part"
        os.truncate(part, choice.randrange(part.stat().st_size + 1))
        kept = part.stat().st_size
        server.ranges, server.piece = True, choice.randrange(5_000, len(CONTENT))
        server.requested.clear()
        download(server.url, tmp_path / "file.npz", sha256=SHA256)
        assert server.requested[0] == (f"bytes={kept}-" if kept else None)
        assert only(tmp_path, "file.npz")
        (tmp_path / "file.npz").unlink()


def test_a_killed_process_leaves_what_the_next_one_takes_up(server: Server, tmp_path: Path) -> None:
    release = threading.Event()
    content = CONTENT * 40  # a read takes a megabyte

    def trickle(handler: Handler) -> None:
        if handler.headers.get("Range"):
            original(handler)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2])
        handler.wfile.flush()
        release.wait(30)

    original = Handler.do_GET
    server.content = content
    target = tmp_path / "file.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "do_GET", trickle)
        process = multiprocessing.get_context("fork").Process(target=download, args=(server.url, target))
        process.start()
        part = tmp_path / "file.npz.part"
        wait_for(lambda: part.exists() and part.stat().st_size > 0)
        process.kill()
        process.join()
        release.set()
        kept = part.stat().st_size
        assert 0 < kept < len(content)
        download(server.url, target)
    assert target.read_bytes() == content
    assert only(tmp_path, "file.npz")


def test_processes_that_want_the_same_file_fetch_it_once(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    target = tmp_path / "file.npz"
    processes = [
        context.Process(target=download, args=(server.url, target), kwargs={"sha256": SHA256}) for _ in range(8)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert server.requested == [None]
    assert target.read_bytes() == CONTENT
    assert only(tmp_path, "file.npz")


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
