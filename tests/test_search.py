"""tasks/search.py: every search on worlds whose best prompt is known, budgets to the query, and by hand what
a run makes of its record.

No judge: a score is a sum over words.
"""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from reference import seeded

import tasks.search
from tasks.search import (BATCH, RIDGE, SEARCHES, Part, Record, Space, conducted, contest, curves, finalists,
                          queries_to_90, ridge_weights)

TEXTS = 8


def space(n_ids=6, length=3, queries=400, seed=0, texts=TEXTS):
    return Space(n_ids, length, queries, texts, seeded(seed))


def words(prompts, values):
    """(N,): what the different words of prompts (N, T) are worth together; saying one twice adds nothing."""
    held = torch.zeros(len(prompts), len(values)).scatter(1, prompts, 1.0)
    return held @ values


class Asked:
    """A few-shot set on which every text likes the same words, some texts more than others."""

    def __init__(self, values):
        self.values, self.pairs, self.questions = values, 0, []

    def on(self, prompts, texts):
        """(N, M') scores of each prompt on each text; their mean over all texts is `words`."""
        return words(prompts, self.values)[:, None] * (texts + 0.5) / (TEXTS / 2)

    def __call__(self, prompts, texts):
        texts = torch.arange(TEXTS) if texts is None else texts
        self.pairs += len(prompts) * len(texts)
        self.questions.append((prompts, texts))
        return self.on(prompts, texts).mean(1)


TINY = torch.tensor([5.0, 3.0, 2.0, 0.0, -1.0, -2.0])


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_finds_the_best_of_216_prompts(name):
    every = torch.tensor(list(itertools.product(range(6), repeat=3)))
    best = words(every, TINY).max().item()
    found = conducted(SEARCHES[name], Asked(TINY), space())
    i = found.improvements()[-1]
    assert words(found.tokens[i][None], TINY).item() == best == 10.0
    assert found.best_first()[0] == tuple(found.tokens[i].tolist())


@pytest.mark.parametrize("name, share", [("hill", 0.9), ("evolution", 0.9), ("ridge", 0.9), ("bdpl", 0.5)])
def test_a_search_that_learns_beats_random_search_among_ten_million_prompts(name, share):
    values = torch.linspace(-1, 1, 56)
    most = values[-4:].sum().item()
    reached = lambda which: max(conducted(SEARCHES[which], Asked(values), space(56, 4, 1600)).scores).item()
    assert reached(name) >= share * most and reached(name) > reached("random")


@pytest.mark.parametrize("queries", [1, 15, 16, 17, 50, 333])
@pytest.mark.parametrize("name", SEARCHES)
def test_no_search_asks_one_query_more_than_it_has(name, queries):
    ask = Asked(TINY)
    found = conducted(SEARCHES[name], ask, space(queries=queries))
    assert ask.pairs <= queries * TEXTS and found.queries.max() <= queries
    if name != "halving":  # whose rounds need not come out even
        assert ask.pairs == queries * TEXTS and found.queries.tolist() == list(range(1, queries + 1))
    assert ask.pairs > 0.7 * queries * TEXTS or queries == 1
    assert len(found.tokens) == len(found.scores) == len(found.queries) == len(found.read)


@pytest.mark.parametrize("name", SEARCHES)
def test_equal_seeds_ask_the_same_and_others_do_not(name):
    found = [conducted(SEARCHES[name], Asked(TINY), space(queries=60, seed=seed)) for seed in (3, 3, 4)]
    assert torch.equal(found[0].tokens, found[1].tokens) and torch.equal(found[0].scores, found[1].scores)
    assert not torch.equal(found[0].tokens, found[2].tokens)


@pytest.mark.parametrize("name", SEARCHES)
def test_prompts_are_of_the_length_and_of_ids_below_the_limit(name):
    """All of which are drawn."""
    found = conducted(SEARCHES[name], Asked(torch.zeros(7)), space(7, 2, 120))
    assert found.tokens.shape[1] == 2 and set(found.tokens.flatten().tolist()) == set(range(7))


@pytest.mark.parametrize("name", SEARCHES)
def test_a_vocabulary_of_one_word_is_no_error(name):
    found = conducted(SEARCHES[name], Asked(torch.ones(1)), space(1, 2, 40))
    assert set(found.tokens.flatten().tolist()) == {0}


# --------------------------------------------------------------------------------------------- one at a time


def started(search, s):
    """A search that has asked its first question: the generator and what it asked."""
    steps = search(s)
    return steps, next(steps)


def test_another_word_is_another_word_at_as_many_places_as_asked():
    prompts, s = torch.randint(5, (400, 4), generator=seeded(1)), space(5, 4)
    for places in (1, 2, 4):
        changed = s.changed(prompts, torch.full((400,), places))
        differs = changed != prompts
        assert (differs.sum(1) == places).all() and differs.any(0).all()
        assert changed.min() == 0 and changed.max() == 4


