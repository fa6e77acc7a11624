"""What a record says repeats it: its command, given to a shell, and its line of Python give the same bits."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.cli.shell import as_data
from cutaway.core.json_lines import finite
from cutaway.core.method import Method
from cutaway.core.outcome import each
from cutaway.core.repeat import NO_COMMAND, NO_PYTHON
from cutaway.core.subject import SUBJECTS as SUBJECT_ROWS
from cutaway.core.subject import with_needs
from cutaway.dictionaries.transforms import fold
from tests.conformance import subjects
from tests.conformance.rows import ELSEWHERE, NAMED, QUICK, SPEAKERS

ROWS = ca.methods()
PAIR = {"clean": "The capital of Norway is", "corrupt": "The capital of Japan is", "answer": "oslo", "foil": "tokyo"}
OTHER = {"clean": "The capital of Japan is", "corrupt": "The capital of Norway is", "answer": "tokyo", "foil": "oslo"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with spaces in its name, in which every relative path of these tests lies."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("two pairs.jsonl").write_text("\n".join(map(json.dumps, (PAIR, OTHER))), "utf-8")
    Path("plain model").symlink_to(ca.zoo.ENTRIES["miniworld"].folder)
    ca.dictionaries.save(subjects.dictionary(128, "resid_post.3"), "some latents.safetensors")
    ca.dictionaries.save(subjects.dictionary(128, "resid_post.3", 28), "other latents.safetensors")
    ca.dictionaries.save(subjects.dictionary(128, "attn_out.4", 6), "attention latents.safetensors")
    labelled, words = (SUBJECT_ROWS[n].example({}) for n in ("labelled", "words"))
    shown = [[c for c, there in zip(labelled.concepts, row, strict=True) if there] for row in labelled.shown.tolist()]
    lines = ({"text": t, "label": y} for t, y in zip(labelled.texts, shown, strict=True))
    Path("some labels.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    asked = [(p["clean"].split()[3], p["clean"], p["foil"], p["answer"]) for p in (PAIR, OTHER)]
    lines = (dict(zip(("subject", "prompt", "new", "old"), r, strict=True)) for r in asked)
    Path("some requests.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    Path("some words.txt").write_text(" ".join(words.words), "utf-8")
    for lens in ("lens", "jacobian"):
        SUBJECT_ROWS[lens].example({"model": subjects.miniworld()}).transferred().save(f"some {lens}")
    SUBJECT_ROWS["direction"].example({"model": subjects.miniworld()}).save("some direction.safetensors")
    Path("some prompts.txt").write_text("\n\n".join(subjects.corpus()[:3]), "utf-8")
    Path("some lines.txt").write_text("\n".join(subjects.corpus()), "utf-8")
    Path("some text.txt").write_text("\n\n".join(subjects.corpus() * 2), "utf-8")
    return folder


def said(capsys, words: list[str]) -> dict[str, Any]:
    """What a command line answers as JSON; of several outcomes, the first."""
    code = app.main([*words, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    answer = json.loads(out)
    return answer[0] if isinstance(answer, list) else answer


def check(capsys, monkeypatch, tmp_path, found: dict[str, Any]) -> None:
    """Hold a result to its own record, from another folder: the command's fields and the line's are the same."""
    monkeypatch.chdir(tmp_path)
    check_command(capsys, found)
    check_line(found)


def check_command(capsys, found: dict[str, Any]) -> None:
    """The command of a record gives its fields and labels, and the same command again."""
    record = found["record"]
    again = said(capsys, shlex.split(record["command"])[1:])
    assert again["fields"] == found["fields"], record["command"]
    assert again["labels"] == found["labels"]
    assert again["record"]["command"] == record["command"]


def check_line(found: dict[str, Any]) -> None:
    """The line of Python in a record gives its fields."""
    record = found["record"]
    names: dict[str, Any] = {}
    exec(record["python"], names)
    assert finite(as_data(each(names["result"])[0]))["fields"] == found["fields"], record["python"]


#: the subjects by turns, so that every kind of them meets some methods
TASKS = (
    ["--task", "facts", "--task-n", "2", "--task-seed", "3"],
    ["--task", "two pairs.jsonl", "--model-dtype", "float64"],
    ["--task", "two pairs.jsonl", "--task-n", "1", "--model", "plain model"],
    ["--task", "ioi", "--task-corruption", "abc", "--task-n", "2", "--task-split", "train"],
)


#: further subjects that a command line must name, or that are made small
SUBJECTS = {
    "dictionary": ["--dictionary", "some latents.safetensors"],
    "dictionaries": ["--dictionaries", "some latents.safetensors,other latents.safetensors?format=house"],
    "autoencoders": ["--autoencoders", "some latents.safetensors,attention latents.safetensors"],
    "labelled": ["--labelled", "some labels.jsonl"],
    "words": ["--words", "some words.txt"],
    "lens": ["--lens", "some lens"],
    "prompts": ["--prompts", "some prompts.txt"],
    "jacobian": ["--jacobian", "some jacobian"],
    "concepts": ["--concepts", "capital,bad"],
    "texts": ["--texts", "some lines.txt", "--texts-most", "40"],
    "encoding": ["--encoding", "rotated", "--encoding-seed", "3", "--encoding-examples", "90"],
    "direction": ["--direction", "some direction.safetensors"],
    "circuit": ["--circuit", "z.0.0,z.1.2,mlp_out.*"],
    "requests": ["--requests", "some requests.jsonl", "--requests-n", "2"],
    "second": ["--second", "other latents.safetensors?format=house"],
    "evidence": ["--evidence", "some text.txt", "--evidence-tokens", "600", "--evidence-context", "24"],
}


def asked(row: Method, task: list[str]) -> list[str]:
    """The words of one quick call."""
    options = {o.name: QUICK[o.name] for o in row.options if o.name in QUICK} | NAMED.get(row.name, {})
    words = [w for n, v in options.items() for w in (f"--{n}", str(v))]
    task = task if "task" in row.subjects else ["--model", "plain model"] if "model" in with_needs(row.subjects) else []
    flags = [w for name in with_needs(row.subjects) for w in SUBJECTS.get(name, [])]
    return [*row.name.split("."), *task, *flags, *words]


#: a method of each room has its command repeated, and its line of Python; those of all in the wide run
TURNS = [
    pytest.param(n, i, way, marks=() if n in SPEAKERS else pytest.mark.wide)
    for i, n in enumerate(m for m in ROWS if m not in ELSEWHERE)
    for way in ("command", "line")
]


@pytest.mark.parametrize(("name", "turn", "way"), TURNS)
def test_the_record_of_every_method_repeats_it(capsys, monkeypatch, tmp_path, files, name, turn, way):
    found = said(capsys, asked(ROWS[name], TASKS[turn // 2 % len(TASKS)]))
    monkeypatch.chdir(tmp_path)
    check_command(capsys, found) if way == "command" else check_line(found)


LENS = ["lenses", "logit_lens", "--samples", "1"]
SENTENCE = "The capital of Norway is"


@pytest.mark.parametrize(
    "words",
    [
        [*LENS, "--task", "two pairs.jsonl", "--model-dtype", "bfloat16", "--task-metric", "prob"],
        [*LENS, "--task", "mine", "--task-path", "two pairs.jsonl", "--task-corruption", "another country"],
        [*LENS, "--task", SENTENCE, "--model-device", "cpu", "--model-attention", "eager"],
        [*LENS, "--task", SENTENCE, "--task-target", " oslo", "--task-siblings", "3", "--task-seed", "2"],
        [*LENS, "--task", "sentence", "--task-sentence=-5 plus 3 is", "--task-narrow"],
        [*LENS, "--task", "capital", "--task-n", "2", "--task-metric", "prob"],
        [*LENS, "--prompts", SENTENCE, "--answer", "oslo"],
        ["lenses", "direct_attribution", "--samples", "1", "--prompts", "some prompts.txt", "--model", "plain model"],
        ["patching", "cross_model", "--task", "ioi", "--task-n", "1", "--samples", "1", "--other", "other model"],
        ["features", "latents", "--task", "ioi", "--task-n", "1", "--samples", "1", "--dictionary",
         "some latents.safetensors?format=house"],
    ],
)  # fmt: skip
def test_every_kind_of_subject_is_repeated(capsys, monkeypatch, tmp_path, files, words):
    if "other model" in words:
        other = ca.load("plain model").hf
        with torch.no_grad():
            other.model.layers[2].self_attn.o_proj.weight.mul_(0.5)
        other.save_pretrained("other model")
        ca.load("plain model").tokenizer.save_pretrained("other model")
    check(capsys, monkeypatch, tmp_path, said(capsys, words))


def lens(model: Any, task: Any) -> dict[str, Any]:
    """The record of one quick call."""
    return ca.lenses.logit_lens(model, task, samples=1).record


def test_what_python_made_is_repeated_by_the_line_of_python(capsys, monkeypatch, tmp_path, files):
    model = ca.load("miniworld", dtype=torch.float64, name="mine")
    task = ca.tasks.load("ioi", model, 12).take(9).split(0.5, 1)[0]
    result = ca.lenses.logit_lens(model, task, samples=1)
    assert result.record["command"].startswith(f"{NO_COMMAND}no flag says name='mine'")
    assert "no flag says task.take(9)" in result.record["command"]
    names: dict[str, Any] = {}
    exec(result.record["python"], names)
    assert torch.equal(names["result"].probability, result.probability)
    narrowed = ca.tasks.from_jsonl("two pairs.jsonl").narrow(ca.load("miniworld"))
    found = as_data(ca.lenses.logit_lens(ca.load("miniworld"), narrowed, samples=1))
    assert "--task-narrow" in found["record"]["command"]
    check(capsys, monkeypatch, tmp_path, json.loads(json.dumps(finite(found))))


def test_what_cannot_be_repeated_is_said_in_words(files):
    """Never a wrong command: neither of what a user holds in hand, nor of what was changed after it was loaded."""
    model, by_hand = ca.load("miniworld"), subjects.llama_task(1)
    task = ca.tasks.load("facts", model, 2)
    live = ca.load(subjects.random_llama().hf, tokenizer=subjects.tokenizer())
    doubled, mended = (ca.load("miniworld") for _ in range(2))
    doubled.hf.double()
    for _ in range(2):  # the second time, the memory of the first may be used again
        mended.hf.lm_head.weight.data = mended.hf.lm_head.weight.data * 0.5
    written = ca.load("miniworld")
    with torch.no_grad():
        written.hf.model.norm.weight.mul_(2.0)
    hooked = ca.load("miniworld")
    hooked.hf.model.layers[0].register_forward_hook(lambda *a: None)
    for m, t, why in [
        (live, by_hand, "the model was made by hand in Python; the task was made by hand in Python"),
        (doubled, task, "the model was changed in Python after it was made (dtype, weights)"),
        (mended, task, "(weights)"),
        (written, task, "(weights)"),
        (hooked, task, "(modules, settings or hooks)"),
        (model, replace(task, pairs=task.pairs[:1]), "the task was changed in Python after it was made (pairs)"),
        (ca.load("miniworld", dtype="float64"), task, "the task was made for another model"),
        (ca.load("plain model", tokenizer=model.tokenizer), ca.tasks.from_jsonl("two pairs.jsonl"), "tokenizer"),
    ]:
        record = lens(m, t)
        assert record["command"].startswith(NO_COMMAND), why
        assert why in record["command"]
        assert record["python"].startswith(NO_PYTHON)
        assert why in record["python"]
    with model.edited(ca.models.Ablate("mlp_out.1@-1")):
        assert "(open edits)" in lens(model, task)["command"]
    assert lens(model, task)["command"].startswith("cutaway "), "after the edits the model is as it was"


def test_a_dictionary_that_was_changed_has_no_command(files):
    model = ca.load("miniworld")
    task = ca.tasks.load("ioi", model, 1)
    d = ca.dictionaries.load("some latents.safetensors")
    options = {"latents": "3", "samples": 1}
    for other, why in [(subjects.dictionary(128, "resid_post.3"), "made by hand"), (fold(d), ""),
                       (replace(d, norm_aware=True), "(settings)"), (d.to(dtype=torch.float64), "")]:  # fmt: skip
        record = ca.features.latents(model, task, other, **options).record
        assert record["command"].startswith(NO_COMMAND if why else "cutaway"), record["command"]
        assert why in record["command"]
