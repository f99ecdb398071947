"""The released layer: its checkpoints load, and its outputs and gradients come out, to rounding."""

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import smolora
from smolora import FusedSMoLoRA, SMoLoRAConfig
from smolora.reference import smolora_forward
from support.marks import interpreter
from support.oracle import PARAMETERS, Batch, collect, error, run
from support.project import GOLDEN

FILES = {
    "layer_fp64_e4": 1e-12,  # 2 + 2 experts, one token a sample, no bias
    "layer_fp64_e8": 1e-12,  # 4 + 4 experts, odd sizes, a bias in the base
    "layer_fp32_e8": 1e-5,  # the paper's ranks
}
LARGEST = "layer_fp64_e8"


class Golden:
    """One file of outputs of the released code: its tensors, and a layer of the same shape."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
            self.metadata = {key: int(float(value)) for key, value in file.metadata().items()}
        self.state = self.part("param.")

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def layer(self) -> FusedSMoLoRA:
        """A layer that has nothing of the file yet. The released r is the total over all experts."""
        m = self.metadata
        r = m["lora_r_total"] // m["expert_num"]
        config = SMoLoRAConfig.official(
            r=r,
            lora_alpha=r * m["lora_alpha"] / m["lora_r_total"],
            lora_dropout=0.0,
            num_vu_experts=m["expert_num"] // 2,
            num_if_experts=m["expert_num"] // 2,
        )
        dtype = self.tensors["x"].dtype
        return FusedSMoLoRA(nn.Linear(m["in_features"], m["out_features"], "bias" in self.state, dtype=dtype), config)

    def loaded(self) -> FusedSMoLoRA:
        layer = self.layer()
        layer.load_official_state_dict(self.state)
        return layer

    def batch(self) -> Batch:
        """One instruction for all samples, as released: the embedding's row is set by hand."""
        instruction = self.tensors["ins_emb"][self.metadata["ins_type"]]
        return Batch(self.tensors["x"], self.tensors["dy"], {"instruction": instruction})

    def results(self) -> dict[str, Tensor]:
        """y, dx and the parameters' gradients by this package's names; the routers got none."""
        grads = self.part("grad.")
        half = self.metadata["expert_num"] // 2
        stack = lambda letter, experts: torch.stack(  # noqa: E731
            [grads[f"lora_{letter}.default.lora{letter}.{e}.weight"] for e in experts]
        )
        vu, instruction = range(half), range(half, 2 * half)
        return {
            "y": self.tensors["y"],
            "dx": self.tensors["dx"],
            "dvu_A": stack("A", vu),
            "dvu_B": stack("B", vu),
            "dif_A": stack("A", instruction),
            "dif_B": stack("B", instruction),
            "dvu_importance": grads["lora_fc_A.default.weight"][0],
            "dif_importance": grads["lora_fc_B.default.weight"][0],
        }


@pytest.fixture(scope="module")
def golden() -> dict[str, Golden]:
    return {name: Golden(name) for name in FILES}


# --------------------------------------------------------------------------------------------------- the same results


def reference_run(layer: FusedSMoLoRA, batch: Batch) -> dict[str, Tensor]:
    x = batch.x.clone().requires_grad_()
    named = {name: getattr(layer, name) for name in PARAMETERS}
    base = layer.base_layer
    y = smolora_forward(
        x, base.weight, base.bias, *named.values(), batch.keywords["instruction"], scaling=layer.config.scaling
    )
    return collect(y, x, named, batch.cotangent)


RUNS = [
    *((name, how) for how in ("torch", "reference") for name in FILES),
    pytest.param("layer_fp32_e8", "triton", marks=interpreter),  # the interpreter has no float64
]


