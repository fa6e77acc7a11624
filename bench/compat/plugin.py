"""A pytest plugin that writes each test's outcome and, with `--models`, collects and runs under cutaway's façades."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.compat.cells import TooSlow, offline_hub, seed, stop

LIMIT = 120  # seconds of a test
OUTCOMES = dict[str, tuple[str, str]]()
ENTERED = contextlib.ExitStack()
CHOSEN = list[str]()  # the file of the record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", help="file of the outcomes")
    parser.addoption("--extra", help="folder of packages that the tests import")
    parser.addoption("--models", help="names and folders of models; run under the façades")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)
    CHOSEN.append(config.getoption("--record"))
    sys.path += [config.getoption("--extra")] if config.getoption("--extra") else []
    if (models := config.getoption("--models")) is not None:
        from cutaway import compat

        ENTERED.enter_context(compat.imports(json.loads(models)))
    offline_hub()
    seed()  # of parameters that are drawn while tests are collected: names hold them


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        OUTCOMES[report.nodeid] = "failed", last_line(report.longrepr)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    seed()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    except TooSlow:
        OUTCOMES[item.nodeid] = "failed", "it ran past its limit"
    finally:
        signal.alarm(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    worse = report.failed or (report.skipped and report.nodeid not in OUTCOMES)
    if worse or report.when == "call":
        OUTCOMES[report.nodeid] = report.outcome, last_line(report.longrepr) if worse else ""


def pytest_runtest_logfinish() -> None:  # so that a process that dies leaves what it did
    Path(CHOSEN[0]).write_text(json.dumps(OUTCOMES, indent=1), "utf-8")


def pytest_sessionfinish() -> None:
    pytest_runtest_logfinish()
    ENTERED.close()


def last_line(text: Any) -> str:
    """Return what pytest says of an error in its last lines, those of the error itself."""
    lines = [line for line in str(text).splitlines() if line.startswith("E ")] or str(text).splitlines()[-1:]
    return " ".join(line[1:].strip() for line in lines)[:400]
