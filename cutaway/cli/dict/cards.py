"""Display of a training run: live progress, and the cards at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cutaway.views.wording import number, span

if TYPE_CHECKING:
    from cutaway.cli.bar import Bar
    from cutaway.dictionaries.training import Progress


def show_cards(console: Any, files: list[str], cards: list[dict[str, Any]], beginning: str | None = None) -> None:
    """Print every card as a table, and what contexts began with; a file may hold several dictionaries."""
    for n, made in enumerate(cards):
        _show(console, files[min(n, len(files) - 1)], made)
    for line in dict.fromkeys(_alike(made) for made in cards):
        if line:
            console.print(line)
    if beginning:
        console.print(beginning, style="dim", markup=False, soft_wrap=True)


def _show(console: Any, file: str, made: dict[str, Any]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from cutaway.suites.dictionary_cards import summary

    others = list(next(iter(made["scores"].values()))["controls"])
    shown = Table(title=made["dictionary"], title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("score", "value", "95 % interval", "random", *others):
        shown.add_column(name, no_wrap=name in ("score", "value", "95 % interval"))
    for row in summary(made):
        low, high = row["interval"]
        inside = span(low, high) if low == low else "–"
        random = ", ".join(dict.fromkeys(number(v) for v in row["random"]))
        shown.add_row(row["score"], number(row["value"]), inside, random, *(number(row["controls"][n]) for n in others))
    console.print(shown)
    for warning in made["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]")
    speed = f"{made['tokens']:,} tokens in {made['seconds']:.0f} s, rate {number(made['rate'])}"
    console.print(f"{speed} · [bold]{escape(file)}[/]", soft_wrap=True)


def _alike(made: dict[str, Any]) -> str:
    """Return the similarity of seeds in one line; empty if it was not measured."""
    seeds = made["seeds"]
    if "none" in seeds:
        return ""

    pairs = range(len(seeds["alike"]))
    low = min(pairs, key=lambda i: seeds["alike"][i])
    null = max(v for row in seeds["null"] for v in row)
    who = ", ".join(map(str, seeds["seeds"]))
    least = "" if len(pairs) == 1 else " of the least alike pair"
    found = f"{number(seeds['alike'][low])} {span(*seeds['interval'][low])}"
    latents = sum(b["n_latents"] for b in made["recipe"]["blocks"])
    return f"{latents} latents, seeds {who}: cosine of matched ones {found}{least}; of random ones {number(null)}"


def showing(bar: Bar) -> Callable[[Progress], None]:
    """Return the callback that shows the reports of a training run on a bar."""
    return lambda p: bar.show(p.tokens, p.of, "tokens", f"FVU {number(p.fvu)}", p.tokens_per_second, p.seconds_left)
