"""The loop around the steps, on the world of stubs.py: every flag changes what it says and nothing else; then
rounds, evaluations, the last figures, checkpoints."""
import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from stubs import (A, B, END, POLICY, REFERENCES, REWARD, accuracy_by_hand, bound, fill, fill_reward, mean,
                   peek, rolled, rows_of, stub_run, table_of)

import evaluate
import rollout
import train
from data import pad
from objective import learn_from_rollout, policy_batch
from rollout import collect, dense_rewards

near = lambda x: pytest.approx(x, rel=1e-4, abs=1e-6)


@pytest.fixture
def make(monkeypatch, tmp_path):
    return lambda *typed, **more: stub_run(monkeypatch, tmp_path, *typed, **more)


@pytest.fixture(scope="module")
def rounds():
    """{objective: its round without further flags}: played once."""
    return {}


# --------------------------------------------------------------------------------- a flag and what it changes


def kept(x):
    """A copy of nested dicts and lists of tensors."""
    if torch.is_tensor(x):
        return x.detach().clone()
    if isinstance(x, dict):
        return {k: kept(v) for k, v in x.items()}
    return [kept(v) for v in x] if isinstance(x, (list, tuple)) else x


def same(a, b):
    if torch.is_tensor(a) and torch.is_tensor(b):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def a_round(run):
    """{name of a stage: what it leaves}, in the order of the data flow: one round as `train.loop` runs it."""
    words = lambda x: None if x is None else rows_of(x)
    out = {"start": kept([run.policy.state_dict(), run.reward.state_dict()])}
    train.reward_phase(run)
    out["candidates"], out["preference"] = (
        words(run.latest), kept(run.latest and run.latest.preference))
    out["fitted"], out["held"] = words(run.fitted.data), words(run.held_out.data)
    every = torch.arange(run.task.n_ids)[None, None]
    out["reward"] = kept([run.reward.guide(every), run.reward.state_dict()])
    out["normalizer"] = kept(run.normalizer)
    if run.c.objective == "ppo":
        lesson, prefix, _ = peek(run, learn_from_rollout)
        out["rollout"] = kept([lesson["tokens"], prefix, lesson["old"]])
        out["dense"] = kept(dense_rewards(run, *peek(run, rolled))[0])
        out |= {name: kept(lesson[name]) for name in ("values", "advantage", "returns")}
    else:
        batch, tokens, mask, rewards = peek(run, policy_batch)
        out["rollout"], out["dense"] = kept([tokens, mask, batch.context]), kept(rewards)
    run.objective.step(run)
    out["policy"], out["critic"] = table_of(run.policy), run.value and kept(run.value.state_dict())
    return out


PROMPTS = "--K 4 --explore_from policy --ask_again 0 --head_first 0 --no-exact_first --ties 0 --lr 0.3"
PAIRS = "--objective ppo --minibatches 2 --lr 0.3 --guidance"
BASE = {"reinforce": "--objective reinforce --weights immediate --alpha 0.1",
        "wmle": "--objective wmle --weights immediate",
        "ppo": "--objective ppo --epochs 2 --minibatches 2 --alpha 0.1 --lr 0.3",
        "mle": "--objective mle", "bandit": "--objective reinforce --guidance bandit --alpha 0.1",
        "bandit ppo": "--objective ppo --guidance bandit --epochs 2 --minibatches 2",
        "grouped": "--objective reinforce --guidance bandit --group_size 4",
        "prompt": f"{PROMPTS} --no-center", "prompts that tie": f"{PROMPTS} --no-center --resolution 3",
        "prompts all equal": f"{PROMPTS} --resolution 9",
        "pairs": f"{PAIRS} token --K 2", "labels": f"{PAIRS} edits",
        "implicit": f"{PAIRS} implicit --agg sum",
        "segments": f"{PAIRS} segment --segment_entropy 0.9"}
WORLDS = {**dict.fromkeys(("prompt", "prompts that tie", "prompts all equal"), {"pooled": True}),
          **dict.fromkeys(("pairs", "labels", "segments", "implicit"), {"pairs": True})}
