"""What the file of a dictionary says about its training, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def trained_bos(about: Mapping[str, Any]) -> str | None:
    """Where the contexts of the training had a beginning-of-text token, as a policy of `streams.Packing`.

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
