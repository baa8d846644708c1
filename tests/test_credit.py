"""One number an answer and what becomes of it: baselines (RLOO, GRPO), what is read off a score (RED, ABC),
DPO and the token rewards inside of it. Formulas against loops; how they are joined is below, on the world of
stubs.py."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reference import mask_of
from stubs import (END, POLICY, REWARD, START, bound, fill, fill_reward, log_probs, mean, peek, rolled,
                   rows_of, stub_run, z_scores)

import sample
import train
from guidance import GUIDANCES, Guidance, new_reward
from model import Config, Transformer
from objective import learn_from_rollout, policy_batch, ppo_advantages
from policy_dpo import ImplicitReward, dpo_loss
from policy_ppo import credited, min_returns, normalize
from policy_reinforce import compared
from redistribute import as_rows, attention_shares, differences, last_attention, prefix_scores
from reward import TokenReward
from rollout import alike, dense_rewards, guide_of, renew_normalizer
from state import load_nets
from support.runs import colour_range
from warm_start import learn_from_pairs

F64 = dict(dtype=torch.float64)
near = lambda x: pytest.approx(x, rel=2e-4, abs=2e-6)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


# ------------------------------------------------------------------------------------------------- baselines

SCORES = [[3.0, 1.0, 8.0], [2.0, 2.5, 2.0]]


def test_leave_one_out_by_hand():
    expected = [[s - mean(row[:i] + row[i + 1:]) for i, s in enumerate(row)] for row in SCORES]
    torch.testing.assert_close(compared(torch.tensor(SCORES, **F64), "rloo", floor=9.0),
                               torch.tensor(expected, **F64))


def test_a_groups_mean_and_deviation_by_hand():
    got = compared(torch.tensor(SCORES, **F64), "group").tolist()
    for row, expected in zip(got, map(z_scores, SCORES)):
        assert row == pytest.approx(expected)


def test_small_deviations_of_a_group_are_not_blown_up():
    got = compared(torch.tensor(SCORES, **F64), "group", floor=2.0)
    assert got[1].tolist() == pytest.approx([(x - mean(SCORES[1])) / 2.0 for x in SCORES[1]])
    assert got[0].tolist() == pytest.approx(z_scores(SCORES[0]))  # its own deviation is 3.6


def test_the_batch_is_compared_over_all_groups():
    every = [x for row in SCORES for x in row]
    assert compared(torch.tensor(SCORES, **F64)).flatten().tolist() == pytest.approx(z_scores(every))


def test_with_one_group_its_deviation_is_the_batchs():
    one = randn(1, 7)
    torch.testing.assert_close(compared(one, "group"), compared(one, "batch"))


@pytest.mark.parametrize("how", ["rloo", "group"])
def test_equal_answers_and_the_only_answer_of_a_group_are_paid_nothing(how):
    assert not compared(torch.full((2, 3), 0.7, **F64), how).abs().max() > 1e-9
    assert not compared(torch.tensor([[5.0], [1.0]]), how).any()


def test_leave_one_out_is_unbiased_where_the_batchs_mean_is_not():
    """Two equally likely words worth 0 and 1, two samples a group: the expected push on log pi of the second,
    over all four outcomes, is that of the exact gradient, p (1 - p) (1 - 0); with the group's own mean it is
    half of that."""
    push = lambda how: mean(
        mean((x - 0.5) * w for x, w in zip(group, how(torch.tensor([group], **F64))[0].tolist()))
        for group in ([0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]))
    assert push(lambda s: compared(s, "rloo")) == pytest.approx(0.25)
    assert push(lambda s: s - s.mean()) == pytest.approx(0.125)


def test_an_unknown_baseline_is_named():
    with pytest.raises(ValueError, match="batch, rloo, group"):
        compared(torch.zeros(1, 2), "critic")


# ---------------------------------------------------------------------------------------- what is read off

TOKENS = torch.tensor([[[3, 1, 4, 1], [5, 9, 2, 0], [6, 0, 0, 0]],
                       [[2, 7, 1, 8], [2, 8, 0, 0], [1, 8, 2, 0]]])
MASK = mask_of(4, 3, 1, 4, 2, 3, width=4).view(2, 3, 4)
CONTEXT = torch.tensor([[7, 7, 3], [4, 0, 0]]), mask_of(3, 1, width=3)


def net(rotary=True, seed=0):
    torch.manual_seed(seed)
    body = Transformer(Config(vocab_size=10, n_ctx=16, n_layer=2, n_head=2, n_embd=16, rotary=rotary))
    reward = TokenReward(body, start=9, width=8).eval()
    for p in reward.mlp.parameters():  # at first it says nearly the same of everything
        torch.nn.init.normal_(p)
    return reward


@pytest.mark.parametrize("context", [None, CONTEXT])
def test_scores_of_prefixes_are_those_of_the_prefixes_alone(context):
    reward = net()
    got = prefix_scores(reward, TOKENS, context)
    assert got.shape == (2, 3, 5)
    torch.testing.assert_close(got[..., 1:], reward.guide(TOKENS, context))
    for t in range(1, 5):  # the state of a prefix knows nothing of what follows
        torch.testing.assert_close(got[..., t], reward.guide(TOKENS[..., :t], context)[..., -1])
    other = prefix_scores(reward, (TOKENS + 1) % 9, context)
    torch.testing.assert_close(got[..., 0], other[..., 0])


def test_differences_sum_to_the_score_beyond_that_of_nothing():
    reward = net()
    got, scores = differences(reward, TOKENS, MASK, CONTEXT), prefix_scores(reward, TOKENS, CONTEXT)
    assert not got[~MASK].any()
    last = scores.gather(-1, MASK.sum(-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(got.sum(-1), last - scores[..., 0])
    assert got[0, 2, 0] == scores[0, 2, 1] - scores[0, 2, 0]
    torch.testing.assert_close(differences(reward, TOKENS, MASK, CONTEXT, level=0.3, unit=2.0), got / 2.0)


def attention_by_loop(body, ids):
    """Softmax weights (H, T) of the last id in the last block, one product at a time."""
    x = body.wte(torch.tensor([ids]))
    seen = []
    ask = body.blocks[-1].ask
    body.blocks[-1].ask = lambda *args: seen.append(ask(*args)) or seen[-1]
    body(torch.tensor([ids]))
    body.blocks[-1].ask = ask
    q, k, _ = [x[0].tolist() for x in seen[0]]  # (H, T, d)
    rows = []
    for queries, keys in zip(q, k):
        dots = [sum(a * b for a, b in zip(queries[-1], key)) / math.sqrt(len(key)) for key in keys]
        total = sum(math.exp(z) for z in dots)
        rows.append([math.exp(z) / total for z in dots])
    return torch.tensor(rows)


@pytest.mark.parametrize("rotary", [True, False])
def test_attention_of_the_last_token_is_a_plain_softmax(rotary):
    body = net(rotary).body
    rows = torch.tensor([[9, 3, 1, 4, 1], [9, 5, 2, 0, 0]])
    got = body.last_attention(rows, torch.tensor([5, 3]))
    assert got.shape == (2, 2, 5)
    torch.testing.assert_close(got[0], attention_by_loop(body, rows[0].tolist()))
    torch.testing.assert_close(got[1, :, :3], attention_by_loop(body, rows[1, :3].tolist()))
    assert not got[1, :, 3:].any()


def test_shares_of_attention_know_no_dropout_and_leave_the_net_as_it_was():
    body = Transformer(Config(vocab_size=10, n_ctx=16, n_layer=2, n_head=2, n_embd=16, dropout=0.5)).train()
    first, again = [last_attention(body, TOKENS, MASK, 9) for _ in range(2)]
    assert torch.equal(first, again) and body.training


def test_the_weights_are_those_that_the_layer_uses():
    """Values weighed with them are what scaled_dot_product_attention hands on."""
    body, rows = net().body, torch.tensor([[9, 3, 1, 4]])
    seen = {}
    block = body.blocks[-1]
    ask, answer = block.ask, block.answer
    block.ask = lambda *args: seen.setdefault("ask", ask(*args))
    block.answer = lambda x, y: seen.setdefault("y", y) is None or answer(x, y)
    body(rows)
    block.ask, block.answer = ask, answer
    weights = body.last_attention(rows, torch.tensor([4]))  # (1, H, T)
    torch.testing.assert_close(torch.einsum("nht,nhtd->nhd", weights, seen["ask"][2]), seen["y"][:, :, -1])


def test_rows_hold_context_start_and_answer_without_gaps():
    rows, length, place = as_rows(TOKENS, MASK, 9, CONTEXT)
    expected = [[7, 7, 3, 9, 3, 1, 4, 1], [7, 7, 3, 9, 5, 9, 2], [7, 7, 3, 9, 6],
                [4, 9, 2, 7, 1, 8], [4, 9, 2, 8], [4, 9, 1, 8, 2]]
    assert [row[:n].tolist() for row, n in zip(rows, length)] == expected
    own = rows.gather(1, place)
    assert (own == TOKENS.flatten(0, 1))[MASK.flatten(0, 1)].all()


@pytest.mark.parametrize("context", [None, CONTEXT])
def test_shares_sum_to_one_and_padding_changes_nothing(context):
    reward = net()
    shares = last_attention(reward.body, TOKENS, MASK, 9, context)
    assert not shares[~MASK].any() and (shares[MASK] > 0).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3))
    for b in range(2):
        for k in range(3):
            n = MASK[b, k].sum()
            alone = None if context is None else [x[b:b + 1, :context[1][b].sum()] for x in context]
            tokens, mask = [x[b:b + 1, k:k + 1, :n] for x in (TOKENS, MASK)]
            got = last_attention(reward.body, tokens, mask, 9, alone)
            torch.testing.assert_close(got[0, 0], shares[b, k, :n])
            ids = ([] if alone is None else alone[0][0].tolist()) + [9] + TOKENS[b, k, :n].tolist()
            own = attention_by_loop(reward.body, ids).mean(0)[-n:]
            torch.testing.assert_close(got[0, 0], own / own.sum())


def test_shares_of_the_score_sum_to_the_score():
    reward = net()
    got, score = attention_shares(reward, TOKENS, MASK, CONTEXT), reward.guide(TOKENS, CONTEXT)
    last = score.gather(-1, MASK.sum(-1, keepdim=True) - 1).squeeze(-1)
    torch.testing.assert_close(got.sum(-1), last)
    torch.testing.assert_close(got[0, 2, 0], last[0, 2])  # an only token has all of it
    moved = attention_shares(reward, TOKENS, MASK, CONTEXT, level=0.3, unit=2.0)
    torch.testing.assert_close(moved.sum(-1), (last - 0.3) / 2.0)


# ------------------------------------------------------------------------------------------------------- DPO

def dpo_by_autograd(hidden, head, tokens, mask, start, groups, preference, beta):
    """The order of each group picked one answer at a time, best first: dense, through autograd."""
    logp = (hidden @ head.T).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    score = beta * torch.where(mask, logp - start, 0.0).sum(-1)
    loss = 0.0
    for rows, liked in zip(groups, preference):
        left = sorted(rows.tolist(), key=lambda i: -liked[rows.tolist().index(i)].item())
        while left:
            loss = loss + torch.stack([score[i] for i in left]).logsumexp(0) - score[left[0]]
            left = left[1:]
    return loss / len(groups)


@pytest.mark.parametrize("k", [2, 3])
def test_dpo_loss_and_gradients_by_autograd(k):
    mask = mask_of(4, 2, 3, 1, 4, 4, width=4)
    tokens = torch.randint(7, (6, 4), generator=torch.Generator().manual_seed(1))
    groups = torch.arange(6).view(-1, k)
    preference, start = randn(6 // k, k, seed=3), randn(6, 4, seed=4)
    both = []
    for loss_of in (lambda *x: dpo_loss(*x)[0], dpo_by_autograd):
        hidden, head = randn(6, 4, 5, seed=5).requires_grad_(), randn(7, 5, seed=6).requires_grad_()
        loss = loss_of(hidden, head, tokens, mask, start, groups, preference, 0.7)
        loss.backward()
        both.append((loss.detach(), hidden.grad, head.grad))
    for got, expected in zip(*both):
        torch.testing.assert_close(got, expected)


def test_dpo_of_a_pair_is_a_logistic_loss_of_the_log_ratios():
    mask, tokens = mask_of(3, 2, width=3), torch.tensor([[1, 2, 3], [4, 0, 0]])
    hidden, head, start = randn(2, 3, 5), randn(5, 5, seed=1), randn(2, 3, seed=2)
    loss, scores = dpo_loss(hidden, head, tokens, mask, start, torch.tensor([[0, 1]]),
                            torch.tensor([[0.0, 1.0]]), 0.3)
    logp = (hidden @ head.T).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    ratio = [(logp[i] - start[i])[mask[i]].sum() for i in (0, 1)]
    torch.testing.assert_close(loss, -F.logsigmoid(0.3 * (ratio[1] - ratio[0])))
    torch.testing.assert_close(scores, 0.3 * torch.stack(ratio))


def test_answers_that_tie_teach_nothing():
    hidden = randn(2, 3, 5).requires_grad_()
    tokens, mask = torch.zeros(2, 3, dtype=torch.long), mask_of(3, 2, width=3)
    loss, _ = dpo_loss(hidden, randn(5, 5, seed=1), tokens, mask, randn(2, 3, seed=2),
                       torch.tensor([[0, 1]]), torch.ones(1, 2))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def implicit(dropout=0.0):
    torch.manual_seed(0)
    body = Transformer(Config(vocab_size=10, n_ctx=16, n_layer=1, n_head=2, n_embd=16, dropout=dropout))
    return ImplicitReward(body, start=9, beta=0.5, n_ids=9)


def test_an_implicit_reward_begins_at_zero_and_is_a_log_ratio():
    reward = implicit()
    assert not reward.guide(TOKENS % 9, CONTEXT).any()
    with torch.no_grad():
        reward.body.wte.weight.mul_(1.1)
    logp = lambda model: (model(torch.tensor([[9, 3, 1]])) @ model.head[:9].T).log_softmax(-1)
    ratio = (logp(reward.body) - logp(reward.reference))[0]
    got = reward.guide(torch.tensor([[[3, 1, 4]]]))[0, 0]
    torch.testing.assert_close(got, 0.5 * torch.stack([ratio[0, 3], ratio[1, 1], ratio[2, 4]]))


def test_the_reference_of_an_implicit_reward_stays_as_it_was():
    reward = implicit(dropout=0.5)
    before = copy.deepcopy(reward.reference.state_dict())
    reward.train()
    assert reward.body.training and not reward.reference.training
    optimizer = torch.optim.Adam(reward.parameters(), lr=0.1)
    for _ in range(2):
        predict = reward.body(torch.tensor([[9, 3], [9, 4]]))[:, :1]
        loss, _ = dpo_loss(predict, reward.body.head[:9], torch.tensor([[3], [4]]), mask_of(1, 1, width=1),
                           torch.zeros(2, 1), torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in reward.reference.state_dict().items())
    assert not reward.eval().guide(torch.tensor([[[3]]])).eq(0).any()


# --------------------------------------------------------------------------------- the least of what follows


def test_the_least_of_what_follows_by_loop():
    mask = mask_of(5, 3, 4, width=5)
    dense, logp, start = 6 * randn(3, 5), randn(3, 5, seed=1), randn(3, 5, seed=2)
    fine = torch.tensor([0.0, 3.0, 0.0], **F64)
    got = min_returns(dense, logp, start, mask, kl=0.3, fine=fine)
    assert not got[~mask].any()
    for b, n in enumerate((5, 3, 4)):
        for t in range(n):
            least = min(max(-10.0, min(10.0, x)) for x in dense[b, t:n].tolist())
            away = sum((logp[b, s] - start[b, s]).item() for s in range(t, n))
            assert got[b, t].item() == pytest.approx(least - 0.3 * away - (b == 1))  # a cut one pays one unit


def test_saying_a_good_word_again_is_worth_nothing_more():
    """Rewards of 1, 2 and 2 ... 2: with a sum each further word pays, with the minimum the worst counts."""
    value = lambda n, how: credited(torch.tensor([[1.0] + [2.0] * n]), *[torch.zeros(1, n + 1)] * 3,
                                    torch.ones(1, n + 1).bool(), how=how, lam=1.0)[1][0, 0].item()
    assert value(2, "sum") == 5 and value(9, "sum") == 19
    assert value(2, "min") == value(9, "min") == 1


def test_advantages_of_the_minimum_are_returns_minus_values():
    mask, parts = mask_of(4, 2, width=4), [randn(2, 4, seed=i) for i in range(4)]
    got, returns, paid = credited(*parts, mask, kl=0.5, how="min", lam=0.3, gamma=0.2)
    torch.testing.assert_close(returns, min_returns(*parts[:3], mask, 0.5))
    torch.testing.assert_close(got, torch.where(mask, returns - parts[3], 0.0))
    assert torch.equal(paid, returns[:, 0])


def test_a_rollout_is_paid_by_its_minimum_by_hand(make):
    run = make("--objective ppo --returns min --batch_size 12 --kl 0.4", pairs=False)
    run.normalizer = torch.tensor([0.2, 0.8, -0.1, 0.5, 0.05])
    batch, tokens, mask = peek(run, rolled)
    dense = dense_rewards(run, batch, tokens, mask)[0].flatten(0, 1)
    lesson, _, figures = peek(run, learn_from_rollout)
    rows, returns = rows_of(batch, tokens, mask), lesson["returns"].tolist()
    for (context, ids), own, got in zip(rows, dense.tolist(), returns):
        assert ids[-1] == END, "this test is about answers that end"
        away = [a - b for a, b in zip(*[log_probs(x, context, ids) for x in (POLICY, START)])]
        expected = [min(own[t:len(ids)]) - 0.4 * sum(away[t:]) for t in range(len(ids))]
        assert got[:len(ids)] == near(expected)
    assert figures["return"].item() == near(mean(lesson["returns"][:, 0].tolist()))
    shown = ppo_advantages(run, run.task.samples(run.policy, None), None)
    assert shown.shape == (2, 1, 16) and shown.any()


# ---------------------------------------------------------------------------------------------- the table

def test_an_unknown_fit_is_refused_when_the_table_is_made():
    with pytest.raises(ValueError, match="order, labels, policy"):
        Guidance(fit="label")


def test_every_guidance_names_its_reward_net(monkeypatch, tmp_path):
    for name in GUIDANCES:
        run = stub_run(monkeypatch, tmp_path, f"--objective ppo --guidance {name}", pairs=True)
        assert isinstance(run.reward, ImplicitReward if name == "implicit" else TokenReward)


# ----------------------------------------------------------------------------------- how it is joined, by h


def test_rewards_without_a_bound_are_coloured_over_what_was_seen(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    run = SimpleNamespace(config={"guidance": "implicit", "bound": "softplus"}, field="prompt")
    text = sample.shown(run, {"prompt": "p", "tokens": [["a", "b"]], "rewards": [[-3.0, 5.0]],
                              "reward_scores": [2.0]})
    assert text.count("\x1b[") >= 2 and "score 2" in text
    assert colour_range(run.config) is None and colour_range({"guidance": "token"}) is not None


@pytest.fixture
def make(monkeypatch, tmp_path):
    return lambda *typed, **more: stub_run(monkeypatch, tmp_path, *typed, plain=True, **more)


def others(group, i):
    return mean(x for j, x in enumerate(group) if j != i)


OF_GROUP = {"rloo": lambda group: [x - others(group, i) for i, x in enumerate(group)],
            "group": lambda group: z_scores(group) if len(set(group)) > 1 else [0.0] * len(group)}


def near_rows(got, mask, expected):
    """(B, K, T) against one number for each of B K sequences."""
    for row, real, x in zip(got.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist(), expected):
        assert row == near([x if here else 0.0 for here in real])


@pytest.mark.parametrize("how", ["rloo", "group"])
@pytest.mark.parametrize("more", [{}, {"pooled": True}])
def test_preferences_are_compared_within_their_group(how, more, make):
    run = make(f"--objective reinforce --guidance bandit --baseline {how} --weights to_go --batch_size 6 "
               f"--group_size {1 if more else 3} --lr 1", **more)
    told = []
    run.task.told = lambda tokens, preference: told.append(preference)
    _, tokens, mask, rewards = peek(run, policy_batch)
    assert tokens.shape[:2] == told[0].shape == ((1, 6) if more else (2, 3))
    near_rows(rewards, mask, [z for group in told[0].tolist() for z in OF_GROUP[how](group)])
    run.objective.step(run)


@pytest.mark.parametrize("how", ["batch", "rloo", "group"])
def test_learned_scores_of_answers_are_compared_within_their_group(how, make):
    run = make(f"--objective reinforce --guidance bandit --baseline {how} --group_size 3 --batch_size 12",
               pairs=True)
    fill_reward(run.reward, (-1.5, 2.0, 0.4))
    fill(run.policy, ((0.0, 0.5, -0.6), (-0.5, 0.1, 0.2), (1.0, 0.5, -1.5)))
    run.task.width = 3  # some are cut: the score is read at A, B or END
    batch, tokens, mask, rewards = peek(run, policy_batch)
    assert tokens.shape[:2] == (4, 3)
    scores = [bound(REWARD[ids[-1]]) for _, ids in rows_of(batch, tokens, mask)]
    assert len(set(scores)) > 1
    groups = [scores[i:i + 3] for i in range(0, 12, 3)]
    expected = z_scores(scores) if how == "batch" else [z for group in groups for z in OF_GROUP[how](group)]
    near_rows(rewards, mask, expected)


def test_the_floor_under_learned_scores_is_not_in_units_of_preference(make):
    """Scores of 0 to 100 go with --resolution 5, and r is below 1.313."""
    for pairs, floor in ((True, 0.01), (False, 5.0)):
        run = make("--objective reinforce --guidance bandit --resolution 5 --K 2", pairs=pairs)
        assert alike(run, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, 1))[0, :, 0].tolist() == near(
            [0.5 / max(0.5 ** 0.5, floor), -0.5 / max(0.5 ** 0.5, floor)])


def test_answers_of_a_group_have_the_same_input(make):
    run = make("--objective reinforce --guidance token --group_size 4 --batch_size 12", pairs=True)
    batch, tokens, _ = rolled(run)
    assert tokens.shape[:2] == (3, 4) and len(batch.index) == 3


@pytest.mark.parametrize("pooled", [False, True])
def test_token_rewards_by_hand(pooled, make):
    """In the stub's net a prefix is worth what its last word is; the empty one ends in the start token."""
    more = {"pooled": True} if pooled else {"pairs": True}
    run = make("--objective reinforce --guidance red --batch_size 9", **more)
    batch, tokens, mask, rewards = peek(run, policy_batch)
    for (_, ids), row in zip(rows_of(batch, tokens, mask), rewards.flatten(0, 1).tolist()):
        worth = [bound(REWARD[y]) for y in [END] + ids]
        assert row[:len(ids)] == near([b - a for a, b in zip(worth, worth[1:])])


