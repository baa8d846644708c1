"""README and docs say what to type and what comes out. Here the commands are parsed by the scripts they name,
some of each kind are run with few steps, links and names are looked up, and every number of the worked
example is computed again.

Commands are taken from the pages by bash itself: a block runs with a `python` that only notes its arguments,
so loops, variables, quotes and here-documents mean what they mean to a reader.
"""
import argparse
import contextlib
import doctest
import importlib
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("train.py", "eval.py", "sample.py", "bench.py", "pretrain.py")
# an argument a line, then a mark
NOTE = '#!/bin/sh\n{ printf "%s\\n" "$@"; printf "\\036\\n"; } >> "$CALLS"\n'
UNDER_TORCHRUN = NOTE.replace("\n", '\nwhile [ "${1%.py}" = "$1" ]; do shift; done\n', 1)  # its own flags

# Nets and steps so small that a run takes a second.
FEW = {"prompt": "--policy_steps 2 --reward_first 2 --reward_steps 1 --reward_warmup 2 --judge_steps 2 "
                 "--judge_read 2 --judge_width 8 --judge_layers 1 --curve_size 10 --candidates 8 --shots 4 "
                 "--batch_size 4 --n_layer 1 --n_embd 16 --n_head 2",
       "summarize": "--policy_steps 2 --reward_first 2 --reward_steps 1 --sft_steps 2 --curve_size 4 "
                    "--candidates 4 --batch_size 4 --n_layer 1 --n_embd 16 --n_head 2",
       "edits": "--policy_steps 2 --reward_first 2 --sft_steps 2 --curve_size 4 --batch_size 4 "
                "--minibatches 2 --n_layer 1 --n_embd 16 --n_head 2"}


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.M | re.S)


def calls(block, folder):
    """The arguments of every `python` that a block of bash starts in an empty folder, where its other lines
    do what they say (here-documents write their files)."""
    tools, note = folder / ".tools", folder / ".calls"
    tools.mkdir(exist_ok=True)
    note.write_text("")
    for name in ("python", "pip", "torchrun"):
        (tools / name).write_text({"python": NOTE, "torchrun": UNDER_TORCHRUN}.get(name, "#!/bin/sh\n"))
        (tools / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CALLS": str(note)}
    done = subprocess.run(["bash", "-c", block], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)
    assert done.returncode == 0, (block, done.stderr)
    return [call.split("\n")[:-1] for call in note.read_text().split("\036\n")[:-1]]


def inline(page):
    """The commands that stand in a sentence, as lists of words."""
    outside = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    return [words.split()[1:] for words in re.findall(r"`(python \w+\.py[^`]*)`", outside)]


class Parsed(Exception):
    """A command's flags are good, and nothing more is wanted of it."""


@pytest.fixture
def parse(monkeypatch):
    """A function that sends the words of a command through the parser of its script, whose SystemExit says
    what is wrong with them."""
    plain = argparse.ArgumentParser.parse_args

    def stop(*_, **__):
        raise Parsed

    def parse_args(self, *args, **named):
        plain(self, *args, **named)
        stop()
    # where train.py first writes: flags and their combination are good
    monkeypatch.setattr(train, "claim_out_dir", stop)

    def parse(script, words):
        with pytest.raises(Parsed):
            if script == "train.py":
                train.main(words)
            with monkeypatch.context() as m:
                m.setattr(argparse.ArgumentParser, "parse_args", parse_args)
                m.setattr("sys.argv", [script, *words])
                importlib.import_module(script[:-3]).main()
    return parse


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_understood_by_its_script(page, tmp_path, parse, capsys):
    if page.name == "extend.md":
        pytest.skip("its commands name what the page itself adds: tests/test_extend.py runs them")
    found = [call for block in blocks(page, "bash") for call in calls(block, tmp_path)] + inline(page)
    for script, *words in found:
        if script in SCRIPTS:
            try:
                parse(script, words)
            except SystemExit as leave:  # -h leaves, too, with status 0
                assert not leave.code, (
                    f"{page.name}: python {script} {' '.join(words)}: {capsys.readouterr().err}")
        else:
            assert script in ("-m", "-c", "-") or (ROOT / script).exists(), (page.name, script)


def test_a_flag_that_does_not_exist_is_noticed_in_a_loop(tmp_path, parse):
    """The test above must be able to fail."""
    (call,) = calls('for x in 1; do python train.py --sede $x --out_dir "a b"; done', tmp_path)
    assert call == ["train.py", "--sede", "1", "--out_dir", "a b"]
    with pytest.raises(SystemExit):
        parse(call[0], call[1:])
    with pytest.raises(SystemExit):
        parse("train.py", ["--agg", "median"])
    with pytest.raises(SystemExit):
        parse("eval.py", ["--sgv", "x"])


def known_flags(parse):
    """Every flag of every script, without dashes."""
    class Seen(Exception):
        pass
    flags = set(train.Flags.__dataclass_fields__)

    def collect(self, *_, **__):
        flags.update(option.lstrip("-") for option in self._option_string_actions)
        raise Seen
    for script in SCRIPTS[1:]:
        if (ROOT / script).exists():
            with pytest.MonkeyPatch.context() as m, contextlib.suppress(Seen):
                m.setattr(argparse.ArgumentParser, "parse_args", collect)
                m.setattr("sys.argv", [script])
                importlib.import_module(script[:-3]).main()
    return flags


# flags of .ci/breaks, of .ci/matrix, of pytest and of torchrun
OTHERS = {"n", "quick", "named", "check", "table", "list", "only", "apart", "dist", "standalone",
          "nproc_per_node"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page, parse):
    known = known_flags(parse) | OTHERS
    text = re.sub(r"^```python\n.*?^```", "", read(page), flags=re.M | re.S)  # another language
    found = re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", re.sub(r"<!--.*?-->", "", text))
    named = {name.removeprefix("no-") for name in found}
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if "://" not in link:
            path, _, part = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), (page.name, link)
            if part:
                heads = re.findall(r"^#+ (.*)$", read(target), re.M)
                assert part in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads], (
                    page.name, link)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    """`name.py` and `folder/name.py` in a sentence, and the name behind a dot: `reward.label_loss`."""
    if page.name in ("breaks.md", "machines.md", "extend.md"):
        pytest.skip("speaks of files that come and go")
    for path in re.findall(r"`((?:\w+/)?\w+\.py)`", read(page)):
        assert (ROOT / path).exists() or path == "policy_x.py", (page.name, path)
    for file, name in re.findall(r"`([a-z_]+)\.([a-zA-Z_]+)(?:\(.*?\))?`", read(page)):
        homes = [] if name in ("py", "json", "jsonl") else [
            home for home in (ROOT / f"{file}.py",
                              *(ROOT / sub / f"{file}.py" for sub in ("tasks", "support")))
            if home.exists()]
        for home in homes:
            assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b", read(home), re.M), (
                page.name, file, name)


