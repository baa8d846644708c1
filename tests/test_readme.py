"""The README fits two screens, and what it says of the code is looked up in the code. Its commands, flags and
links are checked with those of the other pages in test_docs.py."""
import json
import math
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_fits_two_screens():
    assert len(TEXT.splitlines()) <= 180


def test_equations_stand_where_the_readme_says():
    cells = re.findall(r"\[([\w/]+\.py)\]\(([\w/]+\.py)\)((?:,? `\w+`)+)", TEXT)
    assert len(cells) >= 20
    for file, link, names in cells:
        assert file == link
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def|class) {name}\b", code, re.M), (file, name)


def test_every_equation_has_a_row():
    rows = re.findall(r"^\| (E[\dE, -]*)\|", TEXT, re.M)
    numbers = {n for row in rows for n in map(int, re.findall(r"E(\d+)", row))}
    assert numbers == set(range(1, 18))


def test_no_line_numbers_that_break_when_a_line_is_added():
    assert not re.search(r"\.py:\d|#L\d", TEXT)


def test_figures_of_the_readme_stand_in_the_results():
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    figures = re.findall(r"\d\.\d+ \+- \d\.\d+", TEXT)
    results = results.replace("**", "")  # the best of a row is bold there
    assert figures and not [figure for figure in figures if figure not in results]


def test_what_a_run_ends_like_is_what_the_runs_of_the_results_ended_like():
    """The block of figures under "Two commands": each is the range over five seeds, "never" the largest."""
    block = TEXT.partition("It ends with figures like these")[2].split("```")[1]
    said = re.findall(r"(\w+) +(\S+(?: to \S+)?)(?:\s|$)", re.sub(r"best_prompt .*", "", block))
    runs = [json.loads(x.read_text()) for x in (ROOT / "results/searches/token").glob("*/summary.json")]
    assert len(said) > 12 and len(runs) == 5
    for name, figures in said:
        values = sorted(math.inf if run[name] is None else run[name] for run in runs)
        for text, value in zip(figures.split(" to "), (values[0], values[-1])):
            shown = "never" if value == math.inf else f"{value:.{len(text.partition('.')[2])}f}"
            assert text == shown, name
        assert " to " in figures or f"{values[0]:.2f}" == f"{values[-1]:.2f}", name
    prompts = [run["best_prompt"] for run in runs]
    assert re.search(r"best_prompt +(.*)", block)[1].strip() in prompts


def test_every_file_of_the_top_level_has_a_place_in_the_house():
    house = TEXT.partition("## The house")[2]
    files = {path.name for path in ROOT.glob("*.py")}
    assert not {name for name in files if f"`{name}`" not in house}
