"""Dictionaries trained by two processes: the numbers of one, other numbers of processes, a process that is killed."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cutaway.cli import main
from cutaway.core.files import read_tensors, write_tensors
from cutaway.core.refuse import Refused
from cutaway.dictionaries import objectives as ob
from cutaway.dictionaries import training as tr
from cutaway.dictionaries.gates import BatchTopK
from cutaway.dictionaries.parts import described
from cutaway.dictionaries.training import sharded
from cutaway.dictionaries.training.learner import Learner, SiteMoments
from cutaway.dictionaries.training.mesh import LatentShards, mesh
from cutaway.dictionaries.training.update import KIND
from cutaway.training import checkpoints
from cutaway.training.checkpoints import Checkpoints

A, B, C, Z = "resid_post.0", "mlp_out.1", "mlp_out.2", "mlp_out.3"
D, F, TOKENS = 16, 63, 96  # shards of 32 and 31 latents
NEAR = {"rtol": 5e-7, "atol": 5e-7}

RECIPES = {
    "topk": tr.autoencoder(A, F, tr.TrainTopK(3), (ob.AuxK(k=4, after=150, weight=1.0),), rate=1e-2),
    "batchtopk": tr.autoencoder(
        A, F, tr.TrainBatchTopK(3), (ob.AuxK(k=50, after=150),), decoder="norm_aware", rate=1e-2
    ),
    "nested": tr.autoencoder(A, F, tr.TrainBatchTopK(3), (ob.Matryoshka((8, 40)),), rate=1e-2),
    "multi": tr.autoencoder(A, F, tr.TrainTopK(3, 9), rate=1e-2),
    "abs": tr.autoencoder(A, F, tr.TrainAbsTopK(3), rate=1e-2),
    "groups": tr.autoencoder(A, 64, tr.TrainGroupMax(8), rate=1e-2),
    "relu": tr.autoencoder(A, F, tr.TrainRelu(), (ob.L1(0.4), ob.Frequency(0.1)), rate=1e-2),
    "jump": tr.autoencoder(
        A, F, tr.TrainJumpRelu(0.1, 0.4), (ob.L0Target(0.1, 3.0), ob.PreActivation(1e-2)), rate=1e-2
    ),
    "rare jump": tr.autoencoder(A, F, tr.TrainJumpRelu(0.6, 0.4), (ob.L0(0.1), ob.Tanh(0.1)), rate=1e-2),
    "gated": tr.autoencoder(A, F, tr.TrainGated(), (ob.OpenGate(0.4),), rate=1e-2),
    "across layers": tr.cross_layer([A, B], [C, Z], F, tr.TrainTopK(3), skip=True, rate=1e-2),
}
OVER_TOKENS = ("topk", "batchtopk", "relu", "jump")
#: imported once for all processes
WARM = ("torch.distributed.checkpoint", "torch.distributed.tensor", "transformers.modeling_utils", "scipy.stats")
KILLED = RECIPES["topk"], RECIPES["batchtopk"]


def source():
    g = torch.Generator().manual_seed(3)
    amount = (torch.rand(960, 32, generator=g) + 0.5) * (torch.rand(960, 32, generator=g) < 0.06)
    acts = {s: amount @ torch.nn.functional.normalize(torch.randn(32, D, generator=g)) for s in (A, B, C, Z)}
    return tr.Held(acts, TOKENS)


def plan(steps=5, select: Any = "float32"):
    return tr.Plan(
        tokens=TOKENS * steps, log_every=2, checkpoint_every=4, select=select, products="plain", decay=0, warmup=0
    )


def results(trained):
    """Weights, thresholds and curves by name."""
    found = {}
    for i, t in enumerate(trained):
        found |= {f"{i}/{n}": x for n, x in described(t.dictionary)[0].items()}
        if isinstance(gate := t.dictionary.gates[0], BatchTopK):
            found[f"{i}/threshold"] = torch.tensor(gate.threshold)
        curve = next(iter(t.curves.values()))
        for n in ("loss", "fvu", "l0", "silent"):
            found[f"{i}/curve {n}"] = torch.tensor([c[n] for c in curve])
    return found


# --- the processes


def process(rank, store, n, job, *args):
    """One of n processes; a job that fails makes it end with an error."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
    job(rank, *args)
    dist.destroy_process_group()


