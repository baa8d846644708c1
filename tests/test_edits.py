"""tasks/edits.py and the label loss of reward.py: alignments by hand and against enumeration,
the world's promises."""
import itertools
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from reference import mask_of, seeded, tiny

import data
import tasks.edits
import train
from reward import Candidates, TokenReward, label_loss
from support.flags import parse_flags
from support.log import UserError
from tasks.annotated import TURN, read_edits
from tasks.edits import EditsTask, auroc, edit_distance, edit_labels
from tasks.requests import embedded_world, world_words


def brute_distance(a, b):
    """The definition, by recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(brute_distance(a[1:], b) + 1, brute_distance(a, b[1:]) + 1,
               brute_distance(a[1:], b[1:]) + (a[0] != b[0]))


# -------------------------------------------------------------------------------------------------------- E17

@pytest.mark.parametrize("rejected, edited, labels", [
    ([1, 2, 3], [1, 4, 3], ([0, -1, 0], [0, 1, 0])),              # a substitution
    ([1, 2, 3], [1, 3], ([0, -1, 0], [0, 0])),                    # a deletion
    ([1, 3], [1, 2, 3], ([0, 0], [0, 1, 0])),                     # an insertion
    ([1, 2], [1, 2], ([0, 0], [0, 0])),                           # nothing changed
    ([], [5], ([], [1])), ([5], [], ([-1], [])), ([], [], ([], [])),
    ([1, 2, 3], [4, 5], ([-1, -1, -1], [1, 1])),                  # nothing kept
    # a tie: equal tokens at the beginning are kept first
    ([1, 1], [1], ([0, -1], [0])),
    ([1, 2, 3, 4, 5], [1, 3, 9, 5], ([0, -1, 0, -1, 0], [0, 0, 1, 0])),
])
def test_labels_by_hand(rejected, edited, labels):
    assert edit_labels(rejected, edited) == labels


def test_labels_are_a_shortest_alignment():
    for a, b in itertools.product(
            [list(x) for n in range(5) for x in itertools.product(range(2), repeat=n)], repeat=2):
        la, lb = edit_labels(a, b)
        kept_a, kept_b = [x for x, l in zip(a, la) if l == 0], [x for x, l in zip(b, lb) if l == 0]
        assert kept_a == kept_b  # what is kept is the same on both sides, in order
        assert set(la) <= {0, -1} and set(lb) <= {0, 1} and edit_distance(a, b) == brute_distance(a, b)
        assert max(la.count(-1), lb.count(1)) <= brute_distance(a, b) <= la.count(-1) + lb.count(1)


def test_the_alignment_of_long_answers_is_sound_too():
    rng = random.Random(0)
    for _ in range(5):
        a = [rng.randrange(50) for _ in range(100)]
        b = [rng.randrange(50) if rng.random() < 0.3 else x for x in a if rng.random() < 0.9]
        la, lb = edit_labels(a, b)
        assert [x for x, l in zip(a, la) if l == 0] == [x for x, l in zip(b, lb) if l == 0]
        assert edit_distance(a, b) == edit_distance(b, a) <= la.count(-1) + lb.count(1)


# ------------------------------------------------------------------------------------------------------ AUROC

def test_auroc_by_hand():
    assert auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert auroc([1, 1, 1], [True, False, False]) == 0.5  # ties count half
    assert auroc([1, 2], [False, True]) == 1.0 and auroc([1.0], [True]) == 0.5


# ------------------------------------------------------------------------------------------------- label loss

def labelled():
    net = TokenReward(tiny(), 10)
    torch.nn.init.normal_(net.mlp[2].weight, generator=seeded(1))
    tokens = torch.randint(10, (2, 2, 4), generator=seeded())
    mask = torch.stack((mask_of(4, 3, width=4), mask_of(2, 4, width=4)))
    labels = torch.tensor([[[-1, 0, 0, -1], [1, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 0, 0]]])
    return net, Candidates(tokens, mask, torch.tensor([[0.0, 1.0]] * 2), labels=labels)


def test_label_loss_by_hand():
    net, x = labelled()
    p = net.logits(x.tokens).sigmoid()
    changed = [-(1 - p[0, 0, 0]).log(), -(1 - p[0, 0, 3]).log(), -p[0, 1, 0].log(), -p[1, 1, 0].log(),
               -p[1, 1, 1].log()]
    kept = (x.labels == 0) & x.mask
    neutral = -0.5 * (p[kept].log() + (1 - p[kept]).log())
    torch.testing.assert_close(label_loss(net, x), torch.stack(changed).mean() + 0.1 * neutral.mean())


def test_label_loss_of_one_changed_and_one_kept_token_divides_by_one():
    net, x = labelled()
    one = Candidates(x.tokens[:1, :1, :2], x.mask[:1, :1, :2], x.preference[:1, :1],
                     labels=torch.tensor([[[-1, 0]]]))
    p = net.logits(one.tokens).sigmoid()[0, 0]
    neutral = -0.5 * (p[1].log() + (1 - p[1]).log())
    torch.testing.assert_close(label_loss(net, one), -(1 - p[0]).log() + 0.1 * neutral)


def test_padding_changes_no_label_loss():
    net, x = labelled()
    wide = x.map(lambda t: torch.nn.functional.pad(t, (0, 2)) if t.dim() == 3 else t)
    torch.testing.assert_close(label_loss(net, wide), label_loss(net, x))


# ------------------------------------------------------------------------------------------------------ world

def test_errors_of_the_world_are_what_an_edit_takes_out():
    rows, ids = embedded_world(0, 300, 10)["train"], {w: i for i, w in enumerate(world_words())}
    same = 0
    for row in rows:
        words, at, wrong = row["rejected"].split(), 0, []
        for word in words:
            wrong.append([at, at + len(word), "error"] in row["errors"])
            at += len(word) + 1
        assert sum(wrong) == len(row["errors"]) > 0
        labels, _ = edit_labels([ids[w] for w in words], [ids[w] for w in row["edited"].split()])
        same += [l == -1 for l in labels] == wrong
    # a clause that holds the right word by chance allows another edit, as short
    assert same > 0.95 * len(rows)
    assert embedded_world(0, 300, 10)["train"] == rows and embedded_world(1, 300, 10)["train"] != rows


def test_every_word_of_the_world_is_in_its_list():
    words = set(world_words())
    for row in embedded_world(0, 300, 10)["train"]:
        assert set((row["prompt"] + " " + row["rejected"] + " " + row["edited"]).split()) <= words


# -------------------------------------------------------------------------------------------------- bad input

def write(folder, rows, other=None):
    for split, x in (("train", rows), ("test", other or rows)):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, x)) + "\n")
    return str(folder)


GOOD = {"prompt": "p", "rejected": "a b", "edited": "a c"}


@pytest.mark.parametrize("row, says", [
    ({"prompt": "p", "rejected": "a"}, "2: edited"), ({"prompt": "p", "edited": "a"}, "2: rejected"),
    ({"prompt": "p", "rejected": "a", "edited": 3}, "2: edited"),
    ({"prompt": "p"}, "2: rejected.*or candidates with scores"),
    ({"rejected": "a b", "edited": "a c"}, "2: prompt"),
    ({"prompt": ["p"], "rejected": "a", "edited": "b"}, "2: prompt"),
    ({"prompt": "p", "candidates": ["a", "b"], "scores": [0, 1]},
     "2: candidates: expected 0 as in the rows before"),
])
def test_bad_rows_name_the_line_and_the_field(tmp_path, row, says):
    with pytest.raises(data.UserError, match=says):
        read_edits(write(tmp_path, [GOOD, row]))


@pytest.mark.parametrize("change, says", [
    ({"candidates": ["a"], "scores": [1]}, "2: candidates: expected 3 as in the rows before, got 1"),
    ({"scores": [1]}, "2: candidates: expected texts, at least 2 and as many as scores, got 3 and 1 scores"),
    ({"candidates": ["a", 3, "b"]}, "2: candidates: expected texts"),
    ({"prompt": None}, "2: prompt: expected str"),
    *[({"scores": [1, x, 0]}, "2: scores: expected numbers from -1e30 to 1e30, got " + shown)
      for x, shown in (
        ("x", '"x"'), (True, "true"), (None, "null"), ([1], r"\[1\]"), (float("nan"), "NaN"),
        (float("inf"), "Infinity"), (10**400, "1000"), (-1e31, "-1e\\+31"))],
    ({"errors": [[0, 1]]}, "2: errors: ")])  # whose characters, in a ranking?
def test_bad_rankings_name_the_line_and_the_field(tmp_path, change, says):
    good = {"prompt": "p", "candidates": ["a", "b", "c"], "scores": [1, 0.5, -1e30]}
    with pytest.raises(data.UserError, match="train.jsonl:" + says):
        read_edits(write(tmp_path, [good, good | change]))


@pytest.mark.parametrize("errors", [
    [3], ["x"], [[0]], [[0, "1"]], [[0.0, 1]], [[False, True]], [[-1, 2]], [[1, 1]], [[2, 1]], [[0, 4]],
    [[0, 10**400]], [{"start": 0}], [None], [[0, 1], [0, 9]], [[0, float("nan")]]])
def test_error_spans_are_checked_when_a_file_is_read(tmp_path, errors):
    good = GOOD | {"errors": [[0, 1], [0, 3, "kind"], [2, 3, "kind", 0.5]]}  # "a b" has three characters
    assert read_edits(write(tmp_path, [good]))["train"][0]["errors"] == good["errors"]
    with pytest.raises(data.UserError,
                       match=r"train.jsonl:2: errors: expected \[start, end, ...\] with 0 <= start"):
        read_edits(write(tmp_path, [good, GOOD | {"errors": errors}]))


@pytest.mark.parametrize("row, name", [
    (GOOD | {"edited": ""}, "edited answer"), (GOOD | {"rejected": " \n"}, "rejected answer"),
    (GOOD | {"prompt": " "}, "prompt"),
    ({"chosen": TURN, "rejected": TURN + " a"}, "chosen answer")])
def test_rows_with_an_empty_text_are_left_out_and_said(tmp_path, row, name):
    said = []
    splits = read_edits(write(tmp_path, [GOOD, row, GOOD], [GOOD]), say=said.append)
    assert [len(rows) for rows in splits.values()] == [2, 1]
    assert said == [f"{tmp_path}/train.jsonl: 1 of 3 rows had an empty {name} and were left out"]


def test_rankings_with_an_empty_candidate_are_left_out_and_said(tmp_path):
    said, good = [], {"prompt": "p", "candidates": ["a", "b"], "scores": [1, 0]}
    splits = read_edits(write(tmp_path, [good, good | {"candidates": ["a", " "]}], [good]), say=said.append)
    assert [len(rows) for rows in splits.values()] == [1, 1]
    assert said == [f"{tmp_path}/train.jsonl: 1 of 2 rows had an empty candidate and were left out"]


def test_edits_that_change_nothing_are_counted_and_left_out(tmp_path):
    said = []
    splits = read_edits(write(tmp_path, [GOOD, {"prompt": "p", "rejected": "a", "edited": "a"}]),
                        say=said.append)
    assert [len(rows) for rows in splits.values()] == [1, 1]
    assert said == [f"{split}: 1 edits changed nothing and were left out" for split in ("train", "test")]


def test_pairs_without_edits_are_read_as_edits(tmp_path):
    rows = read_edits(write(tmp_path, [{"prompt": "p", "chosen": "a c", "rejected": "a b"}]))["train"]
    assert rows[0]["edited"] == "a c" and rows[0]["rejected"] == "a b"


def test_dialogues_without_a_prompt_are_split_at_the_last_turn_they_share(tmp_path):
    talk = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    rows = read_edits(write(tmp_path, [{"chosen": talk + " because", "rejected": talk + " be off"}]))["train"]
    assert (rows[0]["prompt"], rows[0]["edited"], rows[0]["rejected"]) == (talk, "because", "be off")


def test_blank_lines_do_not_shift_the_line_of_a_message(tmp_path):
    folder = write(tmp_path, [GOOD])
    with open(f"{folder}/train.jsonl", "a") as f:
        f.write('\n\n{"prompt": "p", "rejected": "a"}\n')
    with pytest.raises(data.UserError, match="train.jsonl:4: edited"):
        read_edits(folder)


def test_what_may_be_missing_may_be_empty(tmp_path):
    rows = read_edits(write(tmp_path, [GOOD | {"passages": "", "errors": None}]))["train"]
    assert rows[0]["passages"] == "" and rows[0]["errors"] == []


def test_limit_is_rows_a_split(tmp_path):
    assert [len(rows) for rows in read_edits(write(tmp_path, [GOOD] * 5), 3).values()] == [3, 3]


def test_pairs_of_the_hub_are_read_and_checked_like_those_of_a_file(monkeypatch):
    class Table(list):
        column_names = ["chosen", "rejected"]
    said = "Human: hi\n\nAssistant:"  # dialogues: the prompt is what both share
    rows = {split: Table([{"chosen": f"{said} good {split}", "rejected": f"{said} bad"}])
            for split in ("train", "test")}
    hub = SimpleNamespace(load_dataset=lambda name, config, split: rows[split])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    read = read_edits("hub:a/b")
    assert [read[split][0]["edited"] for split in ("train", "test")] == ["good train", "good test"]
    assert read["train"][0]["prompt"].endswith("Assistant:") and read["train"][0]["rejected"] == "bad"
    rows["test"].append({"chosen": "nothing", "rejected": "shared"})
    with pytest.raises(data.UserError, match="hub:a/b:test:2: prompt: expected str, got nothing"):
        read_edits("hub:a/b")


# ------------------------------------------------------------------------------------------------------- task


def make(folder, said=None, max_document=40, max_summary=12, guidance="token"):
    """The task of a folder, on bytes."""
    cfg = SimpleNamespace(data=folder, limit=0, tokenizer="byte", vocab_size=300, max_document=max_document,
                          max_summary=max_summary, guidance=guidance, seed=1, K=None, split_seed=1,
                          damage=None)
    return EditsTask(cfg, torch.device("cpu"), None, (lambda x: None) if said is None else said.append)


def texts(task, tokens, mask):
    return [task.tokenizer.decode(ids[:n]) for ids, n in zip(tokens.tolist(), mask.sum(1).tolist())]


@pytest.mark.parametrize("scores, worst", [
    ([3, 1, 2], " b"), ([1, 2, 0.5], " c"), ([2, 1, 1], " b"), ([0, 0, 0], " a")])
def test_the_starting_policy_imitates_the_worst_answer_of_a_ranking(tmp_path, scores, worst):
    task = make(write(tmp_path, [{"prompt": "p", "candidates": ["a", "b", "c"], "scores": scores}] * 2))
    for split in ("train", "test"):
        x = task.tensors[split]
        assert texts(task, x.reference, x.reference_mask) == [worst] * 2 and x.reference[0, 2] == task.eot
    tokens, _, preference, *_ = task.pairs("train")
    # all stay where they are
    assert tokens[0, :, 1].tolist() == [*b"abc"] and preference.tolist() == [scores] * 2
    assert task.better(task.rows["train"][0]) == "abc"[scores.index(max(scores))]


def test_pairs_begin_with_the_rejected_answer_and_every_split_reads_its_own_file(tmp_path):
    task = make(write(tmp_path, [GOOD] * 2, [{"prompt": "q", "rejected": "x", "edited": "y"}] * 2))
    for split, prompt, rejected, edited in (("train", " p", " a b", " a c"), ("test", " q", " x", " y")):
        x = task.tensors[split]
        assert texts(task, x.context, x.context_mask) == [prompt] * 2
        assert texts(task, x.reference, x.reference_mask) == [rejected] * 2
        assert x.reference[0, len(rejected)] == task.eot and x.reference_mask[0].sum() == len(rejected) + 1
        tokens, mask, preference, *_ = task.pairs(split)
        assert texts(task, tokens[0], mask[0]) == [rejected, edited] and preference.tolist() == [[0, 1]] * 2


@pytest.mark.parametrize("row, context, says", [
    ({"prompt": "tell me , who sat ?"}, " who sat ?", ["prompts", "start"]),
    ({"prompt": "who ?", "passages": "a cat sat"}, " who ? a c", ["prompts with passages", "end"]),
    ({"prompt": "tell me , who sat ?", "passages": "a cat sat"}, " who sat ?", ["prompts", "start"])])
def test_a_long_context_keeps_its_question(tmp_path, row, context, says):
    said = []
    task = make(write(tmp_path, [GOOD | row, GOOD], [GOOD]), said, max_document=10)
    x = task.tensors["train"]
    assert texts(task, x.context, x.context_mask) == [context, " p"]
    line = f"train: 1 of 2 {says[0]} are longer than 10 tokens and were cut at their {says[1]}"
    assert said[0] == line and not any("test:" in text for text in said)


def test_a_long_dialogue_keeps_its_last_turn(tmp_path):
    talk = "\n\nHuman: hi" + TURN + " hello\n\nHuman: why?" + TURN
    task = make(write(tmp_path, [{"chosen": talk + " because", "rejected": talk + " no"}] * 2),
                max_document=26)
    x = task.tensors["train"]
    assert texts(task, x.context, x.context_mask)[0] == ("o\n\nHuman: why?\n\nAssistant:"[-26:])


def test_errors_of_an_answer_are_marked_on_the_tokens_of_the_reference(tmp_path):
    row = GOOD | {"errors": [[2, 3, "kind"]]}  # the b of "a b"; bytes are " a b"
    task = make(write(tmp_path, [row] * 2, [row]))
    truth, x = task.true_errors("test"), task.tensors["test"]
    assert truth.int().tolist() == [[0, 0, 0, 1, *[0] * 8]] and x.reference[0, 3] == ord("b")
    knows = lambda sign: lambda tokens, prefix, mask: sign * (tokens == ord("b")).float()
    assert (task.judge_reward(knows(-1))["token_auroc"] == 1.0
            and task.judge_reward(knows(1))["token_auroc"] == 0.0)
    assert task.judge_reward(knows(0))["token_auroc"] == 0.5


def test_with_more_answers_the_same_requests_are_ranked_by_their_errors():
    pairs, rows = embedded_world(0, 40, 10)["train"], embedded_world(0, 40, 10, answers=4)["train"]
    ids, close = {word: i for i, word in enumerate(world_words())}, 0
    for pair, row in zip(pairs, rows):
        assert {k: row[k] for k in pair} == pair and row["form"] == "rankings"
        texts = row["candidates"]
        assert texts[:2] == [pair["rejected"], pair["edited"]] and len(texts) == len(row["scores"]) == 4
        distance = [edit_distance(*([ids[w] for w in t.split()] for t in (text, pair["edited"])))
                    for text in texts]
        # one wrong word, one edit, but where a clause holds the word that a slot lacks
        assert all(d <= -score for d, score in zip(distance, row["scores"]))
        assert distance[1] == row["scores"][1] == 0 and row["scores"][0] == -len(row["errors"])
        close += sum(d == -score for d, score in zip(distance, row["scores"]))
    assert close > 0.9 * 4 * 40
    assert len({row["candidates"][2] for row in rows}) > 30


def task_of(*typed):
    c, _ = parse_flags(train.Flags, ["--task", "edits", *typed], "")
    return EditsTask(c, "cpu", lambda *x: None, lambda line: None), c


def test_four_answers_are_ranked_together_or_two_by_two(monkeypatch):
    monkeypatch.setattr(tasks.edits, "embedded_world",
                        lambda seed, answers, world=embedded_world: world(seed, 40, 10, answers))
    (two, c2), (four, c4) = task_of(), task_of("--answers", "4")
    assert (c2.K, c2.guidance, c4.K, c4.guidance) == (2, "edits", 4, "token")
    assert task_of("--answers", "4", "--K", "2")[1].K == 2
    assert four.pairs("train")[0].shape[:2] == (40, 4) and two.pairs("train")[0].shape[:2] == (40, 2)
    for a, b in ((two, four), (four, two)):  # both policies begin with the rejected answers
        assert torch.equal(a.tensors["train"].reference, b.tensors["train"].reference)
        assert torch.equal(a.true_errors("test"), b.true_errors("test"))
    assert [two.better(row) for row in two.rows["test"]] == [four.better(row) for row in four.rows["test"]]
    with pytest.raises(UserError, match="got rankings"):
        task_of("--answers", "4", "--guidance", "edits")


def test_samples_show_the_worst_the_better_and_a_new_answer(tmp_path):
    task = make(write(tmp_path, [{"prompt": "p", "candidates": ["a", "b", "c"], "scores": [1, 0, 2]}] * 2))
    policy = tiny(vocab_size=task.tokenizer.size, n_ctx=task.context)
    x = task.samples(policy, seeded())
    assert (texts(task, x.tokens[0, :2], x.mask[0, :2]) == [" b", " c"]
            and x.preference[0, :2].tolist() == [-1, 0])
    assert x.roles == [["worse", "better", "sampled"]] * 2 and x.errors is None  # nobody marked any


def test_win_rate_counts_better_answers_and_ties_half(tmp_path):
    task = make(write(tmp_path, [GOOD] * 2))
    task.start_scores = [-3.0, -1.0, -2.0, -2.0]
    task.sampled = lambda policy: torch.tensor([-1.0, 0.0, -2.0, -4.0])  # better, better, equal, worse
    assert task.evaluate(None, None) == {"win_rate": 0.625, "edits_left": 1.75, "start_edits_left": 2.0}
