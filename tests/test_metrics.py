"""tasks/summarize.py: ROUGE and METEOR against values worked out by hand and against the packages
they claim to equal; the embedded world against what its docstring promises; reading of pairs with the
hub replaced by a stub.

Real pairs come from the folder in DATA_DIR; without it those two tests skip.
"""

import functools
import gzip
import json
import os
import random
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import data
import model
import tasks
from tasks import reports
from tasks import summarize as task
from reference import real

SPLITS = ("train", "validation", "test")


# ---------------------------------------------------------------------------------------------------- by hand

@pytest.mark.parametrize("prediction, reference, one, two, longest", [
    # prediction 3 words, reference 6. shared: the, cat, sat -> P 3/3, R 3/6; bigrams 2 of 2, 2 of 5;
    # subsequence 3
    ("The cat sat.", "the cat sat on the mat", 2 / 3, 4 / 7, 2 / 3),
    # "the" twice against once: clipped to 1, P 1/2, R 1/2, and no common bigram ("the the" against "the mat")
    ("the the", "the mat", 1 / 2, 0.0, 1 / 2),
    # all words shared, none in order: the subsequence is one word long, P = R = 1/3
    ("c b a", "a b c", 1.0, 0.0, 1 / 3),
    # one word: nothing to pair up, ROUGE-2 is 0 even for equal texts
    ("cat", "cat", 1.0, 0.0, 1.0),
    # punctuation and accents end a word: "don't" = don, t and "café" = caf; P 3/3, R 3/3
    ("don't café", "DON T caf", 1.0, 1.0, 1.0),
    # a gap in both: a x b c | a b y c -> a b c, 3 of 4; bigrams (a x)(x b)(b c) | (a b)(b y)(y c): none
    ("a x b c", "a b y c", 3 / 4, 0.0, 3 / 4),
])
def test_rouge_by_hand(prediction, reference, one, two, longest):
    expected = {"rouge1": one, "rouge2": two, "rougeL": longest}
    assert task.rouge(prediction, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("prediction, reference, expected", [
    # 3 matches in one chunk, P 3/3, R 3/6: mean = .5 / (.9 + .1 * .5) = .5 / .95, penalty .5 * (1/3)^3 = 1/54
    ("cat sat on", "the cat sat on the mat", 0.5 / 0.95 * (1 - 1 / 54)),
    # "The" meets the LAST "the", so there are two chunks, "the" and "cat sat", where
    # one would have been possible
    ("The cat sat", "the cat sat on the mat", 0.5 / 0.95 * (1 - 0.5 * (2 / 3) ** 3)),
    # equal texts still pay for their one chunk: 1 - .5 / 2^3
    ("a b", "a b", 1 - 0.5 / 8),
    # all matched, no two neighbours in order: 3 chunks of 3 matches, the full penalty of one half
    ("c b a", "a b c", 0.5),
    # the comma is glued to its word: 1 match of 2 and 2, one chunk: mean 1/2, penalty 1/2
    ("cat, sat", "cat sat", 0.25),
    ("b", "a", 0.0),
])
def test_meteor_by_hand(prediction, reference, expected):
    assert task.meteor(prediction, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("prediction, reference", [
    ("", ""), ("", "a b"), ("a b", ""), (" \n", "a"), ("...", "!?")])
def test_nothing_to_compare_scores_zero(prediction, reference):
    assert task.rouge(prediction, reference) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    assert task.meteor(prediction, reference) == 0.0


# ----------------------------------------------------------------------------------------------------- parity

def random_pairs(n, seed=0):
    """Texts of any length over few words (so that they repeat): capitals, punctuation,
    odd spaces, empty ones."""
    rng = random.Random(seed)
    words = ["a", "b", "the", "The", "cat", "CAT,", "don't", "x-1", "café", ".", "Σίγμας", "İ", "ice", "42"]

    def text():
        pool = rng.sample(words, rng.randint(1, len(words)))
        return rng.choice([" ", "  ", " \n", "\t"]).join(
            rng.choices(pool, k=rng.choice([0, 1, 2, 5, 12, 30, 80])))
    return [(text(), text()) for _ in range(n)]


def real_pairs():
    with gzip.open(real("summarization", "acl_titles", "test.jsonl.gz"), "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    titles = [row["summary"] for row in rows]
    return list(zip(titles, titles[1:])) + [(row["document"], row["summary"]) for row in rows]


def check_rouge(pairs):
    package = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = package.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    theirs = [{name: s.fmeasure for name, s in scorer.score(r, p).items()} for p, r in pairs]
    assert [task.rouge(p, r) for p, r in pairs] == theirs  # to the last bit
    assert len({t["rougeL"] for t in theirs}) > 50  # the pairs do ask something


def check_meteor(pairs):
    nltk = pytest.importorskip("nltk.translate.meteor_score")

    # a stemmer that leaves words alone, a thesaurus without entries: exact matches are what remains
    class Off:
        def stem(self, word):
            return word

        def synsets(self, word):
            return []
    theirs = [nltk.meteor_score([r.split()], p.split(), stemmer=Off(), wordnet=Off()) for p, r in pairs]
    assert [task.meteor(p, r) for p, r in pairs] == theirs
    assert len(set(theirs)) > 50


def test_rouge_equals_rouge_score():
    check_rouge(random_pairs(3000))


def test_meteor_equals_nltk():
    check_meteor(random_pairs(3000))


def test_rouge_on_real_pairs():
    check_rouge(real_pairs())


def test_meteor_on_real_pairs():
    check_meteor(real_pairs())


# ------------------------------------------------------------------------------------------------------ world

@pytest.fixture(scope="module")
def world():
    return reports.embedded_world(1, 6000, 300, 300)


def rows_of(world):
    return [row for split in SPLITS for row in world[split]]


def clause(row):
    return row["summary"].split()[len(row["facts"].split()):]


def told(row):
    """What a reference says of the marked fact: as many words as the clean summary has."""
    return row["summary"].split()[:len(row["facts"].split())]


def test_world_seed(world):
    assert reports.embedded_world(1, 6000, 300, 300) == world
    other = reports.embedded_world(2, 50, 50, 50)
    assert all(other[split] != world[split][:50] for split in SPLITS)


def test_world_sizes_leave_each_other_alone(world):
    small = reports.embedded_world(1, 10, 20, 30)
    assert [len(small[split]) for split in SPLITS] == [10, 20, 30]
    assert all(small[split] == world[split][:len(small[split])] for split in SPLITS)


def test_world_splits_share_no_document(world):
    documents = [row["document"] for row in rows_of(world)]
    assert len(set(documents)) == len(documents)


def test_world_noise(world):
    for split, slack in (("train", 0.03), ("validation", 0.12)):  # four standard deviations: 0.0063, 0.028
        noisy = [bool(clause(row)) for row in world[split]]
        assert abs(sum(noisy) / len(noisy) - 0.6) < slack
    assert all(row["summary"] == row["facts"] for row in world["test"])


def test_clause_has_no_support(world):
    sizes = set()
    for row in world["train"]:
        if words := clause(row):
            assert words[0] in reports.CONNECTORS
            assert not set(words) & set(row["document"].split())
            assert len(set(words)) == len(words)
            sizes.add(len(words) - 1)
    assert sizes == {3, 4, 5}


def test_a_wrong_word_is_another_of_its_kind_that_the_report_lacks(world):
    """And never stands in a test reference. Wrong words a reference: none, one, or a habit and a slip."""
    wrong = []
    for row in world["train"]:
        pairs = [(right, said) for right, said in zip(row["facts"].split(), told(row), strict=True)
                 if right != said]
        for right, said in pairs:
            assert reports.KINDS[said] == reports.KINDS[right] and said not in row["document"].split()
        wrong.append(len(pairs))
    assert set(wrong) >= {0, 1, 2}
    assert all(told(row) == row["facts"].split() for row in world["test"])


def test_habits_are_wrong_more_often_than_not_and_slips_at_their_share(world):
    """A habit is the same wrong word every time: greedy imitation says it. A slip is any word of the kind."""
    habits, slips, free = {True: 0, False: 0}, [], 0
    for row in world["train"]:
        pairs = list(zip(row["facts"].split(), told(row)))
        for right, said in pairs:
            if right in reports.MISTAKEN and reports.MISTAKEN[right] not in row["document"].split():
                habits[said == reports.MISTAKEN[right]] += 1
        if not any(right in reports.MISTAKEN for right, _ in pairs):
            free += 1
            slips += [said for right, said in pairs if right != said]
    share = habits[True] / sum(habits.values())
    assert abs(share - 0.7 * (1 - 0.2 / 4)) < 0.05  # 0.665: a slip of the same word comes last; sd 0.009
    assert abs(len(slips) / free - 0.2) < 0.04  # five standard deviations of 0.0073
    assert len(set(slips)) > 0.8 * len(reports.KINDS)


def test_a_mistaken_word_is_taken_for_another_of_its_kind():
    kinds = reports.KINDS
    assert all(right != wrong and kinds[right] == kinds[wrong] for right, wrong in reports.MISTAKEN.items())
    assert not set(reports.MISTAKEN) & set(reports.MISTAKEN.values())  # and that one is told rightly


def test_what_contradicts_a_fact():
    """The first word of a kind counts: a clause adds words, it does not change the fact."""
    says = lambda text: reports.contradicts(text, "the baker sang at the zoo last may")
    assert not says("the baker sang at the zoo last may") and not says("the baker sang at the zoo last may "
                                                                       "while cook danced park")
    assert says("the cook sang at the zoo last may") and says("the baker sang at the park last may")
    assert not says("") and not says("the baker sang at the")  # what is missing contradicts nothing


def content(text):
    pools = set().union(*reports.WORDS.values())
    return [word for word in text.split() if word in pools]


def test_marked_fact_is_the_summary(world):
    """The marker's sentence, and no other, tells the facts; its place in the report varies."""
    places = []
    for row in rows_of(world):
        sentences = row["document"].split(" .")[:-1]
        marked = [i for i, sentence in enumerate(sentences) if reports.MARKER in sentence.split()]
        assert len(sentences) == reports.FACTS and len(marked) == 1
        told = [set(content(sentence)) == set(content(row["facts"])) for sentence in sentences]
        assert told.index(True) == marked[0] and sum(told) == 1
        places.append(marked[0])
    assert set(places) == set(range(reports.FACTS))


def test_reports_are_short_and_varied(world):
    lengths = {len(row["document"].split()) for row in world["train"]}
    assert 20 <= min(lengths) < max(lengths) <= 45
    assert all(0.4 <= len(content(row["facts"])) / len(row["facts"].split()) <= 0.7 for row in world["train"])


def test_world_words_are_exactly_the_words_used(world):
    words = task.world_words()
    used = {word for row in rows_of(world) for word in (row["document"] + " " + row["summary"]).split()}
    assert used == set(words) and len(words) == len(set(words)) < 400


def test_pools_do_not_overlap():
    pools = [word for pool in reports.WORDS.values() for word in pool]
    frames = set(task.world_words()) - set(pools)
    assert len(set(pools)) == len(pools)
    assert len(frames) == len(task.world_words()) - len(pools)


# -------------------------------------------------------------------------------------------------- real text

def write_splits(folder, row):
    for split in SPLITS:
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as f:
            f.writelines(json.dumps({**row, "id": i}) + "\n" for i in range(3))


@pytest.mark.parametrize("names", [("document", "summary"), ("article", "highlights")])
def test_known_columns_are_found(tmp_path, names):
    write_splits(tmp_path, dict(zip(names, ("long text", "short"))))
    expected = {"document": "long text", "summary": "short"}
    for limit in (None, 2):
        found = task.read_pairs(str(tmp_path), limit, cache_dir=tmp_path / "cache")
        assert {split: list(rows) for split, rows in found.items()} == {
            split: [expected] * (limit or 3) for split in SPLITS}


def test_columns_by_name_and_only_by_name(tmp_path):
    write_splits(tmp_path, {"body": "long text", "title": "short", "summary": "not this one"})
    read = functools.partial(task.read_pairs, str(tmp_path), cache_dir=tmp_path / "cache")
    pairs = read(document_column="body", summary_column="title")
    assert pairs["test"][0] == {"document": "long text", "summary": "short"}
    with pytest.raises(data.UserError, match=r"train.jsonl.gz:1: summary: "):
        read(document_column="body", summary_column="headline")


def test_hub_goes_through_the_hub_reader(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load_dataset(id, config, split):
        asked.append((id, config, split))
        return datasets.Dataset.from_list([{"document": "d", "summary": split}] * 3)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs = task.read_pairs("hub:some/set:v1", limit=1, cache_dir=tmp_path)
    assert list(pairs["test"]) == [{"document": "d", "summary": "test"}]
    assert asked == [("some/set", "v1", split) for split in SPLITS]


# ------------------------------------------------------------------------------------------------------- task

def make(folder=None, **change):
    """The task of a folder, or of the embedded world, as train.py builds it."""
    flags = dict(data=str(folder) if folder else None, limit=0, document_column=None, summary_column=None,
                 tokenizer=None, vocab_size=300, max_document=60, max_summary=24, curve_size=2, seed=1,
                 split_seed=1, threads=1, context_limit=512, ask=None, cache_dir=f"{folder}-cache")
    return task.SummarizeTask(SimpleNamespace(**flags | change), torch.device("cpu"), None, lambda text: None)


def write_own_splits(folder):
    """Three splits that share no row, 3, 4 and 5 long."""
    rows = {split: [{"document": f"document {split} {i}", "summary": f"summary {split} {i}"}
                    for i in range(3 + n)]
            for n, split in enumerate(SPLITS)}
    for split in SPLITS:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[split]))
    return rows


def decoded(summarize, batch):
    """[(document, reference)] of a data.Batch."""
    contexts, references = [summarize.texts(x, mask) for x, mask in (
        (batch.context, batch.context_mask), (batch.reference, batch.reference_mask))]
    return list(zip(contexts, references))


def test_every_split_is_its_own_file(tmp_path):
    rows, summarize = write_own_splits(tmp_path), make(tmp_path)
    assert {split: list(part) for split, part in summarize.rows.items()} == rows
    for split in SPLITS:
        every = summarize.pick(split, torch.arange(len(rows[split])))
        assert decoded(summarize, every) == [(r["document"], r["summary"]) for r in rows[split]]
    batch = summarize.batch(40, torch.Generator().manual_seed(0))
    assert set(decoded(summarize, batch)) == {(r["document"], r["summary"]) for r in rows["train"]}


def test_the_curve_is_measured_on_validation_and_the_end_on_test(tmp_path):
    rows, summarize, asked = write_own_splits(tmp_path), make(tmp_path), []

    def decoded(policy, split, n=None):
        asked.append((split, n))
        return [(i, row["summary"], 3, True) for i, row in enumerate(rows[split])][:n]
    summarize.decoded = decoded
    assert summarize.evaluate(None, None)["exact"] == 1.0 and asked == [("validation", 2)]
    summarize.begin(None)
    end = summarize.finish(None, None)
    assert end["exact"] == end["sft_exact"] == 1.0 and asked[1:] == [("test", None)] * 2
    summarize.decoded = lambda policy, split, n: [
        (i, rows["test"][i]["summary"], 3, True) for i in range(n)]
    assert summarize.evaluate(None, None)["exact"] == 0.0  # compared with the validation set's own references


def test_greedy_summaries_are_of_the_split_that_is_asked_for(tmp_path, monkeypatch):
    write_own_splits(tmp_path)
    summarize, read = make(tmp_path), []
    policy = SimpleNamespace(
        prefill=lambda tokens, mask: read.extend(summarize.texts(tokens, mask)) or len(tokens))
    monkeypatch.setattr(model, "generate", lambda *x, **more: (
        torch.zeros(x[5], 24, dtype=torch.long), torch.ones(x[5], dtype=torch.long), torch.ones(x[5]).bool()))
    assert [i for i, *_ in summarize.decoded(policy, "validation")] == [0, 1, 2, 3]
    assert read == [f"document validation {i}" for i in range(4)]


def test_a_test_split_is_decoded_a_few_rows_at_a_time(tmp_path, monkeypatch):
    write_own_splits(tmp_path)
    summarize, alive = make(tmp_path), []

    class Text(str):
        pass

    def write(policy, batch, generator, temperature):
        alive.append(sum(text() is not None for text in texts))
        tokens = torch.zeros(len(batch.index), 1, 3, dtype=torch.long)
        return tokens, torch.ones_like(tokens).bool()

    def said(tokens, mask):
        made = [Text("summary") for _ in tokens]
        texts.extend(map(weakref.ref, made))
        return made
    texts, decoded = [], summarize.decoded
    monkeypatch.setattr(summarize, "write", write)
    monkeypatch.setattr(summarize, "texts", said)
    monkeypatch.setattr(summarize, "decoded", lambda *x: decoded(*x, at_once=1))
    assert summarize.scores(None, "test")["length"] == 3
    assert len(texts) == len(alive) == 5 and max(alive) <= 1  # the last one at most, when the next is written


def test_one_wrong_word_is_looked_at_a_few_rows_at_a_time(monkeypatch):
    summarize, asked = make(), []
    gaps = lambda guide, pairs: asked.append(pairs) or torch.ones(len(pairs), 2)
    monkeypatch.setattr(summarize, "gaps", gaps)
    real, rows = summarize.wrong_fact, []
    monkeypatch.setattr(summarize, "wrong_fact",
                        lambda *x: rows.append((x[1], len(asked))) or real(*x))
    assert summarize.judge_reward(None) == {"fact_auroc": 1.0, "fact_accuracy": 1.0}
    assert len(asked) > 1 and max(map(len, asked)) <= 64
    assert max(done for _, done in rows) > 0  # rows are read after others were judged
    assert [x for pairs in asked for x in pairs] == list(summarize.wrong_pairs())


@pytest.mark.parametrize("real_text", [False, True])
def test_every_reference_ends_in_end_of_text(tmp_path, real_text):
    rows = write_own_splits(tmp_path)
    summarize = make(tmp_path if real_text else None)
    for split in SPLITS:
        x = summarize.pick(split, torch.arange(len(summarize.rows[split])))
        length = x.reference_mask.sum(1)
        last = x.reference.gather(1, length[:, None] - 1).squeeze(1)
        assert (last == summarize.eot).all()
        assert ((x.reference == summarize.eot) & x.reference_mask).sum() == len(length)  # and nowhere else
        assert length.max() <= summarize.width and (not real_text or len(length) == len(rows[split]))


def test_the_embedded_preference_is_measured_against_the_facts_and_not_the_noisy_reference():
    summarize = make()
    noisy = next(i for i, row in enumerate(summarize.rows["train"]) if row["summary"] != row["facts"])
    row = summarize.rows["train"][noisy]
    ids = [summarize.tokenizer.encode(" " + row[name]) + [summarize.eot] for name in ("facts", "summary")]
    tokens, mask = [x[None] for x in data.pad(ids, summarize.width)]
    facts, reference = summarize.prefer(summarize.pick("train", torch.tensor([noisy])), tokens,
                                        mask)[0].tolist()
    assert facts == pytest.approx(task.meteor(row["facts"], row["facts"])) and reference < facts
    assert reference == pytest.approx(task.meteor(row["summary"], row["facts"]))


def test_the_preference_on_real_text_is_meteor_with_the_reference_of_the_candidates_own_document(tmp_path):
    rows, summarize = write_own_splits(tmp_path), make(tmp_path)
    ids = [summarize.tokenizer.encode(f" summary train {i}") for i in (0, 2)]
    tokens, mask = [x[None].repeat(3, 1, 1) for x in data.pad(ids, 24)]
    got = summarize.prefer(summarize.pick("train", torch.tensor([2, 0, 1])), tokens, mask)
    want = [[task.meteor(f"summary train {i}", rows["train"][d]["summary"]) for i in (0, 2)]
            for d in (2, 0, 1)]
    torch.testing.assert_close(got, torch.tensor(want))
    assert got[0, 1] > got[0, 0] and got[1, 0] > got[1, 1] and got[2, 0] == got[2, 1]
