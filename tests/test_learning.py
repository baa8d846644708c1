"""Small learning runs as gates: worlds so small that a right loop wins, and a broken one cannot.

Every gate has wide room: beside it stands what its seeds reached, 1 to 20 where nothing else is said
(LEARNING_SEED=7 python -m pytest tests/test_learning.py runs another seed). Beside the gates stand broken
loops (a reward, a preference, a loss or a price of the wrong sign, a reward that says nothing), which must
not get there; more of them are in .ci/named_breaks.py. What has a gate (what else
train.py lets one combine is made of the same parts):

    letters (task prompt)        reinforce, ppo: token, bandit; reinforce: red, abc, implicit, bandit by RLOO
    copy    (task summarize)     reinforce, ppo: token, bandit; wmle: token; mle; bandit by RLOO and group
    mend    (task edits)         reinforce, wmle: token, edits; ppo: token, segment, bandit, edits, red, abc,
                                 implicit, minimum of what follows; mle; bandit by RLOO and group
"""
import dataclasses
import functools
import itertools
import os
import random

import pytest
import torch
from stubs import trained

import guidance
import objective
import policy_reinforce
import reward
import tasks.edits
import tasks.prompt
import tasks.summarize
import train
import warm_start
from model import generate
from tasks import Task


SEED = os.environ.get("LEARNING_SEED", "1")


def learn(folder, *flags):
    """A whole run through the real loop: summary.json and the lines of metrics.jsonl."""
    return trained(folder, "--n_embd 32 --log_every 10", f"--seed {SEED}", *flags)[:2]


# ----------------------------------------------------------------------------------------------- good letters

class Letters:
    """The least that a run asks of a tokenizer: twelve letters and end-of-text."""
    size, eot = 13, 12

    def pieces(self, ids, eot="<eot>"):
        return ["abcdefghijkl"[i] for i in ids]

    def decode(self, ids):
        return "".join(self.pieces(ids))

    def state(self):
        return {}


class FindLetters(Task):
    """Task 1 without a judge: the preference is how many letters are good ones, by
    default a to d of twelve."""
    kind, pooled = "prompt", True
    good = 4
    # a vocabulary of twelve needs neither a sharper ranking nor a shorter memory of Adam's
    defaults = tasks.prompt.PromptTask.defaults | {"rank_temperature": 1.0, "adam_beta2": 0.999}

    def __init__(self, cfg, device, progress, say):
        self.read(cfg, device, Letters(), cfg.prompt_length, {}, ends=False)

    def worth(self, tokens):
        """tokens (..., T) -> (...) float from 0 to T."""
        return (tokens < self.good).sum(-1).float()

    def prefer(self, batch, tokens, mask):
        return self.worth(tokens)

    def drawn(self, policy, generator, n):
        return generate(policy, self.start, self.width, generator, rows=n, n_ids=self.n_ids)[0]

    def evaluate(self, policy, generator):
        return {"worth": self.worth(self.drawn(policy, generator, 256)).mean().item()}


# --head_first 0: a body that has read nothing is nothing to keep.
LETTERS = ("--task prompt --prompt_length 3 --K 4 --candidates 64 --resolution 0 --reward_warmup 0 "
           "--head_first 0 --reward_first 60 --reward_steps 10 --reward_every 15 --reward_lr 0.005 "
           "--policy_steps 30 "
           "--hold 0 --batch_size 32 --lr 0.01 --alpha 0.1 --explore 0 --eval_every 1000")


# ------------------------------------------------------------------------------------ copy one word, mend one

WHO = "baker butcher captain clerk coach cook".split()
WHAT = "argued bowed cheered climbed cried danced".split()


