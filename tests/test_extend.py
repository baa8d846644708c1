"""docs/extend.md: its blocks of code are put into a copy of the tree as they stand on the page, and run.

A block begins with "# FILE" (a new file) or "# FILE, below NAME" (behind the table of that name).
"""
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from processes import alone, fork, forks

pytestmark = forks
ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
# Seeds 1 to 3 went from about 1.2 vowels to 25, 24 and 4; with the page's objective and f to 20 each.
FEW = ("--threads 1 --n_layer 1 --n_embd 32 --n_head 2 --batch_size 32 --candidates 128 --reward_first 120 "
       "--reward_lr 0.003 --patience 12 --lr 0.02 --cache_dir cache --eval_every 20 --log_every 10")


def blocks():
    """[(file, table or None, code)] of the page."""
    found = re.findall(r"```python\n# (\S+?)(?:, below (\w+))?\n(.*?)```", PAGE, re.S)
    assert len(found) == PAGE.count("```python")
    return found


def below(text, table, code):
    """The text of a module with some code behind the table that is assigned to a name."""
    end = re.search(rf"^{table} = \{{.*?\}}$", text, re.M | re.S).end()
    return f"{text[:end]}\n\n{code}\n{text[end:]}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the tree with everything that the page adds."""
    folder = tmp_path_factory.mktemp("tree")
    for path in [*ROOT.glob("*.py"), ROOT / "assets", ROOT / "tasks", ROOT / "support"]:
        put = shutil.copytree if path.is_dir() else shutil.copy
        put(path, folder / path.name)
    for name, table, code in blocks():
        old = (folder / name).read_text(encoding="utf-8") if table else None
        assert bool(table) == (folder / name).exists(), name
        (folder / name).write_text(below(old, table, code) if table else code, encoding="utf-8")
    return folder


def said(copy, code, *lines):
    """(stdout, stderr) of some code that is run in the copy, with `lines` of words to be found there. In a
    process forked off this one, which forgets the modules of the tree that it has: importing torch anew takes
    longer than the runs."""
    def work():
        os.chdir(copy)
        alone("stdout.txt", "stderr.txt")
        ours = {"tasks", "support", *(path.stem for path in ROOT.glob("*.py"))}
        for name in [x for x in sys.modules if x.split(".")[0] in ours]:
            del sys.modules[name]
        sys.path.insert(0, str(copy))
        exec(code, {"lines": [line.split() for line in lines]})
    process = fork.Process(target=work)
    process.start()
    process.join(600)
    out, err = ((copy / name).read_text(encoding="utf-8") for name in ("stdout.txt", "stderr.txt"))
    assert process.exitcode == 0, err
    return out, err


def runs(copy, *commands):
    """What several commands of the project's scripts say."""
    return said(copy, """if True:
        import importlib, sys
        for sys.argv in lines:
            script = importlib.import_module(sys.argv[0].removesuffix(".py"))
            script.main(*[sys.argv[1:]] * (sys.argv[0] == "train.py"))""", *commands)[0]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_task_is_of_the_length_that_the_page_promises():
    code = [code for name, _, code in blocks() if name == "tasks/vowels.py"][0]
    assert len(code.splitlines()) <= 45 and len(PAGE.splitlines()) <= 160


def test_the_page_s_task_trains_resumes_and_is_looked_at(copy):
    base = f"train.py --task vowels {FEW} --out_dir"
    (copy / "words.jsonl").write_text('{"candidates": ["queue sequoia", "sky rhythm"]}\n')
    shown = runs(copy, f"{base} whole --policy_steps 40", f"{base} half --policy_steps 20",
                 "train.py --init_from resume --out_dir half --policy_steps 40", "eval.py --out_dir whole",
                 "eval.py --compare whole half", f"{base} paper --policy_steps 4 --preset paper",
                 "eval.py --out_dir whole --html page.html",
                 "sample.py --out_dir whole --score words.jsonl --out scored.jsonl")
    whole, half = [json.loads((copy / x / "summary.json").read_text()) for x in ("whole", "half")]
    assert whole | {"seconds": 0} == half | {"seconds": 0}
    curve = [row["vowels"] for row in rows(copy / "whole" / "metrics.jsonl") if row["phase"] == "eval"]
    assert curve[-1] > curve[0] + 1, curve  # words with more vowels
    fits = [row for row in rows(copy / "whole" / "metrics.jsonl") if row["phase"] == "reward"]
    assert max(row["rank_accuracy"] or 0 for row in fits) > 0.6  # of candidates that no fit has seen
    config = json.loads((copy / "whole" / "config.json").read_text())
    assert config["curve"] == "vowels" and config["figures"][:2] == ["vowels", "most_vowels"]
    assert config["resolution"] == 0.0  # nothing of another task
    assert {row["role"] for row in rows(copy / "whole" / "samples.jsonl")} == {"sampled"}
    paper = json.loads((copy / "paper" / "config.json").read_text())
    assert paper["bound"] == "softplus" and paper["replay"] == 0 and paper["alpha"] == 0.125
    vowels, none = rows(copy / "scored.jsonl")[0]["reward_scores"]
    assert vowels > none
    assert "<title>vowels" in (copy / "page.html").read_text(encoding="utf-8")
    assert "vowels over step" in shown and "most_vowels" in shown
    assert re.search(r"vowels +most_vowels +rank_accuracy +seconds", shown), shown


def test_the_page_s_objective_and_f_train_and_resume(copy):
    flags = f"train.py --task vowels --objective awr --agg geometric {FEW} --seed 2 --out_dir"
    runs(copy, f"{flags} awr --policy_steps 40", f"{flags} awr-half --policy_steps 20",
         "train.py --init_from resume --out_dir awr-half --policy_steps 40")
    whole, half = [json.loads((copy / x / "summary.json").read_text()) for x in ("awr", "awr-half")]
    assert whole["objective"] == "awr" and whole["agg"] == "geometric"
    assert whole["vowels"] == half["vowels"] and whole["rank_accuracy"] == half["rank_accuracy"]
    curve = [row["vowels"] for row in rows(copy / "awr" / "metrics.jsonl") if row["phase"] == "eval"]
    assert curve[-1] > curve[0] + 1, curve
    weights = [row["weight"] for row in rows(copy / "awr" / "metrics.jsonl") if row["phase"] == "policy"]
    assert weights and min(weights) > 0


def test_a_table_s_new_row_is_a_choice_and_a_half_written_one_is_named(copy):
    _, err = said(copy, """if True:
        import sys, train, tasks
        class Half(tasks.Task):
            def prefer(self, batch, tokens, mask): return None
        class Typo(train.TASKS["vowels"]):
            defaults = {"resolutoin": 1.0}
        train.TASKS.update(half=Half, typo=Typo)
        for words in lines:
            try: train.main(words)
            except SystemExit as end: assert end.code == 2
            else: raise AssertionError(words)""", "--task half", "--task typo", "--agg geometrc")
    half, typo, near = err.splitlines()
    assert half.startswith("train.py: task Half: expected its own __init__, evaluate")
    assert typo == "train.py: defaults: there is no flag --resolutoin (did you mean resolution?)"
    assert "did you mean geometric?" in near
    assert not (copy / "out").exists()