SMALL = ("--candidates 16 --K 3 --reward_first 4 --reward_steps 2 --reward_lr 0.02 --reward_batch 6 "
         "--batch_size 8 --agg max --explore 0 --patience 50")
LEARN = {"policy"}                                     # the update alone
UPDATE = {"policy", "critic"}                          # the critic reads the states of the policy that moves
PAID = {"advantage", "returns"} | UPDATE               # from the rewards of a rollout on
FIT = {"reward", "normalizer", "dense"} | PAID               # from the fitted reward on
ASKED = {"candidates", "preference", "fitted", "held"} | FIT  # from the candidates on, but no rollout
NEVER = {"normalizer", "values", "advantage", "returns", "critic"}  # what only PPO has


CHANGES = {
    "ppo": {  # the longest chain
        "--lr 0.2": UPDATE, "--alpha 0.5": UPDATE, "--epochs 3": UPDATE, "--minibatches 3": UPDATE,
        "--ppo_clip 0.001": UPDATE, "--value_clip 0.001": {"critic"}, "--kl 0.9": PAID, "--gamma 0.8": PAID,
        "--lam 0.5": PAID, "--agg avg": FIT, "--beta 0.5": FIT, "--bound sigmoid": FIT,
        "--rank_temperature 0.5": FIT,
        "--reward_lr 0.01": FIT,
        "--reward_batch 5": FIT, "--resolution 0.4": FIT, "--reward_first 3": FIT, "--clip 0.01": FIT,
        "--replay 5": FIT | {"fitted"}, "--explore 0.5": ASKED, "--K 4": ASKED,
        "--noise 0.5": {"preference"} | FIT,
        "--batch_size 9": {"rollout", "dense", "values"} | PAID,
        "--top_k 2": ASKED | {"rollout", "values"}, "--seed 2": ASKED | {"rollout", "values"},
        "--candidates 15": ASKED | {"rollout", "values"},  # inputs are drawn in one order
        "--returns min": PAID, "--head_first 0.5": FIT, "--foreseen": FIT | {"start"}, "--guidance red": FIT,
        "--group_size 2": {"rollout", "dense", "values"} | PAID,
        "--replay 0": FIT | {"rollout", "values"},
        **dict.fromkeys(("--no-center", "--weights to_go", "--wmle_norm rewards", "--segment_entropy 2",
                         "--hold 9",
                         "--reward_steps 3", "--reward_every 7", "--eval_every 7", "--patience 1",
                         "--log_every 3", "--curve_size 4", "--exact_first", "--dpo_beta 0.5",
                         "--ask_again 3"),
                        set())},
    "reinforce": {
        "--lr 0.2": LEARN, "--alpha 0.5": LEARN, "--no-center": LEARN, "--weights to_go": LEARN,
        "--weights mean_to_go": LEARN, "--weights sequence": LEARN, "--agg avg": FIT - NEVER,
        "--dropout 0.5": FIT - NEVER, "--explore 0.5": ASKED - NEVER,
        "--top_k 2": ASKED - NEVER | {"rollout"}, "--kl 0.9": LEARN,
        "--noise 0.5": {"preference"} | FIT - NEVER, "--group_size 2": {"rollout", "dense"} | LEARN,
        **dict.fromkeys(("--gamma 0.5", "--returns min", "--baseline rloo", "--lam 0.5", "--epochs 3",
                         "--minibatches 3", "--value_clip 0.01",
                         "--ppo_clip 0.01", "--wmle_norm rewards", "--segment_entropy 2"), set())},
    "wmle": {
        "--wmle_norm rewards": LEARN, "--weights to_go": LEARN, "--lr 0.2": LEARN, "--beta 0.5": FIT - NEVER,
        "--clip 0.01": FIT - NEVER, "--explore 0.5": ASKED - NEVER, "--top_k 2": ASKED - NEVER,
        "--batch_size 9": LEARN | {"rollout", "dense"},
        **dict.fromkeys(("--no-center", "--alpha 0.5", "--kl 0.9", "--epochs 3", "--hold 9"), set())},
    "mle": {"--lr 0.2": LEARN, "--clip 0.01": LEARN, "--reward_lr 0.01": set(), "--agg avg": set()},
    "bandit": {
        "--lr 0.2": LEARN, "--noise 0.5": {"dense"} | LEARN, "--batch_size 9": {"rollout", "dense"} | LEARN,
        **dict.fromkeys(("--weights to_go", "--no-center", "--explore 0.5", "--candidates 9",
                         "--reward_lr 0.01"), set())},
    "bandit ppo": {"--kl 0.9": PAID, "--noise 0.5": {"dense"} | PAID,
                   **dict.fromkeys(("--explore 0.5", "--candidates 9", "--reward_lr 0.01"), set())},
    "grouped": {"--group_size 2": {"rollout", "dense"} | LEARN,
                **dict.fromkeys(("--baseline rloo", "--baseline group"), {"dense"} | LEARN)},
    "prompt": {  # one input, any candidates are compared
        "--lr 0.2": LEARN, "--alpha 0.5": LEARN, "--weights to_go": LEARN, "--center": LEARN,
        "--exact_first": LEARN, "--batch_size 9": {"rollout", "dense"} | LEARN,
        "--no-pool": FIT - NEVER | {"preference", "fitted", "held"},  # the same prompts, as questions of four
        "--foreseen": FIT - NEVER | {"start"}, "--guidance implicit --agg sum": FIT - NEVER | {"start"},
        "--replay 5": FIT - NEVER | {"fitted"}, "--noise 0.5": FIT - NEVER | {"preference"},
        **dict.fromkeys(("--explore 1", "--explore 1 --explore_from best", "--candidates 20"),
                        ASKED - NEVER),
        **dict.fromkeys(("--agg avg", "--beta 0.5", "--bound sigmoid", "--resolution 0.4", "--head_first 0.5",
                         "--rank_temperature 1",
                         "--K 3", "--replay 0", "--reward_lr 0.01", "--dropout 0.5", "--guidance red"),
                        FIT - NEVER),
        # what the policy learns from is asked about, and nothing else is
        "--guidance bandit": {"candidates", "preference", "fitted", "held"} | FIT - NEVER,
        **dict.fromkeys(("--kl 0.9", "--baseline rloo", "--ties 0.5", "--ask_again 2"), set())},
    "prompts that tie": {"--ties 0.5": FIT - NEVER},
    "prompts all equal": {"--ask_again 2": {"candidates", "preference", "fitted", "held"}},  # nothing to fit
    "pairs": {  # annotated before: nobody is asked
        "--lr 0.2": UPDATE, "--alpha 0.5": UPDATE,
        **dict.fromkeys(("--kl 0.9", "--gamma 0.8", "--lam 0.5", "--returns min"), PAID),
        **dict.fromkeys(("--agg avg", "--agg min", "--rank_temperature 0.5", "--bound sigmoid",
                         "--beta 0.5", "--head_first 0.5",
                         "--reward_first 3", "--reward_lr 0.01", "--reward_batch 5", "--clip 0.01",
                         "--dropout 0.5", "--guidance edits", "--guidance bandit", "--guidance red"), FIT),
        **dict.fromkeys(("--foreseen", "--guidance implicit --agg sum"), FIT | {"start"}),
        **dict.fromkeys(("--batch_size 9", "--top_k 2", "--group_size 2"),
                        {"rollout", "dense", "values"} | PAID),
        **dict.fromkeys(("--candidates 9", "--explore 0.5", "--replay 5", "--reward_steps 3", "--ask_again 3",
                         "--segment_entropy 2", "--ties 0.5", "--limit 3", "--answers 2"), set())},
    "labels": {"--bound sigmoid": FIT, "--reward_lr 0.01": FIT, "--head_first 0.5": FIT,
               **dict.fromkeys(("--agg avg", "--beta 0.5", "--ties 0.5", "--rank_temperature 0.5"), set())},
    "segments": {"--segment_entropy 2": FIT, "--agg avg": FIT},
    "implicit": {"--dpo_beta 0.5": FIT, "--reward_lr 0.01": FIT,
                 **dict.fromkeys(("--bound sigmoid", "--beta 0.5", "--foreseen", "--rank_temperature 0.5"),
                                 set())}}


