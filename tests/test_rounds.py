"""What a round of the loop promises: what is held out, explored, compared and paid, and what a run
says of itself when nothing was learned. Tiny runs through `train.main`, and stubs where a number can
be computed on paper."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import mask_of, seeded
from test_train import (edits, go, here, load, look, metrics, prompt, refuses, shared,  # noqa: F401
                        summarize, write_edits, write_jsonl, write_pairs)

import evaluate
import guidance
import objective as objective_room
import policy_wmle
import rollout
import train
from data import Batch
from model import Transformer
from reward import Buffer, Candidates, rank

# ---------------------------------------------------------------------------------------------------- helpers


def spy(monkeypatch, place, name, note):
    """Every call of place.NAME goes on as before and is noted: note(arguments, result)."""
    real = getattr(place, name)

    def noted(*args, **kw):
        out = real(*args, **kw)
        note(args, out)
        return out
    monkeypatch.setattr(place, name, noted)


def buffers(folder):
    """What the reward of a run was fitted to, and what was held out."""
    found = load(folder)["buffers"]
    return found["fitted"], found["held_out"]


def contexts(candidates):
    """The inputs of some Candidates of a checkpoint, as a set."""
    return {tuple(row[mask].tolist()) for row, mask in zip(candidates["context"], candidates["context_mask"])}


def numbered_edits(folder, n):
    """n rows whose prompts all differ."""
    for name in ("train", "test"):
        write_jsonl(Path(folder) / f"{name}.jsonl", [
            {"prompt": "say " + " ".join(format(i, "07b")), "rejected": "two tree sat",
             "edited": "two cats sat"}
            for i in range(n)])
    return folder


def summary(folder="a"):
    return json.loads(Path(folder, "summary.json").read_text())


# --------------------------------------------------------------------------------------------------- held out


def test_an_eighth_is_held_out_and_of_few_rows_a_quarter():
    assert [rollout.held_share(n, 32) for n in (1, 3, 4, 100, 128, 200, 256, 4000)] == [
        0, 0, 1, 25, 32, 32, 32, 500]


def test_held_out_edits_are_drawn_by_seed(edits):
    kept = {}
    for seed in (1, 2):
        go(*edits, "--data", numbered_edits("e", 24), "--seed", seed, "--out_dir", f"a{seed}")
        fitted, kept[seed] = map(contexts, buffers(f"a{seed}"))
        assert len(fitted) == 18 and len(kept[seed]) == 6 and not fitted & kept[seed]
    assert kept[1] != kept[2]


def test_candidates_of_a_held_out_document_are_never_fitted(summarize, monkeypatch):
    asked = []
    for place in (train, evaluate):
        spy(monkeypatch, place, "collect", lambda args, out: asked.append(vars(out)))
    go(*summarize, "--candidates", 8, "--policy_steps", 8, "--out_dir", "a")
    fitted, kept = [contexts(x) for x in buffers("a")]
    assert len(fitted) > 8 and len(kept) > 1 and not fitted & kept
    assert len(asked) == 4 + 8
    assert not any(contexts(x) & fitted for x in asked[4:])  # rank_accuracy: of held-out documents only


def test_the_first_look_has_a_quarter_of_few_groups(summarize):
    go(*summarize, "--candidates", 32, "--policy_steps", 1, "--out_dir", "a")
    assert [len(x["tokens"]) for x in buffers("a")] == [24, 8]


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_rows_to_hold_any_out(n, edits, summarize):
    go(*edits, "--data", write_edits(Path("e"), n), "--out_dir", "a")
    go(*summarize, "--data", write_pairs(Path("p"), n), "--objective", "ppo", "--minibatches", 2,
       "--out_dir", "b")
    for folder in "ab":
        assert buffers(folder)[1] is None or not len(buffers(folder)[1]["tokens"])
        assert all(row["reward_held_loss"] is None for row in metrics(folder) if "reward_held_loss" in row)


# ----------------------------------------------------------------------------------------- candidates, groups


def test_random_tokens_neither_move_nor_remove_end_of_text(monkeypatch):
    eot, mask = 5, mask_of(*(1 + i % 8 for i in range(400)), width=8)[:, None]
    tokens = torch.where(mask, 1, 0)
    # all answers have ended, the first ones at once
    tokens[:, 0][torch.arange(400), mask.sum(-1)[:, 0] - 1] = eot
    monkeypatch.setattr(rollout, "sample", lambda *x: (tokens, mask))
    task = SimpleNamespace(pooled=False, n_ids=6, eot=eot,
                           prefer=lambda batch, tokens, mask: torch.zeros(tokens.shape[:2]),
                           told=lambda *x: None)
    run = SimpleNamespace(c=SimpleNamespace(candidates=400, K=1, explore=1.0, planted=0.0, noise=0.0,
                                            guidance="token", explore_from="policy"), task=task,
                          generators={name: seeded() for name in ("data", "candidates", "noise")})
    got = rollout.collect(run, Batch(torch.zeros(400)))
    assert torch.equal(got.tokens == eot, tokens == eot) and torch.equal(got.mask, mask)
    words = mask & (tokens != eot)
    # half, but for those that drew what was there
    assert 0.3 < (got.tokens != tokens)[words].float().mean() < 0.5


def ranking_buffer(n, k, preference):
    """n groups of k candidates of one token, their number."""
    tokens = torch.arange(n * k).view(n, k, 1)
    buffer = Buffer(n, pooled=False)
    buffer.add(Candidates(tokens, torch.ones_like(tokens, dtype=torch.bool), preference.expand(n, k)))
    return buffer


def test_fewer_than_a_ranking_has_are_random_subsets_with_a_strict_pair():
    buffer, seen = ranking_buffer(6, 4, torch.tensor([0.0, 0.0, 0.0, 1.0])), set()
    for seed in range(20):
        batch, subsets = buffer.draw(6, 2, seeded(seed))
        members = batch.tokens.flatten()[subsets]
        assert 0 < len(subsets) <= 6 and subsets.shape[1] == 2 and (members // 4 == members[:, :1] // 4).all()
        assert (batch.preference.flatten()[subsets].sum(1) == 1).all()  # the good one and another
        seen |= set((members % 4).amin(1).tolist())
    assert seen == {0, 1, 2}


def test_all_that_a_ranking_has_are_compared_by_default_and_said(edits, capsys):
    rows = [{"prompt": f"say {i}", "candidates": ["a b", "a c", "a d"], "scores": [2, 0.5, 1]}
            for i in range(12)]
    for name in ("train", "test"):
        write_jsonl(Path("ranks") / f"{name}.jsonl", rows)
    ranked = [*edits, "--data", "ranks", "--guidance", "token"]
    assert "--K 4: expected at most 3" in refuses(capsys, *ranked, "--K", 4, "--out_dir", "a")
    for given, used in (([], 3), (["--K", 2], 2)):
        go(*ranked, *given, "--out_dir", f"a{used}")
        assert json.loads(Path(f"a{used}/config.json").read_text())["K"] == used
    losses = [metrics(folder)[0]["reward_loss"] for folder in ("a3", "a2")]
    assert losses[0] > 1.5 and losses[1] < 0.8  # an untrained net: log 3! and log 2


# ------------------------------------------------------------------------------------ what the policy is paid


def bandit(objective, preference, resolution):
    """A stub run under bandit guidance whose samples have this preference."""
    mask = torch.ones(1, len(preference), 3, dtype=torch.bool)
    task = SimpleNamespace(has_pairs=False, prefer=lambda *x: torch.tensor([preference]),
                           told=lambda *x: None)
    c = SimpleNamespace(objective=objective, guidance="bandit", resolution=resolution,
                        segment_entropy=0.3, baseline="batch", noise=0.0)
    run = SimpleNamespace(c=c, task=task, objective=train.OBJECTIVES[objective], learns_reward=False,
                          generators={"noise": seeded()})
    return run, (Batch(torch.zeros(1)), mask.long(), mask)


@pytest.mark.parametrize("objective", ["reinforce", "ppo"])
def test_bandit_differences_below_the_resolution_are_not_blown_up(objective, monkeypatch):
    for preference, expected in (([10.0, 30.0], [-0.5 ** 0.5, 0.5 ** 0.5]),
                                 ([10.0, 10.5], [-0.25 / 5, 0.25 / 5])):
        run, x = bandit(objective, preference, 5.0)  # sample deviations: 14.14 and 0.354, which counts as 5
        monkeypatch.setattr(objective_room, "rollout", lambda run: x)
        paid = objective_room.policy_batch(run)[3] if objective == "reinforce" else rollout.dense_rewards(
            run, *x)[0]
        torch.testing.assert_close(paid[0, :, -1], torch.tensor(expected))


def test_compile_is_of_the_nets_that_learn_and_of_the_ranking(prompt, monkeypatch):
    compiled, ranks = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **how: compiled.append((type(net), how)))
    monkeypatch.setattr(guidance, "compiled_rank", lambda: ranks.append(1) or rank)
    go(*prompt, "--out_dir", "a")
    assert not compiled and not ranks
    go(*prompt, "--compile", "--out_dir", "b")
    assert compiled == [(Transformer, {"dynamic": True})] * 2 and ranks
    for name, net in load("a")["nets"]["policy"].items():
        assert torch.equal(net, load("b")["nets"]["policy"][name])


@pytest.mark.parametrize("task, objective", [("prompt", "ppo"), ("edits", "reinforce")])
def test_one_preference_cannot_be_compared(task, objective, request, capsys):
    flags = f"--objective {objective} --guidance bandit --batch_size 1 --minibatches 1 --out_dir a"
    line = refuses(capsys, *request.getfixturevalue(task), *flags.split())
    assert "--batch_size 1" in line and "at least 2" in line


def test_updates_of_ppo_see_the_net_that_the_old_log_probs_saw(edits, monkeypatch):
    """At a learning rate of 0 every ratio is 1, with dropout too."""
    far = []

    def ratios(args, out):
        hidden, weight, tokens, mask, old = args[:5]
        logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        far.append(((logp - old).exp() - 1).abs()[mask].max().item())
    spy(monkeypatch, objective_room, "ppo_loss", ratios)
    go(*edits, "--dropout", 0.3, "--lr", 0, "--out_dir", "a")
    assert len(far) == 8 and max(far) < 1e-5


@pytest.mark.parametrize("task, guidance, paid", [
    ("edits", "edits", 10), ("edits", "bandit", 1), ("prompt", "token", 0)])
def test_a_cut_answer_gives_back_what_its_length_was_worth(task, guidance, paid, edits, prompt, monkeypatch):
    """One unit a reward: at each of its ten tokens, or one for the whole answer; a prompt has
    its length by design."""
    draw, seen = rollout.sample, []

    def sample(run, *args):
        tokens, mask = draw(run, *args)
        if run.task.eot is not None:
            last = (mask.sum(-1) - 1)[..., None]
            tokens = torch.where(tokens == run.task.eot, 1, tokens)  # all are cut, but for every second
            tokens[::2] = tokens[::2].scatter(-1, last[::2], run.task.eot)
        return tokens, mask
    monkeypatch.setattr(rollout, "sample", sample)
    real = objective_room.experience
    monkeypatch.setattr(objective_room, "experience",
                        lambda *args: seen.append(args[8].tolist()) or real(*args))
    flags = f"--objective ppo --guidance {guidance} --minibatches 2 --policy_steps 1 --out_dir a"
    go(*(edits if task == "edits" else prompt), *flags.split())
    assert len(seen[0]) == 4 and seen[0][::2] == [0, 0] and max(seen[0]) == paid
    assert metrics("a")[2]["ended"] == (0.5 if paid else 1.0)


def test_mle_weighs_all_tokens_alike_whatever_the_weights_say(summarize, monkeypatch, capsys):
    for typed in ("--weights to_go", "--weights mean_to_go", "--wmle_norm rewards", "--guidance token"):
        line = refuses(capsys, *summarize, "--objective", "mle", *typed.split(), "--out_dir", "a")
        assert typed in line and "did you mean wmle?" in line
    seen = []
    # an old config's
    monkeypatch.setattr(train, "check_together", lambda c, *typed: setattr(c, "weights", "to_go"))
    spy(monkeypatch, policy_wmle, "weighted_mle_loss", lambda args, out: seen.append((args[4], args[3])))
    go(*summarize, "--objective", "mle", "--out_dir", "a")
    assert len(seen) == 4 and all(torch.equal(weights, mask.float()) for weights, mask in seen)


# ----------------------------------------------------------------------------------- when nothing was learned


@pytest.mark.parametrize("task", ["prompt", "summarize"])
def test_a_reward_that_never_saw_a_strict_pair_took_no_step_and_says_so(task, prompt, summarize, capsys):
    go(*(prompt if task == "prompt" else summarize), "--resolution", 1e9, "--out_dir", "a")
    lines = [row for row in metrics("a") if row["phase"] == "reward"]
    assert lines and all(row["reward_loss"] is None and row["reward_fit_steps"] == 0 for row in lines)
    said = summary()["warnings"]
    assert "never fitted" in said[0] and "--resolution 1e+09" in said[0]
    assert f"warning: {said[0]}\n" in capsys.readouterr().out
    look.show(Path("a"), None, None)
    assert f"warning: {said[0]}\n" in capsys.readouterr().out


def test_a_constant_reward_says_so_and_wmle_with_it_is_plain_mle(summarize):
    # no second round, so no step was asked
    go(*summarize, "--reward_first", 0, "--reward_every", 9, "--out_dir", "a")
    said = " ".join(summary()["warnings"])
    assert "reward is constant" in said and "plain MLE" in said and "never fitted" not in said


def stub_run(rewards):
    """A run whose reward of token i is rewards[i]."""
    guide = lambda tokens, prefix: torch.tensor(rewards)[tokens]
    c = SimpleNamespace(reward_first=1, reward_steps=0, agg="sum", beta=2.0, resolution=0.0)
    task = SimpleNamespace(has_pairs=False, has_references=False)
    return SimpleNamespace(c=c, task=task, reward=SimpleNamespace(guide=guide))


@pytest.mark.parametrize("rewards, ordered, says", [
    ([0.0, 1.0], (20, 20), []), ([0.0, 1.0], (11, 20), ["orders 0.55 of 20 held-out pairs"]),
    ([0.5, 0.505], (20, 20), ["constant"]),
    ([0.5, 0.5], (10, 20), ["constant"]),  # and hence without an order: one line says it
    ([0.0, 1.0], (9, 19), ["orders 0.47 of 19 held-out pairs rightly (rank_accuracy): too few to say"]),
    ([0.0, 1.0], (12, 19), []), ([0.0, 1.0], (0, 0), []),
    (None, (0, 20), ["orders 0.00 of 20"])])  # None: nothing was held out
def test_warnings_of_a_reward_by_hand(rewards, ordered, says):
    # token 1 is better, and every group knows it
    tokens = torch.tensor([[[0, 0], [1, 1]], [[0, 1], [1, 1]]] * 10)
    x = Candidates(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([[0.0, 1.0]] * 20))
    said = evaluate.reward_warnings(stub_run(rewards), ordered, rewards and x, [{"reward_fit_steps": 1}])
    assert len(said) == len(says) and all(part in line for part, line in zip(says, said))
    assert "--sft_steps" not in " ".join(said)  # which a task without references does not have


def test_the_log_is_read_once_for_all_warnings(summarize, monkeypatch):
    read = []
    spy(monkeypatch, evaluate, "logged", lambda args, out: read.append(out))
    go(*summarize, "--objective", "wmle", "--out_dir", "a")
    steps = lambda rows, phase: [row["step"] for row in rows if row["phase"] == phase]
    found, = read
    for phase in ("reward", "policy"):
        assert steps(found[phase], phase) == steps(metrics("a"), phase) != []


@pytest.mark.parametrize("objective", ["ppo", "wmle"])
def test_a_reward_that_learned_has_nothing_to_warn_of(objective, edits):
    flags = f"--objective {objective} --reward_first 60 --reward_lr 0.01 --out_dir a"
    go(*edits, "--data", write_edits(Path("e"), 64), *flags.split())
    assert summary()["warnings"] == [] and summary()["rank_accuracy"] > 0.9


@pytest.mark.parametrize("flags", ["--objective mle", "--objective reinforce --guidance bandit"])
def test_a_run_without_a_learned_reward_has_nothing_to_say_of_it(flags, summarize):
    go(*summarize, *flags.split(), "--out_dir", "a")
    assert summary()["warnings"] == []
