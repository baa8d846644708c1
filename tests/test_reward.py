"""reward.py: the bound, the slot a reward is read at, one layout in fit and use, the buffer,
a fit that must work."""
import copy
import functools
import math

import pytest
import torch
from reference import mask_of, seeded, tiny

import reward as reward_module
from aggregate import aggregate
from model import Config, Transformer, generate
from plackett_luce import plackett_luce_loss
from reward import (BOUNDS, LATEST, MEMBERS, Buffer, Candidates, FitSettings, TokenReward, bound, fit,
                    held_loss, ordered_pairs, out_of_reach, rank, rank_accuracy, ranking_loss, ranks,
                    some_members, tie_loss)

START = 10


def ids(*shape, high=11, seed=0):
    return torch.randint(high, shape, generator=seeded(seed))


def lively(**sizes):
    """A reward net whose head is large enough for rewards to differ."""
    net = TokenReward(tiny(**sizes), START, width=16).eval()
    with torch.no_grad():
        net.mlp[0].weight.normal_(0, 0.5), net.mlp[2].weight.normal_(0, 0.5)
    return net


# ------------------------------------------------------------------------------------------------------ bound

@pytest.mark.parametrize("x, value", [
    (0.0, 0.549),     # ln(1 + e^(1 - ln(1 + e))) = ln(1 + e / (1 + e)) = ln 1.7311
    (2.0, 1.094),     # ln(1 + e^(1 - ln(1 + 1/e))) = ln(1 + e * 0.7311) = ln 2.9872
    (100.0, 1.3133),  # ln(1 + e)
    (-100.0, 0.0),
])
def test_softplus_bound_by_hand(x, value):
    assert bound(torch.tensor(x)).item() == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize("how, top", [("softplus", math.log(1 + math.e)), ("sigmoid", 1.0)])
def test_bound_is_positive_bounded_and_monotone(how, top):
    x = torch.linspace(-15, 15, 301, dtype=torch.float64)
    y = bound(x, how)
    assert (y > 0).all() and (y < top + 1e-7).all() and (y.diff() > 0).all()


@pytest.mark.parametrize("how", BOUNDS)
def test_rewards_are_almost_constant_at_first(how):
    rewards = TokenReward(tiny(), START, how)(ids(2, 3, 6))
    centre = bound(torch.zeros(()), how)
    assert (rewards - centre).abs().max() < 0.01 and rewards.std() > 0


# ----------------------------------------------------------------------------------------------------- layout

def test_reward_of_a_token_sees_it_and_not_the_next():
    net, tokens, other = lively(), ids(1, 1, 6), ids(1, 1, 6)
    other[0, 0, 3] = (other[0, 0, 3] + 1) % 10
    moved = (net.guide(tokens) - net.guide(other)).abs()[0, 0]
    assert (moved[:3] < 1e-6).all() and moved[3] > 1e-3


def test_reward_is_read_at_the_state_after_start_and_tokens():
    # E1 written out: the plain forward of [context | start | a_0 .. a_t], the head on its last position
    net, context, tokens = lively(), ids(1, 4), ids(1, 1, 5, seed=1)
    rewards = net.guide(tokens, (context, mask_of(4, width=4)))[0, 0]
    for t in range(5):
        read = torch.cat((context[0], torch.tensor([START]), tokens[0, 0, :t + 1]))
        expected = bound(net.mlp(net.body(read[None])[0, -1]))[0]
        assert rewards[t].item() == pytest.approx(expected.item(), abs=1e-5)


def test_fit_and_use_read_the_same_layout(monkeypatch):
    net, context, context_mask, tokens = lively(), ids(3, 7), mask_of(5, 2, 0, width=7), ids(3, 4, 6, seed=1)
    batch = Candidates(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.rand(3, 4), context,
                       context_mask)
    seen, logits = [], net.logits
    monkeypatch.setattr(net, "logits", lambda *x: seen.append(logits(*x)) or seen[0])
    ranking_loss(net, batch, torch.arange(12).view(3, 4), "avg", 2.0)
    # trimmed or not: products of other shapes, which round otherwise
    rewards = bound(seen.pop()).detach()
    torch.testing.assert_close(rewards, net.guide(tokens, (context, context_mask)), rtol=0, atol=1e-5)


