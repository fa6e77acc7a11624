"""The recipe of the dictionaries that ship with the miniworld: one autoencoder, and a transcoder for every MLP.

Rows of data; `cutaway zoo dictionaries` trains them again, all on one stream of the world's documents. `shipped()` says
where the files are; `ca.dictionaries.load("miniworld/transcoders")` opens one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cutaway.zoo.miniworld.world import DATA


@dataclass(frozen=True)
class Row:
    """Recipe of a dictionary.

    Attributes:
        file: the file that it goes into.
        reads: address that it reads.
        writes: address that it writes.
        latents: number of latents.
        k: active latents per token.
    """

    file: str
    reads: str
    writes: str
    latents: int
    k: int


AUTOENCODER, TRANSCODERS = "resid_post.3", "transcoders"
RECIPE: tuple[Row, ...] = (
    Row(AUTOENCODER, "resid_post.3", "resid_post.3", 1536, 12),
    *(Row(TRANSCODERS, f"mlp_in.{i}", f"mlp_out.{i}", 768, 12) for i in range(6)),
)
TOKENS, BATCH, CONTEXT, WINDOW, SEED = 500_000, 2048, 96, 1 << 16, 0
RATE = 2e-3  # of all; three rates were tried on the autoencoder


def shipped() -> dict[str, Path]:
    """Return the files by name."""
    return {name: DATA / f"dictionary.{name}.safetensors" for name in dict.fromkeys(row.file for row in RECIPE)}