def test_an_implicit_reward_by_hand(make):
    run = make("--objective reinforce --guidance implicit --batch_size 9 --dpo_beta 0.7", pairs=True)
    fill(run.reward.body, POLICY), fill(run.reward.reference, START)
    batch, tokens, mask, rewards = peek(run, policy_batch)
    for (context, ids), row in zip(rows_of(batch, tokens, mask), rewards.flatten(0, 1).tolist()):
        expected = [0.7 * (a - b) for a, b in zip(*[log_probs(x, context, ids) for x in (POLICY, START)])]
        assert row[:len(ids)] == near(expected)


def test_ppo_pays_an_implicit_reward_at_every_token_normalised_by_place(make):
    run = make("--objective ppo --guidance implicit --batch_size 9 --reward_first 3", pairs=True)
    train.reward_phase(run)
    batch, tokens, mask = rolled(run)
    got, ends = dense_rewards(run, batch, tokens, mask)
    assert torch.equal(ends, mask)
    raw = guide_of(run)(tokens, batch.prefix(), mask)
    torch.testing.assert_close(got, torch.where(mask, normalize(raw, mask, run.normalizer), 0.0))


def test_what_is_read_off_and_log_ratios_are_not_r_itself():
    found = {name for name, how in GUIDANCES.items() if how.bounded}
    assert found == {"token", "bandit", "segment", "edits"} and GUIDANCES.keys() - found == {
        "red", "abc", "implicit"}


