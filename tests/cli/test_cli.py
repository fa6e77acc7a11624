"""The command line: derived commands, data on stdout, refusals on stderr with exit code 2, instant help."""

import json
import shlex
import subprocess
import sys

import pytest
import torch

import cutaway as ca
from cutaway.cli import app, shell
from cutaway.cli.app import COMMANDS
from cutaway.cli.method_commands import command
from cutaway.core.json_lines import finite
from cutaway.core.refuse import Refused
from cutaway.core.sites import SITES

HELP = ["--help", "methods --help", "sites --help", "tasks --help", "check --help", "open --help", "zoo train --help"]


def run(capsys, line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line."""
    code = app.main(shlex.split(line))
    out, err = capsys.readouterr()
    return code, out, err


def fresh(*words: str) -> subprocess.CompletedProcess[str]:
    """One command line in a process of its own."""
    code = "import sys; from cutaway.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


def test_help_and_version_do_not_load_torch():
    lines = ["--help", *(f"{name} --help" for name in COMMANDS if name not in ("patch", "trace")),
             "zoo train --help", "dict train --help", "dict eval --help", "--version"]  # fmt: skip
    code = (
        f"import sys; from cutaway.cli import main; [main(line.split()) for line in {lines}];"
        "print([n for n in ('torch', 'transformers', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert ca.__version__ in done.stdout


@pytest.mark.parametrize("line", HELP)
def test_help_of_every_command(capsys, line):
    code, out, _ = run(capsys, line)
    assert code == 0
    assert "Usage: cutaway" in out
    assert "--json" in out


def test_every_command_has_its_function_and_every_room_its_group():
    tree = app.build()
    for name in [*app.COMMANDS, *ca.METHOD_ROOMS]:
        assert tree[name] is not None
        assert tree[name].help.strip(". ")


def test_every_method_is_a_command_with_its_options(capsys):
    for name, row in ca.methods().items():
        code, out, _ = run(capsys, f"{name.replace('.', ' ')} --help")
        assert code == 0
        for option in row.options:
            assert f"--{option.name.replace('_', '-')}" in out, name
        assert "--out" in out
        assert row.answers.split()[0] in out


def test_tables_as_text_and_as_json(capsys):
    code, out, err = run(capsys, "sites --json")
    assert (code, err) == (0, "")
    assert [r["site"] for r in json.loads(out)] == [s.name for s in SITES]
    code, out, _ = run(capsys, "--json methods")
    assert [r["method"] for r in json.loads(out)] == list(ca.methods())
    code, out, _ = run(capsys, "tasks")
    assert "ioi" in out
    code, out, _ = run(capsys, "zoo list --json")
    assert json.loads(out)[0]["model"] == "miniworld"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sites --modl x", ["--modl", "--model"]),
        ("explian", ["explian", "explain"]),
        ("zoo trian", ["trian", "train"]),
        ("zoo train nowhere", ["nowhere", "miniworld"]),
        ("sites --model no_such_model", ["no_such_model"]),
        ("check --model no/such/folder/here", ["no/such/folder/here"]),
        ("open missing.safetensors", ["missing.safetensors"]),
        ("open weights.pt", ["pickle"]),
        ("zoo train --minutes soon", ["soon"]),
        ("patching knockout_curve --task ioi --task-n 4 --top 0", ["--top 0"]),
        ("patching knockout --task ioi --task-n 4 --window 300", ["300 layers", "all 6 layers"]),
        ("patching causal_trace --task ioi --task-n 4 --site mlp_out --window 300", ["300 layers"]),
        ("patching cross_model --task ioi --task-n 4 --site z.3", ["'z.3'", "bare name", "use z"]),
        ("patching cross_model --task ioi --task-n 4 --other miniworld", ["patching miniworld from miniworld"]),
        ("trace --task nothere", ["task 'nothere'", "two_hop"]),
        ("trace --task ioi --task-n 10000000", ["--task-n 10000000", "100,000"]),
        ("trace --task ioi --task-target x", ["--task-target with the task 'ioi'", "--task-seed"]),
        ("trace --task a.jsonl --task-seed 3", ["--task-seed with a file", "--task-n"]),
        ("trace --task 'The cat is' --task-n 3", ["--task-n with a sentence", "--task-siblings"]),
    ],
)
def test_wrong_input_is_refused_in_three_lines(capsys, line, words):
    code, out, err = run(capsys, line)
    assert (code, out) == (2, "")
    lines = err.strip().splitlines()
    assert lines[0].startswith("refused: ")
    assert lines[1].startswith("  why: ")
    assert lines[2].startswith("  instead: ")
    assert all(w in err for w in words)


def test_a_refusal_is_json_with_json(capsys):
    code, out, err = run(capsys, "zoo train nowhere --json")
    assert (code, out) == (2, "")
    assert set(json.loads(err)["refused"]) == {"what", "why", "instead"}


def test_interrupts_and_memory_have_their_own_ends(capsys):
    assert shell.refused(KeyboardInterrupt(), "cutaway x", as_json=False) == 130
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert shell.refused(error, "cutaway x", as_json=False) == 2
        assert "memory" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        shell.refused(ZeroDivisionError(), "cutaway x", as_json=False)


def test_json_has_no_numbers_that_json_does_not_have():
    assert finite({"a": (float("nan"), 1.5), 2: float("inf")}) == {"a": [None, 1.5], "2": None}


def test_the_real_program_has_exit_codes():
    assert fresh("sites", "--json").returncode == 0
    done = fresh("zoo", "train", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("refused: zoo model 'nowhere'")


@pytest.mark.parametrize("name", ["lenses.logit_lens", "patching.group"])
def test_a_method_runs_saves_and_is_shown_again(capsys, tmp_path, name):
    target = tmp_path / "a.safetensors"
    heads = " --heads 4.0,5.0 --samples 4" if name == "patching.group" else ""
    code, out, err = run(capsys, f"{name.replace('.', ' ')} --task ioi --task-n 4{heads} --out {target} --json")
    assert code == 0, err
    data = json.loads(out)
    code, shown, _ = run(capsys, f"open {target} --json")
    assert json.loads(shown)["fields"] == data["fields"]
    code, text, _ = run(capsys, f"open {target}")
    assert code == 0
    assert data["record"]["command"] in text.replace("\n", "")


def test_a_command_is_derived_from_any_row():
    for row in ca.methods().values():
        given = command(row).__signature__.parameters
        assert {o.name for o in row.options} < set(given)


def test_refusals_reach_the_shell_unchanged():
    refusal = Refused("a", "b", "c")
    assert shell.as_refusal(refusal, "cutaway x") is refusal


def test_training_shows_progress_on_stderr_and_its_folder_on_stdout(capsys, monkeypatch, tmp_path):
    from cutaway.zoo.miniworld import train

    given = {}

    def recipe(out, *, progress, **options):
        given.update(options)
        progress(train.Progress(step=20, steps=100, loss=3.25, tokens_per_second=1234.0, seconds_left=61.0))
        return out

    monkeypatch.setattr(train, "train", recipe)
    code, out, err = run(capsys, f"zoo train miniworld --out {tmp_path} --minutes 3 --no-resume --json")
    assert code == 0
    assert json.loads(out) == {"model": "miniworld", "folder": str(tmp_path)}
    assert given == {"minutes": 3.0, "threads": 2, "resume": False}
    assert "20/100 steps (20%)" in err
    assert "loss 3.250" in err


@pytest.mark.parametrize(
    ("fit", "method", "flag", "found"),
    [("train", "tuned_lens", "--lens", "divergence"), ("estimate", "jacobian_lens", "--jacobian", "errors")],
)
def test_a_lens_fitted_on_the_command_line_is_read_there(capsys, tmp_path, fit, method, flag, found):
    out, size = tmp_path / "a lens", {"tokens": 128, "batch": 64, "context": 24, "threads": 1}
    words = ["lenses", fit, "--out", str(out), *(w for n, v in size.items() for w in (f"--{n}", str(v)))]
    assert app.main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said[found]) == 6
    assert said["command"].startswith(f"cutaway lenses {fit}")
    read = ["lenses", method, flag, str(out), "--prompts", "the cat", "--samples", "1", "--json"]
    assert app.main(read) == 0
    fields = json.loads(capsys.readouterr().out)["fields"]
    assert fields["divergence"] != fields["logit_divergence"]
