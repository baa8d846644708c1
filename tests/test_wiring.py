"""How the first half of a round is joined: collect, fit, warm starts, by hand on the world of stubs.py.

The formulas have tests of their own. Here each step is run as train.py runs it, and what comes out is
computed again on paper: plain loops over lists, which know neither masks nor the layout of tensors.
"""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from reference import aggregate_by_loop, mask_of
from stubs import (A, B, END, POLICY, REWARD, START, accuracy_by_hand, asked_about, bound, fill,
                   fill_reward, fit_reward, logits, log_softmax, loss_and_gradient, mean, rank_loss, rolled,
                   rows_of, stub_run, table_of)

import rollout
import train
from reward import Buffer, Candidates
from rollout import answer_ends
from warm_start import warm_starts

near = lambda x: pytest.approx(x, rel=1e-4, abs=1e-6)
SURE = ((-30.0, 30.0, -30.0), (-30.0, -30.0, 30.0), (30.0, -30.0, -30.0))  # A B END, whatever the context
SWING = ((-30.0, 30.0, 0.0), (30.0, -30.0, 0.0), (30.0, -30.0, 0.0))       # A B A B


@pytest.fixture
def make(monkeypatch, tmp_path):
    return lambda *typed, **more: stub_run(monkeypatch, tmp_path, *typed, **more)


# ------------------------------------------------------------------------------------------- collect, rollout


def test_candidates_are_judged_as_they_stand(make):
    run = make("--K 4 --candidates 5")
    fill(run.policy, SURE)
    x = asked_about(run)
    assert x.tokens.shape == (5, 4, 16) and x.preference.shape == (5, 4) and run.task.queries == 20
    assert all(ids == [A, B, END] for _, ids in rows_of(x)) and (x.tokens[~x.mask] == 0).all()
    for n, got in enumerate(x.preference.flatten().tolist()):
        assert got == near(0.5 + 0.001 * n)  # a B, an A, and its place in the queue


def test_a_pooled_task_has_one_group_of_all_its_candidates(make):
    run = make("--candidates 9 --explore 0", pooled=True)
    x = asked_about(run)
    assert x.tokens.shape == (1, 9, 4) and x.preference.shape == (1, 9)
    assert x.mask.all() and (x.tokens < END).all()


@pytest.mark.parametrize("draw", ["collect", "rollout"])
def test_samples_come_as_often_as_the_policy_says(draw, make):
    """Behind its context, and without dropout although the policy comes out of an update."""
    run = make("--K 400 --candidates 8 --batch_size 3000 --dropout 0.9")
    run.policy.train()
    found = rows_of(asked_about(run)) if draw == "collect" else rows_of(*rolled(run))
    count = {}
    for context, ids in found:
        for before, y in zip([END] + ids, ids):
            count.setdefault((tuple(context), before), [0, 0, 0])[y] += 1
    assert len({context for context, _ in count}) == 4
    for (context, before), n in count.items():
        p = [math.exp(x) for x in log_softmax(logits(POLICY, context, before))]
        for y in range(3):
            error = math.sqrt(p[y] * (1 - p[y]) / sum(n))
            assert abs(n[y] / sum(n) - p[y]) < 0.02 + 4 * error, (context, before)


