"""The protocol of a task: what it must write and what works without, its defaults, presets and samples.

Runs are tiny and in this process; nets are random where only shapes and roles matter.
"""
import json
import re
from pathlib import Path

import pytest
import torch
from reference import seeded, tiny
from stubs import small_worlds

import tasks
import train
from data import Batch, pad, word_tokenizer
from support.files import read_torch, write_torch
from support.flags import groups_of, parse_flags
from support.log import UserError
from tasks import Samples, Task, check_task, marked
from tasks.edits import EditsTask
from tasks.judge import vocabulary
from tasks.prompt import PromptTask
from tasks.reports import WORDS
from tasks.summarize import SummarizeTask

ROOT = Path(__file__).resolve().parent.parent
FEW = ("--threads 1 --n_layer 1 --n_embd 16 --n_head 2 --batch_size 4 --reward_batch 4 --reward_first 3 "
       "--reward_steps 2 "
       "--reward_every 2 --policy_steps 4 --log_every 1 --eval_every 2 --curve_size 4 --candidates 8").split()
JUDGE = "--judge_steps 1 --judge_read 1 --judge_width 8 --judge_layers 1 --shots 2".split()
SMALL = {"prompt": JUDGE, "summarize": "--sft_steps 2 --max_document 24 --max_summary 24".split(),
         "edits": "--sft_steps 2 --max_document 24 --max_summary 24".split()}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def flags(*typed):
    return parse_flags(train.Flags, [str(x) for x in typed], train.__doc__)[0]


def make(name, cache, *typed):
    """A task of the embedded world with a judge that was hardly trained."""
    c = flags("--task", name, "--cache_dir", cache, *SMALL[name], *typed)
    return train.TASKS[name](c, torch.device("cpu"), lambda *x: None, lambda line: None)


@pytest.fixture(scope="module")
def made(cache):
    return {name: make(name, cache) for name in train.TASKS}


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def refused(capsys, *typed):
    with pytest.raises(SystemExit) as end:
        train.main([str(x) for x in typed])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and not list(Path().iterdir())
    return err


# ------------------------------------------------------------------------------------------------ protocol


class Echo(Task):
    """The least there can be with inputs and references: say the word that was read."""
    kind, has_references = "word", True
    figures, curve = ("right", "seconds"), "right"
    words = "oak elm fir ash yew box".split()

    def __init__(self, c, device, progress, say):
        tok = word_tokenizer(self.words)
        ids = [tok.encode(" " + word) for word in self.words]
        batch = Batch(torch.arange(6), *pad(ids), *pad([x + [tok.eot] for x in ids], 3))
        self.read(c, device, tok, 3, {"train": self.words}, {"train": batch})

    def prefer(self, batch, tokens, mask):
        said = iter(self.texts(tokens, mask))
        return torch.tensor([[float(next(said) == self.words[i]) for _ in range(tokens.shape[1])]
                             for i in batch.index.tolist()])

    def evaluate(self, policy, generator):
        batch = self.pick("train", torch.arange(6))
        said = self.write(policy, batch, generator, temperature=0)
        return {"right": self.prefer(batch, *said).mean().item()}


@pytest.mark.parametrize("objective", ["reinforce", "wmle", "ppo"])
def test_three_members_are_a_task_for_samples_references_and_ppo(objective, cache, monkeypatch):
    monkeypatch.setitem(train.TASKS, "echo", Echo)
    few = ["--task", "echo", "--objective", objective, "--sft_steps", 60, "--sft_lr", 0.02, *FEW,
           "--cache_dir", cache]
    assert train.main([str(x) for x in [*few, "--out_dir", "a"]]) == 0
    assert train.main([str(x) for x in [*few, "--out_dir", "b", "--policy_steps", 2]]) == 0
    assert train.main("--init_from resume --out_dir b --policy_steps 4".split()) == 0
    whole, half = [json.loads(Path(x, "summary.json").read_text()) for x in "ab"]
    assert whole | {"seconds": 0} == half | {"seconds": 0}
    assert whole["right"] == 1.0  # its warm start has learned to repeat a word
    config = json.loads(Path("a/config.json").read_text())
    assert config["figures"] == ["right", "seconds"] and config["curve"] == "right"
    assert config["resolution"] == 0.0
    last = [row for row in rows("a/samples.jsonl") if row["step"] == 4]
    assert [row["role"] for row in last] == ["sampled", "reference"] * 3
    assert [row["context"] for row in last[::2]] == [row["reference"] for row in last[::2]] == Echo.words[:3]


