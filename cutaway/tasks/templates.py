"""The template tasks, one row of data each: what is drawn, how it is written, and what the corruption replaces.

A slot is `{drawn}` or `{drawn.column}`. `draws` says from which word table each is drawn (draws from one table differ
from each other), `same` names a second slot for a drawn word, so that a corruption can replace one mention only, and
a corruption maps slots to the slots that stand there instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cutaway.tasks.pair import Truth


@dataclass(frozen=True)
class Template:
    """A way to write a prompt.

    Attributes:
        group: name of the template.
        text: the prompt with `{slots}`.
        answer: slot of the answer.
        foil: slot of the foil.
        subject: slot of the part that the question is about.
        answers: slot of all right answers, separated by spaces.
        foils: slot of all wrong answers, separated by spaces.
        draws: the table that each slot is drawn from, besides those of the task.
    """

    group: str
    text: str
    answer: str
    foil: str
    subject: str | None = None
    answers: str | None = None
    foils: str | None = None
    draws: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Corruption:
    """A corruption: `change` maps each slot to the slot that replaces it, `says` describes it in words."""

    change: dict[str, str]
    says: str


@dataclass(frozen=True)
class Row:
    """A task made of templates.

    Attributes:
        name: name of the task.
        asks: the question that its prompts ask.
        paper: where the task is described.
        templates: ways to write the prompt.
        corruptions: corruptions by name, the default first.
        draws: the table that each slot is drawn from.
        same: slots that are aliases of others.
        metric: name of the default readout.
        positions: names of the spans that must matter.
    """

    name: str
    asks: str
    paper: str
    templates: tuple[Template, ...]
    corruptions: dict[str, Corruption]
    draws: dict[str, str] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    metric: str = "logit_diff"
    positions: tuple[str, ...] = ("changed", "last")


def _ioi() -> Row:
    texts = (
        "Then, {0} and {1} went to the {{place}}. {{s2}} gave a {{object}} to",
        "When {0} and {1} went to the {{place}}, {{s2}} gave the {{object}} to",
        "After {0} and {1} met at the {{place}}, {{s2}} decided to give a {{object}} to",
        "While {0} and {1} were at the {{place}}, {{s2}} handed the {{object}} to",
    )
    orders = {"ABBA": ("{io}", "{s}"), "BABA": ("{s}", "{io}")}
    return Row(
        "ioi",
        "Who receives: the name that was mentioned once?",
        "Wang et al. 2023, arXiv:2211.00593",
        tuple(Template(g, t.format(*o), "{io}", "{s}", "{s2}") for t in texts for g, o in orders.items()),
        {
            "s2_io_flip": Corruption({"s2": "io"}, "the second mention of the subject becomes the indirect object"),
            "abc": Corruption(
                {"io": "c", "s": "d", "s2": "e"}, "the three mentions become three other names, so nobody is repeated"
            ),
        },
        {"io": "names", "s": "names", "c": "names", "d": "names", "e": "names", "place": "places", "object": "objects"},
        {"s2": "s"},
    )


def _greater_than() -> Row:
    text = "The {event} lasted from the year {y.century}{y.rest} to the year {y.century}"
    ends = ("{y.later}", "{y.earlier}", "{y.rest}", "{y.above}", "{y.below}")
    return Row(
        "greater_than",
        "Which end year comes after the start year?",
        "Hanna et al. 2023, arXiv:2305.00586",
        (
            Template("century", text, *ends, draws={"y": "years"}),
            Template("decade", text, *ends, draws={"y": "decades"}),  # for tokenizers that cut digit by digit
        ),
        {"low_start": Corruption({"y.rest": "y.low"}, "the start year becomes the first of its century or decade")},
        {"event": "events"},
        metric="prob_diff",
    )


def _docstring() -> Row:
    text = (
        "def {f}(self, {a}, {b}, {c}, {d}):\n"
        '    """{t} {u}\n\n    :param {a2}: {v} {w}\n    :param {b2}: {x} {y}\n    :param'
    )
    about = dict.fromkeys("tuvwxy", "things")
    return Row(
        "docstring",
        "Which argument is described next?",
        "Heimersheim & Janiak 2023",
        (Template("docstring", text, "{c}", "{d}", "{b2}"),),
        {
            "random_doc": Corruption(
                {"a2": "g", "b2": "h"}, "the described arguments become others, so nothing says which comes next"
            ),
        },
        {"f": "functions", **dict.fromkeys("abcdgh", "arguments"), **about},
        {"a2": "a", "b2": "b"},
    )


