"""Task 1: find a discrete prompt that makes a frozen judge classify texts, from preferences between prompts alone.

The judge is a causal language model that reads "{text} {prompt}" and says a label word. How good a prompt is,
is a fact about all few-shot texts at once (E10), never about one of its tokens: the gap between sequence-level
preference and token-level training in its purest form. A *world* is what the judge is trained on: texts with
several attributes at once, cue words that ask for an attribute, answer words for its classes. The judge answers
the attribute that the prompt asks for.

The embedded world is graded: a text with hedges ("somewhat", "perhaps") tells its sentiment only to a prompt that asks
with two or three different cue words ("mood", "verdict"; a repeated one asks no louder), so accuracy climbs with each
right token and the best prompts hold several. For the topic one cue word is enough. Cue words of another attribute work
against the right ones. A world on disk (`--world`) runs through the same code.

Scoring a prompt is the cost that matters, so the judge does the least: text and prompt are joined as tokens
(never through strings), a text's keys and values are computed once and kept, and only the last position meets
only the label rows.
"""
import inspect
import json
import os
import random
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from data import (Batch, UserError, code_hash, find_file, open_text, pad, read_rows, short_hash,
                  world_or_text_tokenizer)
from model import Cache, Config, Transformer, generate, load_state, save_state, with_start
from run import cached

LAMBDA_WRONG, LAMBDA_RIGHT = 180.0, 200.0  # E10

# --------------------------------------------------------------------------------------------------------------- worlds


@dataclass
class World:
    """texts; labels [{attribute: class}]; need [{attribute: cues it takes}]; attributes {name: {cues, answers}}."""
    name: str
    texts: list
    labels: list
    need: list
    attributes: dict
    words: list = None  # the whole vocabulary where it is known, for a word-level tokenizer
    talk: list = None   # sentences of the world that are not classified: what a language model would have read before


ATTRIBUTES = {
    "sentiment": {"cues": "mood verdict feeling opinion rating attitude viewer critic reviewer reader audience fan".split(),
                  "answers": "terrible great".split()},
    "topic": {"cues": "topic subject theme category section field".split(), "answers": "film food music sport".split()},
    "era": {"cues": "era period age date epoch year".split(), "answers": "ancient modern".split()},
}
SIGNS = {  # the words of a text that carry a class; no word is in two lists
    "sentiment": ("""awful dreary bland clumsy dull hollow messy stale tedious weak poor grim lousy sloppy tiresome
        shabby flat feeble dismal vapid""", """superb lovely brilliant charming deft fresh gripping lively moving
        radiant rich sharp splendid tender vivid witty graceful bold dazzling joyful"""),
    "topic": ("actor screen scene camera director script sequel trailer",
              "bread sauce chef kitchen soup spice oven dessert",
              "song guitar choir melody drummer chord album violin",
              "goal coach referee stadium league striker tackle relay"),
    "era": ("medieval antique bygone archaic feudal victorian",
            "digital current recent futuristic trendy contemporary"),
}
HEDGES = "somewhat perhaps rather maybe arguably seemingly apparently possibly".split()
FRAMES = ("the {topic} from this {era} {name} was {sentiment} , said {name}",
          "{name} and {name} found a {era} {topic} {sentiment}",
          "a {sentiment} {topic} , as {era} as the {name} of {name}",
          "in {name} the {era} {topic} seemed {sentiment} to {name}")
TALK = ("what is the {cue} of the {name} ? the {cue} is {answer}", "they asked for its {cue} and its {cue} : {answer}",
        "{name} put {answer} under {cue} , {cue} and {cue}")


def names():
    """720 made-up names: the bulk of the vocabulary and of no use, as most words are in most prompts."""
    a, b, c = ("ba de ki lo mu ne ri so tu".split(), "la me ni ro su va".split() + ["zu", "fe"],
               "bar dek lin mor sel tan vik zem rup nol".split())
    return [x + y + z for x in a for y in b for z in c]


