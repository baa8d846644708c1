"""How the second half of a round is joined: guide, shape, policy step, rollout, experience, by hand.

On the world of stubs.py each update is done again on paper: log-probs, weights, the loss, its gradient, the
clipped step, number by number. SGD stands in for Adam, so that an update is the gradient times the rate.
"""
import functools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from stubs import (A, B, END, POLICY, REWARD, START, bound, clipped, deviation, down, entropy, fill_reward,
                   log_probs, logits, loss_and_gradient, mean, norm_of, peek, rolled, rows_of, sequences,
                   stub_run, table_of, value_of, z_scores)

import data
import objective
import rollout
import train
from evaluate import shown_weights
from objective import learn_from_rollout, policy_batch, settling, warmth
from rollout import dense_rewards, first_rewards, first_states, renew_normalizer
from support.log import UserError

near = lambda x: pytest.approx(x, rel=2e-4, abs=2e-6)


@pytest.fixture
def make(monkeypatch, tmp_path):
    return lambda *typed, **more: stub_run(monkeypatch, tmp_path, *typed, **{"plain": True} | more)


def near_rows(got, expected):
    """Nested lists of numbers, row by row."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a == near(b)


# -------------------------------------------------------------------------------------------- REINFORCE, WMLE


def shaped(rewards, how):
    """What each token of a sequence answers for."""
    n = len(rewards)
    return {"immediate": rewards, "sequence": [mean(rewards)] * n,
            "to_go": [sum(rewards[t:]) for t in range(n)],
            "mean_to_go": [mean(rewards[t:]) for t in range(n)],
            "both": [rewards[t] * mean(rewards[t:]) for t in range(n)]}[how]


def centred(rows):
    """Zero mean and unit deviation over all tokens, small deviations not blown up."""
    every = [x for row in rows for x in row]
    return [[(x - mean(every)) / max(deviation(every), 0.3) for x in row] for row in rows]


def check_update(run, figures, rows, a, b, n_ids=3, share=1.0, shrink=1.0):
    """Loss, gradient norm and new table against the sum over tokens of E7 to E9 with weights a and b."""
    small = [[w * shrink for w in row] for row in POLICY]
    assert shrink == 1 or all(context == [] for context, _ in rows)
    loss, grad = loss_and_gradient(small, rows, a, b, n_ids)
    grad = [[g * shrink for g in row] for row in grad]
    assert figures["loss"].item() == near(loss) and figures["grad_norm"].item() == near(norm_of(grad))
    step = run.c.lr * share * clipped(norm_of(grad), run.c.clip)
    near_rows(table_of(run.policy), down(POLICY, grad, step))
    assert all(g["lr"] == near(run.c.lr * share * g.get("times", 1))
               for g in run.policy_optimizer.param_groups)


def after_guidance(run):
    """The sequences that the next policy step learns from, with their rewards before shaping."""
    batch, tokens, mask, rewards = peek(run, policy_batch)
    assert not rewards.requires_grad and tokens.shape[-1] == mask.sum(-1).max()
    rows = rows_of(batch, tokens, mask)
    assert all(set(ids[:-1]) <= {A, B} for _, ids in rows) and len({tuple(c) for c, _ in rows}) > 1
    return rows, [r[m].tolist() for r, m in zip(rewards.flatten(0, 1), mask.flatten(0, 1))]


def lr_and_alpha(c, step=7):
    """The shares of --lr and --alpha that are left at an update, by hand: with --hold 4 a quarter of the
    first, and of the second the half that stays."""
    return (2 - step / 4, 0.5) if c.hold else (1.0, 1.0)


@pytest.mark.parametrize("flags", [
    "", "--weights to_go", "--weights mean_to_go", "--weights sequence", "--no-center", "--alpha 0.4",
    "--alpha 0.4 --hold 4", "--lr 0.3", "--clip 0.01", "--bound sigmoid", "--kl 0", "--kl 2",
    "--kl 2 --weights to_go"])
def test_reinforce_by_hand(flags, make):
    run = make(f"--objective reinforce --weights immediate --alpha 0 --lr 1 --batch_size 24 {flags}", step=7)
    c = run.c
    rows, rewards = after_guidance(run)
    of = bound if c.bound == "softplus" else lambda x: 1 / (1 + math.exp(-x))
    near_rows(rewards, [[of(REWARD[y]) for y in ids] for _, ids in rows])
    away = [[a - b for a, b in zip(log_probs(POLICY, *row), log_probs(START, *row))] for row in rows]
    # a nat away from the start costs --kl
    paid = [[r - c.kl * x for r, x in zip(*row)] for row in zip(rewards, away)]
    weights = [shaped(row, c.weights) for row in paid]
    weights = centred(weights) if c.center else weights
    tokens = sum(map(len, rewards))  # E7: a mean over the tokens of the batch
    share, warm = lr_and_alpha(c)
    before = [p.clone() for p in run.reward.parameters()]
    figures = run.objective.step(run)
    check_update(run, figures, rows, [[w / tokens for w in row] for row in weights],
                 [[c.alpha * warm / tokens for _ in row] for row in weights], share=share)
    assert (("kl" in figures) == (c.kl > 0)
            and (not c.kl or figures["kl"].item() == near(mean(map(mean, away)))))
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(run.reward.parameters(), before))


def test_a_pooled_policy_step_by_hand(make):
    """Only words can be said: the softmax runs over the two ids that may be sampled."""
    run = make("--alpha 0.2 --weights to_go --batch_size 24 --lr 1", pooled=True)
    batch, tokens, mask, rewards = peek(run, policy_batch)
    rows, weights = rows_of(batch, tokens, mask), centred([shaped(row,
                                                                  "to_go") for row in rewards[0].tolist()])
    assert tokens.shape == (1, 24, 4)
    n = 24 * 4
    check_update(run, run.objective.step(run), rows, [[w / n for w in row] for row in weights],
                 [[0.2 / n] * 4] * 24, n_ids=2)


@pytest.mark.parametrize("flags", ["", "--no-center", "--micro_batch 5", "--hold 4"])
def test_the_first_place_of_prompts_is_learned_from_every_word(flags, make):
    """A word at the first place counts as often as the policy says it, not as it was drawn: samples weigh
    nothing there, and both words what they are likely."""
    run = make(f"--exact_first --alpha 0.2 --batch_size 24 --lr 1 {flags}", pooled=True, step=7)
    batch, tokens, mask, rewards = peek(run, policy_batch)
    rows, rewards, n = rows_of(batch, tokens, mask), rewards[0].tolist(), 24 * 4
    every = [x for row in rewards for x in row]
    middle, spread = (mean(every), max(deviation(every), 0.3)) if run.c.center else (0.0, 1.0)
    scaled = lambda x: (x - middle) / spread
    weights = [[0.0, *map(scaled, row[1:])] for row in rewards]
    share, warm = lr_and_alpha(run.c)
    # n tokens in the batch, 24 of them at the first place
    paid = [scaled(bound(REWARD[word])) * math.exp(log_probs(POLICY, [], [word], 2)[0]) * 24 / n
            for word in (A, B)]
    a = [[w / n for w in row] for row in weights] + [[x] for x in paid]
    b = [[0.2 * warm / n] * 4] * 24 + [[0.0]] * 2
    loss, grad = loss_and_gradient(POLICY, rows, a[:24], b[:24], 2)
    _, first = loss_and_gradient(POLICY, [([], [A]), ([], [B])], a[24:], b[24:], 2)
    figures = run.objective.step(run)
    grad = [[x + y for x, y in zip(*pair)] for pair in zip(grad, first)]
    assert figures["loss"].item() == near(loss - sum(paid))
    near_rows(table_of(run.policy), down(POLICY, grad, run.c.lr * share))


def test_the_words_of_the_first_place_are_read_again_after_a_fit(make):
    run = make("--exact_first --candidates 12 --reward_first 3 --reward_steps 3 --reward_lr 0.5", pooled=True)
    before, states = [bound(REWARD[word]) for word in (A, B)], first_states(run)
    assert first_rewards(run).tolist() == near(before) and first_rewards(run) is first_rewards(run)
    assert torch.equal(first_states(run), states)
    train.reward_phase(run)
    assert not torch.equal(first_states(run), states)
    after = run.reward.guide(torch.tensor([[[A], [B]]]))[0, :, 0].tolist()
    assert first_rewards(run).tolist() == near(after) and after != near(before)


def test_a_vocabulary_that_does_not_fit_is_read_in_parts(make, monkeypatch):
    run, seen = make("--exact_first", pooled=True), []
    whole, guide = first_rewards(run).tolist(), run.reward.guide
    look = lambda tokens, prefix: seen.append(tokens) or guide(tokens, prefix)
    monkeypatch.setattr(run.reward, "guide", look)
    monkeypatch.setattr(rollout, "every_word", functools.partial(data.every_word, at_once=1))
    run.first_place.clear()
    assert first_rewards(run).tolist() == near(whole) and [x.tolist() for x in seen] == [[[[A]]], [[[B]]]]
    behind = data.every_word(torch.tensor([7, 3]), 5, at_once=2)
    assert [x.tolist() for x in behind] == [[[[7, 3, 0], [7, 3, 1]]], [[[7, 3, 2], [7, 3, 3]]], [[[7, 3, 4]]]]


@pytest.mark.parametrize("flags, more", [
    ("--no-exact_first", {"pooled": True}), ("--weights to_go", {"pooled": True}),
    ("--guidance bandit", {"pooled": True}), ("--objective ppo", {"pooled": True}),
    ("--guidance abc", {"pooled": True}),  # a word's share of the score hangs on the words behind it
    ("--objective reinforce", {}), ("--objective wmle", {})])
def test_samples_alone_teach_where_not_all_begin_alike_or_a_word_is_paid_for_others(flags, more, make):
    run = make(flags, **more)
    run.c.exact_first = run.c.exact_first or "--no-exact_first" not in flags
    assert not run.exact_first and make("", pooled=True).exact_first


def test_no_weight_is_shown_at_a_first_place_that_is_learned_without_samples(make):
    shown = SimpleNamespace(mask=torch.ones(1, 2, 3, dtype=torch.bool))
    rewards = torch.tensor([[[0.5, 1.0, 0.25], [1.25, 0.75, 0.5]]])
    for flag, first in (("--exact_first", [0.0, 0.0]), ("--no-exact_first", [0.5, 1.25])):
        run = make(f"{flag} --no-center --weights immediate", pooled=True)
        weights = shown_weights(run, shown, rewards, None)
        assert weights[0, :, 0].tolist() == first and torch.equal(weights[..., 1:], rewards[..., 1:])


def test_bandit_guidance_pays_the_z_scored_preference_at_every_token(make):
    run, told = make("--objective reinforce --guidance bandit --weights to_go --alpha 0 --lr 1 "
                     "--batch_size 12 --group_size 2"), []
    run.task.told = lambda tokens, preference: told.append(preference)
    rows, rewards = after_guidance(run)
    liked = told[0].flatten().tolist()
    expected = [[z for _ in ids] for z, (_, ids) in zip(z_scores(liked), rows)]
    near_rows(rewards, expected)
    tokens = sum(map(len, rewards))
    check_update(run, run.objective.step(run), rows, [[w / tokens for w in row] for row in expected],
                 [[0.0] * len(row) for row in rewards])  # whatever --weights and --center say


@pytest.mark.parametrize("flags", [
    "--weights immediate", "--weights to_go", "--weights mean_to_go", "--weights both", "--weights sequence",
    "--wmle_norm rewards",
    "--wmle_norm rewards --weights to_go", "--lr 0.2", "--clip 0.01", "--hold 4", "--alpha 0.5",
    "--objective mle --weights immediate"])
def test_weighted_mle_by_hand(flags, make):
    run = make(f"--objective wmle --batch_size 8 --lr 1 {flags}", step=7)
    c = run.c
    rows, rewards = after_guidance(run)
    near_rows(rewards, [[1.0 if c.objective == "mle" else bound(REWARD[y]) for y in ids] for _, ids in rows])
    weights = [shaped(row, c.weights) for row in rewards]
    total = [sum(row) if c.wmle_norm == "rewards" else len(row) for row in weights]  # E9: a mean per sequence
    weights = [[w / t / len(rows) for w in row] for row, t in zip(weights, total)]
    check_update(run, run.objective.step(run), rows, weights, [[0.0] * len(row) for row in weights],
                 share=lr_and_alpha(c)[0])


def test_the_update_is_training_and_the_guide_is_not(make):
    run = make("--batch_size 24 --lr 1 --alpha 0 --dropout 0.5 --weights immediate --no-center "
               "--no-exact_first", pooled=True)
    run.policy.train(), run.reward.train()
    batch, tokens, mask, rewards = peek(run, policy_batch)
    near_rows(rewards[0].tolist(), [[bound(REWARD[y]) for y in row] for row in tokens[0].tolist()])
    n = 24 * 4
    rows, weights = rows_of(batch, tokens, mask), [[r / n for r in row] for row in rewards[0].tolist()]
    check_update(run, run.objective.step(run), rows, weights, [[0.0] * 4] * 24, n_ids=2, shrink=0.5)


@pytest.mark.parametrize("step, share, warm", [(0, 1, 1), (4, 1, 1), (5, 0.75, 0.75), (6, 0.5, 0.5),
                                               (7, 0.25, 0.5), (8, 0, 0.5), (9, 0, 0.5)])
def test_hold_is_the_updates_before_lr_and_alpha_fall(step, share, warm, make):
    run = make("--hold 4", step=step)
    assert (settling(run), warmth(run)) == (share, warm)
    run = make("--hold 0", step=step)
    assert (settling(run), warmth(run)) == (1, 1)


# -------------------------------------------------------------------------------------------------------- PPO


def line_by_hand(rewards):
    """E13: per place the mean and the deviation of the rewards, each a straight line in log p, by counts."""
    at = {}
    for row in rewards:
        for i, r in enumerate(row):
            at.setdefault(round((i + 1) / len(row), 3), []).append(r)
    x, n = [math.log(p) for p in at], [len(v) for v in at.values()]

    def straight(y):
        mx, my = sum(a * b for a, b in zip(n, x)) / sum(n), sum(a * b for a, b in zip(n, y)) / sum(n)
        var = sum(a * (b - mx) ** 2 for a, b in zip(n, x))
        slope = sum(a * (b - mx) * (d - my) for a, b, d in zip(n, x, y)) / var
        return slope, my - slope * mx
    floor = 0.1 * deviation([r for row in rewards for r in row])
    return *straight([mean(v) for v in at.values()]), *straight([deviation(v) for v in at.values()]), floor


def test_the_normaliser_is_of_the_fitted_reward_on_the_fitted_candidates(make):
    run = make("--objective ppo --candidates 40 --K 2 --reward_first 3 --reward_lr 0.05 --dropout 0.3")
    train.reward_phase(run)
    fill_reward(run.reward)
    run.reward.train()
    renew_normalizer(run)
    x = run.fitted.data
    expected = line_by_hand([[bound(REWARD[y]) for y in ids] for _, ids in rows_of(x)])
    assert run.normalizer.tolist() == near(expected) and abs(expected[0]) > 0.01


def test_the_normaliser_is_renewed_after_a_fit_of_ppo_alone(make):
    run = make("--objective ppo --candidates 8 --reward_first 2")
    train.reward_phase(run)
    fitted = run.normalizer.clone()
    renew_normalizer(run)
    assert torch.equal(run.normalizer, fitted)
    other = make("--objective reinforce --candidates 8 --reward_first 2")
    train.reward_phase(other)
    assert other.normalizer is None


LINE = 0.2, 0.6, -0.1, 0.5, 0.05


def paid(ids, hard, line=LINE):
    """E13 and E14: rewards read where `hard` says, normalised by place, in equal parts on the segment."""
    ends = [t for t in range(len(ids)) if hard[t]]
    out, begin = [], 0
    for i, t in enumerate(ends):
        log_p = math.log((i + 1) / len(ends))
        r = (bound(REWARD[ids[t]]) - line[0] * log_p - line[1]) / max(line[2] * log_p + line[3], line[4])
        n = t + 1 - begin
        out += [r / n] * n if len(ends) > 1 else [0.0] * (n - 1) + [r]
        begin = t + 1
    return out


# After A the start's entropy is 1.057 behind the longest context, 1.078 and more behind the others.
@pytest.mark.parametrize("guidance", ["token", "edits", "segment --segment_entropy 1.07", "bandit"])
def test_dense_rewards_by_hand(guidance, make):
    run = make(f"--objective ppo --guidance {guidance} --batch_size 20 --dropout 0.5", pairs=True)
    run.normalizer = torch.tensor(LINE)
    run.reward.train(), run.policy.train()
    batch, tokens, mask = rolled(run)
    got = dense_rewards(run, batch, tokens, mask)[0].flatten(0, 1)
    kinds = set()
    for (context, ids), row in zip(rows_of(batch, tokens, mask), got.tolist()):
        after = [entropy(logits(START, context, y)) for y in ids[:-1]]
        always = {"token": True, "edits": True, "bandit": False}
        hard = [always.get(guidance, h >= 1.07) for h in after] + [True]
        assert row[:len(ids)] == near(paid(ids, hard)) and not any(row[len(ids):])
        kinds.add((sum(hard) > 1, sum(hard) < len(ids)))
    assert guidance[:7] != "segment" or (True, True) in kinds


def test_bandit_ppo_of_a_task_that_can_be_asked_pays_the_z_scored_preference_at_the_end(make):
    run = make("--objective ppo --guidance bandit --batch_size 20")
    batch, tokens, mask = rolled(run)
    got = dense_rewards(run, batch, tokens, mask)[0].flatten(0, 1).tolist()
    rows = rows_of(batch, tokens, mask)
    liked = [sum((-0.5, 1.0, 0.0)[y] for y in ids) + 0.001 * n for n, (_, ids) in enumerate(rows)]
    assert run.task.queries == 20
    for (_, ids), z, row in zip(rows, z_scores(liked), got):
        assert row == near([0.0] * (len(ids) - 1) + [z] + [0.0] * (len(row) - len(ids)))


@pytest.mark.parametrize("answer, says", [
    (lambda mask: mask.sum(-1), "torch.int64 of shape (20, 1)"),
    (lambda mask: mask.sum(-1) * float("nan"), "some that are not finite")])
def test_bandit_ppo_names_a_preference_that_is_none(answer, says, make):
    run = make("--objective ppo --guidance bandit --batch_size 20")
    batch, tokens, mask = rolled(run)
    run.task.prefer = lambda batch, tokens, mask: answer(mask)
    expected = re.escape(f"expected finite floats of shape (B, K) = (20, 1), got {says}")
    with pytest.raises(UserError, match=expected):
        dense_rewards(run, batch, tokens, mask)


def ready(make, flags, **more):
    run = make(f"--objective ppo --batch_size 12 --minibatches 1 --alpha 0 --lr 0.1 {flags}", **more)
    run.normalizer = torch.tensor(LINE)
    return run


V, V0 = [0.3, -0.2, 0.5], 0.1  # the critic that stub_run gives a run


def lesson_by_hand(rows, c):
    """E14 and E15 of a rollout under token guidance: old log-probs, values, returns, whitened advantages."""
    old = [log_probs(POLICY, *row) for row in rows]
    start = [log_probs(START, *row) for row in rows]  # the KL is measured from where the policy began
    values = [value_of(V, V0, POLICY, *row) for row in rows]
    advantage, returns, paid_rows = [], [], []
    for (_, ids), lp, lp0, v in zip(rows, old, start, values):
        r = [max(-10, min(10, x)) - c.kl * (a - b) for x, a, b in zip(paid(ids, [True] * len(ids)), lp, lp0)]
        running, adv = 0.0, []
        for t in reversed(range(len(ids))):
            running = r[t] + c.gamma * (v + [0.0])[t + 1] - v[t] + c.gamma * c.lam * running
            adv.insert(0, running)
        advantage.append(adv), returns.append([a + b for a, b in zip(adv, v)]), paid_rows.append(r)
    every = [x for row in advantage for x in row]
    white = [[(x - mean(every)) / deviation(every) for x in row] for row in advantage]
    away = mean(mean(a - b for a, b in zip(*x)) for x in zip(old, start))
    return dict(old=old, values=values, returns=returns, advantage=white), {
        "kl": away, "reward": mean(map(mean, paid_rows)),
        "reward_learned": mean(map(mean, paid_rows)) + c.kl * away,
        "return": mean(map(sum, paid_rows)), "length": mean(len(ids) for _, ids in rows)}


@pytest.mark.parametrize("flags", [
    "", "--kl 0", "--kl 2", "--gamma 0.7 --lam 0.95", "--gamma 0.95 --lam 0.4", "--lam 1"])
def test_experience_by_hand(flags, make):
    run = ready(make, flags)
    run.policy.train()
    lesson, prefix, figures = peek(run, learn_from_rollout)
    batch, tokens, mask = peek(run, rolled)
    assert torch.equal(lesson["tokens"], tokens[:, 0]) and torch.equal(lesson["mask"], mask[:, 0])
    rows = rows_of(batch, tokens, mask)
    assert all(ids[-1] == END for _, ids in rows), "this test is about answers that end"
    assert rows == sequences(lesson["tokens"], lesson["mask"], *prefix)
    expected, said = lesson_by_hand(rows, run.c)
    for name, want in expected.items():
        near_rows([x[m].tolist() for x, m in zip(lesson[name], lesson["mask"])], want)
        assert not lesson[name].requires_grad
    for name, want in said.items():
        assert figures[name].item() == near(want), name


def ppo_by_hand(rows, lesson, table, critic, c, share=1.0, warm=1.0):
    """One update on these sequences, E16: (loss, value loss, new table, new critic, gradient norm)."""
    a, loss, value_loss, gv, gb = [], 0.0, 0.0, [0.0] * 3, 0.0
    parts = [lesson[k] for k in ("old", "advantage", "values", "returns")]
    for (context, ids), old, adv, v0, ret in zip(rows, *parts):
        w = 1 / len(ids) / len(rows)  # a mean over each sequence, then over sequences
        now = log_probs(table, context, ids)
        ratio, row = [math.exp(x - y) for x, y in zip(now, old)], []
        for r, x in zip(ratio, adv):
            held = max(1 - c.ppo_clip, min(1 + c.ppo_clip, r))
            loss -= w * min(r * x, held * x)
            row.append(w * r * x if r * x <= held * x else 0.0)
        a.append(row)
        for before, v, r in zip([END] + ids, v0, ret):
            state = logits(table, context, before)
            new = sum(p * q for p, q in zip(critic[0], state)) + critic[1]
            near_old = v + max(-c.value_clip, min(c.value_clip, new - v))
            value_loss += 0.5 * w * max((new - r) ** 2, (near_old - r) ** 2)
            moves = (new - r) ** 2 >= (near_old - r) ** 2  # a constant where it is held
            slope = w * (new - r) if moves else 0.0
            gv, gb = [g + 0.5 * slope * x for g, x in zip(gv, state)], gb + 0.5 * slope
    b = [[c.alpha * warm / len(ids) / len(rows)] * len(ids) for _, ids in rows]
    bonus = sum(x * entropy(logits(table, context, before)) for (context, ids), row in zip(rows, b)
                for before, x in zip([END] + ids, row))
    _, grad = loss_and_gradient(table, rows, a, b)
    norm = norm_of(grad, gv, gb)
    lr = c.lr * share * clipped(norm, c.clip)
    critic = [w - 10 * lr * g for w, g in zip(critic[0], gv)], critic[1] - 10 * lr * gb
    return loss - bonus, value_loss, down(table, grad, lr), critic, norm


@pytest.mark.parametrize("flags", [
    "", "--epochs 3", "--epochs 3 --ppo_clip 0.02", "--epochs 3 --value_clip 0.01", "--alpha 0.3",
    "--alpha 0.3 --hold 4", "--clip 0.05", "--epochs 2 --lr 0.5", "--kl 1 --gamma 0.8"])
def test_ppo_updates_by_hand(flags, make):
    run = ready(make, flags, step=7)
    c = run.c
    rows = rows_of(*peek(run, rolled))
    lesson, _ = lesson_by_hand(rows, c)
    table, critic, losses, shares = POLICY, (V, V0), [], lr_and_alpha(c)
    for _ in range(c.epochs):
        loss, value_loss, table, critic, norm = ppo_by_hand(rows, lesson, table, critic, c, *shares)
        losses.append((loss, value_loss, norm))
    figures = run.objective.step(run)
    for name, want in zip(("loss", "value_loss", "grad_norm"), zip(*losses)):
        assert figures[name].item() == pytest.approx(mean(want), rel=1e-3, abs=1e-5), name
    for got, want in zip(table_of(run.policy) + run.value.weight.tolist(), table + [critic[0]]):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-5)
    assert run.value.bias.item() == pytest.approx(critic[1], rel=1e-3)


def test_minibatches_share_a_rollout_and_every_answer_is_in_one(make, monkeypatch):
    run, seen = ready(make, "--minibatches 4 --epochs 3"), []
    whole = peek(run, learn_from_rollout)[0]
    update = objective.ppo_update

    def spy(run, prefix, **part):
        seen.append((prefix, part))
        return update(run, prefix, **part)
    monkeypatch.setattr(objective, "ppo_update", spy)
    run.objective.step(run)
    assert [len(part["tokens"]) for _, part in seen] == [3] * 12
    epoch = lambda i, name: torch.cat([part[name] for _, part in seen[4 * i:4 * i + 4]])
    order = lambda i: epoch(i, "advantage").sum(1).argsort()
    for i in range(3):
        for name in whole:
            assert torch.equal(epoch(i, name)[order(i)], whole[name][whole["advantage"].sum(1).argsort()])
    assert not torch.equal(epoch(0, "advantage"), epoch(1, "advantage"))  # shuffled anew
    for prefix, part in seen:  # the answers go with their prompts
        for row, old in zip(sequences(part["tokens"], part["mask"], *prefix), part["old"].tolist()):
            assert old[:len(row[1])] == near(log_probs(POLICY, *row))


def test_the_first_policy_stays_as_it_was_and_the_critic_leaves_the_policy_alone(make):
    run = ready(make, "--epochs 2 --lr 1")
    run.objective.step(run)
    assert table_of(run.start_policy) == [near(row) for row in START] and not run.start_policy.training
    assert not any(p.requires_grad for p in run.start_policy.parameters())
    assert all(p.grad is None for p in (*run.start_policy.parameters(), *run.reward.parameters()))
    lone = ready(make, "")
    learn = peek(lone, learn_from_rollout)
    learn[0]["advantage"].zero_()
    objective.ppo_update(lone, learn[1], **learn[0])
    assert table_of(lone.policy) == [near(row) for row in POLICY] and lone.value.bias.item() != near(V0)


def test_every_run_keeps_its_first_policy_and_ppo_alone_trains_a_critic(make):
    run = make("--objective reinforce")
    assert run.value is None and len(run.policy_optimizer.param_groups) == 1
    run.objective.step(run)
    assert table_of(run.start_policy) == [near(row) for row in START] != table_of(run.policy)
    fresh = make("--objective ppo")
    assert [g.get("times", 1) for g in fresh.policy_optimizer.param_groups] == [1, 10]


@pytest.mark.parametrize("beta2", [0.5, 0.999])
def test_the_policys_adam_forgets_squared_gradients_at_its_rate(beta2, make):
    """Two steps by hand, on a gradient of 1 and then of 0.1, also after a new start."""
    run = make(f"--objective reinforce --lr 0.01 --adam_beta2 {beta2}", plain=False)
    for _ in range(2):
        table, optimizer, at = run.policy.table, run.policy_optimizer, []
        for gradient in (1.0, 0.1):
            table.grad = torch.full_like(table, gradient)
            at.append(table.detach().clone())
            optimizer.step()
        mean, square = 0.9 * 0.1 + 0.1 * 0.1, beta2 * (1 - beta2) + (1 - beta2) * 0.1 ** 2
        step = 0.01 * mean / (1 - 0.9 ** 2) / math.sqrt(square / (1 - beta2 ** 2))
        torch.testing.assert_close(table, at[1] - step)
        run.restart_policy()


@pytest.mark.parametrize("flags, more, near", [
    ("--objective reinforce", {}, True), ("--objective reinforce --kl 0", {}, False),
    ("--objective reinforce --guidance bandit", {}, False),
    ("--objective reinforce --kl 1", {"pooled": True}, False),
    ("--objective reinforce --kl 1 --reward_first 2", {"pairs": True}, False),
    ("--objective wmle", {}, False),
    ("--objective mle", {}, False)])
def test_leaving_the_start_has_a_price_where_the_reward_knows_little_else(flags, more, near, make):
    """REINFORCE with a learned reward after a warm start, which a pooled task has not, unless annotated
    answers taught that reward."""
    run = make(flags, **more)
    if run.c.guidance == "bandit" or more.get("pairs"):
        train.reward_phase(run)
    assert run.stays_near == near == ("kl" in run.objective.step(run))
