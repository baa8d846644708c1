"""The loop around the steps: every flag changes what it says and nothing else, the rounds, evaluations, the last
figures, and checkpoints; on the world of stubs.py."""
import json
from pathlib import Path

import pytest
import torch
from stubs import (A, B, END, POLICY, REFERENCES, REWARD, accuracy_by_hand, bound, fill, fill_reward, mean, peek, stub_run,
                   table_of)

import train
from rollout import collect, dense_rewards, learn_from_rollout, rollout

near = lambda x: pytest.approx(x, rel=1e-4, abs=1e-6)


@pytest.fixture
def make(monkeypatch, tmp_path):
    return lambda *typed, **more: stub_run(monkeypatch, tmp_path, *typed, **more)


@pytest.fixture(scope="module")
def rounds():
    """{objective: its round without further flags}: played once."""
    return {}


# ------------------------------------------------------------------------------------------- a flag and what it changes


def kept(x):
    """A copy of nested dicts and lists of tensors."""
    if torch.is_tensor(x):
        return x.detach().clone()
    return {k: kept(v) for k, v in x.items()} if isinstance(x, dict) else [kept(v) for v in x] if isinstance(x, (list, tuple)) else x


def same(a, b):
    if torch.is_tensor(a) and torch.is_tensor(b):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def a_round(run):
    """{name of a stage: what it leaves}, in the order of the data flow: one round as `train.loop` runs it."""
    words = lambda x: None if x is None else [t[m].tolist() for t, m in zip(x.tokens.flatten(0, 1), x.mask.flatten(0, 1))]
    out = {"start": kept([run.policy.state_dict(), run.reward.state_dict()])}
    train.reward_phase(run)
    out["candidates"], out["preference"] = words(run.latest), kept(run.latest and run.latest.preference)
    out["fitted"], out["held"] = words(run.train.data), words(run.held.data)
    out["reward"] = kept([run.reward.guide(torch.tensor([[[A, B, END]]])), run.reward.state_dict()])
    out["line"] = kept(run.line)
    if run.c.objective == "ppo":
        lesson, prefix, _ = peek(run, learn_from_rollout)
        out["rollout"] = kept([lesson["tokens"], prefix, lesson["old"]])
        out["dense"] = kept(dense_rewards(run, *peek(run, rollout)))
        out["values"], out["advantage"], out["returns"] = [kept(lesson[k]) for k in ("values", "advantage", "returns")]
    else:
        batch, tokens, mask, rewards = peek(run, train.policy_batch)
        out["rollout"], out["dense"] = kept([tokens, mask, batch.context]), kept(rewards)
    train.policy_step(run)
    out["policy"], out["critic"] = table_of(run.policy), kept(run.value.state_dict())
    return out


BASE = {"reinforce": "--objective reinforce --weights immediate --alpha 0.1",
        "wmle": "--objective wmle --weights immediate",
        "ppo": "--objective ppo --epochs 2 --minibatches 2 --alpha 0.1 --lr 0.3",
        "mle": "--objective mle", "bandit": "--objective reinforce --guidance bandit --alpha 0.1",
        "bandit ppo": "--objective ppo --guidance bandit --epochs 2 --minibatches 2"}
SMALL = ("--candidates 16 --K 3 --reward_first 4 --reward_steps 2 --reward_lr 0.02 --reward_batch 6 --batch_size 8 --agg max "
         "--explore 0 --patience 50")
LEARN = {"policy"}                                     # the update alone
UPDATE = {"policy", "critic"}                          # the critic reads the states of the policy that moves
PAID = {"advantage", "returns"} | UPDATE               # from the rewards of a rollout on
FIT = {"reward", "line", "dense"} | PAID               # from the fitted reward on
ASKED = {"candidates", "preference", "fitted", "held"} | FIT  # from the candidates on, but no rollout
NEVER = {"line", "values", "advantage", "returns", "critic"}  # what only PPO has


