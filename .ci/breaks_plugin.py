"""The part of .ci/breaks that runs inside pytest: `-p breaks_plugin`, with what to do in the environment.

BREAKS_TRACE=FILE   all tests run under coverage; FILE gets which test ran which line, and how long each took
BREAKS_TESTS=FILE   only the tests that FILE lists, in its order; one that takes much longer than usual is
                    killed
"""
import collections
import json
import os
import signal
import sys
import time

import pytest

TRACE, CHOSEN = os.environ.get("BREAKS_TRACE"), os.environ.get("BREAKS_TESTS")
# {test: s}; tests that start train.py or eval.py; tests with shared fixtures
seconds, started, wide = {}, [], []
now = ""
if TRACE:
    os.environ["COVERAGE_CORE"] = "ctrace"  # the newer core of Python 3.12 knows no contexts
    import coverage
    # a star ends at a /
    ours = [os.path.join(os.getcwd(), room, "*.py") for room in ("", "tasks", "support")]
    tracer = coverage.Coverage(data_file=None, include=ours, config_file=False)
    tracer.start()  # before the first import of a file of ours

    def watch(event, arguments):
        """A test that starts a process of its own runs lines that are not traced."""
        if event == "subprocess.Popen" and ".py" in str(arguments[1]):
            started.append(now.split("|")[0])
    sys.addaudithook(watch)


def enter(what):
    """Lines that run from here on are those of `what`: "test|phase", or "" between tests."""
    global now
    now = what
    if TRACE:
        tracer.switch_context(what)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """One test with its fixtures: how long it takes, or a limit to that."""
    began = time.perf_counter()
    if CHOSEN:
        signal.setitimer(signal.ITIMER_REAL, limits[item.nodeid])  # SIGALRM ends the process: none waits here
    answer = yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    seconds[item.nodeid] = round(time.perf_counter() - began, 3)
    enter("")
    return answer


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    enter(item.nodeid + "|setup")
    if any(d[-1].scope != "function" for d in item._fixtureinfo.name2fixturedefs.values()):
        wide.append(item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    enter(item.nodeid + "|call")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The chosen tests in the chosen order; one that is not there any more is an error of the list."""
    global limits
    if CHOSEN:
        with open(CHOSEN) as f:
            limits = json.load(f)  # {test: seconds it may take}, in order
        place = {name: i for i, name in enumerate(limits)}
        items[:] = sorted((x for x in items if x.nodeid in place), key=lambda x: place[x.nodeid])


failed = set()


def pytest_runtest_logreport(report):
    if report.failed:
        failed.add(report.nodeid)


def pytest_sessionfinish():
    if not TRACE:
        return
    tracer.stop()
    data = tracer.get_data()
    lines = collections.defaultdict(dict)
    for path in data.measured_files():
        for line, contexts in data.contexts_by_lineno(path).items():
            lines[os.path.relpath(path)][line] = sorted(c for c in contexts if c)
    with open(TRACE, "w") as f:
        json.dump({"lines": lines, "seconds": seconds, "started": sorted(set(started)), "wide": wide,
                   "failed": sorted(failed)}, f)
