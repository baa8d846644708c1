"""Using a finished run: write for new inputs, score own candidates token by token, classify new texts.

    python sample.py                                        the newest finished run; lines typed by hand
    python sample.py --input docs.jsonl --out written.jsonl a line of JSON for every input
    python sample.py --score mine.jsonl                     rewards of own candidates, and how well they rank

The same as a library:

    run = sample.load("out/summarize")                      a LoadedRun
    run.write(["the report ..."], n=3)
    run.score("the report ...", ["a summary", "another"])
    sample.load("out/prompt").classify(["a text"])

Nothing but the run's folder is needed: no data, no judge to train, no network; the folder may have moved.
What is read here is read as in training: the same layout, the same cuts, float32. So rewards, texts and
accuracies are those that the run itself has written down.
"""
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from support.log import UserError, fail, leave_quietly, out_of_memory, tolerant_terminal, visible

if __name__ == "__main__":
    leave_quietly()  # torch takes a second or two to import

import torch

from aggregate import aggregate
from data import convert, cut, lengths_to_mask, pad, show, trim
from guidance import guidance_of
from model import generate
from reward import ordered_pairs
from rollout import answer_ends, guide_of
from state import load_nets
from support.device import decide_device, decide_threads
from support.flags import Parser, number
from support.inputs import input_row, read_inputs, read_scored
from support.outputs import Out
from support.runs import newest_run, read_object
from support.samples import reward_scale
from support.terminal import paint
from train import OBJECTIVES, TASKS

AT_ONCE = 64  # inputs a batch, as in the tasks' own evaluations
SAMPLING = ("num_samples", "temperature", "top_k", "max_new_tokens", "seed")  # flags for what is written


