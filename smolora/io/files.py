"""Files: written as a whole or not at all, read as UTF-8, kept from a second process, named by people."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# ------------------------------------------------------------------------------------------------------------- writing


def sync_folder(folder: Path) -> None:
    """See that a folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """See that a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def settle(folder: Path) -> None:
    """See that all files under a folder are on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync_file(path)


def _beside(path: Path) -> Path:
    """A name that nobody uses, in the same folder, so that renaming it to `path` is one step of the file system.

    What killed processes of this machine left under such names is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    for left in path.parent.iterdir():
        of = re.fullmatch(rf"\.{re.escape(host)}\.(\d+)\.[0-9a-f]{{8}}\.{re.escape(path.name)}", left.name)
        if of is not None and not _runs(int(of[1])):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    # the suffix stays: it may say what is written
    return path.parent / f".{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}.{path.name}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file as a whole or not at all: yields another name for it, which replaces `path` when the block ends.

    What stood there before stays until the new file is on disk, and for good if the block raises.
    """
    path = Path(path).absolute()
    temporary = _beside(path)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike, argument: str = "output") -> Iterator[Path]:
    """Write a folder as a whole or not at all: yields an empty folder that becomes `path` when the block ends.

    Args:
        path: a folder that does not exist yet, or is empty.
        argument: what an error calls it.

    Raises:
        FileExistsError: there is something at `path`.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{argument} must be a new or empty folder, got {path}, which exists")
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        settle(temporary)
        sync_folder(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path: str | os.PathLike, content: str) -> None:
    """Write a text file in UTF-8, as a whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode("utf-8"))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file as a whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------- reading


def decode(content: bytes) -> str:
    """UTF-8 as text; a byte order mark in front is no part of it.

    Raises:
        ValueError: it is in another encoding, which is named where it can be told.
    """
    encoding = json.detect_encoding(content[:4])  # a byte order mark, or where the zeros are
    if content and encoding not in ("utf-8", "utf-8-sig"):
        raise ValueError(f"must be UTF-8, got {encoding.upper()}: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"must be UTF-8, got the byte 0x{content[error.start]:02x} in line {line}, as Latin-1 or a "
            "Windows code page may have it: save it as UTF-8"
        ) from error


def read_text(path: str | os.PathLike) -> str:
    """A text file in UTF-8, with or without a byte order mark; see `decode`."""
    try:
        return decode(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def has_file(path: Path) -> bool:
    """Whether there is a file of that name; no name that could be written down is an error."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or not to be had
        return False


def surrogate(text: str) -> str | None:
    """What is said of half a character in a text, which no file and no tokenizer takes; None for a text without."""
    found = re.search("[\ud800-\udfff]", text)
    if found is None:
        return None
    return f"half a character (the lone surrogate U+{ord(found[0]):04X} at position {found.start()})"


# --------------------------------------------------------------------------------------------------------------- names


def user_path(text: str) -> str:
    """A path as it was written in a file: `~` and `~name` are home folders.

    Raises:
        ValueError: it has a `$`, which would not be replaced, or no such home folder is known.
    """
    if "$" in text:
        raise ValueError(f"a path is taken as it is written, and no $ is replaced in it: write out {text!r}")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"there is no home folder of {text.partition('/')[0]!r} (a folder of that name is ./{text})")
    return path


def path_argument(text: str) -> Path:
    """A path of the command line: `~` is the home folder, also where the shell leaves it (`--output=~/runs`)."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"there is no home folder of {text.partition('/')[0]!r}, got {text!r}")
    return Path(path)


# --------------------------------------------------------------------------------------------------------------- locks

_held: set[int] = set()  # descriptors of this process's locks


def _let_go() -> None:
    """A forked child (a worker that reads images) does not keep its parent's locks alive."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(path: str | os.PathLike, what: str, *, wait: bool = False) -> Iterator[None]:
    """Keep others from doing the same at the same time: other processes, other machines, other threads.

    A process that ends in whatever way gives its locks back.

    Args:
        path: the lock file, which is there as long as the block lasts.
        what: what it is for, as an error says it.
        wait: wait for another that has it; else that is an error.

    Raises:
        BlockingIOError: another has it; the message says who.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(path, what, wait)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not so in a forked child
            _held.remove(descriptor)
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(path: Path, what: str, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
                if not wait:
                    raise BlockingIOError(
                        f"{what} is in use by {owner}: wait for its end, or name another output"
                    ) from error
                print(f"{what} is in use by {owner}: waiting for its end", file=sys.stderr, flush=True)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            warnings.warn(f"{path}: its file system has no locks ({error}): start nothing twice there", stacklevel=4)
        if _is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)  # the file of one that has just ended: there is another now


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
