"""Judges of task 1 that nobody taught here: language models of others, `--judge HUB_ID` or `--judge FOLDER`.

A causal one reads "{text} {prompt}" and says an answer word right behind it. A masked one (RoBERTa, the judge
of the paper) fills the gap of a template. What makes these judges other than the world's: they are large and
the text is long, so the keys and values of a whole test set do not fit into memory and a few texts are read
at a time; nothing stands between text and prompt; and nobody knows which words ask for an attribute, so a
world's cue words are words to look at and no more.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import Config, Transformer, load_state, save_state
from support.hub import fetch
from support.log import UserError
from tasks.judge import Judge, vocabulary
from tasks.roberta import Roberta, Sizes, is_roberta, numbers, read_roberta
from weights import from_pretrained

# Few-shot sets of one's own without a world on disk: the answer words of the paper (its SST-2 and AG News).
ANSWERS = {"sentiment": "terrible great".split(), "topic": "World Sports Business Tech".split()}
GAP_FIRST = {"topic"}  # "<mask> {prompt} {text}"; all others ask behind the text
AT_ONCE = 16  # texts whose keys and values are held at the same time


@dataclass
class Texts:
    """M texts that are read when they are asked about: tokens, mask (M, P)."""
    tokens: torch.Tensor
    mask: torch.Tensor

    def select(self, rows):
        """Some of them."""
        return Texts(self.tokens[rows], self.mask[rows])

    def parts(self, n):
        """n texts at a time, without the padding that they do not need."""
        for tokens, mask in zip(self.tokens.split(n), self.mask.split(n)):
            width = int(mask.sum(1).max())
            yield tokens[:, :width], mask[:, :width]


class LanguageModelJudge(Judge):
    """A frozen causal language model that continues "{text} {prompt}"."""

    def __init__(self, model, answers, width):
        super().__init__(model, None, answers, width)

    def read(self, tokens, mask):
        """Nothing yet: see `probabilities`."""
        return Texts(tokens, mask)

    @torch.no_grad()
    def probabilities(self, texts, prompts, attribute, at_once=None):
        """prompts (N, T) behind every text -> (M, N, C), softmax over the attribute's answer words."""
        ask = super().probabilities
        read = super().read
        return torch.cat([ask(read(*part), prompts, attribute, at_once) for part in texts.parts(AT_ONCE)])