def copy_world(seed):
    """Documents "WHO WHAT" whose summary is the WHO; eight training references in ten go on
    "while" somebody else."""
    rows = {}
    for split, n in (("train", 200), ("validation", 8), ("test", 36)):
        rng, rows[split] = random.Random(f"{seed} {split}"), []
        for _ in range(n):
            who, other = rng.sample(WHO, 2)
            noisy = split != "test" and rng.random() < 0.8
            rows[split].append({"document": f"{who} {rng.choice(WHAT)}", "facts": who,
                                "summary": f"{who} while {other}" if noisy else who})
    return rows


COPY = ("--task summarize --max_document 4 --max_summary 4 --sft_steps 80 --sft_lr 0.01 --sft_batch 16 "
        "--candidates 32 --K 3 --reward_first 100 --reward_steps 15 --reward_every 20 --reward_lr 0.003 "
        "--policy_steps 40 --hold 0 --lr 0.005 --batch_size 32 --curve_size 8 --eval_every 1000 "
        "--minibatches 2")
RIGHT, SLIPS = "two lamps oslo".split(), "toot lumps uslo".split()


def mend_world(seed, answers=2, partly=False):
    """Answers of three words, always the same ones; slips stand for one to three of them, and the
    annotator mends all, or `partly` some of them, so that pairs also say that one slip is better than two."""
    rows = {}
    for split, n in (("train", 120), ("test", 60)):
        rng, rows[split] = random.Random(f"{seed} {split}"), []
        for _ in range(n):
            slips = sorted(rng.sample(range(3), rng.choice((1, 1, 2, 3))))
            left = set(slips) - set(rng.sample(slips, rng.randint(1, len(slips)))) if partly else ()
            wrong = [SLIPS[i] if i in slips else RIGHT[i] for i in range(3)]
            mended = [SLIPS[i] if i in left else RIGHT[i] for i in range(3)]
            begins = [len(" ".join(wrong[:i])) + (i > 0) for i in slips]
            rows[split].append({"prompt": rng.choice(("please", "now")), "rejected": " ".join(wrong),
                                "edited": " ".join(mended),
                                "errors": [[x, x + len(wrong[i])] for x, i in zip(begins, slips)]})
    return rows


class Mend(tasks.edits.EditsTask):
    """Task 3 whose answers are judged by their slips alone: `edits_left` is the slips left in an answer."""

    def quality(self, split, index, tokens, mask):
        slips = torch.tensor([self.tokenizer.encode(" " + word)[0] for word in SLIPS])
        return -(torch.isin(tokens, slips) & mask).sum(-1).float()


MEND = ("--task edits --max_document 4 --max_summary 4 --sft_steps 60 --sft_lr 0.01 --sft_batch 16 "
        "--reward_first 60 --reward_lr 0.003 --reward_batch 16 --policy_steps 16 --hold 0 --lr 0.004 "
        "--kl 0.3 --batch_size 48 --minibatches 2 --eval_every 1000")


# Words that occur once each: 140 pairs to be learned by heart, from which nothing follows
# for the 140 of the test.
ONCE = ["".join(x) for x in itertools.product("bdfgkpstvz", "aeiou", "lmnr", "aeo")]


def once_world(seed, answers=2):
    """Every answer is a word of its own, and which of two is the better one is chance."""
    words = iter(ONCE)
    pair = lambda: {"prompt": "now", "rejected": next(words), "edited": next(words), "errors": []}
    return {split: [pair() for _ in range(140)] for split in ("train", "test")}


def install(setter):
    """The three worlds in place of the real ones."""
    setter(train.TASKS, "prompt", FindLetters)
    setter(train.TASKS, "edits", Mend)
    setter(tasks.summarize.__dict__, "embedded_world", copy_world)
    setter(tasks.summarize.__dict__, "world_words", lambda: WHO + WHAT + ["while"])
    setter(tasks.edits.__dict__, "embedded_world", mend_world)
    setter(tasks.edits.__dict__, "world_words", lambda: [*RIGHT, *SLIPS, "please", "now"])


