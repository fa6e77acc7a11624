"""Where the views (one row up) put their drawing functions, so that results can show themselves without knowing them.

A module of its own because it must be importable without torch: the package root fills it at import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RENDERERS: dict[str, Callable[..., Any]] = {}