@pytest.mark.parametrize("name, least", [("method.md", 20), ("exercises.md", 5)])
def test_the_worked_examples_come_out_as_printed(name, least):
    """Every number that stands behind a >>> line."""
    failed, tried = doctest.testfile(str(ROOT / "docs" / name), module_relative=False, encoding="utf-8")
    assert tried >= least and failed == 0


def tables(page):
    """{name: lines} of the tables between their marks."""
    found = re.findall(r"<!-- table (\w+) -->\n(.*?)<!-- end -->", read(page), re.S)
    return {name: body.strip().split("\n") for name, body in found}


def test_tables_of_the_results_are_whole():
    found = tables(ROOT / "docs" / "results.md")
    assert len(found) >= 5
    for name, lines in found.items():
        lines = [line for line in lines if line.startswith("|")]  # below them the commit that made them
        width = lines[0].count("|")
        assert set(lines[1]) <= set("|- ") and len(lines) > 2, name
        assert all(line.count("|") == width for line in lines), name


def test_nothing_is_left_to_fill_in():
    for page in PAGES:
        assert "@@" not in read(page) and "TODO" not in read(page), page.name


# ------------------------------------------------------------------------------------------------- short runs


EXAMPLES = blocks(ROOT / "docs" / "your_data.md", "bash")
# where README looks for them
NAMES = {"out/films": "out/prompt", "out/news": "out/summarize", "out/desk": "out/edits"}


def with_few_steps(words):
    """The words of a training command, made short and offline."""
    task = words[words.index("--task") + 1] if "--task" in words else "prompt"
    return [*(NAMES.get(word, word) for word in words), *FEW[task].split(), "--threads", "1",
            "--device", "cpu", "--cache_dir", "cache"]


@contextlib.contextmanager
def inside(folder):
    """The present folder for a while: monkeypatch's own is of one test."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder in which every block of docs/your_data.md was pasted: its files, and its runs with
    few steps under out/. {words of the command: exit status} beside it. Beside those more kinds of
    runs, for the glossary."""
    folder, status = tmp_path_factory.mktemp("house"), {}
    with inside(folder):
        for script, *words in (call for block in EXAMPLES for call in calls(block, folder)):
            assert script == "train.py"
            status[" ".join(words)] = train.main(with_few_steps(words))
        for more in ("--objective mle", "--objective ppo"):
            train.main(with_few_steps(
                f"--task summarize --data news --out_dir out/{more[-3:]} {more}".split()))
    return folder, status


