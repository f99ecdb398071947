"""`smolora demo`: a page to ask the models of finished runs on."""

from __future__ import annotations

import argparse
import ipaddress
import sys

from ..demo.app import Demo
from ..demo.runs import open_runs
from ..io.files import path_argument

LOOPBACK = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN_DIR", help="folder of a run; several are compared"
    )
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="address to serve on; any other than this machine's own is open to whoever reaches it (default: "
        "%(default)s)",
    )
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if not 0 < args.port < 65536:
        raise ValueError(f"--port must be from 1 to 65535, got {args.port}")
    demo = Demo(open_runs(args.runs))
    blocks = demo.page()
    blocks.launch(server_name=args.host, server_port=args.port, prevent_thread_lock=True, **demo.options())
    if not is_loopback(args.host):
        print(f"Whoever reaches {args.host} can ask and upload; there is no password.", file=sys.stderr)
    print(f"Open {blocks.local_url} in a browser; Ctrl-C ends it.", flush=True)
    try:
        blocks.block_thread()
    finally:
        blocks.close()
    return 0


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
