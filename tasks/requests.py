"""The world of task 3: requests with four facts, and answers that get some of them wrong.

A flawed answer has wrong words in the places of facts, or a clause that nobody asked for; which tokens are
wrong is known, so that token rewards can be compared with the truth. The edited answer is the same without
its errors.
"""
import random

WORDS = {  # eight of each: a small transformer has to find out word by word which of them agree
    "number": "two three four five six seven eight nine".split(),
    "item": "lamps chairs books plates clocks mirrors carpets kettles".split(),
    "city": "oslo lisbon vienna prague dublin athens madrid warsaw".split(),
    "day": "monday tuesday wednesday thursday friday saturday sunday tomorrow".split(),
}
REQUESTS = ("please send {number} {item} to {city} on {day}", "on {day} we need {number} {item} in {city}",
            "{city} wants {number} {item} , by {day}", "can {number} {item} reach {city} {day} ?")
ANSWER = "we will send {number} {item} to {city} on {day} ."
CLAUSES = ("and we also add free {item}", "as we did in {city}", "since {day} is quiet",
           "for {number} good friends")
WRONG = 0.25  # share of slots with a wrong word
EXTRA = 0.5  # share of answers with a clause that nobody asked for


def world_words():
    """Every word that the embedded world can write, sorted."""
    frames = " ".join(REQUESTS + CLAUSES + (ANSWER,)).split()
    return sorted({w for w in frames if not w.startswith("{")}.union(*WORDS.values()))


def write_answer(rng, facts):
    """A flawed answer as words, and which of them are errors."""
    words, wrong = [], []
    for word in ANSWER.split()[:-1]:
        slot = word[1:-1] if word.startswith("{") else None
        slip = slot is not None and rng.random() < WRONG
        if slip:
            words.append(rng.choice([w for w in WORDS[slot] if w != facts[slot]]))
        else:
            words.append(facts.get(slot, word))
        wrong.append(slip)
    if rng.random() < EXTRA:
        clause = rng.choice(CLAUSES).format(**{k: rng.choice(v) for k, v in WORDS.items()}).split()
        words, wrong = words + clause, wrong + [True] * len(clause)
    return words + ["."], wrong + [False]


def embedded_world(seed, n_train=4000, n_test=400, answers=2):
    """{"train" | "test": rows}, a row {"prompt", "rejected", "edited", "errors"}: `edited` is the answer
    without its errors, `errors` the true spans [start, end, "error"] of characters in `rejected`. No rejected
    answer is free of errors. With more than two `answers` the same rows are rankings too (`ranked`)."""
    world = {}
    for split, n in (("train", n_train), ("test", n_test)):
        rng, rows = random.Random(f"{seed} {split}"), []
        while len(rows) < n:
            facts = {k: rng.choice(v) for k, v in WORDS.items()}
            words, wrong = write_answer(rng, facts)
            if any(wrong):
                starts = [len(" ".join(words[:i])) + (i > 0) for i in range(len(words))]
                spans = [[s, s + len(w), "error"] for s, w, bad in zip(starts, words, wrong) if bad]
                rows.append({"prompt": rng.choice(REQUESTS).format(**facts), "rejected": " ".join(words),
                             "edited": ANSWER.format(**facts), "errors": spans})
                if answers > 2:
                    rows[-1] |= ranked(random.Random(f"{seed} {split} {len(rows)}"), rows[-1], facts, wrong,
                                       answers)
        world[split] = rows
    return world


def ranked(rng, row, facts, wrong, answers):
    """{"form", "candidates", "scores"}: the rejected answer of a row, the edited one and further flawed ones,
    each with minus its wrong words."""
    further = [write_answer(rng, facts) for _ in range(answers - 2)]
    texts = [row["rejected"], row["edited"], *(" ".join(words) for words, _ in further)]
    scores = [-sum(wrong), 0, *(-sum(bad) for _, bad in further)]
    return {"form": "rankings", "candidates": texts, "scores": scores}
