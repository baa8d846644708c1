"""Edits out of any text (--damage): what is replaced, by what, and that the test set is of other
documents."""
import json
import random

import pytest
import torch

import data
import train
from tasks.damage import damage, damaged_edits, damaged_rows, sentences
from tasks.edits import EditsTask

WORDS = "river garden table window candle basket bottle ladder mirror pencil carpet hammer".split()


def story(seed, n=6):
    """n sentences of eight words."""
    rng = random.Random(seed)
    return " ".join(" ".join(rng.sample(WORDS, 8)).capitalize() + "." for _ in range(n))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story(i)}) + "\n" for i in range(40)))
    return path


def test_wrong_words_come_from_the_same_place_of_another_sentence_and_are_new_to_it():
    words, other = "the old man sat by 7 rivers".split(), "our young queen sat in 9 hotels".split()
    seen = set()
    for seed in range(50):
        wrong, places = damage(words, other, random.Random(seed))
        assert 1 <= len(places) <= 3 and places == sorted(set(places))
        assert [i for i, (a, b) in enumerate(zip(words, wrong)) if a != b] == places
        assert all(wrong[i] == other[i] for i in places)
        seen.update(places)
    assert seen == {0, 1, 2, 6}  # neither equal words nor numbers nor words of two letters


@pytest.mark.parametrize("other", [[], ["a", "b"], "the old man".split(), "man the old".split(),
                                   "1 2 3".split()])
def test_a_sentence_without_a_place_to_damage_is_left_out(other):
    assert damage("the old man".split(), other, random.Random(0)) is None


def test_errors_are_the_characters_of_the_wrong_words():
    rows = damaged_rows(sentences([{"text": story(1, 30)}]), 20, random.Random(0))
    assert len(rows) == 20
    for row in rows:
        right, wrong = row["edited"].split(), row["rejected"].split()
        assert [row["rejected"][a:b] for a, b, _ in row["errors"]] == [
            y for x, y in zip(right, wrong) if x != y]
        assert len(right) == len(wrong) and row["prompt"] != row["edited"]


def test_sentences_follow_the_one_before_them_and_have_five_to_forty_words():
    text = "A b c d e. One two three four five! Short. " + "w " * 41 + ". Last but by no means least."
    found = list(sentences([{"text": text}, {"text": "Other text that stands alone."}]))
    assert found == [("A b c d e.", "One two three four five!")]


def test_the_test_set_is_of_documents_that_nobody_is_trained_on(file, tmp_path):
    said = []
    rows = damaged_edits(str(file), 0, 1, tmp_path / "cache", say=said.append)
    assert said == [f"{file}: train {len(rows['train'])} damaged sentences, test {len(rows['test'])} damaged "
                    f"sentences"]
    texts = {split: {x for row in part for x in (row["prompt"], row["edited"])}
             for split, part in rows.items()}
    assert not texts["train"] & texts["test"] and len(rows["train"]) > 5 * len(rows["test"]) > 0
    again = lambda limit, seed: damaged_edits(str(file), limit, seed, tmp_path / "cache", say=said.append)
    assert rows == again(0, 1) != again(0, 2)
    assert [len(x) for x in again(3, 1).values()] == [3, 3]


def test_a_text_without_two_sentences_in_a_row_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(9)))
    with pytest.raises(data.UserError, match="train: expected sentences of 5 to 40 words that follow"):
        damaged_edits(str(path), 0, 1, tmp_path / "cache")


def test_damaged_text_is_a_task_of_edits_whose_errors_are_known(file, tmp_path):
    c = train.parse_flags(train.Flags, ["--task", "edits", "--damage", str(file), "--vocab_size", "300",
                                        "--cache_dir", str(tmp_path / "cache"), "--threads", "1"], "")[0]
    task = EditsTask(c, torch.device("cpu"), None, lambda line: None)
    assert task.real and c.guidance == "edits" and c.data == str(file)
    truth, x = task.true_errors("test"), task.tensors["test"]
    assert truth.any(1).all() and not (truth & ~x.reference_mask).any()
    labels = task.pairs("test")[5][:, 0] == -1  # what the edit takes out of the rejected answer
    assert (truth & labels).any(1).all()


@pytest.mark.parametrize("typed, says", [
    (("--damage", "x", "--data", "y", "--task", "edits"), "--damage and --data: expected one of them"),
    (("--damage", "x"), "--damage x: task prompt learns from no edits"),
    (("--damage", "nowhere", "--task", "edits"), "nowhere: expected a file, a folder or hub:<id>[:config]")])
def test_damage_of_the_wrong_kind_is_one_line(typed, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leave:
        train.main(list(typed))
    assert leave.value.code == 2 and says in capsys.readouterr().err
