"""Task 1: a discrete prompt that makes a frozen judge classify texts, from preferences between prompts alone.

The judge is a causal language model that reads "{text} {prompt}" and says a label word. How good a prompt is,
is a fact about all few-shot texts at once (E10), never about one of its tokens: the gap between
sequence-level preference and token-level training in its purest form. A *world* (tasks/worlds.py) is what the
judge is trained on: texts with several attributes at once, cue words that ask for an attribute, answer words
for its classes. The judge answers the attribute that the prompt asks for.
"""
from dataclasses import replace

import torch

from data import Batch, UserError, every_word, load_tokenizer, overlapping, pad, world_or_text_tokenizer
from model import write
from support.distributed import shared
from support.files import digest
from support.log import visible
from support.noise import noisy
from tasks import Samples, Task, net_work
from tasks.fewshot import draw_sets, read_sets
from tasks.judge import load_judge, vocabulary
from tasks.pretrained import foreign_judge, kept_judge, known_words, reopened_judge
from tasks.search import Record, contest, finalists
from tasks.truth import credit_truth
from tasks.worlds import embedded_world, read_world

LAMBDA_WRONG, LAMBDA_RIGHT = 180.0, 200.0  # E10

# ------------------------------------------------------------------------------------------------- preference


def prompt_score(p, labels):
    """E10, and the accuracy beside it: p (M, N, C) class probabilities, labels (M,) -> score, accuracy (N,).

    Gap = p(c) - max over the OTHER classes; correct only where Gap > 0, so a tie is wrong. The released code
    looks for the other classes by comparing floats with p(c), which takes a tied rival out of the maximum and
    calls the tie right.
    """
    index = labels[:, None, None].expand(-1, p.shape[1], 1)
    mine = p.gather(2, index).squeeze(2)  # (M, N)
    gap = mine - p.scatter(2, index, float("-inf")).amax(2)
    right = gap > 0
    score = torch.where(right, LAMBDA_RIGHT, LAMBDA_WRONG) * gap
    return score.mean(0), right.float().mean(0)  # divisor: the texts


def clip(rows, width):
    """Lists of ids cut at `width`, and how many were longer."""
    return [row[:width] for row in rows], sum(len(row) > width for row in rows)


# ------------------------------------------------------------------------------------------------------- task