@pytest.mark.parametrize("objective, flag", [(name, flag) for name in CHANGES for flag in CHANGES[name]])
def test_a_flag_changes_what_it_says_and_nothing_else(objective, flag, make, rounds):
    world = WORLDS.get(objective, {})
    played = lambda flag: a_round(make(f"{SMALL} {BASE[objective]} {flag}", plain=True, **world))
    if objective not in rounds:
        rounds[objective] = played("")
    base, other = rounds[objective], played(flag)
    assert {name for name in base if not same(base[name], other[name])} == CHANGES[objective][flag]


@functools.lru_cache
def pages_of_tests():
    """The text of every file of tests, read once."""
    return [page.read_text(encoding="utf-8") for page in Path(__file__).parent.glob("test_*.py")]


@pytest.mark.parametrize("flag", [field.name for field in dataclasses.fields(train.Flags)])
def test_every_flag_is_given_by_some_test(flag):
    """As it is typed, or as what a task reads: a flag that nobody has tried says what it likes."""
    given = re.compile(rf"--(no-)?{flag}\b|\b{flag}=(?!None)")
    assert any(given.search(page) for page in pages_of_tests())


# ------------------------------------------------------------------------------------------------------- loop


def opened(run):
    Path(run.c.out_dir).mkdir(exist_ok=True)
    run.open(None, {})
    return run