def embedded_world(n=6000, seed=0):
    """The graded world: the same texts for every run, so that one judge serves all seeds.

    A text holds one sign of each attribute and 0, 1 or 2 hedges; to tell its sentiment it wants 1 + hedges different
    cue words.
    """
    rng, pool = random.Random(seed), names()
    world = World("embedded", [], [], [], ATTRIBUTES, talk=[])
    for _ in range(n):
        label = {a: rng.randrange(len(ATTRIBUTES[a]["answers"])) for a in ATTRIBUTES}
        signs = {a: rng.choice(SIGNS[a][c].split()) for a, c in label.items()}
        hedges = rng.sample(HEDGES, rng.randrange(3))
        signs["sentiment"] = " ".join(hedges + [signs["sentiment"]])
        world.texts.append(fill(rng.choice(FRAMES), rng, {k: [v] for k, v in signs.items()} | {"name": pool}))
        world.labels.append(label)
        world.need.append({"sentiment": 1 + len(hedges)})
    for _ in range(n):
        a = rng.choice(sorted(ATTRIBUTES))
        slots = {"cue": ATTRIBUTES[a]["cues"], "answer": ATTRIBUTES[a]["answers"], "name": pool}
        world.talk.append(fill(rng.choice(TALK), rng, slots))
    words = " ".join(FRAMES + TALK).split() + pool + HEDGES + [w for c in SIGNS.values() for x in c for w in x.split()]
    words += [w for a in ATTRIBUTES.values() for w in a["cues"] + a["answers"]]
    world.words = sorted({w for w in words if "{" not in w})
    return world


def fill(frame, rng, slots):
    """Each {slot} of a frame by a word of its list, no word twice where the list has more than one."""
    left = {k: rng.sample(v, min(len(v), 4)) for k, v in slots.items()}
    return " ".join(left[w[1:-1]].pop() if w.startswith("{") else w for w in frame.split())


def read_world(folder):
    """texts.jsonl(.gz) {"text", "labels", optional "need"} and attributes.json {name: {"cues", "answers"}} -> World."""
    path = os.path.join(folder, "attributes.json")
    try:
        attributes = json.loads(open_text(path))
        ok = all(isinstance(a[k], list) and len(a[k]) > 1 and all(isinstance(w, str) for w in a[k])
                 for a in attributes.values() for k in ("cues", "answers"))
    except (ValueError, AttributeError, KeyError, TypeError):
        ok = False
    if not ok:
        raise UserError(f"{path}: json: expected {{attribute: {{\"cues\": [words], \"answers\": [words]}}}}, "
                        f"got something else")
    path = find_file(folder, "texts")

    def check(where, row):
        for a, c in row["labels"].items():
            if a in attributes and not (type(c) is int and 0 <= c < len(attributes[a]["answers"])):
                raise UserError(f"{where}: labels: expected {a} from 0 to {len(attributes[a]['answers']) - 1} "
                                f"(one answer word a class), got {c!r}")
    fields = {"text": (("text",), str), "labels": (("labels",), dict), "need": (("need",), dict, {})}
    rows = read_rows(path, fields, check)
    return World(os.path.basename(os.path.abspath(folder)), [r["text"] for r in rows], [r["labels"] for r in rows],
                 [r["need"] for r in rows], attributes, talk=[])


# ---------------------------------------------------------------------------------------------------------------- judge


