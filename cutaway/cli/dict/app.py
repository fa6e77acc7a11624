"""`cutaway dict`: dictionaries trained on a model's activations."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Group, Parameter

from cutaway.cli.bar import Bar
from cutaway.cli.dict.cards import show_cards, showing
from cutaway.cli.dict.recipes import Asked, names, recipes
from cutaway.cli.dict.source import From, Origin, open_origin
from cutaway.cli.repeat import repeated
from cutaway.cli.shell import Reply, command_line
from cutaway.cli.stdio import tell
from cutaway.cli.words import spelled
from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from cutaway.dictionaries.objectives import Term
    from cutaway.dictionaries.training import Plan
    from cutaway.suites.dictionary_runs import Finished

app = App(name="dict")
app.command("cutaway.cli.dict.evaluate:evaluate", name="eval")
app.command("cutaway.cli.dict.files:convert", name="convert")

RUN, NOTHING, USUAL = Group("The run", sort_key=4), Asked(), From()


@app.command
def train(
    *,
    out: Annotated[Path, Parameter(help="folder of the run: checkpoint, log, card and dictionaries", group=RUN)],
    what: Asked = NOTHING,
    of: From = USUAL,
    tokens: Annotated[int, Parameter(help="budget", group=RUN)] = 1_000_000,
    batch: Annotated[int, Parameter(help="tokens a step", group=RUN)] = 2048,
    select: Annotated[
        Literal["auto", "float32", "bfloat16"], Parameter(help="in what candidates of top-k are found", group=RUN)
    ] = "auto",
    resume: Annotated[bool, Parameter(help="go on from the checkpoint in the folder, if any", group=RUN)] = True,
    threads: Annotated[int, Parameter(help="processor threads", group=RUN)] = 2,
    device: Annotated[str, Parameter(help="where the dictionary is trained, such as cuda:0", group=RUN)] = "cpu",
    replicas: Annotated[
        int, Parameter(help="under torchrun: parts of the tokens; in each, latents are sharded", group=RUN)
    ] = 1,
    wandb: Annotated[
        str | None, Parameter(help="project at Weights & Biases that gets the log as well", group=RUN)
    ] = None,
) -> Reply:
    """Train sparse dictionaries on activations, with live progress; an interrupted run goes on when repeated.

    Flags that may be repeated (--latents, --k, --seed) make one dictionary for each combination, all on one stream.
    """
    given = dict(locals())
    from cutaway.dictionaries import training as tr
    from cutaway.models.sweep.processes import processes, rank
    from cutaway.suites.dictionary_runs import finish

    plan = _plan(tokens, batch, select)
    origin = open_origin(of)
    command = repeated("dict train", train, given | {"of": origin.pinned}, "resume")
    made = recipes(what, origin.places, _spliced(what, origin))
    sites = tuple(dict.fromkeys(s for r in made for s in (*r.reads, *r.writes)))
    size = (sites, batch, tokens + plan.card_tokens)
    stream = origin.whole(*size) if what.end_to_end else origin.stream(*size)
    with computing_threads(threads):
        with Bar("training") as bar, ExitStack() as stack, _resumable(out):
            where = tr.mesh(replicas) if replicas > 1 or processes() > 1 else device
            about = {"model": of.model, "recipes": [r.as_dict() for r in made], "plan": plan.as_dict()}
            on_log = stack.enter_context(tr.wandb_log(wandb, about)) if wandb and rank() == 0 else None
            done = tr.train(
                stream, made, plan, out=out, resume=resume, device=where, progress=showing(bar), on_log=on_log
            )
        if rank() > 0:  # the first process judges and writes
            return Reply({}, lambda console: None)
        here = [replace(t, dictionary=t.dictionary.to("cpu")) for t in done]
        finished = finish(here, names(made), stream, out, plan.card_tokens)
        beginning = getattr(stream, "beginning", None)  # whole contexts have none of their own
        return _finished(finished, beginning, command)


def _finished(done: Finished, beginning: str | None, command: str) -> Reply:
    """Show the cards, or why there are none."""
    files = [str(f) for f in done.files]
    if done.refusal is not None:
        why = spelled(done.refusal, command_line.get())
        data = {"dictionaries": files, "cards": [], "not judged": why.as_dict(), "command": command}
        return Reply(data, lambda console: _show_unjudged(console, files, why))
    data = {"dictionaries": files, "cards": done.cards, "beginning": beginning, "command": command}

    def show(console: Any) -> None:
        show_cards(console, files, done.cards, beginning)
        console.print(f"again: {command}", style="dim", markup=False, soft_wrap=True)

    return Reply(data, show)


def _plan(tokens: int, batch: int, select: Literal["auto", "float32", "bfloat16"]) -> Plan:
    from cutaway.suites.dictionary_runs import planned

    if tokens < 1:
        raise Refused(f"--tokens {tokens}", "there is nothing to train on", "give for example --tokens 1000000")
    if batch > tokens:
        why = f"a single step would train on {batch:,}"
        raise Refused(f"--tokens {tokens} --batch {batch}", why, f"give --batch {max(1, tokens // 8)}, or more tokens")
    return planned(tokens, select)


def _spliced(what: Asked, origin: Origin) -> tuple[Term, ...]:
    """Return the end-to-end term that is asked for."""
    if what.end_to_end is None:
        return ()
    if what.recipe is not None or origin.shards is not None or origin.named:
        raise Refused("--end-to-end", "one model must run, and flags say the rest", "leave out --recipe, --acts, names")
    from cutaway.suites.dictionary_runs import end_to_end

    return (end_to_end(origin.model, what.end_to_end),)


@contextmanager
def computing_threads(n: int) -> Iterator[None]:
    """Compute with n threads within the block."""
    from cutaway.training.whole_models import processor_threads

    if n < 1:
        raise Refused(f"--threads {n}", "at least one is needed", "give --threads 2")
    with processor_threads(n):
        yield


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Say how an interrupted run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        from cutaway.dictionaries.training.update import KIND
        from cutaway.training import Checkpoints

        if Checkpoints(out, KIND).exist():
            words = [w for w in command_line.get() if w != "--no-resume"]
            tell(f"saved in {out}; go on with: {shlex.join(['cutaway', *words])}\n")
        raise


def _show_unjudged(console: Any, files: list[str], error: Refused) -> None:
    from rich.markup import escape

    for file in files:
        console.print(f"[bold]{escape(file)}[/]", soft_wrap=True)
    console.print(f"[yellow]not judged: {escape(error.what)}: {escape(error.why)}; {escape(error.instead)}[/]")
    judge = shlex.join(["cutaway", "dict", "eval", files[0], "--text", "OTHER"])
    console.print(f"the dictionary is saved: {escape(judge)}", soft_wrap=True)
