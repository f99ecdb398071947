import pytest

from smolora.engine import compiled


@pytest.fixture
def without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation that found no C++ compiler."""
    monkeypatch.setattr(compiled, "module", None)
