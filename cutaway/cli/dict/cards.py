"""What is shown of a training run: live progress, and the cards at its end."""

from __future__ import annotations

from typing import Any


def show_cards(console: Any, files: list[str], cards: list[dict[str, Any]], beginning: str | None = None) -> None:
    """Every card as a table, and what contexts began with; a file may hold several dictionaries."""
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
    from cutaway.views.wording import number, span

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
    """How alike seeds are, in one line; empty where that was not measured."""
    seeds = made["seeds"]
    if "none" in seeds:
        return ""
    from cutaway.views.wording import number, span

    pairs = range(len(seeds["alike"]))
    low = min(pairs, key=lambda i: seeds["alike"][i])
    null = max(v for row in seeds["null"] for v in row)
    who = ", ".join(map(str, seeds["seeds"]))
    least = "" if len(pairs) == 1 else " of the least alike pair"
    found = f"{number(seeds['alike'][low])} {span(*seeds['interval'][low])}"
    latents = sum(b["n_latents"] for b in made["recipe"]["blocks"])
    return f"{latents} latents, seeds {who}: cosine of matched ones {found}{least}; of random ones {number(null)}"


class Bar:
    """Live progress of a training run on stderr; plain lines where that is no terminal."""

    def __init__(self, name: str):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        words = TextColumn(
            "{task.completed:,.0f}/{task.total:,.0f} tokens · FVU {task.fields[fvu]} · {task.fields[speed]}"
        )
        self.live = Progress(TextColumn(name), BarColumn(), words, TimeRemainingColumn(), console=self.console)
        self.task = self.live.add_task(name, total=None, fvu="", speed="", visible=False)

    def __enter__(self) -> Bar:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def update(self, p: Any) -> None:
        """Show one progress report."""
        from cutaway.views.wording import number

        speed, fvu = f"{p.tokens_per_second:,.0f} tokens/s", number(p.fvu)
        self.live.update(self.task, completed=p.tokens, total=p.of, fvu=fvu, speed=speed, visible=True)
        if not self.console.is_terminal:
            share, left = min(p.tokens / p.of, 1.0), p.seconds_left / 60  # the last batch may go over
            line = f"{p.tokens:,}/{p.of:,} tokens ({share:.0%}) · FVU {fvu} · {speed} · {left:.1f} min left"
            self.console.print(line, soft_wrap=True)