def test_ppo_pays_what_is_read_off_the_normalised_score(make):
    """In parts, an answer gets what bandit guidance pays it beyond the empty one, and one that is cut gives
    back one unit."""
    run = make("--objective ppo --guidance red --batch_size 9 --reward_first 3", pairs=True)
    bandit = make("--objective ppo --guidance bandit --batch_size 9 --reward_first 3", pairs=True)
    for r in (run, bandit):
        learn_from_pairs(r)
    torch.testing.assert_close(run.normalizer, bandit.normalizer)
    run.normalizer = bandit.normalizer = torch.tensor([0.3, 0.7, 0.1, 0.4, 0.05])
    batch, tokens, mask = peek(run, rolled)
    got, ends = dense_rewards(run, batch, tokens, mask)
    whole, last = dense_rewards(bandit, batch, tokens, mask)
    nothing = (run.reward.guide(torch.tensor([[[END]]])).item() - 0.7) / 0.4
    torch.testing.assert_close(got.sum(-1), whole.sum(-1) - nothing)
    assert torch.equal(ends, last) and (got != 0).sum() > last.sum()
    run.normalizer = torch.tensor([0.3, 0.7, 0.1, 0.8, 0.05])  # differences are in its units
    torch.testing.assert_close(got, 2 * dense_rewards(run, batch, tokens, mask)[0])


