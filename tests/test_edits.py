"""task_edits.py and the label loss of reward.py: alignments by hand and against enumeration, the world's promises."""
import itertools
import json
import random

import pytest
import torch
from reference import mask_of, seeded, tiny

import data
from reward import Candidates, TokenReward, label_loss
from task_edits import auroc, edit_distance, edit_labels, embedded_world, read_edits, world_words


def brute_distance(a, b):
    """The definition, by recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(brute_distance(a[1:], b) + 1, brute_distance(a, b[1:]) + 1, brute_distance(a[1:], b[1:]) + (a[0] != b[0]))


# --------------------------------------------------------------------------------------------------------------- E17

@pytest.mark.parametrize("rejected, edited, labels", [
    ([1, 2, 3], [1, 4, 3], ([0, -1, 0], [0, 1, 0])),              # a substitution
    ([1, 2, 3], [1, 3], ([0, -1, 0], [0, 0])),                    # a deletion
    ([1, 3], [1, 2, 3], ([0, 0], [0, 1, 0])),                     # an insertion
    ([1, 2], [1, 2], ([0, 0], [0, 0])),                           # nothing changed
    ([], [5], ([], [1])), ([5], [], ([-1], [])), ([], [], ([], [])),
    ([1, 2, 3], [4, 5], ([-1, -1, -1], [1, 1])),                  # nothing kept
    ([1, 1], [1], ([0, -1], [0])),                                # a tie: equal tokens at the beginning are kept first
    ([1, 2, 3, 4, 5], [1, 3, 9, 5], ([0, -1, 0, -1, 0], [0, 0, 1, 0])),
])
def test_labels_by_hand(rejected, edited, labels):
    assert edit_labels(rejected, edited) == labels


def test_labels_are_a_shortest_alignment():
    for a, b in itertools.product([list(x) for n in range(5) for x in itertools.product(range(2), repeat=n)], repeat=2):
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


# ------------------------------------------------------------------------------------------------------------- AUROC

def test_auroc_by_hand():
    assert auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert auroc([1, 1, 1], [True, False, False]) == 0.5  # ties count half
    assert auroc([1, 2], [False, True]) == 1.0 and auroc([1.0], [True]) == 0.5


# -------------------------------------------------------------------------------------------------------- label loss

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
    changed = [-(1 - p[0, 0, 0]).log(), -(1 - p[0, 0, 3]).log(), -p[0, 1, 0].log(), -p[1, 1, 0].log(), -p[1, 1, 1].log()]
    kept = (x.labels == 0) & x.mask
    neutral = -0.5 * (p[kept].log() + (1 - p[kept]).log())
    torch.testing.assert_close(label_loss(net, x), torch.stack(changed).mean() + 0.1 * neutral.mean())


def test_padding_changes_no_label_loss():
    net, x = labelled()
    wide = x.map(lambda t: torch.nn.functional.pad(t, (0, 2)) if t.dim() == 3 else t)
    torch.testing.assert_close(label_loss(net, wide), label_loss(net, x))


# ------------------------------------------------------------------------------------------------------------- world

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
    assert same > 0.95 * len(rows)  # a clause that holds the right word by chance allows another edit, as short
    assert embedded_world(0, 300, 10)["train"] == rows and embedded_world(1, 300, 10)["train"] != rows


def test_every_word_of_the_world_is_in_its_list():
    words = set(world_words())
    for row in embedded_world(0, 300, 10)["train"]:
        assert set((row["prompt"] + " " + row["rejected"] + " " + row["edited"]).split()) <= words


# --------------------------------------------------------------------------------------------------------- bad input

def write(folder, rows, other=None):
    for split, x in (("train", rows), ("test", other or rows)):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, x)) + "\n")
    return str(folder)


GOOD = {"prompt": "p", "rejected": "a b", "edited": "a c"}


@pytest.mark.parametrize("row, says", [
    ({"prompt": "p", "rejected": "a"}, "2: edited"), ({"prompt": "p", "rejected": "a", "edited": ""}, "2: edited"),
    ({"prompt": "p", "rejected": "a", "edited": 3}, "2: edited"),
    ({"rejected": "a b", "edited": "a c"}, "2: prompt"), ({"prompt": "p", "candidates": ["a"], "scores": [1]}, "2: cand"),
    ({"prompt": "p", "candidates": ["a", "b"], "scores": [1]}, "2: candidates"),
    ({"prompt": "p", "candidates": ["a", "b"], "scores": ["x", 1]}, "2: candidates"),
])
def test_bad_rows_name_the_line_and_the_field(tmp_path, row, says):
    with pytest.raises(data.UserError, match=says):
        read_edits(write(tmp_path, [GOOD, row]))


def test_edits_that_change_nothing_are_counted_and_left_out(tmp_path):
    splits = read_edits(write(tmp_path, [GOOD, {"prompt": "p", "rejected": "a", "edited": "a"}]))
    assert [len(rows) for rows, _ in splits.values()] == [1, 1] and [same for _, same in splits.values()] == [1, 1]


def test_pairs_without_edits_are_read_as_edits(tmp_path):
    rows, _ = read_edits(write(tmp_path, [{"prompt": "p", "chosen": "a c", "rejected": "a b"}]))["train"]
    assert rows[0]["edited"] == "a c" and rows[0]["rejected"] == "a b"


def test_dialogues_without_a_prompt_are_split_at_the_last_turn_they_share(tmp_path):
    talk = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    rows, _ = read_edits(write(tmp_path, [{"chosen": talk + " because", "rejected": talk + " be off"}]))["train"]
    assert (rows[0]["prompt"], rows[0]["edited"], rows[0]["rejected"]) == (talk, "because", "be off")


def test_blank_lines_do_not_shift_the_line_of_a_message(tmp_path):
    folder = write(tmp_path, [GOOD])
    with open(f"{folder}/train.jsonl", "a") as f:
        f.write('\n\n{"prompt": "p", "rejected": "a"}\n')
    with pytest.raises(data.UserError, match="train.jsonl:4: edited"):
        read_edits(folder)


def test_what_may_be_missing_may_be_empty(tmp_path):
    rows, _ = read_edits(write(tmp_path, [GOOD | {"passages": "", "errors": None}]))["train"]
    assert rows[0]["passages"] == "" and rows[0]["errors"] == []


def test_limit_is_rows_a_split(tmp_path):
    assert [len(rows) for rows, _ in read_edits(write(tmp_path, [GOOD] * 5), 3).values()] == [3, 3]
