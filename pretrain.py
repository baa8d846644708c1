"""A language model of your own text, in a folder that --init_from, --reward_init and --judge take.

    python pretrain.py --data stories/ news.jsonl hub:fancyzhx/ag_news --out out/mine
    python train.py --task summarize --init_from out/mine

Text files, folders of them, rows (.jsonl, .csv, .tsv) and hub data sets are cut into documents; some are held
out and never trained on. A byte-pair encoding is learned from a sample of the text, all tokens lie in one
memory-mapped file of the cache, and a decoder learns to predict the next one in windows drawn by chance. Its
figure is bits per byte of the held-out documents: comparable between tokenizers, and with gzip.

The windows of a step depend on seed and step alone, so a run that was stopped or killed goes on, by the same
command, where its last checkpoint stands, and ends with the same weights to the bit.
"""
import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict

from support.log import (Log, UserError, as_value, command, fail, leave_quietly, out_of_memory,
                         tolerant_terminal)

if __name__ == "__main__":
    leave_quietly()

import numpy as np
import torch
import torch.nn.functional as F

import data
import weights
from fused import policy_loss
from model import Config, Transformer, descend, generate
from support.device import decide_device, decide_threads
from support.documents import documents_of
from support.files import digest, read_torch, write_torch, write_whole
from support.flags import Parser, number
from support.folder import LOCK, cut_back, make_folders
from support.lock import release, take
from support.ngram import compressed, ngram_bits

SIZES = {"n_layer": (4, 1, "transformer blocks"), "n_embd": (256, 8, "their width"),
         "n_head": (4, 1, "attention heads"), "context": (256, 8, "tokens of a window"),
         "vocab_size": (8192, 257, "ids of the byte-pair encoding"), "steps": (4000, 1, "updates"),
         "batch_size": (32, 1, "windows an update"), "seed": (1, 0, "fixes weights and windows")}
TRAINING = (*SIZES, "lr", "held_out", "dtype")  # what a run that goes on must have begun with
WARM = 100  # updates until the learning rate is at its height
LOOK = 64   # held-out documents that are looked at while it trains; at the end all of them