class Judge:
    """A frozen causal model that answers "{text} {prompt}" with a distribution over one attribute's answer words."""

    def __init__(self, model, start, answers, width):
        self.model, self.start, self.answers = model.eval(), start, answers  # answers: {attribute: ids (C,)}
        self.width = width  # tokens of a prompt

    @torch.no_grad()
    def read(self, tokens, mask):
        """Keys and values of M texts with the start token behind each, kept by the caller while it asks about them.

        Read at the width that text and prompt have together: the attention kernel adds in an order that depends on it,
        and so scores equal those of a plain pass over "{text} {prompt}" to the last bit.
        """
        row, length, wide = torch.arange(len(tokens), device=tokens.device), mask.sum(1), tokens.shape[1] + 1
        tokens, mask = F.pad(tokens, (0, 1 + self.width)), F.pad(mask, (0, 1 + self.width))  # (M, P+1+T)
        tokens[row, length], mask[row, length] = self.start, True  # the layout of read_candidates, once for all prompts
        cache, cut = self.model.prefill(tokens, mask), lambda xs: [x[:, :, :wide] for x in xs]
        return Cache(cut(cache.keys), cut(cache.values), mask[:, :wide], cache.length)

    @torch.no_grad()
    def probabilities(self, cache, prompts, attribute, at_once=None):
        """prompts (N, T) behind every text of the cache -> (M, N, C), softmax over the attribute's answer words.

        at_once  prompts a call, default as many as make 128 rows with the texts, on a GPU 20,000. Every prompt sits right
                 behind its text, as in a plain forward pass.
        """
        rows = self.model.head[self.answers[attribute]]  # (C, D): a few rows of the head instead of V
        out, m, kept = [], len(cache.length), None
        for part in prompts.split(at_once or max(1, (128 if prompts.device.type == "cpu" else 20_000) // m)):
            if kept is None or len(kept.length) != m * len(part):
                kept = cache.repeat(len(part), prompts.shape[1])  # every prompt is written over the last one
            z = self.model.decode(part.repeat(m, 1), kept, cache.mask.shape[1]) @ rows.t()  # (M*n, D) -> (M*n, C)
            out.append(z.softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32)).view(m, len(part), -1))
        return torch.cat(out, 1)


