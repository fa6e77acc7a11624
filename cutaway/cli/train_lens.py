"""`cutaway lenses train`: a tuned lens of a model, with live progress."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from cutaway.cli.bar import Bar
from cutaway.cli.dict.app import computing_threads
from cutaway.cli.harvest import documents_of
from cutaway.cli.repeat import pinned, repeated
from cutaway.cli.shell import Reply
from cutaway.cli.subjects import DEFAULT_MODEL, load_model


def train(
    *,
    out: Annotated[Path, Parameter(help="folder of the run: checkpoint, log and lens")],
    model: Annotated[str, Parameter(help="zoo name, folder, GGUF file, or Hugging Face id")] = DEFAULT_MODEL,
    model_dtype: Annotated[str | None, Parameter(help="dtype of the weights and of computing")] = None,
    model_device: Annotated[str | None, Parameter(help="device, such as cuda:0")] = None,
    text: Annotated[
        str | None,
        Parameter(help="a text file, a folder, .jsonl, ids (.npy, .safetensors) or hub:org/name; a world has its own"),
    ] = None,
    field: Annotated[str, Parameter(help="field with the text, in JSON lines and data sets")] = "text",
    tokens: Annotated[int, Parameter(help="budget")] = 200_000,
    batch: Annotated[int, Parameter(help="tokens a step")] = 512,
    context: Annotated[int, Parameter(help="tokens a context")] = 96,
    rate: Annotated[float | None, Parameter(help="learning rate [default: 0.4 over the model's width]")] = None,
    seed: Annotated[int, Parameter(help="seed of the order of tokens")] = 0,
    resume: Annotated[bool, Parameter(help="go on from the checkpoint in the folder, if there is one")] = True,
    threads: Annotated[int, Parameter(help="processor threads")] = 2,
) -> Reply:
    """Train a tuned lens, an affine translator per layer (Belrose et al. 2023); when repeated, a stopped run goes on.

    `cutaway lenses tuned_lens --lens FOLDER` reads through it.
    """
    given = dict(locals())
    from cutaway.lenses import train_tuned_lens

    source = load_model(model, model_dtype, model_device)
    documents = documents_of(source, text, field, "training")
    size: dict[str, Any] = {"tokens": tokens, "rate": rate, "batch": batch, "context": context, "seed": seed}
    last: dict[str, Any] = {}
    with computing_threads(threads), Bar("training") as bar:

        def report(line: dict[str, Any]) -> None:
            if "loss" in line:
                last.update(line)
                speed, left = line["tokens_per_second"], line["seconds_left"]
                bar.show(line["tokens"], tokens, "tokens", f"KL {line['loss']:.3f}", speed, left)

        train_tuned_lens(source, documents, **size, out=out, resume=resume, on_log=report)
    command = repeated("lenses train", train, given | {"model": pinned(source, model)}, "resume", "out")
    use = shlex.join(["cutaway", "lenses", "tuned_lens", "--model", model, "--lens", str(out), "--prompts", "…"])
    data = {"folder": str(out), "divergence": last.get("divergence"), "command": command}

    def show(console: Any) -> None:
        console.print(f"trained: {use}", style="bold", markup=False, soft_wrap=True)
        console.print(f"again: {command}", style="dim", markup=False, soft_wrap=True)

    return Reply(data, show)
