"""Refusals on the command line name flags and commands, never Python; what the user wrote stays as it was written."""

from __future__ import annotations

import ast
import re

import pytest

from cutaway.cli import app
from cutaway.cli.words import CODE, flag, spelled
from cutaway.core.refuse import Call, Code, Keyword, Refused
from tests.meta.tree import calls, sources

PYTHON = re.compile(r"[a-z_]\([a-z….)]|\bca\.|(?<![\w?&=/.-])[a-z]\w*=(?![=X])|\bmodel\.|\btask\.[a-z]")
REFUSALS = ("Refused", "OutOfMemory", "NoTokens", "NotCaptured")
#: modules whose refusals no command line reaches: what they ask about is made in Python only
IN_PYTHON = (
    "cutaway/core/result.py", "cutaway/core/stats.py", "cutaway/core/graph.py", "cutaway/dictionaries/dictionary.py",
    "cutaway/dictionaries/transforms.py", "cutaway/dictionaries/gates/shared/gate.py", "cutaway/dictionaries/norms.py",
    "cutaway/dictionaries/gates/groupmax.py", "cutaway/dictionaries/gates/matching_pursuit.py",
    "cutaway/dictionaries/validate.py", "cutaway/dictionaries/splice.py", "cutaway/dictionaries/training/mesh.py",
    "cutaway/models/edits/library.py", "cutaway/models/edits/edit.py", "cutaway/models/edits/rewrites.py",
    "cutaway/models/generate.py", "cutaway/models/loading/wrappers.py",
    "cutaway/models/access/capture.py",
    "cutaway/streams/shards.py", "cutaway/dictionaries/evaluation/evidence.py",
)  # fmt: skip
FACADES = "cutaway/compat/"  # refuses in notebooks, which are Python
#: names of fields in files that commands read, and of choices that formats leave open (`--choice name=value`)
FIELDS = ("cutaway/dictionaries/formats/", "cutaway/dictionaries/training/recipe.py", "cutaway/dictionaries/opening.py",
          "cutaway/cli/dict/source.py", "cutaway/models/loading/sources.py")  # fmt: skip


def literal(node: ast.AST) -> str:
    """A text as written, what is put into it shown as X."""
    match node:
        case ast.Constant(value=value):
            return str(value)
        case ast.JoinedStr(values=values):
            return "".join(literal(v) for v in values)
        case ast.IfExp(body=body, orelse=orelse):
            return f"{literal(body)} | {literal(orelse)}"
        case ast.BinOp(left=left, right=right):
            return literal(left) + literal(right)
        case ast.Tuple(elts=parts):
            return "".join(map(literal, parts))
    return "X"


def python_left(path: str, tree: ast.AST) -> list[str]:
    """Texts of refusals in which Python is left for someone at a command line."""
    wrong = []
    for name, call in calls(tree):
        if name.split(".")[-1] in REFUSALS and len(call.args) == 3:
            wrong += [f"{path}:{call.lineno}: {t}" for t in map(literal, call.args) if PYTHON.search(t)]
    return wrong


def test_no_refusal_of_a_command_names_python():
    wrong = [w for path, tree in sources().items() if path.startswith("cutaway/") and path not in IN_PYTHON
             and not path.startswith((*FIELDS, FACADES)) for w in python_left(path, tree)]  # fmt: skip
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", ["Refused('x(a=…)', 'b', 'c')", "Refused('a', 'b', 'see ca.load')"])
def test_the_check_sees(source):
    assert python_left("x.py", ast.parse(source))


def marked(kind: str) -> list[tuple[str, ast.Call]]:
    """Every keyword or piece of code that a refusal of a command marks, with its module."""
    return [(path, call) for path, tree in sources().items() for name, call in calls(tree)
            if name == kind and path.startswith("cutaway/") and path not in IN_PYTHON
            and not path.startswith(FACADES)]  # fmt: skip


def test_every_piece_of_code_has_other_words_and_every_words_are_said():
    said = {ast.literal_eval(call.args[0]) for _, call in marked("Code")}
    assert said == set(CODE)


def flags() -> set[str]:
    """Every flag of every command."""
    found, apps = set[str](), [app.build()]
    while apps:
        one = apps.pop()
        apps += [one[name] for name in one if not name.startswith("-")]
        if one.default_command is not None:
            found |= {n.removeprefix("--") for a in one.assemble_argument_collection() for n in a.names}
    return found


def test_every_keyword_is_a_flag_of_some_command():
    known, wrong = flags(), []
    for path, call in marked("Keyword"):
        if isinstance(call.args[0], ast.Constant) and not path.startswith(FIELDS[0]):
            of = next((k.value.value for k in call.keywords if k.arg == "of"), "")  # type: ignore[attr-defined]
            name = flag(Keyword(str(call.args[0].value), of=of)).removeprefix("--")
            wrong += [f"{path}:{call.lineno}: {name}"] if name not in known else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("words", "python", "shell"),
    [
        (Call("activation", {"site": "z", "window": 3}), "activation(site='z', window=3)", "--site z, --window 3"),
        (("leave out ", Keyword("by"), " and ", Keyword("window")), "leave out by=… and window=…",
         "leave out --by and --window"),
        (("use ", Keyword("how", "a b"), " or ", Keyword("each_position", False)),
         "use how='a b' or each_position=False", "use --how 'a b' or --no-each-position"),
        (("task 'ioi' with ", Keyword("n", 3, of="task")), "task 'ioi' with n=3", "task 'ioi' with --task-n 3"),
        ("the prompt 'n=3, site=z'", "the prompt 'n=3, site=z'", "the prompt 'n=3, site=z'"),
        (("see ", Code("model.sites()")), "see model.sites()", "see cutaway sites --model 'a model'"),
        (Keyword("heads", ("3.1", "mlp_out.4")), "heads=('3.1', 'mlp_out.4')", "--heads 3.1,mlp_out.4"),
        (Keyword("sinks", None), "sinks=None", "no --sinks"),
    ],
)  # fmt: skip
def test_python_becomes_flags(words, python, shell):
    refusal = Refused(words, "b", "c")
    assert (refusal.what, spelled(refusal, ["x", "--model", "a model"]).what) == (python, shell)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("explain x --model-dtype int8", ["--model-dtype int8", "quantised"]),
        ("explain x --model-device cuda:7", ["--model-device cuda:7", "this machine has"]),
        ("patch --task ioi --task-n 1 --site nowhere", ["nowhere"]),
        ("patching group --task facts --task-n 1", ["--heads 3.1"]),
    ],
)
def test_refusals_at_the_command_line(capsys, line, says):
    assert app.main(line.split()) == 2
    err = capsys.readouterr().err
    assert all(w in err for w in says), err