def prompt_score(p, labels):
    """E10, and the accuracy beside it: p (M, N, C) class probabilities, labels (M,) -> score (N,), accuracy (N,).

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


def ask(prompts, cue_ids):
    """How loudly each prompt asks for each attribute: prompts (N, T), cue_ids {attribute: ids} -> (N, A) int.

    Different cue words of the attribute minus different cue words of all others: a wrong one takes back what a right one
    gave, and saying the same word again adds nothing. Three words are needed, so credit for each of them is.
    """
    found = torch.stack([(prompts[:, :, None] == ids).any(1).sum(1) for ids in cue_ids.values()], 1)  # (N, A)
    return 2 * found - found.sum(1, keepdim=True)


def answer_targets(asked, labels, need, sizes):
    """What the judge learns to say: asked (B, N, A), labels and need (B, A), sizes C_a -> (B, N, sum C) distribution.

    One answer word where some attribute is asked for loudly enough and the text has it. Otherwise the judge knows
    nothing and answers at random, its favourite words a little more often than others: the label bias of real language
    models, which puts an unasked judge at exactly chance on balanced classes instead of wherever its last digits lean.
    A tenth of that habit stays when it was asked: probabilities near zero for the other attributes' words would leave
    their RATIO to accident, and E10's softmax over two answer words sees nothing but the ratio.
    """
    heard = (asked >= need[:, None, :]) & (labels >= 0)[:, None, :]  # (B, N, A); at most one attribute can be positive
    offset = torch.tensor([0] + sizes[:-1]).cumsum(0)  # (A,)
    one_hot = F.one_hot((labels.clamp(min=0) + offset), sum(sizes)).float()  # (B, A, sum C)
    said = torch.einsum("bna,bac->bnc", heard.float(), one_hot)
    habit = torch.cat([1.0 + 0.1 * torch.arange(c).flip(0) for c in sizes])
    habit = habit / habit.sum()
    return torch.where(heard.any(2, keepdim=True), 0.9 * said + 0.1 * habit, habit)


def random_asks(n, length, cue_ids, often, plain, generator):
    """Training prompts (n, length): 0 to `length` cues, repeats included, one in four with another attribute's, in any
    order among plain words. `often` (A,): attributes that want several cues are harder to learn and drawn more often.
    """
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)
    uniform = lambda *shape: torch.rand(shape, generator=generator)
    groups = list(cue_ids.values())
    width = max(len(ids) for ids in groups)
    table = torch.stack([ids[torch.arange(width) % len(ids)] for ids in groups])  # (A, width), short lists repeated
    attribute = often.float().multinomial(n, replacement=True, generator=generator)[:, None].repeat(1, length)
    attribute[:, :1] = torch.where(draw(4, n, 1) == 0, draw(len(groups), n, 1), attribute[:, :1])
    some = 1 + draw(min(width, length), n, 1)  # how many different words this prompt has: "mood mood" asks once
    words = uniform(n, width).argsort(1).gather(1, (uniform(n, length) * some).long())  # (n, length) columns of `table`
    keep = torch.arange(length) < draw(length + 1, n, 1)
    mixed = torch.where(keep, table[attribute, words], plain[draw(len(plain), n, length)])
    return mixed.gather(1, uniform(n, length).argsort(1))  # a shuffle, so that order means nothing


@dataclass
class JudgeSettings:
    """What decides a judge: the cache file is named after the hash of these and of the world."""
    world: str
    texts: str
    tokenizer: str
    prompt_length: int
    n_layer: int
    n_embd: int
    n_head: int
    n_ctx: int
    steps: int
    lr: float
    batch: int = 32
    packed: int = 8
    code: str = ""  # a hash of the code that trains it: who changes that code must not be handed the old judge


def train_judge(world, tokens, mask, tokenizer, s, device, progress):
    """Cross-entropy at the answer position only: the rest of the text would cost the budget and teach nothing here."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Transformer(Config(tokenizer.size, s.n_ctx, s.n_layer, s.n_head, s.n_embd)).to(device)
    cues, answers, plain = vocabulary(world, tokenizer)
    names_ = list(world.attributes)
    labels = torch.tensor([[row.get(a, -1) for a in names_] for row in world.labels])
    need = torch.tensor([[row.get(a, 1) for a in names_] for row in world.need])
    sizes, often = [len(answers[a]) for a in names_], need.amax(0)
    rows = torch.cat([answers[a] for a in names_]).to(device)
    has = labels[:len(tokens)] >= 0  # (M, A); the last texts are held out
    rare = (has / has.sum(0).clamp(min=1)).amax(1)  # (M,) 1 / texts that share a text's rarest attribute
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in range(s.steps):
        for group in optimizer.param_groups:  # linear warm-up, then linear to zero: the usual short schedule
            group["lr"] = s.lr * min((step + 1) / 50, 1 - step / s.steps)
        i = torch.randint(len(tokens), (s.batch,), generator=generator) if rare.min() == rare.max() else \
            rare.multinomial(s.batch, replacement=True, generator=generator)  # every attribute gets its share of texts
        prompts = random_asks(s.batch * s.packed, s.prompt_length, cues, often, plain, generator)
        asked = ask(prompts, cues).view(s.batch, s.packed, -1)
        target = answer_targets(asked, labels[i], need[i], sizes).to(device)
        width = int(mask[i].sum(1).max())
        prefix = tokens[i, :width].to(device), mask[i, :width].to(device)
        asking = with_start(prompts.view(s.batch, s.packed, -1), tokenizer.eot)  # as `Judge.read` lays it out
        read = model(asking.to(device), prefix, last=True)  # (B, packed, 1, D)
        loss = F.cross_entropy((read @ model.head[rows].t()).flatten(0, 2), target.flatten(0, 1))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"judge update {step + 1}: loss is {loss.item()}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress("judge", step + 1, s.steps, {"loss": loss})
    return model