def flags():
    """The flags, each with its default."""
    parser = Parser(prog="pretrain.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="X", help="files, folders or hub:ID[:CONFIG]")
    add("--out", required=True, metavar="DIR", help="folder of the model; a run in it goes on")
    add("--field", nargs="+", metavar="NAME", help="fields of rows that are text (default: text, document, "
        "article, content or sentence, whichever comes first)")
    for name, (default, low, what) in SIZES.items():
        add(f"--{name}", metavar="N", type=number(int, low), default=default, help=f"{what} ({default})")
    add("--lr", metavar="X", type=number(float, 0), default=1e-3, help="Adam learning rate (0.001)")
    add("--held_out", metavar="X", type=number(float, 0), default=0.02, help="share of the documents (0.02)")
    add("--every", metavar="N", type=number(int, 1), default=250, help="updates between checkpoints (250)")
    add("--threads", metavar="N", type=number(int, 0), default=0, help="CPU threads (0: by the work)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="autocast type (auto)")
    add("--cache_dir", metavar="DIR", default="out/cache", help="where text and tokens are kept (out/cache)")
    add("--baselines", action="store_true", help="bits per byte of gzip, xz and a 5-gram model, too")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)  # what happens anyway
    return parser


# ------------------------------------------------------------------------------------------------------- text


def read_text(c, log):
    """Documents -> tokenizer, {"train", "held_out": support.corpus.Ids}, {the same: Rows}. Documents of equal
    texts are on the same side."""
    documents, keys = documents_of(c.data, c.field, c.cache_dir, log.progress, log.say)
    sides = held_out_rows(keys, c.held_out)
    rows = {"train": documents[np.flatnonzero(~sides)], "held_out": documents[np.flatnonzero(sides)]}
    make = lambda texts: data.train_bpe(texts, c.vocab_size)
    parts = {"text": ("text", 2 ** 31 - 1, True)}
    tokenizer, ids = data.keep_ids(c.cache_dir, rows, parts, make, ["bpe", c.vocab_size], c.threads,
                                   log.progress, log.say)
    ids = {side: x["text"] for side, x in ids.items()}
    log.say(f"text: {len(rows['train']):,} documents, {len(ids['train'].flat):,} tokens "
            f"({tokenizer.size:,} ids); held out {len(rows['held_out']):,}, "
            f"{len(ids['held_out'].flat):,} tokens")
    if len(ids["train"].flat) <= c.context:
        raise UserError(f"--data: expected more than --context {c.context} tokens to train on, got "
                        f"{len(ids['train'].flat)}")
    return tokenizer, ids, rows


def held_out_rows(keys, share):
    """Which of N documents are held out, (N,) bool, by their keys (N, 32): this share of the different texts,
    one at least. UserError where nothing would be left."""
    different, which = np.unique(keys, axis=0, return_inverse=True)
    n = max(1, round(share * len(different)))
    if n >= len(different):
        raise UserError(f"--held_out {share:g}: expected at least two documents that differ and one to train "
                        f"on, got {len(different)}")
    return which.reshape(-1) < n


def batch(flat, c, step):
    """The windows of a step, of one stream of tokens: what is read (B, T) and, one on, what is predicted."""
    draw = np.random.Generator(np.random.Philox(key=[c.seed, step]))
    starts = draw.integers(0, len(flat) - c.context, c.batch_size)
    both = np.stack([flat[i:i + c.context + 1] for i in starts]).astype(np.int64)  # (B, T + 1)
    return torch.from_numpy(both[:, :-1].copy()), torch.from_numpy(both[:, 1:].copy())


# -------------------------------------------------------------------------------------------------- the model


class Training:
    """Model, optimizer and step: everything that a checkpoint holds."""

    def __init__(self, c, tokenizer, device, dtype):
        self.c, self.device, self.dtype, self.step = c, device, dtype, 0
        torch.manual_seed(c.seed)
        self.model = Transformer(Config(tokenizer.size, c.context, c.n_layer, c.n_head, c.n_embd)).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=c.lr, fused=True)

    def autocast(self):
        """Half precision for matrix products where --dtype says so."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def update(self, flat):
        """One step on the windows of this step: the mean loss in nats a token."""
        tokens, targets = [x.to(self.device) for x in batch(flat, self.c, self.step)]
        with self.autocast():
            hidden = self.model.train()(tokens).flatten(0, 1)  # (B T, D)
            each = torch.full((len(hidden),), 1 / len(hidden), device=self.device)  # divisor: B T tokens
            loss, _, _ = policy_loss(hidden, self.model.head, targets.flatten(), each)
        # warm-up, flat, linear to zero over the last half
        now = self.c.lr * min(1.0, (self.step + 1) / WARM, 2 * (1 - self.step / self.c.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = now
        descend(self.model, self.optimizer, loss, 1.0, f"update {self.step + 1}:")
        self.step += 1
        return loss.item()

    def state(self, about, seconds):
        """A dictionary that torch.load(weights_only=True) reads."""
        return {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "about": about, "seconds": seconds}

    def load(self, saved):
        """The inverse of `state`."""
        self.step = saved["step"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])


@torch.no_grad()
def bits(model, documents, start, at_once=32):
    """Bits that a model needs for documents of ids, summed over all their tokens, end-of-text included.

    Every document begins behind the start token, and every `n_ctx` tokens anew behind the token before them:
    each token is predicted once, with no more before it than a window has.
    """
    width, device = model.config.n_ctx, model.head.device
    parts = []
    for ids in documents:
        whole = np.concatenate(([start], ids)).astype(np.int64)
        parts += [whole[i:i + width + 1] for i in range(0, len(whole) - 1, width)]
    total, model = 0.0, model.eval()
    for i in range(0, len(parts), at_once):
        rows = parts[i:i + at_once]
        tokens, mask = [x.to(device) for x in data.pad([x[:-1] for x in rows])]  # (B, T)
        targets, _ = data.pad([x[1:] for x in rows])
        logp = policy_loss(model(tokens).flatten(0, 1), model.head, targets.flatten().to(device),
                           mask.flatten().float())[1]
        total -= logp[mask.flatten()].sum().item() / math.log(2)
    return total


def bits_per_byte(training, ids, rows, start, n=None):
    """Of the first n held-out documents.  divisor: bytes of their own text, in which neither end-of-text nor
    the space before it is"""
    n = len(rows) if n is None else min(n, len(rows))
    with training.autocast():
        need = bits(training.model, [ids[i] for i in range(n)], start)
    return need / sum(len(rows[i]["text"].encode()) for i in range(n))


def samples(model, tokenizer, seed, n=3):
    """n texts that the model writes by itself."""
    draw = torch.Generator(model.head.device).manual_seed(seed)
    new = min(100, model.config.n_ctx - 1)
    tokens, length, _ = generate(model.eval(), tokenizer.eot, new, draw, n, eot=tokenizer.eot,
                                 temperature=0.8)
    return [tokenizer.decode(ids[:k]).strip() for ids, k in zip(tokens.tolist(), length.tolist())]


def baselines(ids, rows, size, most=20_000_000):
    """{name: bits per byte} of the same held-out documents; the counts are of `most` tokens at most."""
    text = "\n".join(row["text"] for row in rows["held_out"])
    n_bytes = sum(len(row["text"].encode()) for row in rows["held_out"])
    grams = ngram_bits(np.asarray(ids["train"].flat[:most], np.int64),
                       np.asarray(ids["held_out"].flat, np.int64), size).sum()
    return compressed(text) | {"5-gram": grams / n_bytes}  # divisor: bytes of the held-out documents


# ----------------------------------------------------------------------------------------------------- a run


@contextlib.contextmanager
def claimed(folder):
    """The folder, made and locked, so that no second process trains in it."""
    make_folders(folder)
    lock = take(os.path.join(folder, LOCK))
    if lock is None:
        raise UserError(f"--out {folder}: another process is working in it")
    try:
        yield
    finally:
        release(lock, os.path.join(folder, LOCK))


def go_on(training, path, about, device):
    """Takes over the checkpoint of the same run, where there is one: seconds that it took so far. UserError
    for a run of other settings or of other text."""
    if not os.path.exists(path):
        return 0.0
    saved = read_torch(path, "a checkpoint", device)
    try:
        other = [name for name in about if saved["about"].get(name) != about[name]]
        if not other:
            training.load(saved)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: expected a checkpoint of pretrain.py, got something else") from error
    if other:
        was = saved["about"].get(other[0])
        raise UserError(f"{path}: of a run with --{other[0]} {was}; give that, or choose another --out")
    return saved["seconds"]


def work(c, log):
    """Reads, trains, looks and writes: the summary."""
    if c.n_embd % (2 * c.n_head):
        raise UserError(f"--n_embd {c.n_embd}: expected a multiple of 2 x n_head = {2 * c.n_head}")
    path = lambda name: os.path.join(c.out, name)
    if os.path.isdir(c.out) and os.listdir(c.out) and not os.path.exists(path("metrics.jsonl")):
        raise UserError(f"--out {c.out}: holds files that are no run of pretrain.py: choose another folder")
    device, dtype, why = decide_device(c)
    tokens = c.batch_size * c.context
    parameters = 12 * c.n_layer * c.n_embd ** 2 + c.vocab_size * c.n_embd
    threads, _ = decide_threads(c.threads, 6 * tokens * parameters)
    torch.set_num_threads(threads)
    tokenizer, ids, rows = read_text(c, log)
    training = Training(c, tokenizer, device, dtype)
    about = {name: getattr(c, name) for name in TRAINING} | {"data": digest([x.digest for x in ids.values()])}
    with claimed(c.out):
        spent = go_on(training, path("ckpt.pt"), about, device)
        cut_back(path("metrics.jsonl"), training.step)
        log.open(c.out, spent)
        size = sum(p.numel() for p in training.model.parameters())
        log.say(f"{c.out}: {size / 1e6:.2f} M parameters, {c.steps} updates of {tokens:,} tokens from "
                f"{training.step} on; {why}; threads {threads}")
        train(training, ids, rows, tokenizer, about, log, path("ckpt.pt"))
        return finish(training, ids, rows, tokenizer, log)


def train(training, ids, rows, tokenizer, about, log, path):
    """Updates until --steps, a checkpoint and a look at held-out documents every --every of them."""
    c, began, first = training.c, time.time(), training.step
    log.patient = True  # a Ctrl-C ends the step in hand and saves
    while training.step < c.steps:
        loss = training.update(ids["train"].flat)
        speed = (training.step - first) * c.batch_size * c.context / max(time.time() - began, 1e-9)
        log.progress("pretrain", training.step, c.steps, {"loss": loss, "tokens/s": speed})
        if training.step % c.every == 0 or training.step == c.steps or log.stop:
            write_torch(path, training.state(about, log.seconds()))
            found = bits_per_byte(training, ids["held_out"], rows["held_out"], tokenizer.eot, LOOK)
            log.figures("policy", training.step, {"loss": loss, "bits_per_byte": found})
            log.say(f"{training.step:6}  loss {loss:.4f}  held-out bits per byte {found:.4f} (of {LOOK} "
                    f"documents at most)")
        if log.stop:
            raise KeyboardInterrupt
    log.patient = False


def finish(training, ids, rows, tokenizer, log):
    """The folder that others read, and summary.json, last."""
    c = training.c
    summary = {"bits_per_byte": bits_per_byte(training, ids["held_out"], rows["held_out"], tokenizer.eot)}
    if c.baselines:
        summary |= baselines(ids, rows, tokenizer.size)
    texts = samples(training.model, tokenizer, c.seed)
    weights.export(training.model, tokenizer, c.out)
    summary |= {"tokens": len(ids["train"].flat), "documents": len(rows["train"]), "seconds": log.seconds(),
                "model": asdict(training.model.config), "samples": texts}
    write_whole(os.path.join(c.out, "summary.json"), (json.dumps(summary, indent=1) + "\n").encode())
    for text in texts:
        log.say(f"sample: {text}")
    for name in ("bits_per_byte", "gzip", "xz", "5-gram"):
        if name in summary:
            log.say(f"{name:14} {summary[name]:.4f}")
    return summary


def main(argv=None):
    """Returns the exit status; what is wrong is one line and status 2."""
    tolerant_terminal()
    c, log, before = flags().parse_args(argv), Log(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, log.interrupt)
    try:
        work(c, log)
    except UserError as error:
        fail(error, program="pretrain.py")
    except KeyboardInterrupt:
        fail("stopped; the same command goes on at the last checkpoint", 130, "pretrain.py")
    except FloatingPointError as error:
        fail(f"{error}; lower the learning rate", 1, "pretrain.py")
    except OSError as error:
        fail(f"{error.filename or c.out}: {error.strerror or error}", program="pretrain.py")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        why = f"out of memory: a smaller net or --batch_size is needed ({type(error).__name__})"
        fail(why, 1, "pretrain.py")
    finally:
        signal.signal(signal.SIGINT, before)
    print(command("train.py", "--init_from", as_value(c.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