@pytest.mark.parametrize(("name", "how"), RUNS)
def test_agrees_with_the_released_code(name: str, how: str, golden: dict[str, Golden]):
    """y, dx and every gradient as the released code's own autograd gave them: the algebra in rank space is the same."""
    layer, batch = golden[name].loaded(), golden[name].batch()
    got = reference_run(layer, batch) if how == "reference" else run(layer, batch, how)
    expected = golden[name].results()
    assert got.keys() == expected.keys()  # so no router has a gradient here either
    errors = {key: error(got[key], expected[key]) for key in expected}
    assert max(errors.values()) <= FILES[name], errors
    assert all(value.norm() > 0 for value in expected.values())  # zeros would agree with a layer that does nothing


@pytest.mark.parametrize("name", FILES)
def test_routes_and_shares_agree(name: str, golden: dict[str, Golden]):
    """The released router's one-hot choice and its fusion weights, token by token."""
    layer, batch = golden[name].loaded(), golden[name].batch()
    layer.keep_alpha = True
    run(layer, batch, "torch")
    routing = layer.last_routing()
    half = layer.config.num_vu_experts
    one_hot = golden[name].tensors["final_router"][:, 0]
    assert torch.equal(routing.routes[0].long(), one_hot[:, :half].argmax(-1))
    assert torch.equal(routing.routes[1].long(), one_hot[:, half:].argmax(-1))
    shares = golden[name].tensors["attention_weights"].flatten(0, 1)
    assert error(routing.alpha, shares[:, 0]) <= FILES[name]
    assert error(1 - routing.alpha, shares[:, 1]) <= FILES[name]


# ------------------------------------------------------------------------------------------------------- what is loaded


def saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys as a saved adapter has them: without the adapter's name, and without the base."""
    return {key.replace(".default", ""): value for key, value in state.items() if key.startswith("lora_")}


def with_second_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The live layer lists every expert's tensor twice."""
    twice = {f"{key.removesuffix('.weight')}.mlp.weight": v for key, v in state.items() if ".lora" in key}
    return {**state, **{key: value.clone() for key, value in twice.items()}}


