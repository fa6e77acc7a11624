"""Refusals in the words of the command line: flags where Python has keywords, commands where it has functions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import cache

from cutaway.core.refuse import Refused

#: what Python calls one thing and the command line another
_NAMES = {"dtype": "model-dtype", "device": "model-device", "n": "task-n", "split": "task-split", "path": "task-path",
          "corruption": "task-corruption", "metric": "task-metric", "reference": "task-metric"}  # fmt: skip
#: Python that stands in refusals, and what to type instead; MODEL is the model that was asked
_SAID = (
    (r"see model\.sites\(\) for what this model has", "see what it has: cutaway sites --model MODEL"),
    (r"see model\.sites\(\)", "see cutaway sites --model MODEL"),
    (r"see self_check\(model\)", "see cutaway check --model MODEL"),
    (r"let task\.narrow\(model\) take", "let --task-narrow take"),
    (r"load\(…, tokenizer=…\)", "a folder with a tokenizer"),
    (r"(your own prompts through from_jsonl|from_jsonl\(path\))", "your own prompts: --task FILE.jsonl"),
    (r"use task\.split\(\)", "use the task of a world"),
    (r"pairs with subject=", 'lines with "subject" in the file of the task'),
    (r"\(see patching\.ablate\)", "(see cutaway patching ablate)"),
    (r"load (it|the model) with attention='(\w+)'( or '\w+')?", r"give --model-attention \2"),
    (r"load\(…, dtype='bfloat16'\), on the command line ", ""),
    (r"look at run_last\(prompts\): ", ""),
    (r"give more tokens, or least=1", "give more --tokens"),
    (r"read its modules through model\.hf( with plain torch hooks)?", "read its modules in Python, with plain hooks"),
    (r"read the weights through model\.hf", "read the weights of its modules in Python"),
    (r"use model\.generate, or no cache", "use no cache"),
    (r"\bfold (them|the dictionary) first", "use dictionaries of one normalisation"),
    (r"resume=False", "--no-resume"),
)
_CALL = re.compile(r"\b(?:[a-z_]+\.)*[a-z_]+\(((?:\w+=[^()]*)+)\)")
#: `name=value` outside of what somebody quoted, and of the choices of a dictionary's format, which are written so
_PAIR = re.compile(
    r"(?<!\w)(?P<own>'[^']*'(?!\w)|\"[^\"]*\"|“[^”]*”)|--(?:choice|option) \S+|choice \w+=\S+"
    r"|(?<![\w?&.-])(?P<name>[a-z]\w*)=(?P<value>(?P<mark>['\"]).*?(?P=mark)|…|[\w.+@%-]*[\w%])?(?![=\w])"
)


def spelled(refusal: Refused, typed: Sequence[str] = ()) -> Refused:
    """Return the same refusal as someone at a command line says it; `typed` are the words of the command."""
    model = _after("--model", typed) or "miniworld"
    return Refused(*(_said(text, shlex.quote(model)) for text in (refusal.what, refusal.why, refusal.instead)))


def _said(text: str, model: str) -> str:
    for pattern, words in _SAID:
        text = re.sub(pattern, words.replace("MODEL", model.replace("\\", r"\\")), text)
    text = _CALL.sub(lambda m: m[0] if _as_flags(m[1]) == m[1] else _as_flags(m[1]), text)
    return _as_flags(text)


def _as_flags(text: str) -> str:
    """`name=value` as `--name value`, where a command has such a flag."""

    def one(m: re.Match[str]) -> str:
        name, value = m["name"], (m["value"] or "").strip("'\"")
        flag = _NAMES.get(name, name or "").replace("_", "-")
        if name is None or flag not in _flags():
            return m[0]
        if value in ("True", "False"):
            return f"--{'no-' * (value == 'False')}{flag}"
        if value == "None":
            return f"no --{flag}"
        return f"--{flag} {shlex.quote(value)}" if value not in ("", "…") else f"--{flag}"

    return _PAIR.sub(one, text)


@cache
def _flags() -> frozenset[str]:
    """Return every flag of the methods and of what they are asked about."""
    import cutaway
    from cutaway.cli.subjects import flag_names

    methods = {o.name for row in cutaway.methods().values() for o in row.options}
    subjects = flag_names()
    other = {
        "resume",
        "sinks",
        "batch",
        "window",
        "bos",
        "covariance",
        "tokens",
        "shard",
        "gate",
        "decoder",
        "format",
        "replicas",
        "text",
        "declared_l0",
        "labels",
        "words",
    }
    return frozenset(n.replace("_", "-") for n in methods | subjects | other)


def _after(flag: str, typed: Sequence[str]) -> str | None:
    for n, word in enumerate(typed):
        if word == flag and n + 1 < len(typed):
            return typed[n + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