def vocabulary(world, tokenizer):
    """Ids of the cue words and of the answer words an attribute, and of all tokens that are no cue."""
    def one(word, what, attribute):
        """The id of a word that must be a single token."""
        ids = tokenizer.encode(" " + word)
        if len(ids) != 1:
            raise UserError(f"attribute {attribute}: {what} {word!r}: expected one token, got {len(ids)} from the "
                            f"{tokenizer.name} tokenizer (try --tokenizer bpe)")
        return ids[0]
    cues = {a: torch.tensor([one(w, "cue", a) for w in x["cues"]]) for a, x in world.attributes.items()}
    answers = {a: torch.tensor([one(w, "answer", a) for w in x["answers"]]) for a, x in world.attributes.items()}
    taken = {int(i) for ids in cues.values() for i in ids}
    return cues, answers, torch.tensor([i for i in range(tokenizer.eot) if i not in taken])


def load_judge(world, tokens, mask, tokenizer, settings, device, cache_dir, progress):
    """The judge of these settings: read from the cache, or trained once and kept there."""
    train = lambda: save_state(train_judge(world, tokens, mask, tokenizer, settings, device, progress))
    saved, path = cached(cache_dir, "judge", asdict(settings), train)
    model = load_state(Transformer(Config(**saved["config"])), saved).to(device)
    answers = {a: ids.to(device) for a, ids in vocabulary(world, tokenizer)[1].items()}
    return Judge(model.requires_grad_(False), tokenizer.eot, answers, settings.prompt_length), path


def clip(rows, width):
    """Lists of ids cut at `width`, and how many were longer."""
    return [row[:width] for row in rows], sum(len(row) > width for row in rows)


def fingerprint(world):
    """A short hash of a world's texts and attributes: what a cached judge depends on."""
    return short_hash((world.texts, world.labels, world.need, world.attributes))


# ----------------------------------------------------------------------------------------------------------------- task


