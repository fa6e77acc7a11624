"""`cutaway dict`: dictionaries trained on a model's activations."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from cutaway.cli.shell import Reply
from cutaway.cli.subjects import DEFAULT_MODEL, load_model

if TYPE_CHECKING:
    from cutaway.dictionaries.train import Gating, Recipe, Trained
    from cutaway.models.model import Model

app = App(name="dict")
app.command("cutaway.cli.dictionary_eval:evaluate", name="eval")
app.command("cutaway.cli.dictionary_files:convert", name="convert")

Gate = Literal["topk", "batchtopk", "abstopk", "groupmax", "matchingpursuit", "relu", "jumprelu", "gated"]


@app.command
def train(
    *,
    site: Annotated[str, Parameter(help="address that is read and written, such as resid_post.3")],
    out: Annotated[Path, Parameter(help="folder of the run: checkpoint, log, card and the dictionary")],
    model: Annotated[str, Parameter(help="zoo name, folder, or Hugging Face id")] = DEFAULT_MODEL,
    text: Annotated[
        str | None, Parameter(help="a text file, a folder of them, or .jsonl; a zoo world has its own")
    ] = None,
    write: Annotated[str | None, Parameter(help="another address to write: a transcoder")] = None,
    skip: Annotated[bool, Parameter(help="of a transcoder: a linear map beside it")] = False,
    latents: Annotated[int, Parameter(help="number of latents")] = 1024,
    gate: Annotated[Gate, Parameter(help="how latents become active")] = "batchtopk",
    k: Annotated[int, Parameter(help="active latents a token, for gates that set a number")] = 16,
    penalty: Annotated[float | None, Parameter(help="weight of the sparsity penalty, for the other gates")] = None,
    nested: Annotated[list[int] | None, Parameter(help="Matryoshka: widths of the prefixes, one option each")] = None,
    tokens: Annotated[int, Parameter(help="budget")] = 1_000_000,
    batch: Annotated[int, Parameter(help="tokens a step")] = 2048,
    context: Annotated[int, Parameter(help="tokens a context")] = 96,
    rate: Annotated[float | None, Parameter(help="learning rate [default: three are tried]")] = None,
    seed: Annotated[list[int] | None, Parameter(help="seed of the starting directions; several make several")] = None,
    resume: Annotated[bool, Parameter(help="go on from the checkpoint in the folder, if there is one")] = True,
    threads: Annotated[int, Parameter(help="processor threads")] = 2,
    device: Annotated[str, Parameter(help="where the dictionary is trained, such as cuda:0")] = "cpu",
    replicas: Annotated[int, Parameter(help="under torchrun: parts of the tokens; in each, latents are sharded")] = 1,
    wandb: Annotated[str | None, Parameter(help="project at Weights & Biases that gets the log as well")] = None,
) -> Reply:
    """Train a sparse dictionary on a model's activations, with live progress; an interrupted run can be resumed."""
    import torch

    from cutaway.core.files import write_json
    from cutaway.dictionaries import train as tr
    from cutaway.dictionaries.store import save
    from cutaway.dictionaries.train.cards import card
    from cutaway.models.shards import processes, rank

    source_model = load_model(model)
    gating = _gating(gate, k)
    recipes = [_recipe(site, write, latents, gating, (penalty, nested, rate, skip, s)) for s in seed or [0]]
    window = max(4 * batch, min(1 << 16, tokens // 8))  # tokens that are shuffled together
    stream = _stream(source_model, text, recipes[0], (batch, window, context))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _Bar("training") as bar, ExitStack() as stack:
            plan = tr.Plan(tokens=tokens, card_tokens=min(16384, max(1024, tokens // 4)))
            where = tr.mesh(replicas) if replicas > 1 or processes() > 1 else device
            about = {"model": model, "recipes": [r.as_dict() for r in recipes], "plan": plan.as_dict()}
            told = stack.enter_context(tr.wandb_log(wandb, about)) if wandb and rank() == 0 else None
            done = tr.train(stream, recipes, plan, out=out, resume=resume, device=where, progress=bar.update, told=told)
        if rank() > 0:  # the first process judges and writes
            return Reply({}, lambda console: None)
        cards = card([_here(t) for t in done], stream, tokens=plan.card_tokens)
    finally:
        torch.set_num_threads(before)
    names = ["dictionary"] if len(done) == 1 else [f"dictionary-{r.seed}" for r in recipes]
    for name, t in zip(names, done, strict=True):
        save(_here(t).dictionary, out / f"{name}.safetensors")
    write_json(out / "card.json", cards)
    files = [str(out / f"{name}.safetensors") for name in names]
    return Reply({"dictionaries": files, "cards": cards}, lambda console: show_cards(console, files, cards))


def train_together(
    model: Model, recipe: Any, out: Path, tokens: int, threads: int, resume: bool
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Train every row of a zoo recipe on one stream of its world; one file a name, in half precision."""
    import torch

    from cutaway.core.files import write_json
    from cutaway.dictionaries import train as tr
    from cutaway.dictionaries.forms import together
    from cutaway.dictionaries.store import save
    from cutaway.streams import LiveStream, Packing
    from cutaway.zoo.miniworld.documents import WorldDocuments

    recipes = [
        _recipe(r.reads, None if r.reads == r.writes else r.writes, r.latents, tr.BatchTopK(r.k),
                (None, None, recipe.RATE, False, recipe.SEED))
        for r in recipe.RECIPE
    ]  # fmt: skip
    sites = tuple(dict.fromkeys(s for r in recipe.RECIPE for s in (r.reads, r.writes)))
    stream = LiveStream(model, WorldDocuments(model.world, recipe.SEED), sites, packing=Packing(context=recipe.CONTEXT),
                        batch=recipe.BATCH, window=recipe.WINDOW)  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _Bar("training") as bar:
            plan = tr.Plan(tokens=tokens, card_tokens=16384)
            done = tr.train(stream, recipes, plan, out=out, resume=resume, progress=bar.update)
        cards = tr.card(done, stream, tokens=plan.card_tokens)
    finally:
        torch.set_num_threads(before)
    files = []
    for name, file in recipe.shipped().items():
        parts = [t.dictionary for t, r in zip(done, recipe.RECIPE, strict=True) if r.file == name]
        files.append(save(parts[0] if len(parts) == 1 else together(parts), out / file.name, torch.float16))
    write_json(out / "dictionaries.json", {"cards": cards, "tokens": tokens})
    return files, cards


def _gating(gate: Gate, k: int) -> Gating:
    from cutaway.dictionaries import train as tr

    match gate:
        case "topk":
            return tr.TopK(k)
        case "batchtopk":
            return tr.BatchTopK(k)
        case "abstopk":
            return tr.AbsTopK(k)
        case "groupmax":
            return tr.GroupMax(k)
        case "matchingpursuit":
            return tr.MatchingPursuit(k)
        case "relu":
            return tr.Relu()
        case "jumprelu":
            return tr.JumpRelu()
        case "gated":
            return tr.Gated()


def _recipe(site: str, write: str | None, latents: int, gating: Gating, more: tuple) -> Recipe:
    from dataclasses import asdict

    from cutaway.core.refuse import Refused
    from cutaway.dictionaries import objectives as ob
    from cutaway.dictionaries import train as tr

    penalty, nested, rate, skip, seed = more
    terms = tr.customary(gating)
    if penalty is not None and gating.fixed:
        raise Refused("--penalty", "this gate sets the number of active latents itself", "use --k, or --gate jumprelu")
    if penalty is not None:
        terms = tuple(type(t)(**{**asdict(t), "weight": penalty}) for t in terms)  # type: ignore[call-overload]
    if nested:
        terms = (*terms, ob.Matryoshka(tuple(nested)))
    if write is None and skip:
        raise Refused("--skip", "an autoencoder has nothing to skip", "name another site with --write")
    if write is None:
        return tr.autoencoder(site, latents, gating, terms, rate=rate, seed=seed)
    return tr.transcoder(site, write, latents, gating, terms, rate=rate, seed=seed, skip=skip)


def _stream(model: Model, text: str | None, recipe: Recipe, size: tuple[int, int, int]) -> Any:
    from cutaway.core.refuse import Refused
    from cutaway.streams import LiveStream, Packing, documents

    sites = tuple(dict.fromkeys((*recipe.reads, *recipe.writes)))
    batch, window, context = size
    if text is not None:
        return LiveStream(
            model, documents(text), sites, packing=Packing(context=context), batch=batch, window=window, epochs=None
        )
    world = getattr(model, "world", None)
    if world is None:
        raise Refused("training without --text", "only models of the zoo have text of their own", "give --text FILE")
    from cutaway.zoo.miniworld.documents import WorldDocuments

    return LiveStream(model, WorldDocuments(world), sites, packing=Packing(context=context), batch=batch, window=window)


def _here(t: Trained) -> Trained:
    """The same result with its dictionary on the processor."""
    from dataclasses import replace

    return replace(t, dictionary=t.dictionary.to("cpu"))


def show_cards(console: Any, files: list[str], cards: list[dict[str, Any]]) -> None:
    """Every card as a table; a file may hold several dictionaries."""
    from rich.table import Table

    from cutaway.dictionaries.train.cards import summary

    for n, made in enumerate(cards):
        file = files[min(n, len(files) - 1)]
        others = list(next(iter(made["scores"].values()))["controls"])
        shown = Table("score", "value", "95 % interval", "random", *others, title=made["dictionary"])
        for row in summary(made):
            low, high = row["interval"]
            random = ", ".join(f"{v:.3g}" for v in row["random"])
            values = (f"{row['controls'][n]:.3g}" for n in others)
            shown.add_row(row["score"], f"{row['value']:.4g}", f"{low:.4g} – {high:.4g}", random, *values)
        console.print(shown)
        speed = f"{made['tokens']:,} tokens in {made['seconds']:.0f} s, rate {made['rate']:.3g}"
        console.print(f"{speed} · [bold]{file}[/]")


class _Bar:
    """Live progress of a training run on stderr; plain lines where that is no terminal."""

    def __init__(self, name: str):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        words = TextColumn(
            "{task.completed:,.0f}/{task.total:,.0f} tokens · FVU {task.fields[fvu]:.3f} · {task.fields[speed]}"
        )
        self.live = Progress(TextColumn(name), BarColumn(), words, TimeRemainingColumn(), console=self.console)
        self.task = self.live.add_task(name, total=None, fvu=float("nan"), speed="", visible=False)

    def __enter__(self) -> _Bar:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def update(self, p: Any) -> None:
        """Show one progress report."""
        speed = f"{p.tokens_per_second:,.0f} tokens/s"
        self.live.update(self.task, completed=p.tokens, total=p.of, fvu=p.fvu, speed=speed, visible=True)
        if not self.console.is_terminal:
            share, left = p.tokens / p.of, p.seconds_left / 60
            self.console.print(
                f"{p.tokens:,}/{p.of:,} tokens ({share:.0%}) · FVU {p.fvu:.3f} · {speed} · {left:.1f} min left"
            )
