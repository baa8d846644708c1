"""The tables of train.py and aggregate.py: a name there works or says what it lacks, before anything is
trained; and a run's folder, from which its nets can be had again without its data."""
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from reference import mask_of
from stubs import POLICY, START, bound, entropy, log_probs, logits, rows_of, stub_run
from test_train import go, here, load, prompt, refuses, rows, same, shared, summarize  # noqa: F401

import aggregate
import evaluate
import objective
import state
import train
from objective import Objective, by_loss
from support.log import UserError

near = lambda x: pytest.approx(x, rel=1e-4, abs=1e-4)


@pytest.fixture
def make(monkeypatch, tmp_path):
    return lambda *typed, **more: stub_run(monkeypatch, tmp_path, *typed, **more)


# ------------------------------------------------------------------------------------------------- objectives


def imitate(hidden, head, tokens, mask, weights, c, share, rows):
    """A loss that no file of the project has: minus the mean log-probability of the sampled tokens."""
    logp = (hidden @ head.t()).log_softmax(-1).gather(-1, tokens[rows, :, None]).squeeze(-1)
    n = mask.sum()
    return -(logp * mask[rows]).sum() / n, {"weighed": (weights * mask)[rows].sum() / n}


def test_one_line_makes_a_new_objective(monkeypatch, summarize):
    monkeypatch.setitem(train.OBJECTIVES, "imitate", Objective("samples", by_loss(imitate)))
    go(*summarize, "--objective", "imitate", "--policy_steps", 2, "--log_every", 1, "--out_dir", "a")
    lines = [x for x in rows("a", "metrics.jsonl") if x["phase"] == "policy"]
    assert len(lines) == 2 and all(0 < x["weighed"] < 1.32 and x["grad_norm"] > 0 for x in lines)


@pytest.mark.parametrize("parts", [("sample", print), ("samples", None), ("samples", "reinforce"),
                                   ("references", print, "length"), ("samples", imitate)])
def test_a_half_made_objective_is_no_objective(parts):
    with pytest.raises(ValueError, match="expected"):
        Objective(*parts)


@pytest.mark.parametrize("line", ["samples", None, by_loss])
def test_a_name_without_an_objective_ends_before_anything_is_made(line, monkeypatch, summarize, capsys):
    monkeypatch.setitem(train.OBJECTIVES, "other", line)
    monkeypatch.setattr(train, "Run", None)  # nothing is built, let alone trained
    assert "--objective other: expected an Objective" in refuses(capsys, *summarize, "--objective", "other",
                                                                 "--out_dir", "a")
    assert not Path("a").exists()


# ---------------------------------------------------------------------------------------------------------- f


def test_one_line_makes_a_new_f(monkeypatch):
    rewards, mask = torch.tensor([[[4.0, 9.0, 1.0], [1.0, 1.0, 7.0]]]), mask_of(3, 2, width=3)[None]
    monkeypatch.setitem(aggregate.CHOICES, "first", lambda rewards, mask, beta: rewards[..., 0])
    assert aggregate.aggregate(rewards, mask, "first", scale=False).tolist() == [[4, 1]]
    # times the siblings' mean length
    assert aggregate.aggregate(rewards, mask, "first").tolist() == [[10, 2.5]]
    assert train.Flags.__dataclass_fields__["agg"].metadata["choices"] is aggregate.CHOICES


@pytest.mark.parametrize("line", [None, lambda rewards: rewards.sum(-1), lambda rewards, mask, beta: rewards,
                                  lambda rewards, mask, beta: rewards.mean()])
def test_a_half_made_f_ends_in_one_line_before_anything_is_made(line, monkeypatch, summarize, capsys):
    monkeypatch.setitem(aggregate.CHOICES, "other", line)
    unread = type("Unread", (train.TASKS["summarize"],), {"__init__": None})
    monkeypatch.setitem(train.TASKS, "summarize", unread)
    said = refuses(capsys, *summarize, "--agg", "other", "--out_dir", "a")
    assert "--agg other: expected a function of aggregate.CHOICES" in said
    assert not Path("a").exists()


def test_a_name_without_an_f_raises(monkeypatch):
    monkeypatch.setitem(aggregate.CHOICES, "nothing", None)
    with pytest.raises(TypeError):
        aggregate.aggregate(torch.ones(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool), "nothing")


# ---------------------------------------------------------------------------------------------- samples.jsonl


def shown(run):
    """The rows of samples.jsonl of one evaluation, with the context and ids of each."""
    folder = Path(run.c.out_dir)
    folder.mkdir(exist_ok=True)
    run.open(None, {})
    evaluate.evaluate(run)
    found = run.task.samples(run.policy, None)
    written = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    return list(zip(written, rows_of(found.batch, found.tokens, found.mask)))