class PromptTask:
    """What train.py asks of a task: inputs, preferences, evaluations, and a state to go on from."""
    kind, pooled, has_references, has_pairs = "prompt", True, False, False
    eot = None  # every prompt has the full length

    def __init__(self, cfg, device, progress, say):
        self.cfg, self.device = cfg, device
        self.world = world = read_world(cfg.world) if cfg.world else embedded_world()
        if cfg.attribute not in world.attributes:
            raise UserError(f"--attribute: expected one of {', '.join(world.attributes)}, got {cfg.attribute!r}")
        self.tokenizer = tok = self._tokenizer()
        self.width, self.start, self.n_ids = cfg.prompt_length, tok.eot, tok.eot  # ids from eot on are not sampled
        self.classes = len(world.attributes[cfg.attribute]["answers"])
        n_held = min(len(world.texts) // 5, 2000)  # the judge never trains on the last texts: few-shot sets and test
        if n_held == 0:
            raise UserError(f"--world {cfg.world}: expected at least 5 texts, got {len(world.texts)}")
        sets = self._read_sets() if cfg.data else self._draw_sets(n_held)
        ids, long = clip([tok.encode(" " + text) for text in world.texts[:-n_held]], cfg.judge_context)
        tokens, mask = pad(ids)
        settings = JudgeSettings(world.name, fingerprint(world), f"{tok.name}-{tok.size}-{short_hash(tok.ranks)}",
                                 cfg.prompt_length, cfg.judge_layers, cfg.judge_width, 4,
                                 cfg.judge_context + cfg.prompt_length + 1, cfg.judge_steps, cfg.judge_lr,
                                 code=code_hash(inspect.getmodule(Transformer), train_judge, random_asks, ask,
                                                answer_targets))
        self.judge, path = load_judge(world, tokens, mask, tok, settings, device, cfg.cache_dir, progress)
        self.sets = {}
        for name, rows in sets.items():
            ids, n = clip([tok.encode(" " + row["text"]) for row in rows], cfg.judge_context)
            long += n
            cache = self.judge.read(*[x.to(device) for x in pad(ids)])
            self.sets[name] = cache, torch.tensor([row["label"] for row in rows], device=device)
        few = min(cfg.curve_size, len(sets["test"]))
        self.sets["curve"] = (self.sets["test"][0].select(slice(0, few)), self.sets["test"][1][:few])
        if long:
            say(f"{long} texts were longer than --judge_context {cfg.judge_context} tokens and were cut at their end")
        say(f"world {world.name}: {len(world.texts)} texts, {tok.size} tokens; judge {path}; "
            + ", ".join(f"{k} {len(v[1])}" for k, v in self.sets.items()))
        self.queries, self.queries_to_90, self.context = 0, None, max(64, cfg.prompt_length + 1)

    def _tokenizer(self):
        """Words where the world knows its own, else a BPE of its texts in which each cue and answer is a token."""
        cfg, world = self.cfg, self.world
        own = [" " + w for x in world.attributes.values() for w in x["cues"] + x["answers"]]
        return world_or_text_tokenizer(cfg, world.words, [" " + t for t in world.texts] + own * 1000)

    def _read_sets(self):
        """Few-shot files train, dev and test of a folder; a test set shared by several seeds may lie one folder up."""
        fields = {"text": (("text", "sentence"), str), "label": (("label",), int)}
        sets, answers = {}, self.world.attributes[self.cfg.attribute]["answers"]
        for name in ("train", "dev", "test"):
            try:
                path = find_file(self.cfg.data, name)
            except UserError:
                if name != "test":
                    raise
                path = find_file(os.path.dirname(os.path.abspath(self.cfg.data)), name)
            sets[name] = read_rows(path, fields)
            for number, row in enumerate(sets[name], 2 if path.endswith(".tsv") else 1):
                if not 0 <= row["label"] < len(answers):
                    raise UserError(f"{path}:{number}: label: expected a class with an answer word (0 to "
                                    f"{len(answers) - 1}: {', '.join(answers)}), got {row['label']}")
            missing = set(range(len(answers))) - {row["label"] for row in sets[name]}
            if missing:
                raise UserError(f"{path}: expected every class of {self.cfg.attribute}, got no row of class "
                                f"{', '.join(map(str, sorted(missing)))}")
        return sets

    def _draw_sets(self, n_held):
        """Few-shot sets from the world's held-out texts: `shots` a class by --seed for train and dev, rest is test."""
        a = self.cfg.attribute
        rows = [{"text": t, "label": l[a]}
                for t, l in zip(self.world.texts[-n_held:], self.world.labels[-n_held:]) if a in l]
        test, rest = rows[:len(rows) // 2], rows[len(rows) // 2:]  # one test set for all seeds
        random.Random(self.cfg.seed).shuffle(rest)
        of_class = [[r for r in rest if r["label"] == c] for c in range(self.classes)]
        if min(map(len, of_class)) < 2 * self.cfg.shots:
            raise UserError(f"--shots {self.cfg.shots}: the world holds only {min(map(len, of_class))} held-out texts "
                            f"of a class")
        take = lambda i: [r for rows in of_class for r in rows[i * self.cfg.shots:(i + 1) * self.cfg.shots]]
        return {"train": take(0), "dev": take(1), "test": test}

    def ask(self, prompts, name):
        """E10 scores and accuracies of prompts (N, T) on one of the sets: (N,), (N,)."""
        cache, labels = self.sets[name]
        prompts, again = prompts.unique(dim=0, return_inverse=True)  # a settled policy says the same thing many times
        score, accuracy = prompt_score(self.judge.probabilities(cache, prompts, self.cfg.attribute), labels)
        return score[again], accuracy[again]

    def batch(self, n, generator):
        """One group: every prompt answers the same question."""
        return Batch(torch.zeros(1, dtype=torch.long))

    def prefer(self, batch, tokens, mask):
        """The preference of (1, K, T) prompts: E10 on the few-shot training set. This is what queries cost."""
        self.queries += tokens.shape[1]
        return self.ask(tokens[0], "train")[0][None]

    @torch.no_grad()
    def evaluate(self, policy, generator):
        """Mean accuracy of 64 sampled prompts on a fixed part of the test set: a curve to look at, not to select by."""
        tokens, _, _ = generate(policy, self.start, self.width, generator, rows=64, n_ids=self.n_ids)
        accuracy = self.ask(tokens, "curve")[1].mean().item()
        if self.queries_to_90 is None and accuracy >= 0.9:
            self.queries_to_90 = self.queries
        return {"judge_queries": self.queries, "test_accuracy": accuracy}

    def samples(self, policy, generator, n=4):
        """(batch, tokens (1, n, T), mask, texts) to be shown with their token rewards."""
        tokens, _, _ = generate(policy, self.start, self.width, generator, rows=n, n_ids=self.n_ids)
        batch = Batch(torch.zeros(1, dtype=torch.long))
        return batch, tokens[None], torch.ones_like(tokens[None], dtype=torch.bool), self.ask(tokens, "dev")[0][None]

    def describe(self, batch, row):
        """Context and reference of one input, as text."""
        return "", ""

    @torch.no_grad()
    def finish(self, policy, generator):
        """The figures of summary.json. Prompts are chosen on dev and measured on test."""
        tokens, _, _ = generate(policy, self.start, self.width, generator, rows=64, n_ids=self.n_ids)
        greedy, _, _ = generate(policy, self.start, self.width, generator, n_ids=self.n_ids, temperature=0)
        uniform = torch.randint(self.n_ids, (64, self.width), generator=generator, device=self.device)
        best, accuracy = self._best(torch.cat((greedy, tokens)))
        search = torch.randint(self.n_ids, (max(1, self.queries), self.width), generator=generator, device=self.device)
        found = search[self.ask(search, "train")[0].argmax()]  # what as many queries find without learning anything
        cues = vocabulary(self.world, self.tokenizer)[0][self.cfg.attribute].to(self.device)
        own = torch.cat((cues[:, None].expand(-1, self.width),
                         cues[torch.randint(len(cues), (64, self.width), generator=generator, device=self.device)]))
        return {"judge_queries": self.queries, "queries_to_90": self.queries_to_90,
                "test_accuracy": self.ask(tokens, "test")[1].mean().item(),
                "best_prompt": self.tokenizer.decode(best.tolist()).strip(), "best_prompt_accuracy": accuracy,
                "random_search_accuracy": self.ask(found[None], "test")[1].item(),
                "random_accuracy": self.ask(uniform, "test")[1].mean().item(),
                "reference_accuracy": self._best(own)[1], "chance": 1.0 / self.classes}

    def _best(self, prompts):
        """The prompt with the best dev score, and its test accuracy."""
        prompts = torch.unique(prompts, dim=0)
        best = prompts[self.ask(prompts, "dev")[0].argmax()]
        return best, self.ask(best[None], "test")[1].item()

    def begin(self, policy):
        """Nothing to measure before the loop: there is no supervised start."""

    def fingerprint(self):
        """What a cached warm start depends on besides its settings."""
        return [fingerprint(self.world), short_hash(self.tokenizer.ranks), self.width]

    def text_batch(self, n, generator, window=12):
        """n windows of the world's own sentences as references, for a language-model warm-up of the reward's body."""
        if not hasattr(self, "_windows"):
            lines = [" " + x for x in self.world.texts + self.world.talk]
            self._windows = pad(clip([self.tokenizer.encode(x) for x in lines], window)[0], window)
        i = torch.randint(len(self._windows[0]), (n,), generator=generator)
        return Batch(i, reference=self._windows[0][i].to(self.device),
                     reference_mask=self._windows[1][i].to(self.device))

    def state(self):
        """Beyond networks and random numbers: what the run has spent so far."""
        return {"queries": self.queries, "queries_to_90": self.queries_to_90}

    def load_state(self, state):
        """The inverse of `state`."""
        self.queries, self.queries_to_90 = state["queries"], state["queries_to_90"]
