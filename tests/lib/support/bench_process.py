"""Python processes that compile Triton's kernels with the modules of bench/."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from support.ptx import worker

BENCH = Path(__file__).parents[3] / "bench"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of bench/, or `-c` and code, in a process of its own.

    It is a fork of the worker that compiles kernels: to import torch and peft takes longer than most of what is run.
    """
    return worker.run(_forked, arguments)


def _forked(arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    import smolora  # noqa: F401  # once for all children

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os._exit(_main(arguments, out.fileno(), err.fileno()))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(arguments, status, out.read(), err.read())


def _main(arguments: tuple[str, ...], out: int, err: int) -> int:
    """Run as `python ARGUMENTS` in bench/, and give its exit status."""
    os.dup2(out, 1), os.dup2(err, 2)
    os.chdir(BENCH)
    sys.path.insert(0, str(BENCH))
    multiprocessing.set_start_method("fork", force=True)  # the worker's would start its program again
    status: int | str | None = 0
    try:
        if arguments[0] == "-c":
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)
