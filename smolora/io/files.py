"""Files: atomic writes, UTF-8 reads, locks against a second process, and paths that people typed."""

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# ------------------------------------------------------------------------------------------------------------- writing


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_tree(folder: Path) -> None:
    """Flush all files under a folder to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fsync_file(path)


def _temporary_beside(path: Path) -> Path:
    """Return an unused name in the same folder, from which a rename to `path` is atomic.

    Removes what killed processes of this machine left under such names.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    for left in path.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(host)}\.(\d+)\.[0-9a-f]{{8}}\.{re.escape(path.name)}", left.name)
        if match is not None and not _is_running(int(match[1])):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    # the suffix stays: libraries choose the format by it
    return path.parent / f".{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}.{path.name}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, which replaces `path` when the block ends.

    An existing file stays until the new one is on disk, and stays for good if the block raises.
    """
    path = Path(path).absolute()
    temporary = _temporary_beside(path)
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike, argument: str = "output") -> Iterator[Path]:
    """Write a folder atomically: yields an empty temporary folder, which becomes `path` when the block ends.

    Args:
        path: a folder that does not exist yet, or is empty.
        argument: the argument's name in errors.

    Raises:
        FileExistsError: `path` is a file, or a folder that is not empty.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{argument} must be a new or empty folder, got {path}, which exists")
    temporary = _temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        fsync_folder(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_write_text(path: str | os.PathLike, content: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode("utf-8"))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file atomically."""
    atomic_write_text(path, json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------- reading


def decode(content: bytes) -> str:
    """Decode UTF-8, without its byte order mark if it has one.

    Raises:
        ValueError: the bytes are in another encoding; the message names it if they start with its byte order mark.
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
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: see `decode`.
    """
    try:
        return decode(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or holds no object.
    """
    path = Path(path)
    require_file(path)
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is broken: no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def require_file(path: Path) -> None:
    """Raise FileNotFoundError unless `path` is a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file, and is {'a folder' if path.is_dir() else 'not there'}")


def has_file(path: Path) -> bool:
    """Return whether `path` is a file; False for a name that no file system takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def surrogate(text: str) -> str | None:
    """Describe the first lone surrogate of a text, for an error message; None if there is none.

    Neither files nor tokenizers take a lone surrogate.
    """
    found = re.search("[\ud800-\udfff]", text)
    if found is None:
        return None
    return f"half a character (the lone surrogate U+{ord(found[0]):04X} at position {found.start()})"


# --------------------------------------------------------------------------------------------------------------- names


def user_path(text: str) -> str:
    """Expand `~` and `~name` in a path that was written in a file.

    Raises:
        ValueError: the path has a `$`, which is not expanded, or there is no such home folder.
    """
    if "$" in text:
        raise ValueError(f"a path is taken as it is written, and no $ is replaced in it: write out {text!r}")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"there is no home folder of {text.partition('/')[0]!r} (a folder of that name is ./{text})")
    return path


def path_argument(text: str) -> Path:
    """Parse a path of the command line; expands `~` where the shell does not, as in `--output=~/runs`."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"there is no home folder of {text.partition('/')[0]!r}, got {text!r}")
    return Path(path)


def join_names(names: Iterable[str], limit: int = 4) -> str:
    """Join the first names in alphabetical order, and the number of the others, for an error message."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


# --------------------------------------------------------------------------------------------------------------- locks

_held: set[int] = set()  # descriptors of this process's locks


def _release_in_child() -> None:
    """Close the locks in a forked child, such as a data loader's worker, which must not keep its parent's alive."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def locked(path: str | os.PathLike, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock against other processes, threads and machines.

    The system releases the locks of a process that ends, however it ends.

    Args:
        path: the lock file; it exists as long as the block runs.
        what: what the lock protects, for messages.
        wait: wait if another process holds the lock, instead of raising.

    Raises:
        BlockingIOError: another process holds the lock; the message names it.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(path, what, wait)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # a forked child has closed it already
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
        os.close(descriptor)  # its holder has just ended and removed the file: try again with the new one


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
