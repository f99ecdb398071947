"""Tensor files: what is broken is refused, with the tensor's name where there is one, and what was good is kept."""

import json
import os
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from smolora.io import tensors as module
from smolora.io.files import atomic_file, atomic_folder
from smolora.io.tensors import read_model, read_tensors, write_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "llava"
BIN = GOLDEN / "mm_projector.bin"


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


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_round_trip(suffix: str, tmp_path: Path):
    """Every dtype and shape, 0-dimensional ones too, bit for bit; the metadata are there."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".bin":
        torch.save(tensors(), path)
    else:
        write_tensors(path, tensors(), {"texts": "[1]"})
    found, metadata = read_tensors(path)
    assert same(found, tensors())
    assert suffix == ".bin" or (metadata["texts"] == "[1]" and metadata["format"] == "pt")


def test_parameters_views_and_what_torch_saved_by_itself(tmp_path: Path):
    """The released files hold Parameters; slices of one storage are what they show, not the storage."""
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"p": torch.nn.Parameter(torch.ones(2)), "row": whole[1], "t": whole.T}, tmp_path / "a.bin")
    found, _ = read_tensors(tmp_path / "a.bin")
    assert type(found["p"]) is torch.Tensor and not found["p"].requires_grad
    assert torch.equal(found["row"], whole[1]) and torch.equal(found["t"], whole.T)


def test_safetensors_without_checksums(tmp_path: Path):
    """Files of other writers are read; there is nothing to compare their values with."""
    save_file(tensors(), tmp_path / "a.safetensors")
    assert same(read_tensors(tmp_path / "a.safetensors")[0], tensors())


def test_released_files_are_readable():
    for path in (BIN, GOLDEN / "adapter" / "adapter_model.bin"):
        expected = torch.load(path, weights_only=True)
        assert same(read_tensors(path)[0], {k: v.detach() for k, v in expected.items()})


# ---------------------------------------------------------------------------------------------------------- corruptions


def written(kind: str, folder: Path) -> Path:
    path = folder / f"model.{kind}"
    if kind == "bin":
        torch.save(tensors(), path)
    else:
        write_tensors(path, tensors())
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_every_flipped_bit_is_found(kind: str, tmp_path: Path):
    """A bit anywhere in the file: values, names, shapes, padding, checksums, directory. `torch.load` by itself takes a
    file whose values are not those that were saved. The one thing left out is the field of a zip archive that says
    which version of its writer made it, since any is right."""
    path = written(kind, tmp_path)
    good = path.read_bytes()
    end = good.rfind(b"PK\6\6")
    free = {end + 12, end + 13} if kind == "bin" else set()
    rng = random.Random(0)
    places = rng.sample([i for i in range(len(good)) if i not in free], 400)
    for at in places:
        bad = bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_tensors(path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["layer.0.weight", "layer.0.bias", "layer.1.weight", "layer.1.scale"])
def test_flipped_value_names_its_tensor(kind: str, name: str, tmp_path: Path):
    path = written(kind, tmp_path)
    value = tensors()[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    bad = bytearray(path.read_bytes())
    bad[bad.index(value) + 3] ^= 4
    path.write_bytes(bad)
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        read_tensors(path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_truncated(kind: str, tmp_path: Path):
    """From nothing at all to one byte short."""
    path = written(kind, tmp_path)
    good = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(20, len(good), 97), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_tensors(path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_bytes_too_many(kind: str, tmp_path: Path):
    path = written(kind, tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_tensors(path)


def test_truncated_safetensors_names_the_first_tensor_lost(tmp_path: Path):
    path = written("safetensors", tmp_path)
    path.write_bytes(path.read_bytes()[:-2])
    header = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])
    header.pop("__metadata__")
    last = max(header, key=lambda name: header[name]["data_offsets"])
    with pytest.raises(ValueError, match=re.escape(repr(last))):
        read_tensors(path)


def test_checksums_are_of_the_file_they_are_in(tmp_path: Path):
    """Tensors that a checksum does not know, or the other way round; a shape that holds the same bytes."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors())
    metadata = read_tensors(path)[1]
    changes = {
        "extra": lambda t: {**t, "extra": torch.ones(1)},
        "layer.0.bias": lambda t: {k: v for k, v in t.items() if k != "layer.0.bias"},
        "layer.0.weight": lambda t: {**t, "layer.0.weight": t["layer.0.weight"].reshape(5, 7)},
        "layer.1.weight": lambda t: {**t, "layer.1.weight": t["layer.1.weight"].view(torch.float16)},
    }
    for name, change in changes.items():
        save_file(change(tensors()), path, metadata)
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            read_tensors(path)


