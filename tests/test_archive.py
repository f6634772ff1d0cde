"""common.data.archive: what is unpacked of good archives, and that nothing is of bad ones."""

import io
import os
import random
import shutil
import stat
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from common.data import archive as archive_module
from common.data.archive import unpack
from common.errors import UserError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_zip(path: Path, members: list[tuple[str, bytes]], kind: int = 0) -> Path:
    """`kind`, such as stat.S_IFLNK, is that of the last member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as content, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile's own, of names that are there twice
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o777) << 16 if name == members[-1][0] else 0
            content.writestr(info, data, zipfile.ZIP_DEFLATED)
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> Path:
    """`kind`, such as tarfile.SYMTYPE, is that of the last member."""
    with tarfile.open(path, "w:gz") as content:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.mode, info.uid, info.size = 0o6777, 12345, len(data)
            if name == members[-1][0] and kind != tarfile.REGTYPE:
                info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            content.addfile(info, io.BytesIO(data))
    return path


WRITERS: dict[str, Any] = {"a.zip": write_zip, "a.tar.gz": write_tar}
OUTSIDE = (
    *("../evil.jpg", "/evil.jpg", "//evil.jpg", "images/../../evil.jpg", "images/.."),
    *("..\\evil.jpg", "C:\\evil.jpg", "C:evil.jpg"),
)
SPECIAL: list[tuple[str, Any]] = [
    *(("a.zip", kind) for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK)),
    *(
        ("a.tar.gz", kind)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
    ),
]
AGAIN = ("images/good.jpg", "images/GOOD.jpg", "./images/good.jpg", "images//good.jpg")
GOOD = ("images/good.jpg", b"1" * 1000)


def refused(path: Path, *parts: object) -> str:
    """Unpacking the archive ends in a sentence, and nothing is there but the archive."""
    with pytest.raises(UserError) as caught:
        unpack(path, "images", path.parent / "images")
    assert names(path.parent) <= {path.name}
    text = str(caught.value)
    assert "\n" not in text
    for part in (path, *parts):
        assert str(part) in text, text
    return text


@pytest.mark.parametrize("name", WRITERS)
def test_plain_files_are_unpacked_with_ordinary_rights(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, [GOOD, ("images/é x/2.jpg", b"2"), ("other", b"3")])
    before = os.umask(0o027)
    try:
        unpack(path, "images", tmp_path / "here")
    finally:
        os.umask(before)
    assert names(tmp_path) == {name, "here"}  # what lies beside the folder stays in the archive
    assert (tmp_path / "here/good.jpg").read_bytes() == GOOD[1]
    assert (tmp_path / "here/é x/2.jpg").read_bytes() == b"2"
    status = (tmp_path / "here/good.jpg").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o640, os.getuid())


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("member", OUTSIDE)
def test_members_outside_are_refused(tmp_path: Path, name: str, member: str) -> None:
    text = refused(WRITERS[name](tmp_path / name, [GOOD, (member, b"2")]), "not unpacked", "elsewhere")
    assert repr(member) in text
    assert names(tmp_path) == {name}  # kept, to be looked at
    assert not (tmp_path.parent / "evil.jpg").exists()


@pytest.mark.parametrize(("name", "kind"), SPECIAL)
def test_links_and_devices_are_refused(tmp_path: Path, name: str, kind: Any) -> None:
    refused(
        WRITERS[name](tmp_path / name, [GOOD, ("images/odd.jpg", b"/etc/passwd")], kind), "images/odd.jpg", "a link"
    )
    assert names(tmp_path) == {name}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("again", AGAIN)
def test_a_name_that_is_there_twice_is_refused(tmp_path: Path, name: str, again: str) -> None:
    refused(WRITERS[name](tmp_path / name, [GOOD, (again, b"2")]), repr(again), "there twice")


@pytest.mark.parametrize("name", WRITERS)
def test_a_bomb_is_refused_before_it_is_inflated(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, [("images/0.bin", b"0"), ("images/1.bin", bytes(70 << 20))])
    assert path.stat().st_size < 100_000
    written = 0
    copy = shutil.copyfileobj

    def counted(source: Any, file: Any, length: int) -> None:
        nonlocal written
        copy(source, file, length)
        written += file.tell()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive_module.shutil, "copyfileobj", counted)
        refused(path, "images/1.bin", "more than 67,108,864 bytes")
    assert written == 1


def test_a_zip_file_that_lies_about_its_sizes_is_damaged(tmp_path: Path) -> None:
    """The directory at its end says 10 bytes of a member that inflates to 1,000: no more than 10 are ever inflated."""
    path = write_zip(tmp_path / "a.zip", [GOOD])
    content = bytearray(path.read_bytes())
    size = content.index(b"PK\x01\x02") + 24
    assert int.from_bytes(content[size : size + 4], "little") == 1000
    content[size : size + 4] = (10).to_bytes(4, "little")
    path.write_bytes(content)
    refused(path, "damaged", "removed")
    assert not path.exists()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["page", "empty", *range(20)])
def test_what_is_cut_or_no_archive_is_removed(tmp_path: Path, name: str, kind: Any) -> None:
    path = WRITERS[name](tmp_path / name, [GOOD, ("images/noise.jpg", random.Random(0).randbytes(5000))])
    whole = path.read_bytes()
    cut = whole[: random.Random(kind).randrange(1, len(whole))]
    path.write_bytes({"page": b"<html>404</html>", "empty": b""}.get(kind, cut))
    refused(path, "damaged", "removed")
    assert not path.exists()


@pytest.mark.parametrize("name", WRITERS)
def test_a_changed_byte_is_found_or_changes_nothing(tmp_path: Path, name: str) -> None:
    """300 seeded places: what is unpacked is what was packed, or there is a sentence; never anything else."""
    members = [GOOD, ("images/noise.jpg", random.Random(0).randbytes(2000))]
    whole = WRITERS[name](tmp_path / name, members).read_bytes()
    choice, unpacked, sentences = random.Random(1), 0, list[str]()
    for _ in range(300):
        changed = bytearray(whole)
        changed[choice.randrange(len(whole))] ^= 1 << choice.randrange(8)
        (tmp_path / name).write_bytes(changed)
        try:
            unpack(tmp_path / name, "images", tmp_path / "images")
        except UserError as error:
            sentences.append(str(error))
            assert names(tmp_path) <= {name}
            continue
        unpacked += 1
        contents = sorted(path.read_bytes() for path in (tmp_path / "images").iterdir())
        # A zip file says names and flags twice, without a checksum: a changed one may be another name.
        assert contents == sorted(data for _, data in members) or len(contents) < 2
        shutil.rmtree(tmp_path / "images")
    assert unpacked < 200
    assert not any("\n" in sentence for sentence in sentences)


@pytest.mark.parametrize("name", WRITERS)
def test_unpacking_stops_before_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = WRITERS[name](tmp_path / name, [GOOD])
    usage = archive_module.shutil.disk_usage(tmp_path)._replace(free=999)
    monkeypatch.setattr(archive_module.shutil, "disk_usage", lambda _: usage)
    refused(path, "999 bytes", "make room")
    assert names(tmp_path) == {name}


@pytest.mark.parametrize("name", WRITERS)
def test_a_failing_disk_leaves_nothing_half_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = WRITERS[name](tmp_path / name, [("images/1.jpg", b"1"), ("images/2.jpg", b"2")])
    copy = shutil.copyfileobj

    def fail(source: Any, file: Any, length: int) -> None:
        if file.name.endswith("2.jpg"):
            raise OSError(28, "No space left on device")
        copy(source, file, length)

    with monkeypatch.context() as patch:
        patch.setattr(archive_module.shutil, "copyfileobj", fail)
        refused(path, "No space left")
    assert names(tmp_path) == {name}
    unpack(path, "images", tmp_path / "images")


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_without_the_folder(tmp_path: Path, name: str) -> None:
    refused(WRITERS[name](tmp_path / name, [("other/1.jpg", b"1")]), "no folder images")


def test_what_a_killed_process_had_unpacked_is_cleared_away(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", [GOOD])
    (tmp_path / ".unpack-images/images").mkdir(parents=True)
    (tmp_path / ".unpack-images/images/half.jpg").write_bytes(b"half")
    unpack(path, "images", tmp_path / "images")
    assert names(tmp_path) == {"a.tar.gz", "images"}
    assert names(tmp_path / "images") == {"good.jpg"}
