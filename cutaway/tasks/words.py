"""Word tables that the templates draw from. A table has named columns; a row of it belongs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from cutaway.core.refuse import Refused


@dataclass(frozen=True)
class Table:
    """Rows of words under named columns; `cyclic` tables are series whose last entry is followed by the first."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def column(self, name: str) -> int:
        """Return the index of a column."""
        return self.columns.index(name)


def _words(text: str) -> Table:
    return Table(("word",), tuple((w,) for w in text.split()))


def _rows(columns: str, text: str) -> Table:
    return Table(tuple(columns.split()), tuple(tuple(row.split("/")) for row in text.split()))


def _runs(series: Sequence[str], cyclic: bool) -> Table:
    """Return every run of four neighbours in a series."""
    n = len(series)
    starts = range(n if cyclic else n - 3)
    return Table(("a", "b", "c", "d"), tuple(tuple(series[(i + j) % n] for j in range(4)) for i in starts))


def _years(given: int) -> Table:
    """Years cut after `given` digits, with the later and earlier ends: `century rest low later earlier above below`."""
    size, rows = 4 - given, []
    top, low, step = 10**size - 1, size == 2, 10 if size == 2 else 2

    def spell(n: int) -> str:
        return f"{n:0{size}d}"

    for head in range(11 * 10 ** (given - 2), 20 * 10 ** (given - 2)):
        for rest in range(int(low) + 2, top):
            apart = min(step, top - rest, rest - int(low) - 1)
            above, below = map(spell, range(rest + 1, top + 1)), map(spell, range(rest + 1))
            ends = spell(rest + apart), spell(rest - apart)
            rows.append((str(head), spell(rest), spell(low), *ends, " ".join(above), " ".join(below)))
    return Table(("century", "rest", "low", "later", "earlier", "above", "below"), tuple(rows))


def _sums(top: int) -> Table:
    """Return the sums below `top`, with their operator and a sign that stands where it stands and asks for no sum."""
    pairs = [(a, b) for a in range(1, top) for b in range(1, top) if a + b < max(top, 10)]
    rows = tuple((str(a), str(b), str(a + b), "+", "<") for a, b in pairs)
    return Table(("a", "b", "sum", "plus", "less"), rows)


_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = "January February March April May June July August September October November December"
_NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
_LETTERS = "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"

_NAMES = (
    "John Tom Mark Paul Adam Luke Peter James David Simon Victor Henry Oscar Max Michael Robert William George Kevin "
    "Jack Mary Anna Lucy Sarah Emma Julia Alice Helen Laura Maria Kate Jane Susan Grace Ruth Emily Jessica Amy Lisa "
    "Rachel"
)
_OBJECTS = "book ball ring letter key box cup hat lamp coin map drink basket bottle computer necklace"
_PLACES = "store park school garden market station beach library office museum house restaurant hospital"
_THINGS = (
    "dog cat horse cow car bus train plane boat truck house tree river stone glass paper table chair window door "
    "garden music water fire bread apple king queen doctor teacher soldier phone wall road bridge island"
)
_EVENTS = "war plan trial strike journey project siege voyage campaign festival reign dispute"
_ARGUMENTS = (
    "load size file last name text data item count width total user path value mode index field score limit shape"
)
_NOUNS = (
    "dog/dogs cat/cats horse/horses cow/cows car/cars train/trains boat/boats book/books key/keys lamp/lamps "
    "king/kings teacher/teachers doctor/doctors student/students friend/friends picture/pictures letter/letters "
    "window/windows table/tables door/doors"
)
_COUNTRIES = (
    "Norway/Oslo/Norwegian Japan/Tokyo/Japanese France/Paris/French Germany/Berlin/German Italy/Rome/Italian "
    "Poland/Warsaw/Polish Egypt/Cairo/Arabic Turkey/Ankara/Turkish Spain/Madrid/Spanish Sweden/Stockholm/Swedish "
    "Greece/Athens/Greek Russia/Moscow/Russian China/Beijing/Mandarin Finland/Helsinki/Finnish Ireland/Dublin/Irish "
    "Hungary/Budapest/Hungarian Denmark/Copenhagen/Danish Portugal/Lisbon/Portuguese Austria/Vienna/German "
    "Iran/Tehran/Persian"
)
_FEELINGS = (
    "wonderful/awful great/terrible lovely/boring amazing/dreadful brilliant/horrible good/bad excellent/poor "
    "beautiful/ugly perfect/dull fantastic/nasty happy/sad nice/cruel"
)
_DEEDS = (
    "poison/greet rob/thank stab/visit kidnap/invite blackmail/teach torture/help murder/feed bribe/call "
    "threaten/praise assault/guide kill/meet hurt/join attack/assist"
)