class PromptTask(Task):
    """One input that all prompts answer, the judge's preference, and what a run has spent on asking it."""
    kind, pooled, has_judge, reads = "prompt", True, True, ("prompt",)
    reward_figures = ("credit_truth",)
    inputs = {"text": (("text", "sentence"), str)}
    eot = None  # every prompt has the full length
    first_queries = 0  # before the first fit
    figures = ("test_accuracy", "best_prompt_accuracy", "judge_queries", "queries_to_90", "rank_accuracy",
               "seconds")
    curve = "test_accuracy"
    defaults = {"agg": "sum", "candidates": 16, "explore": 0.5, "explore_from": "best", "ask_again": 50,
                "resolution": 50.0, "reward_first": 40, "reward_every": 20, "reward_batch": 64,
                "reward_warmup": 400, "head_first": 0.5, "policy_steps": 500, "lr": 8e-3, "alpha": 0.3,
                "hold": 250, "exact_first": True, "kl": 0.01, "prompt_length": 6, "ties": 1.0,
                "rank_temperature": 0.33, "adam_beta2": 0.99}
    # Rates and numbers of steps hang on the size of nets and data and stay ours: of the paper's schedule, a
    # fit every 1000 of 12,000 policy steps and as long as the first, the proportions are kept.
    paper = Task.paper | {"objective": "reinforce", "agg": "sum", "K": 5, "top_k": 256, "prompt_length": 5,
                          "shots": 16, "candidates": 16, "reward_batch": 64, "batch_size": 64,
                          "policy_steps": 504, "reward_every": 42, "reward_first": 1000, "reward_steps": 1000,
                          "patience": 7, "whole_words": False}

    def __init__(self, cfg, device, progress, say):
        self.cfg, self.device = cfg, device
        sizes = {"n_names": cfg.world_names, "most_cues": cfg.world_cues}
        self.world = world = read_world(cfg.world, say) if cfg.world else embedded_world(**sizes)
        if cfg.attribute not in world.attributes:
            known = visible(", ".join(world.attributes))
            raise UserError(f"--attribute: expected one of {known}, got {cfg.attribute!r}")
        self.classes = len(world.attributes[cfg.attribute]["answers"])
        n_held = min(len(world.texts) // 5, 2000)  # of the last texts, which are for the sets: no judge's
        if n_held == 0:
            raise UserError(f"--world {cfg.world}: expected at least 5 texts, got {len(world.texts)}")
        sets = read_sets(cfg, world, say) if cfg.data else draw_sets(cfg, world, n_held)
        self.world = world = self._readable(n_held, sets, say)  # from here on nobody can read another text
        if cfg.whole_words is None:
            real = cfg.world or cfg.data and cfg.judge == "world"
            cfg.whole_words = bool(real)  # what config.json says was used
        self.tokenizer, words = self._tokenizer()
        tok = self.tokenizer
        self.width, self.start = cfg.prompt_length, tok.eot
        # Ids from n_ids on are not sampled: end-of-text and, where whole words are asked for, all others.
        self.n_ids = words if cfg.whole_words else tok.eot
        ids, long = clip([tok.encode(" " + text) for text in world.texts], cfg.judge_context)
        tokens, mask = pad(ids)
        if cfg.judge == "world":
            self.judge, path = load_judge(world, tokens, mask, tok, cfg, device, progress)
        else:
            self.judge, path = foreign_judge(self.world, tok, cfg, device)
        self.rows = sets
        self.sets = {}
        for name, rows in sets.items():
            ids, n = clip([tok.encode(" " + row["text"]) for row in rows], cfg.judge_context)
            long += n
            cache = self.judge.read(*[x.to(device) for x in pad(ids)])
            self.sets[name] = cache, torch.tensor([row["label"] for row in rows], device=device)
        few = min(cfg.curve_size, len(sets["test"]))
        self.sets["curve"] = (self.sets["test"][0].select(slice(0, few)), self.sets["test"][1][:few])
        if long:
            say(f"{long} texts were longer than --judge_context {cfg.judge_context} tokens and were cut at "
                f"their end")
        words = f", {self.n_ids} of them whole words for prompts" if cfg.whole_words else ""
        say(f"world {world.name}: {len(world.texts)} texts for the judge, {tok.size} tokens{words}; "
            f"judge {path}; " + ", ".join(f"{k} {len(v[1])}" for k, v in self.sets.items()))
        self.queries, self.queries_to_90, self.context = 0, None, max(64, cfg.prompt_length + 1)
        self.scored, self.searched, self.greedy = Record(self.width), [], []

    def _readable(self, n_held, sets, say):
        """The world as judge, warm-up and tokenizer may read it: without the last `n_held` texts, and without
        any that would give away a few-shot or test text (`overlapping`); how many those are is said."""
        world = self.world
        private = world.texts[-n_held:]  # drawn by seed: all of the last texts, so that one judge serves all
        if self.cfg.data:
            private = [row["text"] for rows in sets.values() for row in rows]
        taken = overlapping(world.texts[:-n_held], private)
        keep = [i for i, known in enumerate(taken) if not known]
        if len(keep) < len(taken):
            say(f"world {world.name}: {len(taken) - len(keep):,} of {len(taken):,} texts are, hold or are "
                f"part of a few-shot or test text and were left out")
        if not keep:
            raise UserError(f"--world {self.cfg.world}: expected texts besides the few-shot and test texts, "
                            f"got none")
        pick = lambda values: [values[i] for i in keep]
        return replace(world, texts=pick(world.texts), labels=pick(world.labels), need=pick(world.need))

    def _tokenizer(self):
        """Words where the world knows its own, else a BPE of its texts in which each cue and answer is a
        token; and how many of its ids, the first ones, are whole words. Cue words are, whatever characters
        they have.

        A world on disk has them first with and without --whole_words, so that one judge serves both."""
        cfg, world = self.cfg, self.world
        if cfg.judge != "world":  # its own tokens, all of them
            tok = load_tokenizer(cfg.tokenizer, [])
            self.world = world = replace(world, attributes=known_words(world, cfg, tok))
        own = "".join(" " + w for x in world.attributes.values() for w in x["cues"] + x["answers"])
        if cfg.judge == "world":
            tok = world_or_text_tokenizer(cfg, world.words, [" " + t for t in world.texts] + [own] * 1000)
        if not (cfg.world or cfg.whole_words):
            return tok, None
        cues = [tok.encode(" " + w) for x in world.attributes.values() for w in x["cues"]]
        cues = [ids[0] for ids in cues if len(ids) == 1]  # judge.py refuses the others
        words = set(tok.whole_words()).union(cues)
        return tok.with_first(words), len(words)

    def ask(self, prompts, name, texts=None):
        """E10 scores and accuracies of prompts (N, T) on one of the sets, or on some of its `texts` (M',) by
        row number: (N,), (N,)."""
        cache, labels = self.sets[name]
        if texts is not None:
            cache, labels = cache.select(texts), labels[texts]
        prompts, again = prompts.unique(dim=0, return_inverse=True)  # a settled policy repeats itself
        read = lambda some: torch.stack(prompt_score(
            self.judge.probabilities(cache, some, self.cfg.attribute), labels), 1)  # (n, 2)
        score, accuracy = shared(read, prompts).unbind(1)
        return score[again], accuracy[again]

    def prefer(self, batch, tokens, mask):
        """The preference of (1, K, T) prompts: E10 on the few-shot training set. Queries are counted here."""
        self.queries += tokens.shape[1]
        return self.ask(tokens[0], "train")[0][None]

    def told(self, tokens, preference):
        """Every prompt (1, K, T) is remembered with the score (1, K) that the run was told."""
        queries = torch.arange(self.queries - tokens.shape[1], self.queries) + 1
        self.scored.add(tokens[0], preference[0], len(self.sets["train"][1]), queries)

    def written(self, policy, generator, n=64, temperature=1.0):
        """n prompts of the policy, (n, T)."""
        return write(policy, self.start, self.width, generator, n, n_ids=self.n_ids,
                     top_k=self.cfg.top_k or None, temperature=temperature)[0]

    @torch.no_grad()
    def evaluate(self, policy, generator):
        """Mean accuracy of 64 sampled prompts on a fixed part of the test set: a curve to look at, not to
        choose by. The likeliest prompt is noted, unscored: `finish` chooses among these too."""
        self.first_queries = self.first_queries or self.queries
        tokens = self.written(policy, generator)
        self.greedy.append(self.likeliest(policy))
        accuracy = self.ask(tokens, "curve")[1].mean().item()
        if self.queries_to_90 is None and accuracy >= 0.9:
            self.queries_to_90 = self.queries
        return {"judge_queries": self.queries, "test_accuracy": accuracy}

    def likeliest(self, policy):
        """The policy's greedy prompt, a list of ids: nothing is drawn for it."""
        return self.written(policy, None, 1, temperature=0)[0].tolist()

    @torch.no_grad()
    def samples(self, policy, generator, n=3):
        """The best of 64 sampled prompts by dev score, the same with a random word at each of its places in
        turn, and the first n of the 64: K = 1 + T + n siblings. Dev scores are to look at: nothing is chosen
        by them, and they are no queries of the run's budget."""
        drawn = self.written(policy, generator)
        self.shown = drawn[self.ask(drawn, "dev")[0].argmax()]  # (T,)
        other = torch.randint(self.n_ids - 1, (self.width,), generator=generator, device=self.device)
        other += other >= self.shown  # any word but the one that is there
        replaced = self.shown.expand(self.width, -1).clone()  # (T, T): row t has another word at place t
        replaced.diagonal().copy_(other)
        tokens = torch.cat((self.shown[None], replaced, drawn[:n]))
        roles = ["best", *(f"place {t + 1} random" for t in range(self.width)), *["sampled"] * n]
        return Samples(self.batch(1, None), tokens[None], torch.ones_like(tokens[None], dtype=torch.bool),
                       self.ask(tokens, "dev")[0][None], [roles])

    def probe(self, guide, policy):
        """The vocabulary by its reward behind the best prompt's other words, and the credit table."""
        return [self._vocabulary_row(guide), self._credit_row(guide)]

    def _vocabulary_row(self, guide, n=10):
        """The n best and n worst words for the last place of the best prompt that was last looked at."""
        prefix = self.shown[:-1]
        parts = [guide(words)[0, :, -1].float().cpu() for words in every_word(prefix, self.n_ids)]
        rewards = torch.cat(parts)  # (V,)
        order = rewards.argsort(descending=True, stable=True)
        name = lambda i: self.tokenizer.pieces([int(i)])[0]
        rows = lambda ids: [[name(i), round(rewards[i].item(), 4)] for i in ids]
        return {"kind": "vocabulary", "prefix": self.tokenizer.pieces(prefix.tolist()),
                "top": rows(order[:n]), "bottom": rows(order[-n:].flip(0))}

    def _credit_row(self, guide, draws=64):
        """Mean r of one more cue word, and of a word that is no cue, behind 0, 1, 2, 3 different cue words:
        what a reward has to tell apart. Always the same draws, so that evaluations compare."""
        g = torch.Generator().manual_seed(0)
        cues, _, plain = vocabulary(self.world, self.tokenizer)
        cues, plain = cues[self.cfg.attribute], plain[plain < self.n_ids]
        row = {"kind": "credit", "cues": [], "cue": [], "other": []}
        for k in range(min(4, self.width, len(cues))):
            draw = lambda: cues[torch.randperm(len(cues), generator=g)[:k + 1]]
            said = torch.stack([draw() for _ in range(draws)])  # (N, k+1)
            other = said.clone()
            other[:, k] = plain[torch.randint(len(plain), (draws,), generator=g)]
            row["cues"].append(k)
            for name, tokens in (("cue", said), ("other", other)):
                row[name].append(round(guide(tokens[None].to(self.device))[0, :, -1].mean().item(), 4))
        return row

    def judge_reward(self, guide):
        """{"credit_truth"}: r of tokens beside what they are worth (tasks/truth.py)."""
        cues, _, plain = vocabulary(self.world, self.tokenizer)
        plain = plain[plain < self.n_ids]
        return {"credit_truth": credit_truth(self, guide, cues[self.cfg.attribute], plain)}

    @torch.no_grad()
    def finish(self, policy, generator):
        """The figures of summary.json. Prompts are chosen on dev and measured on test: the run's own among
        its greedy ones at every evaluation, its last samples and all that it had scored, a search's
        (tasks/search.py) among all that it had."""
        tokens = self.written(policy, generator)
        uniform = torch.randint(self.n_ids, (64, self.width), generator=generator, device=self.device)
        latest_first = [self.likeliest(policy), *reversed(self.greedy)]
        own = [*dict.fromkeys(map(tuple, latest_first)), *map(tuple, tokens.tolist())]
        offered = finalists(self.scored, own)
        best, accuracy = self.best_on_dev(offered)
        figures, self.searched = contest(self)
        cues, _, plain = vocabulary(self.world, self.tokenizer)
        cues, plain = cues[self.cfg.attribute].to(self.device), plain[plain < self.n_ids].to(self.device)
        drawn = torch.randint(len(cues), (64, self.width), generator=generator, device=self.device)
        asking = torch.cat((cues[:, None].expand(-1, self.width), cues[drawn]))  # (N, T): cue words alone
        return {"judge_queries": self.queries, "dev_queries": len(offered),
                "queries_to_90": self.queries_to_90,
                "test_accuracy": self.ask(tokens, "test")[1].mean().item(),
                "best_prompt": self.tokenizer.decode(best.tolist()).strip(),
                "best_prompt_accuracy": accuracy, "best_prompt_ids": best.tolist(),
                "top3_accuracy": self.top3(offered),
                "best_prompt_pieces": self.tokenizer.pieces(best.tolist()),
                "random_accuracy": self.ask(uniform, "test")[1].mean().item(),
                "accuracy_1_cue": self._with_cues(1, cues, plain),
                "accuracy_2_cues": self._with_cues(2, cues, plain),
                "reference_accuracy": self.best_on_dev(asking, exact=True)[1],
                "chance": 1.0 / self.classes} | figures

    def _with_cues(self, k, cues, plain):
        """What k different cue words among random words are worth on the curve's texts, mean of 64: how
        graded the world is."""
        g, words = torch.Generator().manual_seed(k), []
        for _ in range(64):
            right = torch.randperm(len(cues), generator=g)[:k].to(self.device)
            others = torch.randint(len(plain), (self.width,), generator=g).to(self.device)
            words.append(torch.cat((cues[right], plain[others]))[:self.width])
        order = torch.rand(64, self.width, generator=g).argsort(1).to(self.device)
        return self.ask(torch.stack(words).gather(1, order), "curve")[1].mean().item()

    def best_on_dev(self, prompts, exact=False):
        """Of prompts (N, T), a tensor or lists, the one with the best dev score, and its test accuracy.
        exact: by the true scores, for a figure that is no choice of the run's"""
        prompts = torch.as_tensor(prompts, device=self.device).unique(dim=0)
        best = prompts[self.dev_scores(prompts, exact).argmax()]
        return best, self.ask(best[None], "test")[1].item()

    def dev_scores(self, prompts, exact=False):
        """Dev scores (N,) of prompts (N, T) as whoever chooses is told them: under --noise by one draw a
        prompt, from the beginning of a stream that is the same for the run and for every search."""
        generator = torch.Generator().manual_seed(self.cfg.seed + 5)
        return noisy(self.ask(prompts, "dev")[0], 0.0 if exact else self.cfg.noise, generator)

    def fingerprint(self):
        """{part: hash} of all data, as text and as ids, and of the judge: for the keys of what is kept, and
        for resuming. A judge that was trained again, by another version of torch or number of threads, gives
        other scores."""
        return {"world": digest(self.world), "few-shot and test texts": digest(self.rows),
                "tokens": digest((self.tokenizer.state(), self.windows())),
                "judge": digest(self.judge.state())}

    def top3(self, prompts):
        """Mean test accuracy of the three different prompts (N, T), a tensor or lists, with the best dev
        scores: how the paper chooses."""
        prompts = torch.as_tensor(prompts, device=self.device).unique(dim=0)
        best = self.dev_scores(prompts).argsort(descending=True, stable=True)[:3]
        return self.ask(prompts[best], "test")[1].mean().item()

    def windows(self, width=12):
        """The beginnings of the world's sentences, ids and mask (N, width): those that the judge may read
        (`_readable`), and what people say besides."""
        if not hasattr(self, "_windows"):
            lines = [" " + x for x in self.world.texts + self.world.talk]
            self._windows = pad(clip([self.tokenizer.encode(x) for x in lines], width)[0], width)
        return self._windows

    def text_batch(self, n, generator):
        """n windows as references, for a language-model warm-up of the reward's body."""
        tokens, mask = self.windows()
        i = torch.randint(len(tokens), (n,), generator=generator)
        return Batch(i, reference=tokens[i].to(self.device), reference_mask=mask[i].to(self.device))

    def state(self):
        """Beyond networks and random numbers: what the run has spent so far, and what it got for it."""
        return {"queries": self.queries, "queries_to_90": self.queries_to_90,
                "first_queries": self.first_queries,
                "greedy": self.greedy, "scored": self.scored.state()}

    def load_state(self, state):
        """The inverse of `state`."""
        self.queries, self.queries_to_90 = state["queries"], state["queries_to_90"]
        self.first_queries = state["first_queries"]
        self.greedy = list(state["greedy"])
        self.scored.load_state(state["scored"])

    def kept(self):
        """What classifies texts with a prompt: the judge, and which answer is which class."""
        answers = {a: x["answers"] for a, x in self.world.attributes.items()}
        return super().kept() | {**kept_judge(self.judge), "attribute": self.cfg.attribute,
                                 "answer_ids": {a: ids.cpu() for a, ids in self.judge.answers.items()},
                                 "answer_words": answers, "classes": self.classes,
                                 "n_ids": self.n_ids, "judge_context": self.cfg.judge_context}

    @classmethod
    def reopen(cls, c, kept, tokenizer, device):
        """The task with its judge and without its texts; `answer_words` {attribute: words by class}."""
        task = super().reopen(c, kept, tokenizer, device)
        ids = {a: x.to(device) for a, x in kept["answer_ids"].items()}
        task.judge = reopened_judge(kept, ids, tokenizer.eot, device)
        task.classes, task.answer_words = kept["classes"], kept["answer_words"]
        task.queries, task.queries_to_90, task.n_ids = 0, None, kept["n_ids"]
        task.scored, task.searched, task.greedy = Record(kept["width"]), [], []
        return task

    def input_width(self):
        """Tokens of a text that the judge reads."""
        return self.cfg.judge_context

    @classmethod
    def step_work(cls, c):
        """The larger of the policy's step and of the judge's: 32 texts and 8 prompts behind each of them."""
        judge = net_work(c.judge_layers, c.judge_width, 32 * (c.judge_context + 8 * (c.prompt_length + 1)))
        return max(super().step_work(c), judge)

    @classmethod
    def nets(cls, c):
        """Policy and reward, and the judge."""
        return [*super().nets(c), ("--judge_layers, --judge_width", 1, c.judge_layers, c.judge_width)]