class MaskedJudge:
    """A frozen RoBERTa that fills the gap of "{text} {prompt} <mask> ." or, of `GAP_FIRST`, of "<mask>
    {prompt} {text}": the templates of the paper.

    numbers  (V,) its number of every id of the run's tokenizer; marks: those of <s>, </s>, <mask> and " ."
    answers  {attribute: ids (C,)}, in its numbers
    """

    def __init__(self, model, numbers, marks, answers):
        self.model, self.numbers, self.marks, self.answers = model.eval(), numbers, marks, answers

    def state(self):
        """What its answers depend on."""
        return {"weights": dict(self.model.state_dict()), "answers": self.answers, "numbers": self.numbers}

    def read(self, tokens, mask):
        """Nothing yet: what it makes of a text depends on the prompt."""
        return Texts(tokens, mask)

    @torch.no_grad()
    def probabilities(self, texts, prompts, attribute, at_once=None):
        """prompts (N, T) beside every text -> (M, N, C), softmax over the attribute's answer words.
        at_once  prompts a call, default as many as make 128 rows with the texts, on a GPU 2,000"""
        at_once = at_once or max(1, (128 if prompts.device.type == "cpu" else 2_000) // AT_ONCE)
        ask = lambda part, some: self._ask(*part, some, attribute)
        return torch.cat([torch.cat([ask(part, some) for some in prompts.split(at_once)], 1)
                          for part in texts.parts(AT_ONCE)])

    def _ask(self, tokens, mask, prompts, attribute):
        """tokens, mask (M, P), prompts (N, T) -> (M, N, C)."""
        rows, length, gap = self.filled(tokens, mask.sum(1), prompts, attribute in GAP_FIRST)
        seen = torch.arange(rows.shape[2], device=rows.device) < length[..., None]  # (M, N, L)
        z = self.model(rows.flatten(0, 1), seen.flatten(0, 1), gap.flatten(), self.answers[attribute])
        return z.view(*gap.shape, -1).softmax(-1)

    def filled(self, tokens, length, prompts, gap_first):
        """The template of every text and prompt: tokens (M, P) of `length` (M,), prompts (N, T) -> rows
        (M, N, L) in the judge's numbers, their lengths (M, N) and the place of the gap (M, N)."""
        (m, p), (n, t) = tokens.shape, prompts.shape
        text = self.numbers[tokens][:, None].expand(m, n, p)
        said = self.numbers[prompts][None].expand(m, n, t)
        mark = lambda name: self.marks[name].view(1, 1, 1).expand(m, n, 1)
        if gap_first:
            head, tail = [mark("open"), mark("gap"), said], [mark("close")]
        else:
            head, tail = [mark("open")], [said, mark("gap"), mark("stop"), mark("close")]
        head, tail = torch.cat(head, 2), torch.cat(tail, 2)
        behind = head.shape[2] + length[:, None].expand(m, n)  # where the text ends, (M, N)
        rows = F.pad(torch.cat((head, text), 2), (0, tail.shape[2]))  # (M, N, L)
        place = behind[..., None] + torch.arange(tail.shape[2], device=rows.device)
        rows = rows.scatter(2, place, tail)  # over the padding of a short text
        gap = torch.ones_like(behind) if gap_first else behind + t
        return rows, behind + tail.shape[2], gap


def known_words(world, c, tokenizer):
    """{attribute: {"cues", "answers"}} of the one attribute that is asked for, as `judge.vocabulary` takes
    it: its answer words, of few-shot sets without a world on disk those of `ANSWERS`, and the world's cue
    words that are one token each of this tokenizer; where none is, the answer words stand in."""
    x = world.attributes[c.attribute]
    answers = x["answers"] if c.world or not c.data else ANSWERS.get(c.attribute, x["answers"])
    cues = [w for w in x["cues"] if len(tokenizer.encode(" " + w)) == 1]
    return {c.attribute: {"cues": cues or answers, "answers": answers}}


def foreign_judge(world, tokenizer, c, device):
    """The judge that --judge names, and where it comes from."""
    answers = {a: ids.to(device) for a, ids in vocabulary(world, tokenizer)[1].items()}
    width = c.judge_context + c.prompt_length
    if is_roberta(fetch(c.judge, "judge")):
        return masked_judge(world, tokenizer, c, width + 4, device), c.judge  # <s>, <mask>, " ." and </s>
    model = from_pretrained(c.judge, tokenizer, width, flag="judge").to(device).requires_grad_(False)
    return LanguageModelJudge(model, answers, c.prompt_length), c.judge


def masked_judge(world, tokenizer, c, width, device):
    """The MaskedJudge that --judge names. An answer word in a gap at the beginning has no space before it."""
    model = read_roberta(c.judge, width)
    table, marks = numbers(c.judge, tokenizer, model.config.vocab_size)
    marks = {name: torch.tensor(i) for name, i in marks.items()} | {"stop": table[one(" .", tokenizer)]}
    space = "" if c.attribute in GAP_FIRST else " "
    said = world.attributes[c.attribute]["answers"]
    answers = {c.attribute: table[torch.tensor([one(space + word, tokenizer) for word in said])]}
    return to_device(MaskedJudge(model, table, marks, answers), device)


def one(text, tokenizer):
    """The id of a text that must be one token."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise UserError(f"--judge: {text!r}: expected one token, got {len(ids)}")
    return ids[0]


def to_device(judge, device):
    """A MaskedJudge with all that it has there."""
    there = lambda table: {name: x.to(device) for name, x in table.items()}
    return MaskedJudge(judge.model.to(device), judge.numbers.to(device), there(judge.marks),
                       there(judge.answers))


def kept_judge(judge):
    """What a run keeps of its judge beside its answers, of types that torch.load(weights_only=True) reads."""
    kept = {"judge_kind": type(judge).__name__, "judge": save_state(judge.model)}
    if isinstance(judge, MaskedJudge):
        marks = {name: x.cpu() for name, x in judge.marks.items()}
        kept |= {"judge_numbers": judge.numbers.cpu(), "judge_marks": marks}
    return kept


def reopened_judge(kept, answers, start, device):
    """The judge of what `kept_judge` returned. answers: {attribute: ids (C,)}; start: the id that the world's
    judge reads between text and prompt."""
    saved, kind = kept["judge"], kept.get("judge_kind", "Judge")  # older runs have the world's judge alone
    masked = kind == "MaskedJudge"
    empty = Roberta(Sizes(**saved["config"])) if masked else Transformer(Config(**saved["config"]))
    model = load_state(empty, saved).to(device).requires_grad_(False)
    if masked:
        return to_device(MaskedJudge(model, kept["judge_numbers"], kept["judge_marks"], answers), device)
    if kind == "LanguageModelJudge":
        return LanguageModelJudge(model, answers, kept["width"])
    return Judge(model, start, answers, kept["width"])
