"""Few-shot sets of task 1: texts that prompts are scored on (train), chosen by (dev) and measured on (test).

They come from a folder, from one file, from a data set of the hub, or, without --data, from the last texts of
the world, which its judge never reads.
"""
import os
import random
from collections import Counter

from data import UserError, drawn, find_file, read_rows, read_splits, same_text, show
from support.log import visible

SETS = "train", "dev", "test"


def read_sets(c, world, say):
    """Few-shot sets train, dev and test of a folder or of one file, every class in each of them."""
    fields = {"text": (("text", "sentence"), str), "label": (("label",), int)}
    answers = world.attributes[c.attribute]["answers"]

    def check(where, row):
        if not 0 <= row["label"] < len(answers):
            raise UserError(f"{where}: label: expected a class with an answer word (0 to {len(answers) - 1}: "
                            f"{visible(', '.join(answers))}), got {show(row['label'])}")
    folder = os.path.isdir(c.data)
    sets = read_splits(c.data, SETS, fields, lambda: check, say)
    if not c.world and c.judge == "world":
        say(f"{c.data}: without --world the judge is the embedded world's, which knows no words but its own "
            f"{len(world.words):,}")
    if folder and "test" not in sets:
        sets |= shared_test(c.data, fields, check, say, needed="dev" in sets)
    if "dev" not in sets:
        few = few_shot(sets.pop("train"), len(answers), c.shots, c.split_seed, c.data, say,
                       "test" not in sets)
        sets = few | sets
    for name in SETS:
        missing = set(range(len(answers))) - {row["label"] for row in sets[name]}
        if missing:
            raise UserError(f"{c.data}: {name}: expected every class of {visible(c.attribute)}, got no row "
                            f"of class {', '.join(map(str, sorted(missing)))}")
    return sets


def shared_test(folder, fields, check, say, needed):
    """{"test": rows} of one folder up: a test set shared by several seeds may lie there."""
    try:
        path = find_file(os.path.dirname(os.path.abspath(folder)), "test")
    except UserError:
        if needed:
            raise
        return {}
    return {"test": read_rows(path, fields, check, say)}


def few_shot(rows, classes, shots, seed, source, say, test=True):
    """{"train" | "dev" | "test": rows} of one list of rows: `shots` different texts a class for train and for
    dev, the rest for test. Rows of equal texts (but for case and spaces) stay together, under any labels.

    test  whether a test set is wanted too: else the rest may be empty
    """
    texts = [same_text(row["text"]) for row in rows]
    label = dict(zip(reversed(texts), (row["label"] for row in reversed(rows))))  # of a text's first row
    home, taken = {}, Counter()
    for text in drawn(texts, seed):
        n = taken[label[text]]
        taken[label[text]] += 1
        home[text] = "train" if n < shots else "dev" if n < 2 * shots else "test"
    fewest = min(range(classes), key=lambda c: taken[c])
    if taken[fewest] < 2 * shots + test:
        raise UserError(f"{source}: expected at least {2 * shots + test} different texts a class, to draw "
                        f"--shots {shots} for train and for dev, got {taken[fewest]} of class {fewest}")
    sets = {name: [row for row, text in zip(rows, texts) if home[text] == name] for name in SETS}
    say(f"{source}: train and dev: {shots} texts a class of {len(rows):,} rows by --split_seed {seed}"
        + ("; test: the rest" if test else ""))
    return sets


def draw_sets(c, world, n_held):
    """Few-shot sets from the world's held-out texts: half for test, and of the rest `shots` a class by
    --seed for train and for dev."""
    a, shots, classes = c.attribute, c.shots, len(world.attributes[c.attribute]["answers"])
    rows = [{"text": t, "label": l[a]}
            for t, l in zip(world.texts[-n_held:], world.labels[-n_held:]) if a in l]
    test, rest = rows[:len(rows) // 2], rows[len(rows) // 2:]  # one test set for all seeds
    random.Random(c.seed).shuffle(rest)
    of_class = [[r for r in rest if r["label"] == i] for i in range(classes)]
    if min(map(len, of_class)) < 2 * shots:
        raise UserError(f"--shots {shots}: the world holds only {min(map(len, of_class))} held-out texts of "
                        f"a class")
    take = lambda i: [r for rows in of_class for r in rows[i * shots:(i + 1) * shots]]
    return {"train": take(0), "dev": take(1), "test": test}
