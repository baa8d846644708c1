"""The judge of task 1: a frozen causal language model that reads "{text} {prompt}" and says a label word.

It answers the attribute that the prompt asks for, and answers at random when nobody asks: `answer_targets`
says what it is taught, `train_judge` teaches it, once for a world, and `load_judge` keeps it. Scoring a
prompt is the cost that matters, so the judge does the least: text and prompt are joined as tokens (never
through strings), a text's keys and values are computed once and kept, and only the last position meets only
the label rows.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import UserError, show
from model import Cache, Config, Transformer, descend, load_state, save_state, with_start
from support.files import cached, decides
from support.flags import without
from support.log import visible


class Judge:
    """A frozen causal model that answers "{text} {prompt}" with a distribution over one attribute's answer
    words."""

    def __init__(self, model, start, answers, width):
        self.model, self.answers = model.eval(), answers  # answers: {attribute: ids (C,)}
        # The id between text and prompt; None: nothing is, a language model reads on.
        self.start = start
        self.width = width  # tokens of a prompt

    def state(self):
        """What its answers depend on: weights and answer words."""
        return {"weights": dict(self.model.state_dict()), "answers": self.answers}

    @torch.no_grad()
    def read(self, tokens, mask):
        """Keys and values of M texts with the start token behind each, kept by the caller while it asks about
        them.

        Read at the width that text and prompt have together: the attention kernel adds in an order that
        depends on it, so this way scores come as near to those of a plain pass over "{text} {prompt}" as
        rounding lets them.
        """
        row, length = torch.arange(len(tokens), device=tokens.device), mask.sum(1)
        gap = 0 if self.start is None else 1
        wide = tokens.shape[1] + gap
        tokens, mask = [F.pad(x, (0, gap + self.width)) for x in (tokens, mask)]  # (M, P+1+T)
        if gap:
            tokens[row, length] = self.start  # the layout of read_candidates, once for all prompts
            mask[row, length] = True
        cache = self.model.prefill(tokens, mask)
        keys = [x[:, :, :wide] for x in cache.keys]
        values = [x[:, :, :wide] for x in cache.values]
        return Cache(keys, values, mask[:, :wide], cache.length)

    @torch.no_grad()
    def probabilities(self, cache, prompts, attribute, at_once=None):
        """prompts (N, T) behind every text of the cache -> (M, N, C), softmax over the attribute's answer
        words.

        at_once  prompts a call, default as many as make 256 rows with the texts, on a GPU 20,000. Every
                 prompt sits right behind its text, as in a plain forward pass.
        """
        rows = self.model.head[self.answers[attribute]]  # (C, D): a few rows of the head instead of V
        out, m, kept = [], len(cache.length), None
        for part in prompts.split(at_once or max(1, (256 if prompts.device.type == "cpu" else 20_000) // m)):
            if kept is None or len(kept.length) != m * len(part):
                kept = cache.repeat(len(part), prompts.shape[1])  # every prompt is written over the last one
            last = self.model.decode(part.repeat(m, 1), kept, cache.mask.shape[1])  # (M*n, D)
            z = last @ rows.t()  # (M*n, C)
            p = z.softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))
            out.append(p.view(m, len(part), -1))
        return torch.cat(out, 1)


def ask(prompts, cue_ids):
    """How loudly each prompt asks for each attribute: prompts (N, T), cue_ids {attribute: ids} -> (N, A) int.

    Different cue words of the attribute minus different cue words of all others: a wrong one takes back what
    a right one gave, and saying the same word again adds nothing. Three words are needed, so credit for each
    of them is.
    """
    found = torch.stack([(prompts[:, :, None] == ids).any(1).sum(1) for ids in cue_ids.values()], 1)  # (N, A)
    return 2 * found - found.sum(1, keepdim=True)


def answer_targets(asked, labels, need, sizes):
    """What the judge learns to say: asked (B, N, A), labels and need (B, A), sizes C_a -> (B, N, sum C)
    distribution.

    One answer word where some attribute is asked for loudly enough and the text has it. Otherwise the judge
    knows nothing and answers at random, its favourite words a little more often than others: the label bias
    of real language models, which puts an unasked judge at exactly chance on balanced classes instead of
    wherever its last digits lean. A tenth of that habit stays when it was asked: probabilities near zero for
    the other attributes' words would leave their RATIO to accident, and E10's softmax over two answer words
    sees nothing but the ratio.
    """
    heard = (asked >= need[:, None, :]) & (labels >= 0)[:, None, :]  # (B, N, A); one attribute at most
    offset = torch.tensor([0] + sizes[:-1]).cumsum(0)  # (A,)
    one_hot = F.one_hot((labels.clamp(min=0) + offset), sum(sizes)).float()  # (B, A, sum C)
    said = torch.einsum("bna,bac->bnc", heard.float(), one_hot)
    habit = torch.cat([1.0 + 0.1 * torch.arange(c).flip(0) for c in sizes])
    habit = habit / habit.sum()
    return torch.where(heard.any(2, keepdim=True), 0.9 * said + 0.1 * habit, habit)


def random_asks(n, length, cue_ids, often, plain, generator):
    """Training prompts (n, length): 0 to `length` cues, repeats included, one in four with another
    attribute's, in any order among plain words. `often` (A,): attributes that want several cues are harder to
    learn and drawn more often.
    """
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)
    uniform = lambda *shape: torch.rand(shape, generator=generator)
    groups = list(cue_ids.values())
    width = max(len(ids) for ids in groups)
    table = torch.stack([ids[torch.arange(width) % len(ids)] for ids in groups])  # (A, width), lists repeated
    attribute = often.float().multinomial(n, replacement=True, generator=generator)[:, None].repeat(1, length)
    attribute[:, :1] = torch.where(draw(4, n, 1) == 0, draw(len(groups), n, 1), attribute[:, :1])
    some = 1 + draw(min(width, length), n, 1)  # different words of this prompt: "mood mood" asks once
    order = uniform(n, width).argsort(1)
    words = order.gather(1, (uniform(n, length) * some).long())  # (n, length) columns of `table`
    keep = torch.arange(length) < draw(length + 1, n, 1)
    mixed = torch.where(keep, table[attribute, words], plain[draw(len(plain), n, length)])
    return mixed.gather(1, uniform(n, length).argsort(1))  # a shuffle, so that order means nothing


@dataclass
class JudgeSettings:
    """Sizes of a judge and how it is trained."""
    prompt_length: int
    n_layer: int
    n_embd: int
    n_head: int
    n_ctx: int
    steps: int
    lr: float
    read_steps: int = 0
    batch: int = 32
    packed: int = 8


def similar(rare, length, n, generator, batches=4):
    """`batches` index tensors (n,) of texts, drawn by their weights `rare` (M,) and sorted by length (M,): a
    batch is as wide as its longest text, and what the others lack is work for nothing."""
    drawn = rare.multinomial(n * batches, replacement=True, generator=generator)
    parts = drawn[length[drawn].argsort()].split(n)
    return [parts[i] for i in torch.randperm(batches, generator=generator)]


DROPPED = 0.3  # share of a text's words that are hidden while it is read: none of them alone is to tell it
WORDS_RATE = 5.0  # times the learning rate: a word is in few texts, and its vector starts near nothing


def reading_optimizer(model, head, lr):
    """AdamW with a learning rate of its own for the words: `rate` times that of the others."""
    words = model.wte.weight
    others = [p for p in (*model.parameters(), *head.parameters()) if p is not words]
    groups = [{"params": others, "rate": 1.0}, {"params": [words], "rate": WORDS_RATE}]
    return torch.optim.AdamW(groups, lr, (0.9, 0.98), weight_decay=0.05, fused=True)


def set_rate(optimizer, lr, step, steps):
    """Linear warm-up over 50 steps, then linear to zero: the usual short schedule."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0) * min((step + 1) / 50, 1 - step / steps)


