"""Reading data files that come from strangers: gzip, idx, folders, tar and zip archives.

Nothing is ever extracted to disk: members are read in memory, and their names only say which class and split
they belong to. Everything has a limit, checked before the memory is taken, and every refusal is a
`ValueError` or `FileNotFoundError` that names the file and what to do.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import math
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

__all__ = [
    "ARCHIVES",
    "MAX_FILE",
    "MAX_TOTAL",
    "find_archive",
    "opened",
    "read_file",
    "read_idx",
    "read_lines",
    "read_members",
    "read_text",
    "resolve",
]

MAX_FILE = 64 << 20
"""Bytes of one image file."""
MAX_TOTAL = 4 << 30
"""Bytes of all files of an archive, of one decompressed file, and of all decoded images."""
MAX_MEMBERS = 4_000_000
"""Entries of an archive."""

GZIP = b"\x1f\x8b"
ZIP = b"PK"
IMAGES = (".jpg", ".jpeg", ".png")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
CHUNK = 1 << 20

Member = tuple[str, int, bytes | None]
"""Name (a folder's ends in "/"), size in bytes, and the content of an image, None of anything else."""


# Files


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A stream over the content of a regular file, unpacked when its first bytes say that it is gzip.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged gzip, while the stream is read.
    """
    if not path.is_file():  # also refuses pipes and devices, which could block for ever
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
        file.seek(0)
        if not packed:
            yield file
            return
        try:
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream  # type: ignore[misc]  # GzipFile has all that IO[bytes] needs here
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f"{path}: damaged or incomplete gzip file ({e}); download it again") from e


def read_up_to(stream: IO[bytes], count: int) -> bytearray:
    """At most `count` bytes, in pieces, so that memory follows what is really there."""
    data = bytearray()
    while len(data) < count:
        piece = stream.read(min(CHUNK, count - len(data)))
        if not piece:
            break
        data += piece
    return data


def read_file(path: Path, limit: int = MAX_TOTAL) -> bytes:
    """The whole content, unpacked when it is gzip.

    Raises:
        FileNotFoundError, ValueError: absent, damaged, or longer than `limit` bytes.
    """
    with opened(path) as stream:
        data = read_up_to(stream, limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: more than {limit:,} bytes after unpacking; split the file")
    return bytes(data)


def read_text(path: Path, limit: int = 1 << 30) -> str:
    """A UTF-8 text, plain or gzip.

    Raises:
        FileNotFoundError, ValueError: see `read_file`; or not UTF-8.
    """
    try:
        return read_file(path, limit).decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start} is not UTF-8; convert the file, e.g. with iconv -t utf-8") from e


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text, plain or gzip; only a line feed ends a line.

    Raises:
        FileNotFoundError, ValueError: see `read_text`; or empty.
    """
    lines = read_text(path).split("\n")
    lines = lines if lines[-1] else lines[:-1]
    if not lines:
        raise ValueError(f"{path}: no lines in it")
    return lines


def resolve(folder: Path, *names: str) -> Path:
    """The first of `names` in `folder` that exists, plain or with `.gz`.

    Raises:
        FileNotFoundError: the folder or all of the names are absent.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{folder}: needs a file {names[0]} or {names[0]}.gz")


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """An idx file of bytes, plain or gzip, as an array of `ndim` dimensions (uint8).

    Layout: 0, 0, the type (8 = unsigned byte), the number of dimensions, each size as a big-endian 32-bit
    number, then the values.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another magic number, impossible sizes, or more or fewer bytes than the sizes say.
    """
    with opened(path) as stream:
        magic = bytes(read_up_to(stream, 4))
        if magic != bytes((0, 0, 8, ndim)):
            want = bytes((0, 0, 8, ndim)).hex()
            raise ValueError(
                f"{path}: starts with {magic.hex() or 'nothing'} where an idx file of {ndim}-dimensional "
                f"bytes starts with {want}; check that images and labels are not swapped"
            )
        header = bytes(read_up_to(stream, 4 * ndim))
        if len(header) < 4 * ndim:
            raise ValueError(f"{path}: ends inside its header; download it again")
        sizes = tuple(int(n) for n in np.frombuffer(header, ">i4"))
        if min(sizes) < 1 or math.prod(sizes) > MAX_TOTAL:
            raise ValueError(f"{path}: impossible sizes {sizes} in the header (limit {MAX_TOTAL:,} bytes)")
        count = math.prod(sizes)
        body = read_up_to(stream, count + 1)  # one more: shows trailing data, makes gzip check its checksum
    if len(body) != count:
        found = "more" if len(body) > count else f"only {len(body):,}"
        raise ValueError(f"{path}: the header promises {count:,} bytes and there are {found}; download it again")
    return np.frombuffer(body, np.uint8).reshape(sizes)


# Folders and archives


def clean_name(path: Path, name: str) -> str:
    """A member's name as `a/b/c`.

    Raises:
        ValueError: an absolute name, one with `..`, or one that is not a plain relative path.
    """
    parts = PurePosixPath(name).parts
    if not name or name.startswith("/") or ".." in parts or re.search(r"^[A-Za-z]:|[\\\0]", name):
        raise ValueError(f"{path}: member {name!r} points outside of the archive; do not trust this file")
    return "/".join(parts)


def ignored(name: str) -> bool:
    """Hidden files, and what some systems add to archives."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def is_image(name: str) -> bool:
    """Whether the name is one of an image that counts."""
    return name.lower().endswith(IMAGES) and not ignored(name)


def check_size(path: Path, name: str, size: int) -> None:
    """Refuse a size that no image file has.

    Raises:
        ValueError: negative, or more than `MAX_FILE`.
    """
    if not 0 <= size <= MAX_FILE:
        raise ValueError(f"{path}: member {name!r} claims {size:,} bytes (limit {MAX_FILE:,}); remove it")


def header_of(path: Path) -> type[tarfile.TarInfo]:
    """A reader of tar headers that refuses what `tarfile` passes over.

    Every header, those of long names and extended attributes too, has its size checked before its body is
    read; a damaged header or a missing end marker, which `tarfile` takes for the end of the archive, is an
    error.
    """

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
            try:
                header = super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as e:
                if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                    raise  # the end marker
                raise ValueError(f"{path}: damaged or incomplete tar file ({e}); download it again") from e
            check_size(path, header.name, header.size)
            return header

    return Header


def tar_members(path: Path) -> Iterator[Member]:
    """The members of a tar file, plain or gzip; links, devices and sparse files are refused."""
    with opened(path) as stream:
        try:
            # "r|" reads forwards only, so no header can send the reader back
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=header_of(path)) as archive:
                for member in archive:
                    name = clean_name(path, member.name)
                    if member.issym() or member.islnk():
                        raise ValueError(f"{path}: member {name!r} is a link; pack the files themselves")
                    if not (member.isfile() or member.isdir()) or member.issparse():
                        raise ValueError(f"{path}: member {name!r} is neither a file nor a folder; remove it")
                    check_size(path, name, member.size)  # once more: an extended header may have replaced it
                    body = archive.extractfile(member) if member.isfile() and is_image(name) else None
                    yield (name + "/" if member.isdir() else name), member.size, body.read() if body else None
        except (tarfile.TarError, RecursionError) as e:  # a chain of extended headers is read by recursion
            raise ValueError(f"{path}: damaged or incomplete tar file ({e}); download it again") from e
        if len(read_up_to(stream, MAX_FILE)) == MAX_FILE:  # gzip checks its checksum at the end only
            raise ValueError(f"{path}: data after the end of the tar file; pack the archive again")


