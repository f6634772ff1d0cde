"""Downloads against a server on this machine: complete, interrupted, damaged, refused; no network where none is due."""

import base64
import hashlib
import io
import multiprocessing
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_trees import sentence, write_aircraft, write_coco, write_food
from torchvision.datasets import CIFAR10, CIFAR100, FGVCAircraft, Food101

from common import data as readers
from common.data import facts, prepare
from common.data.download import digest_of, fetch
from common.data.facts import data_sets
from common.errors import UserError

CONTENT = bytes(i * 7 % 251 for i in range(100_000))
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; the attributes say how it misbehaves."""

    url: str
    files: dict[str, bytes]
    requested: list[tuple[str, str | None]]  # path and Range header of every request
    goog_hash = ""
    ranges = True  # honour Range requests
    declare = True  # send Content-Length
    piece: int | None = None  # close the connection after so many bytes of each answer


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requested.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if self.server.declare:
            self.send_header("Content-Length", str(len(content) - start))
        if self.server.goog_hash:
            self.send_header("x-goog-hash", self.server.goog_hash)
        self.end_headers()
        self.wfile.write(content[start:][: self.server.piece])

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Has CONTENT as file.npz, and the archives of all data sets in place of their hosts."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.requested = {"/file.npz": CONTENT}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        for name, data_set in data_sets().items():
            archives = [replace(a, url=f"{server.url}/{Path(a.url).name}", md5=None) for a in data_set.archives]
            monkeypatch.setitem(data_sets(), name, replace(data_set, archives=archives))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


# A file


def test_a_file_arrives_whole_in_a_new_folder_and_only_once(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.npz"
    for _ in range(2):
        assert fetch(f"{server.url}/file.npz", target, md5=MD5).read_bytes() == CONTENT
    assert names(target.parent) == {"file.npz"}
    assert server.requested == [("/file.npz", None)]
    assert digest_of(target, "sha256") == hashlib.sha256(CONTENT).hexdigest()


def test_a_broken_connection_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.piece = 30_000
    fetch(f"{server.url}/file.npz", tmp_path / "file.npz", md5=MD5)
    assert [wanted for _, wanted in server.requested] == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]


PARTS = {  # what an earlier call left -> what is asked for
    "a part": (CONTENT[:77_777], True, ["bytes=77777-"]),
    "all of it": (CONTENT, True, ["bytes=100000-"]),
    "more": (CONTENT + b"more", True, ["bytes=100004-", None]),
    "a part, but the server always begins anew": (b"other", False, ["bytes=5-"]),
}


@pytest.mark.parametrize("kind", PARTS)
def test_an_interrupted_download_is_resumed_by_the_next_call(kind: str, server: Server, tmp_path: Path) -> None:
    part, server.ranges, asked = PARTS[kind]
    (tmp_path / "file.npz.part").write_bytes(part)
    assert fetch(f"{server.url}/file.npz", tmp_path / "file.npz", md5=MD5).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requested] == asked
    assert names(tmp_path) == {"file.npz"}


def test_it_ends_where_no_attempt_gets_further_and_keeps_the_part(server: Server, tmp_path: Path) -> None:
    server.ranges, server.piece = False, 30_000
    with pytest.raises(UserError, match=r"the server stopped after 30000 .*run again"):
        fetch(f"{server.url}/file.npz", tmp_path / "file.npz")
    assert names(tmp_path) == {"file.npz.part"}


@pytest.mark.parametrize("announced", [True, False])
def test_a_damaged_file_is_deleted(server: Server, tmp_path: Path, announced: bool) -> None:
    """By the MD5 that is given, or by that of Google's storage."""
    if announced:
        server.goog_hash = "crc32c=AAAAAA==,md5=" + base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    server.declare = False
    fetch(f"{server.url}/file.npz", tmp_path / "good.npz", md5=None if announced else MD5)
    server.files["/file.npz"] = CONTENT[:-1] + b"?"
    with pytest.raises(UserError, match=f"not {MD5}.*deleted"):
        fetch(f"{server.url}/file.npz", tmp_path / "file.npz", md5=None if announced else MD5)
    assert names(tmp_path) == {"good.npz"}


def test_a_refusal_and_no_connection_name_address_and_place(server: Server, tmp_path: Path) -> None:
    for url, why in ((f"{server.url}/missing.npz", "404"), ("http://127.0.0.1:9/missing.npz", "refused")):
        with pytest.raises(UserError) as caught:
            fetch(url, tmp_path / "missing.npz")
        sentence(caught.value, url, tmp_path / "missing.npz", why, "by hand")


