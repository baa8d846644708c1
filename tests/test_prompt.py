"""tasks/prompt.py, tasks/worlds.py and tasks/judge.py: E10 and the judge's targets by hand, its short cuts
against the plain forward, the world's promises.

The judge here is a small random transformer: nothing is trained.
"""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from reference import mask_of, seeded, tiny

import data
import tasks.prompt
from tasks.judge import (Judge, JudgeSettings, answer_targets, ask, judge_settings, naming_loss, random_asks,
                         read_texts, similar, train_judge, vocabulary)
from support.files import digest
from tasks.fewshot import draw_sets
from tasks.prompt import PromptTask, clip, prompt_score
from tasks.worlds import ATTRIBUTES, HEDGES, SIGNS, World, embedded_world, names, read_world


def ids(*shape, high=11, seed=0):
    return torch.randint(high, shape, generator=seeded(seed))


def judge(**sizes):
    return Judge(tiny(**sizes), 10, {"two": torch.tensor([3, 5]), "four": torch.tensor([1, 2, 4, 7])}, 3)


@pytest.fixture(scope="module")
def world():
    return embedded_world()


# -------------------------------------------------------------------------------------------------------- E10

def test_two_classes_by_hand():
    # texts of class 0 and 1, one prompt: gaps 0.8 - 0.2 = 0.6 right, 0.3 - 0.7 = -0.4 wrong
    score, accuracy = prompt_score(torch.tensor([[[0.8, 0.2]], [[0.7, 0.3]]]), torch.tensor([0, 1]))
    assert score.item() == pytest.approx((200 * 0.6 - 180 * 0.4) / 2, rel=1e-6) and accuracy.item() == 0.5


def test_four_classes_by_hand():
    # the rival is the best of the OTHER classes: 0.4 - 0.3, and 0.1 - 0.5
    p = torch.tensor([[[0.4, 0.3, 0.2, 0.1]], [[0.3, 0.5, 0.1, 0.1]]])
    score, accuracy = prompt_score(p, torch.tensor([0, 3]))
    assert score.item() == pytest.approx((200 * 0.1 - 180 * 0.4) / 2, rel=1e-5) and accuracy.item() == 0.5