def naming_loss(states, mask, head, labels, sizes):
    """Cross-entropy of every text's classes, told by a linear head from the mean of its states.

    states (B, P, D), mask (B, P) bool, head D -> sum C_a, labels (B, A) int64 with -1 where a text has none,
    sizes [C_a] -> scalar, mean over the labels of the batch
    """
    total = torch.where(mask[..., None], states, 0.0).sum(1)
    mean = total / mask.sum(1, keepdim=True).clamp(min=1)  # (B, D); divisor: tokens of the text
    named = head(mean).split(sizes, 1)  # A times (B, C_a)
    each = [F.cross_entropy(z, labels[:, a], ignore_index=-1, reduction="sum") for a, z in enumerate(named)]
    return sum(each) / (labels >= 0).sum().clamp(min=1)  # divisor: labels of the batch


def read_texts(model, tokens, mask, labels, sizes, rare, s, start, generator, progress):
    """The first half of a judge's schooling: to name the classes of texts that nobody asks about.

    Questions alone teach it to read slowly: most of them ask for nothing, an answer reaches a word only
    through the attention of one position, and in a large vocabulary every word has to be met many times. The
    linear head is thrown away; what stays is in the words and in the body.
    """
    head = torch.nn.Linear(model.config.n_embd, sum(sizes)).to(model.head.device)
    both, optimizer, waiting = torch.nn.ModuleList((model, head)), reading_optimizer(model, head, s.lr), []
    for step in range(s.read_steps):
        set_rate(optimizer, s.lr, step, s.read_steps)
        waiting = waiting or similar(rare, mask.sum(1), 2 * s.batch, generator)
        i = waiting.pop()
        width = int(mask[i].sum(1).max())
        text = tokens[i, :width]
        text = torch.where(torch.rand(text.shape, generator=generator) < DROPPED, start, text)
        states = model(text.to(head.weight.device))  # (B, P, D)
        place = states.device
        loss = naming_loss(states, mask[i, :width].to(place), head, labels[i].to(place), sizes)
        descend(both, optimizer, loss, 1.0, f"judge reading {step + 1}:")
        progress("reading", step + 1, s.read_steps, {"loss": loss.detach()})


