"""The members that are added to PEFT's enum of methods."""

import copy
import json
import pickle

import peft

from smolora import SMoLoRAConfig


def test_peft_type():
    """The member that peft's closed enum lacks: found by name, by value, in iteration, and once only."""
    member = peft.PeftType.SMOLORA
    assert member is peft.PeftType("SMOLORA") is peft.PeftType["SMOLORA"]
    assert member == "SMOLORA" and member.value == member.name == "SMOLORA"
    assert list(peft.PeftType).count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert json.dumps(member) == '"SMOLORA"'
    assert SMoLoRAConfig().peft_type is member
    assert SMoLoRAConfig(peft_type="LORA").peft_type is member  # it is no other method's