def launched(folder, job, *args, n=2):
    """Exit codes of n processes of a group that did a job."""
    store = folder / f"store {job.__name__} {args[-1:]}".replace("/", "")
    return ended(process, store, n, job, *args, n=n)


def ended(target, *args, n=2):
    """Exit codes of n processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *WARM])
    pair = [context.Process(target=target, args=(r, *args)) for r in range(n)]
    for p in pair:
        p.start()
    for p in pair:
        p.join(60)
        if p.is_alive():
            p.kill()
    return [p.exitcode for p in pair]


def several(rank, folder):
    """All that is compared with one process, in one launch."""
    latents, tokens = mesh(), mesh(2)
    jobs = {
        "latents": (list(RECIPES.values()), latents, plan()),
        "tokens": ([RECIPES[n] for n in OVER_TOKENS], tokens, plan()),
        "bfloat16": ([RECIPES["topk"], RECIPES["batchtopk"]], latents, plan(select="bfloat16")),
    }
    for name, (recipes, over, how) in jobs.items():
        made = results(tr.train(source(), recipes, how, device=over, out=folder / "run" if over is tokens else None))
        if rank == 0:
            write_tensors(folder / f"{name}.safetensors", made, {})
    for name in ("topk", "batchtopk"):
        made = skewed(sharded.ShardedLearner(RECIPES[name], moments(), LatentShards(latents), 150))
        if rank == 0:
            write_tensors(folder / f"skewed {name}.safetensors", made, {})
    learner = sharded.ShardedLearner(RECIPES["topk"], moments(), LatentShards(latents), 150)
    learner.compact = False
    made = skewed(learner)
    if rank == 0:
        write_tensors(folder / "skewed padded.safetensors", made, {})
    equals(LatentShards(latents))
    refusals(LatentShards(tokens), LatentShards(latents))
    tr.train(source(), KILLED, plan(10), out=folder / "whole", device=latents)
    tr.train(source(), KILLED, plan(10), out=folder / "two", device=latents, stop_after=6)
    tensors, record = Checkpoints(folder / "one", KIND, LatentShards(latents)).read()
    Checkpoints(folder / "moved", KIND, LatentShards(latents)).write(tensors, record)
    tr.train(source(), KILLED, plan(10), out=folder / "one", device=latents)
    try:
        tr.train(source(), [RECIPES["topk"]], plan(10), out=folder / "one", device=latents)
    except Refused:
        return
    raise AssertionError("a checkpoint of other recipes was taken")


def moments():
    return SiteMoments.of({A: source().acts[A]})


def skewed(learner):
    """Some steps of a learner of whose latents only the second half is ever active, on one shard of two."""
    over = learner.across
    start, end = over.bounds(F) if isinstance(over, LatentShards) else (0, F)
    with torch.no_grad():
        learner.weights["b_enc.0"][: max(0, min(end, 32) - start)] -= 9
    reports = [learner.step({A: b[A]}, 1e-2, 0.5) for _, b in zip(range(6), source(), strict=False)]
    whole = dict(described(learner.dictionary())[0])
    whole["silent"] = torch.tensor([learner.silent()])
    whole["counters"] = learner.buffers["silent.0"] if not isinstance(over, LatentShards) else over.whole(
        learner.buffers["silent.0"], F
    )  # fmt: skip
    whole["loss"] = torch.stack([r.loss.double() for r in reports])
    whole["aux"] = torch.stack([r.terms["AuxK"].double() for r in reports])
    whole["active"] = torch.stack([r.active.double() for r in reports])
    return whole


def equals(shards):
    """Of equal candidates the lowest win, in numbers as asked."""
    g = torch.Generator().manual_seed(0)
    value = torch.randint(0, 4, (50, 12), generator=g).float()
    mine = value[:, 6 * shards.shard :][:, :6]
    _, index = mine.sort(dim=1, descending=True, stable=True)
    order = index[:, :4].sort(dim=1).values  # the candidates of this shard, lowest first
    won = torch.zeros_like(mine).scatter_(1, order, shards.largest(mine.gather(1, order), 4))
    true = torch.zeros_like(value).scatter_(1, value.sort(dim=1, descending=True, stable=True).indices[:, :4], 1.0)
    assert torch.equal(won, true[:, 6 * shards.shard :][:, :6])
    shards.here = shards.all = 10
    flat = torch.randint(1, 5, (40,), generator=g).float()
    own = flat[:33] if shards.rank == 0 else flat[33:]
    kept = shards.largest_of_all(own, 11)
    true = flat.sort(descending=True, stable=True).indices[:11]
    assert torch.equal(kept, (true[true < 33] if shards.rank == 0 else true[true >= 33] - 33).sort().values)
    assert shards.enough(15 + 10 * shards.rank, 40)
    assert not shards.enough(15 + 10 * shards.rank, 41)


def refusals(tokens, latents):
    for shards, recipe in (
        (latents, tr.autoencoder(A, 9, tr.TrainTopK(5))),
        (latents, tr.autoencoder(A, 15, tr.TrainGroupMax(5))),
        (tokens, tr.autoencoder(A, F, tr.TrainTopK(3), (ob.Spliced(lambda outs, batch: outs[A].sum()),))),
    ):
        try:
            sharded.ShardedLearner(recipe, moments(), shards)
        except Refused:
            continue
        raise AssertionError("not refused")


def killed(rank, folder, when):
    """Like `whole`, but the second process is killed: while a step is exchanged, or while a checkpoint is written."""
    if rank == 1 and when == "step":
        gradients, calls = sharded.ShardedLearner._gradients, iter(range(100))

        def dies(self, loss):
            if next(calls) == 2 * 6 + 1:  # the second dictionary of the run, in its seventh step
                os.kill(os.getpid(), signal.SIGKILL)
            return gradients(self, loss)

        sharded.ShardedLearner._gradients = dies
    if rank == 1 and when == "write":
        saves = checkpoints._save

        def torn(state, to):
            if to.name == checkpoints.FOLDERS[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            saves(state, to)

        checkpoints._save = torn
    tr.train(source(), KILLED, plan(10), out=folder / when, device=mesh())


def resumed(rank, folder, when):
    tr.train(source(), KILLED, plan(10), out=folder / when, device=mesh())


def square(rank, folder):
    """Two replicas of two shards."""
    made = results(tr.train(source(), [RECIPES[n] for n in OVER_TOKENS], plan(), device=mesh(2), out=folder / "square"))
    if rank == 0:
        write_tensors(folder / "square.safetensors", made, {})


COMMAND = (
    "dict train --site resid_post.2 --tokens 1000 --batch 128 --context 32 --threads 1 --latents 40 --k 4 --rate 0.01"
)


def commanded(rank, folder, port):
    """What torchrun does around `python -m cutaway …` in two processes; the third works alone."""
    if rank < 2:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.stdout = (folder / f"said {rank}").open("w")
    code = main([*COMMAND.split(), "--out", str(folder / ("shared" if rank < 2 else "alone")), "--json"])
    sys.stdout.close()
    sys.exit(code)


# --- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes left."""
    here = tmp_path_factory.mktemp("sharded")
    tr.train(source(), KILLED, plan(10), out=here / "one", stop_after=6)
    assert launched(here, several, here) == [0, 0]
    return here