def test_a_rollout_is_as_wide_as_its_longest_sample(make):
    run = make("--batch_size 6")
    fill(run.policy, SURE)
    batch, tokens, mask = rolled(run)
    assert tokens.shape == mask.shape == (6, 1, 3) and mask.all() and len(batch.index) == 6
    assert rollout.rollout(make("--batch_size 6", pooled=True))[1].shape == (1, 6, 4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_explore_is_the_share_of_candidates_with_some_random_tokens(share, make):
    run = make(f"--explore_from policy --explore {share} --candidates 800", pooled=True)
    fill(run.policy, SWING)
    swapped = asked_about(run).tokens[0] != torch.tensor([A, B, A, B])
    each = 1 / 4  # half of the tokens become one of two words, which is the old one as often as not
    assert swapped.any(1).float().mean().item() == pytest.approx(share * (1 - (1 - each) ** 4), abs=0.08)
    assert swapped.float().mean().item() == pytest.approx(share * each, abs=0.04)
    own = rollout.rollout(run)[1]
    assert torch.equal(own[0, 0], torch.tensor([A, B, A, B]))  # nothing random to learn from


def scored(*preference):
    """Prompts of a pooled run with these preferences: B B A A, the others A A A A, A A A B."""
    tokens = torch.tensor([[[B, B, A, A], [A, A, A, A], [A, A, A, B]]])
    return Candidates(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([preference]))


ANY = [list(x) for x in itertools.product((A, B), repeat=4)]


@pytest.mark.parametrize("preference, best", [
    ((9.0, 1.0, 2.0), [[B, B, A, A]]), ((9.0, 1.0, 8.9), [[B, B, A, A], [A, A, A, B]]),  # 9.0 and 8.9 tie
    ((9.0, 9.2, 8.9), ANY)])  # all tie: words that nobody knows anything of
def test_explore_from_best_varies_the_prompts_that_tie_with_the_best(preference, best, make):
    run = make("--explore 1 --explore_from best --resolution 1 --candidates 900", pooled=True)
    fill(run.policy, SWING)
    run.fitted.add(scored(*preference))
    found = asked_about(run).tokens[0]  # (K, 4)
    orders = [y for x in best for y in itertools.permutations(x)]  # in every order, each as likely
    for x in {tuple(y) for y in orders}:  # half of the tokens are one of two words: one stays in 3 of 4
        from_each = [math.prod(3 / 4 if a == b else 1 / 4 for a, b in zip(x, y)) for y in orders]
        share = (found == torch.tensor(x)).all(1).float().mean().item()
        assert share == pytest.approx(mean(from_each), abs=0.06)
    words_a = mean(sum(3 / 4 if y == A else 1 / 4 for y in x) for x in best)  # of 900 prompts: +- 0.03
    assert (found == A).sum(1).float().mean().item() == pytest.approx(words_a, abs=0.13)
    half = make("--explore 0.5 --explore_from best --resolution 1 --candidates 900", pooled=True)
    fill(half.policy, SWING)
    half.fitted.add(scored(*preference))
    own = (asked_about(half).tokens[0] == torch.tensor([A, B, A, B])).all(1).float().mean()
    assert own > 0.45 if best is not ANY else own < 0.15


@pytest.mark.parametrize("proposed, share", [(1, 1 / 2 + 1 / 4), (64, 1 / 2)])
def test_half_of_the_new_words_are_among_those_that_the_reward_pays_best(proposed, share, make, monkeypatch):
    """r of A is below r of B at the first place, or not; of one word proposed every second new word is the
    better one, and of the others half."""
    run = make("--explore 1 --explore_from best --resolution 1 --candidates 900", pooled=True)
    run.fitted.add(scored(9.0, 1.0, 2.0))
    monkeypatch.setattr(rollout, "PROPOSED", proposed)
    monkeypatch.setattr(rollout, "best_so_far", lambda run, n: torch.full((n, 4), END))
    new = [x for x in asked_about(run).tokens.flatten().tolist() if x != END]  # half of them
    r = rollout.first_rewards(run)
    assert r[A] != r[B] and len(new) / 3600 == pytest.approx(1 / 2, abs=0.05)
    assert mean([x == int(r.argmax()) for x in new]) == pytest.approx(share, abs=0.05)


def test_farthest_first_by_loop():
    """Against all distances, in float64: with rows that are known, rows that are alike, and all rows."""
    g = torch.Generator().manual_seed(0)
    states = torch.randn(12, 3, generator=g, dtype=torch.float64)
    states[7] = states[3]
    apart = lambda i, j: math.dist(states[i].tolist(), states[j].tolist())
    for known in ([], [5], [3, 0, 11]):
        chosen = rollout.farthest(states, 12 - len(known), torch.tensor(known, dtype=torch.long)).tolist()
        assert sorted(chosen + known) == list(range(12))
        for n, i in enumerate(chosen):
            before = known + chosen[:n]
            left = [j for j in range(12) if j not in before]
            middle = [] if known else [states.mean(0).tolist()]
            far = lambda j: min([apart(j, k) for k in before]
                                + [math.dist(states[j].tolist(), x) for x in middle])
            assert far(i) == pytest.approx(max(map(far, left)), abs=1e-9)


def test_before_two_answers_differ_words_are_asked_about_that_nobody_was(make, monkeypatch):
    """Round by round, of what is fitted and of what is held out, and from the beginning when few are left."""
    run = make("--explore 0.5 --explore_from best --resolution 1 --candidates 2", pooled=True)
    run.task.n_ids = 20
    monkeypatch.setattr(rollout, "first_states", lambda run: torch.arange(20.0)[:, None].square())
    first, all_tie = rollout.unlike(run, (1, 2, 4)), torch.zeros(1, 1)
    in_order = rollout.farthest(torch.arange(20.0)[:, None].square(), 8, torch.tensor([], dtype=torch.long))
    assert sorted(first.flatten().tolist()) == sorted(in_order.tolist()) != in_order.tolist()
    one = lambda x: Candidates(x, torch.ones_like(x, dtype=torch.bool), all_tie)
    run.fitted.add(one(first[:, :1]))
    run.held_out.add(one(first[:, 1:]))
    second = rollout.unlike(run, (1, 2, 4))
    assert len(set(first.flatten().tolist()) | set(second.flatten().tolist())) == 16
    run.fitted.add(one(second[:, :1]))
    run.fitted.add(one(second[:, 1:]))
    assert sorted(rollout.unlike(run, (1, 2, 4)).flatten().tolist()) == sorted(first.flatten().tolist())


def test_states_of_words_are_those_that_have_read_them_first(make):
    """Of unit length, in eval mode."""
    run = make("--candidates 2 --dropout 0.9", pooled=True)
    run.reward.train()
    found = rollout.first_states(run)  # (V, D)
    assert not run.reward.training
    for word in (A, B):
        state = run.reward.body(torch.tensor([[[END, word]]]))[0, 0, 1].tolist()
        assert found[word].tolist() == near([x / math.hypot(*state) for x in state])
    assert found[A].tolist() != near(found[B].tolist())


@pytest.mark.parametrize("preference, differs, stands_out", [
    ((0.0, 20.0, 3.0), False, False), ((0.0, 31.0, -9.0), True, False), ((0.0, 87.0, 2.0), True, True),
    ((48.0, 52.0, 51.0), False, False), ((-30.0, 3.0, 4.0), True, False),
    ((0.0, -9.0, 31.0, 40.0, 1.0), True, False),
    ((0.0, 31.0, -9.0, 30.0, 29.0, 3.0, 1.0), True, True)])
def test_a_candidate_stands_out_by_more_than_a_step_or_three_by_one(preference, differs, stands_out):
    """Of 50, as prompts have it: a random word may be worth 31, and on the embedded world a cue word alone;
    on real text it is worth 87 or 150."""
    buffer = Buffer(9, True)
    assert not buffer.stands_out(50.0)
    x = torch.zeros(1, len(preference), 2, dtype=torch.long)
    buffer.add(Candidates(x, x == 0, torch.tensor([preference])))
    assert (buffer.differs(50.0), buffer.stands_out(50.0)) == (differs, stands_out)


@pytest.mark.parametrize("held, pooled, tells", [(7, True, False), (8, True, True), (1, False, True)])
def test_a_few_held_out_prompts_do_not_say_when_a_fit_stops(held, pooled, tells):
    buffer = Buffer(100, pooled)
    assert not buffer.telling
    x = torch.zeros((1, held, 2) if pooled else (held, 3, 2), dtype=torch.long)
    buffer.add(Candidates(x, x == 0, torch.zeros(x.shape[:2])))
    assert buffer.telling is tells


@pytest.mark.parametrize("typed, rounds", [("--ask_again 0", 1), ("--ask_again 1", 2), ("--ask_again 5", 3)])
def test_a_round_asks_again_while_nothing_differs(typed, rounds, make, monkeypatch):
    """Two rounds of equal scores, then different ones: all of them are kept, and the fit sees them."""
    run = make(f"{typed} --candidates 8 --reward_first 0", pooled=True)
    asked = []

    def prefer(batch, tokens, mask):
        asked.append(len(asked))
        worth = torch.arange(8.0) if len(asked) > 2 else torch.zeros(8)
        return worth[None]
    monkeypatch.setattr(run.task, "prefer", prefer)
    figures = train.reward_phase(run)
    assert len(asked) == rounds and figures["buffer"] == 7 * rounds and len(run.held_out) == rounds
    assert run.fitted.stands_out(0.0) == (rounds == 3)


def test_a_judge_that_never_differs_is_asked_again_before_the_first_fit_alone(make, monkeypatch):
    run, asked = make("--ask_again 3 --candidates 8 --reward_first 0 --reward_steps 0", pooled=True), []
    monkeypatch.setattr(run.task, "prefer", lambda *x: asked.append(1) or torch.zeros(1, 8))
    train.reward_phase(run)
    assert len(asked) == 4
    run.step = 20
    train.reward_phase(run)
    assert len(asked) == 5


SURE_OF_A = ((9.0, -9.0, 0.0),) * 3  # says A A A A and nothing else


@pytest.mark.parametrize("table, reward, preference, step, says", [
    (SURE_OF_A, (-1.0, 1.0, 0.0), (9.0, 1.0, 2.0), 5, True),   # B B A A is paid more
    (SURE_OF_A, (1.0, -1.0, 0.0), (9.0, 1.0, 2.0), 5, False),  # the reward still likes A best
    (((1.0, -1.0, 0.0),) * 3, (-1.0, 1.0, 0.0), (9.0, 1.0, 2.0), 5, False),  # in 6 of 10 samples alone
    (SURE_OF_A, (-1.0, 1.0, 0.0), (-2.0, -2.0, -2.0), 5, False),  # none of those asked about stands out
    (SURE_OF_A, (-1.0, 1.0, 0.0), (9.0, 9.0, 2.0), 5, False),     # it says one of the best
    (SURE_OF_A, (-1.0, 1.0, 0.0), (9.0, 1.0, 2.0), 16, False)])   # the step has fallen below a half
def test_a_policy_that_says_one_prompt_starts_anew_once_the_reward_pays_others(table, reward, preference,
                                                                               step, says, make):
    run = make("--resolution 3 --candidates 8 --reward_steps 0 --hold 10 --explore_from policy --explore 0",
               pooled=True, step=step)
    fill(run.policy, table), fill_reward(run.reward, reward)
    run.fitted.add(scored(*preference))
    optimizer, said = run.policy_optimizer, []
    run.log.say = said.append
    train.reward_phase(run)
    anew = table_of(run.policy) == table_of(run.start_policy)
    assert anew == says == (run.policy_optimizer is not optimizer) == bool(said)


@pytest.mark.parametrize("draw", [asked_about, lambda run: Candidates(*rolled(run)[1:], None)])
def test_top_k_keeps_the_most_likely_words(draw, make):
    drawn = lambda k: draw(make(f"--top_k {k} --explore 0", pooled=True)).tokens[0].tolist()
    found = lambda k: set(map(tuple, drawn(k)))
    assert found(1) == {(A, B, B, B)} and len(found(2)) > 5


def test_candidates_rollouts_inputs_and_fits_draw_from_streams_of_their_own(make):
    def moved(step):
        run = make("--candidates 8 --reward_first 2", pooled=False)
        before = {k: g.get_state() for k, g in run.generators.items()}
        step(run)
        return {k for k, g in run.generators.items() if not torch.equal(g.get_state(), before[k])}
    assert moved(asked_about) == {"candidates", "data"} and moved(rollout.rollout) == {"sample", "data"}
    assert moved(train.reward_phase) == {"candidates", "data", "fit"}
    first = [torch.rand(3, generator=g).tolist() for g in make().generators.values()]
    assert all(a != b for i, a in enumerate(first) for b in first[:i])


# -------------------------------------------------------------------------------------------------------- fit


GROUP = [A, END], [B, B, END], [A, B, A, END]
LIKED = [0.1, 0.9, 0.5]


def one_group(run, n=1):
    """The same three candidates in the buffer n times: whichever is drawn, the loss is theirs."""
    mask = mask_of(2, 3, 4, width=4)
    tokens = torch.tensor([x + [0] * (4 - len(x)) for x in GROUP])
    parts = tokens, mask, torch.tensor(LIKED)
    run.fitted.add(Candidates(*[x[None].repeat(n, *[1] * x.dim()) for x in parts]))
    return run


def group_scores(agg="avg", beta=2.0, of=bound):
    """E2 to E4 of GROUP on paper."""
    rewards = [torch.tensor([of(REWARD[y]) for y in x] + [0.0] * (4 - len(x))).double() for x in GROUP]
    mask = [[True] * len(x) + [False] * (4 - len(x)) for x in GROUP]
    return aggregate_by_loop(rewards, mask, agg, beta).tolist()


def group_loss(agg="avg", beta=2.0, of=bound):
    """E5 of GROUP on paper."""
    return rank_loss(group_scores(agg, beta, of), LIKED)


@pytest.mark.parametrize("flags, expected", [
    ("", group_loss()), ("--agg sum", group_loss("sum")), ("--agg min", group_loss("min")),
    ("--agg max --beta 0.5", group_loss("max", 0.5)), ("--agg max --beta 3", group_loss("max", 3.0)),
    ("--bound sigmoid", group_loss(of=lambda x: 1 / (1 + math.exp(-x)))),
    ("--dropout 0.5", group_loss(of=lambda x: bound(x / 2)))])  # a fit is training
def test_loss_of_the_fit_by_hand(flags, expected, make):
    run = one_group(make(flags))
    assert fit_reward(run, 1)["reward_loss"] == near(expected)


@pytest.mark.parametrize("temperature", [0.33, 1.0, 2.5])
def test_the_temperature_divides_scores_before_they_are_ranked_by_hand(temperature, make):
    scores = [x / temperature for x in group_scores("sum")]
    run = one_group(make(f"--rank_temperature {temperature} --agg sum"))
    assert fit_reward(run, 1)["reward_loss"] == near(rank_loss(scores, LIKED))


@pytest.mark.parametrize("ties", [0.0, 0.5, 3.0])
def test_what_a_tie_adds_to_the_loss_of_the_fit_by_hand(ties, make):
    """At a resolution of 1 the likings are 0, 1 and 0: the first and the last tie."""
    run = one_group(make(f"--ties {ties} --resolution 1 --agg sum"))
    scores = group_scores("sum")
    ranking = math.log(sum(map(math.exp, scores))) - scores[1]  # the second beats both others
    expected = ranking + ties * math.log(math.cosh((scores[0] - scores[2]) / 2))
    assert fit_reward(run, 1)["reward_loss"] == near(expected)


def distance(net, before):
    return math.sqrt(sum((p - q).square().sum().item() for p, q in zip(net.parameters(), before)))


def parameters(net):
    return [p.detach().clone() for p in net.parameters()]


def test_reward_lr_is_the_size_of_adams_first_step(make):
    for lr in (1e-3, 2e-2):
        run = one_group(make(f"--reward_lr {lr}"))
        before = parameters(run.reward)
        fit_reward(run, 1)
        moved = max((p - q).abs().max().item() for p, q in zip(run.reward.parameters(), before))
        assert moved == pytest.approx(lr, rel=0.01)


@pytest.mark.parametrize("share, body, lr", [(0, True, 1e-3), (1, False, 3e-3)])
def test_head_first_is_the_share_of_a_fit_in_which_its_body_stays(share, body, lr, make):
    run = one_group(make(f"--head_first {share} --reward_lr 1e-3"))
    before = parameters(run.reward.body)
    spy = Spy(run)
    fit_reward(run, 1, loss=spy)
    assert spy.seen[0].lr == pytest.approx(lr)
    fit_reward(run, 1)
    assert (distance(run.reward.body, before) > 0) == body


def test_the_gradient_of_the_fit_is_clipped(make):
    moved = {}
    for clip in (0.01, 1e9):
        run = one_group(make(f"--reward_lr 1 --clip {clip}", plain=True))
        before = parameters(run.reward)
        fit_reward(run, 1)
        moved[clip] = distance(run.reward, before)
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3) and moved[1e9] > 0.05