def test_what_a_task_must_write_is_named_before_anything_is_read(monkeypatch, capsys):
    class Half(Task):
        def prefer(self, batch, tokens, mask):
            return tokens

    class Pairs(Echo):
        has_pairs = True
    for task, says in ((Half, "expected its own __init__, evaluate, got none"),
                       (Pairs, "expected its own pairs"), (object, "expected a subclass of tasks.Task")):
        monkeypatch.setitem(train.TASKS, "new", task)
        assert says in refused(capsys, "--task", "new")
        with pytest.raises(UserError, match=says):
            check_task(task)
    for task in train.TASKS.values():
        if task is not object:
            check_task(task)


@pytest.mark.parametrize("change, says", [
    (lambda self, *x: None, "expected its __init__ to end with self.read(...)"),
    (lambda self, c, device, *x: self.read(c, device, word_tokenizer(["a"]), 3, {"train": ["a"]}),
     'expected self.read(...) with rows and tensors of "train"')])
def test_what_a_task_has_not_read_is_named(change, says, cache, monkeypatch, capsys):
    monkeypatch.setitem(train.TASKS, "echo", type("Wrong", (Echo,), {"__init__": change}))
    said = refused(capsys, "--task", "echo", *FEW, "--cache_dir", cache, "--out_dir", "a")
    assert "task Wrong: " in said and says in said


@pytest.mark.parametrize("answer, says", [
    (lambda mask: None, "NoneType"), (lambda mask: mask.sum(-1), "torch.int64 of shape (8, 2)"),
    (lambda mask: mask.float(), "torch.float32 of shape (8, 2, 3)"),
    (lambda mask: mask.sum(-1) * float("nan"), "some that are not finite")])
def test_a_preference_that_is_none_is_named_before_any_fit(answer, says, cache, monkeypatch, capsys):
    wrong = {"prefer": lambda self, batch, tokens, mask: answer(mask)}
    monkeypatch.setitem(train.TASKS, "echo", type("Wrong", (Echo,), wrong))
    monkeypatch.setattr(train, "fit", None)
    typed = ["--task", "echo", "--K", 2, *FEW, "--cache_dir", cache, "--out_dir", "a"]
    with pytest.raises(SystemExit) as end:
        train.main([str(x) for x in typed])
    wants = "train.py: task Wrong: prefer: expected finite floats of shape (B, K) = (8, 2), got "
    assert end.value.code == 2 and capsys.readouterr().err == f"{wants}{says}\n"


@pytest.mark.parametrize("name, value, says", [
    ("resolutoin", 1.0, "there is no flag --resolutoin (did you mean resolution?)"),
    ("lr", "fast", "--lr: expected float, got 'fast'"), ("K", 1, "--K: expected at least 2, got 1"),
    ("agg", "mean", "--agg: expected one of"), ("candidates", 1.5, "--candidates: expected int, got '1.5'")])
def test_a_default_that_its_flag_would_not_take_is_named(name, value, says, monkeypatch, capsys):
    monkeypatch.setitem(train.TASKS, "echo", type("Echo", (Echo,), {"defaults": {name: value}}))
    assert says in refused(capsys, "--task", "echo")


def test_a_new_task_inherits_nothing_of_another_one(monkeypatch):
    monkeypatch.setitem(train.TASKS, "echo", Echo)
    c = flags("--task", "echo")
    assert all(getattr(c, f.name) == f.metadata["default"] for f in train.Flags.__dataclass_fields__.values()
               if f.name != "task")
    assert flags("--task", "prompt").resolution == 50.0 and c.resolution == 0.0


def test_a_warm_up_on_text_that_a_task_does_not_have_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(train.TASKS, "echo", type("Echo", (Echo,), {"has_references": False}))
    says = "task echo has no text besides its rows"
    assert says in refused(capsys, "--task", "echo", "--reward_warmup", 10)


@pytest.mark.parametrize("name", ["device", "files", "flags", "log", "lock"])
def test_support_knows_no_flag_of_the_method(name):
    text = (ROOT / "support" / f"{name}.py").read_text(encoding="utf-8")
    groups = groups_of(train.Flags).items()
    method = {flag for flag, group in groups if group not in ("run", "log") and "_" in flag}
    assert not method & set(re.findall(r"\w+", text)) and "c.task" not in text


