"""Annotated answers of files and of the hub: minimal edits, pairs and rankings, checked row by row.

Which of the three a row is decides what a reward can learn from it: an edit labels tokens, a pair or a
ranking says only which answer is better (`decide_guidance`).
"""
import os

import data

FIELDS = {"prompt": (("prompt",), str, None), "passages": (("passages",), str, ""),
          "errors": (("errors",), list, []),
          "rejected": (("rejected",), str, None), "edited": (("edited",), str, None),
          "chosen": (("chosen",), str, None),
          "candidates": (("candidates",), list, []), "scores": (("scores",), list, [])}
TURN = "\n\nAssistant:"  # hh-rlhf has no prompt: both texts are whole dialogues, alike up to the last turn
SPLITS = "train", "test"
FORMS = {"edits": "rejected and edited", "pairs": "chosen and rejected", "rankings": "candidates with scores"}


def read_edits(spec, limit=0, say=print, split_seed=1):
    """{"train" | "test": rows} of a folder with these files, of one file, or of "hub:<id>[:config]", at most
    `limit` rows each (0: all); a missing test set is cut off the training rows, equal prompts together. A row
    is a prompt with two or more answers, and its "form" says of which of FORMS it was:

    prompt, rejected, edited (optional passages, errors)    edits: minimal ones
    prompt, chosen, rejected                                pairs: two answers that may have nothing in common
    chosen, rejected                                        pairs of dialogues: the prompt is what they share,
                                                            up to the last turn (errors count from there)
    prompt, candidates, scores                              rankings of K answers, ties allowed

    "edited" holds the better answer of a pair too. Edits and pairs whose answers are equal are left out and
    counted.
    """
    def new_check():
        widths = set()
        return lambda where, row: check_answers(where, row, widths)
    found = data.read_splits(spec, SPLITS, FIELDS, new_check, say)
    for name, rows in found.items():
        found[name] = [row for row in rows if row["candidates"] or row["rejected"] != row["edited"]]
        if same := len(rows) - len(found[name]):
            say(f"{name}: {same} edits changed nothing and were left out")
        if not found[name]:
            raise data.UserError(f"{spec}: {name}: expected edits, got none that change anything")
    splits = data.complete_splits(found, SPLITS, split_seed, lambda row: row["prompt"], spec, say)
    return {name: rows[:limit or None] for name, rows in splits.items()}


def decide_guidance(c, rows, say):
    """Sets c.guidance where none was given by hand: labels of edits where every row is a minimal edit; else
    the rows are preferences, and token rewards are learned from those.

    rows  {split: rows}. UserError for edits asked of rankings, in which nothing was edited
    """
    forms = {row.get("form", "edits"): name for name in rows for row in rows[name]}  # embedded rows are edits
    if c.guidance == "edits" and "rankings" in forms:
        source = c.data or "embedded edits (--answers)"
        raise data.UserError(f"{source}: {forms['rankings']}: --guidance edits: expected pairs with an "
                             f"edited answer, got rankings (did you mean token?)")
    if c.guidance:
        return
    c.guidance = "edits" if set(forms) == {"edits"} else "token"
    if c.data:
        what = "; ".join(FORMS[form] for form in FORMS if form in forms)
        say(f"guidance: {c.guidance}, the default for rows of {what}")


def check_answers(where, row, widths):
    """UserError unless the row is of one of `read_edits`'s forms, EmptyText where one of its texts is empty.

    widths  how many candidates the rows before had, a set: all rows must have as many, since they share a
            tensor
    """
    n = len(row["candidates"])
    if others := widths - {n}:
        raise data.UserError(f"{where}: candidates: expected {min(others)} as in the rows before, got {n}")
    chosen = row.pop("chosen")
    row["form"] = "rankings" if n else "edits" if row["edited"] is not None else "pairs"
    if row["form"] == "pairs":
        row["edited"] = chosen
    if n:
        check_ranking(where, row)
    else:
        check_pair(where, row)
    check_errors(where, row)
    widths.add(n)


def check_ranking(where, row):
    """Candidates and as many scores, which become float32, divided by --resolution: 1e30 leaves room."""
    texts, scores = row["candidates"], row["scores"]
    if len(texts) < 2 or len(texts) != len(scores) or not all(isinstance(x, str) for x in texts):
        raise data.UserError(f"{where}: candidates: expected texts, at least 2 and as many as scores, got "
                             f"{len(texts)} and {len(scores)} scores")
    wrong = [x for x in scores if data.convert(x, float) is None or abs(x) > 1e30]
    if wrong:
        raise data.UserError(f"{where}: scores: expected numbers from -1e30 to 1e30, got "
                             f"{data.show(wrong[0])}")
    if not all(x.strip() for x in texts):
        raise data.EmptyText("candidate")
    check_prompt(where, row)


def check_pair(where, row):
    """A worse and a better answer. Dialogues without a prompt are split: the prompt is what both share."""
    for name in ("rejected", "edited"):
        if row[name] is None:
            field = "rejected" if name == "rejected" else "edited or chosen"
            raise data.UserError(f"{where}: {field}: expected str (or candidates with scores), got nothing")
    shared = os.path.commonprefix([row["rejected"], row["edited"]])
    if not row["prompt"] and TURN in shared:
        end = shared.rfind(TURN) + len(TURN)
        row["prompt"] = shared[:end]
        row |= {name: row[name][end:].strip() for name in ("rejected", "edited")}
    for name in ("rejected", "edited"):
        if not row[name]:
            field = "chosen" if (row["form"], name) == ("pairs", "edited") else name
            raise data.EmptyText(f"{field} answer")
    check_prompt(where, row)


def check_prompt(where, row):
    """A prompt must be there and say something."""
    if row["prompt"] is None:
        raise data.UserError(f"{where}: prompt: expected str, got nothing")
    if not row["prompt"]:
        raise data.EmptyText("prompt")


def check_errors(where, row):
    """Marked errors are character spans of the worse answer; what an annotator adds to one (its kind) is
    ignored."""
    if row["errors"] and row["candidates"]:  # nobody can say whose characters they are
        raise data.UserError(f"{where}: errors: expected none in a ranking, got {data.show(row['errors'])}")
    most = len(row["rejected"] or "")
    for span in row["errors"]:
        good = isinstance(span, list) and len(span) > 1 and type(span[0]) is type(span[1]) is int
        if not (good and 0 <= span[0] < span[1] <= most):
            raise data.UserError(f"{where}: errors: expected [start, end, ...] with 0 <= start < end <= "
                                 f"{most}, the characters of rejected, got {data.show(span)}")