def only_second_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a writer that drops duplicates may leave it."""
    twice = with_second_names(state)
    return {key: value for key, value in twice.items() if f"{key.removesuffix('.weight')}.mlp.weight" not in twice}


SPELLINGS = {
    "live": lambda state: state,
    "another adapter's name": lambda state: {key.replace("default", "task_3"): v for key, v in state.items()},
    "saved": saved,
    "with second names": with_second_names,
    "saved, with second names": lambda state: saved(with_second_names(state)),
    "second names alone": only_second_names,
    "reversed": lambda state: dict(reversed(state.items())),  # experts are found by number, not by order
    "as parameters": lambda state: {key: nn.Parameter(value) for key, value in state.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str, golden: dict[str, Golden]):
    """Every way in which the released code names its tensors gives the same layer, bit for bit. Checkpoints leave the
    base out: it then stays as it is."""
    file = golden[LARGEST]
    state = SPELLINGS[spelling](file.state)
    layer = file.layer()
    base = {name: p.clone() for name, p in layer.base_layer.named_parameters()}
    layer.load_official_state_dict(state)
    for name, prefix in (("vu_A", "lora_A.default.loraA"), ("if_B", "lora_B.default.loraB")):
        first = 4 if name.startswith("if") else 0  # VU experts come first, IF experts after them
        for e, expert in enumerate(getattr(layer, name)):
            assert torch.equal(expert, file.state[f"{prefix}.{first + e}.weight"])
    for name, key in (("vu_router", "lora_vu_gate"), ("if_router", "lora_ins_gate")):
        assert torch.equal(getattr(layer, name), file.state[f"{key}.default.weight"])
    for name, key in (("vu_importance", "lora_fc_A"), ("if_importance", "lora_fc_B")):
        assert torch.equal(getattr(layer, name), file.state[f"{key}.default.weight"][0])
    for name, before in base.items():
        assert torch.equal(getattr(layer.base_layer, name), file.state[name] if name in state else before)


def test_requires_grad_stays(golden: dict[str, Golden]):
    """Loading copies values: parameters keep their identity (an optimiser may hold them) and what is frozen is."""
    layer = golden[LARGEST].layer()
    before = {name: (p, p.requires_grad) for name, p in layer.named_parameters()}
    layer.load_official_state_dict(golden[LARGEST].state)
    assert {name: (p, p.requires_grad) for name, p in layer.named_parameters()} == before


def test_half_precision_checkpoint(golden: dict[str, Golden]):
    """Released adapters are half precision on disk; they load into float32 parameters without further rounding."""
    file = golden["layer_fp32_e8"]
    layer = file.layer()
    layer.load_official_state_dict({key: value.half() for key, value in saved(file.state).items()})
    assert layer.vu_B.dtype == torch.float32
    assert torch.equal(layer.vu_B[1], file.state["lora_B.default.loraB.1.weight"].half().float())


def test_bias_alone(golden: dict[str, Golden]):
    """Either half of the base may be in the state dict without the other."""
    file = golden[LARGEST]
    layer = file.layer()
    weight = layer.base_layer.weight.clone()
    layer.load_official_state_dict({key: value for key, value in file.state.items() if key != "weight"})
    assert torch.equal(layer.base_layer.bias, file.state["bias"]) and torch.equal(layer.base_layer.weight, weight)


# ------------------------------------------------------------------------------------------------------ what is refused


def without(*keys: str):
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def adding(**entries: Tensor):
    return lambda state: {**state, **{key.replace("__", "."): value for key, value in entries.items()}}


def changing(key: str, change):
    return lambda state: {**state, key: change(state[key])}


def conflicting(state: dict[str, Tensor]) -> dict[str, Tensor]:
    twice = with_second_names(state)
    twice["lora_B.default.loraB.7.mlp.weight"][3, 1] += 1e-9
    return twice


# name: (what happens to the live state dict, exception, words of the message)
REFUSED = {
    # missing: a layer half loaded would train on in silence
    "expert missing": (without("lora_B.default.loraB.7.weight"), KeyError, ["missing", "lora_B.7"]),
    "router missing": (without("lora_vu_gate.default.weight"), KeyError, ["missing", "lora_vu_gate"]),
    "importance missing": (without("lora_fc_B.default.weight"), KeyError, ["missing", "lora_fc_B"]),
    "all missing": (lambda state: {}, KeyError, ["missing", "lora_A.0", "lora_B.7", "lora_ins_gate", "lora_fc_A"]),
    "base alone": (lambda state: {"weight": state["weight"]}, KeyError, ["missing", "lora_A.0"]),
    # unknown: a checkpoint of something else
    "expert too many": (
        adding(lora_A__default__loraA__8__weight=torch.ones(4, 48)),
        KeyError,
        ["unknown", "lora_A.default.loraA.8.weight"],
    ),
    "letters mixed": (
        adding(lora_A__default__loraB__0__weight=torch.ones(4, 48)),
        KeyError,
        ["unknown", "lora_A.default.loraB.0.weight"],
    ),
    "plain LoRA's key": (
        adding(lora_A__default__weight=torch.ones(4, 48)),
        KeyError,
        ["unknown", "lora_A.default.weight"],
    ),
    "a router with an expert": (
        adding(lora_vu_gate__default__loraA__0__weight=torch.ones(4, 48)),
        KeyError,
        ["unknown", "lora_vu_gate.default.loraA.0.weight"],
    ),
    "bias of a router": (
        adding(lora_vu_gate__default__bias=torch.ones(4)),
        KeyError,
        ["unknown", "lora_vu_gate.default.bias"],
    ),
    "whole model's key": (
        lambda state: {f"base_model.model.{key}": value for key, value in state.items()},
        KeyError,
        ["unknown", "base_model.model.lora_fc_A.default.weight", "missing", "lora_fc_A"],
    ),
    "own names": (adding(vu_A=torch.ones(4, 4, 48)), KeyError, ["unknown", "vu_A"]),
    # shapes: another rank, a transposed matrix, another number of experts, a truncated tensor
    "rank": (
        changing("lora_A.default.loraA.3.weight", lambda t: t[:3]),
        ValueError,
        ["lora_A.default.loraA.3.weight must", "(4, 48)", "(3, 48)"],
    ),
    "transposed": (
        changing("lora_B.default.loraB.0.weight", lambda t: t.mT),
        ValueError,
        ["lora_B.default.loraB.0.weight must", "(80, 4)", "(4, 80)"],
    ),
    "router of more experts": (
        changing("lora_ins_gate.default.weight", lambda t: torch.cat([t, t])),
        ValueError,
        ["lora_ins_gate.default.weight must", "(4, 384)", "(8, 384)"],
    ),
    "importance without its axis": (
        changing("lora_fc_A.default.weight", lambda t: t[0]),
        ValueError,
        ["lora_fc_A.default.weight must", "(1, 80)", "(80,)"],
    ),
    "empty": (
        changing("lora_fc_B.default.weight", lambda t: t[:, :0]),
        ValueError,
        ["lora_fc_B.default.weight must", "(1, 80)", "(1, 0)"],
    ),
    "base of another layer": (
        changing("weight", lambda t: t[:, :40]),
        ValueError,
        ["weight must", "(80, 48)", "(80, 40)"],
    ),
    "base transposed": (changing("weight", lambda t: t.mT), ValueError, ["weight must", "(80, 48)", "(48, 80)"]),
    "bias's size": (changing("bias", lambda t: t[:-1]), ValueError, ["bias must", "(80,)", "(79,)"]),
    # the two names of one tensor have to agree; which one is right, nobody knows
    "names conflict": (conflicting, ValueError, ["loraB.7", "differs"]),
    "spellings conflict": (
        lambda state: {**state, "lora_fc_A.weight": state["lora_fc_A.default.weight"] + 1},
        ValueError,
        ["lora_fc_A", "differs"],
    ),
    "two adapters": (
        lambda state: {**state, **{key.replace("default", "other"): value + 1 for key, value in state.items()}},
        ValueError,
        ["differs"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reversed"])
def test_refused(name: str, reverse: bool, golden: dict[str, Golden]):
    """Nothing is loaded from a state dict with anything wrong in it, wherever in its order that stands."""
    change, exception, words = REFUSED[name]
    state = change(golden[LARGEST].state)
    if reverse:
        state = dict(reversed(state.items()))
    layer = golden[LARGEST].layer()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(exception) as raised:
        layer.load_official_state_dict(state)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_bias_for_a_layer_without_one(golden: dict[str, Golden]):
    """A bias that has no place would be lost."""
    file = golden["layer_fp64_e4"]
    with pytest.raises(KeyError, match=r"unknown \['bias'\]"):
        file.layer().load_official_state_dict({**file.state, "bias": torch.ones(40, dtype=torch.float64)})


def test_message_names_all_keys(golden: dict[str, Golden]):
    """Missing and unknown together, so that one look tells what kind of file it is."""
    state = dict(golden[LARGEST].state)
    state["lora_A.default.loraA.9.weight"] = state.pop("lora_A.default.loraA.0.weight")
    del state["lora_fc_A.default.weight"]
    with pytest.raises(KeyError) as raised:
        golden[LARGEST].layer().load_official_state_dict(state)
    for word in ("lora_A.0", "lora_fc_A", "lora_A.default.loraA.9.weight"):
        assert word in str(raised.value)


def test_official_layer_trains_on(golden: dict[str, Golden]):
    """What was loaded is a layer like any other: a step changes the adapter, and not the base."""
    layer, batch = golden["layer_fp32_e8"].loaded(), golden["layer_fp32_e8"].batch()
    base = layer.base_layer.weight.clone()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    with smolora.use_backend("torch"):
        layer(batch.x, **batch.keywords).backward(batch.cotangent)
    optimizer.step()
    assert torch.equal(layer.base_layer.weight, base)
    assert not torch.equal(layer.vu_importance, golden["layer_fp32_e8"].state["lora_fc_A.default.weight"][0])