def test_samples_say_how_far_the_policy_has_gone(make):
    for row, (context, ids) in shown(make("")):
        now, start = log_probs(POLICY, context, ids), log_probs(START, context, ids)
        assert row["log_ratio"] == near([a - b for a, b in zip(now, start)])
        assert row["errors"] is None and row["role"] == "reference"
        assert row["context"] == f"context {row['group']}"


@pytest.mark.parametrize("agg, score", [("sum", sum), ("avg", lambda r: sum(r) / len(r)), ("max", None)])
def test_the_score_of_a_sample_is_f_of_its_rewards(agg, score, make):
    for row, _ in shown(make(f"--agg {agg}")):
        if score is None:
            r = torch.tensor(row["rewards"], dtype=torch.float64)[None, None]
            f = aggregate.aggregate(r, torch.ones_like(r, dtype=torch.bool), agg).item()
        else:  # one candidate a group, so T_bar is its own length
            f = score(row["rewards"]) * (len(row["rewards"]) if agg == "avg" else 1)
        assert row["score"] == pytest.approx(f, abs=2e-3)


@pytest.mark.parametrize("flags, weigh", [
    ("--objective wmle --wmle_norm length --weights immediate", lambda r: [x / len(r) for x in r]),
    ("--objective wmle --wmle_norm rewards --weights immediate", lambda r: [x / sum(r) for x in r]),
    ("--objective reinforce --no-center --kl 0 --weights sequence", lambda r: [sum(r) / len(r)] * len(r))])
def test_the_weight_of_a_token_is_what_the_objective_gives_it(flags, weigh, make):
    for row, _ in shown(make(flags)):
        assert row["weights"] == pytest.approx(weigh(row["rewards"]), abs=3e-4)


def test_centred_weights_are_standardised_over_what_is_shown(make):
    found = shown(make("--objective reinforce --kl 0 --weights immediate"))
    rewards = [r for row, _ in found for r in row["rewards"]]
    mean = sum(rewards) / len(rewards)
    std = max(0.3, (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5)
    weights = [w for row, _ in found for w in row["weights"]]
    assert weights == pytest.approx([(r - mean) / std for r in rewards], abs=1e-3)


def test_plain_mle_gives_no_weights_and_leaving_the_start_costs_reinforce(make):
    assert all(row["weights"] is None for row, _ in shown(make("--objective mle")))
    for row, _ in shown(make("--objective reinforce --no-center --weights immediate --kl 0.5")):
        paid = [r - 0.5 * a for r, a in zip(row["rewards"], row["log_ratio"])]
        assert row["weights"] == pytest.approx(paid, abs=1e-3)


def test_the_weight_of_ppo_is_its_advantage_before_it_is_whitened(make):
    run = make("--objective ppo --lam 1 --gamma 1 --kl 0.2")
    run.normalizer = torch.tensor((0.0, 0.5, 0.0, 2.0, 0.05))  # E13 as r -> (r - 0.5) / 2 at every place
    for row, (context, ids) in shown(run):
        paid = [(r - 0.5) / 2 - 0.2 * a for r, a in zip(row["rewards"], row["log_ratio"])]
        values = [sum(w * x for w, x in zip((0.3, -0.2, 0.5), logits(POLICY, context, y))) + 0.1
                  for y in [2] + ids[:-1]]
        assert row["weights"] == pytest.approx([sum(paid[t:]) - values[t] for t in range(len(ids))], abs=2e-3)


# --------------------------------------------------------------------------------------------- a run's folder


def test_a_folder_alone_gives_the_nets_back(summarize, monkeypatch):
    kept = {}
    monkeypatch.setattr(train, "finish", lambda run: kept.update(run=run) or {"warnings": []})
    go(*summarize, "--objective", "ppo", "--minibatches", 2, "--policy_steps", 2, "--out_dir", "a")
    shutil.copytree("a", "elsewhere")
    run, found = kept["run"], state.load_nets("elsewhere")
    for name in ("policy", "reward", "start_policy"):
        net = getattr(found, name)
        assert same(net.state_dict(), getattr(run, name).state_dict()) and not net.training
        assert not any(p.requires_grad for p in net.parameters())
    assert not same(found.policy.state_dict(), found.start_policy.state_dict())
    text = "any text, also of words that nobody knows"
    assert found.tokenizer.encode(text) == run.task.tokenizer.encode(text)
    assert found.step == 2 and found.config["task"] == "summarize" and same(found.kept, run.task.kept())
    assert found.config["figures"] == list(run.task.figures) and found.config["curve"] == run.task.curve
    x = run.task.pick("train", torch.arange(2))
    guided = [net.guide(x.reference[:, None], x.prefix()) for net in (found.reward, run.reward)]
    assert torch.equal(*guided)
    assert set(load("a")["nets"]) == {"policy", "reward", "start_policy", "value"}


def test_only_ppo_has_a_critic_in_its_checkpoint(make):
    assert set(make("--objective wmle").state()["nets"]) == {"policy", "reward", "start_policy"}


def spoil(folder, change):
    """A checkpoint with something changed."""
    saved = load(folder)
    change(saved)
    torch.save(saved, Path(folder) / "ckpt.pt")


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("sizes"), "ckpt.pt: expected a checkpoint of this version"),
    (lambda s: s.update(nets=list(s["nets"].values())), "ckpt.pt: expected a checkpoint of this version"),
    (lambda s: s["nets"].pop("start_policy"), "ckpt.pt: nets and sizes do not fit"),
    (lambda s: s["sizes"]["policy"].update(n_embd=32), "ckpt.pt: nets and sizes do not fit"),
    (lambda s: s["sizes"]["reward"].update(colour=1), "ckpt.pt: nets and sizes do not fit"),
    (lambda s: s["sizes"].pop("bound"), "ckpt.pt: nets and sizes do not fit")])