def load(folder, device="auto", say=print):
    """The run in a folder, ready to be used: a LoadedRun. Of an unfinished one it is the last checkpoint.

    device  auto | cpu | cuda; say: takes the lines for people, such as what was cut
    UserError's one line for a folder that is no run, or whose files are missing, broken or of different runs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing"
        raise UserError(f"{folder}: expected the folder of a run, got {got}")
    where = decide_device(SimpleNamespace(device=device, dtype="float32"))[0]
    return LoadedRun(folder, load_nets(str(folder), where), where, say)


class LoadedRun:
    """What a run has learned, from its folder alone.

    c, config     the run's flags, as attributes and as its config.json has them
    summary       its summary.json, {} where it has not ended; step: updates of the policy in its checkpoint
    task          the task without its data, with tokenizer and, of a prompt run, judge
    policy, reward, start_policy  the nets, frozen
    prompt        of a prompt run: the ids (T,) of the found prompt, else None
    """

    def __init__(self, folder, nets, device, say):
        self.folder, self.device, self.say, self.step = folder, device, say, nets.step
        self.summary = read_object(folder / "summary.json") or {}
        self.config, self.c = nets.config, SimpleNamespace(**nets.config)
        self.policy, self.reward, self.start_policy = nets.policy, nets.reward, nets.start_policy
        self.tokenizer = nets.tokenizer
        for name, known in (("task", TASKS), ("objective", OBJECTIVES)):
            if (got := nets.config.get(name)) not in list(known):  # a list can look for anything
                raise UserError(f"{folder}/config.json: {name}: expected one of {', '.join(known)}, got "
                                f"{show(got)}")
        try:
            self.task = TASKS[self.c.task].reopen(self.c, nets.kept, nets.tokenizer, device)
            paid = self.c.guidance == "bandit" and not self.task.has_pairs  # by the preference itself
            self.learned = OBJECTIVES[self.c.objective].rewarded and not paid
            self.aggregation = self.c.agg, self.c.beta
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: config.json and task.pt are not those of a run of this version "
                            f"({type(error).__name__}: {error})") from error
        if self.task.context != self.policy.config.n_ctx:
            raise UserError(f"{folder}: task.pt has {self.task.context} positions and the policy in ckpt.pt "
                            f"{self.policy.config.n_ctx}: files of different runs")
        self.field = next(iter(self.task.inputs))
        self.prompt = self._prompt() if hasattr(self.task, "judge") else None

    def describe(self):
        """Says which run this is, and what one has to know of it."""
        c, ended = self.c, "finished" if self.summary else "not finished, so this is its last checkpoint"
        kind = f"{c.task}, {c.objective}, {c.guidance}, seed {c.seed}"
        self.say(visible(f"{self.folder}: {kind}; step {self.step}, {ended}"))
        if self.prompt is not None and not self.summary:
            self.say("the policy's likeliest prompt stands in for the best one, which is found at the end")
        if not self.learned:
            self.say(f"this run has learned no reward ({c.objective}, {c.guidance}): its rewards say nothing")

    def _prompt(self):
        """The best prompt of summary.json as ids (T,): its text alone may read back as others. Where the run
        has not ended none is chosen yet: the policy's likeliest prompt."""
        task, ids = self.task, self.summary.get("best_prompt_ids")
        if not self.summary:
            return generate(self.policy, task.start, task.width, None, n_ids=task.n_ids, temperature=0)[0][0]
        if not (isinstance(ids, list) and len(ids) == task.width and all(map(self._is_id, ids))):
            raise UserError(f"{self.folder}/summary.json: best_prompt_ids: expected {task.width} ids, got "
                            f"{show(ids)}")
        return torch.tensor(ids, device=self.device)

    def _is_id(self, x):
        return type(x) is int and 0 <= x < self.tokenizer.size

    def _rows(self, given):
        """Texts or rows -> checked rows. A string alone would be taken for a list of letters."""
        if isinstance(given, (str, dict)):
            raise UserError(f"expected a list of texts or rows, got {show(given)}")
        return [input_row(x, f"texts[{i}]", self.task.inputs) for i, x in enumerate(given)]

    def _context(self, rows):
        """Rows -> tokens and mask (B, P), cut as in training; the first cut is said, and how many more."""
        said, most = [], self.task.input_width()
        ids = [self.task.encode_inputs([row], most, row["where"], said.append)[0] for row in rows]
        if said:
            self.say(visible(said[0] + f", and {len(said) - 1} more inputs" * (len(said) > 1)))
        return [x.to(self.device) for x in pad(ids)]

    @torch.no_grad()
    def write(self, texts, n=1, temperature=None, top_k=0, max_new_tokens=None, seed=1):
        """n outputs an input: [{"input", "outputs": [{"text", "tokens", "rewards", "score", "ended"}]}].

        texts        a list of texts, or of rows of the task's fields
        temperature  0 is greedy, and the default where one output is asked for; else 1
        top_k        sample among the k likeliest tokens (0: all)
        max_new_tokens  at most the width that the run was trained at, which is the default
        score        f of the rewards, among the n outputs of the input (E3, E4)
        ended        whether the output ended by itself, and not at its width
        """
        task = self.task
        if task.pooled:
            why = "its candidates answer no input" if self.prompt is None else "it classifies them"
            raise UserError(f"{self.folder}: task {self.c.task} writes no texts, {why}")
        new = self.checked_width(max_new_tokens)
        if n < 1 or top_k < 0 or temperature is not None and not temperature >= 0:
            raise UserError(f"n {n}, top_k {top_k}, temperature {temperature}: expected n at least 1, top_k "
                            f"and temperature at least 0")
        warm = float(n > 1 or top_k > 0) if temperature is None else temperature
        draw = torch.Generator(self.device).manual_seed(seed)
        found, rows = [], self._rows(texts)
        for part in (rows[i:i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)):
            context = self._context(part)
            cache = self.policy.prefill(*trim(*context))
            drawn = generate(self.policy, task.start, new, draw, n, cache, task.eot, top_k or None, warm,
                             task.n_ids)
            tokens, length, ended = [x.unflatten(0, (len(part), n)) for x in drawn]  # (B, n, T), (B, n) twice
            groups = self._scored(tokens, lengths_to_mask(length, new), *context)
            for row, group, ends in zip(part, groups, ended.tolist()):
                outputs = [x | {"ended": end} for x, end in zip(group, ends)]
                found.append({"input": row[self.field], "outputs": outputs})
        return found

    def checked_width(self, n):
        """Tokens of an output at most: n, by default the run's own width, beyond which it never learned."""
        n = self.task.width if n is None else n
        if not 1 <= n <= self.task.width:
            raise UserError(f"--max_new_tokens {n}: expected 1 to {self.task.width}, the run's own width")
        return n

    def score(self, context, candidates, where="score"):
        """Own candidates: {"tokens", "rewards": a list a candidate, "reward_scores": f of each}.

        context     a text or a row; None for a prompt run, whose candidates are prompts
        candidates  texts, read and cut as training reads them, or lists of ids, taken as they are
        """
        task = self.task
        if not isinstance(candidates, (list, tuple)) or not candidates:
            raise UserError(f"{where}: candidates: expected a list of texts, got {show(candidates)}")
        ids = [self.candidate(x, where) for x in candidates]
        ids = cut(ids, task.width, "end", where, "candidates", lambda line: self.say(visible(line)))
        prefix = () if task.pooled else self._context([input_row(context, where, task.inputs)])
        group = self._scored(*[x[None].to(self.device) for x in pad(ids)], *prefix)[0]  # (1, K, T)
        return {"tokens": [x["tokens"] for x in group], "rewards": [x["rewards"] for x in group],
                "reward_scores": [x["score"] for x in group]}

    def candidate(self, x, where):
        """A candidate as ids. A text gets end-of-text behind it, where the task's sequences end; ids stay as
        they are. UserError for anything else."""
        if isinstance(x, list) and x and all(map(self._is_id, x)):
            return x
        if convert(x, str) is None:
            raise UserError(f"{where}: candidates: expected texts (or lists of ids below "
                            f"{self.tokenizer.size}), got {show(x)}")
        return self.tokenizer.encode(" " + x.strip()) + ([] if self.task.eot is None else [self.task.eot])

    @torch.no_grad()
    def _scored(self, tokens, mask, context=None, context_mask=None):
        """(B, K, T) tokens -> B lists of K {"text", "tokens", "rewards", "score"}."""
        prefix = None if context is None else (context, context_mask)
        ends = answer_ends(self, tokens, mask, prefix)  # where the fit of the run's guidance reads r
        rewards = self.reward.guide(tokens, prefix)  # (B, K, T)
        scores = aggregate(rewards, ends, *self.aggregation).tolist()
        if guidance_of(self.c).read is not None:  # tokens are paid what is read off r, not r itself
            rewards = guide_of(self)(tokens, prefix, mask)

        def one(b, k):
            ids, r = tokens[b, k][mask[b, k]].tolist(), rewards[b, k][mask[b, k]].tolist()
            return {"text": self.tokenizer.decode(ids).strip(), "tokens": self.tokenizer.pieces(ids),
                    "rewards": [round(x, 6) for x in r], "score": scores[b][k]}
        return [[one(b, k) for k in range(tokens.shape[1])] for b in range(len(tokens))]

    @torch.no_grad()
    def classify(self, texts):
        """What the judge says of texts with the found prompt behind them: [{"input", "label", "answer",
        "probabilities", "prompt"}].  label: the class, answer: its word, probabilities: one a class."""
        if self.prompt is None:
            why = "has no judge to classify with (did you mean --score?)" if self.task.pooled else \
                "writes texts, it classifies none"
            raise UserError(f"{self.folder}: task {self.c.task} {why}")
        task, found, rows = self.task, [], self._rows(texts)
        words, said = task.answer_words[self.c.attribute], self.tokenizer.decode(self.prompt.tolist()).strip()
        for part in (rows[i:i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)):
            cache = task.judge.read(*self._context(part))
            p = task.judge.probabilities(cache, self.prompt[None], self.c.attribute)[:, 0]  # (B, C)
            for row, each, label in zip(part, p.tolist(), p.argmax(1).tolist()):
                found.append({"input": row[self.field], "label": label, "answer": words[label],
                              "probabilities": [round(x, 6) for x in each], "prompt": said})
        return found