# ------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("task", train.TASKS)
def test_the_paper_in_one_flag(task, cache, monkeypatch):
    """A shorter run: config.json holds the paper's values and says so; what was typed by hand wins."""
    small_worlds(monkeypatch)
    by_hand = [*FEW, *SMALL[task], "--batch_size", "8"]
    typed = {x[2:] for x in by_hand[::2]}
    run = ["--task", task, "--preset", "paper", "--cache_dir", cache, *by_hand, "--out_dir", "a"]
    assert train.main(run) == 0
    config = json.loads(Path("a/config.json").read_text())
    expected = {k: v for k, v in train.TASKS[task].paper.items() if k not in typed}
    assert config["preset"] == "paper" and config["hold"] == 0
    same = lambda k, v: config[k] == v or v is None  # decided by the data
    assert expected and all(same(k, v) for k, v in expected.items())
    assert config["preset_set"] == {k: v for k, v in expected.items() if v is not None}
    assert config["policy_steps"] == 4 and config["candidates"] == 8
    assert "candidates" not in config["preset_set"]
    assert train.main("--init_from resume --out_dir a --policy_steps 5".split()) == 0
    assert json.loads(Path("a/config.json").read_text())["preset_set"] == config["preset_set"]


def test_a_reward_without_a_head_never_learns_one_alone():
    assert flags("--guidance", "implicit").head_first == 0.0 < flags("--guidance", "token").head_first


def test_the_constants_of_the_papers():
    """By hand, from the released code and the second paper's scripts."""
    both = {"replay": 0, "explore": 0.0, "ties": 0.0, "rank_temperature": 1.0, "resolution": 0.0,
            "weights": "immediate", "center": False, "hold": 0, "alpha": 0.125, "reward_warmup": 0,
            "beta": 2.0, "clip": 5.0, "bound": "softplus", "head_first": 0.0, "ask_again": 0,
            "explore_from": "policy", "exact_first": False, "adam_beta2": 0.999}
    want = {"prompt": both | {"top_k": 256, "K": 5, "candidates": 16, "agg": "sum", "objective": "reinforce",
                              "batch_size": 64, "prompt_length": 5, "shots": 16},
            "summarize": both | {"wmle_norm": "rewards", "K": 3, "agg": "avg", "objective": "wmle",
                                 "batch_size": 32},
            "edits": {"guidance": "edits", "objective": "ppo", "kl": 0.01, "gamma": 1.0, "lam": 0.95,
                      "ppo_clip": 0.2, "value_clip": 0.25, "epochs": 1, "minibatches": 8, "clip": 1.0,
                      "alpha": 0.0, "hold": 0}}
    for task, constants in want.items():
        c = vars(flags("--task", task, "--preset", "paper"))
        assert {k: c[k] for k in constants} == constants, task
    c = flags("--task", "prompt", "--preset", "paper")
    assert c.policy_steps == 12 * c.reward_every  # 12,000 and 1000
    assert c.reward_steps == c.reward_first  # each to its end
    assert flags("--task", "prompt").alpha == 0.3  # and without it nothing of this


def test_flags_by_hand_win_over_the_preset():
    c = flags("--preset", "paper", "--alpha", 0.5, "--replay", 100)
    assert c.alpha == 0.5 and c.replay == 100 and c.top_k == 256
    assert "alpha" not in train.preset_set(c) and train.preset_set(c)["top_k"] == 256
    assert train.preset_set(flags()) == {}


# ------------------------------------------------------------------------------------------------- samples


def policy_of(task):
    return tiny(vocab_size=task.tokenizer.size, n_ctx=task.context)


def check_shapes(task, x, draws=True):
    """What every Samples is: equal shapes, a role a sequence, the same ones whenever it is asked again."""
    B, K, T = x.tokens.shape
    assert isinstance(x, Samples) and T == task.width
    assert x.mask.shape == (B, K, T) and x.preference.shape == (B, K)
    assert [len(roles) for roles in x.roles] == [K] * B and len(x.batch.index) == B
    if x.errors is not None:
        assert x.errors.dtype == torch.bool and x.errors.shape == (B, K, T) and not (x.errors & ~x.mask).any()
    lengths = x.mask.sum(-1)
    assert torch.equal(x.mask, torch.arange(T) < lengths[..., None])  # masks come from lengths


