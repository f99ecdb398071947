"""The configuration: what it refuses and how it says so, and that it is a `peft.PeftConfig` like any other."""

import copy
import json
import math
import pickle

import peft
import pytest

from smolora import SMoLoRAConfig
from smolora.config import dropout_threshold

REFUSED = [
    # ranks: the kernels go from 1 to 128
    (dict(r=0), ["r must", "positive integer", "got 0"]),
    (dict(r=-3), ["r must", "positive integer", "got -3"]),
    (dict(r=129), ["r must", "at most 128", "got 129"]),
    (dict(r=True), ["r must", "positive integer", "got True"]),  # a bool is an int in Python
    (dict(r=16.0), ["r must", "positive integer", "got 16.0"]),  # as a YAML file may have it
    (dict(r="16"), ["r must", "positive integer", "got '16'"]),  # as a command line may have it
    # counts
    (dict(num_vu_experts=0), ["num_vu_experts must", "positive integer", "got 0"]),
    (dict(num_if_experts=-1), ["num_if_experts must", "positive integer", "got -1"]),
    (dict(num_if_experts=False), ["num_if_experts must", "positive integer", "got False"]),
    (dict(instruction_dim=0), ["instruction_dim must", "positive integer", "got 0"]),
    (dict(instruction_dim=384.5), ["instruction_dim must", "positive integer", "got 384.5"]),
    (dict(top_k=0), ["top_k must", "positive integer", "got 0"]),
    # more experts than the smaller branch has, whichever branch that is
    (dict(top_k=5), ["top_k must", "at most", "= 4", "got 5"]),
    (dict(top_k=3, num_vu_experts=2), ["top_k must", "at most", "= 2", "got 3"]),
    (dict(top_k=3, num_if_experts=2), ["top_k must", "at most", "= 2", "got 3"]),
    # scaling: zero or NaN would make an adapter that does nothing, or worse
    (dict(lora_alpha=0), ["lora_alpha must", "positive finite", "got 0"]),
    (dict(lora_alpha=-32.0), ["lora_alpha must", "positive finite", "got -32.0"]),
    (dict(lora_alpha=math.nan), ["lora_alpha must", "positive finite", "got nan"]),
    (dict(lora_alpha=math.inf), ["lora_alpha must", "positive finite", "got inf"]),
    (dict(lora_alpha="32"), ["lora_alpha must", "positive finite", "got '32'"]),
    (dict(lora_alpha=True), ["lora_alpha must", "positive finite", "got True"]),
    # dropout: 8 bits decide
    (dict(lora_dropout=1), ["lora_dropout must", "[0, 1)", "got 1"]),
    (dict(lora_dropout=1.5), ["lora_dropout must", "[0, 1)", "got 1.5"]),
    (dict(lora_dropout=-0.1), ["lora_dropout must", "[0, 1)", "got -0.1"]),
    (dict(lora_dropout=math.nan), ["lora_dropout must", "[0, 1)", "got nan"]),
    (dict(lora_dropout=None), ["lora_dropout must", "[0, 1)", "got None"]),
    (dict(lora_dropout="0.05"), ["lora_dropout must", "[0, 1)", "got '0.05'"]),
    (dict(lora_dropout=False), ["lora_dropout must", "[0, 1)", "got False"]),
    (dict(lora_dropout=0.001), ["lora_dropout=0.001", "smallest", "1/256", "0.00390625"]),  # would silently be none
    (dict(lora_dropout=1 / 512), ["lora_dropout=0.001953125", "smallest", "1/256"]),  # rounds to even: none
    (dict(lora_dropout=0.999), ["lora_dropout=0.999", "largest", "255/256", "0.99609375"]),  # would drop everything
    # options: near misses that a person types
    (dict(route_over="answer"), ["route_over must", "'prompt', 'valid', 'all'", "got 'answer'"]),
    (dict(decode_routing="tokens"), ["decode_routing must", "'prompt', 'token'", "got 'tokens'"]),
    (dict(fusion="VU"), ["fusion must", "'adaptive', 'mean', 'vu', 'if'", "got 'VU'"]),
    (dict(router_grad="ste"), ["router_grad must", "'none', 'straight_through'", "got 'ste'"]),
    (dict(router_grad=None), ["router_grad must", "'none', 'straight_through'", "got None"]),  # "none" is a string
    (dict(fusion=["vu"]), ["fusion must", "got ['vu']"]),  # not even hashable
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[str(arguments) for arguments, _ in REFUSED])
def test_refuses(arguments: dict, words: list[str]):
    """An error that names the argument, its value and what is allowed: nobody should have to read the source."""
    with pytest.raises(ValueError) as raised:
        SMoLoRAConfig(**arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


ACCEPTED = [
    dict(r=1),  # the ends of what is allowed
    dict(r=128),
    dict(top_k=4),
    dict(num_vu_experts=1, num_if_experts=1),
    dict(num_vu_experts=2, num_if_experts=7, top_k=2),  # branches of different sizes
    dict(lora_dropout=0),  # no dropout, as an integer
    dict(lora_dropout=1 / 256),  # what the message of a refused one advises, both ways
    dict(lora_dropout=255 / 256),
    dict(lora_dropout=math.nextafter(1 / 512, 1)),  # just above 1/512, as the message says
    dict(lora_alpha=0.5),
]


@pytest.mark.parametrize("arguments", ACCEPTED, ids=str)
def test_accepts(arguments: dict):
    """The edges work, also those that the error messages name."""
    config = SMoLoRAConfig(**arguments)
    assert all(getattr(config, name) == value for name, value in arguments.items())


def test_defaults_are_the_papers():
    """The first choice of every question in which paper and released code differ; rank 16 scaled by 2."""
    config = SMoLoRAConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert (config.num_vu_experts, config.num_if_experts, config.top_k, config.instruction_dim) == (4, 4, 1, 384)
    options = config.route_over, config.decode_routing, config.fusion, config.router_grad
    assert options == ("prompt", "prompt", "adaptive", "none")
    assert config.target_modules is None


def test_official():
    """One word for the released code's routing; all else stays, and can be overridden."""
    official, default = SMoLoRAConfig.official(), SMoLoRAConfig()
    assert (official.route_over, official.decode_routing) == ("all", "token")
    differing = {name for name in default.to_dict() if getattr(official, name) != getattr(default, name)}
    assert differing == {"route_over", "decode_routing"}
    changed = SMoLoRAConfig.official(r=8, decode_routing="prompt")
    assert (changed.r, changed.route_over, changed.decode_routing) == (8, "all", "prompt")
    with pytest.raises(ValueError, match="r must be at most 128"):
        SMoLoRAConfig.official(r=1000)


@pytest.mark.parametrize(("r", "alpha", "scaling"), [(16, 32, 2.0), (128, 256, 2.0), (3, 1, 1 / 3), (16, 0.5, 1 / 32)])
def test_scaling(r: int, alpha: float, scaling: float):
    """lora_alpha / r with r the rank of one expert, not of all."""
    assert SMoLoRAConfig(r=r, lora_alpha=alpha).scaling == scaling


@pytest.mark.parametrize(
    ("arguments", "learn"),
    [
        (dict(), False),  # one expert: its gate is the constant 1
        (dict(top_k=2), True),  # the softmax over the chosen
        (dict(router_grad="straight_through"), True),
        (dict(top_k=2, router_grad="straight_through"), True),
        (dict(fusion="mean"), False),  # fusion has no say in it
        (dict(fusion="vu", top_k=2), True),
    ],
    ids=str,
)
def test_routers_learn(arguments: dict, learn: bool):
    """What decides whether the routers are frozen."""
    assert SMoLoRAConfig(**arguments).routers_learn is learn


@pytest.mark.parametrize(
    ("p", "threshold"), [(0, 0), (0.0, 0), (0.05, 13), (0.1, 26), (0.5, 128), (1 / 256, 1), (255 / 256, 255)]
)
def test_dropout_threshold(p: float, threshold: int):
    """The one rounding that kernels, torch and reference share: round(256 p)."""
    assert dropout_threshold(p) == threshold


# ------------------------------------------------------------------------------------------------------ as peft sees it

UNUSUAL = dict(
    r=8,
    lora_alpha=12.5,
    lora_dropout=0.25,
    num_vu_experts=3,
    num_if_experts=5,
    top_k=2,
    instruction_dim=24,
    route_over="valid",
    decode_routing="token",
    fusion="mean",
    router_grad="straight_through",
    target_modules=["gate_proj", "up_proj"],
    exclude_modules=r".*vision.*",
    modules_to_save=["lm_head"],
    task_type="CAUSAL_LM",
    base_model_name_or_path="a/base",
)


def test_target_modules_are_a_set():
    """As in peft's own configurations, where order means nothing; a regular expression stays a string."""
    assert SMoLoRAConfig(target_modules=["a", "b", "a"]).target_modules == {"a", "b"}
    assert SMoLoRAConfig(exclude_modules=["a"]).exclude_modules == {"a"}
    assert SMoLoRAConfig(target_modules=".*proj").target_modules == ".*proj"


@pytest.mark.parametrize("arguments", [{}, UNUSUAL], ids=["defaults", "nothing at its default"])
def test_dict_round_trip(arguments: dict):
    """Each field survives, none is added, and what comes back is checked like what a person wrote."""
    config = SMoLoRAConfig(**arguments)
    again = SMoLoRAConfig(**config.to_dict())
    assert again == config and again.to_dict() == config.to_dict()
    assert config.to_dict().keys() >= UNUSUAL.keys()
    with pytest.raises(ValueError, match="top_k must be at most"):
        SMoLoRAConfig(**{**config.to_dict(), "top_k": 9})


@pytest.mark.parametrize("arguments", [{}, UNUSUAL], ids=["defaults", "nothing at its default"])
def test_copies(arguments: dict):
    """Trainers deepcopy configurations, and worker processes get them pickled."""
    config = SMoLoRAConfig(**arguments)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("arguments", [{}, UNUSUAL], ids=["defaults", "nothing at its default"])
@pytest.mark.parametrize("reader", [SMoLoRAConfig, peft.PeftConfig], ids=["own class", "peft's class"])
def test_saved_round_trip(arguments: dict, reader: type, tmp_path):
    """adapter_config.json, read by the class itself, and by `peft.PeftConfig`, which goes by the type in it."""
    config = SMoLoRAConfig(**arguments)
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SMOLORA"
    again = reader.from_pretrained(str(tmp_path))
    assert type(again) is SMoLoRAConfig and again == config


def test_saved_nonsense_is_refused(tmp_path):
    """A configuration edited by hand is checked when it is read."""
    SMoLoRAConfig().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 4096}))
    with pytest.raises(ValueError, match="r must be at most 128, got 4096"):
        SMoLoRAConfig.from_pretrained(str(tmp_path))
