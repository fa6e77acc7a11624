"""Attacks on the studio: each is refused, nothing of a file leaves, and the server lives."""

import asyncio
import json

import pytest

from cutaway.studio.guard import MOST_BODY
from tests.studio.here import HOST, client, entered

JSON = {"content-type": "application/json"}
PROMPT = {"prompt": "The capital of Norway is"}


def _ask(guard, method, path, **options):
    """Return the answer to one request of a client that has entered, and of a plain one after it."""

    async def ask():
        async with entered(guard) as c:
            return await c.request(method, path, **options), await c.post("/api/v1/predict", json=PROMPT)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example:1"}, 421),
        ({"host": "127.0.0.1.evil.example:1"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": f"http://{HOST}.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-length": str(MOST_BODY + 1)}, 413),
        ({"content-length": "-1"}, 413),
        ({"cookie": "cutaway=guessed"}, 401),
        ({"cookie": ""}, 401),
    ],
)
def test_foreign_requests_are_refused(guard, headers, status):
    answer, after = _ask(guard, "POST", "/api/v1/predict", content=json.dumps(PROMPT), headers={**JSON, **headers})
    assert answer.status_code == status
    assert set(answer.json()) == {"what", "why", "instead"}
    assert "oslo" not in answer.text
    assert after.status_code == 200


def test_a_link_opens_one_browser_and_nothing_opens_without_it(guard):
    async def ask():
        async with client(guard) as c:
            before = [await c.get(p) for p in ("/", "/app.js", "/api/v1/about", "/?token=", "/?token=guessed")]
            link = guard.link()
            first, again = await c.get(f"/{link}"), None
            c.cookies.clear()
            again = await c.get(f"/{link}")
        return before, first, again

    before, first, again = asyncio.run(ask())
    assert [r.status_code for r in (*before, again)] == [401] * 6
    assert (first.status_code, first.headers["location"]) == (303, "/")
    assert "HttpOnly; SameSite=Strict" in first.headers["set-cookie"]


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.jsonl",
        "/%2e%2e/secret.jsonl",
        "/..%2fsecret.jsonl",
        "//etc/passwd",
        "/api/v1/results/..%2f..%2fsecret/file",
        "/api/v1/results/%2fetc%2fpasswd/file",
        "/api/v1/results/secret.jsonl/file",
        "/api/v1/jobs/..%2f..",
        "/vendor/../../server.py",
    ],
)
def test_paths_lead_nowhere(guard, path):
    answer, after = _ask(guard, "GET", path)
    assert answer.status_code in (404, 422)
    assert "root:" not in answer.text
    assert "never" not in answer.text
    assert after.status_code == 200


@pytest.mark.parametrize(
    "values",
    [
        {"prompts": "{secret}"},
        {"prompts": "../secret.txt"},
        {"task": "{secret}"},
        {"task": "secret", "task_path": "{secret}"},
        {"task": "~/secret.jsonl"},
        {"prompts": "file:../secret"},
        {"prompts": "file:secret"},
    ],
)
def test_values_that_name_files_are_refused(guard, folder, values):
    secret = str(folder.path.parent / "secret.jsonl")
    values = {k: v.replace("{secret}", secret) for k, v in values.items()}
    body = {"method": "lenses.logit_lens", "values": values}
    answer, after = _ask(guard, "POST", "/api/v1/run", json=body)
    assert answer.status_code == 422
    assert "never" not in answer.text
    assert after.status_code == 200


def test_a_file_with_an_id_opens(guard):
    body = {"method": "lenses.logit_lens", "values": {"prompts": "file:my-notes-txt", "samples": 1}}
    answer, _ = _ask(guard, "POST", "/api/v1/run", json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "content",
    [b"{", b"[1]", b'"a"', b"", b"\xff\xfe", b'{"prompt": 1}', b'{"prompt": "a", "other": 1}', b'{"prompt": NaN}',
     b'{"prompt": "a", "top": 1e99}', b'{"prompt": "' + b"a" * 20_001 + b'"}', b"[" * 5_000],
)  # fmt: skip
def test_malformed_bodies_are_refused(guard, content):
    answer, after = _ask(guard, "POST", "/api/v1/predict", content=content, headers=JSON)
    assert answer.status_code in (400, 422)
    assert set(answer.json()) == {"what", "why", "instead"}
    assert after.status_code == 200


def test_long_bodies_are_cut_whatever_their_header_says(guard):
    async def chunks():
        for _ in range(40):
            yield b'{"prompt": "' + b"a" * 50_000

    answer, after = _ask(guard, "POST", "/api/v1/predict", content=chunks(), headers=JSON)
    assert answer.status_code >= 400
    assert after.status_code == 200


def test_damaged_results_are_refused(guard, folder):
    (folder.results / "broken.safetensors").write_bytes(b"\x80\x04pickled" * 100)
    answer, after = _ask(guard, "POST", "/api/v1/show", json={"result": "broken"})
    assert answer.status_code == 422
    assert after.status_code == 200


def test_markup_in_texts_stays_text(guard):
    nasty = "<img src=x onerror=alert(1)> & <script>alert(2)</script>"
    body = {"method": "lenses.lens_grid", "values": {"prompts": nasty}}
    answer, _ = _ask(guard, "POST", "/api/v1/run", json=body)
    shown = "".join(d["html"] + d["numbers"] for d in answer.json()["drawings"]) + answer.json()["how"]
    assert "&lt;" in shown
    assert "<img" not in shown
    assert "<script" not in shown


def test_every_answer_carries_the_policy(guard):
    for path in ("/", "/app.js", "/api/v1/about", "/nothing"):
        answer, _ = _ask(guard, "GET", path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
