"""Using a finished run: write for new inputs, score own candidates token by token, classify with the found prompt.

    python sample.py                                        the newest finished run; lines typed by hand until Ctrl-D
    python sample.py --input docs.jsonl --out written.jsonl a line of JSON for every input
    python sample.py --score mine.jsonl                     token rewards of own candidates, and how well they rank

The same as a library, where `run` is a `LoadedRun`:

    run = sample.load("out/summarize")
    run.write(["the report ..."], n=3), run.score("the report ...", ["a summary", "another"])
    sample.load("out/prompt").classify(["a text"])

Nothing but the run's folder is needed: no data, no judge to train, no network, and the folder may have been moved. What
is read here is read as in training: the same layout, the same cuts, float32. So rewards, texts and accuracies are
those that the run itself has written down.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from support.log import UserError, fail, leave_quietly, tolerant_terminal, visible

if __name__ == "__main__":
    leave_quietly()  # torch takes a second or two to import

import torch

from aggregate import aggregate
from data import (Batch, EmptyText, convert, cut, json_lines, lengths_to_mask, open_text, pad, pick_fields, read_rows,
                  show, trim)
from eval import paint
from model import generate
from reward import Candidates, ordered_pairs
from rollout import answer_ends
from state import load_nets
from support.device import decide_device
from support.files import write_whole
from support.flags import nearest
from support.runs import colour_range, newest_run, read_object
from train import OBJECTIVES, TASKS

AT_ONCE = 64  # inputs a batch, as in the tasks' own evaluations
TABLES = (".jsonl", ".jsonl.gz", ".tsv", ".csv")  # files of rows; any other file has one text a line


def load(folder, device="auto", say=print):
    """The run in a folder, ready to be used: a LoadedRun. An unfinished one is used as its last checkpoint has it.

    device  auto | cpu | cuda; say: takes the lines for people (what was cut, what is unfinished)
    UserError's one line for a folder that is no run, or whose files are missing, broken or of different runs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a run, got {'a file' if folder.exists() else 'nothing'}")
    where = decide_device(SimpleNamespace(device=device, dtype="float32"))[0]
    nets = load_nets(str(folder), where)
    return LoadedRun(folder, nets, read_object(folder / "summary.json"), where, say)