def test_candidates_sampled_from_the_body_are_read_as_they_were_written():
    # greedy samples of the reward's own body: the state read at a_t is the one that predicted the next token
    net, context, mask = lively(), ids(2, 4), mask_of(4, 2, width=4)
    tokens, _, _ = generate(net.body, START, 5, None, cache=net.body.prefill(context, mask), temperature=0)
    seen = []
    hook = net.mlp.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    net.guide(tokens[:, None], (context, mask))
    hook.remove()
    assert torch.equal((seen[0][:, 0, :-1] @ net.body.head.t()).argmax(-1), tokens[:, 1:])


def test_padding_changes_no_reward():
    net, context, tokens = lively(), ids(2, 4), ids(2, 3, 5, seed=1)
    expected = net.guide(tokens, (context, mask_of(4, 2, width=4)))
    wide = (torch.cat((tokens, ids(2, 3, 3, seed=2)), -1),
            (torch.cat((context, ids(2, 2, seed=3)), 1), mask_of(4, 2, width=6)))
    torch.testing.assert_close(net.guide(*wide)[..., :5], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("agg", ["avg", "sum", "min", "max"])
def test_padding_changes_no_ranking_loss(agg):
    net, tokens, preference = lively(), ids(2, 3, 5, seed=1), torch.rand(2, 3)
    lengths = torch.tensor([[5, 2, 3], [1, 5, 4]])
    mask = lambda width: torch.arange(width) < lengths[..., None]
    subsets = torch.arange(6).view(2, 3)
    short = Candidates(tokens, mask(5), preference, ids(2, 4), mask_of(4, 2, width=4))
    long = Candidates(torch.cat((tokens, ids(2, 3, 3, seed=2)), -1), mask(8), preference,
                      torch.cat((ids(2, 4), ids(2, 2, seed=3)), 1), mask_of(4, 2, width=6))
    torch.testing.assert_close(ranking_loss(net, long, subsets, agg, 2.0),
                               ranking_loss(net, short, subsets, agg, 2.0))


def test_guide_is_without_dropout_and_without_gradient():
    net = lively(dropout=0.5)
    net.train()
    tokens = ids(1, 2, 6)
    a, b = net.guide(tokens), net.guide(tokens)
    assert torch.equal(a, b) and not a.requires_grad
    assert not torch.equal(net(tokens), net(tokens))  # the net itself does drop
    net.eval()
    assert torch.equal(net(tokens), a)


@pytest.mark.parametrize("training", [True, False])
def test_guide_leaves_the_mode_as_it_was(training):
    net = lively().train(training)
    net.guide(ids(1, 2, 6))
    assert all(module.training is training for module in net.modules())


# ----------------------------------------------------------------------------------------------- ranking loss

def test_ranking_loss_compares_the_members_of_each_subset():
    net, tokens, preference = lively(), ids(1, 5, 4), torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.3]])
    batch = Candidates(tokens, torch.ones(1, 5, 4, dtype=torch.bool), preference)
    subsets = torch.tensor([[0, 3, 1], [4, 4, 2]])
    scores = net.guide(tokens)[0].mean(-1) * 4  # avg times T_bar
    expected = sum(plackett_luce_loss(scores[s][None], preference[0][s][None]) for s in subsets) / 2
    torch.testing.assert_close(ranking_loss(net, batch, subsets, "avg", 2.0), expected)


