"""What a run found to be wrong."""

from __future__ import annotations

from collections import Counter


class Faults:
    """Faults by kind and place, and how often each was seen."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, where: str) -> None:
        self.found[kind, where] += 1

    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.found}

    def __bool__(self) -> bool:
        return bool(self.found)

    def __str__(self) -> str:
        return "\n".join(f"{kind} ({count} times): {where}" for (kind, where), count in self.found.most_common(20))
