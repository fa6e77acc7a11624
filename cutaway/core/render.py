"""Registry of the drawing functions of `views` (one row up), so that results can show themselves without importing it.

A module of its own because it must be importable without torch: the package root fills it at import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RENDERERS: dict[str, Callable[..., Any]] = {}
