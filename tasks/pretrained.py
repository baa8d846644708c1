"""Judges of task 1 that nobody taught here: language models of others, `--judge HUB_ID` or `--judge FOLDER`.

A causal one reads "{text} {prompt}" and says an answer word right behind it. What makes these judges other
than the world's: they are large and the text is long, so the keys and values of a whole test set do not fit
into memory and a few texts are read at a time; nothing stands between text and prompt; and nobody knows which
words ask for an attribute, so a world's cue words are words to look at and no more.
"""
from dataclasses import dataclass

import torch

from tasks.judge import Judge, judge_settings, vocabulary
from weights import from_pretrained

# Few-shot sets of one's own without a world on disk: the answer words of the paper (its SST-2 and AG News).
ANSWERS = {"sentiment": "terrible great".split(), "topic": "World Sports Business Tech".split()}
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


def known_words(world, c, tokenizer):
    """{attribute: {"cues", "answers"}} of the one attribute that is asked for, as `judge.vocabulary` takes
    it: its answer words, of few-shot sets without a world on disk those of `ANSWERS`, and the world's cue
    words that are one token each of this tokenizer; where none is, the answer words stand in."""
    x = world.attributes[c.attribute]
    answers = x["answers"] if c.world or not c.data else ANSWERS.get(c.attribute, x["answers"])
    cues = [w for w in x["cues"] if len(tokenizer.encode(" " + w)) == 1]
    return {c.attribute: {"cues": cues or answers, "answers": answers}}


def language_model_judge(world, tokenizer, c, device):
    """The judge that --judge names, and where it comes from."""
    answers = {a: ids.to(device) for a, ids in vocabulary(world, tokenizer)[1].items()}
    width = c.judge_context + c.prompt_length
    model = from_pretrained(c.judge, tokenizer, width, flag="judge").to(device).requires_grad_(False)
    return LanguageModelJudge(model, answers, c.prompt_length), c.judge