def test_ordered_pairs_by_hand():
    assert ordered_pairs(torch.tensor([[2.0, 1, 3]]), torch.tensor([[3.0, 2, 1]])) == (1.0, 3.0)  # only 2 > 1
    # a tie, a wrong one
    assert ordered_pairs(torch.tensor([[2.0, 2, 3]]), torch.tensor([[3.0, 2, 2]])) == (0.5, 2.0)
    assert ordered_pairs(torch.tensor([[2.0, 1]]), torch.tensor([[1.0, 1]])) == (0.0, 0.0)


def test_rank_accuracy_is_about_aggregated_rewards_in_eval_mode():
    net, tokens = lively(dropout=0.5).train(), ids(1, 6, 4)
    mask = torch.ones(1, 6, 4, dtype=torch.bool)
    preference = aggregate(net.guide(tokens), mask, "min", 2.0)
    assert rank_accuracy(net, Candidates(tokens, mask, preference), "min", 2.0) == (15.0, 15.0)
    assert rank_accuracy(net, Candidates(tokens, mask, -preference), "min", 2.0) == (0.0, 15.0)


# ----------------------------------------------------------------------------------------------------- buffer

def numbered(first, n, pooled, k=3):
    """n candidates (or groups of k) whose tokens are their number."""
    number = torch.arange(first, first + n)
    shape = (1, n) if pooled else (n, k)
    tokens = number.view(1, n, 1) if pooled else number.view(n, 1, 1).expand(n, k, 1)
    return Candidates(tokens, torch.ones(*shape, 1, dtype=torch.bool),
                      torch.rand(shape, generator=seeded(first)))


@pytest.mark.parametrize("pooled", [True, False])
def test_buffer_keeps_the_newest(pooled):
    buffer = Buffer(5, pooled)
    assert len(buffer) == 0
    for first in (0, 2, 4, 6):
        buffer.add(numbered(first, 2, pooled))
        assert len(buffer) == min(first + 2, 5)
    assert sorted(set(buffer.data.tokens.flatten().tolist())) == [3, 4, 5, 6, 7]
    buffer.add(numbered(8, 9, pooled))  # more than fits at once
    assert sorted(set(buffer.data.tokens.flatten().tolist())) == [12, 13, 14, 15, 16]


def test_buffer_keeps_what_belongs_together():
    buffer = Buffer(4, pooled=False)
    for first in (0, 3):
        new = numbered(first, 3, False)
        new.context, new.context_mask = new.tokens[:, 0], new.mask[:, 0]
        buffer.add(new)
    batch, _ = buffer.draw(3, 3, seeded())
    assert torch.equal(batch.context, batch.tokens[:, 0])


@pytest.mark.parametrize("pooled", [True, False])
def test_every_drawn_subset_holds_a_strict_pair(pooled):
    buffer = Buffer(40, pooled)
    new = numbered(0, 40, pooled)
    new.preference = (new.preference * 40).floor().clamp(min=32)  # most of them tie
    buffer.add(new)
    for seed in range(5):
        batch, subsets = buffer.draw(8, 3, seeded(seed))
        preference = batch.preference.flatten()[subsets]
        assert 0 < len(subsets) <= 8 and subsets.shape[1] == 3
        assert (preference.amax(1) > preference.amin(1)).all()


def test_pooled_subsets_have_the_asked_number():
    buffer = Buffer(40, True)
    buffer.add(numbered(0, 40, True))
    assert buffer.draw(8, 3, seeded())[1].shape == (8, 3)


def test_ungrouped_subsets_stay_within_their_group():
    buffer = Buffer(9, pooled=False)
    buffer.add(numbered(0, 9, False))
    batch, subsets = buffer.draw(4, 3, seeded())
    group = batch.tokens.flatten()[subsets]
    assert (group == group[:, :1]).all()


