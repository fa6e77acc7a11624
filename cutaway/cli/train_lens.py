"""`cutaway lenses train` and `estimate`: a tuned lens and a Jacobian lens of a model, with live progress."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from cutaway.cli.bar import Bar
from cutaway.cli.dict.app import computing_threads
from cutaway.cli.harvest import documents_of
from cutaway.cli.repeat import pinned, repeated
from cutaway.cli.shell import Reply
from cutaway.cli.subjects import DEFAULT_MODEL, load_model

Model = Annotated[str, Parameter(help="zoo name, folder, GGUF file, or Hugging Face id")]
Dtype = Annotated[str | None, Parameter(help="dtype of the weights and of computing")]
Device = Annotated[str | None, Parameter(help="device, such as cuda:0")]
Text = Annotated[
    str | None,
    Parameter(help="a text file, a folder, .jsonl, ids (.npy, .safetensors) or hub:org/name; a world has its own"),
]
Field = Annotated[str, Parameter(help="field with the text, in JSON lines and data sets")]
Out = Annotated[Path, Parameter(help="folder of the run: checkpoint, log and lens")]
Resume = Annotated[bool, Parameter(help="go on from the checkpoint in the folder, if there is one")]
Threads = Annotated[int, Parameter(help="processor threads")]


def train(
    *,
    out: Out,
    model: Model = DEFAULT_MODEL,
    model_dtype: Dtype = None,
    model_device: Device = None,
    text: Text = None,
    field: Field = "text",
    tokens: Annotated[int, Parameter(help="budget")] = 200_000,
    batch: Annotated[int, Parameter(help="tokens a step")] = 512,
    context: Annotated[int, Parameter(help="tokens a context")] = 96,
    rate: Annotated[float | None, Parameter(help="learning rate [default: 0.4 over the model's width]")] = None,
    seed: Annotated[int, Parameter(help="seed of the order of tokens")] = 0,
    resume: Resume = True,
    threads: Threads = 2,
) -> Reply:
    """Train a tuned lens, an affine translator per layer (Belrose et al. 2023); when repeated, a stopped run goes on.

    `cutaway lenses tuned_lens --lens FOLDER` reads through it.
    """
    given = dict(locals())
    size: dict[str, Any] = {"tokens": tokens, "rate": rate, "batch": batch, "context": context, "seed": seed}
    return _fitted("train", train, given, size)


def estimate(
    *,
    out: Out,
    model: Model = DEFAULT_MODEL,
    model_dtype: Dtype = None,
    model_device: Device = None,
    text: Text = None,
    field: Field = "text",
    tokens: Annotated[int, Parameter(help="budget; each costs the width of the model in backwards")] = 12_800,
    batch: Annotated[int, Parameter(help="tokens that go through the model at once")] = 512,
    context: Annotated[int, Parameter(help="tokens a context")] = 128,
    skip: Annotated[int, Parameter(help="first positions of a context that are left out")] = 16,
    seed: Annotated[int, Parameter(help="seed of what tells the share of the position itself, and of the shuffle")] = 0,
    shuffled: Annotated[bool, Parameter(help="a control: the tokens of each context in random order")] = False,
    resume: Resume = True,
    threads: Threads = 2,
) -> Reply:
    """Estimate a Jacobian lens, a mean Jacobian per layer; when repeated, a stopped run goes on.

    The progress shows the largest standard error of a layer, as a share of its Jacobian.
    `cutaway lenses jacobian_lens --jacobian FOLDER` reads through it.
    """
    given = dict(locals())
    size: dict[str, Any] = {"tokens": tokens, "skip": skip, "batch": batch, "context": context, "seed": seed}
    size["shuffled"] = shuffled
    return _fitted("estimate", estimate, given, size)


def _fitted(name: Literal["train", "estimate"], function: Any, given: dict[str, Any], size: dict[str, Any]) -> Reply:
    """Fit a lens with live progress, and say how to read through it."""
    from cutaway.lenses import estimate_jacobian_lens, train_tuned_lens

    fit, doing, loss, seen = {
        "train": (train_tuned_lens, "training", "loss", "KL"),
        "estimate": (estimate_jacobian_lens, "estimation", "error", "error"),
    }[name]
    source = load_model(given["model"], given["model_dtype"], given["model_device"])
    documents = documents_of(source, given["text"], given["field"], doing)
    last: dict[str, Any] = {}
    with computing_threads(given["threads"]), Bar(doing) as bar:

        def report(line: dict[str, Any]) -> None:
            if loss in line:
                last.update(line)
                speed, left = line["tokens_per_second"], line["seconds_left"]
                bar.show(line["tokens"], given["tokens"], "tokens", f"{seen} {line[loss]:.3f}", speed, left)

        fit(source, documents, **size, out=given["out"], resume=given["resume"], on_log=report)
    command = repeated(f"lenses {name}", function, given | {"model": pinned(source, given["model"])}, "resume", "out")
    done, method, flag = {
        "train": ("trained", "tuned_lens", "--lens"),
        "estimate": ("estimated", "jacobian_lens", "--jacobian"),
    }[name]
    words = ["cutaway", "lenses", method, "--model", given["model"], flag, str(given["out"]), "--prompts", "…"]
    use = shlex.join(words)
    found = {"train": ("divergence",), "estimate": ("contexts", "errors")}[name]
    data = {"folder": str(given["out"]), **{n: last.get(n) for n in found}, "command": command}

    def show(console: Any) -> None:
        console.print(f"{done}: {use}", style="bold", markup=False, soft_wrap=True)
        console.print(f"again: {command}", style="dim", markup=False, soft_wrap=True)

    return Reply(data, show)
