"""The answer of `cutaway dict eval` in a terminal: nothing is cut at 80 columns, controls stand below the scores."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from cutaway.views.wording import number, span

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from cutaway.dictionaries.evaluation.compare import Comparison
    from cutaway.dictionaries.evaluation.probing import Probing
    from cutaway.dictionaries.evaluation.scores import Scores
    from cutaway.dictionaries.evaluation.splitting import Splitting
    from cutaway.dictionaries.evaluation.stability import Stability

BAR = 30  # characters of the longest bar


def show(console: Console, scores: Scores, beside: dict[str, Any], saved: Path | None) -> None:
    """Print scores, their comparisons, and everything else that was asked for."""
    console.print(_scores(scores, str(scores.record["file"])))
    _controls(console, scores)
    _notes(console, scores)
    if "density" in beside:
        _density(console, beside["density"])
    if "probing" in beside:
        _probing(console, beside["probing"])
    if "first letters" in beside:
        console.print(_scores(beside["first letters"], "Absorption of first letters"))
        letters = beside["first letters"].record["letters"]
        console.print(f"letters that the activations tell: {', '.join(letters)}", style="dim")
    if "seeds" in beside:
        _seeds(console, beside["seeds"])
    for row in beside.get("features", []):
        _feature(console, row)
    if "comparison" in beside:
        _compared(console, beside["comparison"], beside["splitting"])
    if "command" in scores.record:
        console.print(Text("again: ", "dim").append(str(scores.record["command"]), "not dim bold"), soft_wrap=True)
    if saved is not None:
        again = Text(f"saved to {saved}; show it again with ").append(
            shlex.join(["cutaway", "open", str(saved)]), "bold"
        )
        console.print(again, soft_wrap=True)


def reach(values: Sequence[float], digits: int = 3) -> str:
    """Return the lowest and the highest of some values, the ones that are no number left out."""
    known = sorted(v for v in values if v == v)
    if not known:
        return "–"
    low, high = (number(v, digits=digits) for v in (known[0], known[-1]))
    return low if low == high else f"{low} – {high}"


def plain(title: str, *columns: str) -> Table:
    """Return a table whose first column wraps and whose numbers are never cut."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for n, name in enumerate(columns):
        made.add_column(name, style="cyan" if n == 0 else "", overflow="fold", justify="left" if n == 0 else "right")
    return made


def _filled(table: Table, rows: Sequence[Sequence[str]]) -> Table:
    for row in rows:
        table.add_row(*(Text(c) for c in row))
    for n, column in enumerate(table.columns[1:], 1):
        column.min_width = max((len(r[n]) for r in rows), default=1)
    return table


def _scores(scores: Scores, title: str) -> Table:
    rows = []
    for i, name in enumerate(scores.labels["score"]):
        low, high = scores.interval[i].tolist()
        inside = span(low, high) if low == low else "–"
        rows.append([str(name), number(float(scores.score[i])), inside, reach(scores.null[i].tolist())])
    return _filled(plain(title, "score", "value", "95 % interval", "random"), rows)