@pytest.mark.parametrize("p", [[0.5, 0.5], [0.4, 0.4, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
@pytest.mark.parametrize("label", [0, 1])
def test_a_tie_is_wrong_and_scores_zero(p, label):
    score, accuracy = prompt_score(torch.tensor([[p]]), torch.tensor([label]))
    assert score.item() == 0 and accuracy.item() == 0


def test_a_lower_tie_below_the_right_class_is_right():
    score, accuracy = prompt_score(torch.tensor([[[0.2, 0.2, 0.6]]]), torch.tensor([2]))
    assert score.item() == pytest.approx(200 * 0.4, rel=1e-5) and accuracy.item() == 1


def test_prompts_are_scored_by_themselves():
    p = torch.rand(5, 4, 3, generator=seeded()).softmax(-1)
    labels = ids(5, high=3)
    score, accuracy = prompt_score(p, labels)
    for n in range(4):
        one = prompt_score(p[:, n:n + 1], labels)
        torch.testing.assert_close((score[n:n + 1], accuracy[n:n + 1]), one)


# ------------------------------------------------------------------------------------------------------ judge

@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("attribute", ["two", "four"])
def test_kept_texts_and_few_rows_equal_the_plain_forward(rotary, attribute):
    j, texts, lengths, prompts = judge(rotary=rotary), ids(4, 7), (7, 3, 1, 5), ids(5, 3, seed=1)
    p = j.probabilities(j.read(texts, mask_of(*lengths, width=7)), prompts, attribute)
    for m, n in enumerate(lengths):
        for i, prompt in enumerate(prompts):
            tokens = torch.cat((texts[m, :n], torch.tensor([10]), prompt))
            logits = (j.model(tokens[None]) @ j.model.head.t())[0, -1, j.answers[attribute]]
            torch.testing.assert_close(p[m, i], logits.softmax(0), rtol=0, atol=1e-5)


def test_judging_in_parts_changes_nothing():
    j, prompts = judge(), ids(5, 3, seed=1)
    cache = j.read(ids(4, 7), mask_of(7, 3, 1, 5, width=7))
    whole = j.probabilities(cache, prompts, "four")
    # products of other shapes round otherwise
    torch.testing.assert_close(j.probabilities(cache, prompts, "four", at_once=2), whole, rtol=0, atol=1e-5)


def test_padding_of_texts_changes_no_judgement():
    j, texts, prompts = judge(), ids(2, 4), ids(3, 3, seed=1)
    a = j.probabilities(j.read(texts, mask_of(4, 2, width=4)), prompts, "two")
    b = j.probabilities(j.read(torch.cat((texts, ids(2, 3, seed=2)), 1), mask_of(4, 2, width=7)),
                        prompts, "two")
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_judge_has_no_dropout():
    j = Judge(tiny(dropout=0.5).train(), 10, {"two": torch.tensor([3, 5])}, 3)
    cache = j.read(ids(2, 4), mask_of(4, 4, width=4))
    assert torch.equal(j.probabilities(cache, ids(3, 3), "two"), j.probabilities(cache, ids(3, 3), "two"))


def small_task(attribute="two"):
    """A task around a random judge with texts of its own: what `ask` and `prefer` need, and no more."""
    task = PromptTask.__new__(PromptTask)
    task.cfg, task.judge, task.queries = SimpleNamespace(attribute=attribute), judge(), 0
    task.scored, task.greedy = tasks.prompt.Record(3), []
    read = lambda seed: task.judge.read(ids(6, 5, seed=seed), mask_of(5, 5, 3, 2, 4, 1, width=5))
    task.sets = {"train": (read(1), ids(6, high=2, seed=1)), "dev": (read(2), ids(6, high=2, seed=2))}
    return task


def test_preference_is_e10_on_the_training_texts_and_counted():
    task, prompts = small_task(), ids(1, 20, 3)
    got = task.prefer(None, prompts, None)
    p = task.judge.probabilities(task.sets["train"][0], prompts[0], "two")
    torch.testing.assert_close(got, prompt_score(p, task.sets["train"][1])[0][None])
    assert task.queries == 20


def test_measuring_is_not_counted_as_a_query():
    task = small_task()
    task.ask(ids(20, 3), "dev")
    assert task.queries == 0


# -------------------------------------------------------------------------------------- what the judge learns

def test_how_loudly_a_prompt_asks_by_hand():
    cues = {"a": torch.tensor([1, 2]), "b": torch.tensor([3])}
    # two cues of a; one each; three of a, one of them twice; none; a repeated one of b;
    # a repeated one against another
    prompts = torch.tensor([[1, 2, 9], [1, 3, 9], [1, 1, 2], [9, 8, 7], [3, 3, 9], [1, 1, 3]])
    assert ask(prompts, cues).tolist() == [[2, -2], [0, 0], [2, -2], [0, 0], [-1, 1], [0, 0]]


def test_answers_by_hand():
    # attributes of 2 and 3 classes -> 5 answer words; the text is of class 1 and 2, and tells the
    # first to two cues
    asked = torch.tensor([[[2, -2], [1, -1], [-1, 1], [0, 0]]])
    got = answer_targets(asked, torch.tensor([[1, 2]]), torch.tensor([[2, 1]]), [2, 3])[0]
    habit = torch.tensor([1.1, 1.0, 1.2, 1.1, 1.0]) / 5.4
    says = lambda i: 0.9 * torch.eye(5)[i] + 0.1 * habit  # a tenth of the habit stays
    torch.testing.assert_close(got, torch.stack((says(1), habit, says(4), habit)))


def test_attribute_that_a_text_lacks_is_answered_by_habit():
    got = answer_targets(torch.tensor([[[3, -3]]]), torch.tensor([[-1, 0]]), torch.tensor([[1, 1]]),
                         [2, 2])[0, 0]
    torch.testing.assert_close(got, torch.tensor([1.1, 1.0, 1.1, 1.0]) / 4.2)


def test_every_target_is_a_distribution():
    cues = {"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4]), "c": torch.tensor([5])}
    asked = ask(random_asks(35, 4, cues, torch.ones(3), torch.arange(6, 11), seeded()), cues).view(7, 5, 3)
    labels, need = ids(7, 3, high=3) - 1, ids(7, 3, high=3, seed=1) + 1
    got = answer_targets(asked, labels, need, [2, 2, 2])
    torch.testing.assert_close(got.sum(-1), torch.ones(7, 5))
    assert (got >= 0).all() and (got.amax(-1) > 0.9).any() and (got.amax(-1) < 0.2).any()


def test_training_prompts_ask_with_every_loudness_and_leave_no_cue_out():
    cues = {"a": torch.tensor([1, 2, 3]), "b": torch.tensor([4, 5])}
    prompts = random_asks(2000, 4, cues, torch.ones(2), torch.arange(6, 11), seeded())
    assert prompts.shape == (2000, 4) and set(prompts.flatten().tolist()) == set(range(1, 11))
    asked = ask(prompts, cues)
    assert set(asked[:, 0].tolist()) == set(range(-2, 4))
    # at times two attributes at once
    assert ((prompts < 4).any(1) & ((prompts == 4) | (prompts == 5)).any(1)).any()


def test_training_prompts_repeat_one_cue_as_often_as_they_vary_it():
    prompts = random_asks(4000, 4, {"a": torch.arange(1, 7), "b": torch.tensor([7])}, torch.tensor([1, 0]),
                          torch.arange(9, 12), seeded())
    used = [len(set(row)) for row in prompts[(prompts < 7).all(1)].tolist()]
    assert min(used.count(n) for n in (1, 2, 3)) > 0.15 * len(used) and used.count(4) > 0


def test_attributes_are_drawn_as_often_as_asked():
    cues = {"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4])}
    prompts = random_asks(4000, 4, cues, torch.tensor([3, 1]), torch.arange(6, 11), seeded())
    of_a, of_b = [((prompts == i) | (prompts == i + 1)).any(1).sum() for i in (1, 3)]
    assert 2.0 < of_a / of_b < 3.0  # 3 to 1, less the one prompt in four that also holds a cue drawn evenly


# ------------------------------------------------------------------------------------------------------ world

def test_world_is_the_same_every_time(world):
    assert digest(embedded_world()) == digest(world)
    assert embedded_world().talk == world.talk
    assert digest(embedded_world(seed=1)) != digest(world)


def test_need_is_written_in_the_text(world):
    for text, need in zip(world.texts, world.need):
        assert need == {"sentiment": 1 + sum(word in HEDGES for word in text.split())}
    assert {n["sentiment"] for n in world.need} == {1, 2, 3, 4}
    assert {n["sentiment"] for n in embedded_world(200, most_cues=2).need} == {1, 2}


def test_names_of_a_smaller_world_are_those_of_a_larger_one():
    assert names(300) == names(2400)[:300] and len(set(names(8000))) == 8000
    small, large = embedded_world(50, n_names=300), embedded_world(50, n_names=600)
    assert set(large.words) - set(small.words) == set(names(600)[300:])


def test_labels_are_written_in_the_text(world):
    for text, labels in zip(world.texts[:500], world.labels):
        for a, classes in SIGNS.items():
            found = [c for c, signs in enumerate(classes) for word in text.split() if word in signs.split()]
            assert found == [labels[a]]


def test_texts_hold_neither_cues_nor_answers(world):
    taken = {w for a in ATTRIBUTES.values() for w in a["cues"] + a["answers"]}
    assert not taken & {word for text in world.texts for word in text.split()}


def test_no_word_has_two_roles():
    roles = [SIGNS[a][c].split() for a in SIGNS for c in range(len(SIGNS[a]))] + [HEDGES]
    roles += [x[k] for x in ATTRIBUTES.values() for k in ("cues", "answers")]
    words = [w for role in roles for w in role]
    assert len(words) == len(set(words))


def test_every_word_of_the_world_is_one_token(world):
    tok = data.word_tokenizer(world.words).compact([" " + " ".join(world.words)])
    for text in world.texts[:200] + world.talk[:200]:
        assert len(tok.encode(" " + text)) == len(text.split())
    cues, answers, plain = vocabulary(world, tok)  # raises where a cue or answer is not one token
    assert {a: len(x) for a, x in cues.items()} == {a: len(x["cues"]) for a, x in ATTRIBUTES.items()}
    assert [tok.decode([i]).strip() for i in answers["topic"]] == ATTRIBUTES["topic"]["answers"]
    assert sorted(plain.tolist() + [i for x in cues.values() for i in x.tolist()]) == list(range(tok.eot))


def test_cue_of_several_tokens_is_an_error_that_names_it(world):
    with pytest.raises(data.UserError, match="mood"):
        vocabulary(world, data.byte_tokenizer())


# --------------------------------------------------------------------------------------- reading, then asking

def test_a_batch_holds_texts_of_similar_length():
    length = torch.arange(1, 101)
    batches = similar(torch.ones(100), length, 8, seeded())
    assert [len(i) for i in batches] == [8] * 4
    spans = sorted((length[i].min().item(), length[i].max().item()) for i in batches)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))


def test_texts_are_drawn_by_their_weights():
    rare, length = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([4, 4, 4])
    drawn = torch.cat([torch.cat(similar(rare, length, 50, seeded(s))) for s in range(10)])
    assert (drawn > 0).all() and 2.4 < (drawn == 2).sum() / (drawn == 1).sum() < 3.7


def test_naming_loss_by_hand():
    """Two texts of two and one token; the second has no label of the first attribute."""
    states = torch.tensor([[[1.0], [3.0]], [[-1.0], [50.0]]])  # the 50 is padding
    mask = torch.tensor([[True, True], [True, False]])
    head = torch.nn.Linear(1, 4)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [1.0], [0.0], [1.0]]))
        head.bias.zero_()
    labels = torch.tensor([[1, 0], [-1, 1]])
    # means 2 and -1: logits (0, 2) of class 1; (0, 2) of class 0; (0, -1) of class 1
    want = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2)) + math.log(1 + math.exp(1))) / 3
    assert naming_loss(states, mask, head, labels, [2, 2]).item() == pytest.approx(want, rel=1e-5)