class Spy:
    """A loss that remembers what it was asked about and pulls on nothing."""

    def __init__(self, run):
        self.run, self.seen = run, []

    def __call__(self, reward, batch, subsets):
        self.seen.append(SimpleNamespace(batch=batch, subsets=subsets, training=reward.training,
                                         lr=self.run.reward_optimizer.param_groups[0]["lr"]))
        return 0.0 * reward(batch.tokens, batch.prefix()).sum() + 1.0


def test_reward_batch_and_K_are_the_groups_of_a_step(make):
    run = make("--K 3 --reward_batch 5 --candidates 64", pooled=True)
    train.reward_phase(run)
    spy = Spy(run)
    fit_reward(run, 1, loss=spy)
    assert spy.seen[-2].subsets.shape == (5, 3)  # the last look is at held-out candidates
    run = one_group(make("--reward_batch 2"), n=6)
    spy = Spy(run)
    fit_reward(run, 1, loss=spy)
    assert spy.seen[0].batch.tokens.shape == (2, 3, 4)


@pytest.mark.parametrize("resolution, levels", [(0, [0.1, 0.9, 0.5]), (0.1, [1, 9, 5]), (0.7, [0, 1, 1])])
def test_resolution_rounds_what_the_fit_compares(resolution, levels, make):
    run = one_group(make(f"--resolution {resolution}"))
    spy = Spy(run)
    fit_reward(run, 1, loss=spy)
    assert spy.seen[0].batch.preference.tolist()[0] == near(levels)