def test_prompts_are_a_good_one_with_each_word_replaced_in_turn(made):
    task, queries = made["prompt"], made["prompt"].queries
    policy = policy_of(task)
    x = task.samples(policy, seeded())
    check_shapes(task, x)
    T, tokens = task.width, x.tokens[0]
    assert x.roles[0][:T + 1] == ["best"] + [f"place {t + 1} random" for t in range(T)]
    assert set(x.roles[0][T + 1:]) == {"sampled"} and len(x.roles[0]) > T + 1
    for t in range(T):
        assert (tokens[t + 1] != tokens[0]).tolist() == [i == t for i in range(T)]
    drawn = task.write(policy, task.batch(1, None), seeded(), 64)[0][0]  # the same draws
    dev = task.ask(drawn, "dev")[0]
    assert torch.equal(tokens[0], drawn[dev.argmax()])
    torch.testing.assert_close(x.preference[0], task.ask(tokens, "dev")[0])
    assert task.queries == queries  # to look costs nothing of the budget


def test_the_vocabulary_and_the_credit_table_by_a_known_reward(made):
    task = made["prompt"]
    x = task.samples(policy_of(task), seeded())
    cues, _, plain = vocabulary(task.world, task.tokenizer)
    cues = cues["sentiment"]

    def guide(tokens, prefix=None):
        """1 for a first cue word, 0.9, 0.8, ... for further ones, and below 0 by id for any other word."""
        is_cue = torch.isin(tokens, cues)
        return torch.where(is_cue, 1.1 - 0.1 * is_cue.cumsum(-1), -tokens / 10_000.0)
    words, credit = task.probe(guide, None)
    assert words["prefix"] == task.tokenizer.pieces(x.tokens[0, 0, :-1].tolist())
    assert words["kind"] == "vocabulary"
    own = {task.tokenizer.pieces([i])[0] for i in cues.tolist()}
    assert len(words["top"]) == len(words["bottom"]) == 10 and {name for name, _ in words["top"]} <= own
    assert words["bottom"][0] == [task.tokenizer.pieces([task.n_ids - 1])[0],
                                  round(-(task.n_ids - 1) / 10_000, 4)]
    assert credit["kind"] == "credit" and credit["cues"] == [0, 1, 2, 3]
    assert credit["cue"] == pytest.approx([1.0, 0.9, 0.8, 0.7], abs=1e-3)  # each was a new one
    assert all(-plain.max() / 10_000 <= r < 0 for r in credit["other"])
    json.dumps([words, credit])
    assert task.probe(guide, None) == [words, credit]


def test_summaries_stand_beside_a_wrong_fact(made):
    task = made["summarize"]
    x = task.samples(policy_of(task), seeded())
    check_shapes(task, x)
    assert x.roles == [["right", "wrong fact", "sampled", "reference"]] * 3
    kinds = {word: kind for kind, pool in WORDS.items() for word in pool}
    for b in range(3):
        row = task.rows["train"][b]
        right, wrong, _, reference = task.texts(x.tokens[b], x.mask[b])
        assert right == row["facts"] and reference == row["summary"]
        both = zip(right.split(), wrong.split(), strict=True)
        (k, a, z), = [(k, a, z) for k, (a, z) in enumerate(both) if a != z]
        assert kinds[a] == kinds[z] and z not in row["document"].split()  # of its kind, and nobody said it
        assert x.errors[b, 0].sum() == 0 and x.errors[b, 1].nonzero().flatten().tolist() == [k]
        strange = [word not in right.split() for word in reference.split()]
        assert x.errors[b, 3].sum() == sum(strange)  # a mistaken word, the unsupported clause
        assert x.preference[b, 0] > x.preference[b, 1]
    again = task.samples(policy_of(task), seeded(5))
    assert torch.equal(again.tokens[:, :2], x.tokens[:, :2])  # the same contrast at every evaluation