# ---------------------------------------------------------------------------------------------------- showing


def shown(run, result):
    """A result as text for a terminal: tokens coloured by their reward, over the fixed range of r
    (or, where it has none, that of the result)."""
    if "probabilities" in result and "reward_scores" not in result:  # a row of --score may hold any names
        shares = ", ".join(f"{x:.3f}" for x in result["probabilities"])
        return f"{visible(result['answer'])} (class {result['label']} of {shares})  {short(result['input'])}"
    rows = result.get("outputs") or [{"rewards": x} for x in result["rewards"]]
    scale = reward_scale(run.config, rows)["range"]
    mode = "plain" if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else "ansi"

    def line(tokens, rewards, score, more=""):
        painted = "".join(paint(token, r, scale, mode) for token, r in zip(tokens, rewards))
        return f"  {painted}  score {score:.4g}{more}"
    if "reward_scores" not in result:
        lines = [line(x["tokens"], x["rewards"], x["score"], "" if x["ended"] else ", not ended")
                 for x in result["outputs"]]
        return "\n".join([short(result["input"]), *lines])
    given = result.get("scores") or [None] * len(result["tokens"])
    lines = [line(*x, "" if own is None else f", given {own:g}")
             for *x, own in zip(result["tokens"], result["rewards"], result["reward_scores"], given)]
    return "\n".join([short(result.get(run.field, "")), *lines])


def short(text, n=300):
    """The beginning of a text, on one line."""
    text = visible(" ".join(str(text).split()))
    return text if len(text) <= n else text[:n] + "..."


# ------------------------------------------------------------------------------------------------------ flags


