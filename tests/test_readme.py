"""The README fits two screens, and what it says of the code is looked up in the code. Its commands, flags and
links are checked with those of the other pages in test_docs.py."""
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


def test_every_file_of_the_top_level_has_a_place_in_the_house():
    house = TEXT.partition("## The house")[2]
    files = {path.name for path in ROOT.glob("*.py")}
    assert not {name for name in files if f"`{name}`" not in house}
