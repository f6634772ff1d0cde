"""common.download against a server on this machine that interrupts, forgets, damages and lies on request."""

import base64
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requested.append(wanted)
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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}/file.npz"
    server.goog_hash, server.requested = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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