def flags():
    """The flags, each with its default."""
    parser = Parser(prog="sample.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add, count = parser.add_argument, number(int, 1)
    add("--out_dir", metavar="DIR", help="the run (default: the finished one under out/ that ended last)")
    add("--input", metavar="X", help="a text, a file (a text a line, or rows of the task's fields), or -")
    add("--score", metavar="FILE", help="own candidates: rows of input, candidates (or chosen, rejected)")
    add("--out", metavar="FILE", help="write the results there, a line of JSON each (default: the screen)")
    add("--num_samples", metavar="N", type=count, help="outputs an input (default: 1)")
    add("--temperature", metavar="T", type=number(float, 0), help="0: greedy (default: 0 for one, else 1)")
    add("--top_k", metavar="K", type=count, help="sample among the K likeliest tokens (default: all)")
    add("--max_new_tokens", metavar="N", type=count, help="tokens of an output (default: the run's own)")
    add("--seed", metavar="N", type=number(int, 0), help="fixes what is sampled (default: 1)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    return parser


# ------------------------------------------------------------------------------------------------------- main


def user_of(run, args):
    """The function from input rows to results that the flags ask for."""
    given = {k: v for k in SAMPLING if (v := getattr(args, k)) is not None}
    if given and (run.task.pooled or args.score):
        why = "--score writes nothing" if args.score else f"task {run.c.task} classifies, and writes nothing"
        raise UserError(f"--{next(iter(given))}: {why}")
    if run.task.pooled:
        if args.score is None:
            run.classify([])  # one line where there is no judge, before any text is read
        return run.classify
    n, _ = given.pop("num_samples", 1), run.checked_width(args.max_new_tokens)
    if n > 1 and given.get("temperature") == 0:
        raise UserError(f"--num_samples {n}: greedy outputs are all alike (give a --temperature above 0)")
    return lambda rows: run.write(rows, n, **given)


def score_rows(run, rows, out):
    """Every row with its tokens, rewards and scores; last the share of pairs ranked as the rows say."""
    right, pairs = 0.0, 0.0
    for where, row, context, candidates, scores in rows:
        found = run.score(context, candidates, where)
        out.put([row | found])
        if scores:
            ours, given = [torch.tensor([x], dtype=torch.float64) for x in (found["reward_scores"], scores)]
            right, pairs = [a + b for a, b in zip((right, pairs), ordered_pairs(ours, given))]
    out.close()
    if pairs:
        out.say(f"rank accuracy {right / pairs:.4f} of {pairs:.0f} pairs")  # divisor: pairs of unequal score


def typed(run, use, out):
    """Lines typed by hand, until Ctrl-D. What is wrong with one is said, and the next one may be better."""
    if hasattr(sys.stdin, "reconfigure"):  # what replaces stdin inside another program may lack it
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8: a wrong line, not an end
    out.say(f"one {run.field} a line; Ctrl-D ends")
    for line in filter(str.strip, sys.stdin):
        try:
            out.put(use([input_row(line.strip(), "line", run.task.inputs)]))
        except UserError as error:
            out.say(error)
    out.close()


def work(args):
    """What the flags ask for."""
    by_hand = args.input is None and args.score is None
    if not by_hand and None not in (args.input, args.score):
        raise UserError("--input and --score: expected one of them")
    if by_hand and not sys.stdin.isatty():
        raise UserError("nothing to do: give --input TEXT, FILE or -, or --score FILE, or type on a terminal")
    out = Out(args.out, lambda result: shown(run, result))
    folder = args.out_dir or newest_run(finished=True)
    if folder is None:
        raise UserError("no finished run under out/: python train.py makes one, or name one by --out_dir")
    run = load(folder, args.device, out.say)
    torch.set_num_threads(decide_threads(0, run.task.step_work(run.c))[0])  # as in training: small nets, one
    use, fields = user_of(run, args), run.task.inputs
    if args.score is not None:
        rows = read_scored(args.score, None if run.task.pooled else fields, run.candidate)
    elif not by_hand:
        rows = read_inputs(args.input, fields, out.say)
    run.describe()  # only now: what is wrong with flags and files is one line, with nothing before it
    if by_hand:
        typed(run, use, out)
    elif args.score is not None:
        score_rows(run, rows, out)
    else:
        out.put(use(rows))
        out.close()


def main(argv=None):
    """Returns the exit status; what is wrong is one line and status 2."""
    tolerant_terminal()
    args = flags().parse_args(argv)
    try:
        work(args)
        sys.stdout.flush()  # so that a broken pipe shows inside this try
    except UserError as error:
        fail(error, program="sample.py")
    except BrokenPipeError:  # `| head` has seen enough: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(f"{error.filename or 'output'}: {error.strerror}", program="sample.py")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fail(f"out of memory: fewer --num_samples are needed ({type(error).__name__})", 1, "sample.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
