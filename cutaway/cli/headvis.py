"""`cutaway heads write_headvis` and `read_headvis`: pages of a model's heads as a HeadVis tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from cutaway.cli.method_commands import reply
from cutaway.cli.repeat import pinned, repeated
from cutaway.cli.shell import Reply, working
from cutaway.cli.subjects import DEFAULT_MODEL, load_model
from cutaway.cli.train_lens import Device, Dtype, Model
from cutaway.core.method import parse_list


def write_headvis(
    *,
    out: Annotated[Path, Parameter(help="a new folder")],
    prompts: Annotated[str, Parameter(help="a .txt file with a prompt per line, or one prompt")],
    model: Model = DEFAULT_MODEL,
    model_dtype: Dtype = None,
    model_device: Device = None,
    heads: Annotated[str, Parameter(help="these, as layer.head or layer.*; all if empty")] = "",
    intervals: Annotated[int, Parameter(help="intervals of a sequence's largest attention")] = 10,
    shown: Annotated[int, Parameter(help="sequences of an interval that are shown, drawn at random")] = 3,
    strongest: Annotated[int, Parameter(help="sequences of the last interval, the strongest first")] = 10,
    seed: Annotated[int, Parameter(help="seed of the draws")] = 0,
) -> Reply:
    """Write the pages of a model's heads as a HeadVis tree (Luger et al. 2026), in two forwards."""
    given = dict(locals())
    from cutaway.heads import write_headvis as write
    from cutaway.tasks import read_prompts

    source = load_model(model, model_dtype, model_device)
    wanted: dict[str, Any] = {"intervals": intervals, "shown": shown, "strongest": strongest, "seed": seed}
    with working("reading heads …"):
        tree = write(source, read_prompts(prompts), out, heads=parse_list(heads), **wanted)
    command = repeated("heads write_headvis", write_headvis, given | {"model": pinned(source, model)}, "out")

    def show(console: Any) -> None:
        console.print(f"{len(tree.heads)} heads: {out}", style="bold", markup=False, soft_wrap=True)
        console.print(f"again: {command}", style="dim", markup=False, soft_wrap=True)

    return Reply({"folder": str(out), "heads": [f"{i}.{h}" for i, h in tree.heads], "command": command}, show)


def read_headvis(
    folder: Annotated[Path, Parameter(help="a HeadVis tree")],
    *,
    out: Annotated[Path | None, Parameter(help="save the metrics of all heads, as .safetensors, .html or .png")] = None,
) -> Reply:
    """Show the metrics of the heads of a HeadVis tree, and refuse one that is damaged."""
    from cutaway.heads import read_headvis as read

    tree = read(folder)
    for layer, head in tree.heads:
        tree.page(layer, head)
    return reply(tree.metrics(), out)
