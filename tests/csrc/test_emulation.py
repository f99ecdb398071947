"""The emulation finds what it is there for: each of these kernels has one fault."""

import pytest

FAULTS = [
    "deadlock: 63 threads wait at __syncthreads, 1 have returned",
    "deadlock: 32 threads wait at shuffle, 32 have returned",
    "lanes of one warp are at different operations, shuffle and __syncwarp",
    "deadlock: 64 threads wait at grid_barrier, 64 have returned",
    "access of 4 bytes at 256 of an array of 256 bytes",  # of shared memory, and into the next array of it
    "access of 4 bytes at 256 of an array of 256 bytes",  # of global memory
    "16 bytes at 4 of an array|16 bytes at a misaligned address",
    "takes 4000 bytes more shared memory than it asked for",
    "race: shared memory is written here and read by thread 31, .* .thread 32 of",  # a missing barrier
    "race: shared memory is read here and written by thread 63, .* .thread 0 of",  # another one, between read and write
    "race: shared memory is written here and read by thread 31, .* .thread 63 of",  # a warp's for a block's
    "race: shared memory is read here and written by thread 30, .* .thread 31 of",  # a shuffle instead
    "NaN from shared memory that nobody had written",  # a cp.async that nobody waited for
]


@pytest.mark.parametrize("which", range(len(FAULTS)))
def test_finds(which: int, emulated):
    with pytest.raises(RuntimeError, match=FAULTS[which]):
        emulated.self_test(which)


def test_goes_on_after_a_fault(emulated):
    """The next launch starts afresh: the fault found again is the same one."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^one_leaves: deadlock: 63 threads wait .* 1 have returned$"):
            emulated.self_test(0)


def test_unknown_field(emulated):
    """A field that the params struct does not have is an error, and not one that is left out."""
    with pytest.raises(TypeError, match=r"unknown field among .*typo"):
        emulated.decode(dict(typo=1))
    with pytest.raises(TypeError, match=r"unknown field among .*typo"):
        emulated.decode(dict(banks=[dict(E=1), dict(typo=1)]))


def test_too_many_banks(emulated):
    with pytest.raises(ValueError, match="banks must be at most 2, got 3"):
        emulated.decode(dict(banks=[{}, {}, {}]))


def test_memory_of_no_tensor(emulated):
    emulated.forget()
    with pytest.raises(RuntimeError, match="mix: a pointer to no tensor of this launch"):
        emulated.fuse_expand(dict(T=1, n=1, r=4, banks=[dict(E=1)], h=(64, 0)))