def agree(made, true, **tolerance):
    assert made.keys() == true.keys()
    for n in true:
        torch.testing.assert_close(made[n], true[n], msg=lambda m, n=n: f"{n}: {m}", **tolerance)


WIDE = [pytest.param(over, marks=pytest.mark.wide) for over in ("tokens", "bfloat16")]


@pytest.mark.parametrize("over", ["latents", *WIDE])
def test_two_processes_train_what_one_trains(folder, over):
    names = {"latents": RECIPES, "tokens": OVER_TOKENS, "bfloat16": ("topk", "batchtopk")}[over]
    how = plan(select="bfloat16" if over == "bfloat16" else "float32")
    alone = results(tr.train(source(), [RECIPES[n] for n in names], how))
    made, _ = read_tensors(folder / f"{over}.safetensors")
    agree(made, alone, **NEAR)


@pytest.mark.wide
def test_two_replicas_of_two_shards_train_what_one_process_trains(tmp_path):
    assert launched(tmp_path, square, tmp_path, n=4) == [0] * 4
    alone = results(tr.train(source(), [RECIPES[n] for n in OVER_TOKENS], plan()))
    made, _ = read_tensors(tmp_path / "square.safetensors")
    agree(made, alone, **NEAR)
    tensors, record = Checkpoints(tmp_path / "square", KIND).read()
    assert record["step"] == 5
    assert torch.equal(tensors["0/weight/encoder.0"], made[f"0/encoder.0.{A}"])