def test_nothing_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_tensors(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_tensors(tmp_path)


# --------------------------------------------------------------------------------------------------------------- shards


def sharded(folder: Path, suffix: str = "safetensors") -> dict[str, str]:
    """Two shards and their index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(tensors())
    places = {}
    for number, group in enumerate((names[:2], names[2:]), 1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        part = {name: tensors()[name] for name in group}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        places.update(dict.fromkeys(group, file))
    index = f"{stem}.{suffix}.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(suffix: str, tmp_path: Path):
    sharded(tmp_path, suffix)
    assert same(read_model(tmp_path), tensors())


def test_safetensors_come_first(tmp_path: Path):
    """As transformers looks for them; both are often there."""
    save_file(tensors(), tmp_path / "model.safetensors")
    torch.save(tensors(1), tmp_path / "pytorch_model.bin")
    assert same(read_model(tmp_path), tensors())


def test_shards_refused(tmp_path: Path):
    """A shard that is gone, one without a tensor, one with another's, an index that leads elsewhere or is no index."""
    places = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002\.safetensors is missing, with 4 tensors \('layer"):
        read_model(tmp_path)
    second.write_bytes(content)
    index.write_text(json.dumps({"weight_map": {**places, "lost": second.name}}))
    with pytest.raises(ValueError, match="lacks 'lost'"):
        read_model(tmp_path)
    index.write_text(json.dumps({"weight_map": places}))
    first = read_tensors(tmp_path / "model-00001-of-00002.safetensors")[0]
    save_file({**read_tensors(second)[0], "layer.0.bias": first["layer.0.bias"]}, tmp_path / "new.safetensors")
    os.replace(tmp_path / "new.safetensors", second)
    with pytest.raises(ValueError, match=r"'layer\.0\.bias', which another shard has too"):
        read_model(tmp_path)
    for broken, word in (
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "must name files beside it"),
        ('{"weight_map": ["a"]}', "'weight_map'"),
        ("{}", "'weight_map'"),
        ("[]", "JSON object"),
        ('{"weight_map"', "no JSON"),
    ):
        index.write_text(broken)
        with pytest.raises(ValueError, match=re.escape(word)):
            read_model(tmp_path)


def test_no_weights(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"language must hold one of model\.safetensors"):
        read_model(tmp_path, "language")
    with pytest.raises(FileNotFoundError, match="language must be a folder"):
        read_model(tmp_path / "none", "language")


# --------------------------------------------------------------------------------------------------------------- atomic


@pytest.mark.parametrize("moment", ["while it is written", "before it is in place"])
def test_last_good_file_is_kept(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whenever writing stops, the file that was there stays, and nothing is left beside it."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors())

    def half(values, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError("I/O error: no space left")

    def never(*args):
        raise OSError("no space left")

    if moment == "while it is written":
        monkeypatch.setattr(module, "save_file", half)
    else:
        monkeypatch.setattr(module.os, "replace", never)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(path, tensors(1))
    monkeypatch.undo()
    assert same(read_tensors(path)[0], tensors()) and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    write_tensors(path, tensors(1))
    assert same(read_tensors(path)[0], tensors(1)) and len(list(tmp_path.iterdir())) == 1


def test_the_file_is_on_disk_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A rename that survives a power cut which the data did not would be an empty checkpoint."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(module.os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(module.os, "replace", lambda *args: (calls.append("replace"), replace(*args))[1])
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("a")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name


def test_folder(tmp_path: Path):
    """All of it or nothing; parents are made; what exists is not touched."""
    path = tmp_path / "deep" / "folder"
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(path) as folder:
        (folder / "a").write_text("a")
        raise RuntimeError("stop")
    assert list(path.parent.iterdir()) == []
    with atomic_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not path.exists()
    assert (path / "sub" / "a").read_text() == "a" and list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777  # as any folder, not a private one
    with pytest.raises(FileExistsError, match="output must be a new or empty folder"), atomic_folder(path):
        raise AssertionError("not reached")
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "empty" / "a").exists()