@pytest.mark.parametrize("objective, flag, changed", [
    # PPO: the longest chain
    ("ppo", "--lr 0.2", UPDATE), ("ppo", "--alpha 0.5", UPDATE), ("ppo", "--epochs 3", UPDATE), ("ppo", "--minibatches 3", UPDATE),
    ("ppo", "--ppo_clip 0.001", UPDATE), ("ppo", "--value_clip 0.001", {"critic"}), ("ppo", "--kl 0.9", PAID),
    ("ppo", "--gamma 0.8", PAID), ("ppo", "--lam 0.5", PAID), ("ppo", "--agg avg", FIT), ("ppo", "--beta 0.5", FIT),
    ("ppo", "--bound sigmoid", FIT), ("ppo", "--reward_lr 0.01", FIT), ("ppo", "--reward_batch 5", FIT),
    ("ppo", "--resolution 0.4", FIT), ("ppo", "--reward_first 3", FIT), ("ppo", "--explore 0.5", ASKED), ("ppo", "--K 4", ASKED),
    ("ppo", "--batch_size 9", {"rollout", "dense", "values"} | PAID), ("ppo", "--center", set()), ("ppo", "--weights to_go", set()),
    ("ppo", "--top_k 2", ASKED | {"rollout", "values"}), ("ppo", "--candidates 15", ASKED | {"rollout", "values"}),
    ("ppo", "--seed 2", ASKED | {"rollout", "values"}), ("ppo", "--wmle_norm rewards", set()), ("ppo", "--segment_entropy 2", set()),
    ("ppo", "--reward_steps 3", set()), ("ppo", "--reward_every 7", set()), ("ppo", "--eval_every 7", set()), ("ppo", "--hold 9", set()),
    ("ppo", "--replay 5", FIT | {"fitted"}), ("ppo", "--patience 1", set()),
    ("ppo", "--clip 0.01", FIT), ("ppo", "--replay 0", FIT | {"rollout", "values"}),  # new candidates move the order of the inputs
    # REINFORCE
    ("reinforce", "--lr 0.2", LEARN), ("reinforce", "--alpha 0.5", LEARN), ("reinforce", "--no-center", LEARN),
    ("reinforce", "--weights to_go", LEARN), ("reinforce", "--weights mean_to_go", LEARN), ("reinforce", "--weights sequence", LEARN),
    ("reinforce", "--agg avg", FIT - NEVER), ("reinforce", "--top_k 2", ASKED - NEVER | {"rollout"}),
    ("reinforce", "--explore 0.5", ASKED - NEVER), ("reinforce", "--dropout 0.5", FIT - NEVER),
    *(("reinforce", flag, set()) for flag in ("--kl 0.9", "--gamma 0.5", "--lam 0.5", "--epochs 3", "--minibatches 3", "--value_clip 0.01",
                                              "--ppo_clip 0.01", "--wmle_norm rewards", "--segment_entropy 2")),
    # references
    ("wmle", "--wmle_norm rewards", LEARN), ("wmle", "--weights to_go", LEARN), ("wmle", "--lr 0.2", LEARN),
    ("wmle", "--beta 0.5", FIT - NEVER), ("wmle", "--explore 0.5", ASKED - NEVER), ("wmle", "--top_k 2", ASKED - NEVER),
    ("wmle", "--batch_size 9", LEARN | {"rollout", "dense"}), ("wmle", "--objective mle", {"fitted", "held", "reward", "dense"} | LEARN),
    *(("wmle", flag, set()) for flag in ("--no-center", "--alpha 0.5", "--kl 0.9", "--epochs 3", "--hold 9")),
    ("wmle", "--clip 0.01", FIT - NEVER), ("mle", "--clip 0.01", LEARN), ("mle", "--reward_lr 0.01", set()), ("mle", "--agg avg", set()), ("mle", "--lr 0.2", LEARN),
    # the preference itself
    ("bandit", "--weights to_go", set()), ("bandit", "--no-center", set()), ("bandit", "--batch_size 9", set()),
    ("bandit", "--explore 0.5", ASKED - NEVER - {"fitted", "held", "reward"} | {"rollout"}), ("bandit", "--lr 0.2", LEARN),
    ("bandit ppo", "--explore 0.5", {"candidates", "preference"}), ("bandit ppo", "--reward_lr 0.01", set()),
    ("bandit ppo", "--kl 0.9", PAID)])
def test_a_flag_changes_what_it_says_and_nothing_else(objective, flag, changed, make, rounds):
    played = lambda flag: a_round(make(f"{SMALL} {BASE[objective]} {flag}", plain=True))
    if objective not in rounds:
        rounds[objective] = played("")
    base, other = rounds[objective], played(flag)
    assert same(base["start"], other["start"])
    assert {name for name in base if not same(base[name], other[name])} == changed


# ---------------------------------------------------------------------------------------------------------------- loop


def opened(run):
    run.open(None, "asked for")
    return run


