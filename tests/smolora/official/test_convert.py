"""Released adapters as PEFT adapters and back, and that what is broken does not become one."""

import json
import math
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import smolora
from smolora import cli
from smolora.io.embeddings import read_instruction_embeddings
from smolora.io.tensors import read_tensors, write_tensors
from smolora.official.convert import convert_official, convert_to_official

ADAPTER = Path(__file__).parents[2] / "golden" / "llava" / "adapter"
BASE = "base_model.model.model."
GATE = f"{BASE}layers.0.mlp.gate_proj."


def released() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in torch.load(ADAPTER / "adapter_model.bin", weights_only=True).items()}


def released_config() -> dict:
    return json.loads((ADAPTER / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "adapter"
    convert_official(ADAPTER, folder)
    return folder


def written(folder: Path, state: dict | None = None, **changes) -> Path:
    """A released adapter with other tensors, or other entries of its configuration (None takes one out)."""
    folder.mkdir()
    torch.save(released() if state is None else state, folder / "adapter_model.bin")
    config = {**released_config(), **changes}
    config = {name: value for name, value in config.items() if value != "remove"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------------------------------------------- there and back


def test_what_is_written(converted: Path):
    """The released code's behaviour in our configuration; the embeddings, and the row that the released one used."""
    assert {p.name for p in converted.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "instruction_embeddings.safetensors",
    }
    config = smolora.SMoLoRAConfig.from_pretrained(str(converted))
    assert (config.r, config.lora_alpha, config.scaling, config.lora_dropout) == (4, 8, 2.0, 0.05)
    assert (config.num_vu_experts, config.num_if_experts, config.top_k, config.instruction_dim) == (4, 4, 1, 384)
    assert (config.route_over, config.decode_routing, config.fusion) == ("all", "token", "adaptive")
    assert config.default_instruction == 3 and config.inference_mode and config.task_type == "CAUSAL_LM"
    embeddings, texts = read_instruction_embeddings(converted)
    assert texts == [None] * 7 and embeddings.tolist() == released_config()["ins_emb"]
    state = load_file(converted / "adapter_model.safetensors")
    assert len(state) == 8 * 8 and all(name.startswith(BASE) for name in state)


def test_experts_lie_where_they_should(converted: Path):
    """VU experts first there, IF experts after them; A is VU's importance and B is IF's."""
    state, source = load_file(converted / "adapter_model.safetensors"), released()
    places = {
        f"{BASE}layers.1.mlp.down_proj.": f"{BASE}language_model.layers.1.mlp.down_proj.smolora_experts.",
        f"{BASE}mm_projector.0.": f"{BASE}multi_modal_projector.linear_1.smolora_experts.",
        f"{BASE}mm_projector.2.": f"{BASE}multi_modal_projector.linear_2.smolora_experts.",
    }
    for theirs, ours in places.items():
        for letter in "AB":
            for expert in range(8):
                tensor = source[f"{theirs}lora_{letter}.lora{letter}.{expert}.weight"]
                assert torch.equal(state[f"{ours}{'vu' if expert < 4 else 'if'}_{letter}"][expert % 4], tensor)
        assert torch.equal(state[f"{ours}vu_router"], source[f"{theirs}lora_vu_gate.weight"])
        assert torch.equal(state[f"{ours}if_router"], source[f"{theirs}lora_ins_gate.weight"])
        assert torch.equal(state[f"{ours}vu_importance"], source[f"{theirs}lora_fc_A.weight"][0])
        assert torch.equal(state[f"{ours}if_importance"], source[f"{theirs}lora_fc_B.weight"][0])


def test_back_again(converted: Path, tmp_path: Path):
    """Key for key, in their order, bit for bit; the configuration to the byte."""
    convert_to_official(converted, tmp_path / "back")
    back, source = torch.load(tmp_path / "back" / "adapter_model.bin", weights_only=True), released()
    assert list(back) == list(source)
    assert all(back[name].dtype == value.dtype and torch.equal(back[name], value) for name, value in source.items())
    assert (tmp_path / "back" / "adapter_config.json").read_bytes() == (ADAPTER / "adapter_config.json").read_bytes()
    convert_official(tmp_path / "back", tmp_path / "again")
    for path in converted.glob("*.safetensors"):
        first, second = load_file(path), load_file(tmp_path / "again" / path.name)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (converted, tmp_path / "again")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_special_values(dtype: torch.dtype, tmp_path: Path):
    """Values go through as bits: negative zeros and subnormal numbers too."""
    state = {name: value.to(dtype) for name, value in released().items()}
    state[f"{GATE}lora_A.loraA.5.weight"][0, :3] = torch.tensor([-0.0, 6e-8, -6e-8]).to(dtype)
    convert_official(written(tmp_path / "half", state), tmp_path / "peft")
    convert_to_official(tmp_path / "peft", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "adapter_model.bin", weights_only=True)
    assert list(back) == list(state)
    for name, value in state.items():
        assert back[name].dtype == dtype and torch.equal(back[name].view(torch.int16), value.view(torch.int16))


def test_fewer_targets_and_other_sizes(tmp_path: Path):
    """What is adapted follows target_modules; experts and ranks follow the configuration."""
    state = {name: value for name, value in released().items() if ".up_proj." in name}
    for name in list(state):  # 6 experts of rank 4
        if re.search(r"lora[AB]\.[67]\.", name):
            del state[name]
        elif "_gate" in name:
            state[name] = state[name][:3]
    source = written(tmp_path / "a", state, target_modules=["up_proj"], expert_num=6, r=24, lora_alpha=15)
    convert_official(source, tmp_path / "peft")
    config = smolora.SMoLoRAConfig.from_pretrained(str(tmp_path / "peft"))
    assert (config.num_vu_experts, config.r, config.lora_alpha, config.target_modules) == (3, 4, 2.5, {"up_proj"})
    convert_to_official(tmp_path / "peft", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "adapter_model.bin", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    again = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert again == json.loads((source / "adapter_config.json").read_text())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["convert-official", "--adapter", str(ADAPTER), "--output", str(tmp_path / "peft")]) == 0
    back = ["convert-official", "--to-official", "--adapter", str(tmp_path / "peft"), "--output", str(tmp_path / "b")]
    assert cli.main(back) == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["adapter_config.json", "adapter_model.bin"]
    capsys.readouterr()
    assert cli.main(back) == 1  # it is there now
    assert "output must be a new or empty folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- 200 seeded corruptions


def flip(raw: bytes, rng: random.Random) -> bytes:
    bad = bytearray(raw)
    bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    return bytes(bad)


def truncate(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def missing(state: dict, name: str, rng: random.Random) -> str:
    del state[name]
    return name


def extra(state: dict, name: str, rng: random.Random) -> str:
    new = rng.choice([f"{name}2", name.replace(".mlp.", ".attn."), f"x.{name}", name.replace("layers.0", "layers.7")])
    new = new if new != name else f"{name}.bias"
    state[new] = state[name].clone()
    return new


def empty(state: dict, name: str, rng: random.Random) -> str:
    state[name] = state[name].narrow(rng.randrange(state[name].dim()), 0, 0).clone()
    return name


def reshaped(state: dict, name: str, rng: random.Random) -> str:
    t = state[name]
    forms = [t[..., :-1], t[None], t.flatten()[:-1], torch.cat([t, t])] + ([t.mT] if t.dim() > 1 else [])
    state[name] = rng.choice([form for form in forms if form.shape != t.shape]).contiguous()
    return name


def not_finite(state: dict, name: str, rng: random.Random) -> str:
    flat = state[name].flatten().clone()
    flat[rng.randrange(flat.numel())] = rng.choice([math.nan, math.inf, -math.inf])
    state[name] = flat.view(state[name].shape)
    return name


def integers(state: dict, name: str, rng: random.Random) -> str:
    state[name] = state[name].int()
    return name


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


TENSORS = (missing, extra, empty, reshaped, not_finite, integers)
RAW = (flip, truncate)
SEEDS = 100  # for each direction


@pytest.mark.parametrize("direction", ["from the released code", "to the released code"])
def test_corruptions(direction: str, converted: Path, tmp_path: Path):
    """Seeded, one after the other: each is refused, with the tensor's name where there is one, and writes nothing.

    A file changed as a whole is written again with good checksums: nothing but what is in it tells.
    """
    forward = direction.startswith("from")
    good = ADAPTER if forward else converted
    file = "adapter_model.bin" if forward else "adapter_model.safetensors"
    convert = convert_official if forward else convert_to_official
    raw = (good / file).read_bytes()
    state = {name: value.clone() for name, value in read_tensors(good / file)[0].items()}
    zip_version = raw.rfind(b"PK\6\6") + 12  # any value is right there
    folder, output = tmp_path / "bad", tmp_path / "output"
    shutil.copytree(good, folder)
    kinds = [*TENSORS, *RAW] + (["code"] if forward else [])
    for seed in range(SEEDS):
        rng = random.Random(seed)
        kind = kinds[seed % len(kinds)]
        word = ""
        if kind == "code":
            torch.save({**state, rng.choice(list(state)): Bomb(tmp_path / "exploded")}, folder / file)
            word = "could run code"
        elif kind in RAW:
            bad = kind(raw, rng)
            if forward and bad[:zip_version] == raw[:zip_version] and bad[zip_version + 2 :] == raw[zip_version + 2 :]:
                continue
            (folder / file).write_bytes(bad)
        else:
            broken = dict(state)
            word = repr(kind(broken, rng.choice(list(broken)), rng))
            if forward:
                torch.save(broken, folder / file)
            else:
                write_tensors(folder / file, broken)
        with pytest.raises(ValueError) as raised:
            convert(folder, output)
        message = str(raised.value)
        assert str(folder / file) in message and word in message, (seed, kind, word, message)
        assert not output.exists() and not (tmp_path / "exploded").exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_files_missing(tmp_path: Path, converted: Path):
    """Any file that is not there is named."""
    for good, convert in ((ADAPTER, convert_official), (converted, convert_to_official)):
        for name in sorted(p.name for p in good.iterdir()):
            folder = tmp_path / f"{convert.__name__}-{name}"
            shutil.copytree(good, folder)
            (folder / name).unlink()
            with pytest.raises(FileNotFoundError, match=re.escape(name)):
                convert(folder, tmp_path / "output")


def test_layers_missing(tmp_path: Path):
    """Layers in the middle are missed; modules that the configuration names and the file does not have, too."""
    state = released()
    shifted = {name.replace("layers.1.", "layers.2."): value for name, value in state.items()}
    with pytest.raises(ValueError, match=r"lacks 'base_model\.model\.model\.layers\.1\.mlp\.down_proj"):
        convert_official(written(tmp_path / "a", shifted), tmp_path / "output")
    without = {name: value for name, value in state.items() if "mm_projector.2" not in name}
    with pytest.raises(ValueError, match=r"lacks 'base_model\.model\.model\.mm_projector\.2"):
        convert_official(written(tmp_path / "b", without), tmp_path / "output")
    with pytest.raises(ValueError, match=r"has more than it should.*up_proj"):
        convert_official(written(tmp_path / "c", state, target_modules=["gate_proj", "down_proj"]), tmp_path / "output")


def test_other_trained_weights_would_be_lost(tmp_path: Path):
    """The released adapters have an empty file beside them; one that is not empty has no place here."""
    folder = written(tmp_path / "a")
    torch.save({}, folder / "non_lora_trainables.bin")
    convert_official(folder, tmp_path / "good")
    torch.save({"model.mm_projector.0.weight": torch.ones(1)}, folder / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match=r"non_lora_trainables.bin must be empty.*mm_projector\.0\.weight"):
        convert_official(folder, tmp_path / "output")


CONFIGURATIONS = [
    (dict(peft_type="LORA"), "peft_type must be 'SMOLORA', got 'LORA'"),
    (dict(bias="all"), "bias must be 'none', got 'all'"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out must be False, got True"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save must be None"),
    (dict(layers_to_transform=[1]), "layers_to_transform must be None, got [1]"),
    (dict(use_rslora=True), "unknown ['use_rslora']"),  # would change the scaling
    (dict(ins_emb="remove"), "missing ['ins_emb']"),
    (dict(expert_num="remove"), "missing ['expert_num']"),
    (dict(expert_num=7), "expert_num must be even and divide r"),
    (dict(expert_num=6), "got expert_num=6, r=32"),
    (dict(expert_num=0), "expert_num must be a positive integer, got 0"),
    (dict(r=True), "r must be a positive integer, got True"),
    (dict(r="32"), "r must be a positive integer, got '32'"),
    (dict(r=16), "got (4, "),  # the tensors say another rank
    (dict(expert_num=4), "has more than it should"),
    (dict(lora_alpha="64"), "lora_alpha must be a number, got '64'"),
    (dict(lora_alpha=0), "lora_alpha must be a positive finite number"),
    (dict(lora_dropout=1.5), "lora_dropout must be a number in [0, 1), got 1.5"),
    (dict(ins_type=7), "ins_type must be a row of ins_emb, 0 to 6, got 7"),
    (dict(ins_type=-1), "ins_type must be a row of ins_emb, 0 to 6, got -1"),
    (dict(ins_type=None), "ins_type must be a row of ins_emb, 0 to 6, got None"),
    (dict(ins_emb=[[0.0] * 384, [0.0] * 383]), "ins_emb must be a list of rows of equal length"),
    (dict(ins_emb=[]), "ins_emb must be rows of finite numbers"),
    (dict(ins_emb=[[math.nan] * 384]), "ins_emb must be rows of finite numbers"),
    (dict(ins_emb=[[0.0] * 300] * 7), "lora_ins_gate.weight' must be (4, 300), got (4, 384)"),
    (dict(target_modules=["q_proj"]), "target_modules must be some of"),
    (dict(target_modules=None), "target_modules must be some of"),
    (dict(target_modules=[]), "target_modules must be some of"),
]


@pytest.mark.parametrize(("changes", "words"), CONFIGURATIONS, ids=[str(changes)[:40] for changes, _ in CONFIGURATIONS])
def test_configurations_refused(changes: dict, words: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(words)):
        convert_official(written(tmp_path / "a", **changes), tmp_path / "output")
    assert not (tmp_path / "output").exists()


OURS = [
    (dict(top_k=2), "top_k must be 1"),
    (dict(fusion="mean"), "fusion must be 'adaptive'"),
    (dict(route_over="prompt"), "route_over must be 'all'"),
    (dict(decode_routing="prompt"), "decode_routing must be 'token'"),
    (dict(default_instruction=None), "default_instruction must name a row"),
    (dict(default_instruction=7), "default_instruction must name a row of the embeddings, 0 to 6"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save must be None"),
    (dict(peft_type="LORA"), "peft_type must be 'SMOLORA'"),
    (dict(instruction_dim=300), "instruction_dim"),
    (dict(r=8), "must be (4, 8, "),
]


@pytest.mark.parametrize(("changes", "words"), OURS, ids=[str(changes) for changes, _ in OURS])
def test_what_the_released_code_cannot_do(changes: dict, words: str, converted: Path, tmp_path: Path):
    """It would run something else than was trained."""
    folder = tmp_path / "a"
    shutil.copytree(converted, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=re.escape(words)):
        convert_to_official(folder, tmp_path / "output")
    assert not (tmp_path / "output").exists()