class LoadedRun:
    """What a run has learned, from its folder alone.

    c, config     the run's flags, as attributes and as its config.json has them; summary: {} where it has not ended
    task          the task without its data; policy, reward, start_policy: the nets; tokenizer
    prompt        of a prompt run: the ids (T,) of the found prompt, else None
    """

    def __init__(self, folder, nets, summary, device, say):
        self.folder, self.device, self.say, self.step = folder, device, say, nets.step
        self.config, self.summary, self.c = nets.config, summary or {}, SimpleNamespace(**nets.config)
        self.policy, self.reward, self.start_policy = nets.policy, nets.reward, nets.start_policy
        self.tokenizer = nets.tokenizer
        try:
            self.task = TASKS[self.c.task].reopen(self.c, nets.kept, nets.tokenizer, device)
            self.learned = OBJECTIVES[self.c.objective].rewarded and (self.c.guidance != "bandit" or self.task.has_pairs)
            self.aggregation = self.c.agg, self.c.beta
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: config.json and task.pt are not those of a run of this version "
                            f"({type(error).__name__}: {error})") from error
        self.field = next(iter(self.task.inputs))
        self.prompt = self._prompt() if hasattr(self.task, "judge") else None

    def describe(self):
        """The run in a line, and a line for each thing that one has to know of it."""
        c, ended = self.c, "finished" if self.summary else "not finished"
        self.say(visible(f"{self.folder}: {c.task}, {c.objective}, {c.guidance}, seed {c.seed}; {ended}, step {self.step}"))
        if not self.summary:
            stand_in = "; the policy's likeliest prompt stands in for the best one" if self.prompt is not None else ""
            self.say(visible(f"{self.folder} has not ended: what follows is its last checkpoint's{stand_in}"))
        if not self.learned:
            self.say(visible(f"{self.folder} has learned no reward (--objective {c.objective}, --guidance {c.guidance}): "
                             f"rewards and scores say nothing"))

    def _prompt(self):
        """The best prompt of summary.json as ids (T,): its text alone may read back as other tokens. Of a run that has not
        ended, which has not been asked on dev yet, the policy's likeliest prompt."""
        task, ids = self.task, self.summary.get("best_prompt_ids")
        if not self.summary:
            return generate(self.policy, task.start, task.width, None, n_ids=task.n_ids, temperature=0)[0][0]
        good = isinstance(ids, list) and len(ids) == task.width and all(self._is_id(i) for i in ids)
        if not good:
            raise UserError(f"{self.folder}/summary.json: best_prompt_ids: expected {task.width} ids, got {show(ids)}")
        return torch.tensor(ids, device=self.device)

    def _is_id(self, x):
        return type(x) is int and 0 <= x < self.tokenizer.size

    # ------------------------------------------------------------------------------------------------------- inputs

    def row(self, given, where):
        """An input as a row of the task's fields with "where" in it, for messages. given: a text, or such a row."""
        given = given if isinstance(given, dict) else {self.field: given}
        try:
            return pick_fields(where, given, self.task.inputs) | {"where": given.get("where", where)}
        except EmptyText as empty:
            raise UserError(f"{where}: {empty}: expected a text, got an empty one") from empty

    def _rows(self, given):
        """Texts or rows -> rows. A string alone would be taken for a list of letters."""
        if isinstance(given, (str, dict)):
            raise UserError(f"expected a list of texts or rows, got {show(given)}")
        return [self.row(x, f"texts[{i}]") for i, x in enumerate(given)]

    def _context(self, rows):
        """Rows -> tokens and mask (B, P), cut as in training; the first cut is said, and how many more there are."""
        said, most = [], self.task.input_width()
        ids = [self.task.encode_inputs([row], most, row["where"], said.append)[0] for row in rows]
        if said:
            self.say(visible(said[0] + f", and {len(said) - 1} more inputs" * (len(said) > 1)))
        return [x.to(self.device) for x in pad(ids)]

    # -------------------------------------------------------------------------------------------------------- using

    @torch.no_grad()
    def write(self, texts, n=1, temperature=None, top_k=0, max_new_tokens=None, seed=1):
        """n outputs for every input: [{"input", "outputs": [{"text", "tokens", "rewards", "score", "ended"}]}].

        texts            a list of texts, or of rows of the task's fields
        temperature      0 is greedy, and the default where one output is asked for; else 1
        top_k            sample among the k likeliest tokens (0: all); max_new_tokens: at most the run's own width
        score            f of the rewards among the n outputs of the input (E3, E4); ended: by end-of-text, not by width
        """
        task = self.task
        if task.pooled:
            raise UserError(f"{self.folder}: task {self.c.task} writes nothing for an input: its prompt classifies texts")
        new = task.width if max_new_tokens is None else max_new_tokens
        if not 1 <= new <= task.width:
            raise UserError(f"--max_new_tokens {new}: expected 1 to {task.width}, which is what this run has learned to write")
        warm = (n > 1 or top_k > 0) if temperature is None else temperature
        draw = torch.Generator(self.device).manual_seed(seed)
        found, rows = [], self._rows(texts)
        for part in (rows[i:i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)):
            context, context_mask = self._context(part)
            cache = self.policy.prefill(*trim(context, context_mask))
            tokens, length, ended = generate(self.policy, task.start, new, draw, n, cache, task.eot, top_k or None,
                                             float(warm), task.n_ids)
            tokens, mask = tokens.view(len(part), n, -1), lengths_to_mask(length, new).view(len(part), n, -1)  # (B, n, T)
            scored = self._scored(tokens, mask, context, context_mask)
            for row, group, ends in zip(part, scored, ended.view(len(part), n).tolist()):
                found.append({"input": row[self.field],
                              "outputs": [x | {"ended": end} for x, end in zip(group, ends)]})
        return found

    def score(self, context, candidates, where="score"):
        """Own candidates for one input: {"tokens", "rewards": a list a candidate, "reward_scores": a number each}.

        context     a text or a row; None for a prompt run, whose candidates are prompts
        candidates  texts, read as training reads them, or lists of ids, taken as they are
        """
        task = self.task
        if isinstance(candidates, str) or not isinstance(candidates, (list, tuple)) or not candidates:
            raise UserError(f"{where}: candidates: expected a list of texts, got {show(candidates)}")
        ids = [self._candidate(x, where) for x in candidates]
        tokens, mask = pad(cut(ids, task.width, "end", where, "candidates", lambda line: self.say(visible(line))))
        rows = None if task.pooled else self._context([self.row(context, where)])
        group = self._scored(tokens[None].to(self.device), mask[None].to(self.device), *(rows or (None, None)))[0]
        return {"tokens": [x["tokens"] for x in group], "rewards": [x["rewards"] for x in group],
                "reward_scores": [x["score"] for x in group]}

    def _candidate(self, x, where):
        """A candidate as ids: a text with end-of-text behind it, where the task's sequences end; ids stay as they are."""
        if isinstance(x, list) and x and all(self._is_id(i) for i in x):
            return x
        if convert(x, str) is None:
            raise UserError(f"{where}: candidates: expected texts (or lists of ids below {self.tokenizer.size}), got {show(x)}")
        return self.tokenizer.encode(" " + x.strip()) + ([] if self.task.eot is None else [self.task.eot])

    @torch.no_grad()
    def _scored(self, tokens, mask, context=None, context_mask=None):
        """(B, K, T) tokens -> B lists of K {"text", "tokens", "rewards", "score"}."""
        x = Candidates(tokens, mask, None, context, context_mask)
        rewards = self.reward.guide(tokens, x.prefix())  # (B, K, T)
        scores = aggregate(rewards, answer_ends(self, x), *self.aggregation).tolist()  # read where the guidance reads

        def one(b, k):
            ids = tokens[b, k][mask[b, k]].tolist()
            return {"text": self.tokenizer.decode(ids).strip(), "tokens": self.tokenizer.pieces(ids),
                    "rewards": [round(r, 6) for r in rewards[b, k][mask[b, k]].tolist()], "score": round(scores[b][k], 6)}
        return [[one(b, k) for k in range(tokens.shape[1])] for b in range(len(tokens))]

    @torch.no_grad()
    def classify(self, texts):
        """What the judge says of texts with the found prompt behind them: [{"input", "label", "answer", "probabilities",
        "prompt"}]. label: the class; answer: its word; probabilities: one a class."""
        if self.prompt is None:
            raise UserError(f"{self.folder}: task {self.c.task} has no prompt to classify with: it writes texts")
        task, found, rows = self.task, [], self._rows(texts)
        words, said = task.answer_words[self.c.attribute], self.tokenizer.decode(self.prompt.tolist()).strip()
        for part in (rows[i:i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)):
            cache = task.judge.read(*self._context(part))
            p = task.judge.probabilities(cache, self.prompt[None], self.c.attribute)[:, 0]  # (B, C)
            for row, each in zip(part, p.tolist()):
                label = max(range(len(each)), key=each.__getitem__)
                found.append({"input": row[self.field], "label": label, "answer": words[label],
                              "probabilities": [round(x, 6) for x in each], "prompt": said})
        return found