def test_patience_ends_a_fit_and_the_learning_rate_is_as_before(make):
    for patience in (2, 9):
        run = make(f"--patience {patience} --reward_lr 0.01", rows=1)
        run.held_out.add(one_group(run).fitted.data)
        spy = Spy(run)
        assert fit_reward(run, 500, loss=spy)["reward_fit_steps"] == 10 * patience
        assert run.reward_optimizer.param_groups[0]["lr"] == 0.01
        if patience == 9:
            assert min(x.lr for x in spy.seen) < 0.01  # it fell on the way


def test_held_out_candidates_are_looked_at_in_eval_mode_and_the_best_weights_stay(make):
    run = make("--reward_lr 0.05")
    run.held_out.add(one_group(run).fitted.data)
    start, modes = parameters(run.reward), []

    def loss(reward, batch, subsets):  # training leads away from the start, where the held-out loss is lowest
        modes.append(reward.training)
        gone = sum((p - q).square().sum() for p, q in zip(reward.parameters(), start))
        return gone + reward(batch.tokens, batch.prefix()).sum() if reward.training else gone
    figures = fit_reward(run, 25, loss=loss)
    assert figures["reward_held_loss"] == 0 and distance(run.reward, start) == 0
    assert modes.count(True) == 25 and modes.count(False) >= 4


