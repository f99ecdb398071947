"""Compatibility with stock PEFT: its version, and its enum of methods, to which we add ours."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

if Version(version("peft")).release < (0, 21):
    raise ImportError(f"smolora needs peft 0.21 or newer, found {version('peft')}: pip install -U 'peft>=0.21'")

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

__all__ = ["PeftConfig", "PeftType", "register_peft_type"]


def register_peft_type(name: str) -> PeftType:
    """Add the member `name` to `peft.PeftType`, a string Enum that is closed for subclassing."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member