def rows(run, name):
    return [json.loads(line) for line in (Path(run.c.out_dir) / name).read_text().splitlines()]


def test_fits_steps_looks_and_lines_come_when_their_flags_say(make, monkeypatch):
    run = opened(make(f"{SMALL} --policy_steps 7 --reward_every 3 --eval_every 4 --log_every 2"))
    saved = []
    monkeypatch.setattr(run, "save", lambda: saved.append(run.step))
    train.loop(run)
    at = lambda phase: [row["step"] for row in rows(run, "metrics.jsonl") if row["phase"] == phase]
    assert at("reward") == [0, 3, 6] and at("policy") == [2, 4, 6, 7] and at("eval") == [0, 4, 7]
    assert saved == [3, 6, 7]
    fits = [row["reward_fit_steps"] for row in rows(run, "metrics.jsonl") if row["phase"] == "reward"]
    assert fits == [4, 2, 2] and run.task.queries == 3 * 16 * 3 and run.step == 7


def test_the_loop_is_a_fit_and_policy_steps_in_turn(make):
    """The same calls by hand end in the same weights: nothing else moves them, not even looking."""
    typed = f"{SMALL} --policy_steps 4 --reward_every 2 --eval_every 1 --hold 2 --lr 0.1"
    run, again = opened(make(typed)), opened(make(typed))
    train.loop(run)
    for step in range(4):
        if step % 2 == 0:
            train.reward_phase(again)
        again.objective.step(again)
        again.step += 1
    assert table_of(run.policy) == table_of(again.policy) != [list(row) for row in POLICY]
    assert same(kept(run.reward.state_dict()), kept(again.reward.state_dict()))


def test_the_learning_rate_falls_after_hold_updates(make):
    run, rates = make(f"{SMALL} --objective ppo --guidance bandit --hold 2 --lr 0.5"), []
    train.reward_phase(run)
    for _ in range(5):
        run.objective.step(run)
        rates.append([g["lr"] for g in run.policy_optimizer.param_groups])
        run.step += 1
    assert rates == [[0.5, 5.0]] * 3 + [[0.25, 2.5], [0, 0]]


# ------------------------------------------------------------------------------------------- evaluate, finish


def test_looking_changes_nothing_and_sees_the_same_each_time(make):
    run = opened(make("--dropout 0.5"))
    run.policy.train(), run.reward.train()
    before = whole(run)
    first, second = evaluate.evaluate(run), evaluate.evaluate(run)
    assert first == second and first["training"] is False and run.reward.training
    assert same(before, whole(run))
    assert first["draw"] == torch.rand((), generator=torch.Generator().manual_seed(1)).item()  # --seed's own
    assert evaluate.evaluate(opened(make("--seed 2")))["draw"] != first["draw"]