def numbers(x):
    """Preferences of Candidates as a set: no two candidates of the stub have the same."""
    return set() if x is None else {round(p, 3) for p in x.preference.flatten().tolist()}


@pytest.mark.parametrize("pooled", [True, False])
def test_held_out_candidates_are_never_fitted_nor_fitted_ones_held_out(pooled, make):
    run = make("--candidates 24 --explore 0 --reward_first 3", pooled=pooled)
    for start in (0, 10):
        run.step = start
        figures = train.reward_phase(run)
    fitted, held = numbers(run.fitted.data), numbers(run.held_out.data)
    assert not fitted & held and len(held) > 0
    assert (48 / 8 <= len(run.held_out) <= 48 / 4
            and len(run.fitted) == 48 - len(run.held_out) == figures["buffer"])


def test_a_small_round_holds_out_one(make):
    run = make("--candidates 4 --explore 0", pooled=True)
    train.reward_phase(run)
    assert (len(run.fitted), len(run.held_out)) == (3, 1)


def test_a_fit_reads_only_what_may_be_fitted(make):
    run = make("--candidates 64 --explore 0", pooled=True)
    train.reward_phase(run)
    spy = Spy(run)
    fit_reward(run, 30, loss=spy)
    words = lambda x: set(map(tuple, x.tokens[0].tolist()))
    assert all(words(x.batch) <= words(run.fitted.data if x.training else run.held_out.data)
               for x in spy.seen)
    assert any(x.training for x in spy.seen) and any(not x.training for x in spy.seen)