def test_a_summary_without_a_word_to_replace_is_not_called_wrong(tmp_path, cache):
    for split in ("train", "validation", "test"):
        said = enumerate(("one", "two", "one"))
        rows = [{"document": f"long ago {i}", "summary": text} for i, text in said]
        Path(f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = make("summarize", cache, "--data", tmp_path, "--tokenizer", "byte", "--max_summary", 8)
    x = task.samples(policy_of(task), seeded())
    assert x.roles == [["right", "right", "sampled"]] * 3 and not x.errors[:, :2].any()
    assert torch.equal(x.tokens[:, 0], x.tokens[:, 1])


def test_on_real_text_the_wrong_word_is_one_of_another_title(tmp_path, cache):
    text = {i: f"the {a} {b} home" for i, (a, b) in enumerate((("yellow", "carried"), ("purple", "dropped")))}
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"document": f"long ago {text[i % 2]} again {i}",
                             "summary": text[i % 2]}) for i in range(4)]
        Path(f"{split}.jsonl").write_text("\n".join(lines))
    task = make("summarize", cache, "--data", tmp_path, "--tokenizer", "byte", "--max_summary", 40)
    x = task.samples(policy_of(task), seeded())
    check_shapes(task, x)
    assert x.roles == [["right", "wrong fact", "sampled"]] * 3
    for b in range(3):
        right, wrong, _ = task.texts(x.tokens[b], x.mask[b])
        (a, z), = [(a, z) for a, z in zip(right.split(), wrong.split(), strict=True) if a != z]
        assert right == text[b % 2] and z in text[(b + 1) % 2].split() and len(a) > 3 < len(z)
        marked_bytes = x.tokens[b, 1][x.errors[b, 1]].tolist()
        assert bytes(marked_bytes).decode() == z  # every byte of the word, and nothing else
        assert not x.errors[b, [0, 2]].any()


def test_edits_show_the_errors_that_were_marked(made):
    task = made["edits"]
    x = task.samples(policy_of(task), seeded())
    check_shapes(task, x)
    assert x.roles == [["worse", "better", "sampled"]] * 3
    truth = task.true_errors("test")[:3]
    assert torch.equal(x.errors[:, 0], truth) and truth.any() and not x.errors[:, 1].any()
    right = x.tokens[:, 1].clone()
    assert x.errors[:, 2].any()  # an untrained policy says what an edit takes out
    task.write = lambda *args: (right[:, None], x.mask[:, 1:2])
    try:
        assert not task.samples(None, None).errors[:, 2].any()  # and the right answer has none
    finally:
        del task.write


def test_marked_tokens_are_those_that_overlap_a_span():
    assert marked(["ab", " cd", "", "ef"], [(1, 2), (5, 6, "kind")]) == [True, False, False, True]
    assert marked(["ab", "c"], []) == [False, False]


# ---------------------------------------------------------------------------------------------------- kept


@pytest.mark.parametrize("name", train.TASKS)
def test_a_task_is_reopened_from_what_it_keeps_without_its_data(name, made, tmp_path):
    task = made[name]
    write_torch(tmp_path / "task.pt", task.kept())
    kept = read_torch(tmp_path / "task.pt", "what is kept", "cpu")  # plain values and tensors alone
    again = type(task).reopen(task.cfg, kept, task.tokenizer, torch.device("cpu"))
    for member in ("start", "eot", "n_ids", "width", "context", "kind", "pooled", "tokenizer", "cfg"):
        assert getattr(again, member) == getattr(task, member), member
    policy = policy_of(task)
    batch = task.batch(1, seeded()) if task.pooled else task.pick("train", torch.arange(1))
    for a, b in zip(again.write(policy, batch, seeded(), 2), task.write(policy, batch, seeded(), 2)):
        assert torch.equal(a, b)


def test_a_reopened_judge_says_the_same(made):
    task = made["prompt"]
    again = PromptTask.reopen(task.cfg, task.kept(), task.tokenizer, torch.device("cpu"))
    texts = [task.tokenizer.encode(" " + row["text"]) for row in task.rows["dev"]]
    prompts = task.write(policy_of(task), task.batch(1, None), seeded(), 3)[0][0]
    ask = lambda judge: judge.probabilities(judge.read(*pad(texts)), prompts, "sentiment")
    torch.testing.assert_close(ask(again.judge), ask(task.judge), rtol=0, atol=0)
    assert again.answer_words["sentiment"] == ["terrible", "great"] and again.classes == 2
    assert not any(p.requires_grad for p in again.judge.model.parameters())