# -------------------------------------------------------------------------------------------------------------- reading


def read_input(source, run):
    """--input: a text, a file of texts or rows, or "-" for stdin -> rows of the task's fields. Blank lines of a text file
    are no texts; empty fields of rows are left out and counted."""
    if source == "-":
        return text_rows("<stdin>", sys.stdin.buffer.read().decode("utf-8", "surrogateescape"), run)
    if os.path.isfile(source) and source.endswith(TABLES):
        return read_rows(source, run.task.inputs, lambda where, row: row.update(where=where), run.say)
    if os.path.isfile(source):
        return text_rows(source, open_text(source), run)
    if os.path.isdir(source) or source.endswith((*TABLES, ".txt")):
        raise UserError(f"--input {source}: expected a text or a file, got "
                        f"{'a folder' if os.path.isdir(source) else 'the name of a file that is not there'}")
    return [run.row(source, "--input")]


def text_rows(name, text, run):
    """One text a line; where the first line is a JSON object, rows."""
    lines = [line.rstrip("\r") for line in text.split("\n")]
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise UserError(f"{name}: expected one text a line, got nothing")
    if name == "<stdin>" and first.lstrip().startswith("{"):
        return [run.row(row, f"{name}:{n}") for n, row in json_lines(name, lines)]
    return [run.row(line, f"{name}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def read_scored(path, run):
    """--score: [(where, row, context or None, candidates, scores or None)], all checked before anything is scored."""
    found = []
    for number, row in json_lines(path, open_text(path).split("\n")):
        where = f"{path}:{number}"
        pair = "candidates" not in row and "chosen" in row and "rejected" in row
        candidates = [row["chosen"], row["rejected"]] if pair else row.get("candidates")
        if not isinstance(candidates, list) or not candidates:
            raise UserError(f"{where}: candidates: expected a list of texts (or chosen and rejected), got "
                            f"{'nothing' if candidates is None else show(candidates)}")
        for x in candidates:
            run._candidate(x, where)
        scores = [1.0, 0.0] if pair else check_scores(where, row.get("scores"), len(candidates))
        context = None if run.task.pooled else run.row(own_names(row, run.field), where)
        found.append((where, row, context, candidates, scores))
    if not found:
        raise UserError(f"{path}: expected at least one row, got nothing")
    return found


def own_names(row, field):
    """A row in which "document" and "prompt" both name the input, whatever the task calls it."""
    other = next((name for name in ("document", "prompt") if name in row), field)
    return row if field in row or other not in row else row | {field: row[other]}


def check_scores(where, scores, n):
    """A finite number a candidate, or None where a row says nothing."""
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != n:
        raise UserError(f"{where}: scores: expected {n} numbers, one a candidate, got {show(scores)}")
    wrong = [x for x in scores if convert(x, float) is None]
    if wrong:
        raise UserError(f"{where}: scores: expected numbers, got {show(wrong[0])}")
    return [float(x) for x in scores]


# -------------------------------------------------------------------------------------------------------------- showing


def shown(run, result):
    """A result as lines for a terminal: tokens coloured by their reward, over the fixed range of r."""
    scale = colour_range(run.config)
    mode = "plain" if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else "ansi"
    coloured = lambda tokens, rewards: "".join(paint(t, r, scale, mode) for t, r in zip(tokens, rewards))
    if "label" in result:
        shares = ", ".join(f"{x:.3f}" for x in result["probabilities"])
        return f"  {visible(result['answer'])} (class {result['label']} of {shares})  {short(result['input'])}"
    if "outputs" in result:
        lines = [f"  {coloured(x['tokens'], x['rewards'])}  score {x['score']:.4g}{'' if x['ended'] else ', not ended'}"
                 for x in result["outputs"]]
        return "\n".join([short(result["input"]), *lines])
    scores = result.get("scores") or [None] * len(result["tokens"])
    lines = [f"  {coloured(t, r)}  score {s:.4g}" + ("" if own is None else f", given {own:g}")
             for t, r, s, own in zip(result["tokens"], result["rewards"], result["reward_scores"], scores)]
    return "\n".join([short(result.get(run.field, "")), *lines])


def short(text, n=300):
    """The beginning of a text, on one line."""
    text = visible(" ".join(str(text).split()))
    return text if len(text) <= n else text[:n] + "..."


class Out:
    """Where results go: a file, which is written whole at the end; a terminal, coloured; else lines of JSON. What is said
    to people stands on stderr where results stand on stdout as JSON."""

    def __init__(self, path):
        self.path, self.lines, self.terminal = path, [], sys.stdout.isatty()
        if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise UserError(f"--out {path}: expected a file in a folder that is there")

    def say(self, line):
        """A line for people."""
        print(visible(line), file=sys.stdout if self.path or self.terminal else sys.stderr, flush=True)

    def put(self, run, results):
        """Some results."""
        for x in results:
            if self.path:
                self.lines.append(json.dumps(x) + "\n")
            else:
                print(shown(run, x) if self.terminal else json.dumps(x), flush=True)

    def close(self):
        """The file, where there is one."""
        if self.path:
            write_whole(self.path, "".join(self.lines).encode())
            self.say(f"{self.path}: {len(self.lines)} lines")


# ----------------------------------------------------------------------------------------------------------------- main


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        """What argparse calls when a flag cannot be read."""
        wrong = next((w.split("=")[0] for w in message.split() if w.startswith("--")), "")
        fail(message + (nearest(wrong, self._option_string_actions) if "unrecognized" in message else ""),
             program="sample.py")


def number(kind, low):
    """A type of argparse: a finite number of at least `low`."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < 2 ** 63:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__} of at least {low}, got {text}")
        return value
    return read


def flags():
    """The flags, each with its default."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out_dir", metavar="DIR", help="the run to use (default: the finished one under out/ that ended last)")
    add("--input", metavar="X", help="a text, a file (one text a line, or .jsonl rows of the task's fields), or - for stdin")
    add("--score", metavar="FILE", help="own candidates, a .jsonl row an input; or prompt, chosen, rejected")
    add("--out", metavar="FILE", help="write the results there, a line of JSON each (default: the screen)")
    add("--num_samples", metavar="N", type=number(int, 1), help="outputs an input (default: 1)")
    add("--temperature", metavar="T", type=number(float, 0), help="0 is greedy (default: 0 for one output, else 1)")
    add("--top_k", metavar="K", type=number(int, 1), help="sample among the K likeliest tokens (default: all)")
    add("--max_new_tokens", metavar="N", type=number(int, 1), help="tokens of an output at most (default: the run's own)")
    add("--seed", metavar="N", type=number(int, 0), help="fixes what is sampled (default: 1)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    return parser


def writer(run, args):
    """The function from rows to results that the flags ask for."""
    given = {k: v for k, v in vars(args).items() if v is not None and
             k in ("num_samples", "temperature", "top_k", "max_new_tokens", "seed")}
    if given and (run.task.pooled or args.score):
        why = "--score writes nothing" if args.score else f"task {run.c.task} classifies, and writes nothing"
        raise UserError(f"--{next(iter(given))}: {why}")
    if run.task.pooled:
        return run.classify
    n = given.pop("num_samples", 1)
    if n > 1 and given.get("temperature") == 0:
        raise UserError(f"--num_samples {n}: greedy outputs are all alike (give a --temperature above 0)")
    return lambda rows: run.write(rows, n, **given)


def score_file(run, path, out):
    """--score: every row with its tokens, rewards and scores; last the share of pairs that are ranked as the rows say."""
    right, pairs = 0.0, 0.0
    for where, row, context, candidates, scores in read_scored(path, run):
        found = run.score(context, candidates, where)
        out.put(run, [row | found])
        if scores:
            new = ordered_pairs(torch.tensor([found["reward_scores"]]), torch.tensor([scores], dtype=torch.float64))
            right, pairs = right + new[0], pairs + new[1]
    out.close()
    if pairs:
        out.say(f"rank accuracy {right / pairs:.4f} of {pairs:.0f} pairs")  # divisor: pairs of unequal score


def typed(run, use, out):
    """Lines typed by hand, until Ctrl-D. What is wrong with a line is said, and the next one may be better."""
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 are a wrong line, not the end
    out.say(f"one {run.field} a line; Ctrl-D ends")
    for line in sys.stdin:
        try:
            out.put(run, use([run.row(line.strip(), "line")]) if line.strip() else [])
        except UserError as error:
            out.say(str(error))
    out.close()


def main(argv=None):
    """Status 0, or one line and status 2."""
    tolerant_terminal()
    args = flags().parse_args(argv)
    try:
        out = Out(args.out)
        if args.input is not None and args.score:
            raise UserError("--input and --score: expected one of them")
        if args.input is None and not args.score and not sys.stdin.isatty():
            raise UserError("nothing to do: give --input TEXT, a file or -, or --score FILE (or type on a terminal)")
        folder = args.out_dir or newest_run(finished=True)
        if folder is None:
            raise UserError("no finished run under out/: make one with python train.py, or name a folder with --out_dir")
        run = load(folder, args.device, out.say)
        run.describe()
        use = writer(run, args)
        if args.score:
            score_file(run, args.score, out)
        elif args.input is not None:
            rows = read_input(args.input, run)
            out.put(run, use(rows))
            out.close()
        else:
            typed(run, use, out)
    except UserError as error:
        fail(error, program="sample.py")
    except BrokenPipeError:  # `| head` has seen enough: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(f"{error.filename or 'output'}: {error.strerror}", program="sample.py")


if __name__ == "__main__":
    main()