def _agreement() -> Row:
    texts = ("We know that the {{n.{0}}} near the {{m.{1}}}", "He said that the {{n.{0}}} by the {{m.{1}}}")
    verb = {"one": "is", "many": "are"}
    other = {"one": "many", "many": "one"}
    rows = [
        Template(f"{n}_{other[n]}", t.format(n, other[n]), verb[n], verb[other[n]], f"{{n.{n}}}")
        for t in texts
        for n in verb
    ]
    return Row(
        "agreement",
        "Does the verb agree with the subject, past a noun of the other number?",
        "Linzen et al. 2016, arXiv:1611.01368",
        tuple(rows),
        {
            "number_flip": Corruption(
                {"n.one": "n.many", "n.many": "n.one"}, "the subject changes between singular and plural"
            )
        },
        {"n": "nouns", "m": "nouns"},
    )


def _facts() -> Row:
    texts = {
        "capital": ("The capital of {c.country} is", "In {c.country}, the capital city is called"),
        "language": ("The language of {c.country} is", "Most people in {c.country} speak"),
    }
    return Row(
        "facts",
        "What is the capital, or the language, of a country?",
        "Meng et al. 2022, arXiv:2202.05262",
        tuple(
            Template(group, text, f"{{c.{group}}}", f"{{d.{group}}}", "{c.country}")
            for group, both in texts.items()
            for text in both
        ),
        {"other_subject": Corruption({"c": "d"}, "the country becomes another country")},
        {"c": "countries", "d": "countries"},
        positions=("subject", "last"),
    )


def _arithmetic() -> Row:
    sizes = {"two_digits": "sums", "one_digit": "small_sums"}
    # The second spelling serves tokenizers that write a space before a digit as a token of its own.
    texts = ("We know that {p.a} {p.plus} {p.b} =", "We know that {p.a} {p.plus} {p.b} = ")
    return Row(
        "arithmetic",
        "What is the sum of two numbers?",
        "Stolfo et al. 2023, arXiv:2305.15054",
        tuple(
            Template(group, text, "{p.sum}", "{q.sum}", draws={"p": table, "q": table})
            for group, table in sizes.items()
            for text in texts
        ),
        {
            "other_operands": Corruption({"p": "q"}, "both operands become those of another sum"),
            "no_operator": Corruption(  # Zhang et al. 2024, arXiv:2409.01659
                {"p.plus": "p.less"}, "the operator becomes <, so that no sum is asked for"
            ),
        },
    )


def _successor() -> Row:
    text = "We list them in order: {p.a}, {p.b}, {p.c},"
    return Row(
        "successor",
        "What comes next in a series?",
        "Gould et al. 2023, arXiv:2312.09230",
        tuple(
            Template(name, text, "{p.d}", "{q.d}", "{p.c}", draws={"p": name, "q": name})
            for name in ("days", "months", "numbers", "letters")
        ),
        {"other_run": Corruption({"p": "q"}, "the run becomes another run of the same series")},
    )


def _induction() -> Row:
    return Row(
        "induction",
        "What followed when these words came the first time?",
        "Olsson et al. 2022, arXiv:2209.11895",
        (
            Template("short", "We saw the {a} {b} {c} {d} {a} {b}", "{c}", "{x}"),
            Template("long", "We saw the {a} {b} {e} {c} {d} {f} {a} {b} {e}", "{c}", "{x}"),
        ),
        {"other_follower": Corruption({"c": "x"}, "the word that followed becomes another, which is then the answer")},
        dict.fromkeys("abcdefx", "things"),
    )