def test_a_folder_with_a_wrong_checkpoint_is_one_line(change, says, tiny):
    spoil("a", change)
    with pytest.raises(UserError, match=says):
        state.load_nets("a")


@pytest.fixture
def tiny(summarize):
    """A folder of a run, "a"."""
    go(*summarize, "--objective", "mle", "--policy_steps", 1, "--out_dir", "a")
    return summarize


@pytest.mark.parametrize("name, text", [
    ("config.json", None), ("config.json", "{"), ("config.json", "[1]"), ("tokenizer.json", None),
    ("tokenizer.json", "{}"), ("tokenizer.json", '{"name": 1, "pattern": 2, "ranks": 3, "kept": 4}'),
    ("ckpt.pt", None), ("ckpt.pt", "x"), ("task.pt", None), ("task.pt", "x")])
def test_a_folder_that_lacks_or_breaks_a_file_names_it(name, text, tiny):
    path = Path("a", name)
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=f"a/{name}: ") as error:
        state.load_nets("a")
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_run_is_named(tiny):
    ranks = json.loads(Path("a/tokenizer.json").read_text())
    Path("a/tokenizer.json").write_text(json.dumps(ranks | {"kept": [*range(256), ranks["kept"][-1]]}))
    with pytest.raises(UserError, match="tokenizer.json has 257 ids and the policy in ckpt.pt"):
        state.load_nets("a")


def test_an_old_checkpoint_is_not_gone_on_with(tiny, capsys):
    spoil("a", lambda s: s.pop("sizes"))
    line = refuses(capsys, "--init_from", "resume", "--out_dir", "a")
    assert "a/ckpt.pt: expected a checkpoint of this version" in line and "train the run again" in line


def test_a_resume_for_which_there_is_no_memory_does_not_blame_the_checkpoint(tiny, capsys, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.") \
            if hasattr(torch, "OutOfMemoryError") else torch.cuda.OutOfMemoryError("CUDA out of memory.")
    for place, name in ((state.Run, "load"), (torch, "load")):
        with monkeypatch.context() as m:
            m.setattr(place, name, no_room)
            with pytest.raises(SystemExit) as stop:
                train.main(["--init_from", "resume", "--out_dir", "a"])
        err = capsys.readouterr().err
        assert stop.value.code == 1 and "out of memory" in err
        assert "other settings" not in err and "cannot be read" not in err


def test_what_the_task_keeps_is_written_once(tiny):
    before = Path("a/task.pt").stat().st_mtime_ns
    go("--init_from", "resume", "--out_dir", "a", "--policy_steps", 2)
    assert Path("a/task.pt").stat().st_mtime_ns == before


def test_the_split_of_a_run_is_drawn_once(make, monkeypatch):
    import rollout
    rollout.split_rows.cache_clear()
    run, drawn, randperm = make("--candidates 8 --reward_first 1 --reward_steps 1"), [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **kw: drawn.append(n) or randperm(n, **kw))
    for step in (0, 1, 2):
        run.step = step
        train.reward_phase(run)
    assert drawn.count(len(run.task.rows["train"])) == 1


def test_the_fit_takes_a_reward_an_optimizer_buffers_and_settings():
    import inspect

    import reward
    assert list(inspect.signature(reward.fit).parameters) == ["reward", "optimizer", "buffers", "settings"]
    assert dataclasses.is_dataclass(reward.FitSettings)
