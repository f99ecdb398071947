"""Packages that only some commands need, by the extra that installs them (`pip install 'smolora[llava]'`)."""

from __future__ import annotations

import importlib.util

MODULES = {  # by extra: the modules of its own packages, each with its package's name
    "llava": {"PIL": "pillow", "sentence_transformers": "sentence-transformers"},
    "eval": {"pydantic": "pydantic", "yaml": "pyyaml"},
    "report": {"jinja2": "jinja2", "matplotlib": "matplotlib"},
    "demo": {"gradio": "gradio", "jinja2": "jinja2", "matplotlib": "matplotlib"},
    "minicvit": {"sklearn": "scikit-learn"},
    "own": {"jsonschema": "jsonschema", "pyarrow": "pyarrow"},
}
INCLUDES = {"eval": "llava", "demo": "eval", "minicvit": "eval", "own": "eval"}  # an extra that comes with another


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message has the command that installs it."""


def modules_of(extra: str) -> dict[str, str]:
    """Return the modules of an extra and of those that it includes, each with its package's name."""
    included = modules_of(INCLUDES[extra]) if extra in INCLUDES else {}
    return {**included, **MODULES[extra]}


def require_extra(extra: str, *modules: str, user: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        extra: a name of `MODULES`.
        modules: the modules that are needed; by default all of the extra.
        user: who needs them, for the message.

    Raises:
        MissingExtraError: a package is not installed.
    """
    packages = modules_of(extra)
    missing = [packages[name] for name in modules or packages if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(
            f"{user} needs {', '.join(missing)}, which {verb} not installed: pip install 'smolora[{extra}]'"
        )
