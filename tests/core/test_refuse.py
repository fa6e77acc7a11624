"""A refusal names what, why and what instead, in the caller's own words."""

from cutaway.core.refuse import Refused, nearest


def test_message_has_three_lines_and_its_data():
    refused = Refused("file 'x'", "it is missing", "check the path")
    assert str(refused).splitlines() == ["file 'x'", "  why: it is missing", "  instead: check the path"]
    assert refused.as_dict() == {"what": "file 'x'", "why": "it is missing", "instead": "check the path"}


def test_nearest_offers_close_words_only():
    assert nearest("resid_pst", ["resid_post", "resid_pre", "z"]).split(", ")[0] == "resid_post"
    assert nearest("qqqq", ["resid_post", "z"]) == ""
