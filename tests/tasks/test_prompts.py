"""Prompts and contrasts: read from a file or given in a word, and said again by flags and by Python."""

import pytest

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.core.repeat import command, together
from cutaway.core.subject import open_subjects


def test_prompts_are_opened_by_flags_and_made_again_by_what_they_say(tmp_path, monkeypatch):
    ca.methods()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "happy.txt").write_text("I am glad\n\nWhat a day\n", "utf-8")
    given = {"contrast_positive": "happy.txt", "contrast_negative": "I am sad", "samples": 3}
    (contrast,) = open_subjects(["contrast"], given)
    assert given == {"samples": 3}
    assert contrast.positive.texts == ("I am glad", "What a day")
    assert contrast.sizes() == {"prompts": 3}
    how = together({"contrast": contrast})
    assert eval(how["contrast"].python, {"ca": ca}) == contrast
    line = command("directions.mean", how, {}, {})
    assert line == f"cutaway directions mean --contrast-positive {tmp_path}/happy.txt --contrast-negative 'I am sad'"
    (one,) = open_subjects(["prompts"], {"prompts": "I am sad"})
    assert one == contrast.negative
    with pytest.raises(Refused, match="no such file"):
        open_subjects(["prompts"], {"prompts": "sad.txt"})
    with pytest.raises(Refused, match="no subject has that name; near: prompts"):
        open_subjects(["prompt"], {})
