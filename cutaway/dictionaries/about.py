"""Training settings read from the file of a dictionary, in any tool's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def trained_bos(about: Mapping[str, Any]) -> str | None:
    """Return the policy for beginning-of-text tokens in training, as `streams.Packing` names it.

    None if the file does not say it. SAELens' `prepend_bos` puts the token before every context; with and without
    it, the token also stands between documents.
    """
    about = next(iter(about["parts"]), {}) if about.get("parts") else about
    stream = about.get("stream")
    packing = stream.get("packing") if isinstance(stream, dict) else None
    if isinstance(packing, dict) and packing.get("bos"):
        return str(packing["bos"])
    prepended = about.get("prepend_bos")
    return None if prepended is None else "both" if prepended else "document"
