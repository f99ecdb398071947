"""Every barrier of the CUDA C++ sources is needed, and the emulation finds out where one is missing."""

import re

import pytest
import torch

import smolora
from support import emulation
from support.oracle import Case, build, run

plain = Case()
BARRIERS = [
    pytest.param(path.name, number, found[1] == "grid_barrier", id=f"{path.name}:{number}")
    for path in sorted((emulation.ROOT / "csrc").glob("*.cu*"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if (found := re.search(r"(__syncthreads|__syncwarp|grid_barrier)\(\);", line))
]
DECODING = [
    plain.but(B=9, d=600, k=1100, top_k=2),  # several slices of d and k, and of k for a block
    plain.but(B=20, d=600, k=1100, given=True),  # several groups of sequences
    plain.but(B=64, M=3, N=3, r=64, k=70),  # and of numbers of w
]
TRAINING = [
    plain.but(B=2, S=65, d=130, k=270, dropout=0.1, mask=True),  # two tiles a sequence
    plain.but(B=1, S=140, d=300, k=300, r=16, top_k=2),
]
COLLECTING = [plain.but(lengths=(0,) * 256 + (1,) * 4, d=16, k=16)]  # more chunks than it asks at a time
DECODE_FILES = ("decode.cu", "decode.cuh")
CASES = dict.fromkeys(DECODE_FILES, DECODING) | {"reduce_chunks.cu": COLLECTING}


def outputs(case: Case, decodes: bool) -> list[torch.Tensor]:
    layer, batch = build(case.but(S=1) if decodes else case, torch.float32, "cpu")
    if not decodes:
        return list(run(layer, batch, "cuda").values())
    with torch.no_grad(), smolora.use_backend("cuda"):
        return [layer(batch.x, **batch.keywords)]


def test_sources_have_barriers():
    assert len(BARRIERS) > 30


@pytest.mark.parametrize(("file", "line", "of_grid"), BARRIERS)
def test_barrier_is_needed(file: str, line: int, of_grid: bool, emulated):
    """Left out, it leaves a race on shared memory; the grid's, which is for global memory, another result."""
    decodes = file in DECODE_FILES
    for case in CASES.get(file, TRAINING):
        right = outputs(case, decodes) if of_grid else None
        emulated.leave_out(file, line)
        try:
            other = outputs(case, decodes)
            found = of_grid and not all(map(torch.equal, other, right))
        except RuntimeError as error:
            found = not of_grid and re.search(r"race: |access of", str(error))
        finally:
            emulated.leave_out("", 0)
        if found:
            return
    pytest.fail(f"nothing shows that the barrier at {file}:{line} is missing")
