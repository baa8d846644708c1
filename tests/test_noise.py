"""Preferences as people give them: --noise against Plackett-Luce's formula, who is told what and who never
is; and --no-pool, under which only what was asked about together is compared."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from reference import seeded
from stubs import A, B, REWARD, accuracy_by_hand, asked_about, bound, fill_reward, fit_reward, stub_run
from test_prompt import finished, ids, small_task
from test_search import Worth

import evaluate
import train
from reward import Buffer, Candidates
from rollout import asked, collect, fresh_candidates
from support.noise import noisy
from tasks.search import SEARCHES, Space, answers, compete, conducted, finalists


@pytest.fixture
def make(monkeypatch, tmp_path):
    return lambda *typed, **more: stub_run(monkeypatch, tmp_path, *typed, **more)


# ------------------------------------------------------------------------------------------------ the formula


def plackett_luce(utility, order):
    """The probability of a ranking, best first: pick one of all, then one of the rest, ..."""
    p, left = 1.0, list(range(len(utility)))
    for i in order:
        p *= math.exp(utility[i]) / sum(math.exp(utility[j]) for j in left)
        left.remove(i)
    return p


@pytest.mark.parametrize("temperature", [0.5, 20.0])
def test_rankings_come_as_often_as_plackett_luce_says(temperature):
    """All 24 orders of four answers, 40,000 draws: within five standard errors."""
    utility, n = [0.3, -1.0, 1.2, 0.0], 40_000
    told = noisy(torch.tensor(utility).mul(temperature).expand(n, 4), temperature, seeded(1))
    found = {}
    for order in told.argsort(1, descending=True).tolist():
        found[tuple(order)] = found.get(tuple(order), 0) + 1
    for order in itertools.permutations(range(4)):
        p = plackett_luce(utility, order)
        assert abs(found.get(order, 0) / n - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-3, order


@pytest.mark.parametrize("gap, temperature", [(0.0, 10.0), (25.0, 10.0), (190.0, 200.0), (33.0, 60.0)])
def test_a_pair_is_bradley_terry(gap, temperature):
    told = noisy(torch.tensor([[100.0 + gap, 100.0]]).expand(40_000, 2), temperature, seeded(2))
    won = (told[:, 0] > told[:, 1]).float().mean().item()
    assert won == pytest.approx(1 / (1 + math.exp(-gap / temperature)), abs=0.015)


def test_noise_has_the_mean_and_the_deviation_that_it_says_and_is_never_infinite(monkeypatch):
    x = noisy(torch.full((200, 200), 5.0, dtype=torch.float64), 10.0, seeded(3)) - 5
    assert x.mean().item() == pytest.approx(5.77, abs=0.3) and x.dtype == torch.float64
    assert x.std().item() == pytest.approx(12.8, abs=0.3)
    for extreme in (0.0, 1 - 2 ** -24):  # what torch.rand may return at its ends
        monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.full(shape, extreme))
        assert noisy(torch.zeros(2), 1.0, None).isfinite().all()


def test_without_noise_the_preference_is_as_it_is_and_nothing_is_drawn():
    preference, g = torch.tensor([[1.0, 2.0]]), seeded(4)
    before = g.get_state()
    assert noisy(preference, 0.0, g) is preference and torch.equal(g.get_state(), before)


# ----------------------------------------------------------------------------------------- what a run is told


def test_the_fit_and_the_task_are_told_the_same_and_the_truth_stays_untold(make):
    run, heard = make("--candidates 16 --noise 5", pooled=True), []
    run.task.told = lambda tokens, preference: heard.append((tokens, preference))
    train.reward_phase(run)
    (tokens, told), new = heard[0], run.latest
    assert len(heard) == 1 and torch.equal(tokens, new.tokens) and torch.equal(told, new.preference)
    kept = torch.cat((run.fitted.data.preference, run.held_out.data.preference), 1)
    assert torch.equal(kept, told)
    away = told - run.task.worth(new.tokens, new.mask) - 0.001 * torch.arange(16)
    assert away.std() > 3  # the noise of one draw a candidate


def test_every_asking_is_a_new_draw_from_a_stream_of_its_own(make):
    run, plain = make("--candidates 16 --noise 5", pooled=True), make("--candidates 16", pooled=True)
    x, y = asked_about(run), asked_about(plain)
    assert torch.equal(x.tokens, y.tokens)  # candidates do not hang on the noise
    state = run.generators["candidates"].get_state()
    assert torch.equal(state, plain.generators["candidates"].get_state())
    again = asked(run, run.task.batch(1, None), x.tokens, x.mask)
    assert (again - x.preference).abs().min() > 0.02  # 16/1000 is what the stub adds


@pytest.mark.parametrize("objective", ["reinforce", "ppo"])
def test_bandit_guidance_is_paid_what_it_was_told(objective, make, monkeypatch):
    paid = {}
    for noise in (0, 50):
        run = make(f"--objective {objective} --guidance bandit --noise {noise} --batch_size 16", pooled=True)
        seen = paid[noise] = []
        run.task.told = lambda tokens, preference: seen.append(preference)
        train.reward_phase(run)
        run.objective.step(run)
    assert len(paid[50]) == 1  # of the very samples that are learned from
    assert all(x.std() > 20 for x in paid[50]) and all(x.std() < 3 for x in paid[0])


def test_rank_accuracy_of_the_end_is_by_the_truth(make, monkeypatch):
    run = make("--agg sum --candidates 6 --K 3 --noise 1000 --resolution 0.3")
    fill_reward(run.reward, (2.0, -0.5, 1.0))
    seen = []
    monkeypatch.setattr(evaluate, "collect", lambda *x, **y: seen.append(collect(*x, **y)) or seen[-1])
    before = run.generators["noise"].get_state()
    got = evaluate.share(*evaluate.held_out_pairs(run))
    members = [[t[m].tolist() for t, m in zip(*both)] for x in seen for both in zip(x.tokens, x.mask)]
    liked = [[round(p / 0.3) for p in row] for x in seen for row in x.preference.tolist()]
    assert max(p for row in liked for p in row) < 100
    assert got == pytest.approx(accuracy_by_hand(members, liked, (2.0, -0.5, 1.0), sum), rel=1e-4)
    assert torch.equal(run.generators["noise"].get_state(), before)


def test_prompts_are_remembered_with_the_scores_that_the_run_was_told():
    task, prompts = small_task(), ids(1, 8, 3)
    truth = task.prefer(None, prompts, None)
    task.told(prompts, truth + 7)
    assert torch.equal(task.scored.scores, truth[0] + 7) and task.queries == 8


# ----------------------------------------------------------------------------------------------- the searches


def test_searches_are_told_with_the_same_noise_and_a_prompt_asked_again_anew():
    task = Worth()
    task.cfg.noise = 30.0
    prompts = torch.full((20_000, 1), 7)
    told = answers(task, prompts, None, seeded(5)) - task.score["train"][7]
    assert told.mean().item() == pytest.approx(30 * 0.5772, abs=2)
    assert told.std().item() == pytest.approx(30 * 1.2825, abs=2) and len(told.unique()) > 19_000
    part = answers(task, prompts, torch.tensor([1, 5]), seeded(5)) - task.score["train"][7]
    torch.testing.assert_close(part, 2 * told, rtol=1e-3, atol=1e-3)  # a quarter of the texts: twice as noisy


def test_what_a_query_buys_is_as_certain_in_parts():
    """What halving knows in the end, a mean over all texts, deviates as one answer about all of them does."""
    task = Worth(n_ids=1)
    task.score["train"][:], task.cfg.noise = 0.0, 10.0
    s = Space(1, 1, 4000, 8, seeded(6))
    people = seeded(7)
    found = conducted(SEARCHES["random"], lambda x, texts: answers(task, x, texts, people), s)
    whole = found.scores.std()
    known, same = torch.zeros(4000), torch.zeros(4000, 1, dtype=torch.long)
    for texts in ([0, 1], [2, 3], [4, 5, 6, 7]):
        known += answers(task, same, torch.tensor(texts), people) * len(texts)
    assert (known / 8).std().item() == pytest.approx(whole.item(), rel=0.1)


def test_noise_changes_what_searches_are_told_and_draws_from_no_stream_of_theirs():
    """Random search does not listen: it asks the same, hears otherwise, and brings others to dev."""
    found = {}
    for noise in (0.0, 3.0):
        task = Worth()
        task.cfg.noise = noise
        found[noise] = compete(task)
    quiet, loud = found[0.0]["random"], found[3.0]["random"]
    assert torch.equal(quiet.tokens, loud.tokens) and torch.equal(quiet.queries, loud.queries)
    assert (quiet.scores - loud.scores).abs().max() > 1 and finalists(quiet) != finalists(loud)
    assert not torch.equal(found[0.0]["evolution"].tokens, found[3.0]["evolution"].tokens)
    again = Worth()
    again.cfg.noise = 3.0
    assert torch.equal(compete(again)["ridge"].scores, found[3.0]["ridge"].scores)


def test_dev_is_told_as_well_and_only_the_reference_knows_the_truth(monkeypatch):
    sampled = list(range(300, 364))
    quiet, scores, right, _, _ = finished(monkeypatch, 250, sampled, 299)
    loud, _, _, asked_of, task = finished(monkeypatch, 250, sampled, 299, noise=100.0)
    assert loud["reference_accuracy"] == quiet["reference_accuracy"]
    assert loud["best_prompt_ids"] != quiet["best_prompt_ids"]
    offered = torch.tensor(sorted(finalists(task.scored, [(299,), *((i,) for i in sampled)])))
    told = noisy(scores[1, offered[:, 0]], 100.0, seeded(1 + 5))
    order = offered[told.argsort(descending=True)][:3, 0]
    assert loud["best_prompt_ids"] == [order[0].item()]  # one draw a prompt decides both figures
    assert loud["top3_accuracy"] == pytest.approx(right[2, order].mean().item())
    assert {k: loud[k] for k in ("test_accuracy", "random_accuracy")} == {
        k: quiet[k] for k in ("test_accuracy", "random_accuracy")}


# ------------------------------------------------------------------------------- only what was asked together


def pairs_of(x):
    """{((words, told), (words, told))} of Candidates (n, 2, T)."""
    told = lambda b: tuple((tuple(t.tolist()), p.item()) for t, p in zip(x.tokens[b], x.preference[b]))
    return {told(b) for b in range(len(x.tokens))}


def test_without_a_pool_a_round_is_questions_of_two_and_nothing_else_is_compared(make):
    run = make("--candidates 16 --K 2 --no-pool --noise 0.3 --explore 0.5", pooled=True)
    questions = set()
    for _ in range(3):
        train.reward_phase(run)
        assert run.latest.tokens.shape == (8, 2, 4)
        questions |= pairs_of(run.latest)
    assert run.task.queries == 48 and len(run.fitted) == 21 and len(run.held_out) == 3
    assert not pairs_of(run.fitted.data) & pairs_of(run.held_out.data)
    batch, subsets = run.fitted.draw(64, 2, seeded(8))
    assert pairs_of(batch) <= questions
    assert all(i % 2 == 0 and j == i + 1 for i, j in subsets.tolist())  # the two of one question


def test_a_pair_has_an_answer_of_its_own(make):
    """Equal prompts in other questions are told anew: answers of different pairs are independent."""
    run = make("--candidates 400 --K 2 --no-pool --noise 1 --explore 0", pooled=True)
    x = asked_about(run)
    gap = run.task.worth(x.tokens, x.mask).diff(dim=1)[:, 0]  # true, but for thousandths
    first = (gap == 1.5).nonzero().flatten()
    won = (x.preference[first, 1] > x.preference[first, 0]).float()
    assert len(first) > 25 and 0 < won.mean() < 1


def test_with_a_pool_the_same_candidates_are_one_group(make):
    runs = [make(f"--candidates 16 --K 2 {flag} --noise 0.3", pooled=True)
            for flag in ("--no-pool", "--pool")]
    apart, together = [asked_about(run) for run in runs]
    assert together.tokens.shape == (1, 16, 4)
    assert torch.equal(apart.tokens.flatten(0, 1), together.tokens[0])
    assert torch.equal(apart.preference.flatten(), together.preference[0])


def test_an_eighth_of_the_questions_is_held_out_but_one_at_least(make):
    for candidates, k, held in ((16, 2, 1), (64, 2, 4), (12, 4, 1), (60, 3, 2)):
        run = make(f"--candidates {candidates} --K {k} --no-pool", pooled=True)
        train.reward_phase(run)
        assert (len(run.held_out), len(run.fitted)) == (held, candidates // k - held)


def test_fresh_candidates_of_every_step_are_questions_too(make):
    run = make("--candidates 16 --K 4 --no-pool --replay 0", pooled=True)
    fresh = fresh_candidates(run)
    assert fresh.data.tokens.shape == (4, 4, 4)
    batch, subsets = fresh.draw(3, 4, seeded(9))
    assert batch.tokens.shape[:2] == (3, 4) and subsets.tolist() == torch.arange(12).view(3, 4).tolist()


def buffer_of(*preferences):
    """A buffer of groups that are told apart by their tokens."""
    buffer, shape = Buffer(99, pooled=False), (len(preferences), len(preferences[0]), 1)
    tokens = torch.arange(len(preferences))[:, None, None].expand(shape)
    buffer.add(Candidates(tokens, torch.ones(shape, dtype=torch.bool), torch.tensor(preferences)))
    return buffer


def test_pairs_that_tie_are_an_answer_as_often_as_the_others():
    buffer = buffer_of((1.0, 2.0), *[(0.0, 0.0)] * 8, (5.0, 4.0))
    for seed in range(5):
        batch, subsets = buffer.draw(64, 2, seeded(seed), ties=True)
        drawn = batch.tokens[:, 0, 0].tolist()
        assert len(subsets) == 4 and {*drawn[:2]} <= {0, 9} and {*drawn[2:]} <= {*range(1, 9)}
        assert {*buffer.draw(64, 2, seeded(seed))[0].tokens[:, 0, 0].tolist()} <= {0, 9}
    many = buffer_of(*[(1.0, 2.0)] * 9, (0.0, 0.0))
    assert len(many.draw(6, 2, seeded(), ties=True)[1]) == 7  # there is one
    assert many.draw(6, 2, seeded(), 9.0, ties=True) is None  # nothing but ties is nothing to rank
    assert len(buffer_of((1.0, 2.0)).draw(6, 2, seeded(), ties=True)[1]) == 1


@pytest.mark.parametrize("ties", [0, 2])
def test_what_tied_pairs_add_to_the_fit_by_hand(ties, make):
    """A pair in which B wins, and one in which A B ties with A: r of A B's B is asked to be nothing. Both in
    units of --rank_temperature."""
    run = make(f"--K 2 --no-pool --candidates 4 --agg sum --ties {ties} --rank_temperature 0.5", pooled=True)
    tokens, mask = torch.tensor([[[A, A], [B, A]], [[A, B], [A, A]]]), torch.ones(2, 2, 2, dtype=torch.bool)
    run.fitted.add(Candidates(tokens, mask, torch.tensor([[0.0, 1.0], [3.0, 3.0]])))
    a, b = bound(REWARD[A]) / 0.5, bound(REWARD[B]) / 0.5
    strict, tied = math.log(1 + math.exp(a - b)), math.log(math.cosh((b - a) / 2))
    expected = strict / 2 + ties * tied if ties else strict  # a mean over the groups that are drawn
    assert fit_reward(run, 1)["reward_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_reward_learns_from_pairs_alone_which_word_is_liked(make):
    run = make("--candidates 256 --K 2 --no-pool --noise 0.5 --reward_first 60 --reward_lr 0.02 --agg sum "
               "--explore 1", pooled=True)
    fill_reward(run.reward, (0.0, 0.0, 0.0))
    train.reward_phase(run)
    a, b = run.reward.guide(torch.tensor([[[A], [B]]]))[0, :, 0]
    assert b > a + 0.1


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("typed, says", [
    ("--task edits --noise 3", "--noise 3: task edits asks nobody"),
    ("--task summarize --objective mle --noise 0.1", "--noise 0.1: --objective mle reads no preference"),
    ("--noise -1", "--noise: expected at least 0.0, got -1"),
    ("--no-pool --K 5", "--candidates to be a multiple of --K 5, and twice that at least, got 16"),
    ("--no-pool --K 8 --candidates 8", "multiple of --K 8, and twice that at least, got 8"),
    ("--no-pool --K 2 --guidance bandit", "--no-pool: --guidance bandit is paid scores"),
    ("--task summarize --explore_from best --explore 0.5", "--explore_from best: expected task prompt"),
    ("--explore_from best --explore 0", "above 0, got task prompt, --guidance token, --explore 0"),
    ("--explore_from best --guidance bandit", "a learned reward"),
    ("--task edits --ask_again 3", "--ask_again 3: this run fits no reward to what it asks"),
    ("--guidance bandit --ask_again 3", "--ask_again 3: this run fits no reward to what it asks"),
    ("--task summarize --objective reinforce --exact_first", "--exact_first: expected task prompt and"),
    ("--objective ppo --exact_first", "--objective reinforce, got prompt, ppo"),
    ("--guidance bandit --exact_first", "each token by itself and --weights immediate, got --guidance band"),
    ("--guidance abc --exact_first", "each token by itself and --weights immediate, got --guidance abc"),
    ("--weights to_go --exact_first", "got --guidance token, --weights to_go"),
    ("--guidance bandit --head_first 0.5", "--head_first 0.5: expected a fit of a body and a head"),
    ("--guidance implicit --head_first 0.5", "which --guidance implicit of --objective reinforce has not"),
    ("--task summarize --objective mle --head_first 1", "which --guidance token of --objective mle has not"),
    ("--task summarize --no-pool", "--no-pool: task summarize compares the candidates of one input only")])
def test_flags_that_ask_for_what_has_no_effect_are_one_line(typed, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leave:
        train.main(typed.split())
    assert leave.value.code == 2 and says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_pairs_with_noise_are_what_train_takes():
    c = SimpleNamespace(**vars(train.parse_flags(train.Flags, "--noise 25 --no-pool --K 2".split(), "")[0]))
    train.check_together(c)
    assert (c.noise, c.pool, c.K) == (25.0, False, 2)