def test_samples_stand_beside_their_rewards(make):
    run = opened(make("", step=3))
    evaluate.evaluate(run)
    for row, ids, n in zip(rows(run, "samples.jsonl"), REFERENCES, range(2)):
        said = {"step": 3, "kind": "stub", "context": f"context {n}", "tokens": ["ab."[y] for y in ids],
                "rewards": [pytest.approx(bound(REWARD[y]), abs=1e-4) for y in ids],
                "reference": f"reference {n}",
                "text": "".join("ab."[y] for y in ids), "preference": sum((-0.5, 1.0, 0.0)[y] for y in ids)}
        assert {k: row[k] for k in said} == said
    assert len(rows(run, "samples.jsonl")) == 2


@pytest.mark.parametrize("guidance, pairs", [("token", False), ("bandit", True), ("implicit", True)])
def test_a_look_reads_the_shown_sequences_once(guidance, pairs, make, monkeypatch):
    flags = f"--objective reinforce --guidance {guidance}" + " --agg sum" * (guidance == "implicit")
    run, seen = opened(make(flags, pairs=pairs)), []
    guide = run.reward.guide
    monkeypatch.setattr(run.reward, "guide", lambda *x: seen.append(x) or guide(*x))
    evaluate.evaluate(run)
    assert len(seen) == 1
    x = shown(run)
    ends = evaluate.answer_ends(run, seen[0][0], x.mask, x.batch.prefix())
    scores = evaluate.aggregate(guide(*seen[0]), ends, run.c.agg, run.c.beta).flatten().tolist()
    assert [row["score"] for row in rows(run, "samples.jsonl")] == pytest.approx(scores, abs=1e-4)


def shown(run):
    """What a look at this run shows."""
    return run.task.samples(run.policy, torch.Generator())


def of(x, levels):
    """Candidates -> groups of sequences, and preferences in whole multiples of `levels`."""
    return ([[t[m].tolist() for t, m in zip(*both)] for both in zip(x.tokens, x.mask)],
            [[round(p / levels) for p in row] for row in x.preference.tolist()])


@pytest.mark.parametrize("agg, score", [("avg", mean), ("sum", sum)])
def test_held_out_accuracy_is_on_fresh_candidates_and_costs_nothing(agg, score, make, monkeypatch):
    run = make(f"--agg {agg} --candidates 6 --K 3 --resolution 0.3 --dropout 0.5")
    wrong = (2.0, -0.5, 1.0)
    fill_reward(run.reward, wrong)
    seen = []
    monkeypatch.setattr(evaluate, "collect", lambda *x, **y: seen.append(collect(*x, **y)) or seen[-1])
    before = [g.get_state() for g in run.generators.values()]
    got = evaluate.share(*evaluate.held_out_pairs(run))
    groups = [of(x, 0.3) for x in seen]
    members, liked = [g for x, _ in groups for g in x], [p for _, x in groups for p in x]
    assert len(members) == 8 * 6 and len({tuple(map(tuple, g)) for g in members}) > 8  # not the same again
    assert got == near(accuracy_by_hand(members, liked, wrong, score))
    assert 0 < got < 1
    assert run.task.queries == 0 and same(before, [g.get_state() for g in run.generators.values()])


def test_the_last_figures_say_what_the_run_was(make):
    run = opened(make("--candidates 6 --objective reinforce --agg sum --seed 3"))
    summary = evaluate.finish(run)
    assert json.loads(Path(run.c.out_dir, "summary.json").read_text()) == summary
    assert summary["rank_accuracy"] == evaluate.share(*evaluate.held_out_pairs(run)) > 0.5
    expected = {"task": "summarize", "objective": "reinforce", "guidance": "token", "agg": "sum", "seed": 3,
                "device": "cpu", "params_policy": 9, "params_reward": 9 + 3 * 256 + 256 + 256 + 1,
                "figure": 7.0, "training": False}
    assert {k: summary[k] for k in expected} == expected


@pytest.mark.parametrize("pairs", [False, True])
def test_warnings_are_of_the_accuracy_that_the_summary_has(pairs, make, monkeypatch):
    run = opened(make("--candidates 8 --objective reinforce --guidance token --reward_first 5", pairs=pairs))
    train.reward_phase(run)
    run.log.figures("reward", 0, {})
    seen = []
    monkeypatch.setattr(evaluate, "reward_warnings", lambda *x: seen.append(x) or ["said"])
    summary = evaluate.finish(run)
    (_, (right, total), x, _), = seen
    assert summary["rank_accuracy"] == right / total and summary["warnings"] == ["said"]
    held_out = rollout.annotated(run, "test") if pairs else run.held_out.data
    assert torch.equal(x.tokens, held_out.tokens)


