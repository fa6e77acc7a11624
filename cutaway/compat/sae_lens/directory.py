"""Names of releases: those of `compat.MODELS`, as RELEASE or RELEASE/SAE_ID, and a small table of the hub's."""

from __future__ import annotations

import json
import webbrowser
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from cutaway.compat import MODELS
from cutaway.core.refuse import Refused, nearest


@cache
def get_pretrained_saes_directory() -> dict[str, Any]:
    """Return the table by release: its repository, its model, and the folder of every SAE."""
    rows = json.loads(Path(__file__).with_name("releases.json").read_text("utf-8"))
    return {release: SimpleNamespace(**row) for release, row in rows.items()}


def place(release: str, sae_id: str) -> tuple[Any, dict[str, Any]]:
    """Return where the SAE of a release is, and facts of it.

    Raises:
        Refused: nothing of that name is known.
    """
    name, table = f"{release}/{sae_id}".rstrip("/"), get_pretrained_saes_directory()
    found = MODELS.get(name, MODELS.get(release))
    if found is not None or release not in table:
        if found is None and "/" not in release and not Path(release).exists():
            near = nearest(release, [*MODELS, *table])
            why = "no release of that name is known here" + (f"; near: {near}" if near else "")
            way = f"name a folder, compat.MODELS[{release!r}] = FOLDER; `cutaway dict train` makes one"
            raise Refused(f"SAE release {release!r}", why, way)
        return name if found is None else found, {}
    row = table[release]
    if sae_id not in row.saes_map:
        raise Refused(
            f"SAE {sae_id!r} of {release}", "it has none of that name", f"use {nearest(sae_id, row.saes_map)}"
        )
    return f"{row.repo_id}/{row.saes_map[sae_id]}", {
        **(row.config_overrides or {}),
        "neuronpedia_id": row.neuronpedia_id[sae_id],
    }


def get_neuronpedia_quick_list(sae: Any, features: list[int], name: str = "temporary_list") -> str:
    """Open a list of latents on Neuronpedia in the browser, and return its address."""
    known = sae.cfg.metadata
    layer = str(known.neuronpedia_id).partition("/")[2]
    listed = [{"modelId": known.model_name, "layer": layer, "index": str(f)} for f in features]
    url = f"https://neuronpedia.org/quick-list/?name={quote(name)}&features={quote(json.dumps(listed))}"
    webbrowser.open(url)
    return url