def test_groups_that_tie_are_compared_in_subsets_too():
    """Four answers of an input, two of them at a time: an input whose answers are all equal says so."""
    buffer, new = Buffer(8, pooled=False), numbered(0, 8, False)
    new.preference[:6] = 1.0
    buffer.add(new)
    for ties in (False, True):
        batch, subsets = buffer.draw(4, 2, seeded(), ties=ties)
        told = batch.preference.flatten()[subsets]
        assert bool((told[:, 0] == told[:, 1]).any()) == ties and bool((told[:, 0] != told[:, 1]).any())


def test_a_draw_is_as_wide_as_its_longest_candidate():
    buffer = Buffer(8, False)
    mask = mask_of(2, 1, 3, 2, width=6).view(2, 2, 6)
    new = Candidates(torch.arange(24).view(2, 2, 6), mask, torch.tensor([[0.0, 1.0]] * 2),
                     labels=mask.long(), ends=mask)
    buffer.add(new)
    batch, _ = buffer.draw(8, 2, seeded())
    longest = int(batch.mask.sum(-1).max())
    assert ({x.shape[-1] for x in (batch.tokens, batch.mask, batch.labels, batch.ends)} == {longest}
            and longest <= 3)
    assert buffer.data.tokens.shape[-1] == 6  # what is kept has the width of the task


def test_levels_of_preference_come_equally_often():
    buffer = Buffer(200, True)
    new = numbered(0, 200, True)
    new.preference = torch.zeros(1, 200)
    new.preference[0, 177] = 1.0  # one good prompt among 199 equally useless ones
    buffer.add(new)
    draws = [buffer.draw(8, 4, seeded(s)) for s in range(40)]
    compared = torch.cat([batch.preference[0][subsets].flatten() for batch, subsets in draws])
    assert 0.45 < compared.mean() < 0.55  # half a percent of the members, half of those compared
    # the good one was drawn 32 times and is scored once
    assert max(batch.tokens.shape[1] for batch, _ in draws) < 50


def test_half_of_what_is_compared_was_asked_about_lately():
    """Of 400 prompts the last 64 are half of the members of a step, and their share of the other half."""
    q = torch.arange(400) % 2
    members = torch.cat([some_members(q, seeded(s)) for s in range(60)])
    assert len(members) == 60 * MEMBERS and len(set(members.tolist())) > 390
    late = members >= 400 - LATEST
    assert late.float().mean().item() == pytest.approx(0.5 + 0.5 * LATEST / 400, abs=0.03)
    assert members[late].float().mean().item() == pytest.approx(367.5, abs=1.5)
    few = some_members(q[:9], seeded())  # fewer than that: all of them
    assert len(few) == MEMBERS and set(few.tolist()) <= set(range(9))


@pytest.mark.parametrize("pooled", [True, False])
def test_differences_below_the_resolution_are_ties(pooled):
    buffer = Buffer(6, pooled)
    new = numbered(0, 6, pooled)
    new.preference = 10 + new.preference.sub(0.5) * 0.1  # 9.95 to 10.05
    buffer.add(new)
    assert buffer.draw(4, 3, seeded()) is not None
    assert buffer.draw(4, 3, seeded(), resolution=1.0) is None


def test_ranks_by_hand():
    assert ranks(torch.tensor([0.1, 0.2, 0.9, -0.6]), 0.5).tolist() == [0, 0, 2, -1]
    assert ranks(torch.tensor([0.1, 0.2]), 0).tolist() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("pooled", [True, False])
def test_nothing_is_drawn_where_everything_ties(pooled):
    buffer = Buffer(6, pooled)
    new = numbered(0, 6, pooled)
    new.preference.fill_(0.4)
    buffer.add(new)
    assert buffer.draw(4, 3, seeded()) is None


@pytest.mark.parametrize("pooled", [True, False])
def test_seed_fixes_the_draw(pooled):
    buffer = Buffer(40, pooled)
    buffer.add(numbered(0, 40, pooled))
    draw = lambda seed: (lambda batch, subsets: (batch.tokens.flatten()[subsets]).tolist())(
        *buffer.draw(8, 3, seeded(seed)))
    torch.manual_seed(0)
    first = draw(1)
    torch.manual_seed(1)
    assert draw(1) == first and draw(2) != first