@pytest.fixture(autouse=True)
def worlds(monkeypatch):
    install(monkeypatch.setitem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all runs: the warm starts in its cache are shared. Broken pieces change no warm start."""
    return tmp_path_factory.mktemp("learning")


def last(lines, key):
    """A figure of the last policy line."""
    return [line for line in lines if line["phase"] == "policy"][-1][key]


# -------------------------------------------------------------------------------------------------- the gates

# Of 3; a uniform policy has 1.0. Seeds 1 to 20, the worst one: the four f 2.99, PPO 2.96, bandit 2.99, RLOO
# 2.97, red 2.43, abc 2.54, implicit 3.00. Red and abc, read off one score, take more: abc with half as long a
# first fit 1.79 on seed 4.
GOOD_LETTERS = 2.0


@pytest.mark.parametrize("flags", [
    "--agg sum", "--agg avg", "--agg min", "--agg max", "--guidance bandit --batch_size 64",
    "--objective ppo --minibatches 2 --policy_steps 15",
    "--objective ppo --minibatches 2 --policy_steps 20 --guidance bandit",
    "--guidance bandit --baseline rloo --batch_size 64",
    "--guidance red --ties 0 --candidates 128", "--guidance abc --ties 0 --candidates 128 --reward_first 120",
    "--guidance implicit --reward_lr 0.005"])
def test_good_letters_are_found_from_preferences_alone(flags, folder):
    assert learn(folder, LETTERS, flags)[0]["worth"] > GOOD_LETTERS


def flipped_guide(patch):
    guide = reward.TokenReward.guide
    patch.setattr(reward.TokenReward, "guide", lambda *x: -guide(*x))


def dead_guide(patch):
    guide = reward.TokenReward.guide
    patch.setattr(reward.TokenReward, "guide", lambda *x: torch.full_like(guide(*x), 0.5))


def flipped_preference(patch):
    rank = guidance.ranking_loss
    patch.setattr(guidance, "ranking_loss", lambda net, batch, *x, **kw: rank(
        net, dataclasses.replace(batch, preference=-batch.preference), *x, **kw))


def flipped_preference_of_pairs(patch):
    pairs = Mend.pairs

    def flipped(self, split):
        tokens, mask, preference, *rest = pairs(self, split)
        return tokens, mask, -preference, *rest
    patch.setattr(Mend, "pairs", flipped)


def flipped_policy(patch):
    loss_of = policy_reinforce.reinforce_loss

    def flipped(*x, alpha, **rows):
        loss, stats = loss_of(*x, alpha=0.0, **rows)
        return -loss, stats
    patch.setattr(policy_reinforce, "reinforce_loss", flipped)


@pytest.mark.parametrize("broken", [flipped_guide, dead_guide, flipped_preference, flipped_policy])
def test_a_broken_loop_finds_no_letters(broken, folder, monkeypatch):
    """Seeds 1 to 20: 0.00 to 0.01 where something is reversed, 0.88 to 1.14 where nothing is paid."""
    broken(monkeypatch)
    assert learn(folder, LETTERS)[0]["worth"] < 1.5


HELD = "--objective ppo --minibatches 2 --policy_steps 15 --kl 3"


def test_a_high_price_of_the_kl_holds_the_policy(folder):
    """Nats a token, 20 seeds: 0.01 to 0.18; with the sign reversed 1.57 to 2.25."""
    assert last(learn(folder, LETTERS, HELD)[1], "kl") < 0.5


def test_a_kl_of_the_wrong_sign_drives_the_policy_away(folder, monkeypatch):
    right = objective.experience
    monkeypatch.setattr(objective, "experience", lambda dense, logp, start, values, mask, kl, *x: right(
        dense, logp, start, values, mask, -kl, *x))
    assert last(learn(folder, LETTERS, HELD)[1], "kl") > 1.0


LONG = "--prompt_length 12 --candidates 128 --reward_first 100 --policy_steps 8"


def test_rewards_of_tokens_teach_faster_than_one_number_a_sequence(folder):
    """Good letters of 12 after eight updates from the same 128 preferences, where a uniform policy has 4.
    Seeds 1 to 20: one number a sequence 0.69 to 1.88 below token rewards, bandit 0.44 to 1.48."""
    token, sequence, bandit = [learn(folder, LETTERS, LONG, x)[0]["worth"] for x in (
        "", "--weights sequence", "--guidance bandit")]
    assert token > sequence + 0.2 and token > bandit + 0.2


def test_weighted_by_tokens_noise_is_unlearned_and_plain_mle_goes_on_with_it(folder):
    """Greedy answers that are the right word alone, seeds 1 to 20: 0.86 to 1.00, and 0.00 to 0.25 with plain
    MLE."""
    weighted, plain = learn(folder, COPY)[0], learn(folder, COPY, "--objective mle")[0]
    assert weighted["exact"] > 0.4 and weighted["exact"] > plain["exact"] + 0.2


@pytest.mark.parametrize("flags", [
    "--objective reinforce", "--objective reinforce --guidance bandit --batch_size 96",
    "--objective reinforce --guidance bandit --batch_size 96 --group_size 3 --baseline group",
    "--objective reinforce --guidance bandit --batch_size 96 --group_size 3 --baseline rloo",
    "--objective ppo --guidance bandit"])
def test_noise_is_unlearned_from_samples(flags, folder):
    """The same from preferences alone, seeds 1 to 20: token rewards 0.83 to 1.00, from 0.00 to 0.28 at the
    start; bandit 1.00 with either objective. Before --foreseen and --weights both, with --kl 0, two of six
    seeds ended at 0."""
    summary, _ = learn(folder, COPY, flags)
    assert summary["exact"] > summary["sft_exact"] + 0.25


def test_ppo_unlearns_noise_and_its_critic_foresees_returns(folder):
    """Seeds 1 to 20: 0.78 to 1.00, from 0.00 to 0.28 at the start, and the best explained variance of four
    lines 0.29 to 0.94 (seeds 1 to 10). A critic that learns nothing has 0 throughout."""
    summary, lines = learn(folder, COPY, "--objective ppo --candidates 64")
    assert summary["exact"] > summary["sft_exact"] + 0.25
    assert max(line["explained_variance"] for line in lines if line["phase"] == "policy") > 0.1


@pytest.mark.parametrize("flags", [
    "--guidance edits", "--guidance token", "--objective reinforce",
    "--objective reinforce --guidance token --policy_steps 24",
    "--objective wmle --lr 0.01 --policy_steps 40 --reward_first 150"])
def test_slips_are_unlearned(flags, folder):
    """Slips left in a sampled answer, as a share of the 1.3 to 2.1 at the start, seeds 1 to 20: PPO 0.00 to
    0.05, reinforce 0.00 to 0.06 (ranked rewards 0.00 to 0.03), weighted MLE 0.00 to 0.02."""
    summary, _ = learn(folder, MEND, flags)
    assert summary["edits_left"] < 0.5 * summary["start_edits_left"]


def test_slips_are_weighed_away_with_ranked_rewards_and_plain_mle_keeps_them(folder):
    """The references are the wrong answers. Share of the slips left, seeds 1 to 20: 0.00 to 0.60 and
    0.84 to 1.41. Ranked rewards leave some weight on slips."""
    weighted, plain = [learn(folder, MEND, "--lr 0.01 --policy_steps 30", x)[0] for x in (
        "--objective wmle --guidance token", "--objective mle")]
    assert weighted["edits_left"] < 0.72 * weighted["start_edits_left"] < plain["edits_left"]


def test_slips_are_unlearned_from_rewards_at_few_tokens(folder):
    """The same, seeds 1 to 20: 0.00 to 0.06, but for one seed that keeps one of its three slips (0.53)."""
    summary, _ = learn(folder, MEND, "--guidance segment")
    assert summary["edits_left"] < 0.8 * summary["start_edits_left"]


@pytest.mark.parametrize("flags", ["--guidance implicit --reward_lr 0.003 --dpo_beta 0.5",
                                   "--guidance edits --returns min", "--guidance token --returns min"])
def test_slips_are_unlearned_from_every_kind_of_credit(flags, folder):
    """The same, seeds 1 to 20: 0.00 to 0.16."""
    summary, _ = learn(folder, MEND, flags)
    assert summary["edits_left"] < 0.5 * summary["start_edits_left"]


ONE_SCORE = "--policy_steps 24 --lr 0.006"
GROUPS = "--objective reinforce --guidance bandit --group_size 8 --policy_steps 24"


@pytest.mark.parametrize("flags", [
    f"--guidance bandit {ONE_SCORE}", f"--guidance red {ONE_SCORE}",
    f"--guidance abc {ONE_SCORE} --reward_first 120",
    f"{GROUPS} --baseline group", f"{GROUPS} --baseline rloo"])
def test_slips_are_unlearned_from_one_score_an_answer(flags, folder, monkeypatch):
    """As it is, read off, or compared within a group. Where the annotator mends all, no pair says that one
    slip is better than two, and some seeds learn nothing from the score (0.94). Where he mends some, seeds 1
    to 20: bandit 0.00 to 0.50, red 0.00 to 0.57, within a group 0.00 to 0.45, RLOO 0.00 to 0.55; abc, the
    four worst of the 20 with half as long a fit (0.55 to 0.77), 0.47 to 0.58."""
    monkeypatch.setattr(tasks.edits, "embedded_world", functools.partial(mend_world, partly=True))
    summary, _ = learn(folder, MEND, flags)
    assert summary["edits_left"] < 0.8 * summary["start_edits_left"]


@pytest.mark.parametrize("flags", ["--guidance red", "--guidance abc", "--guidance implicit --dpo_beta 0.5"])
def test_credit_of_the_wrong_sign_teaches_no_slip_away(flags, folder, monkeypatch):
    """Not of RLOO: what scores of the wrong sign teach may have few slips (seed 4: 0.44 of them are left)."""
    flipped_preference_of_pairs(monkeypatch)
    summary, _ = learn(folder, MEND, flags)
    assert summary["edits_left"] > 0.8 * summary["start_edits_left"]


# ---------------------------------------------------------------------------------------------- held-out rows

NOISE = ("--guidance token --sft_steps 1 --policy_steps 1 --batch_size 4 --reward_first 120 "
         "--reward_lr 0.005 --reward_batch 64")


def fit_noise(folder, patch):
    """Preferences that are pure chance, learned by heart -> mean loss of the fit, loss on held-out rows, rank
    accuracy on the test rows."""
    patch.setitem(tasks.edits.__dict__, "embedded_world", once_world)
    patch.setitem(tasks.edits.__dict__, "world_words", lambda: ["now", *SLIPS, *ONCE])
    summary, lines = learn(folder, MEND, NOISE)
    fit = next(line for line in lines if line["phase"] == "reward")
    return fit["reward_loss"], fit["reward_held_loss"], summary["rank_accuracy"]


def test_what_is_learned_by_heart_says_nothing_about_held_out_rows(folder, monkeypatch):
    """Chance is log 2 = 0.69 and 0.5. Loss of the fit, held-out loss and rank accuracy, seeds 1 to 20:
    0.20 to 0.24, 0.56 to 0.69 and 0.41 to 0.58."""
    fitted, held, ranked = fit_noise(folder, monkeypatch)
    assert fitted < 0.4 < held and 0.3 < ranked < 0.7


def test_with_a_leaked_split_it_would(tmp_path, monkeypatch):
    """Held-out rows that are also fitted; the same loss, seeds 1 to 20: 0.08 to 0.18."""
    split = warm_start.split_rows
    monkeypatch.setattr(warm_start, "split_rows", lambda *x: (torch.cat(split(*x)), split(*x)[1]))
    assert fit_noise(tmp_path, monkeypatch)[1] < 0.3
