"""Python processes that compile Triton's kernels with the modules of bench/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
# what is compiled is not what this process interprets; and bench/ is found under PYTHONSAFEPATH too
ENVIRONMENT = {
    **os.environ,
    "TRITON_INTERPRET": "0",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "bench"), os.environ.get("PYTHONPATH")])),
}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in bench/."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT / "bench", env=ENVIRONMENT, capture_output=True, text=True
    )