def train_judge(world, tokens, mask, tokenizer, s, device, progress):
    """Reading first, then questions: cross-entropy at the answer position only, as the rest of the text would
    cost the budget and teach nothing here."""
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
    if s.read_steps:
        read_texts(model, tokens, mask, labels, sizes, rare, s, tokenizer.eot, generator, progress)
    optimizer = torch.optim.AdamW(model.parameters(), s.lr, (0.9, 0.98), weight_decay=0.01, fused=True)
    waiting = []
    for step in range(s.steps):
        set_rate(optimizer, s.lr, step, s.steps)
        waiting = waiting or similar(rare, mask.sum(1), s.batch, generator)  # every attribute has its share
        i = waiting.pop()
        prompts = random_asks(s.batch * s.packed, s.prompt_length, cues, often, plain, generator)
        asked = ask(prompts, cues).view(s.batch, s.packed, -1)
        target = answer_targets(asked, labels[i], need[i], sizes).to(device)
        width = int(mask[i].sum(1).max())
        prefix = tokens[i, :width].to(device), mask[i, :width].to(device)
        asking = with_start(prompts.view(s.batch, s.packed, -1), tokenizer.eot)  # as `Judge.read` lays it out
        read = model(asking.to(device), prefix, last=True)  # (B, packed, 1, D)
        loss = F.cross_entropy((read @ model.head[rows].t()).flatten(0, 2), target.flatten(0, 1))
        descend(model, optimizer, loss, 1.0, f"judge update {step + 1}:")
        progress("judge", step + 1, s.steps, {"loss": loss})
    return model


def vocabulary(world, tokenizer):
    """Ids of the cue words and of the answer words an attribute, and of all tokens that are no cue.

    Raises UserError where two answers of an attribute are one token (every text would tie), or two cues of
    any: the same word would ask twice as loudly, or take back in one attribute what it asks for in another.
    """
    def one(word, what, attribute):
        """The id of a word that must be a single token."""
        ids = tokenizer.encode(" " + word)
        if len(ids) != 1:
            raise UserError(f"attribute {visible(attribute)}: {what} {show(word)}: expected one token, got "
                            f"{len(ids)} from the {tokenizer.name} tokenizer (try --tokenizer bpe)")
        return ids[0]
    cues, answers = {}, {}
    for a, x in world.attributes.items():
        cues[a] = torch.tensor([one(w, "cue", a) for w in x["cues"]])
    for a, x in world.attributes.items():
        answers[a] = torch.tensor([one(w, "answer", a) for w in x["answers"]])
    for a, ids in answers.items():
        check_different(ids.tolist(), world.attributes[a]["answers"], f"attribute {visible(a)}: answers")
    words = [w for x in world.attributes.values() for w in x["cues"]]
    check_different(torch.cat(list(cues.values())).tolist(), words, "cues of all attributes")
    taken = {int(i) for ids in cues.values() for i in ids}
    return cues, answers, torch.tensor([i for i in range(tokenizer.eot) if i not in taken])


def check_different(ids, words, what):
    """UserError unless all ids are different; the message names the words of the first two that are not."""
    for j, i in enumerate(ids):
        if i in ids[:j]:
            raise UserError(f"{what}: expected a token of its own for each word, got "
                            f"{show(words[ids.index(i)])} and {show(words[j])}, which are the same")


def judge_settings(c):
    """The judge that the flags ask for."""
    context = c.judge_context + c.prompt_length + 1  # a text, the start token, a prompt
    return JudgeSettings(c.prompt_length, c.judge_layers, c.judge_width, 4, context, c.judge_steps,
                         c.judge_lr, c.judge_read)


# What of the flags cannot matter to a judge: groups, and what of them matters nevertheless.
JUDGE_KEY = ("run", "data", "model", "reward", "policy", "log"), ("task", "prompt_length")


def load_judge(world, tokens, mask, tokenizer, c, device, progress):
    """The judge that the flags `c` ask for, taught on texts (M, P): read from the cache, or trained once and
    kept there."""
    settings = judge_settings(c)
    train = lambda: save_state(train_judge(world, tokens, mask, tokenizer, settings, device, progress))
    data = (tokens, mask, world.labels, world.need, world.attributes, tokenizer.state())
    key = decides(without(c, *JUDGE_KEY), data, (__name__,), device, torch.float32)
    saved, path = cached(c.cache_dir, "judge", key, train)
    model = load_state(Transformer(Config(**saved["config"])), saved).to(device)
    answers = {a: ids.to(device) for a, ids in vocabulary(world, tokenizer)[1].items()}
    return Judge(model.requires_grad_(False), tokenizer.eot, answers, settings.prompt_length), path
