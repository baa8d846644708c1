"""Worlds: what the judge of task 1 is trained on, and what its prompts are made for.

A world is texts with several attributes at once, cue words that ask for an attribute and an answer word for
each class. The embedded one is graded: a text with hedges ("somewhat", "perhaps") tells its sentiment only to
a prompt that asks with two, three or four different cue words ("mood", "verdict"; a repeated one asks no
louder), so accuracy climbs with each right token and the best prompts hold several. For the topic one cue
word is enough. Cue words of another attribute work against the right ones. A world on disk (`--world`) runs
through the same code.
"""
import json
import os
import random
from dataclasses import dataclass

from data import UserError, convert, find_file, open_text, read_rows, show
from support.log import visible


@dataclass
class World:
    """Texts with their labels, and the words that ask for an attribute and that answer."""
    name: str
    texts: list
    labels: list  # [{attribute: class}] a text
    need: list  # [{attribute: cue words that it takes}] a text
    attributes: dict  # {name: {"cues": [words], "answers": [words]}}
    words: list = None  # the whole vocabulary where it is known, for a word-level tokenizer
    talk: list = None  # sentences that are not classified: what a language model would have read before


# ------------------------------------------------------------------------------------------- the embedded one

ATTRIBUTES = {
    "sentiment": {"cues": """mood verdict feeling opinion rating attitude
                      viewer critic reviewer reader audience fan""".split(),
                  "answers": "terrible great".split()},
    "topic": {"cues": "topic subject theme category section field".split(),
              "answers": "film food music sport".split()},
    "era": {"cues": "era period age date epoch year".split(),
            "answers": "ancient modern".split()},
}
SIGNS = {  # the words of a text that carry a class; no word is in two lists
    "sentiment": ("""awful dreary bland clumsy dull hollow messy stale tedious weak
                  poor grim lousy sloppy tiresome shabby flat feeble dismal vapid""",
                  """superb lovely brilliant charming deft fresh gripping lively moving radiant
                  rich sharp splendid tender vivid witty graceful bold dazzling joyful"""),
    "topic": ("actor screen scene camera director script sequel trailer",
              "bread sauce chef kitchen soup spice oven dessert",
              "song guitar choir melody drummer chord album violin",
              "goal coach referee stadium league striker tackle relay"),
    "era": ("medieval antique bygone archaic feudal victorian",
            "digital current recent futuristic trendy contemporary"),
}
HEDGES = "somewhat perhaps rather maybe arguably seemingly apparently possibly".split()
FRAMES = ("the {topic} from this {era} {name} was {sentiment} , said {name}",
          "{name} and {name} found a {era} {topic} {sentiment}",
          "a {sentiment} {topic} , as {era} as the {name} of {name}",
          "in {name} the {era} {topic} seemed {sentiment} to {name}")
TALK = ("what is the {cue} of the {name} ? the {cue} is {answer}",
        "they asked for its {cue} and its {cue} : {answer}",
        "{name} put {answer} under {cue} , {cue} and {cue}")


def names(n):
    """n made-up names: the bulk of the vocabulary and of no use, as most words are in most prompts.

    The first n of the same 8,000 in one shuffled order, so that a smaller world's names are a larger one's.
    """
    a, b, c = ("ba ce de fi ga hu jo ki lo mu ne pa ri so tu va we xi yo zu".split(),
               "bi do fe gu ha je ko la me ni po qua ro su te vo wi xa ye za".split(),
               "bar dek fin gol hap jun kam lin mor nol pid rup sel tan vik wes xon yar zem quil".split())
    every = [x + y + z for x in a for y in b for z in c]
    random.Random(0).shuffle(every)
    return every[:n]