def test_a_full_disk_is_named(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as caught:
        fetch(f"{server.url}/file.npz", tmp_path / "file.npz")
    sentence(caught.value, tmp_path / "file.npz", "No space left on device", "make room")
    assert names(tmp_path) == {"file.npz.part"}


# Data sets


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for path in sorted(folder.rglob("*")):
            content.write(path, path.relative_to(folder.parent))
    return buffer.getvalue()


def tarred(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as content:
        content.add(folder, folder.name)
    return buffer.getvalue()


@pytest.fixture
def origin(server: Server, tmp_path: Path) -> Path:
    """What the server offers as COCO, Food-101 and Aircraft."""
    root = tmp_path / "origin"
    write_coco(root)
    server.files["/food-101.tar.gz"] = tarred(write_food(root))
    server.files["/fgvc-aircraft-2013b.tar.gz"] = tarred(write_aircraft(root).parent)
    for file, part in (("annotations_trainval2017", "annotations"), ("train2017",) * 2, ("val2017",) * 2):
        server.files[f"/{file}.zip"] = zipped(root / "coco" / part)
    return root


@pytest.mark.parametrize("name", ["aircraft", "air", "food101", "coco"])
def test_a_data_set_arrives_whole_and_is_then_left_alone(
    name: str, server: Server, origin: Path, tmp_path: Path
) -> None:
    prepare(name, tmp_path / "data")
    asked = len(server.requested)
    assert asked == len(facts(name).archives)
    prepare(name, tmp_path / "data")
    prepare(name, origin)  # the archive of aircraft will do for air
    assert len(server.requested) == asked
    for split in facts(name).counts:
        ours, theirs = (getattr(readers, name)(root, split) for root in (tmp_path / "data", origin))
        assert ours.fingerprint() == theirs.fingerprint()
        assert ours[0][0].size == (8, 6)
    assert names(tmp_path / "data") == {facts(name).folder}


def test_only_the_missing_part_is_fetched(server: Server, origin: Path, tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "data")
    mine = annotations.with_name("instances_train2017.json")
    mine.write_text(mine.read_text() + "\n")
    annotations.unlink()
    (tmp_path / "data/coco/val2017").rename(tmp_path / "aside")
    (tmp_path / "data/coco/val2017").mkdir()
    prepare("coco", tmp_path / "data")
    assert [path for path, _ in server.requested] == ["/annotations_trainval2017.zip", "/val2017.zip"]
    assert mine.read_text().endswith("\n")  # a file that was there is kept
    assert len(readers.coco(tmp_path / "data", "val2017")) == 4


def test_an_archive_put_there_by_hand_is_used_and_kept(server: Server, origin: Path, tmp_path: Path) -> None:
    by_hand = tmp_path / "data/coco/train2017.zip"
    by_hand.parent.mkdir(parents=True)
    good = server.files.pop("/train2017.zip")
    by_hand.write_bytes(good[:-40])
    with pytest.raises(UserError) as caught:
        prepare("coco", tmp_path / "data")
    sentence(caught.value, by_hand, "is damaged", "delete it")
    assert names(by_hand.parent) == {"train2017.zip", "annotations", "val2017"}
    by_hand.write_bytes(good)
    prepare("coco", tmp_path / "data")
    assert names(by_hand.parent) == {"train2017.zip", "annotations", "val2017", "train2017"}


@pytest.mark.parametrize("content", [b"<html>", b""])
def test_a_page_in_place_of_an_archive(content: bytes, server: Server, tmp_path: Path) -> None:
    server.files["/food-101.tar.gz"] = content
    with pytest.raises(UserError) as caught:
        prepare("food101", tmp_path)
    sentence(caught.value, tmp_path / "food-101.tar.gz")
    assert not (tmp_path / "food-101").exists()


def test_the_published_checksum_is_compared(
    server: Server, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    food = facts("food101")
    monkeypatch.setitem(data_sets(), "food101", replace(food, archives=[replace(food.archives[0], md5="0" * 32)]))
    with pytest.raises(UserError, match=f"{server.url}/food-101.tar.gz has the MD5 .* not 0{{32}}.*deleted"):
        prepare("food101", tmp_path / "data")
    assert names(tmp_path / "data") == set()


def test_several_processes_prepare_the_same_data_set(server: Server, origin: Path, tmp_path: Path) -> None:
    """One fetches, the others wait for it: each archive is asked for once."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare, args=("coco", tmp_path / "data")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(server.requested) == 3
    assert len(readers.coco(tmp_path / "data", "train2017")) == 4


@pytest.mark.parametrize("name", data_sets())
def test_without_download_or_offer_the_reader_says_what_is_missing(name: str, server: Server, tmp_path: Path) -> None:
    prepare(name.upper(), tmp_path / "data", download=False)
    if not facts(name).archives:
        prepare(name, tmp_path / "data")
    assert server.requested == []
    assert not (tmp_path / "data").exists()
    with pytest.raises(UserError) as caught:
        getattr(readers, name)(tmp_path / "data", next(iter(facts(name).counts)))
    sentence(caught.value, tmp_path / "data" / facts(name).folder, facts(name).source, "--data-root")


def test_addresses_and_checksums_are_those_of_torchvision() -> None:
    known: dict[str, tuple[Any, Any]] = {
        **dict.fromkeys(("air", "aircraft"), (FGVCAircraft._URL, None)),
        **{source.__name__.lower(): (source.url, source.tgz_md5) for source in (CIFAR10, CIFAR100)},
        "food101": (Food101._URL, Food101._MD5),
    }
    for name, expected in known.items():
        (archive,) = facts(name).archives
        assert (archive.url, archive.md5) == expected
    assert {name for name in data_sets() if facts(name).archives} == {*known, "coco"}