# -------------------------------------------------------------------------------------------------------- fit

def threes(n, seed):
    """Preference: how many tokens are 3. Nobody says which token it was."""
    buffer, tokens = Buffer(n, True), ids(1, n, 6, high=8, seed=seed)
    buffer.add(Candidates(tokens, torch.ones(1, n, 6, dtype=torch.bool), (tokens == 3).sum(-1).float()))
    return buffer


def fresh_net(seed=0, **sizes):
    torch.manual_seed(seed)
    body = Transformer(
        Config(**({"vocab_size": 9, "n_ctx": 16, "n_layer": 1, "n_head": 2, "n_embd": 16} | sizes)))
    return TokenReward(body, 8, width=32)


def test_tie_loss_against_every_pair_in_turn():
    scores, preference = torch.randn(6, 4, generator=seeded()).double(), ids(6, 4, high=2).double()
    each = [math.log(math.cosh((a[i] - a[j]).item() / 2)) for a, p in zip(scores, preference)
            for i in range(4) for j in range(i) if p[i] == p[j]]
    assert tie_loss(scores, preference).item() == pytest.approx(sum(each) / len(each), rel=1e-9)


def test_ties_cost_nothing_where_scores_agree_or_nothing_ties():
    same_, order = torch.tensor([[2.0, 2.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert tie_loss(same_, order).item() == pytest.approx(0.0, abs=1e-7)
    assert tie_loss(torch.tensor([[5.0, 1.0, 0.0]]), torch.tensor([[3.0, 2.0, 1.0]])).item() == 0.0


def test_rank_adds_ties_by_their_weight_to_the_ranking():
    rewards, mask = torch.rand(3, 4, 5, generator=seeded()), torch.ones(3, 4, 5, dtype=torch.bool)
    preference = ids(3, 4, high=2).float()
    alone = rank(rewards, mask, preference, "sum", 2.0)
    more = rank(rewards, mask, preference, "sum", 2.0, 0.5)
    scores = rewards.sum(-1)
    assert alone.item() == pytest.approx(plackett_luce_loss(scores, preference).item(), rel=1e-5)
    assert (more - alone).item() == pytest.approx(0.5 * tie_loss(scores, preference).item(), rel=1e-4)


def spilled(ties):
    """How much more a reward pays the same words behind token 3, which alone makes a candidate good, than
    without it."""
    tokens = ids(1, 400, 5, high=8)
    group = Candidates(tokens, torch.ones_like(tokens, dtype=torch.bool), (tokens == 3).any(-1).float())
    buffer, net = Buffer(400, True), fresh_net()
    buffer.add(group)
    settings = FitSettings(steps=300, loss=functools.partial(ranking_loss, agg="sum", beta=2.0, ties=ties),
                           generator=seeded(), K=5, groups=32)
    fit(net, torch.optim.Adam(net.parameters(), lr=3e-3), (buffer, None), settings)
    r = net.guide(torch.tensor([[[3, 1, 2, 5, 6], [1, 2, 5, 6, 0]]]))[0]  # (2, T)
    return (r[0, 1:] - r[1, :4]).mean().item()


def test_ties_keep_credit_from_spilling_over_what_follows():
    """The ranking alone is content when all that stands behind the good token is paid like the token."""
    alone = spilled(0.0)
    assert alone > 1.0 and spilled(3.0) < alone - 0.2


def test_logits_out_of_reach_cost_by_hand():
    """A tenth of the squared distance from [-8, 8], mean over real tokens."""
    logits = torch.tensor([[-18.0, 7.9, 8.0], [10.0, -99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]) > 0
    assert out_of_reach(logits, mask).item() == pytest.approx(0.1 * (100 + 0 + 0 + 4) / 4)
    assert out_of_reach(logits, ~mask & mask).item() == 0.0


def test_a_reward_at_the_end_of_its_range_comes_back():
    """All logits at -14, where r is 0.0000008 and every score a tie: with --ties 60 steps bring them within
    reach, without they stay."""
    def lowest(ties):
        tokens = ids(1, 400, 5, high=8)
        buffer, net = Buffer(400, True), fresh_net()
        buffer.add(Candidates(tokens, torch.ones_like(tokens) > 0, (tokens == 3).any(-1).float()))
        net.mlp[2].bias.data.fill_(-14.0)
        settings = FitSettings(steps=60, loss=functools.partial(ranking_loss, agg="sum", beta=2.0, ties=ties),
                               generator=seeded(), K=5, groups=32)
        fit(net, torch.optim.Adam(net.parameters(), lr=1e-2), (buffer, None), settings)
        return net.logits(tokens).min().item()
    assert lowest(0.0) < -12 and lowest(1.0) > -10


def by_sum(net, batch, subsets):
    return ranking_loss(net, batch, subsets, "sum", 2.0)


def run_fit(net, steps, lr=3e-3, patience=10, fitted=None, held_out=None, fresh=None, check_every=20,
            head_first=0.0):
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    settings = FitSettings(steps=steps, loss=by_sum, generator=seeded(), K=4, groups=16,
                           check_every=check_every, patience=patience, fresh=fresh, head_first=head_first)
    said = fit(net, optimizer, (fitted or threes(150, 1), threes(80, 2) if held_out is None else held_out),
               settings)
    return said, optimizer


@pytest.fixture
def looks(monkeypatch):
    """Every held-out loss that `fit` measures."""
    seen = []
    monkeypatch.setattr(reward_module, "held_loss", lambda *x: seen.append(held_loss(*x)) or seen[-1])
    return seen


def test_fit_finds_the_token_that_nobody_named(looks):
    net = fresh_net()
    said, _ = run_fit(net, 200)
    right, pairs = rank_accuracy(net, threes(80, 3).data, "sum", 2.0)  # neither fitted nor used to stop
    assert right / pairs > 0.9
    # ties make it less than ln 4!
    assert said["reward_held_loss"] < looks[0] - 0.3 and looks[0] < math.log(24) + 0.01
    rewards = net.guide(torch.arange(8).view(1, 1, 8))[0, 0]
    assert rewards.argmax() == 3


def test_fit_on_fresh_candidates_each_step():
    net, asked = fresh_net(), []
    said, _ = run_fit(net, 30, fitted=threes(10, 1),
                      fresh=lambda: asked.append(1) or threes(16, 10 + len(asked)))
    assert len(asked) == 30 == said["reward_fit_steps"]


@pytest.mark.parametrize("share, alone", [(0.0, 0), (0.5, 3), (0.4, 2), (1.0, 6)])
def test_the_head_learns_alone_first_and_faster(share, alone, monkeypatch):
    """Six steps: in the first ones the body stays what it was, to the bit, at three times the rate."""
    net, seen = fresh_net(), []
    body = copy.deepcopy(net.body.state_dict())
    step = reward_module.descend

    def watched(net, optimizer, *x, **how):
        norm = step(net, optimizer, *x, **how)
        seen.append((optimizer.param_groups[0]["lr"], same_weights(net.body.state_dict(), body)))
        return norm
    monkeypatch.setattr(reward_module, "descend", watched)
    said, optimizer = run_fit(net, 6, lr=1e-3, check_every=100, held_out=Buffer(5, True), head_first=share)
    assert seen == [(pytest.approx(3e-3), True)] * alone + [(1e-3, False)] * (6 - alone)
    assert said["reward_fit_steps"] == 6 and optimizer.param_groups[0]["lr"] == 1e-3
    assert all(p.requires_grad for p in net.parameters())


def same_weights(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def test_what_the_head_learned_is_kept_where_the_body_makes_it_worse(monkeypatch):
    """Looks of the head: 1.0, better at 0.5; of both: no better. The weights of the second look are kept."""
    weights, net = looks_by_hand(monkeypatch, [1.0, 0.5, 0.5, 0.9]), fresh_net()
    said, _ = run_fit(net, 4, check_every=100, head_first=0.5)
    assert said["reward_held_loss"] == 0.5 and said["reward_fit_steps"] == 4
    assert same_weights(net.state_dict(), weights[1]) and same_weights(weights[1], weights[2])


def test_a_fit_that_is_interrupted_gives_the_body_back():
    net = fresh_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    with pytest.raises(KeyboardInterrupt), net.head_alone(optimizer):
        assert not net.body.wte.weight.requires_grad and net.mlp[0].weight.requires_grad
        raise KeyboardInterrupt
    assert net.body.wte.weight.requires_grad and optimizer.param_groups[0]["lr"] == 1e-3


def looks_by_hand(monkeypatch, losses):
    """Held-out losses from a list, whatever the net has learned -> a list of the net's
    weights at each look."""
    weights = []

    def look(net, *_):
        weights.append(copy.deepcopy(net.state_dict()))
        return losses[len(weights) - 1]
    monkeypatch.setattr(reward_module, "held_loss", look)
    return weights


def test_best_weights_are_the_ones_kept(monkeypatch):
    weights, net = looks_by_hand(monkeypatch, [1.0, 0.4, 0.6, 0.5, 0.8]), fresh_net()
    said, _ = run_fit(net, 20, patience=100, check_every=5)  # looks at 0, 5, 10, 15 and, because it ends, 20
    kept = net.state_dict()
    assert len(weights) == 5 and said["reward_held_loss"] == 0.4 and said["reward_fit_steps"] == 20
    assert all(torch.equal(kept[k], x) for k, x in weights[1].items())
    assert not all(torch.equal(kept[k], x) for k, x in weights[-1].items())


def test_last_weights_are_kept_where_they_are_the_best(monkeypatch):
    weights, net = looks_by_hand(monkeypatch, [1.0, 0.4, 0.6, 0.5, 0.3]), fresh_net()
    said, _ = run_fit(net, 20, patience=100, check_every=5)
    assert said["reward_held_loss"] == 0.3
    assert all(torch.equal(net.state_dict()[k], x) for k, x in weights[-1].items())


def test_stops_when_nothing_gets_better(monkeypatch):
    # the best look is the third, at step 10; less than a ten-thousandth better is not better;
    # three such looks end it
    looks_by_hand(monkeypatch, [1.0, 1.1, 0.9, 0.89995, 0.95, 0.9, 0.9])
    said, _ = run_fit(fresh_net(), 100, patience=3, check_every=5)
    assert said["reward_fit_steps"] == 25


def test_learning_rate_is_given_back_as_it_was():
    _, optimizer = run_fit(fresh_net(), 60, lr=0.1, patience=50, check_every=2)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_nothing_but_ties_changes_nothing():
    tied = Buffer(10, True)
    tied.add(Candidates(ids(1, 10, 6, high=8), torch.ones(1, 10, 6, dtype=torch.bool), torch.zeros(1, 10)))
    net = fresh_net()
    before = [p.clone() for p in net.parameters()]
    said, _ = run_fit(net, 5, fitted=tied)
    assert said["reward_loss"] is None and said["reward_fit_steps"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_without_held_out_candidates_all_steps_are_taken():
    net = fresh_net()
    said, _ = run_fit(net, 7, held_out=Buffer(5, True), patience=0, check_every=2)
    assert said["reward_fit_steps"] == 7 and said["reward_held_loss"] is None


def test_same_seed_same_fit():
    a, b = fresh_net(), fresh_net()
    run_fit(a, 5), run_fit(b, 5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_a_loss_that_is_not_finite_stops_the_fit():
    net = fresh_net()
    net.mlp[2].bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        run_fit(net, 3)