def test_the_examples_of_own_data_are_read(house):
    """Each block writes its files, and its command runs on them to the end: the readers take every row."""
    folder, status = house
    assert len(status) == len(EXAMPLES) >= 6 and not any(status.values())
    for words in status:
        name = re.search(r"--out_dir (\S+)", words)[1]
        assert (folder / NAMES.get(name, name) / "summary.json").exists(), words


def test_every_figure_that_a_run_writes_is_in_the_glossary(house):
    folder, _ = house
    known = set(re.findall(r"`(\w+)`", read(ROOT / "docs" / "figures.md")))
    written = set()
    for file in folder.glob("out/**/*.json*"):
        if file.name in ("summary.json", "metrics.jsonl", "samples.jsonl", "searches.jsonl"):
            rows = [json.loads(line) for line in read(file).splitlines()] if file.suffix == ".jsonl" else \
                [json.loads(read(file))]
            written |= {key for row in rows for key in row}
    assert len(written) > 60
    assert written <= known, sorted(written - known)


def test_every_file_that_a_run_leaves_is_in_the_glossary(house):
    folder, _ = house
    table = read(ROOT / "docs" / "figures.md").partition("| file | what |")[2].partition("\n\n")[0]
    named = set(re.findall(r"^\| `([\w.]+)`", table, re.M))
    tasks = {"scores.json": {"summarize"}, "searches.jsonl": {"prompt"}}  # what not every task leaves
    for run in ("prompt", "summarize", "edits"):
        left = {file.name for file in (folder / "out" / run).iterdir()}
        expected = {name for name in named if run in tasks.get(name, {run})}
        assert {name for name in left if not name.startswith(".")} == expected  # a lock begins with a dot


def run_script(script, words, folder, monkeypatch):
    """A script's main in a folder, with these words; its exit status."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [script, *words])
    try:
        return importlib.import_module(script[:-3]).main() or 0
    except SystemExit as leave:
        return leave.code or 0



ROWS = [{"prompt": "when do you open ?", "candidates": ["we open at nine .", "no"], "scores": [1, 0]}]


def usable(house):
    """The house with what README's commands on finished runs read besides: more texts, rows to
    score, a second run."""
    folder, _ = house
    (folder / "requests.txt").write_text("when do you open ?\nwhen do you close ?\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if not (folder / "out" / "prompt-2").exists():
        shutil.copytree(folder / "out" / "prompt", folder / "out" / "prompt-2")
    return folder


def looking(page, folder):
    """The commands of a page that look at, or use, a run which the house holds."""
    for script, *words in (call for block in blocks(page, "bash") for call in calls(block, folder)):
        runs = [word for word in words if word.startswith("out/")]
        if script in ("eval.py", "sample.py") and all((folder / run).exists() for run in runs):
            yield script, words


def test_the_readmes_commands_on_finished_runs_run(house, tmp_path, monkeypatch, capsys):
    folder, tried = usable(house), set()
    typing = type("Terminal", (io.StringIO,),
                  {"isatty": lambda self: True, "reconfigure": lambda self, **_: None})
    for script, words in looking(ROOT / "README.md", folder):
        monkeypatch.setattr("sys.stdin", typing("when do you open ?\n"))  # a line by hand, then Ctrl-D
        assert run_script(script, words, folder, monkeypatch) == 0, (script, words, capsys.readouterr().err)
        assert capsys.readouterr().out
        tried.add((script, *(word for word in words if word.startswith("--"))))
        written = words[words.index("--html") + 1] if "--html" in words else None
        assert written is None or (folder / written).stat().st_size > 1000
    assert len(tried) >= 3


def test_the_readmes_python_runs(house, monkeypatch, capsys):
    """What stands in the README as Python, on a run of few steps."""
    monkeypatch.chdir(usable(house))
    for block in blocks(ROOT / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})
        assert capsys.readouterr().out


def test_a_run_goes_on_as_the_readme_says(house, monkeypatch, capsys):
    (words,) = [words for _, *words in inline(ROOT / "README.md") if "resume" in words]
    monkeypatch.chdir(usable(house))
    assert words[words.index("--out_dir") + 1] == "out/prompt"
    assert train.main([*words, "--policy_steps", "3"]) == 0