def test_replay_is_the_size_of_the_buffer(make):
    run = make("--replay 30 --candidates 24 --explore 0", pooled=True)
    train.reward_phase(run)
    first = numbers(run.fitted.data)
    run.step = 10
    train.reward_phase(run)
    assert len(run.fitted) == 30
    assert len(first - numbers(run.fitted.data)) == 21 + 21 - 30  # the oldest are gone


def test_without_replay_every_step_of_the_fit_asks_again(make):
    run = make("--replay 0 --candidates 8 --explore 0 --reward_first 5", pooled=True)
    train.reward_phase(run)
    assert run.task.queries == 8 * (1 + 5)


@pytest.mark.parametrize("step, steps", [(0, 3), (10, 2)])
def test_reward_first_and_reward_steps_are_steps_of_the_fit(step, steps, make):
    run = make("--reward_first 3 --reward_steps 2 --candidates 8", step=step)
    assert train.reward_phase(run)["reward_fit_steps"] == steps


@pytest.mark.parametrize("agg, score", [("avg", mean), ("sum", sum)])
def test_rank_accuracy_is_that_of_the_reward_before_it_has_seen_the_candidates(agg, score, make):
    run = make(f"--agg {agg} --candidates 40 --K 3 --reward_first 100 --reward_lr 0.05 --resolution 0.1")
    wrong = [-x for x in REWARD]
    fill_reward(run.reward, wrong)
    figures = train.reward_phase(run)
    x = run.latest
    groups = [[t[m].tolist() for t, m in zip(*both)] for both in zip(x.tokens, x.mask)]
    liked = [[round(p / 0.1) for p in row] for row in x.preference.tolist()]
    assert figures["rank_accuracy"] == near(accuracy_by_hand(groups, liked, wrong, score))
    right, pairs = train.rank_accuracy(run.reward, x, agg, 2.0, 0.1)
    assert figures["rank_accuracy"] < 0.5 and right / pairs > 0.6  # a fit changes much
    assert figures["preference"].item() == near(mean(p for row in x.preference.tolist() for p in row))
    assert figures["preference_best"].item() == near(max(p for row in x.preference.tolist() for p in row))


