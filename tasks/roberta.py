"""RoBERTa, the paper's judge: a bidirectional transformer that says which word a gap holds.

What differs from model.py: it reads to both sides (one mask, from lengths), norms stand behind the sums
(post-norm), positions begin at 2, a token type that is always 0 is added, and the head is a small net of its
own before the tied embedding. Read from a folder in the hub's form (`roberta-base`, `roberta-large`,
`distilroberta-base`); nothing is trained here.

Its tokens are GPT-2's, under other numbers: the order of fairseq's dictionary, with four marks before them
and <mask> at the end. `numbers` is the table from one to the other, so a prompt of a GPT-2 policy reaches the
judge token by token, never as a text that is cut anew.
"""
import os
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import UserError
from support.files import read_json
from support.hub import fetch
from support.tensors import read_tensors
from support.tokenizer import byte_alphabet
from weights import HUB_FORM, LONGEST, check_positions, plain_names, taken, undrawn, weights_file, whole

MARKS = {"open": "<s>", "close": "</s>", "gap": "<mask>"}
OFFSET = 2  # the place of the first token: 0 and 1 belong to padding
# Names without weights, and a pooler, which a classifier would read and a masked language model does not.
NAMES = SimpleNamespace(prefix="roberta.", ignored=r"embeddings\.position_ids|pooler\..*")
INNER = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
         "proj": "attention.output.dense", "norm_1": "attention.output.LayerNorm",
         "fc": "intermediate.dense", "out": "output.dense", "norm_2": "output.LayerNorm"}
OUTER = {"word.weight": "embeddings.word_embeddings.weight",
         "place.weight": "embeddings.position_embeddings.weight",
         "kind.weight": "embeddings.token_type_embeddings.weight",
         "norm.weight": "embeddings.LayerNorm.weight", "norm.bias": "embeddings.LayerNorm.bias",
         "dense.weight": "lm_head.dense.weight", "dense.bias": "lm_head.dense.bias",
         "head_norm.weight": "lm_head.layer_norm.weight", "head_norm.bias": "lm_head.layer_norm.bias",
         "bias": "lm_head.bias"}
TIED = {"lm_head.decoder.weight": "word.weight", "lm_head.decoder.bias": "bias"}  # some files say them twice
SIZES = {"vocab_size": "vocab_size", "places": "max_position_embeddings", "kinds": "type_vocab_size",
         "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
         "inner": "intermediate_size"}
FIXED = {"model_type": "roberta", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "pad_token_id": 1}


@dataclass
class Sizes:
    """Sizes of a RoBERTa; `places` counts the two that no token has."""
    vocab_size: int
    places: int
    kinds: int
    n_layer: int
    n_head: int
    n_embd: int
    inner: int


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        for name in ("q", "k", "v", "proj"):
            setattr(self, name, nn.Linear(c.n_embd, c.n_embd))
        self.fc, self.out = nn.Linear(c.n_embd, c.inner), nn.Linear(c.inner, c.n_embd)
        self.norm_1, self.norm_2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)

    def forward(self, x, mask):
        """x (B, T, D), mask (B, 1, 1, T): what may be looked at."""
        heads = lambda part: part(x).unflatten(2, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, d)
        q, k, v = heads(self.q), heads(self.k), heads(self.v)
        y = F.scaled_dot_product_attention(q, k, v, mask)  # (B, H, T, d)
        x = self.norm_1(x + self.proj(y.transpose(1, 2).flatten(2)))
        return self.norm_2(x + self.out(F.gelu(self.fc(x))))


class Roberta(nn.Module):
    """tokens and the place of a gap -> what it holds."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.word, self.place = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.places, c.n_embd)
        self.kind = nn.Embedding(c.kinds, c.n_embd)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layer))
        self.norm, self.dense, self.head_norm = (nn.LayerNorm(c.n_embd), nn.Linear(c.n_embd, c.n_embd),
                                                 nn.LayerNorm(c.n_embd))
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, tokens, mask, gap, among=None):
        """Logits (B, V) of the token at `gap` (B,); tokens, mask (B, T) from lengths.
        among  ids (C,): of these alone, (B, C)
        """
        place = OFFSET + torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.word(tokens) + self.place(place) + self.kind.weight[0])  # (B, T, D)
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        x = x[torch.arange(len(x), device=x.device), gap]  # (B, D)
        x = self.head_norm(F.gelu(self.dense(x)))
        ids = slice(None) if among is None else among
        return x @ self.word.weight[ids].t() + self.bias[ids]


def is_roberta(folder):
    """Whether a folder's config.json says so."""
    return read_json(os.path.join(folder, "config.json"), HUB_FORM, LONGEST).get("model_type") == "roberta"


def read_roberta(source, needed=None, flag="judge"):
    """The Roberta of a hub id or folder, in float32. `needed`: positions that are wanted. UserError's one
    line for other settings, and for every tensor that is missing, unused or of another shape: a file without
    its lm_head is one for other ends and is refused."""
    folder = fetch(source, flag)
    path = os.path.join(folder, "config.json")
    given = read_json(path, HUB_FORM, LONGEST)
    for key, have in FIXED.items():
        if given.get(key, {"layer_norm_eps": 1e-12}.get(key, have)) != have:
            raise UserError(f"{path}: {key}: expected {have}, got {str(given.get(key))[:40]!r}")
    most = {"n_layer": 1000}
    c = Sizes(**{name: whole(path, key, given.get(key), most.get(name, 2 ** 27))
                 for name, key in SIZES.items()})
    if c.n_embd % c.n_head:
        raise UserError(f"{path}: a width of {c.n_embd} is no multiple of {c.n_head} heads")
    check_positions(SimpleNamespace(n_ctx=c.places - OFFSET), needed, source, flag)
    path = weights_file(folder)
    names = dict(OUTER)
    for i in range(c.n_layer):
        names |= {f"layers.{i}.{own}.{part}": f"encoder.layer.{i}.{x}.{part}"
                  for own, x in INNER.items() for part in ("weight", "bias")}
    model = undrawn(lambda: Roberta(c))
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    found = plain_names(read_tensors(path), NAMES, path)
    twice = {name: found.pop(name) for name in TIED if name in found}
    state = taken(found, names, shapes, path)
    for name, x in twice.items():
        if not torch.equal(x.float(), state[TIED[name]]):
            raise UserError(f"{path}: {name}: expected a head tied to the embedding, got other weights")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def numbers(source, tokenizer, size, flag="judge"):
    """(ids (V,) int64, {mark: id}): RoBERTa's numbers of a tokenizer's ids, and of its own marks. End-of-text
    is its </s>. UserError where its vocabulary of `size` ids has not all of them."""
    path = os.path.join(fetch(source, flag), "vocab.json")
    vocab = read_json(path, HUB_FORM, 10 ** 8)
    shown = {b: c for c, b in byte_alphabet().items()}
    names = ["".join(shown[b] for b in token) for token in tokenizer.bytes_of[:-1]] + [MARKS["close"]]
    for name in (*MARKS.values(), *names):
        if type(vocab.get(name)) is not int or not 0 <= vocab[name] < size:
            raise UserError(f"{path}: has no number for {name!r}: the run's tokens are not GPT-2's (leave "
                            f"--tokenizer out)")
    return torch.tensor([vocab[name] for name in names]), {k: vocab[x] for k, x in MARKS.items()}