def zip_members(path: Path) -> Iterator[Member]:
    """The members of a zip file; links, devices and encrypted files are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = clean_name(path, member.filename)
                kind = stat.S_IFMT(member.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise ValueError(f"{path}: member {name!r} is a link or a device; pack the files themselves")
                if member.flag_bits & 1:
                    raise ValueError(f"{path}: member {name!r} is encrypted; unpack it and give the folder")
                check_size(path, name, member.file_size)
                wanted = not member.is_dir() and is_image(name)
                yield (
                    (name + "/" if member.is_dir() else name),
                    member.file_size,
                    archive.read(member) if wanted else None,
                )
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        struct.error,
        EOFError,
        OSError,
        NotImplementedError,
    ) as e:
        raise ValueError(f"{path}: damaged or unsupported zip file ({e}); download it again") from e


def folder_members(path: Path) -> Iterator[Member]:
    """The members of a folder; linked folders are not entered."""
    for child in sorted(path.rglob("*")):
        name = child.relative_to(path).as_posix()
        if child.is_dir():
            yield name + "/", 0, None
        elif is_image(name):
            size = child.stat().st_size
            check_size(path, name, size)
            with opened(child) as stream:
                yield name, size, bytes(read_up_to(stream, MAX_FILE))


def find_archive(path: Path) -> Path:
    """The archive or class folder that `path` means: itself, or the one archive in a folder without folders.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: several archives to choose from.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    children = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
    archives = [child for child in children if child.is_file() and child.name.lower().endswith(ARCHIVES)]
    if any(child.is_dir() for child in children):
        return path
    if not archives:
        raise FileNotFoundError(f"{path}: neither class folders nor an archive ({', '.join(ARCHIVES)}) in it")
    if len(archives) > 1:
        raise ValueError(f"{path}: {len(archives)} archives ({', '.join(a.name for a in archives)}); name one of them")
    return archives[0]


def read_members(path: Path) -> tuple[dict[str, bytes], set[str]]:
    """The undecoded images of a folder, tar or zip by name, and the names of all folders.

    Raises:
        FileNotFoundError, ValueError: absent, damaged, hostile or too large.
    """
    if path.is_dir():
        members = folder_members(path)
    else:
        with path.open("rb") as file:
            members = zip_members(path) if file.read(2) == ZIP else tar_members(path)
    files: dict[str, bytes] = {}
    folders: set[str] = set()
    total = 0
    for count, (name, size, content) in enumerate(members):
        total += size
        if count >= MAX_MEMBERS or total > MAX_TOTAL:
            raise ValueError(f"{path}: more than {MAX_MEMBERS:,} members or {MAX_TOTAL:,} bytes; use a part of them")
        if name.endswith("/") and name != "/" and not ignored(name):
            folders.add(name[:-1])
        if content is None:
            continue
        if name in files:
            raise ValueError(f"{path}: member {name!r} appears twice; pack the archive again")
        files[name] = content
    if not files:
        raise ValueError(f"{path}: no images ({', '.join(IMAGES)}) in it")
    return files, folders
