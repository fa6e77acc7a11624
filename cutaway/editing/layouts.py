"""Requests from JSON lines: the layouts of CounterFact, zsRE and MQuAKE, and our own. A line's keys say which it is.

CounterFact (Meng et al. 2022): `requested_rewrite` with a template `prompt`, `paraphrase_prompts`,
`neighborhood_prompts`. zsRE as edited by Mitchell et al. 2022: `src`, `rephrase`, `alt`, `answers`, `loc`, `loc_ans`.
MQuAKE (Zhong et al. 2023): several `requested_rewrite`s, and `questions` with their `new_answer`. Our own: the fields
of a `Request`, with lists of texts for `paraphrase`, and lists of [prompt, answer] for the other kinds of probes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cutaway.core.json_lines import numbered, parsed
from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made, called
from cutaway.editing.request import KINDS, Probe, Request, Requests

_EXAMPLE = '{"subject": "Norway", "prompt": "The capital of Norway is", "new": "Bergen", "old": "Oslo"}'
_INSTEAD = f"write a line of CounterFact, zsRE or MQuAKE, or {_EXAMPLE}"


def from_jsonl(path: str | Path, n: int | None = None) -> Requests:
    """Return the requests in a file with one JSON object a line: all of them, or those of the first `n` lines.

    Raises:
        Refused: a file that cannot be read or has no lines, or a line that holds no request; it is named by its number.
    """
    file = f"file {str(path)!r}"
    try:
        read = [r for i, line in numbered(path) for r in _read(line, f"line {i} of {str(path)!r}")]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(file, f"it cannot be read as text: {error}", "give a .jsonl file in UTF-8") from error
    if not read:
        raise Refused(file, "it has no lines", _INSTEAD)
    if n is not None and not 1 <= n <= len(read):
        raise Refused(f"{n} requests of {file}", f"it has {len(read)}", f"ask for 1 to {len(read)}")
    whole = str(Path(path).absolute())
    how = Made(called("ca.editing.from_jsonl", repr(whole), n=n), {"": whole, "n": n})
    made = Requests(tuple(read[:n]), Path(path).stem)
    return Requests(made.requests, made.name, how.of(made, Requests.identity))


def _read(line: str, where: str) -> list[Request]:
    """Return the requests of one line."""
    data = parsed(line, where, _INSTEAD)
    if not isinstance(data, dict):
        raise Refused(where, f"it is a {type(data).__name__}, not an object", _INSTEAD)
    for keys, reader in _LAYOUTS:
        if all(k in data for k in keys):
            try:
                return reader(data)
            except Refused as refusal:
                raise Refused(f"{where}: {refusal.what}", *refusal.args[1:]) from None
            except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
                said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise Refused(where, f"it begins like a known layout, but {said}", _INSTEAD) from error
    raise Refused(where, f"its keys {', '.join(map(repr, data))} are those of no layout", _INSTEAD)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _rewritten(data: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return subject, prompt, new and old object of CounterFact's and MQuAKE's form of a rewrite."""
    subject = _text(data["subject"])
    prompt = _text(data["prompt"]).replace("{}", subject)
    return subject, prompt, _text(data["target_new"]["str"]), _text(data["target_true"]["str"])


def _counterfact(data: dict[str, Any]) -> list[Request]:
    subject, prompt, new, old = _rewritten(data["requested_rewrite"])
    probes = [Probe("paraphrase", _text(p), new) for p in data["paraphrase_prompts"]]
    probes += [Probe("neighbourhood", _text(p), old) for p in data["neighborhood_prompts"]]
    return [Request(subject, prompt, new, old, tuple(probes), str(data.get("case_id", "")))]


def _zsre(data: dict[str, Any]) -> list[Request]:
    new, answers = _text(data["alt"]), data["answers"]
    probes = [Probe("paraphrase", _text(data["rephrase"]), new)] if data.get("rephrase") else []
    if data.get("loc"):
        probes.append(Probe("neighbourhood", _text(data["loc"]).removeprefix("nq question: "), _text(data["loc_ans"])))
    old = _text(answers[0]) if answers and answers[0] != new else None
    return [Request(_text(data["subject"]), _text(data["src"]), new, old, tuple(probes))]


def _mquake(data: dict[str, Any]) -> list[Request]:
    chain = tuple(Probe("portability", _text(q), _text(data["new_answer"])) for q in data["questions"])
    made = []
    for i, one in enumerate(data["requested_rewrite"]):
        subject, prompt, new, old = _rewritten(one)
        asked = (Probe("paraphrase", _text(one["question"]), new),) if one.get("question") else ()
        made.append(Request(subject, prompt, new, old, asked + (chain if i == 0 else ()), str(data.get("case_id", ""))))
    if not made:
        raise ValueError("its list of rewrites is empty")
    return made


def _own(data: dict[str, Any]) -> list[Request]:
    known = ("subject", "prompt", "new", "old", "group", *KINDS)
    if other := [k for k in data if k not in known]:
        raise ValueError(f"a request has no {other[0]!r}; it has {', '.join(known)}")
    new = _text(data["new"])
    probes = [Probe("paraphrase", _text(p), new) for p in data.get("paraphrase", ())]
    others = [k for k in KINDS if k != "paraphrase"]
    probes += [Probe(k, _text(p), _text(a)) for k in others for p, a in data.get(k, ())]
    old = data.get("old")
    return [
        Request(
            _text(data["subject"]),
            _text(data["prompt"]),
            new,
            None if old is None else _text(old),
            tuple(probes),
            _text(data.get("group", "")),
        )
    ]


_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], list[Request]]], ...] = (
    (("requested_rewrite", "questions"), _mquake),
    (("requested_rewrite",), _counterfact),
    (("src", "alt"), _zsre),
    (("subject", "prompt", "new"), _own),
)