def test_annotated_pairs_teach_no_reward_that_nobody_reads(make):
    run = make("--objective mle --reward_first 5", pairs=True)
    before = parameters(run.reward)
    assert train.reward_phase(run) == {} and run.fitted.data is None and distance(run.reward, before) == 0


@pytest.mark.parametrize("flags", ["--objective mle", "--objective reinforce --guidance bandit"])
def test_without_a_learned_reward_there_is_nothing_to_fit(flags, make):
    run = make(flags + " --reward_first 5")
    before = parameters(run.reward)
    assert train.reward_phase(run) == {} and run.task.queries == 0
    assert distance(run.reward, before) == 0 and run.fitted.data is None


# ------------------------------------------------------------------------------------------------------ edits


def cross_entropy(x, target):
    p = 1 / (1 + math.exp(-x))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def edit_loss():
    """E17 of the same two answers: A was taken out, B put in, END kept."""
    changed = cross_entropy(REWARD[A], 0), cross_entropy(REWARD[B], 1)
    return mean(changed) + 0.1 * cross_entropy(REWARD[END], 0.5)


def pair_loss():
    """E6 of [A, END] against [B, END], the better: both have two tokens, so T_bar is 2."""
    a, b = [mean(bound(REWARD[y]) for y in ids) * 2 for ids in ([A, END], [B, END])]
    return math.log(1 + math.exp(a - b))


@pytest.mark.parametrize("guidance, expected", [
    ("edits", edit_loss()),
    ("token", pair_loss()), ("segment --segment_entropy 0", pair_loss()),
    ("bandit", math.log(2))])  # read at END alone, which both answers have
def test_loss_of_the_fit_to_edits_by_hand(guidance, expected, make):
    run = make(f"--guidance {guidance} --reward_first 1 --agg avg", pairs=True, kinds=1)
    assert train.reward_phase(run)["reward_loss"] == near(expected)


