"""The README says where each equation lives and which flags to type: both are checked here, or they would drift."""
import re
from pathlib import Path

from train import Flags

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_equations_stand_where_the_readme_says():
    places = re.findall(r"\[(\w+\.py)\]\((\w+\.py)\) `(\w+)`", TEXT)
    assert len(places) >= 20
    for file, link, name in places:
        assert file == link
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.M), (file, name)


def test_every_flag_in_the_readme_exists():
    known = set(Flags.__dataclass_fields__) | {"compare", "svg", "html", "json", "case", "curve", "papers", "tables",
                                                "collect"}  # eval.py's and bench.py's
    found = re.findall(r"--([a-z][\w-]*)", TEXT) + re.findall(r"--([A-Z])\b", TEXT)
    named = {name.removeprefix("no-") for name in found}
    assert named and named <= known, named - known


def test_nothing_is_left_to_fill_in():
    assert "@@" not in TEXT
