"""Foreign names, families, dangerous calls and side channels stay where the house plan puts them."""

import ast
import re

import pytest

from tests.meta.tree import ROOT, calls, imports, room_of, rows, sources

FOREIGN = re.compile(
    r"hook_(resid|embed|attn|mlp|q\b|k\b|v\b|z\b|pattern|result|scale)|\bblocks\.(\d|\{|\*)|\bhook_point"
)
FAMILY = re.compile(
    r"\b(gpt|llama|gemma|qwen|mistral|mixtral|bloom|falcon|pythia|neox|phi\d|olmo|opt\b|bert|mamba)", re.IGNORECASE
)
GLOBAL_RANDOM = {"torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.cuda.manual_seed", "random.seed",
                 "np.random.seed", "numpy.random.seed"}  # fmt: skip
#: the one file that reads and writes others' `.pt` files, as plain tensors
PLAIN_PT = "cutaway/core/pt.py"
DRAWS = {"torch.randn", "torch.rand", "torch.randint", "torch.randperm", "torch.multinomial", "torch.bernoulli"}


def texts(tree: ast.Module):
    """Every string constant outside docstrings, with its line."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {id(n.body[0].value) for n in ast.walk(tree)
            if isinstance(n, documented) and n.body and isinstance(n.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value, node.lineno


def family_tests(tree: ast.Module) -> list[int]:
    """Lines of comparisons with a family's name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [n.value for side in (node.left, *node.comparators) for n in ast.walk(side)
                     if isinstance(n, ast.Constant) and isinstance(n.value, str)]  # fmt: skip
            if any(FAMILY.search(p) for p in parts):
                found.append(node.lineno)
    return found


def side_channels(tree: ast.Module, path: str) -> list[str]:
    """Prints, global random state and environment variables."""
    found = []
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.With) and "fork_rng" in ast.unparse(n.items[0])]
    forks = {id(n) for block in blocks for n in ast.walk(block)}
    for name, call in calls(tree):
        if id(call) in forks:
            continue  # transformers can only be seeded globally; inside a fork nobody else sees it
        if name in GLOBAL_RANDOM or name == "print" or name.startswith(("random.", "np.random.", "numpy.random.")):
            if name not in ("random.Random", "np.random.default_rng", "np.random.Generator"):
                found.append(f"{path}:{call.lineno} {name}()")
        elif name in DRAWS and not any(k.arg == "generator" for k in call.keywords):
            found.append(f"{path}:{call.lineno} {name}() without a generator")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv"):
            found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    return found


def dangers(tree: ast.Module, path: str) -> list[str]:
    """What could run code from a file: pickles, `torch.load`, remote code, `eval`."""
    found = [f"{path}:{line} imports {m}" for m, line in imports(tree, path) if m.split(".")[0] in ("pickle", "dill", "shelve", "marshal", "joblib")]  # fmt: skip  # noqa: E501
    for name, call in calls(tree):
        weights = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
        if path == PLAIN_PT and (name == "torch.save" or (name == "torch.load" and weights)):
            continue
        if name in ("torch.load", "torch.save", "eval", "exec", "np.load", "yaml.load", "os.system"):
            found.append(f"{path}:{call.lineno} {name}()")
        for k in call.keywords:
            allowed = isinstance(k.value, ast.Constant) and k.value.value is False
            if k.arg in ("trust_remote_code", "allow_pickle", "shell") and not allowed:
                found.append(f"{path}:{call.lineno} {k.arg}")
    return found


def test_foreign_vocabularies_live_in_names_and_facades_only():
    wrong = [f"{p}:{line} {text!r}" for p, tree in sources().items() if p != "cutaway/models/anatomy/foreign_names.py"
             and room_of(p) != "compat" for text, line in texts(tree) if FOREIGN.search(text)]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_families_are_told_apart_in_families_only():
    wrong = [f"{p}:{line}" for p, tree in sources().items() if p != "cutaway/models/anatomy/families.py"
             for line in family_tests(tree)]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_no_prints_global_random_state_or_environment_in_below_the_suites():
    wrong = [w for p, tree in rows(0, 7).items() for w in side_channels(tree, p)]
    assert not wrong, "\n".join(wrong)


def test_no_pickle_and_no_remote_code_anywhere():
    wrong = [w for p, tree in sources().items() for w in dangers(tree, p)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "torch.manual_seed(0)",
        "x = os.environ['A']",
        "torch.randn(3)",
        "np.random.rand()",
        "random.choice([1])",
    ],
)
def test_the_side_channel_check_sees(source):
    assert side_channels(ast.parse(source), "x.py")


@pytest.mark.parametrize(
    "source",
    ["import pickle", "torch.load(p)", "f(trust_remote_code=True)", "np.load(p)", "eval('1')", "run(x, shell=flag)"],
)
def test_the_danger_check_sees(source):
    assert dangers(ast.parse(source), "x.py")


def test_the_danger_check_sees_pickles_in_the_file_of_plain_tensors():
    assert dangers(ast.parse("torch.load(p)"), PLAIN_PT)
    assert dangers(ast.parse("torch.load(p, weights_only=False)"), PLAIN_PT)
    assert not dangers(ast.parse("torch.load(p, weights_only=True)"), PLAIN_PT)
    assert dangers(ast.parse("torch.load(p, weights_only=True)"), "cutaway/x.py")


def test_the_vocabulary_checks_see():
    assert family_tests(ast.parse("if 'gpt' in name: pass"))
    assert family_tests(ast.parse("x = config.model_type in ('llama', 'mistral')"))
    assert not family_tests(ast.parse("'gpt2'"))
    assert FOREIGN.search("blocks.3.attn.hook_z")
    assert FOREIGN.search("blocks.{i}.attn")
    assert not FOREIGN.search("model.blocks")


def test_nothing_is_unfinished():
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError|mark\.(skip|xfail)|pytest\.skip")
    here = "tests/meta/test_words.py"
    files = [p for d in ("cutaway", "tests", "tools", "bench", "examples") for p in (ROOT / d).rglob("*.py")]
    wrong = [f"{p.relative_to(ROOT)}:{n}" for p in files if p.relative_to(ROOT).as_posix() != here
             for n, line in enumerate(p.read_text("utf-8").splitlines(), 1) if marks.search(line)]  # fmt: skip
    assert not wrong, wrong