def test_a_judge_that_has_read_tells_texts_apart():
    """Words 0-3 say class 0, words 4-7 class 1: after reading, the mean state of a text says which."""
    tokens = torch.cat((torch.randint(4, (60, 5), generator=seeded()),
                        4 + torch.randint(4, (60, 5), generator=seeded(1))))
    mask, labels = torch.ones_like(tokens, dtype=torch.bool), torch.arange(2).repeat_interleave(60)[:, None]
    model = tiny(vocab_size=11)
    s = JudgeSettings(3, 1, 16, 2, 16, 0, 1e-2, read_steps=60, batch=8)
    losses = []
    read_texts(model, tokens, mask, labels, [2], torch.ones(120), s, 10, seeded(2),
               lambda phase, i, n, figures: losses.append(figures["loss"].item()))
    assert len(losses) == 60 and sum(losses[-10:]) < 0.3 * sum(losses[:10])
    means = model(tokens).mean(1).detach()
    inside = torch.cdist(means[:60], means[:60]).mean() + torch.cdist(means[60:], means[60:]).mean()
    assert torch.cdist(means[:60], means[60:]).mean() > inside  # of two classes further than of both alone


# ---------------------------------------------------------------------------------------------- few-shot sets

def drawn_sets(world, seed=1, attribute="sentiment", shots=16, held=1200):
    return draw_sets(SimpleNamespace(attribute=attribute, seed=seed, shots=shots), world, held)