def embedded_world(n=6000, seed=0, n_names=2400, most_cues=4):
    """The graded world: the same texts for every run, so that one judge serves all seeds.

    A text holds one sign of each attribute and 0 to `most_cues` - 1 hedges; to tell its sentiment it wants
    1 + hedges different cue words. n_names: made-up words, which decide how large the vocabulary is.
    """
    rng, pool = random.Random(seed), names(n_names)
    world = World("embedded", [], [], [], ATTRIBUTES, talk=[])
    for _ in range(n):
        label = {a: rng.randrange(len(ATTRIBUTES[a]["answers"])) for a in ATTRIBUTES}
        signs = {a: rng.choice(SIGNS[a][c].split()) for a, c in label.items()}
        hedges = rng.sample(HEDGES, rng.randrange(most_cues))
        signs["sentiment"] = " ".join(hedges + [signs["sentiment"]])
        world.texts.append(fill(rng.choice(FRAMES), rng, {k: [v] for k, v in signs.items()} | {"name": pool}))
        world.labels.append(label)
        world.need.append({"sentiment": 1 + len(hedges)})
    for _ in range(n):
        a = rng.choice(sorted(ATTRIBUTES))
        slots = {"cue": ATTRIBUTES[a]["cues"], "answer": ATTRIBUTES[a]["answers"], "name": pool}
        world.talk.append(fill(rng.choice(TALK), rng, slots))
    words = " ".join(FRAMES + TALK).split() + pool + HEDGES
    words += [w for c in SIGNS.values() for x in c for w in x.split()]
    words += [w for a in ATTRIBUTES.values() for w in a["cues"] + a["answers"]]
    world.words = sorted({w for w in words if "{" not in w})
    return world


def fill(frame, rng, slots):
    """Each {slot} of a frame by a word of its list, no word twice where the list has more than one."""
    left = {k: rng.sample(v, min(len(v), 4)) for k, v in slots.items()}
    return " ".join(left[w[1:-1]].pop() if w.startswith("{") else w for w in frame.split())


# ------------------------------------------------------------------------------------------------ one on disk


def read_world(folder, say=print):
    """The World of a folder. UserError for anything wrong in it.

    texts.jsonl(.gz)  {"text", "labels", optional "need"} a line
    attributes.json   {name: {"cues": [words], "answers": [words]}}
    """
    path = os.path.join(folder, "attributes.json")
    try:
        attributes = json.loads(open_text(path))
        ok = all(isinstance(a[k], list) and len(a[k]) > 1 and all(convert(w, str) for w in a[k])
                 for a in attributes.values() for k in ("cues", "answers"))
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        ok = False
    if not ok:
        raise UserError(f"{path}: json: expected {{attribute: {{\"cues\": [words], \"answers\": [words]}}}}, "
                        f"got something else")
    path = find_file(folder, "texts")

    def check(where, row):
        check_labels(where, row["labels"], attributes)
        check_need(where, row["need"], attributes)
    fields = {"text": (("text",), str), "labels": (("labels",), dict), "need": (("need",), dict, {})}
    rows = read_rows(path, fields, check, say)
    return World(os.path.basename(os.path.abspath(folder)), [r["text"] for r in rows],
                 [r["labels"] for r in rows], [r["need"] for r in rows], attributes, talk=[])


def check_labels(where, labels, attributes):
    """{attribute: class}: a class is the index of an answer word. Labels that nobody can ask for are fine."""
    for a, c in labels.items():
        if a in attributes and not (type(c) is int and 0 <= c < len(attributes[a]["answers"])):
            raise UserError(f"{where}: labels: expected {visible(a)} from 0 to "
                            f"{len(attributes[a]['answers']) - 1} (one answer word a class), got {show(c)}")


def check_need(where, need, attributes):
    """{attribute: different cue words that it takes}: at least one, since a prompt that asks for nothing must
    not be answered for two attributes at once, and no more than there are."""
    for a, n in need.items():
        if a not in attributes:
            raise UserError(f"{where}: need: expected one of {visible(', '.join(attributes))}, got {show(a)}")
        most = len(attributes[a]["cues"])
        if not (type(n) is int and 1 <= n <= most):
            raise UserError(f"{where}: need: expected {visible(a)} from 1 to {most} (it has {most} cue "
                            f"words), got {show(n)}")