def _controls(console: Console, scores: Scores) -> None:
    """Print the scores of controls, as many side by side as there is room for."""
    names = [str(n) for n in scores.labels["control"]]
    known = [i for i in range(len(scores.labels["score"])) if not bool(scores.control[i].isnan().all())]
    if not known:
        return
    first = max(len(str(scores.labels["score"][i])) for i in known)
    at_once = max(1, (console.width - min(first, 24) - 14) // 13)
    for start in range(0, len(names), at_once):
        some = range(start, min(start + at_once, len(names)))
        rows = [
            [
                str(scores.labels["score"][i]),
                number(float(scores.score[i])),
                *(number(float(scores.control[i, c])) for c in some),
            ]
            for i in known
        ]
        console.print(_filled(plain("Controls", "score", "value", *(names[c] for c in some)), rows))


def _notes(console: Console, scores: Scores) -> None:
    record = scores.record
    units = {n: scores.units[n] for n in scores.labels["score"] if n in scores.units}
    by_unit = {u: ", ".join(n for n in units if units[n] == u) for u in dict.fromkeys(units.values())}
    console.print("; ".join(f"{names}: {unit}" for unit, names in by_unit.items()), style="dim")
    if "declared L0" in record:
        d = record["declared L0"]
        said = "they agree" if d["agrees"] else "[yellow]more than a factor of 2 apart: a choice may be wrong[/]"
        console.print(f"L0 declared {number(d['declared'])}, measured {number(d['measured'])}: {said}")
    for name in ("loss", "fed", "random weights", "trained on", "splice", "left out"):
        if name in record:
            console.print(Text(f"{name}: {record[name]}", "dim"))
    if record.get("trained on them"):
        console.print("[yellow]the dictionary was trained on these documents: give others with --text[/]")


def _density(console: Console, density: dict[str, Any]) -> None:
    """Print the density of latents, by how often they fire."""
    most = max(density["latents"])
    rows = [
        [name, number(n), reach(random), "█" * round(BAR * n / max(most, 1))]
        for name, n, random in zip(density["decades"], density["latents"], density["random"], strict=True)
        if n or any(v > 0 for v in random)
    ]
    table = _filled(plain("Latents by frequency", "share of tokens from", "latents", "random", ""), rows)
    table.columns[3].justify = "left"
    console.print(table)


def _probing(console: Console, found: Probing) -> None:
    """Held-out accuracy in per cent, with its interval."""
    methods, ks = ([str(n) for n in found.labels[a]] for a in ("method", "k"))
    rows = []
    for m, name in enumerate(methods):
        cells = []
        for k in range(len(ks)):
            value, (low, high) = float(found.accuracy[m, k]), found.interval[m, k].tolist()
            cells.append(f"{100 * value:.0f} [{100 * low:.0f}–{100 * high:.0f}]")
        cells = [cells[0], *[""] * (len(ks) - 1)] if name in ("linear probe", "frequent class") else cells
        rows.append([name, *cells, reach([100 * v for v in found.null[m].flatten().tolist()], 2)])
    title = "Probing: held-out accuracy in % by the k coordinates read, and with shuffled labels"
    console.print(_filled(plain(title, "read from", *(f"k={k}" for k in ks), "shuffled"), rows))
    texts = found.record["texts"]
    concepts = ", ".join(str(c) for c in found.labels["concept"])
    console.print(f"concepts: {concepts}; {texts['train']} texts to fit, {texts['test']} held out", style="dim")


def _seeds(console: Console, found: Stability) -> None:
    names = [str(n) for n in found.labels["seed"]]
    rows = [
        [
            f"{names[j]} – {names[i]}" if len(set(names)) == len(names) else f"{j + 1} – {i + 1}",
            number(float(found.alike[i, j])),
            span(*found.alike_interval[i, j].tolist()),
            reach(found.alike_null[i, j].tolist()),
        ]
        for i in range(len(names))
        for j in range(i)
    ]
    title = "Seeds: mean |cosine| of latents matched one to one"
    console.print(_filled(plain(title, "pair", "alike", "95 % interval", "random"), rows))


def _feature(console: Console, row: dict[str, Any]) -> None:
    console.print(
        f"[bold]latent {row['latent']}[/]  focus {row['focus']:.2f} (random {reach(row['focus null'], 2)}), on "
        f"{row['frequency']:.2%} of tokens, mean {number(row['mean active'])} where active",
        soft_wrap=True,
    )
    for c in row["contexts"][:4]:
        before, token, after = (c[k].replace("\n", "↵") for k in ("before", "token", "after"))
        token = token if console.is_terminal else f"<<{token}>>"  # colours are lost in a file or a pipe
        console.print(
            Text(f"  {c['value']:6.2f}  {before}").append(token, "bold reverse").append(after), soft_wrap=True
        )


def _compared(console: Console, found: Comparison, split: Splitting) -> None:
    """Print the comparison of two dictionaries."""
    from cutaway.suites.dictionary_report import partners

    left = found.record["left over"]
    rows = [[name, number(value), reach(random)] for name, value, random in partners(found, split)]
    console.print(_filled(plain("Beside the other dictionary", "", "value", "random"), rows))
    console.print(f"left over: {left['first']} latents of this one, {left['second']} of the other", style="dim")
