"""One form for every shell: command, page and tool of each method ask for the same, in the same types."""

import inspect
from typing import Any, Literal, get_args, get_origin

import pytest

import cutaway as ca
from cutaway.cli.method_commands import command
from cutaway.core.form import form, opened, schema
from cutaway.studio.actions.about import method_card
from cutaway.studio.tools import tool_schema

ROWS = ca.methods()
JSON = {str: "string", int: "integer", float: "number", bool: "boolean"}
OWN = {"out", "resume", "dry_run"}


def _of_command(hint: Any) -> tuple[str, bool, list[str]]:
    """Return the JSON type of a flag, True if it may be left without a value, and its choices."""
    kind = get_args(hint)[0]
    parts = [p for p in get_args(kind) if p is not type(None)] if type(None) in get_args(kind) else [kind]
    choices = list(get_args(parts[0])) if get_origin(parts[0]) is Literal else []
    return JSON.get(str if choices else parts[0], "string"), type(None) in get_args(kind), choices


@pytest.mark.parametrize("name", ROWS)
def test_command_page_and_tool_ask_for_the_same(name):
    row = ROWS[name]
    entries, whole = {e.name: e for e in form(row)}, schema(row)
    flags = {p.name: p for p in inspect.signature(command(row)).parameters.values() if p.name not in OWN}
    assert list(flags) == list(entries) == list(whole["properties"])
    for n, p in flags.items():
        e, (kind, nullable, choices) = entries[n], _of_command(p.annotation)
        assert (e.type if not e.several else "string", list(e.choices) if not e.several else []) == (kind, choices), n
        assert e.nullable == nullable, n
        assert e.required == (p.default is inspect.Parameter.empty), n
        usual = ",".join(map(str, e.default)) if e.several and e.default is not None else e.default
        assert e.required or str(p.default) == str(usual), n
    card = method_card(row)
    assert card.json_schema == whole
    assert [x.name for x in card.form] == list(entries)
    tool = tool_schema(card)
    assert {n: s for n, s in tool["properties"].items() if n != "budget_seconds"} == {
        n: s for n, s in whole["properties"].items() if n != "model"
    }
    assert tool["required"] == whole["required"]


def test_values_open_the_call_and_what_is_open_stays_open():
    row, kept = ROWS["lenses.logit_lens"], dict[Any, Any]()
    (model, task), options = opened(row, {"task": "facts", "task_n": 2, "samples": 2}, kept)
    (again, _), _ = opened(row, {"task": "facts", "task_n": 3}, kept)
    assert again is model
    assert len(task) == 2
    assert options == {"samples": 2}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"task": "facts", "sample": 2}, "no such entry; near: samples"),
        ({"task": 3}, "it must be a text"),
        ({"task": "facts", "samples": True}, "it must be a whole number"),
        ({"task": "facts", "samples": "2"}, "it must be a whole number"),
        ({}, "neither is given"),
        ({"task": "facts", "prompts": "a b"}, "both are given"),
    ],
)
def test_other_values_are_refused(values, why):
    with pytest.raises(ca.Refused, match=why):
        opened(ROWS["lenses.logit_lens"], values)