def test_what_is_read_off_shares_the_one_fit_of_bandit(make):
    paths = []
    for guidance in ("bandit", "red", "abc"):
        run = make(f"--objective ppo --guidance {guidance} --reward_first 3", pairs=True)
        run.log.say = paths.append
        if guidance == "abc":  # the stub's body has no attention
            run.c.objective, run.objective = "reinforce", train.OBJECTIVES["reinforce"]
        learn_from_pairs(run)
    assert paths[0] == paths[1] == paths[2] and "reward-" in paths[0]


def test_a_kept_implicit_reward_is_read_again(make, monkeypatch, tmp_path):
    run = make("--objective ppo --guidance implicit --reward_first 3 --reward_lr 1", pairs=True)
    train.reward_phase(run)
    sizes = run.sizes()
    other = new_reward(type(run.reward.body)(run.reward.body.config), sizes["start"], run.c, sizes["n_ids"])
    other.load_state_dict(run.reward.state_dict())
    tokens = torch.tensor([[[0, 1, 2]]])
    assert run.reward.guide(tokens).abs().max() > 0
    torch.testing.assert_close(other.guide(tokens), run.reward.guide(tokens))


@pytest.mark.parametrize("flags, says", [
    ("--baseline rloo", "--baseline rloo"),
    ("--objective ppo --guidance bandit --baseline group", "--baseline group"),
    ("--task edits --objective reinforce --guidance bandit --baseline rloo", "--group_size"),
    ("--group_size 2", "--group_size 2"), ("--task summarize --group_size 2", "--group_size 2"),
    ("--task summarize --objective reinforce --guidance bandit --baseline group", "--group_size"),
    ("--task edits --group_size 5", "--batch_size 64"),
    ("--task summarize --guidance red", "--guidance red"),
    ("--task summarize --guidance implicit", "implicit"),
    ("--guidance implicit --agg max", "--agg max"), ("--dpo_beta 1", "--dpo_beta"),
    ("--returns min", "ppo"), ("--objective ppo --returns min --lam 0.9", "--lam 0.9"),
    ("--task edits --returns min --guidance segment", "segment"),
    ("--guidance edits", "red"), ("--task edits --objective wmle --guidance bandit", "bandit")])
def test_what_does_not_apply_is_refused_in_one_line(flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags.split())
    assert stop.value.code == 2
    err = capsys.readouterr().err.strip()
    assert says in err and len(err.splitlines()) == 1