def test_told_is_ridge_that_begins_with_the_first_questions_of_the_run():
    s = space(50, 4)
    s.first = torch.arange(20).view(5, 4)
    steps, asked = started(SEARCHES["told"], s)
    assert torch.equal(asked, s.first)
    after = steps.send(torch.arange(5.0))
    assert set(after[0].tolist()) == {16, 17, 18, 19}  # the words of the best one
    alone = [conducted(SEARCHES[name], Asked(TINY), space(queries=60)).tokens for name in ("told", "ridge")]
    assert torch.equal(*alone)  # where the run fitted nothing


def test_hill_climbing_moves_by_one_word_to_what_is_no_worse():
    steps, first = started(SEARCHES["hill"], space(50, 4))
    tried = steps.send(torch.tensor([2.0]))
    assert tried.shape == (BATCH, 4) and ((tried != first).sum(1) == 1).all()
    worse = torch.full((BATCH,), 1.0)
    again = steps.send(worse)
    assert ((again != first).sum(1) == 1).all()  # none was better: from the same prompt
    tie = worse.clone()
    tie[5] = 2.0
    assert ((steps.send(tie) != again[5]).sum(1) == 1).all()  # a tie is taken


def test_evolution_keeps_the_best_16_of_all_and_changes_one_or_two_words():
    s = space(1000, 6)
    steps, pool = started(SEARCHES["evolution"], s)
    scores = torch.arange(BATCH).float()
    for turn in range(20):
        children = steps.send(scores if turn == 0 else new)
        from_one = (children[:, None] != pool[None]).sum(2).min(1).values  # (16,) places unlike the nearest
        from_any = torch.stack([(child[None] != pool).all(0).sum() for child in children])  # like no parent's
        assert (from_any >= 0).all() and (from_any <= 2).all() and (from_one > 0).all()
        new = torch.rand(BATCH, generator=seeded(turn)) * 10 + turn
        pool, scores = torch.cat((pool, children)), torch.cat((scores, new))
        keep = scores.argsort(descending=True, stable=True)[:BATCH]
        pool, scores = pool[keep], scores[keep]


def test_evolution_crosses_some_of_its_children():
    s = space(1000, 8)
    steps, pool = started(SEARCHES["evolution"], s)
    crossed = 0
    for turn in range(20):
        children = steps.send(torch.zeros(BATCH))  # ties: the first 16 stay
        near = (children[:, None] != pool[None]).sum(2).min(1).values
        crossed += (near > 2).sum().item()
    assert 0.1 < crossed / (20 * BATCH) < 0.3  # a share of 0.3 has two parents, some of them nearly one


def test_bdpl_learns_the_word_that_is_paid_at_its_place():
    steps, prompts = started(SEARCHES["bdpl"], space(4, 2))
    for _ in range(300):
        prompts = steps.send((prompts[:, 0] == 3).float() + (prompts[:, 1] == 1).float())
    assert (prompts[:, 0] == 3).float().mean() > 0.8 and (prompts[:, 1] == 1).float().mean() > 0.8


def test_bdpl_follows_the_gradient_of_the_mean_score(monkeypatch):
    """With Adam's step replaced by a look at the gradient: of the log-probabilities of what was drawn, each
    times its score less the mean, by autograd."""
    seen = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: seen.append(self.param_groups[0]["params"][0]))
    steps, prompts = started(SEARCHES["bdpl"], space(5, 3))
    scores = torch.rand(BATCH, generator=seeded(8))
    steps.send(scores)
    logits = torch.zeros(3, 5, requires_grad=True)
    logp = logits.log_softmax(1)[torch.arange(3), prompts].sum(1)  # (N,)
    (-(logp * (scores - scores.mean())).sum() / (BATCH - 1)).backward()
    torch.testing.assert_close(seen[0].grad, logits.grad)


def test_ridge_is_the_closed_form():
    prompts, n = torch.randint(9, (40, 3), generator=seeded(2)), 9
    scores = torch.randn(40, generator=seeded(3))
    x = torch.zeros(40, n).scatter_add(1, prompts, torch.ones(40, 3))
    exact = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(n), x.T @ (scores - scores.mean()))
    for start in (torch.zeros(n), torch.randn(n, generator=seeded(4))):
        torch.testing.assert_close(ridge_weights(prompts, scores, start), exact, rtol=1e-3, atol=1e-4)