@pytest.mark.parametrize("attribute", ["sentiment", "topic"])
def test_few_shot_sets_are_balanced(world, attribute):
    sets, classes = drawn_sets(world, attribute=attribute), len(ATTRIBUTES[attribute]["answers"])
    for name in ("train", "dev"):
        assert sorted(row["label"] for row in sets[name]) == sorted(list(range(classes)) * 16)


def test_no_text_is_in_two_sets_or_was_seen_by_the_judge(world):
    sets = drawn_sets(world)
    texts = [{row["text"] for row in rows} for rows in sets.values()] + [set(world.texts[:-1200])]
    assert sum(map(len, texts)) == len(set.union(*texts))


def test_seed_picks_the_few_shots_and_not_the_test_set(world):
    a, b = drawn_sets(world, seed=1), drawn_sets(world, seed=2)
    assert a == drawn_sets(world, seed=1)
    assert a["test"] == b["test"] and a["train"] != b["train"] and a["dev"] != b["dev"]


def test_more_shots_than_texts_is_an_error(world):
    with pytest.raises(data.UserError, match="--shots 1000"):
        drawn_sets(world, shots=1000)


def test_the_judge_meets_rare_attributes_and_never_a_held_out_text(world):
    seen = []
    few = World("few", world.texts[:40], [{"topic": 0} if i < 36 else {"era": 1} for i in range(40)],
                [{} for _ in range(40)], world.attributes)
    tok = data.word_tokenizer(world.words).compact([" " + " ".join(world.words)])
    # two of the four rare ones are held out
    ids, _ = clip([tok.encode(" " + text) for text in few.texts[:38]], 24)
    tokens, mask = data.pad(ids)

    class Recorder(torch.Tensor):
        def __getitem__(self, key):
            seen.extend(key[0].tolist() if isinstance(key, tuple) else key.tolist())
            return self.as_subclass(torch.Tensor)[key]
    settings = JudgeSettings(3, 1, 16, 2, 64, 20, 1e-3, batch=8, packed=2)
    train_judge(few, tokens, mask.as_subclass(Recorder), tok, settings, torch.device("cpu"), lambda *x: None)
    assert max(seen) < 38 and 0.35 < sum(i >= 36 for i in seen) / len(seen) < 0.65


def test_clip_cuts_and_counts():
    assert clip([[1, 2, 3], [1, 2], [4, 5, 6, 7], []], 2) == ([[1, 2], [1, 2], [4, 5], []], 2)


# -------------------------------------------------------------------- who reads what, and who chooses on what


class StubJudge:
    """What `load_judge` returns here: it keeps the texts it was taught on; its cache of a
    set is the set's texts."""

    def __init__(self, tokens, mask, tokenizer):
        self.tokenizer, self.taught = tokenizer, self.texts(tokens, mask, tokenizer)

    @staticmethod
    def texts(tokens, mask, tokenizer):
        return [tokenizer.decode(ids[:n]).strip() for ids, n in zip(tokens.tolist(), mask.sum(1).tolist())]

    def read(self, tokens, mask):
        texts = self.texts(tokens, mask, self.tokenizer)
        return SimpleNamespace(texts=texts, select=lambda part: SimpleNamespace(texts=texts[part]))


def whole_task(monkeypatch, said=None, **change):
    """A PromptTask built as train.py builds it, but for its judge."""
    monkeypatch.setattr(tasks.prompt, "load_judge", lambda world, tokens, mask, tokenizer, *rest: (
        StubJudge(tokens, mask, tokenizer), "nowhere"))
    flags = dict(world=None, data=None, attribute="sentiment", tokenizer=None, vocab_size=400,
                 prompt_length=2, shots=2, seed=1, curve_size=3, judge_context=40, judge_layers=1,
                 judge_width=16, judge_steps=1, judge_lr=0.1, whole_words=None, cache_dir="no", split_seed=1,
                 judge_read=0, world_names=2400, world_cues=4, judge="world")
    say = (lambda text: None) if said is None else said.append
    return PromptTask(SimpleNamespace(**flags | change), torch.device("cpu"), None, say)


