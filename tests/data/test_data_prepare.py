"""Downloads against a server on this machine: complete, interrupted, damaged, refused; no network where none is due."""

import hashlib
import importlib
import io
import multiprocessing
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_trees import sentence, write_aircraft, write_coco, write_food
from torchvision.datasets import CIFAR10, CIFAR100, FGVCAircraft, Food101

from common.data import aircraft, coco, food101, prepare
from common.data.demo import MARKER
from common.data.published import DATA_SETS
from common.data.readers import READERS
from common.errors import UserError

# import_module, because the function of the same name hides the module as an attribute of common.data.
prepare_module = importlib.import_module("common.data.prepare")


class Server(ThreadingHTTPServer):
    """Serves `files`; `limit` cuts each answer after so many bytes; `requests` remembers (path, Range header)."""

    files: dict[str, bytes]
    requests: list[tuple[str, str | None]]
    limit: int | None = None
    ranges = True
    url: str


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:  # torchvision asks for redirects this way
        self.send_response(200 if self.path in self.server.files else 404)
        self.end_headers()

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.limit])

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(prepare_module, "COCO_HOST", server.url)
        monkeypatch.setattr(FGVCAircraft, "_URL", f"{server.url}/aircraft.tar.gz")
        monkeypatch.setattr(Food101, "_URL", f"{server.url}/food-101.tar.gz")
        monkeypatch.setattr(Food101, "_MD5", None)
        for source in (CIFAR10, CIFAR100):
            monkeypatch.setattr(source, "url", f"{server.url}/{source.filename}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


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


def offer_coco(server: Server, folder: Path) -> None:
    write_coco(folder)
    for path, part in (
        ("/annotations/annotations_trainval2017.zip", "annotations"),
        ("/zips/train2017.zip", "train2017"),
        ("/zips/val2017.zip", "val2017"),
    ):
        server.files[path] = zipped(folder / "coco" / part)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# COCO


def test_coco_arrives_whole_and_leaves_nothing_else(server: Server, tmp_path: Path) -> None:
    offer_coco(server, tmp_path / "origin")
    prepare("coco", tmp_path / "data")
    expected = coco(tmp_path / "origin", "train2017").fingerprint()
    assert coco(tmp_path / "data", "train2017").fingerprint() == expected
    assert coco(tmp_path / "data", "val2017")[0][0].size == (8, 6)
    assert names(tmp_path / "data/coco") == {"annotations", "train2017", "val2017"}
    assert len(server.requests) == 3


def test_a_complete_tree_needs_no_network(server: Server, tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_food(tmp_path)
    write_aircraft(tmp_path)
    for name in ("coco", "food101", "aircraft"):
        for download in (True, False):
            prepare(name, tmp_path, download=download)
    assert server.requests == []


def test_only_the_missing_part_is_fetched(server: Server, tmp_path: Path) -> None:
    offer_coco(server, tmp_path / "origin")
    annotations = write_coco(tmp_path / "data")
    mine = annotations.with_name("instances_train2017.json")
    mine.write_text(mine.read_text() + "\n")
    annotations.unlink()
    (tmp_path / "data/coco/val2017").rename(tmp_path / "aside")
    (tmp_path / "data/coco/val2017").mkdir()
    prepare("coco", tmp_path / "data")
    assert [path for path, _ in server.requests] == ["/annotations/annotations_trainval2017.zip", "/zips/val2017.zip"]
    assert mine.read_text().endswith("\n")  # a file that was there is kept
    assert len(coco(tmp_path / "data", "val2017")) == 4


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path, ranges: bool) -> None:
    offer_coco(server, tmp_path / "origin")
    server.ranges = ranges
    content = server.files["/annotations/annotations_trainval2017.zip"]
    target = tmp_path / "data/coco"
    target.mkdir(parents=True)
    (target / "annotations_trainval2017.zip.part").write_bytes(content[:500])
    prepare("coco", tmp_path / "data")
    assert server.requests[0] == ("/annotations/annotations_trainval2017.zip", "bytes=500-")
    assert len(coco(tmp_path / "data", "train2017")) == 4
    assert names(target) == {"annotations", "train2017", "val2017"}


def test_a_connection_that_breaks_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    offer_coco(server, tmp_path / "origin")
    server.limit = max(len(content) for content in server.files.values()) // 2 + 1
    prepare("coco", tmp_path / "data")
    assert any(wanted for _, wanted in server.requests)
    assert len(coco(tmp_path / "data", "train2017")) == 4


def test_an_archive_put_there_by_hand_is_used(server: Server, tmp_path: Path) -> None:
    offer_coco(server, tmp_path / "origin")
    by_hand = tmp_path / "data/coco/train2017.zip"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(server.files.pop("/zips/train2017.zip"))
    prepare("coco", tmp_path / "data")
    assert len(coco(tmp_path / "data", "train2017")) == 4
    assert [path.name for path in by_hand.parent.glob("*.zip")] == ["train2017.zip"]  # what was fetched is removed


def test_a_damaged_archive_put_there_by_hand_is_left_to_the_user(server: Server, tmp_path: Path) -> None:
    offer_coco(server, tmp_path / "origin")
    by_hand = tmp_path / "data/coco/train2017.zip"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(server.files.pop("/zips/train2017.zip")[:-40])
    with pytest.raises(UserError, match=r"train2017\.zip is damaged .*delete it"):
        prepare("coco", tmp_path / "data")
    assert by_hand.exists()


def test_a_damaged_archive_is_removed_before_anything_is_unpacked(server: Server, tmp_path: Path) -> None:
    offer_coco(server, tmp_path / "origin")
    path = "/zips/val2017.zip"
    good = server.files[path]
    position = good.index(b"JFIF")
    server.files[path] = good[:position] + b"????" + good[position + 4 :]
    with pytest.raises(UserError) as caught:
        prepare("coco", tmp_path / "data")
    sentence(caught.value, tmp_path / "data/coco/val2017.zip", "damaged", "run again")
    assert names(tmp_path / "data/coco") == {"annotations"}
    server.files[path] = good
    prepare("coco", tmp_path / "data")
    assert len(coco(tmp_path / "data", "val2017")) == 4


def test_http_errors_and_no_connection(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server.url}/annotations/annotations_trainval2017.zip"
    with pytest.raises(UserError) as caught:
        prepare("coco", tmp_path)
    assert "\n" not in str(caught.value)
    for part in (url, tmp_path / "coco", "404", "by hand"):
        assert str(part) in str(caught.value)
    monkeypatch.setattr(prepare_module, "COCO_HOST", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError) as caught:
        prepare("coco", tmp_path)
    assert "\n" not in str(caught.value)
    for part in ("http://127.0.0.1:9/annotations", tmp_path / "coco", "by hand"):
        assert str(part) in str(caught.value)


@pytest.mark.parametrize("name", ["aircraft", "coco", "food101"])
def test_without_download_a_missing_tree_is_one_sentence(server: Server, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(name, tmp_path / "data", download=False)
    sentence(caught.value, tmp_path / "data", "is not there", "--no-download")
    assert server.requests == []
    assert not (tmp_path / "data").exists()


def test_a_damaged_tree_is_left_to_the_user(server: Server, tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_food(tmp_path)
    images = [tmp_path / "coco/val2017/000000000005.jpg", tmp_path / "food-101/images/ramen/1.jpg"]
    for name, image in zip(("coco", "food101"), images, strict=True):
        image.unlink()
        with pytest.raises(UserError) as caught:
            prepare(name, tmp_path)
        sentence(caught.value, image.parent, "lacks 1", "remove it")
    assert server.requests == []


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare("imagenet", tmp_path)
    sentence(caught.value, "'imagenet'", ", ".join(sorted(DATA_SETS)))


def test_several_processes_prepare_the_same_data_set(server: Server, tmp_path: Path) -> None:
    """One fetches, the others wait for it: each archive is asked for once."""
    offer_coco(server, tmp_path / "origin")
    (tmp_path / "data").mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare, args=("coco", tmp_path / "data")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(path for path, _ in server.requests) == sorted(server.files)
    assert names(tmp_path / "data/coco") == {"annotations", "train2017", "val2017"}
    assert len(coco(tmp_path / "data", "train2017")) == 4


# What torchvision knows


@pytest.mark.parametrize("name", ["aircraft", "food101"])
def test_a_tar_file_is_downloaded_and_unpacked(server: Server, tmp_path: Path, name: str) -> None:
    write_aircraft(tmp_path / "origin")
    write_food(tmp_path / "origin")
    server.files["/aircraft.tar.gz"] = tarred(tmp_path / "origin/fgvc-aircraft-2013b")
    server.files["/food-101.tar.gz"] = tarred(tmp_path / "origin/food-101")
    prepare(name, tmp_path / "data")
    reader = {"aircraft": aircraft, "food101": food101}[name]
    assert reader(tmp_path / "data", "test").fingerprint() == reader(tmp_path / "origin", "test").fingerprint()
    assert names(tmp_path / "data") == {"fgvc-aircraft-2013b" if name == "aircraft" else "food-101"}


def test_an_interrupted_download_of_a_tar_file_goes_on(server: Server, tmp_path: Path) -> None:
    write_food(tmp_path / "origin")
    server.files["/food-101.tar.gz"] = content = tarred(tmp_path / "origin/food-101")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/food-101.tar.gz.part").write_bytes(content[:500])
    prepare("food101", tmp_path / "data")
    assert server.requests == [("/food-101.tar.gz", "bytes=500-")]
    assert names(tmp_path / "data") == {"food-101"}


@pytest.mark.parametrize("kind", ["absent", "cut", "page"])
def test_a_failing_download_of_a_tar_file_leaves_nothing(server: Server, tmp_path: Path, kind: str) -> None:
    write_aircraft(tmp_path / "origin")
    content = tarred(tmp_path / "origin/fgvc-aircraft-2013b")
    if kind != "absent":
        server.files["/aircraft.tar.gz"] = content[: len(content) // 2] if kind == "cut" else b"<html>"
    with pytest.raises(UserError) as caught:
        prepare("aircraft", tmp_path / "data")
    file = tmp_path / "data/aircraft.tar.gz"
    said = (f"{server.url}/aircraft.tar.gz", "404", "by hand") if kind == "absent" else ("damaged", "run again")
    assert "\n" not in str(caught.value)
    for part in (file, *said):
        assert str(part) in str(caught.value)
    assert names(tmp_path / "data") == set()
    server.files["/aircraft.tar.gz"] = content
    prepare("aircraft", tmp_path / "data")
    assert len(aircraft(tmp_path / "data", "train")) == 2


def test_the_published_checksum_is_compared(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_food(tmp_path / "origin")
    server.files["/food-101.tar.gz"] = content = tarred(tmp_path / "origin/food-101")
    monkeypatch.setattr(Food101, "_MD5", "0" * 32)
    with pytest.raises(UserError, match=f"has md5 {hashlib.md5(content).hexdigest()} instead of 0{{32}}.* deleted"):
        prepare("food101", tmp_path / "data")
    assert names(tmp_path / "data") == set()


def test_air_is_the_same_download_under_its_own_name(server: Server, tmp_path: Path) -> None:
    write_aircraft(tmp_path / "origin")
    server.files["/aircraft.tar.gz"] = tarred(tmp_path / "origin/fgvc-aircraft-2013b")
    prepare("air", tmp_path / "data")
    assert names(tmp_path / "data") == {"air"}
    assert len(READERS["air"](tmp_path / "data", "train")) == 4
    server.requests.clear()
    prepare("air", tmp_path / "origin")  # the archive of aircraft will do
    assert server.requests == []


@pytest.mark.usefixtures("demo_cifar_is_published")
@pytest.mark.parametrize("source", [CIFAR10, CIFAR100])
def test_cifar_downloads(
    server: Server, tmp_path: Path, demo_root: Path, source: type[CIFAR10], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = source.__name__.lower()
    origin = tmp_path / "origin" / source.base_folder
    shutil.copytree(demo_root / DATA_SETS[name].folder, origin, ignore=shutil.ignore_patterns(MARKER))
    server.files[f"/{source.filename}"] = content = tarred(origin)
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(content).hexdigest())
    prepare(name, tmp_path / "data")
    assert {path for path, _ in server.requests} == {f"/{source.filename}"}
    server.requests.clear()
    prepare(name, tmp_path / "data")
    assert server.requests == []
    assert names(tmp_path / "data") == {name}
    assert names(tmp_path / "data" / name) == {source.base_folder}
    assert READERS[name](tmp_path / "data", "test").fingerprint() == READERS[name](demo_root, "test").fingerprint()


def test_a_damaged_cifar_download_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.files[f"/{CIFAR10.filename}"] = b"<html>"
    with pytest.raises(UserError) as caught:
        prepare("cifar10", tmp_path)
    for part in (f"{server.url}/{CIFAR10.filename}", CIFAR10.tgz_md5, "deleted"):
        assert part in str(caught.value)
    assert names(tmp_path / "cifar10") == set()


@pytest.mark.parametrize("name", sorted(name for name, facts in DATA_SETS.items() if not facts.downloads))
def test_what_nobody_offers_is_placed_by_hand(server: Server, tmp_path: Path, name: str) -> None:
    """There is nothing to prepare: the reader says what is missing, and where to get it."""
    prepare(name.upper(), tmp_path)
    with pytest.raises(UserError) as caught:
        READERS[name](tmp_path, next(iter(DATA_SETS[name].counts)))
    text = sentence(caught.value, tmp_path / DATA_SETS[name].folder, "is not there", DATA_SETS[name].source)
    assert "--no-download" not in text
    assert server.requests == []


def test_demo_data_needs_no_download(server: Server, demo_root: Path) -> None:
    for name in DATA_SETS:
        prepare(name, demo_root, download=False)
    assert server.requests == []
