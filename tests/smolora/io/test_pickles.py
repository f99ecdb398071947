"""Files of `torch.save`: an archive beyond 4 GiB, pickles that would run code, and what is no file of tensors."""

import os
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from smolora.io import pickles
from smolora.io.tensors import read_tensors

BIN = Path(__file__).parents[2] / "golden" / "llava" / "mm_projector.bin"


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.0.weight": torch.randn(7, 5, generator=generator),
        "layer.0.bias": torch.randn(5, generator=generator).half(),
        "layer.1.weight": torch.randn(2, 3, 4, generator=generator).bfloat16(),
        "steps": torch.tensor(12),
        "nothing": torch.empty(0, 3),
        "layer.1.scale": torch.randn(3, generator=generator, dtype=torch.float64),
    }


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[4.25], [1, 1, 1, 1, 0.5]], ids=["a tensor", "a file"])
def test_beyond_4_gib(sizes: list[float], tmp_path: Path):
    """Archives store sizes and offsets in another place then. Bug: the shards of a 7B model were taken for broken."""
    if shutil.disk_usage(tmp_path).free < 10 * 2**30:
        pytest.skip("needs 10 GiB of disk")
    state = {str(i): torch.zeros(int(size * 2**30), dtype=torch.uint8) for i, size in enumerate(sizes)}
    path = tmp_path / "a.bin"
    torch.save({**state, "last": torch.arange(100.0)}, path)
    del state
    found, _ = read_tensors(path)
    assert torch.equal(found["last"], torch.arange(100.0)) and len(found) == len(sizes) + 1
    with open(path, "r+b") as file:  # 99.0, in the last tensor, twice what it was
        file.seek(-4096, 2)
        tail = file.read()
        file.seek(tail.index(torch.tensor([98.0, 99.0]).numpy().tobytes()) - 4096 + 7, 2)
        file.write(b"\x43")
    with pytest.raises(ValueError, match="'last'"):
        read_tensors(path)
    path.unlink()


@pytest.mark.parametrize("start", [0, 2**32 - 1, 2**32 + 64])
def test_a_record_beyond_4_gib(start: int, tmp_path: Path):
    """In a file that is empty up to it. Its summary has 64-bit sizes, as torch writes them: see `test_beyond_4_gib`."""
    name, values = "a/data/1", b"values"
    crc, wide = zlib.crc32(values), start >= 2**32 - 1
    record = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    record.header_offset, record.flag_bits, record.extract_version = start, 8, 45 if wide else 20
    record.CRC, record.file_size, record.compress_size = crc, len(values), len(values)
    extra = (struct.pack("<2HQ", 1, 8, start) if wide else b"") + b"FB\3\0ZZZ"
    version = record.extract_version
    header = struct.pack("<4s5H3L2H", b"PK\3\4", version, 8, 0, 0, 33, 0, 0, 0, len(name), len(extra))
    sizes = struct.pack("<2Q" if wide else "<2L", len(values), len(values))
    written = header + name.encode() + extra + values + b"PK\7\10" + struct.pack("<L", crc) + sizes
    path = tmp_path / "a.bin"
    with open(path, "w+b") as file:
        file.truncate(start)
        file.seek(start)
        file.write(written)
        assert pickles._check_record(file, record, start) == (None, start + len(written))
        file.seek(-1, 2)
        file.write(b"\1")  # in its sizes
        assert pickles._check_record(file, record, start)[0] == "has a broken summary"


def test_an_entry_of_a_training_checkpoint(tmp_path: Path):
    """Tensors beside the optimiser's state; a file without the entry is taken whole, and without the name it is
    refused."""
    path = tmp_path / "a.pth"
    torch.save({"model": tensors(), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "epoch": 3}, path)
    found, _ = read_tensors(path, "model")
    assert found.keys() == tensors().keys() and all(torch.equal(found[n], t) for n, t in tensors().items())
    with pytest.raises(ValueError, match=r"must hold tensors by name, got dict for 'model'"):
        read_tensors(path)
    torch.save(tensors(), path)
    assert read_tensors(path, "model")[0].keys() == tensors().keys()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda bomb: bomb,
        lambda bomb: {"a": bomb},
        lambda bomb: {**tensors(), "b": bomb},
        lambda bomb: {"a": torch.ones(1), "b": [bomb]},
    ],
    ids=["alone", "as a tensor", "among tensors", "in a list"],
)
def test_pickle_with_code(wrap, tmp_path: Path):
    """It is refused, and does not run."""
    torch.save(wrap(Bomb(tmp_path / "exploded")), tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"asks for \w+\.mkdir, which could run code"):
        read_tensors(tmp_path / "a.bin")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([torch.ones(1)], "list"),
        ({"a": 3}, "'a'"),
        ({1: torch.ones(1)}, "for 1"),
        ({"a": {"b": torch.ones(1)}}, "'a'"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' must be a dense tensor"),
    ],
    ids=["list", "number", "number as name", "nested", "sparse"],
)
def test_pickle_of_something_else(content, word: str, tmp_path: Path):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=re.escape(word)):
        read_tensors(tmp_path / "a.bin")


def test_no_archive_of_torch(tmp_path: Path):
    """The format before PyTorch 1.6 has no checksums; a zip of something else, and one that is compressed."""
    torch.save(tensors(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"torch\.save \(of PyTorch 1\.6 or newer"):
        read_tensors(tmp_path / "old.bin")
    with zipfile.ZipFile(BIN) as source, zipfile.ZipFile(tmp_path / "z.bin", "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(ValueError, match="not one that torch"):
        read_tensors(tmp_path / "z.bin")
    (tmp_path / "t.bin").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="cut short, broken, or no file of torch"):
        read_tensors(tmp_path / "t.bin")
