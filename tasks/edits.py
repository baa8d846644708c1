"""Task 3: answers improved by minimal edits, and rewards learned from what changed (E17; Xu et al., 2024).

An annotator changes as little as needed in a worse answer. What was deleted or replaced was bad, what was put
in is good, the rest is neutral: labels for single tokens at the price of one edit. The same triples, read as
"edited is better than rejected", feed the guidance that knows whole answers only, so that the kinds can be
compared on the same data. Nobody is asked again later: the reward is fitted once, then PPO starts from a
policy that imitates the worse answers.

Not verified in the paper and chosen plain: edits are aligned by Levenshtein distance on token ids; kept
tokens are trained towards "neither" (target 1/2) instead of being left out; an answer is judged by how many
token edits still separate it from the annotator's version, fewer being better (the paper asks a judge model
for a win rate).

Rows come from files (tasks/annotated.py), from any text (tasks/damage.py) or from the embedded world
(tasks/requests.py), where which tokens are wrong is known, so that rewards can be compared with the truth.
"""
from array import array

import numpy as np
import torch

import data
from support.credit import average_ranks, spearman
from tasks import Samples, Task, marked
from tasks.annotated import decide_guidance, read_edits
from tasks.damage import damaged_edits
from tasks.requests import embedded_world, world_words

# ------------------------------------------------------------------------------------------ edit labels (E17)


def edit_table(a, b):
    """Levenshtein distances of all prefixes: lists of ids -> (len(a) + 1, len(b) + 1) int32.

    A row at a time: the two moves from the row above are vector operations, and the chain of insertions along
    a row is a running minimum once every column's own number is taken off.
    """
    b = np.asarray(b, dtype=np.int64)
    place = np.arange(len(b) + 1, dtype=np.int32)
    table = np.empty((len(a) + 1, len(b) + 1), dtype=np.int32)
    table[0] = place
    for i, token in enumerate(a, 1):
        row = table[i - 1] + 1  # delete a[i-1]
        row[1:] = np.minimum(row[1:], table[i - 1, :-1] + (b != token))  # keep or substitute
        table[i] = np.minimum.accumulate(row - place) + place  # insert
    return table


def edit_labels(rejected, edited):
    """E17: token ids in, labels out: deleted or substituted -1, inserted or substituted +1, kept 0.

    returns (labels_rejected, labels_edited), lists of ints as long as the inputs. Where several alignments
    are equally short, equal tokens at both ends are kept first; then, from the end backwards, a deletion is
    preferred to an insertion and that to a substitution or a kept token.
    """
    rejected, edited = list(rejected), list(edited)
    most = min(len(rejected), len(edited))
    head = next((i for i in range(most) if rejected[i] != edited[i]), most)
    tail = next((i for i in range(most - head) if rejected[-1 - i] != edited[-1 - i]), most - head)
    a, b = rejected[head:len(rejected) - tail], edited[head:len(edited) - tail]
    labels_a, labels_b = [0] * len(rejected), [0] * len(edited)
    table, i, j = edit_table(a, b).tolist() if a and b else None, len(a), len(b)
    while i or j:
        if i and (not j or table[i][j] == table[i - 1][j] + 1):
            i -= 1
            labels_a[head + i] = -1
        elif j and (not i or table[i][j] == table[i][j - 1] + 1):
            j -= 1
            labels_b[head + j] = 1
        else:
            i, j = i - 1, j - 1
            if a[i] != b[j]:
                labels_a[head + i], labels_b[head + j] = -1, 1
    return labels_a, labels_b


def edit_distance(a, b):
    """Fewest insertions, deletions and substitutions that turn one list of ids into the other."""
    return int(edit_table(a, b)[-1, -1])


def auroc(scores, positive):
    """Chance that a positive item scores above a negative one, ties half: (N,), (N,) bool -> float; 0.5 where
    one kind is missing."""
    positive = torch.as_tensor(positive, dtype=torch.bool)
    rank = average_ranks(torch.as_tensor(scores, dtype=torch.float64))
    n, m = int(positive.sum()), int((~positive).sum())
    return ((rank[positive].sum() - n * (n + 1) / 2) / (n * m)).item() if n and m else 0.5


# ------------------------------------------------------------------------------------------------------- task