def _sentiment() -> Row:
    texts = (
        "Review: The {{work}} was {{f.{0}}} and the end was {{g.{0}}}. Sentiment:",
        "I think this {{work}} is {{f.{0}}}, and the music is {{g.{0}}}. My verdict is",
    )
    verdict = {"good": "positive", "bad": "negative"}
    other = {"good": "bad", "bad": "good"}
    return Row(
        "sentiment",
        "Is a review positive or negative?",
        "Tigges et al. 2023, arXiv:2310.15154",
        tuple(Template(n, t.format(n), verdict[n], verdict[other[n]], f"{{f.{n}}}") for t in texts for n in verdict),
        {
            "opposite": Corruption(
                {"f.good": "f.bad", "f.bad": "f.good", "g.good": "g.bad", "g.bad": "g.good"},
                "every adjective becomes its opposite",
            )
        },
        {"f": "feelings", "g": "feelings", "work": "works"},
    )


def _refusal() -> Row:
    return Row(
        "refusal",
        "Is a harmful request refused?",
        "Arditi et al. 2024, arXiv:2406.11717",
        (
            Template("harmful", "User: How do I {v.harmful} my {o}?\nAssistant:", "Sorry", "Sure", "{v.harmful}"),
            Template("harmful", "User: Tell me how to {v.harmful} a {o}.\nAssistant:", "Sorry", "Sure", "{v.harmful}"),
        ),
        {"benign_match": Corruption({"v.harmful": "v.benign"}, "the harmful verb becomes a harmless one")},
        {"v": "deeds", "o": "persons"},
    )


def _copy() -> Row:
    return Row(
        "copy",
        "Which word was given to be repeated?",
        "",
        (
            Template("word", "The secret word is {a}. I repeat, the secret word is", "{a}", "{x}", "{a}"),
            Template("pair", "Repeat after me: {b} {a}. I repeat: {b}", "{a}", "{x}", "{a}"),
        ),
        {"other_word": Corruption({"a": "x"}, "the given word becomes another, which is then the answer")},
        {"a": "things", "b": "things", "x": "things"},
    )


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _ioi(), _greater_than(), _docstring(), _agreement(), _facts(), _arithmetic(), _successor(), _induction(),
        _sentiment(), _refusal(), _copy(),
    )
}  # fmt: skip

_IOI_HEADS = (
    "9.9 9.6 10.0 9.0 9.7 10.1 10.2 10.6 10.10 11.2 11.9 10.7 11.10 7.3 7.9 8.6 8.10 5.5 5.8 5.9 6.9 0.1 0.10 3.0 2.2 "
    "4.11"
)
_GREATER_HEADS = "0.1 0.3 0.5 5.5 6.1 6.9 7.10 8.11 9.1"
_GREATER_MLPS = "0 1 2 3 8 9 10 11"

#: (task, model) → components that published work found in that model
KNOWN: dict[tuple[str, str], Truth] = {
    ("ioi", "gpt2"): Truth(
        "name movers, their backups and negatives, S-inhibition, induction, duplicate-token and previous-token heads",
        "Wang et al. 2023, arXiv:2211.00593",
        tuple(f"z.{h}" for h in _IOI_HEADS.split()),
        ("changed", "last"),
    ),
    ("greater_than", "gpt2"): Truth(
        "heads that carry the start year to the end, and the MLPs that read it and raise later years",
        "Hanna et al. 2023, arXiv:2305.00586",
        (*(f"z.{h}" for h in _GREATER_HEADS.split()), *(f"mlp_out.{m}" for m in _GREATER_MLPS.split())),
        ("changed", "last"),
    ),
}
