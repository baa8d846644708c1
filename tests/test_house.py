"""The house: which file may import which, lines that fit a screen, one statement a line, divisors that are
named.

One rule: the top level is the method and its commands; tasks/ owns text, preferences and scores; support/
knows nothing of either; arrows point down. What does not hold yet stands in NOT_YET with the reason and shows
up as an expected failure, never as nothing; the list is to stay empty.
"""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 110

TEXT_IN = {"data"}
NETS = {"model", "fused"} | TEXT_IN
METHOD = {"aggregate", "plackett_luce", "reward", "policy_reinforce", "policy_wmle", "policy_ppo",
          "policy_dpo", "redistribute", "guidance"}
ROOMS = {  # every file of the top level, and what of this project it may import
    "aggregate": set(), "plackett_luce": set(),
    "reward": {"model", "aggregate", "plackett_luce", "support"} | TEXT_IN,  # data: batches and their masks
    "policy_reinforce": {"fused"}, "policy_wmle": {"fused"}, "policy_ppo": {"fused"},
    "policy_dpo": {"fused", "model", "plackett_luce"},  # it ranks, and is a reward besides
    "guidance": {"policy_dpo", "redistribute", "reward", "support"},  # how a reward is fitted, what is paid
    "train": "all", "bench": "all",
    "eval": {"support", "data", "report"}, "report": {"support", "data"},
    "model": {"support"}, "fused": {"support"}, "data": {"support"},
    "rollout": METHOD | NETS | {"support"},
    "objective": METHOD | NETS | {"rollout", "support"},  # one update of the policy
    "warm_start": METHOD | NETS | {"rollout", "state", "weights", "support"},
    "state": METHOD | NETS | {"weights", "support"},  # weights: the sizes of a folder's nets
    "evaluate": METHOD | NETS | {"objective", "rollout", "state", "support"},  # what a run says of itself
    # sample reads a run as training did: rollout's ends of segments, and train's two tables, the only lists
    # of tasks and objectives (a table in tasks/ would import its own submodules, which import tasks)
    "sample": METHOD | NETS | {"rollout", "state", "tasks", "train", "support"},
    "redistribute": {"reward", "model", "support"}, "weights": {"model", "data", "support"},
    "pretrain": NETS | {"weights", "support"},
}
DIVISORS = {"aggregate": 2, "plackett_luce": 1, "policy_reinforce": 6, "policy_wmle": 2, "policy_ppo": 4,
            "reward": 2, "fused": 2, "redistribute": 1}  # comments that name one; more are welcome

# (what, file): why it does not hold yet.
NOT_YET = {}


def files():
    """{name without .py: path} of the code."""
    found = [p for folder in (".", "support", "tasks", "tests") for p in sorted((ROOT / folder).glob("*.py"))]
    return {p.relative_to(ROOT).with_suffix("").as_posix(): p for p in found}


FILES = files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
CODE = [name for name in FILES if not name.startswith("tests/")]


def those(what, names):
    """Parameters of a test, one a file; those of NOT_YET are expected to fail."""
    parameters = []
    for name in names:
        reason = NOT_YET.get((what, name))
        marks = [pytest.mark.xfail(reason=reason, strict=False)] if reason else []
        parameters.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("name", parameters)


def imported(name):
    """The modules that a file imports at its top or inside of functions, by their dotted names."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {x.name for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{x.name}" for x in node.names}
            modules = {x for x in inner if x.replace(".", "/") in FILES}
            found |= modules or {node.module}
    return found


def ours(name):
    """Those of them that are files of this project, as names of FILES."""
    found = {x.replace(".", "/") for x in imported(name)}
    packages = {x for x in found if f"{x}/__init__" in FILES}
    return {x for x in found if x in FILES} | {f"{x}/__init__" for x in packages}


def room(name):
    """Where a file stands, as ROOMS has it: the folder, or the name of a file of the top level."""
    return name.split("/")[0]


# ------------------------------------------------------------------------------------------ arrows point down


def test_every_file_of_the_top_level_stands_in_the_table():
    late = {name for what, name in NOT_YET if what == "table"}
    assert {name for name in CODE if "/" not in name} <= set(ROOMS) | late


@those("arrow", [name for name in CODE if name in ROOMS])
def test_a_file_of_the_top_level_imports_what_the_table_allows(name):
    allowed = ROOMS[name]
    assert allowed == "all" or {room(x) for x in ours(name)} <= allowed


@those("arrow", [name for name in CODE if name.startswith("tasks/")])
def test_tasks_import_data_model_weights_support_and_tasks(name):
    assert {room(x) for x in ours(name)} <= {"data", "model", "weights", "support", "tasks"}


@those("arrow", [name for name in CODE if name.startswith("support/")])
def test_support_imports_nothing_of_method_and_tasks(name):
    assert {room(x) for x in ours(name)} <= {"support"}


@those("arrow", CODE)
def test_nothing_is_imported_that_is_no_requirement(name):
    """What bench.py compares with is imported by name, in its cases."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    required = set(re.findall(r"^([a-z]+)[><=]", text, re.M))
    theirs = {"regex", "triton", "huggingface_hub"}  # needed by tiktoken, part of torch, needed by datasets
    known = required | theirs | set(sys.stdlib_module_names)
    others = {x.split(".")[0] for x in imported(name)} - known - {room(x) for x in FILES}
    assert not others


@pytest.mark.parametrize("name", ["aggregate", "plackett_luce"])
def test_the_two_pages_of_the_method_need_torch_alone(name):
    assert imported(name) == {"torch"}


def test_imports_make_no_circle():
    done = set()

    def walk(name, path):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for other in sorted(ours(name)):
                walk(other, [*path, name])
            done.add(name)
    for name in CODE:
        walk(name, [])
    assert done == set(CODE)


# ------------------------------------------------------------------------------------------ how it is written


@those("width", [*FILES, "assets/page.js"])
def test_no_line_is_wider_than_a_screen(name):
    lines = FILES.get(name, ROOT / name).read_text(encoding="utf-8").splitlines()
    wide = [f"{n}: {len(line)}" for n, line in enumerate(lines, 1) if len(line) > WIDTH]
    assert not wide


@those("statements", CODE)
def test_one_statement_a_line(name):
    """No `a(), b()`, no `x and f()`, no `f() if x else g()` in place of statements, no semicolon."""
    joined = (ast.Tuple, ast.BoolOp, ast.IfExp)
    found = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Expr) and isinstance(node.value, joined):
            found.append(node.lineno)
        body = getattr(node, "body", None)
        lines = [statement.lineno for statement in body] if isinstance(body, list) else []
        found += [line for line in lines if lines.count(line) > 1]
    assert not found, f"lines {sorted(set(found))}"


@those("tasks", [x for x in ("train", "state", "rollout", "warm_start", "evaluate", "reward") if x in FILES])
def test_the_loop_asks_no_task_for_its_name(name):
    """A task says what it is in its own members: `if task == "prompt"` elsewhere breaks for a new one."""
    found = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            of_task = any(getattr(x, "attr", getattr(x, "id", None)) in ("task", "kind") for x in sides)
            texts = [x for side in sides for x in ast.walk(side) if isinstance(x, ast.Constant)]
            if of_task and any(isinstance(x.value, str) for x in texts):
                found.append(ast.unparse(node))
    assert not found


@those("divisors", DIVISORS)
def test_divisors_are_named(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert len(re.findall(r"#.*\bdivisor\b", text)) >= DIVISORS[name]


def test_what_is_not_yet_so_names_files_that_are_there():
    """So that the list cannot keep what has moved or gone."""
    assert {name for _, name in NOT_YET} <= set(FILES)