class EditsTask(Task):
    """Answers annotated beforehand. `pairs` is what the reward learns from: nobody is asked later."""
    kind, has_references, has_pairs, reads = "edit", True, True, ("edits",)
    reward_figures = ("credit_truth",)
    inputs = {"prompt": (("prompt",), str), "passages": (("passages",), str, "")}
    figures = ("win_rate", "edits_left", "start_edits_left", "token_auroc", "rank_accuracy", "seconds")
    curve = "win_rate"
    defaults = {"objective": "ppo", "guidance": None, "n_embd": 96, "K": None, "replay": 8192,
                "resolution": 0.01, "reward_first": 2000, "reward_steps": 0, "reward_every": 100,
                "patience": 100, "policy_steps": 100, "lr": 1e-4, "alpha": 0.0, "hold": 50, "lam": 1.0,
                "sft_steps": 600, "sft_lr": 3e-3, "sft_batch": 32}
    # Xu et al. (2024), labels of minimal edits, with the dense PPO of Yin et al. (2025); rewards are fitted
    # once, so nothing is on-policy about them.
    paper = {"objective": "ppo", "guidance": "edits", "bound": "softplus", "agg": "avg", "beta": 2.0,
             "K": None, "resolution": 0.0, "reward_steps": 0, "alpha": 0.0, "hold": 0, "clip": 1.0,
             "kl": 0.01, "gamma": 1.0, "lam": 0.95, "ppo_clip": 0.2, "value_clip": 0.25, "epochs": 1,
             "minibatches": 8}

    def __init__(self, cfg, device, progress, say):
        self.cfg, self.device, self.say = cfg, device, say
        self.rows = None
        if cfg.damage:
            self.rows = damaged_edits(cfg.damage, cfg.limit, cfg.split_seed, cfg.cache_dir, progress, say)
            cfg.data = cfg.damage  # for widths, messages and config.json: text that was brought
        self.real = bool(cfg.data)
        self.rows = self.rows or (read_edits(cfg.data, cfg.limit, say, cfg.split_seed) if self.real else
                                  embedded_world(0, answers=cfg.answers))
        decide_guidance(cfg, self.rows, say)
        most = len(self.answers(self.rows["train"][0])[0])
        if cfg.K and cfg.K > most:
            raise data.UserError(f"--K {cfg.K}: expected at most {most}, the answers that a row of "
                                 f"{cfg.data or 'the embedded edits'} has")
        cfg.K = cfg.K or most  # what config.json says was used
        texts = [" " + text for row in self.rows["train"]
                 for text in (row["prompt"], row["passages"] if self.real else "", *self.answers(row)[0])]
        self.tokenizer = data.world_or_text_tokenizer(cfg, None if self.real else world_words(), texts)
        self.start = self.eot = self.tokenizer.eot
        ids = {name: self._encode(rows) for name, rows in self.rows.items()}
        self.ids = {name: answers for name, (*_, answers) in ids.items()}  # {split: [[ids] a row]}
        asked, passages, answers = ids["train"]
        data.decide_widths(cfg, [len(a) + len(b) for a, b in zip(asked, passages)],
                           [len(x) for row in answers for x in row], ("prompts", "answers"), say)
        self.n_ids, self.width = self.tokenizer.size, cfg.max_summary
        self.tensors = {name: self._batch(name, asked, more) for name, (asked, more, _) in ids.items()}
        longest = max(x.context.shape[1] for x in self.tensors.values())
        self.context = longest + self.width + 1  # a start token; candidates share their positions
        say(f"{cfg.data or 'embedded edits'}: " + ", ".join(f"{k} {len(v)}" for k, v in self.rows.items())
            + f"; {self.tokenizer.size} tokens ({self.tokenizer.name})")

    @staticmethod
    def answers(row):
        """A row's answers and their preference, as the file has them; of a pair the worse one first."""
        if row.get("candidates"):
            return row["candidates"], row["scores"]
        return (row["rejected"], row["edited"]), (0, 1)

    def _encode(self, rows):
        """Rows -> ids of prompts, passages and a row's answers, which end in end-of-text; nothing is cut."""
        asked = data.encode([row["prompt"] for row in rows], self.tokenizer)
        said = iter(data.encode([row["passages"] for row in rows if row.get("passages")], self.tokenizer))
        passages = [next(said) if row.get("passages") else array("i") for row in rows]
        answers = [data.encode(self.answers(row)[0], self.tokenizer, end=True) for row in rows]
        return asked, passages, answers

    def _batch(self, name, asked, passages):
        """Ids -> data.Batch of a split: prompts (N, P), and as reference (N, T) the worst answer."""
        most, rows, say = self.cfg.max_document, self.rows[name], self.say
        context = self._cut(asked, passages, most, name, say)
        worst = [answers[self.worst_of(row)] for answers, row in zip(self.ids[name], rows)]
        worst = data.cut(worst, self.width, "end", name, "answers", say)
        return data.Batch(torch.arange(len(rows)), *data.pad(context), *data.pad(worst, self.width))

    @staticmethod
    def _cut(asked, passages, most, name, say):
        """Prompts with the passages behind them, as ids. What does not fit goes from the start of a prompt,
        whose end is the question (the last turn of a dialogue), and from the end of the passages."""
        asked = data.cut(asked, most, "start", name, "prompts", say)
        both = [a + b for a, b in zip(asked, passages)]
        return data.cut(both, most, "end", name, "prompts with passages", say)

    def encode_inputs(self, rows, most, name, say):
        """Rows of `inputs` as ids, cut as those of training are."""
        ids = lambda text: data.encode([text], self.tokenizer)[0]
        passages = [ids(row["passages"]) if row["passages"] else array("i") for row in rows]
        return self._cut([ids(row["prompt"]) for row in rows], passages, most, name, say)

    def pairs(self, split):
        """What the reward is fitted to: tokens, mask (N, K, T), preference (N, K), prompts (N, P) with their
        mask, and the labels (N, K, T) of E17, which only guidance by edits looks at: 0 under any other."""
        tokens, masks, labels, cut = [], [], [], 0
        for ids in self.ids[split]:
            marks = edit_labels(*ids) if self.cfg.guidance == "edits" else [[0] * len(x) for x in ids]
            t, m = data.pad(ids, self.width)
            cut += sum(len(x) > self.width for x in ids)
            tokens.append(t)
            masks.append(m)
            labels.append(data.pad(marks, self.width)[0])
        if cut:
            self.say(f"{split}: {cut} of {sum(map(len, tokens))} answers are longer than {self.width} tokens "
                     f"and were cut")
        if self.cfg.guidance == "edits" and self.real:
            share = torch.stack(labels)[torch.stack(masks)].ne(0).float().mean().item()
            self.say(f"{split}: {100 * share:.0f} % of the tokens of the answers were changed by the edits")
        x = self.tensors[split]
        preference = torch.tensor([[float(q) for q in self.answers(row)[1]] for row in self.rows[split]])
        tokens, masks, labels = torch.stack(tokens), torch.stack(masks), torch.stack(labels)  # (N, K, T)
        parts = tokens, masks, preference, x.context, x.context_mask, labels
        return [t.to(self.device) for t in parts]

    def true_errors(self, split, n=None):
        """(N, T) bool: tokens of the worse answers (of the first n rows) that overlap a marked span. None
        without marks."""
        rows = self.rows[split][:n]
        if not any(row.get("errors") for row in rows):
            return None
        out = torch.zeros(len(rows), self.width, dtype=torch.bool)
        for n, row in enumerate(rows):
            pieces = self.tokenizer.pieces(self.tokenizer.encode(" " + row["rejected"]))[:self.width]
            spans = [(start + 1, stop + 1) for start, stop, *_ in row["errors"]]  # behind the leading space
            out[n, :len(pieces)] = torch.tensor(marked(pieces, spans), dtype=torch.bool)
        return out

    def better(self, row):
        """What others are measured by: the edited answer, or the best of a ranking (the first of equals)."""
        texts, scores = self.answers(row)
        return texts[max(range(len(texts)), key=lambda i: scores[i])]

    def worst_of(self, row):
        """Place of the answer that the starting policy imitates: the rejected one, or, where a ranking names
        none, its (first) worst."""
        texts, scores = self.answers(row)
        if row.get("rejected") is not None:
            return list(texts).index(row["rejected"])
        return min(range(len(texts)), key=lambda i: scores[i])

    def quality(self, split, index, tokens, mask):
        """Minus the token edits to the better answer: (B, K, T) -> (B, K) float, higher is better."""
        out = []
        for b, i in enumerate(index.tolist()):
            want = self.tokenizer.encode(" " + self.better(self.rows[split][i])) + [self.eot]
            out.append([0.0 - edit_distance(t[m].tolist(), want) for t, m in zip(tokens[b], mask[b])])
        return torch.tensor(out, device=tokens.device)

    def begin(self, policy):
        """The starting policy's answers to the test prompts: what wins are counted against."""
        self.start_scores = self.sampled(policy).tolist()

    @torch.no_grad()
    def sampled(self, policy, at_once=100):
        """Quality of one sampled answer to every test prompt, the same random numbers every time: (N,)."""
        draw, out = torch.Generator(self.device).manual_seed(self.cfg.seed), []
        for index in torch.arange(len(self.rows["test"])).split(at_once):
            tokens, mask = self.write(policy, self.pick("test", index), draw)  # (B, 1, T)
            out.append(self.quality("test", index, tokens, mask)[:, 0])
        return torch.cat(out).cpu()

    def evaluate(self, policy, generator):
        """On the test prompts the win rate against the starting policy (ties half) and the mean distance in
        token edits."""
        now, first = self.sampled(policy), torch.tensor(self.start_scores)
        return {"win_rate": ((now > first).float() + 0.5 * (now == first).float()).mean().item(),
                "edits_left": -now.mean().item(), "start_edits_left": -first.mean().item()}

    def judge_reward(self, guide):
        """{"token_auroc", ...}: rewards of the test set's worse answers against the true errors, once more as
        a rank correlation ("credit_truth"; where no two rewards are equal it is (2 token_auroc - 1) times
        sqrt(3 p (1 - p)), p the share of errors); beside them a guess by place alone (later is worse) and
        the share of errors. {} where no errors are marked.

        guide  (tokens, prefix, mask) -> rewards of tokens, (B, 1, T) each
        """
        truth = self.true_errors("test")
        if truth is None:
            return {}
        x, scores = self.tensors["test"], []
        for index in torch.arange(len(truth)).split(100):
            batch = self.pick("test", index)
            mask = batch.reference_mask[:, None]
            scores.append(guide(batch.reference[:, None], batch.prefix(), mask)[:, 0].cpu())
        valid = x.reference_mask & (x.reference != self.eot)
        place = torch.arange(self.width).expand_as(valid).float()
        rewards = torch.cat(scores)[valid]
        return {"token_auroc": auroc(-rewards, truth[valid]),
                "credit_truth": spearman(rewards, ~truth[valid]),
                "place_auroc": auroc(place[valid], truth[valid]),
                "error_share": truth[valid].float().mean().item()}

    @torch.no_grad()
    def samples(self, policy, generator, n=3):
        """For n test prompts the worst answer, the better one and a sampled one. Errors are those that were
        marked in the worst answer; the better one has none. Of a sampled one they are known in the embedded
        world alone, where there is one right answer: what an edit into that would take out."""
        batch = self.pick("test", torch.arange(min(n, len(self.rows["test"]))))
        own, own_mask = self.write(policy, batch, generator)  # (n, 1, T)
        want = [self.tokenizer.encode(" " + self.better(row)) + [self.eot]
                for row in self.rows["test"][:len(own)]]
        better, better_mask = [x.to(self.device) for x in data.pad(want, self.width)]
        tokens = torch.cat((batch.reference[:, None], better[:, None], own), 1)  # (n, 3, T)
        mask = torch.cat((batch.reference_mask[:, None], better_mask[:, None], own_mask), 1)
        errors, truth = None, self.true_errors("test", len(own))
        if truth is not None:
            errors = torch.zeros_like(mask)
            errors[:, 0] = truth.to(self.device) & mask[:, 0]
            if not self.real:
                said = [x[m].tolist() for x, m in zip(own[:, 0], own_mask[:, 0])]
                taken_out = [edit_labels(*ids)[0] for ids in zip(said, want)]
                errors[:, 2] = data.pad(taken_out, self.width)[0].to(self.device) == -1
        roles = [["worse", "better", "sampled"]] * len(own)
        return Samples(batch, tokens, mask, self.quality("test", batch.index, tokens, mask), roles, errors)

    def describe(self, batch, row):
        """Prompt and better answer of one input, as text."""
        row = self.rows["test"][int(batch.index[row])]
        return row["prompt"], self.better(row)

    def state(self):
        """Beyond networks and random numbers: the starting policy's qualities."""
        return {"start_scores": self.start_scores}

    def load_state(self, state):
        """The inverse of `state`."""
        self.start_scores = state["start_scores"]