_MIXED = ("things", "nouns")  # tables of beasts, kings and boats
_TABLES = {
    "names": lambda: _words(_NAMES),
    "objects": lambda: _words(_OBJECTS),
    "places": lambda: _words(_PLACES),
    "things": lambda: _words(_THINGS),
    "events": lambda: _words(_EVENTS),
    "arguments": lambda: _words(_ARGUMENTS),
    "functions": lambda: _words("port read write send open close parse save find sort"),
    "works": lambda: _words("film song play concert meal trip game show movie book"),
    "persons": lambda: _words("neighbor friend teacher boss cousin stranger guard child doctor clerk brother"),
    "nouns": lambda: _rows("one many", _NOUNS),
    "countries": lambda: _rows("country capital language", _COUNTRIES),
    "feelings": lambda: _rows("good bad", _FEELINGS),
    "deeds": lambda: _rows("harmful benign", _DEEDS),
    "days": lambda: _runs(_DAYS.split(), True),
    "months": lambda: _runs(_MONTHS.split(), True),
    "numbers": lambda: _runs(_NUMBERS.split(), False),
    "letters": lambda: _runs(_LETTERS.split(), False),
    "years": lambda: _years(2),
    "decades": lambda: _years(3),
    "sums": lambda: _sums(100),
    "small_sums": lambda: _sums(10),
}


@cache
def table(name: str) -> Table:
    """Return the table called `name`.

    Raises:
        Refused: no table has that name.
    """
    if name not in _TABLES:
        raise Refused(f"word table {name!r}", "there is no such table", f"use one of: {', '.join(_TABLES)}")
    return _TABLES[name]()


@dataclass(frozen=True)
class Series:
    """Words whose order counts; after the last of a cyclic one comes its first."""

    words: tuple[str, ...]
    cyclic: bool

    def moved(self, word: str, by: int) -> str | None:
        """Return the word `by` places further on, or None past the end."""
        at = [w.lower() for w in self.words].index(word.lower()) + by
        n = len(self.words)
        return self.words[at % n] if self.cyclic else self.words[at] if 0 <= at < n else None


def series() -> tuple[Series, ...]:
    """Days, months, numbers and letters in their order."""
    texts = ((_DAYS, True), (_MONTHS, True), (_NUMBERS, False), (_LETTERS, False))
    return tuple(Series(tuple(text.split()), cyclic) for text, cyclic in texts)


def kinds(mixed: bool = True) -> list[frozenset[str]]:
    """Return the sets of words of one kind, any of which can stand where another stands: names, capitals, days, …

    Not all nouns can stand for all others: without `mixed` they are left out.
    """
    found: list[frozenset[str]] = [
        frozenset(_DAYS.split()),
        frozenset(_MONTHS.split()),
        frozenset(_NUMBERS.split()),
        frozenset(_LETTERS.split()),
    ]
    for name in ("names", "places", "objects", "events", "works", "persons", "countries", *(_MIXED if mixed else ())):
        t = table(name)
        found += [frozenset(row[c] for row in t.rows) for c in range(len(t.columns))]
    for name in ("feelings", "deeds"):
        found.append(frozenset(w for row in table(name).rows for w in row))
    return found