def test_ridge_asks_for_the_best_words_first_and_half_of_the_time_for_others():
    steps, prompts = started(SEARCHES["ridge"], space(30, 3))
    for _ in range(25):
        prompts = steps.send(words(prompts, torch.arange(30.0)))
    assert set(prompts[0].tolist()) == {27, 28, 29}
    kept = (prompts[1:] == prompts[0]).float().mean()
    assert 0.3 < kept < 0.75 and len({tuple(x) for x in prompts.tolist()}) > BATCH // 2


def test_halving_reads_twice_the_texts_of_half_of_the_prompts_each_round():
    s = space(50, 3, queries=40)
    steps, part = started(SEARCHES["halving"], s)
    assert isinstance(part, Part) and part.known == 0
    assert len(part.prompts) == 80  # 80 on 2 texts, 40 on 2 more, 20 on 4 more: 320 pairs are 40 queries
    texts, rounds = part.texts.tolist(), [len(part.prompts)]
    scores = torch.rand(len(part.prompts), generator=seeded(5))
    while True:
        best = scores.argsort(descending=True)[:len(scores) // 2]
        try:
            new = steps.send(scores)
        except StopIteration:
            break
        assert torch.equal(new.prompts, part.prompts[best]) and torch.equal(new.scores, scores[best])
        assert new.known == len(texts)
        texts += new.texts.tolist()
        part, scores = new, torch.rand(len(new.prompts), generator=seeded(len(texts)))
        rounds.append(len(part.prompts))
        assert len(texts) == 2 ** len(rounds)
    assert sorted(texts) == list(range(TEXTS)) and rounds == [rounds[0] // 2 ** i for i in range(3)]


def test_scores_of_parts_are_means_over_all_texts_read_so_far():
    ask = Asked(TINY)
    found = conducted(SEARCHES["halving"], ask, space(queries=30))
    row, read = 0, {}
    for prompts, texts in ask.questions:
        for prompt in prompts:
            before = read.get(tuple(prompt.tolist()), [])
            known = before + texts.tolist() if len(before) < found.read[row] else before
            read[tuple(prompt.tolist())] = known
            mean = ask.on(prompt[None], torch.tensor(known)).mean().item()
            assert found.scores[row].item() == pytest.approx(mean, abs=1e-4) and found.read[row] == len(known)
            row += 1
    assert row == len(found.scores) and set(found.read.tolist()) == {2, 4, 8}


# -------------------------------------------------------------------------------------------------- a record


def record_of(rows):
    """A Record of [(prompt, score, texts read, queries)]."""
    record = Record(len(rows[0][0]))
    for prompt, score, read, queries in rows:
        record.add(torch.tensor([prompt]), torch.tensor([score]), read, torch.tensor([queries]))
    return record


def test_the_best_so_far_is_by_training_score_and_more_texts_outweigh_it():
    record = record_of([((1, 1), 3.0, 2, 1), ((2, 2), 5.0, 2, 1), ((3, 3), 5.0, 2, 2), ((4, 4), 4.0, 4, 3),
                        ((5, 5), 9.0, 2, 3), ((6, 6), 4.5, 4, 4), ((6, 6), 4.5, 4, 5)])
    assert record.improvements() == [0, 1, 3, 5]
    assert record.best_first() == [(6, 6), (4, 4), (5, 5), (2, 2), (3, 3), (1, 1)]


def test_a_record_comes_back_from_its_state_and_a_state_is_a_snapshot():
    record = record_of([((1, 2), 3.0, 8, 1), ((7, 2), -1.5, 8, 2)])
    state = record.state()
    record.add(torch.tensor([[5, 5]]), torch.tensor([9.0]), 8, torch.tensor([3]))
    other = Record(2)
    other.load_state(state)
    assert other.tokens.tolist() == [[1, 2], [7, 2]] and other.scores.tolist() == [3.0, -1.5]
    assert other.read.tolist() == [8, 8] and other.queries.tolist() == [1, 2]
    assert other.tokens.dtype == record.tokens.dtype  # prompts of it are ids again
    other.add(torch.tensor([[5, 5]]), torch.tensor([9.0]), 8, torch.tensor([3]))
    assert torch.equal(other.tokens, record.tokens) and torch.equal(other.queries, record.queries)


def test_half_of_the_finalists_are_the_run_s_last_samples_and_the_rest_are_its_best_scored_ones():
    record = record_of([((i,), float(i), 8, i + 1) for i in range(100)])
    own = [(i,) for i in (300, 99, *range(200, 263))]  # one of them was scored, too
    chosen = finalists(record, own)
    assert len(chosen) == len(set(chosen)) == 65
    assert chosen[:33] == own[:33] and chosen[33:] == [(i,) for i in range(98, 66, -1)]
    assert finalists(record) == [(i,) for i in range(99, 34, -1)]
    few = record_of([((1,), 1.0, 8, 1), ((2,), 2.0, 8, 2)])
    assert finalists(few, own) == [*own[:33], (2,), (1,), *own[33:63]]


class Worth:
    """A task whose prompts of one word are worth what tables say, a table a set."""

    def __init__(self, queries=120, n_ids=500):
        self.score = {name: torch.rand(n_ids, generator=seeded(i)) for i, name in enumerate(("train", "dev"))}
        self.right = torch.rand(n_ids, generator=seeded(2)).clamp(max=0.899)
        self.right[self.score["train"].argsort()[-3:]] = 0.9  # the three that score best
        self.queries, self.n_ids, self.width, self.device = queries, n_ids, 1, torch.device("cpu")
        self.first_queries = 0
        self.cfg, self.asked = SimpleNamespace(seed=1, noise=0.0), []
        self.sets = {"train": (None, torch.zeros(8))}
        self.scored = Record(1)
        tokens = torch.randint(n_ids, (queries, 1), generator=seeded(3))
        self.scored.add(tokens, self.score["train"][tokens[:, 0]], 8, torch.arange(queries) + 1)

    def ask(self, prompts, name, texts=None):
        self.asked.append((name, len(prompts), texts))
        if name == "test":
            return None, self.right[prompts[:, 0]]
        return self.score[name][prompts[:, 0]], None

    def best_on_dev(self, prompts):
        best = max((x[0] for x in prompts), key=lambda i: self.score["dev"][i])
        return torch.tensor([best]), self.right[best].item()


def test_figures_of_the_searches_by_hand():
    task = Worth()
    figures, rows = contest(task)
    assert set(figures) == {"best_queries_to_90", "random_search_accuracy", "random_queries_to_90"} | {
        f"{s}_{k}" for s in SEARCHES if s != "random" for k in ("accuracy", "queries_to_90")}
    for name in ["run", *SEARCHES]:
        if name == "run":
            found = task.scored
        else:
            s = Space(500, 1, 120, 8, seeded(4))  # --seed + 3
            found = conducted(SEARCHES[name], lambda prompts, texts: task.ask(prompts, "train")[0], s)
        best, by_hand = (0, -math.inf), []
        for token, score, read, queries in zip(found.tokens[:, 0], found.scores, found.read, found.queries):
            if (read, score) > best:
                best = (read, score)
                by_hand.append((queries.item(), round(task.right[token].item(), 6)))
        mine = [(x["queries"], x["accuracy"]) for x in rows if x["search"] == name]
        assert mine == [*by_hand, (found.queries[-1].item(), by_hand[-1][1])]
        first = next((queries for queries, accuracy in by_hand if accuracy >= 0.9), None)
        prefix = "best" if name == "run" else name
        assert figures[f"{prefix}_queries_to_90"] == first == queries_to_90(rows, name)
        if name != "run":
            known = "random_search" if name == "random" else name
            assert figures[f"{known}_accuracy"] == task.best_on_dev(found.best_first()[:65])[1]


def test_searches_ask_the_training_texts_alone_and_measure_once():
    """What is chosen by is never test, and all improvements are measured in one question."""
    task = Worth()
    contest(task)
    names = [name for name, _, _ in task.asked]
    assert names.count("test") == 1 and names.count("train") > 10 and set(names) == {"train", "test"}
    paid = [n * (8 if texts is None else len(texts)) for name, n, texts in task.asked if name == "train"]
    assert len(SEARCHES) * 120 * 8 - 120 < sum(paid) <= len(SEARCHES) * 120 * 8  # pairs that were answered
    assert {len(texts) for _, _, texts in task.asked if texts is not None} == {2, 4}  # 2, 2 more, 4 more


def test_540_of_600_are_nine_tenths():
    task = Worth()
    task.right[:] = torch.full((600,), 1.0).scatter(0, torch.arange(60), 0.0).mean()
    assert queries_to_90(curves(task, {"run": task.scored}), "run") == 1


def test_a_search_that_never_gets_there_says_so():
    task = Worth()
    task.right[:] = 0.8999
    assert queries_to_90(curves(task, {"run": task.scored}), "run") is None


def test_searches_have_random_numbers_of_their_own():
    before = torch.random.get_rng_state()
    contest(Worth())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_without_queries_has_no_curve_and_searches_of_one_query():
    task = Worth(queries=0)
    figures, rows = contest(task)
    assert figures["best_queries_to_90"] is None and {x["queries"] for x in rows} == {1}
    assert {x["search"] for x in rows} == set(SEARCHES)


def test_the_table_of_searches_is_the_only_list(monkeypatch):
    monkeypatch.setattr(tasks.search, "SEARCHES", {"mine": SEARCHES["random"]})
    figures, rows = contest(Worth())
    assert {"mine_accuracy", "mine_queries_to_90"} < set(figures)
    assert {x["search"] for x in rows} == {"run", "mine"}