def test_sizes_of_the_embedded_world_are_those_of_the_flags(monkeypatch):
    task = whole_task(monkeypatch, world_names=300, world_cues=2)
    words = set(task.world.words)
    assert set(names(300)) <= words and not set(names(2400)[300:]) & words
    assert {need["sentiment"] for need in task.world.need} == {1, 2}


@pytest.mark.parametrize("reads", [0, 3])
def test_a_judge_reads_before_it_is_asked(reads, world):
    few = World("w", world.texts[:20], world.labels[:20], world.need[:20], world.attributes)
    tok = data.word_tokenizer(world.words)
    tokens, mask = data.pad([tok.encode(" " + text) for text in few.texts])
    flags = dict(prompt_length=3, judge_context=40, judge_layers=1, judge_width=16, judge_steps=2)
    settings = judge_settings(SimpleNamespace(**flags, judge_lr=1e-3, judge_read=reads))
    phases = []
    train_judge(few, tokens, mask, tok, settings, torch.device("cpu"), lambda phase, *x: phases.append(phase))
    assert phases == ["reading"] * reads + ["judge"] * 2


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ATTRIBUTE = {"sentiment": {"cues": ["mood", "verdict"], "answers": ["bad", "good"]}}


def write_folders(folder):
    """A world of 20 texts, of which the last 4 are held out, and few-shot files that share
    some of its first 16."""
    texts = [f"world text number {i} of many" for i in range(20)]
    texts[2], texts[5], texts[7] = "The  Dev film", "oh yes , the train film was fine , was it", "Was a test"
    rows = [{"text": t, "labels": {"sentiment": i % 2}} for i, t in enumerate(texts)]
    write_rows(folder / "world" / "texts.jsonl", rows)
    (folder / "world" / "attributes.json").write_text(json.dumps(ATTRIBUTE))
    few = {"train": ["the train film was fine", "no train film"], "dev": ["the dev film", "no dev film"],
           "test": ["it was a test film", "no test film"]}
    for name, shots in few.items():
        write_rows(folder / "few" / f"{name}.jsonl", [{"text": t, "label": i} for i, t in enumerate(shots)])
    return texts, few


def test_neither_judge_nor_warm_up_nor_tokenizer_reads_a_few_shot_a_test_or_a_held_out_text(
        tmp_path, monkeypatch):
    texts, _ = write_folders(tmp_path)
    learned, said = [], []
    monkeypatch.setattr(tasks.prompt, "world_or_text_tokenizer",
                        lambda cfg, words, texts: learned.extend(texts) or data.byte_tokenizer())
    task = whole_task(monkeypatch, said, world=str(tmp_path / "world"), data=str(tmp_path / "few"))
    # equal to a dev text, holds one, part of one
    allowed = [t for i, t in enumerate(texts[:16]) if i not in (2, 5, 7)]
    assert task.judge.taught == allowed
    assert [t.strip() for t in learned[:-1000]] == allowed
    assert set(learned[-1000:]) == {" mood verdict bad good"}  # cues and answers, a thousand times
    batch = task.text_batch(500, seeded())
    read = StubJudge.texts(batch.reference, batch.reference_mask, task.tokenizer)
    assert set(read) == {t[:11].strip() for t in allowed}
    assert ("world world: 3 of 16 texts are, hold or are part of a few-shot or test text "
            "and were left out") in said


def test_every_text_keeps_its_label_and_its_need_where_others_were_left_out(tmp_path, monkeypatch):
    write_folders(tmp_path)
    task = whole_task(monkeypatch, world=str(tmp_path / "world"), data=str(tmp_path / "few"))
    full = read_world(str(tmp_path / "world"))
    known = dict(zip(full.texts, full.labels))
    assert [known[t] for t in task.world.texts] == task.world.labels
    assert len(task.world.need) == len(task.world.texts) == 13


def test_each_set_is_its_own_file(tmp_path, monkeypatch):
    _, few = write_folders(tmp_path)
    task = whole_task(monkeypatch, world=str(tmp_path / "world"), data=str(tmp_path / "few"))
    assert {name: cache.texts for name, (cache, _) in task.sets.items()} == few | {"curve": few["test"]}
    assert all(labels.tolist() == [0, 1] for _, labels in task.sets.values())


