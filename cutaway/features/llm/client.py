"""A client of servers of OpenAI's chat protocol (vLLM, llama.cpp, Ollama, hosted ones), with cache and budget."""

from __future__ import annotations

import json
import sqlite3
import time
import urllib.error
import urllib.request
from functools import cached_property
from pathlib import Path

from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused

URL = "http://localhost:8000/v1"
ATTEMPTS, WAIT = 4, 1.0  # requests until one is given up, and seconds before the second, which double
_AGAIN = (408, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
_LETTERS = 4  # characters a token, for the estimate of a dry run


class Client:
    """Requests to one model of one server; answers are deterministic as far as the server is (temperature 0).

    An answer in the cache costs nothing. A dry run sends nothing and answers "", but counts what would be sent.

    Attributes:
        model: name of the model on the server.
        url: address of the server, up to `/v1`.
        cache: SQLite file of answers; None for none.
        budget: number of requests that may be sent; None for any number.
        dry: True for a dry run.
        sent: requests so far.
        timeout: seconds until an answer that does not come is refused.
        tokens: tokens so far that the server counted; in a dry run an estimate of those of the prompts.
    """

    def __init__(
        self,
        model: str,
        url: str = URL,
        *,
        key: str | None = None,
        cache: str | Path | None = None,
        budget: int | None = None,
        dry: bool = False,
        timeout: float = 600.0,
    ):
        self.model, self.url, self.cache, self.budget, self.dry = model, url.rstrip("/"), cache, budget, dry
        self.timeout, self._key = timeout, key
        self.sent = self.tokens = 0

    def ask(self, prompt: str, most: int = 400) -> str:
        """Return the answer to a prompt, of at most `most` tokens.

        Raises:
            Refused: the budget is spent, or the server does not answer as the protocol says.
        """
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": most, "seed": 0}
        text = json.dumps(body)
        name = hash_text(self.url, text)
        found = self._answers.execute("select text from answer where key = ?", (name,)).fetchone()
        if found is not None:
            return found[0]
        if self.budget is not None and self.sent >= self.budget and not self.dry:
            why = f"the budget of {self.budget} requests is spent"
            raise Refused(f"a request to {self.model}", why, "raise it, and give a cache, which keeps answers")
        self.sent += 1
        if self.dry:
            self.tokens += len(prompt) // _LETTERS
            return ""
        answer = self._answer(self._send(text))
        with self._answers as file:
            file.execute("insert or replace into answer values (?, ?)", (name, answer))
        return answer

    @cached_property
    def _answers(self) -> sqlite3.Connection:
        file = sqlite3.connect(":memory:" if self.cache is None else self.cache)
        file.execute("create table if not exists answer (key text primary key, text text not null)")
        return file

    def _send(self, body: str) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", body.encode(), headers)
        why = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(WAIT * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return reply.read()
            except urllib.error.HTTPError as error:
                why = f"it answers {error.code} {error.reason}"
                if error.code not in _AGAIN:
                    break
            except TimeoutError:
                # a server that is still at work would do the same work twice
                why = f"no answer came within {self.timeout:g} s"
                raise Refused(f"server {self.url}", why, "use a faster server, or a client with more time") from None
            except OSError as error:
                why = f"it cannot be reached: {error}"
        raise Refused(f"server {self.url}", why, "check the address, the model's name and the key")

    def _answer(self, reply: bytes) -> str:
        try:
            data = json.loads(reply)
            self.tokens += int((data.get("usage") or {}).get("total_tokens", 0))
            return str(data["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            why = f"its answer is not one of the chat protocol: {reply[:80]!r}"
            raise Refused(f"server {self.url}", why, "give the address of an OpenAI-compatible server") from error
