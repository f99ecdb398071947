"""Files: whole ones, other encodings named, paths as people write them, and locks that go with their process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from smolora.io import files
from smolora.io.files import (
    atomic_write_text,
    has_file,
    locked,
    path_argument,
    read_text,
    surrogate,
    user_path,
    write_json,
)

# ---- writing


def test_a_text_is_utf_8_whatever_the_locale_is(tmp_path):
    path = str(tmp_path / "a")
    code = f"from smolora.io.files import atomic_write_text as w; w({path!r}, 'caf\\u00e9 \\u00b1\\n')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    root = str(Path(__file__).parents[3])
    subprocess.run([sys.executable, "-c", code], env={**environment, "PYTHONPATH": root}, check=True)
    assert (tmp_path / "a").read_bytes() == "café ±\n".encode()


def test_what_a_killed_process_left_is_removed(tmp_path):
    """The name of its process is in the file's; one that still runs keeps its own."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    left = tmp_path / f".{host}.{gone.pid}.0123abcd.a.json"
    running = tmp_path / f".{host}.{os.getpid()}.0123abcd.a.json"
    elsewhere = tmp_path / f".other.{gone.pid}.0123abcd.a.json"
    of_another = tmp_path / f".{host}.{gone.pid}.0123abcd.b.json"
    for path in (left, running, elsewhere, of_another):
        path.write_text("half")
    write_json(tmp_path / "a.json", {"x": 1})
    assert {path.name for path in tmp_path.iterdir()} == {running.name, elsewhere.name, of_another.name, "a.json"}


def test_many_writers_of_one_file(tmp_path):
    """Each finds its own name beside it: the file is always one of theirs, whole."""
    contents = [str(number) * 5000 for number in range(8)]
    threads = [threading.Thread(target=atomic_write_text, args=(tmp_path / "a", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_text() in contents and len(list(tmp_path.iterdir())) == 1


# ---- reading


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("x".encode("utf-16"), r"a\.txt: must be UTF-8, got UTF-16"),
        ("xx".encode("utf-16-le"), "got UTF-16-LE"),
        ("xx".encode("utf-16-be"), "got UTF-16-BE"),
        ("xx".encode("utf-32"), "got UTF-32"),
        ("a\nb\ncafé".encode("latin-1"), r"got the byte 0xe9 in line 3, as Latin-1"),
    ],
)
def test_another_encoding_is_named(tmp_path, content, match):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("content", ["", "x", "é", "Zwölf\n"])
def test_a_byte_order_mark_is_no_text(tmp_path, content):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.txt").write_bytes(content.encode(encoding))
        assert read_text(tmp_path / "a.txt") == content


def test_half_a_character():
    assert surrogate("whole \U0001f600") is None
    assert surrogate("ab\ud83d") == "half a character (the lone surrogate U+D83D at position 2)"


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "nothing", "data:image/png;base64," + "A" * 10_000])
def test_names_that_no_file_can_have(tmp_path, name):
    assert not has_file(tmp_path / name)


# ---- names


def test_home_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_path("~/runs") == "/home/somebody/runs" and str(path_argument("~")) == "/home/somebody"
    assert user_path("./~/runs") == "./~/runs" and user_path("a~b") == "a~b" and user_path("") == ""
    for path in ("$HOME/runs", "runs/${NAME}", "a$"):
        with pytest.raises(ValueError, match=r"no \$ is replaced in it"):
            user_path(path)
    with pytest.raises(ValueError, match=r"there is no home folder of '~nobody-at-all'"):
        user_path("~nobody-at-all/runs")


# ---- locks


def test_a_second_is_refused_and_told_who_has_it(tmp_path):
    path = tmp_path / "folder" / "run.lock"
    with locked(path, "the run"):
        with (
            pytest.raises(BlockingIOError, match=rf"the run is in use by process {os.getpid()} on "),
            locked(path, "the run"),
        ):
            raise AssertionError("not reached")
        assert path.exists()
    assert not path.exists()
    with locked(path, "the run"):
        pass


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), locked(tmp_path / "a.lock", "a"):
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_waiting(tmp_path, capfd):
    """Several wait for one, and each has it alone."""
    inside, most = [], []

    def work():
        with locked(tmp_path / "a.lock", "the data", wait=True):
            inside.append(None)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1] * 6 and not list(tmp_path.iterdir())
    assert "the data is in use by process" in capfd.readouterr().err


def test_a_killed_process_gives_its_lock_back_while_its_workers_live(tmp_path):
    """SIGKILL of the holder; its forked child, as a worker that reads images, is there for longer."""
    code = f"""
import os, signal, sys, time
from smolora.io.files import locked
with locked({str(tmp_path / "a.lock")!r}, "a"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(BlockingIOError, match=f"process {holder.pid} on"), locked(tmp_path / "a.lock", "a"):
            raise AssertionError("not reached")
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        with locked(tmp_path / "a.lock", "a"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    assert fcntl.flock is flock
    with pytest.warns(UserWarning, match=r"a\.lock: its file system has no locks"), locked(tmp_path / "a.lock", "a"):
        pass