def test_held_out_edits_are_never_fitted_and_none_is_lost(make):
    run = make("--reward_first 2 --replay 3", pairs=True, answers=40)
    figures = train.reward_phase(run)
    fitted, held = numbers(run.fitted.data), numbers(run.held_out.data)
    assert 80 / 8 <= len(held) <= 80 / 4 and not fitted & held
    assert len(fitted) == 80 - len(held) == 2 * figures["buffer"]  # two answers a row, and none is lost
    run.step = 100
    assert train.reward_phase(run) == {}  # they were annotated beforehand: there is one round


def test_a_kept_reward_is_the_one_that_was_fitted(make):
    runs = [make("--reward_first 4", pairs=True) for _ in range(2)]
    figures = [train.reward_phase(run) for run in runs]
    assert figures[0] == figures[1] and distance(runs[0].reward, parameters(runs[1].reward)) == 0
    assert torch.equal(*[run.generators["fit"].get_state() for run in runs])


def test_segments_end_where_the_start_finds_the_next_token_hard(make):
    """E11 on paper: the entropy of the starting policy's state that has READ the token."""
    run = make("--guidance segment --segment_entropy 1.03", pairs=True)
    x = run.task.pairs("train")
    got = answer_ends(run, *x[:2], x[3:5])
    some, others = 0, 0
    for n, (context, ids) in enumerate(rows_of(Candidates(*x[:5]))):
        z = [log_softmax(logits(START, context, y)) for y in ids]
        hard = [-sum(math.exp(p) * p for p in row) >= 1.03 for row in z[:-1]] + [True]  # the last ends one
        assert got[n // 2, n % 2, :len(ids)].tolist() == hard and not got[n // 2, n % 2, len(ids):].any()
        some, others = some + sum(hard[:-1]), others + len(hard) - 1 - sum(hard[:-1])
    assert some > 10 and others > 10


# ------------------------------------------------------------------------------------------------ warm starts


def test_policy_and_body_start_from_the_same_imitation(make):
    run = make("--sft_steps 1 --sft_lr 0.5 --sft_batch 8 --dropout 0.5", rows=1)  # one context, one reference
    fill(run.policy, POLICY)
    warm_starts(run)
    half = [[0.5 * w for w in row] for row in POLICY]  # the context's pull is halved too, the signs stay
    _, grad = loss_and_gradient(half, [([A], [A, B, END])], [[1, 1, 1]], [[0, 0, 0]])
    for net in (run.policy, run.reward.body, run.start_policy):
        for row, old, g in zip(table_of(net), POLICY, grad):  # Adam's first step: a 50th of the rate, by sign
            assert row == near([w - 0.5 / 50 * math.copysign(1, x) if x else w for w, x in zip(old, g)])


def test_imitation_finds_the_references_and_is_kept(make):
    runs = [make("--sft_steps 150 --sft_lr 0.1 --sft_batch 8", rows=1) for _ in range(2)]
    for run in runs:
        fill(run.policy, POLICY), warm_starts(run)
    loss, _ = loss_and_gradient(table_of(runs[0].policy), [([A], [A, B, END])], [[1, 1, 1]], [[0, 0, 0]])
    assert loss < 0.2
    assert all(table_of(net) == table_of(runs[0].policy) for run in runs
               for net in (run.policy, run.reward.body))


def test_without_references_the_body_alone_reads_the_worlds_text(make):
    says = lambda net: loss_and_gradient(table_of(net), [([], [A, B, END])], [[1, 1, 1]], [[0, 0, 0]])[0]

    def warmed(guidance):
        run = make(f"--reward_warmup 60 --guidance {guidance}", pooled=True, rows=1)
        run.task.has_references = False
        fill(run.reward.body, POLICY)
        warm_starts(run)
        assert table_of(run.policy) == table_of(make().policy)
        return run.reward.body
    first, kept, without = warmed("token"), warmed("token"), warmed("bandit")
    assert says(first) < says(without) - 0.1 and table_of(kept) == table_of(first)
    assert table_of(without) == [near(row) for row in POLICY]
