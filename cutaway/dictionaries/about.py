"""Facts about its training in the file of a dictionary, of any tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def trained_bos(about: Mapping[str, Any]) -> str | None:
    """Return the policy (of `streams.Packing`) for beginning-of-text tokens that the dictionary was trained with.

    None where the file does not say it. SAELens' `prepend_bos` puts the token before every context; with and without
    it, the token also stands between documents.
    """
    about = next(iter(about["parts"]), {}) if about.get("parts") else about
    stream = about.get("stream")
    packing = stream.get("packing") if isinstance(stream, dict) else None
    if isinstance(packing, dict) and packing.get("bos"):
        return str(packing["bos"])
    prepended = about.get("prepend_bos")
    return None if prepended is None else "both" if prepended else "document"