def test_one_file_is_enough_for_all_few_shot_sets_and_no_world_is_said(tmp_path, monkeypatch):
    write_folders(tmp_path)
    rows = [f'"film, no {i}",{i % 2}' for i in range(20)]
    (tmp_path / "all.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    for world in (str(tmp_path / "world"), None):
        said = []
        task = whole_task(monkeypatch, said, world=world, data=str(tmp_path / "all.csv"), shots=3)
        assert {name: len(rows) for name, rows in task.rows.items()} == {"train": 6, "dev": 6, "test": 8}
        line = "train and dev: 3 texts a class of 20 rows by --split_seed 1; test: the rest"
        assert sum(line in x for x in said) == 1
        embedded = [x for x in said if "without --world the judge is the embedded world's" in x]
        assert len(embedded) == (world is None)


class Hub(list):
    """A split of the hub, as `datasets` has it: rows with column names."""
    column_names = ["sentence", "label", "idx"]


def hub_of(monkeypatch, **sizes):
    """`datasets` whose every data set has these splits, so many rows each of two classes by turns."""
    splits = {split: Hub({"sentence": f"film no {i} of {split}", "label": i % 2, "idx": i} for i in range(n))
              for split, n in sizes.items()}

    def load_dataset(name, config, split):
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return splits[split]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return splits


def hub_sets(monkeypatch, seed, world, shots=16):
    """{set: texts} of 16 shots a class."""
    task = whole_task(monkeypatch, world=world, data="hub:a/b", shots=shots, split_seed=seed)
    for name in ("train", "dev"):
        assert sorted(row["label"] for row in task.rows[name]) == [0] * shots + [1] * shots
    return {name: [row["text"] for row in rows] for name, rows in task.rows.items()}


def test_few_shot_sets_are_cut_out_of_the_hub_s_train_split_by_split_seed(tmp_path, monkeypatch):
    write_folders(tmp_path)
    world = str(tmp_path / "world")
    hub = hub_of(monkeypatch, train=100, validation=30, test=40)
    sets = hub_sets(monkeypatch, 0, world)
    assert sets["test"] == [row["sentence"] for row in hub["test"]]  # as it is
    few = sets["train"] + sets["dev"]
    assert len(set(few)) == 64 and set(few) < {row["sentence"] for row in hub["train"]}
    assert sets == hub_sets(monkeypatch, 0, world)
    assert sets["train"] != hub_sets(monkeypatch, 1, world)["train"]
    hub["test"][3]["label"] = -1  # as GLUE has it: nobody may know
    with pytest.raises(data.UserError, match="hub:a/b:test:4: label: expected a class with an answer word"):
        hub_sets(monkeypatch, 0, world)


def test_of_a_hub_s_data_set_without_a_test_split_the_rest_is_tested_on(tmp_path, monkeypatch):
    write_folders(tmp_path)
    world, hub = str(tmp_path / "world"), hub_of(monkeypatch, train=70)
    sets = hub_sets(monkeypatch, 0, world)
    every = [text for texts in sets.values() for text in texts]
    assert len(sets["test"]) == 6 and sorted(every) == sorted(row["sentence"] for row in hub["train"])
    with pytest.raises(data.UserError, match="hub:a/b: expected at least 41 different texts a class"):
        hub_sets(monkeypatch, 0, world, shots=20)


def test_nothing_is_said_of_data_that_are_not_there(tmp_path, monkeypatch):
    said = []
    with pytest.raises(data.UserError, match="got nothing"):
        whole_task(monkeypatch, said, world=None, data=str(tmp_path / "nowhere"))
    assert said == []


def test_a_test_set_one_folder_up_is_kept_where_dev_is_drawn(tmp_path, monkeypatch):
    write_folders(tmp_path)
    for name, n in (("sets/16-1/train", 8), ("sets/test", 2)):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}", "label": i % 2} for i in range(n)])
    change = dict(world=str(tmp_path / "world"), data=str(tmp_path / "sets" / "16-1"))
    task = whole_task(monkeypatch, **change)
    assert {name: len(rows) for name, rows in task.rows.items()} == {"train": 4, "dev": 4, "test": 2}
    assert [row["text"] for row in task.rows["test"]] == ["sets/test 0", "sets/test 1"]
    with pytest.raises(data.UserError, match="expected at least 6 different texts a class"):
        whole_task(monkeypatch, **change, shots=3)


def test_nothing_of_the_embedded_world_is_lost_but_what_is_held_out(world, monkeypatch):
    said = []
    task = whole_task(monkeypatch, said)
    assert (task.judge.taught == task.world.texts == world.texts[:-1200]
            and not any("left out" in line for line in said))
    few = [text for name in ("train", "dev", "test") for text in task.sets[name][0].texts]
    assert set(few) <= set(world.texts[-1200:]) and len(few) == 4 + 4 + 600
    batch = task.text_batch(2000, seeded())
    held = {" ".join(text.split()[:12]) for text in world.texts[-1200:]}
    read = set(StubJudge.texts(batch.reference, batch.reference_mask, task.tokenizer))
    assert not read & held and any("?" in text for text in read)  # what is said besides is read too


def test_a_world_that_is_all_few_shot_texts_is_an_error(tmp_path, monkeypatch):
    write_folders(tmp_path)
    write_rows(tmp_path / "world" / "texts.jsonl", [{"text": "no dev film", "labels": {}}] * 9)
    with pytest.raises(data.UserError, match="expected texts besides the few-shot and test texts, got none"):
        whole_task(monkeypatch, world=str(tmp_path / "world"), data=str(tmp_path / "few"))