@pytest.mark.parametrize("flags", ["--objective mle", "--objective reinforce --guidance bandit"])
def test_where_no_reward_was_learned_none_is_examined(flags, make):
    run = opened(make(flags))
    assert evaluate.finish(run)["rank_accuracy"] is None and run.task.queries == 0


# Under bandit guidance the reward is read at END alone, which all answers have.
@pytest.mark.parametrize("guidance, right", [("token", 1.0), ("edits", 1.0), ("bandit", 0.5)])
def test_the_last_figures_of_edits_are_of_their_test_pairs(guidance, right, make):
    summary = evaluate.finish(opened(make(f"--guidance {guidance}", pairs=True)))
    assert summary["rank_accuracy"] == right and summary["length_rank_accuracy"] == 0.5
    assert summary["reward_of_b"] == near(bound(REWARD[B]))


@pytest.mark.parametrize("agg, right", [("avg", 1.0), ("sum", 0.0)])  # the worse answer is longer
def test_the_last_accuracy_of_edits_is_on_test_pairs_with_the_runs_own_f(agg, right, make):
    run = opened(make(f"--guidance token --agg {agg}", pairs=True))
    fill_reward(run.reward, (0.0, 0.2, 0.0))
    tokens, mask = pad([[A, A, A, END], [B, END]], 4)
    context = torch.tensor([A]), torch.tensor([True])
    pair = [x[None] for x in (tokens, mask, torch.tensor([0.0, 1.0]), *context, 0 * tokens)]
    run.task.pairs = lambda split: {"test": pair}[split]
    summary = evaluate.finish(run)
    assert summary["rank_accuracy"] == right and summary["length_rank_accuracy"] == 0


# ------------------------------------------------------------------------------------------------- checkpoint


def whole(run):
    """Every part of a run that a later step reads."""
    parts = {"policy": run.policy, "critic": run.value, "reward": run.reward,
             "start_policy": run.start_policy,
             "policy_optimizer": run.policy_optimizer, "reward_optimizer": run.reward_optimizer}
    data = {"fitted": run.fitted.data, "held": run.held_out.data}
    return {"step": run.step, "normalizer": kept(run.normalizer), "queries": run.task.queries,
            "torch": torch.get_rng_state(),
            **{f"generator {k}": g.get_state() for k, g in run.generators.items()},
            **{k: x and kept(x.state_dict()) for k, x in parts.items()},
            **{k: x and kept(vars(x)) for k, x in data.items()}}


PARTS = {"step", "policy", "policy_optimizer", "queries", "torch", "generator data", "start_policy"}
LEARNED = {"reward", "reward_optimizer", "fitted", "held", "generator fit", "generator candidates"}


@pytest.mark.parametrize("flags, parts", [
    ("--objective ppo --minibatches 2", PARTS | LEARNED | {"critic", "normalizer", "generator sample"}),
    ("--objective reinforce", PARTS | LEARNED | {"generator sample"}), ("--objective wmle", PARTS | LEARNED),
    ("--objective reinforce --guidance bandit", PARTS | {"generator sample"}),
    ("--objective reinforce --noise 0.5", PARTS | LEARNED | {"generator noise"}),
    ("--objective ppo --guidance bandit", PARTS | {"critic", "generator sample"})])
def test_a_checkpoint_holds_every_part_and_the_run_goes_on_to_the_bit(flags, parts, make):
    typed = f"{SMALL} {flags} --reward_every 2 --lr 0.1 --hold 2 --policy_steps"
    run = opened(make(typed + " 3"))
    torch.rand(3)  # as dropout would draw
    train.loop(run)
    here = whole(run)
    other = make(typed + " 5")
    fill(other.start_policy, [[0.0] * 3] * 3)
    fresh = whole(other)
    unlike = {name for name in here if not same(here[name], fresh[name])}
    assert parts <= unlike  # each of them has something to lose
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