def test_replicas_write_every_row_once(folder):
    made, _ = read_tensors(folder / "tokens.safetensors")
    found, record = Checkpoints(folder / "run", KIND).read()
    assert record["step"] == 5
    assert torch.equal(found["0/weight/encoder.0"], made[f"0/encoder.0.{A}"])


@pytest.mark.parametrize("name", ["topk", "padded", "batchtopk"])
def test_all_active_latents_may_be_in_one_shard(folder, name):
    alone = skewed(Learner(RECIPES[name.replace("padded", "topk")], moments(), silent_after=150))
    made, _ = read_tensors(folder / f"skewed {name}.safetensors")
    assert bool((alone["counters"][:32] >= 150).all())
    assert float(alone["aux"][-1]) > 0
    for n in ("counters", "silent", "active"):
        assert torch.equal(made[n].double(), alone[n].double()), n
    agree(made, alone, **NEAR)


def test_a_killed_process_leaves_a_run_that_goes_on_with_the_same_bits(folder):
    whole, record = Checkpoints(folder / "whole", KIND).read()
    for when in ("step", "write"):
        codes = launched(folder, killed, folder, when)
        assert codes[1] == -signal.SIGKILL
        assert codes[0] not in (0, -signal.SIGKILL), "the other process ends with an error"
        assert Checkpoints(folder / when, KIND).read()[1]["step"] == 4
        assert launched(folder, resumed, folder, when) == [0, 0]
        again, same = Checkpoints(folder / when, KIND).read()
        agree(again, whole, rtol=0, atol=0)
        assert [e["curve"] for e in same["entries"]] == [e["curve"] for e in record["entries"]]
        logs = [
            [(x["step"], x.get("loss")) for x in map(json.loads, (folder / n / "log.jsonl").read_text().splitlines())]
            for n in ("whole", when)
        ]
        assert logs[0] == logs[1]


def test_checkpoints_move_between_numbers_of_processes(folder, tmp_path):
    """From two to one and from one to two: every bit of the state, and a run that goes on."""
    alone = tr.train(source(), KILLED, plan(10), out=tmp_path / "alone")
    true, _ = Checkpoints(tmp_path / "alone", KIND).read()
    shutil.copytree(folder / "two", tmp_path / "two")
    before, record = Checkpoints(tmp_path / "two", KIND).read()
    assert record["step"] == 6
    done = tr.train(source(), KILLED, plan(10), out=tmp_path / "two")
    agree(results(done), results(alone), **NEAR)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"checkpoint.safetensors", "log.jsonl"}
    other, record = Checkpoints(folder / "one", KIND).read()
    assert record["step"] == 10
    assert not (folder / "one" / "checkpoint.safetensors").exists()
    agree(other, true, **NEAR)
    moved, _ = Checkpoints(folder / "moved", KIND).read()
    tr.train(source(), KILLED, plan(10), out=tmp_path / "part", stop_after=6)
    agree(moved, Checkpoints(tmp_path / "part", KIND).read()[0], rtol=0, atol=0)
    agree(before, moved, **NEAR)


def test_nothing_on_disk_is_a_pickle(folder):
    files = [p for p in (folder / "whole").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl"}


def test_the_command_is_one_for_any_number_of_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    assert ended(commanded, tmp_path, port, n=3) == [0, 0, 0]
    assert (tmp_path / "said 1").read_text() == ""
    said = [json.loads((tmp_path / f"said {r}").read_text()) for r in (0, 2)]
    names = [torch.tensor(next(iter(x["cards"][0]["curves"].values()))[-1]["loss"]) for x in said]
    near = {"rtol": 1e-5, "atol": 1e-5}  # each run measures how it computes products
    torch.testing.assert_close(*names, **near)
    weights = [read_tensors(tmp_path / n / "dictionary.safetensors")[0] for n in ("shared", "alone")]
    agree(*weights, **near)


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(Refused, match="torchrun"):
        mesh()
    import torch.distributed.checkpoint as storage

    monkeypatch.delattr(storage, "HuggingFaceStorageWriter")
    with pytest.raises(Refused, match="update PyTorch"):
        checkpoints.shared_storage()