def rows(run, name):
    return [json.loads(line) for line in (Path(run.c.out_dir) / name).read_text().splitlines()]


def test_fits_steps_looks_and_lines_come_when_their_flags_say(make, monkeypatch):
    run = opened(make(f"{SMALL} --policy_steps 7 --reward_every 3 --eval_every 4 --log_every 2"))
    saved = []
    monkeypatch.setattr(run, "save", lambda: saved.append(run.step))
    train.loop(run)
    at = lambda phase: [row["step"] for row in rows(run, "metrics.jsonl") if row["phase"] == phase]
    assert at("reward") == [0, 3, 6] and at("policy") == [2, 4, 6, 7] and at("eval") == [0, 4, 7] and saved == [3, 6, 7]
    fits = [row["reward_fit_steps"] for row in rows(run, "metrics.jsonl") if row["phase"] == "reward"]
    assert fits == [4, 2, 2] and run.task.queries == 3 * 16 * 3 and run.step == 7


def test_the_loop_is_a_fit_and_policy_steps_in_turn(make):
    """The same calls by hand end in the same weights: nothing else moves them, not even looking."""
    run, again = [opened(make(f"{SMALL} --policy_steps 4 --reward_every 2 --eval_every 1 --hold 2 --lr 0.1")) for _ in range(2)]
    train.loop(run)
    for step in range(4):
        if step % 2 == 0:
            train.reward_phase(again)
        train.policy_step(again)
        again.step += 1
    assert table_of(run.policy) == table_of(again.policy) != [list(row) for row in POLICY]
    assert same(kept(run.reward.state_dict()), kept(again.reward.state_dict()))


def test_the_learning_rate_falls_after_hold_updates(make):
    run, rates = make(f"{SMALL} --objective ppo --guidance bandit --hold 2 --lr 0.5"), []
    train.reward_phase(run)
    for _ in range(5):
        train.policy_step(run)
        rates.append([g["lr"] for g in run.policy_opt.param_groups])
        run.step += 1
    assert rates == [[0.5, 5.0]] * 3 + [[0.25, 2.5], [0, 0]]


# ----------------------------------------------------------------------------------------------------- evaluate, finish


def test_looking_changes_nothing_and_sees_the_same_each_time(make):
    run = opened(make("--dropout 0.5"))
    run.policy.train(), run.reward.train()
    before = kept([run.policy.state_dict(), run.reward.state_dict(), [g.get_state() for g in run.generators.values()],
                   torch.get_rng_state(), run.task.queries])
    first, second = train.evaluate(run), train.evaluate(run)
    assert first == second and first["training"] is False and run.reward.training
    assert same(before, kept([run.policy.state_dict(), run.reward.state_dict(), [g.get_state() for g in run.generators.values()],
                              torch.get_rng_state(), run.task.queries]))
    assert first["draw"] == torch.rand((), generator=torch.Generator().manual_seed(1)).item()  # --seed's own
    assert train.evaluate(opened(make("--seed 2")))["draw"] != first["draw"]


def test_samples_stand_beside_their_rewards(make):
    run = opened(make("", step=3))
    train.evaluate(run)
    for row, ids, n in zip(rows(run, "samples.jsonl"), REFERENCES, range(2)):
        assert row == {"step": 3, "kind": "stub", "context": f"context {n}", "tokens": ["ab."[y] for y in ids],
                       "rewards": [pytest.approx(bound(REWARD[y]), abs=1e-4) for y in ids], "text": "".join("ab."[y] for y in ids),
                       "preference": sum({A: -0.5, B: 1.0, END: 0.0}[y] for y in ids), "reference": f"reference {n}"}
    assert len(rows(run, "samples.jsonl")) == 2


def of(x, levels):
    """Candidates -> groups of sequences, and preferences in whole multiples of `levels`."""
    return ([[t[m].tolist() for t, m in zip(*both)] for both in zip(x.tokens, x.mask)],
            [[round(p / levels) for p in row] for row in x.preference.tolist()])


@pytest.mark.parametrize("agg, score", [("avg", mean), ("sum", sum)])
def test_held_out_accuracy_is_on_fresh_candidates_and_costs_nothing(agg, score, make):
    run = make(f"--agg {agg} --candidates 6 --K 3 --resolution 0.3 --dropout 0.5")
    wrong = (2.0, -0.5, 1.0)
    fill_reward(run.reward, wrong)
    groups = peek(run, lambda run: [of(collect(run), 0.3) for _ in range(8)])
    before = [g.get_state() for g in run.generators.values()]
    got = train.held_out_accuracy(run)
    assert got == near(accuracy_by_hand([g for x, _ in groups for g in x], [p for _, x in groups for p in x], wrong, score))
    assert 0 < got < 1
    assert run.task.queries == 0 and same(before, [g.get_state() for g in run.generators.values()])