def test_words_that_cannot_be_told_apart_are_an_error_that_names_them(world):
    tok = data.word_tokenizer(world.words)
    spoil = lambda **change: World("w", [], [], [], ATTRIBUTES | change)
    # answers of another attribute
    vocabulary(spoil(era={"cues": ["era", "period"], "answers": ["film", "food"]}), tok)
    with pytest.raises(data.UserError, match='era: answers: .* "modern" and "modern"'):
        vocabulary(spoil(era={"cues": ["era"], "answers": ["modern", "ancient", "modern"]}), tok)
    with pytest.raises(data.UserError, match='cues of all attributes: .* "mood" and "mood"'):
        vocabulary(spoil(era={"cues": ["era", "mood"], "answers": ["ancient", "modern"]}), tok)
    monotone = SimpleNamespace(encode=lambda text: [7], eot=9, name="monotone")  # different words, one id
    with pytest.raises(data.UserError, match='"film" and "food"'):
        topic = {"cues": ["topic", "theme"], "answers": ["film", "food"]}
        vocabulary(World("w", [], [], [], {"topic": topic}), monotone)


# Figures by hand: prompts are one token, and a table says what each is worth on each set.
NAMES = {"train": 0, "dev": 1, "test": 2, "curve": 3}


def finished(monkeypatch, queries, sampled, greedy, noise=0.0, earlier=()):
    """(summary, scores (4, 500), accuracies (4, 500), what was asked of every set, the task) of a run
    that ends with these; it had scored prompts below 299, and `earlier` ones were the likeliest before."""
    task, asked = PromptTask.__new__(PromptTask), {name: [] for name in NAMES}
    scores, right = torch.rand(4, 500, generator=seeded(13)), torch.rand(4, 500, generator=seeded(14))
    task.cfg, task.device = SimpleNamespace(attribute="a", seed=1, top_k=0, noise=noise), torch.device("cpu")
    task.queries, task.queries_to_90, task.scored = queries, None, tasks.prompt.Record(1)
    task.greedy = [[i] for i in earlier]
    task.sets = {"train": (None, torch.zeros(8))}
    before = torch.randint(299, (queries, 1), generator=seeded(5))  # what the run had scored
    task.scored.add(before, scores[0, before[:, 0]], 8, torch.arange(queries) + 1)
    task.start, task.width, task.n_ids, task.classes, task.world = 500, 1, 500, 2, None
    task.tokenizer = SimpleNamespace(decode=str, pieces=lambda ids: [f"word {i}" for i in ids])

    def ask(prompts, name, texts=None):
        asked[name].append(prompts[:, 0].tolist())
        return scores[NAMES[name], prompts[:, 0]], right[NAMES[name], prompts[:, 0]]
    task.ask = ask
    monkeypatch.setattr(tasks.prompt, "write", lambda *x, temperature=1.0, **more: (
        torch.tensor([[greedy]] if temperature == 0 else [[i] for i in sampled]), None))
    monkeypatch.setattr(tasks.prompt, "vocabulary",
                        lambda *x: ({"a": torch.arange(5)}, None, torch.arange(5, 500)))
    return task.finish(None, seeded()), scores, right, asked, task


def best(candidates, by, of):
    return of[max(candidates, key=lambda i: by[i])].item()


def test_the_best_prompt_is_chosen_on_dev_among_samples_and_all_that_was_scored(monkeypatch):
    sampled = list(range(300, 364))
    summary, scores, right, asked, task = finished(monkeypatch, 250, sampled, 299)
    known = sorted(set(task.scored.tokens[:, 0].tolist()), key=lambda i: -scores[0, i])
    offered = [299, *sampled[:32], *known[:32]]  # half of what goes to dev are samples, half the best known
    chosen = max(offered, key=lambda i: scores[1, i])
    assert summary["best_prompt_accuracy"] == right[2, chosen].item()
    assert summary["best_prompt"] == str([chosen])
    assert summary["best_prompt_ids"] == [chosen] and summary["best_prompt_pieces"] == [f"word {chosen}"]
    first = sorted(offered, key=lambda i: -scores[1, i])[:3]
    assert summary["top3_accuracy"] == pytest.approx(right[2, first].mean().item())
    assert sorted(offered) in map(sorted, asked["dev"])
    others = [best(offered, by, right[2]) for by in (*scores, *right)]
    # another set, or accuracy for score, would have chosen another prompt
    assert others.count(others[1]) == 1
    # so would samples or known ones alone, or all that is known
    alone = [best(some, scores[1], right[2]) for some in ([299, *sampled], known[:65], known)]
    assert summary["best_prompt_accuracy"] not in alone
    assert summary["test_accuracy"] == pytest.approx(right[2, sampled].mean().item())
    assert summary["dev_queries"] == 65 and summary["judge_queries"] == 250


def test_the_likeliest_prompts_of_all_evaluations_are_chosen_from_the_latest_first(monkeypatch):
    sampled = list(range(300, 364))
    summary, scores, _, asked, task = finished(monkeypatch, 250, sampled, 299, earlier=[400, 401, 400, 299])
    known = sorted(set(task.scored.tokens[:, 0].tolist()), key=lambda i: -scores[0, i])
    offered = [299, 400, 401, *sampled[:30], *known[:32]]  # each once
    assert sorted(offered) in map(sorted, asked["dev"]) and summary["dev_queries"] == 65
    many = list(range(400, 440))  # more than half of what goes to dev: the latest of them
    _, _, _, asked, _ = finished(monkeypatch, 250, sampled, 299, earlier=many)
    offered = [299, *many[:-33:-1], *known[:32]]
    assert sorted(offered) in map(sorted, asked["dev"])


