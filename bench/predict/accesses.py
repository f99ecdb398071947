"""Which tensor a load or store in machine code belongs to, read from Triton's IR by source line."""

from __future__ import annotations

import re
from collections.abc import Iterable

_ARGUMENT = re.compile(r'%([\w]+): !tt\.ptr[^%]*?loc\("(\w+)"')
_FOR = re.compile(r"iter_args\((.*?)\) ->")


def pointer_arguments(ttir: str) -> dict[str, str]:
    """Return the pointers of a kernel's arguments in Triton's IR, with their names: of a tuple's, `name_i`."""
    header = next(line for line in ttir.splitlines() if "tt.func public" in line)
    found = _ARGUMENT.findall(header)
    names = [base for _, base in found]
    seen: dict[str, int] = {}
    out = {}
    for value, base in found:
        index = seen.get(base, 0)
        seen[base] = index + 1
        out[f"%{value}"] = f"{base}_{index}" if names.count(base) > 1 or base.endswith("_ptrs") else base
    return out


def _lines(ttir: str) -> dict[str, tuple[str, int]]:
    """Return file and line of every location; of an inlined call, where the code stands."""
    direct = re.compile(r'^(#loc\d*) = loc\("([^"]+)":(\d+):\d+\)')
    named = re.compile(r'^(#loc\d*) = loc\((?:"[^"]*"\(|callsite\()(#loc\d*)')
    places: dict[str, tuple[str, int]] = {}
    through: dict[str, str] = {}
    for row in ttir.splitlines():
        if found := direct.match(row):
            places[found[1]] = found[2], int(found[3])
        elif found := named.match(row):
            through[found[1]] = found[2]
    for name in through:
        place = name
        while place in through:
            place = through[place]
        if place in places:
            places[name] = places[place]
    return places


def tensors_by_line(ttir: str) -> dict[tuple[str, int, bool], set[str]]:
    """Return for each source line with loads (False) or stores (True) the arguments that it reads or writes."""
    roots = dict(pointer_arguments(ttir))
    places = _lines(ttir)
    out: dict[tuple[str, int, bool], set[str]] = {}

    def root(values: Iterable[str]) -> str | None:
        return next((roots[v] for v in values if v in roots), None)

    for row in ttir.splitlines():
        for pair in [] if not (found := _FOR.search(row)) else re.findall(r"(%[\w#]+) = (%[\w#]+)", found[1]):
            if pair[1] in roots:
                roots[pair[0]] = roots[pair[1]]
        operands = re.findall(r"%[\w#]+", row)
        if (made := re.match(r"\s*(%\w+)(?::\d+)? = ", row)) and "!tt.ptr" in row:
            source = root(operands[1:])
            if source and "tt.load" not in row:
                roots[made[1]] = source
        if access := re.search(r"tt\.(load|store|atomic_\w+) ", row):
            after = re.findall(r"%[\w#]+", row[access.end() :])
            source, place = root(after), re.search(r"loc\((#loc\d*)\)", row)
            if source and place and place[1] in places:
                key = (*places[place[1]], access[1] == "store")
                out.setdefault(key, set()).add(source)
    return out
