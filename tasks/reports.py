"""The embedded world of task 2: made-up reports, the summary of one fact of each, and two kinds of noise.

A report tells three facts, one of them marked; its summary tells that one. The references that a policy
learns from are noisy in the two ways of real ones (Maynez et al. 2020, "On Faithfulness and Factuality in
Abstractive Summarization": over 70 % of XSum's one-sentence references say something that the document does
not): a clause that nothing supports is added, and a word of the fact is a wrong one. `facts`, the clean
summary, is what the preference compares with, and what test references are.

A clause is told by its own words: it opens with a connector that stands nowhere else. A wrong word is as good
as any other until one looks at the report. Mistakes come in two forms. Slips hit any word and put any other
of its kind there: a policy that imitates them samples wrong words, but its most likely word stays the right
one. Habits are systematic: some words are taken for a certain other one more often than not, and a policy
that imitates them is wrong where it is surest.
"""

import random

NOISE = 0.7  # share of the references with an unsupported clause: as bad as XSum's
SLIP = 0.2  # share with a wrong word drawn at random: candidates that sample it show what no habit does
HABIT = 0.7  # share in which a word that has a usual wrong one is that one: most, or greedy decoding is right
EVERY = 8  # each eighth word of a kind has one, so that two summaries in five could have such a mistake

FACTS = 3  # facts a document, one of them marked
MARKER = "notably"
CONNECTORS = ("while",)  # opens the unsupported clause, nothing else: one word makes the decision one token

# The words that carry content, by the question they answer. No word is in two pools: each has one role.
WORDS = {
    "who": """actor baker barber butcher captain carpenter clerk coach cook dancer dentist doctor driver
        farmer fisher gardener guard hunter janitor judge lawyer mayor miller miner nurse painter pilot
        plumber poet porter potter priest queen sailor singer soldier tailor teacher waiter weaver""".split(),
    "what": """argued bowed cheered climbed cried danced dined dozed drummed fainted fell fished grinned hid
        hummed jumped knelt laughed limped prayed rested sang shouted skated slept slipped smiled smoked
        sneezed sobbed spoke stumbled swam trained vanished voted waited waved whistled yawned""".split(),
    "where": """airport arena bakery bank barn beach bridge canal castle cathedral cave chapel cinema court
        factory farm ferry forest fountain garage garden harbor hospital hotel library market mill mine museum
        office palace park prison quarry school stable station theater tower zoo""".split(),
    "when": """monday tuesday wednesday thursday friday saturday sunday january february march april may june
        july august september october november december spring summer autumn winter morning evening night week
        weekend month year decade century easter christmas carnival harvest holiday semester term
        fortnight""".split(),
}

# One fact a sentence, told in several ways; the summary has a way of its own, so it cannot be cut out of the
# report whole. `who` follows the opener and `what` follows `who`, always: a free order makes a small
# transformer that starts from nothing slower to find the marked fact, and finding facts is not what this
# world is about.
OPENERS = ("also", "then", "meanwhile")  # of a fact that is not marked
SENTENCES = (
    "{opener} {who} {what} at {where} last {when} .",
    "{opener} {who} {what} last {when} near the {where} .",
    "{opener} {who} {what} by {where} that {when} .",
)
SUMMARY = "the {who} {what} at the {where} last {when}"

# What an unsupported clause speaks of, three to five words: bare pool words without "the" or "at", because
# those are in the document too, and a clause is to have no word that the document supports.
CLAUSES = (("who", "what", "where"), ("who", "what", "when"), ("who", "what", "where", "when"),
           ("who", "who", "what", "where", "when"))


# What annotators take some words for: the next one of the list.
MISTAKEN = {pool[i]: pool[i + 1] for pool in WORDS.values() for i in range(0, len(pool) - 1, EVERY)}
KINDS = {word: kind for kind, pool in WORDS.items() for word in pool}


def world_words():
    """Every word that the embedded world can write, sorted: the vocabulary of a word-level tokenizer."""
    frames = " ".join(SENTENCES + (SUMMARY, MARKER) + OPENERS + CONNECTORS).split()
    words = {word for word in frames if not word.startswith("{")}
    return sorted(words.union(*WORDS.values()))


def write_report(rng):
    """One report, its marked fact {kind: word}, and for every kind three words that the report lacks."""
    # One draw without repetition serves facts and noise: what the facts leave is absent by construction.
    drawn = {kind: rng.sample(pool, FACTS + 3) for kind, pool in WORDS.items()}
    facts = [{kind: words[i] for kind, words in drawn.items()} for i in range(FACTS)]
    marked = rng.randrange(FACTS)
    openers = [MARKER if i == marked else rng.choice(OPENERS) for i in range(FACTS)]
    sentences = [rng.choice(SENTENCES).format(opener=opener, **fact)
                 for opener, fact in zip(openers, facts)]
    unused = {kind: words[FACTS:] for kind, words in drawn.items()}
    return " ".join(sentences), facts[marked], unused


def unsupported_clause(rng, unused):
    """A connector and three to five words that the report lacks, e.g. "while baker sang harbor"."""
    words = {kind: iter(pool) for kind, pool in unused.items()}  # iterators: a second "who" is another one
    return " ".join([rng.choice(CONNECTORS)] + [next(words[kind]) for kind in rng.choice(CLAUSES)])


def retold(rng, fact, document, unused):
    """A fact {kind: word} as an annotator tells it, mistakes and all: what stands in the place of a right
    word is another of its kind that the report lacks."""
    said, known = dict(fact), set(document.split())
    for kind, word in fact.items():
        if word in MISTAKEN and rng.random() < HABIT and MISTAKEN[word] not in known:
            said[kind] = MISTAKEN[word]
    if rng.random() < SLIP:
        kind = rng.choice(tuple(fact))
        said[kind] = unused[kind][-1]  # the clause has use for two of the three
    return said


def embedded_world(seed, n_train=6000, n_validation=300, n_test=300):
    """{"train" | "validation" | "test": rows}, a row being {"document", "summary", "facts"}.

    `facts` is the clean summary; `summary`, the reference, has the two kinds of noise at shares of their own.
    Test references are clean: they measure what the policy should have learned, not how well it learned the
    noise.
    """
    world = {}
    for split, n in (("train", n_train), ("validation", n_validation), ("test", n_test)):
        rng = random.Random(f"{seed} {split}")  # one a split: more training rows leave the test set as it is
        world[split] = []
        for _ in range(n):
            document, fact, unused = write_report(rng)
            summary = facts = SUMMARY.format(**fact)
            if split != "test":
                summary = SUMMARY.format(**retold(rng, fact, document, unused))
                if rng.random() < NOISE:
                    summary = f"{summary} {unsupported_clause(rng, unused)}"
            world[split].append({"document": document, "summary": summary, "facts": facts})
    return world


def others(word, known):
    """What a fact word could be mistaken for: the words of its kind that are not in `known`; [] for any other
    word."""
    return [x for x in WORDS.get(KINDS.get(word), ()) if x not in known]


def contradicts(text, facts):
    """Whether a summary's first word of some kind is not that of the facts. A kind that is missing is no
    contradiction, nor is what a clause adds behind them."""
    first = lambda said: {KINDS[word]: word for word in reversed(said.split()) if word in KINDS}
    said, right = first(text), first(facts)
    return any(said[kind] != right[kind] for kind in said.keys() & right.keys())