def test_a_search_is_told_what_the_run_asked_about_before_its_first_fit(monkeypatch):
    """The queries of the first evaluation, which a checkpoint remembers."""
    monkeypatch.setattr(PromptTask, "first_queries", 40)
    *_, asked, task = finished(monkeypatch, 250, list(range(300, 364)), 299)
    questions = [x for x in asked["train"] if x == task.scored.tokens[:40, 0].tolist()]
    assert len(questions) == 1  # of one search
    monkeypatch.undo()
    task = small_task()
    task.queries_to_90 = None
    monkeypatch.setattr(task, "written", lambda *x, **more: torch.tensor([[3]]))
    monkeypatch.setattr(task, "ask", lambda prompts, name: (torch.zeros(1), torch.zeros(1)))
    for task.queries in (7, 9):
        task.evaluate(None, None)
    assert task.first_queries == 7 and task.state()["first_queries"] == 7
    task.load_state(task.state() | {"first_queries": 5})
    assert task.first_queries == 5


def test_an_evaluation_notes_the_likeliest_prompt_and_asks_nothing_about_it(monkeypatch):
    task, asked, drawn = small_task(), [], []
    task.start, task.width, task.n_ids, task.cfg.top_k, task.queries_to_90 = 10, 3, 9, 0, None
    monkeypatch.setattr(task, "ask", lambda prompts, name: asked.append((len(prompts), name)) or
                        (None, torch.zeros(len(prompts))))
    policy = tiny(vocab_size=11)
    for seed in (0, 1):
        task.evaluate(policy, seeded(seed))
    first = policy(torch.tensor([[10]]))[0, -1] @ policy.head[:9].t()
    assert task.greedy[0] == task.greedy[1] and task.greedy[0][0] == first.argmax().item()
    assert asked == [(64, "curve")] * 2 and task.queries == 0
    other = small_task()
    other.load_state(task.state())
    assert other.greedy == task.greedy


def test_equal_prompts_go_to_dev_once(monkeypatch):
    summary, _, _, _, task = finished(monkeypatch, 4, [300] * 64, 300)  # a settled policy, few were scored
    known = set(task.scored.tokens[:, 0].tolist())
    assert summary["dev_queries"] == 1 + len(known) < 65


def test_a_search_chooses_on_dev_among_as_many_prompts_as_the_run(monkeypatch):
    summary, scores, right, asked, task = finished(monkeypatch, 300, list(range(100, 164)), 99)
    searched = [x for prompts in asked["train"] for x in prompts][:300]  # random search is the first
    first = sorted(dict.fromkeys(searched), key=lambda i: -scores[0, i])[:65]
    assert summary["random_search_accuracy"] == best(first, scores[1], right[2])
    others = (best(first[:1], scores[1], right[2]), best(searched, scores[1], right[2]),
              best(first, scores[2], right[2]))
    assert summary["random_search_accuracy"] not in others  # the first on train, all on dev, chosen on test


def test_a_search_of_a_few_prompts_brings_them_all_to_dev(monkeypatch):
    summary, scores, right, asked, _ = finished(monkeypatch, 4, list(range(100, 164)), 99)
    searched = asked["train"][0]
    assert len(searched) == 4 and summary["random_search_accuracy"] == best(searched, scores[1], right[2])
    assert sorted(set(searched)) in map(sorted, asked["dev"])


def test_what_a_run_asked_is_remembered_with_its_score_and_comes_back(monkeypatch):
    task, prompts = small_task(), ids(1, 20, 3)
    told = []
    for part in (prompts[:, :8], prompts[:, 8:]):
        told.append(task.prefer(None, part, None))
        task.told(part, told[-1])
    scored = task.scored
    assert torch.equal(scored.tokens, prompts[0])
    assert torch.equal(scored.scores, torch.cat(told, 1)[0])
    assert scored.queries.tolist() == list(range(1, 21)) and set(scored.read.tolist()) == {6}
    other, task.queries_to_90 = small_task(), None
    other.load_state(task.state())
    assert torch.equal(other.scored.tokens, prompts[0])
    assert other.scored.queries.tolist() == list(range(1, 21))


def test_a_question_about_some_texts_is_the_mean_over_them():
    task, prompts, some = small_task(), ids(9, 3), torch.tensor([4, 1])
    cache, labels = task.sets["train"]
    p = task.judge.probabilities(cache, prompts, "two")
    for got, expected in zip(task.ask(prompts, "train", some), prompt_score(p[some], labels[some])):
        torch.testing.assert_close(got, expected)


def test_the_reference_is_the_best_cue_prompt_on_dev(monkeypatch):
    summary, scores, right, _, _ = finished(monkeypatch, 4, list(range(100, 164)), 99)
    assert summary["reference_accuracy"] == best(range(5), scores[1], right[2])
