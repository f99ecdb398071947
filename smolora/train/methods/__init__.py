"""Methods of continual tuning: an adapter, a schedule, and hooks around stages and steps."""

from __future__ import annotations

from .adapter import Adapter
from .hooks import Hooks
from .method import METHODS, Method
from .stage import Stage, StageWork

__all__ = ["METHODS", "Adapter", "Hooks", "Method", "Stage", "StageWork"]