def test_the_last_figures_say_what_the_run_was(make):
    run = opened(make("--candidates 6 --objective reinforce --agg sum --seed 3"))
    summary = train.finish(run)
    assert json.loads(Path(run.c.out_dir, "summary.json").read_text()) == summary
    assert summary["rank_accuracy"] == train.held_out_accuracy(run) and summary["rank_accuracy"] > 0.5
    expected = {"task": "summarize", "objective": "reinforce", "guidance": "token", "agg": "sum", "seed": 3, "device": "cpu",
                "params_policy": 9, "params_reward": 9 + 3 * 256 + 256 + 256 + 1, "figure": 7.0, "training": False}
    assert {k: summary[k] for k in expected} == expected


@pytest.mark.parametrize("flags", ["--objective mle", "--objective reinforce --guidance bandit"])
def test_where_no_reward_was_learned_none_is_examined(flags, make):
    run = opened(make(flags))
    assert train.finish(run)["rank_accuracy"] is None and run.task.queries == 0


@pytest.mark.parametrize("guidance, right", [("token", 1.0), ("edits", 1.0), ("bandit", 0.5)])  # bandit: read at END, which all have
def test_the_last_figures_of_edits_are_of_their_test_pairs(guidance, right, make):
    summary = train.finish(opened(make(f"--guidance {guidance}", pairs=True)))
    assert summary["rank_accuracy"] == right and summary["length_rank_accuracy"] == 0.5
    assert summary["reward_of_b"] == near(bound(REWARD[B]))


# ------------------------------------------------------------------------------------------------------------ checkpoint


def whole(run):
    """Every part of a run that a later step reads."""
    data = lambda x: None if x is None else kept([x.tokens, x.mask, x.preference, x.context, x.context_mask, x.labels, x.ends])
    return {"step": run.step, "policy": kept(run.policy.state_dict()), "critic": kept(run.value.state_dict()),
            "reward": kept(run.reward.state_dict()), "first": run.first and kept(run.first.state_dict()), "line": kept(run.line),
            "latest": data(run.latest), "fitted": data(run.train.data), "held": data(run.held.data), "queries": run.task.queries,
            "policy_opt": kept(run.policy_opt.state_dict()), "reward_opt": kept(run.reward_opt.state_dict()),
            "torch": torch.get_rng_state(), **{f"generator {k}": g.get_state() for k, g in run.generators.items()}}


PARTS = {"step", "policy", "policy_opt", "latest", "queries", "torch", "generator candidates", "generator data"}
LEARNED = {"reward", "reward_opt", "fitted", "held", "generator fit"}


@pytest.mark.parametrize("flags, parts", [
    ("--objective ppo --minibatches 2", PARTS | LEARNED | {"first", "critic", "line", "generator sample"}),
    ("--objective reinforce", PARTS | LEARNED | {"generator sample"}), ("--objective wmle", PARTS | LEARNED),
    ("--objective reinforce --guidance bandit", PARTS), ("--objective ppo --guidance bandit", PARTS | {"first", "critic"})])
def test_a_checkpoint_holds_every_part_and_the_run_goes_on_to_the_bit(flags, parts, make):
    typed = f"{SMALL} {flags} --reward_every 2 --lr 0.1 --hold 2 --policy_steps"
    run = opened(make(typed + " 3"))
    torch.rand(3)  # as dropout would draw
    train.loop(run)
    here = whole(run)
    other = make(typed + " 5")
    if other.first:
        fill(other.first, [[0.0] * 3] * 3)
    fresh = whole(other)
    assert parts <= {name for name in here if not same(here[name], fresh[name])}  # each of them has something to lose
    other.load(torch.load(Path(run.c.out_dir, "ckpt.pt"), weights_only=True))
    there = whole(other)
    assert {name for name in here if not same(here[name], there[name])} == set()
    run.c.policy_steps = 5
    train.loop(run)
    end = whole(run)
    torch.set_rng_state(here["torch"])
    opened(other)
    train.loop(other)
    assert same(end, whole(other))
