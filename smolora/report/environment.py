"""The templates of the report and of the demo, in which whatever people wrote is text."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from ..io.markdown import printable
from .tables import Spread, cell_text


def environment(package: str = "smolora.report") -> Environment:
    """The templates of a package, and behind them the report's, with everything escaped."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("smolora.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["cell"] = cell_text
    environment.filters["sort_key"] = sort_key
    return environment


def sort_key(value: Any) -> float | None:
    """The number that a table is sorted by: of a number, of a mean, or of a text that is one."""
    if isinstance(value, Spread):
        return value.mean
    if isinstance(value, str):
        return float(value.replace(",", "")) if re.fullmatch(r"-?[\d,]+(\.\d+)?", value) else None
    return value
