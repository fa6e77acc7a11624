"""Everything at once, and the model that knows nothing."""

from cutaway.dictionaries.evaluation.evaluate import evaluate
from cutaway.dictionaries.evaluation.evidence import Evidence
from cutaway.dictionaries.evaluation.scores import joined
from tests.dictionaries.evaluation import made


def test_everything_is_judged_on_a_truth_on_tokens_that_nothing_was_fitted_on():
    truth = made.truth()
    e = made.evidence(truth, 2000)
    got = evaluate(made.oracle(truth), e, truth=truth, nulls=2, others={"same": (made.oracle(truth), e)})
    names = got.labels["score"]
    assert len(names) == len(set(names))
    assert {"L0", "FVU", "dead", "doubles", "F1", "full absorption"} <= set(names)
    assert got.labels["control"] == ["pca", "pca first", "neurons", "same", "features without children"]
    i, fvu = got.row("FVU"), got["FVU"]
    assert got.score[i] < got.control[i, :3].min() < got.null[i].min()
    assert (fvu.value, list(fvu.interval), fvu.null) == tuple(
        x[i].tolist() for x in (got.score, got.interval, got.null)
    )
    assert fvu.control == dict(zip(got.labels["control"][:4], got.control[i, :4].tolist(), strict=True))  # no NaN
    assert fvu.unit == got.units.get("FVU", "")
    assert got["full absorption"].control.keys() == {"features without children"}
    assert got.record["tokens"] == 1500
    assert got.record["interval"]["MCC"] == "over matched pairs"
    plain = evaluate(made.random_autoencoder(), Evidence({made.SITE: made.activations()}), nulls=0)
    assert "F1" not in plain.labels["score"]


def test_saved_scores_are_opened_by_the_package_alone(tmp_path):
    import subprocess
    import sys

    path = evaluate(made.random_autoencoder(), Evidence({made.SITE: made.activations()}), nulls=1).save(
        tmp_path / "s.safetensors"
    )
    code = f"import cutaway as ca; print(ca.open({str(path)!r})['L0'].value)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "3.0\n"


def test_records_that_differ_stand_beside_their_scores():
    truth = made.truth()
    e = made.evidence(truth, 400)
    a = evaluate(made.oracle(truth), e, nulls=1)
    again = joined([a.select(score=["L0"]), a.select(score=["FVU"])])
    assert again.record == a.select(score=["L0"]).record
