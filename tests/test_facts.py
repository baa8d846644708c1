"""A wrong word in a summary: what the figures say of it, the candidates that show it, and the head that can
see it. The figures of whole runs are computed by hand in tests/test_figures.py.
"""
import json
from types import SimpleNamespace

import pytest
import torch
from reference import mask_of, seeded, tiny
from stubs import trained

import evaluate
import train
from reward import TokenReward, bound
from tasks import reports
from tasks.summarize import SummarizeTask

WIDTH = 24


def make(folder=None, **change):
    """The task as train.py builds it: of the embedded world, or of three files."""
    flags = dict(data=str(folder) if folder else None, limit=0, document_column=None, summary_column=None,
                 tokenizer=None, vocab_size=300, max_document=60, max_summary=WIDTH, curve_size=2, seed=1,
                 split_seed=1, planted=0.0, ask=None, threads=1, context_limit=512,
                 cache_dir=f"{folder}-cache")
    return SummarizeTask(SimpleNamespace(**flags | change), torch.device("cpu"), None, lambda text: None)


@pytest.fixture
def few(monkeypatch):
    """n -> the embedded task with n test rows."""
    def made(n):
        world = reports.embedded_world(3, 8, 8, n)
        monkeypatch.setattr("tasks.summarize.embedded_world", lambda seed: world)
        return make()
    return made


def reader(task, worth):
    """A guide that looks at words: worth(row, word) -> r of its tokens; end-of-text has 0.5."""
    def guide(tokens, prefix, mask):
        documents = task.texts(*prefix)
        out = torch.full(tokens.shape, 0.5)
        for b, document in enumerate(documents):
            for k, ids in enumerate(tokens[b].tolist()):
                for t, piece in enumerate(task.tokenizer.pieces([i for i in ids if i != task.eot])):
                    out[b, k, t] = worth(document.split(), piece.strip())
        return out
    return guide


# ---------------------------------------------------------------------------------------------------- figures


def test_a_reward_that_looks_at_the_report_is_always_right_and_its_opposite_never(few):
    task = few(40)
    told = lambda document, word: float(word in document or word not in reports.KINDS)
    assert task.judge_reward(reader(task, told)) == {"fact_auroc": 1.0, "fact_accuracy": 1.0}
    lies = lambda document, word: 1 - told(document, word)
    assert task.judge_reward(reader(task, lies)) == {"fact_auroc": 0.0, "fact_accuracy": 0.0}


def test_a_constant_reward_is_at_chance(few):
    task = few(70)  # more than are read at once
    guide = lambda tokens, prefix, mask: torch.full(tokens.shape, 0.5)
    assert task.judge_reward(guide) == {"fact_auroc": 0.5, "fact_accuracy": 0.5}


def test_the_figures_of_two_rows_by_hand(few):
    """Row 0: the wrong word has less, by 0.2, but every token behind it has 1 more: the mean prefers the
    wrong summary. Row 1: the wrong word has more."""
    task = few(2)

    def guide(tokens, prefix, mask):
        out = torch.ones(tokens.shape)
        for b, (right, wrong) in enumerate(tokens.tolist()):
            (place,) = [t for t in range(WIDTH) if right[t] != wrong[t]]
            out[b, 1, place] += (-0.2, 0.1)[b]
            out[b, 1, place + 1:] += (1, 0)[b]
        return out
    found = task.judge_reward(guide)
    assert found == {"fact_auroc": 0.5, "fact_accuracy": 0.0}  # 1 and 0; 0 and 0


def test_a_wrong_word_stands_where_the_right_one_did_and_is_neither_right_nor_the_report_s(few):
    task, kinds = few(200), set()
    for i, row in enumerate(task.rows["test"]):
        right, wrong = row["facts"].split(), task.wrong_fact("test", i, row["facts"]).split()
        (place,) = [k for k, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b]
        assert reports.KINDS[right[place]] == reports.KINDS[wrong[place]]
        assert wrong[place] not in row["document"].split()
        kinds.add(reports.KINDS[right[place]])
    assert kinds == set(reports.WORDS)


def write(folder, *summaries):
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"document": f"long ago {split} {i}", "summary": x})
                 for i, x in enumerate(summaries)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


def test_on_real_text_a_word_has_the_mean_of_its_tokens(tmp_path):
    """A byte is a token. " of yellow" against " of carriage", and the other way round: the right word has 1 a
    byte but for one with 0.4, the wrong one 0.95: means 0.9 of six (0.925 of eight) and 0.95. The first byte
    of the right one has 5 more, which counts for the summary and not for the word."""
    write(tmp_path, "of yellow", "of carriage")
    task, seen = make(tmp_path, tokenizer="byte"), []

    def guide(tokens, prefix, mask):
        seen.extend(task.texts(tokens, torch.ones_like(tokens, dtype=torch.bool)))
        out = torch.ones(tokens.shape)
        out[:, 1] = 0.95
        out[:, 0, 6], out[:, 0, 0] = 0.4, 6.0
        return out
    assert task.judge_reward(guide) == {"fact_auroc": 0.0, "fact_accuracy": 1.0}
    assert [x.split("\0")[0] for x in seen] == ["of yellow", "of carriage", "of carriage", "of yellow"]


def test_texts_without_a_word_to_replace_are_left_out(tmp_path):
    write(tmp_path, "of it", "it is")
    assert make(tmp_path, tokenizer="byte").judge_reward(None) == {"fact_auroc": None, "fact_accuracy": None}


def test_a_run_without_a_reward_has_nulls():
    run = SimpleNamespace(c=None, task=make(), learns_reward=False)
    assert evaluate.examined(run) == ((0, 0), {"fact_auroc": None, "fact_accuracy": None}, None)


# ----------------------------------------------------------------------------------------------------- scores


RUN = ("--task summarize --sft_steps 20 --n_layer 1 --n_embd 16 --n_head 2 --max_document 40 --candidates 6 "
       "--reward_first 3 --reward_steps 2 --reward_batch 4 --policy_steps 2 --batch_size 4 --eval_every 10 "
       "--curve_size 4")


@pytest.mark.parametrize("flags", ["", "--objective mle", "--planted 0.5"])
def test_a_run_keeps_the_score_of_every_test_document(flags, tmp_path, monkeypatch):
    world = reports.embedded_world(0, 60, 12, 20)
    monkeypatch.setattr("tasks.summarize.embedded_world", lambda seed: world)
    summary, _, out = trained(tmp_path, RUN, flags)
    each = json.loads((out / "scores.json").read_text())
    assert list(each) == ["meteor"] and len(each["meteor"]) == 20
    assert sum(each["meteor"]) / 20 == pytest.approx(summary["meteor"])
    assert (summary["fact_auroc"] is None) == (summary["rank_accuracy"] is None) == ("mle" in flags)
    assert 0 <= summary["wrong_facts"] <= 1 and 0 <= summary["sft_wrong_facts"] <= 1


# ------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_planted_candidates_are_the_reference_and_the_same_with_one_wrong_word(share):
    task = make(planted=share)
    batch = task.pick("train", torch.arange(200))
    own = torch.full((200, 3, WIDTH), 5)
    mask = mask_of(*[4] * 600, width=WIDTH).view(200, 3, WIDTH)
    tokens, masks = task.plant(batch, own, mask, seeded())
    planted = 0
    for b in range(200):
        assert torch.equal(tokens[b, 0], own[b, 0]) and torch.equal(masks[b, 0], mask[b, 0])  # stays its own
        if torch.equal(tokens[b], own[b]):
            assert torch.equal(masks[b], mask[b])
            continue
        planted += 1
        right, wrong = task.texts(tokens[b, 1:], masks[b, 1:])
        assert right == task.rows["train"][b]["summary"]
        assert sum(x != y for x, y in zip(right.split(), wrong.split(), strict=True)) == 1
        assert all(tokens[b, k][masks[b, k]][-1] == task.eot for k in (1, 2))
    assert abs(planted / 200 - share) < 0.15
    assert (own == 5).all() and mask.sum() == 2400  # what was given is as it was


@pytest.mark.parametrize("share", [0, 1])
def test_planted_candidates_are_fitted(share, tmp_path, monkeypatch):
    world = reports.embedded_world(0, 60, 12, 20)
    monkeypatch.setattr("tasks.summarize.embedded_world", lambda seed: world)
    out = trained(tmp_path, RUN, f"--planted {share}")[2]
    buffers = torch.load(out / "ckpt.pt", weights_only=True)["buffers"]
    task = make()
    for name in ("fitted", "held_out"):
        found = [task.texts(x, m)[0] for x, m in zip(buffers[name]["tokens"][:, 1:2],
                                                     buffers[name]["mask"][:, 1:2])]
        references = {row["summary"] for row in world["train"]}
        assert all((text in references) == share for text in found)


@pytest.mark.parametrize("typed, said", [
    ("--planted 0.5", "--planted 0.5: task prompt has no other candidates"),
    ("--task edits --planted 0.5", "task edits has no other candidates"),
    ("--task summarize --objective reinforce --guidance bandit --planted 0.5",
     "no reward is fitted to candidates")])
def test_planted_is_refused_where_it_has_no_meaning(typed, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        train.main(typed.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- the head


def test_the_head_sees_the_logit_that_the_body_had_for_the_token_before_it():
    """E1 with --foreseen, written out: [state that has read a_t | state before a_t times a_t's embedding]."""
    net = TokenReward(tiny(), 10, width=16, foreseen=True).eval()
    with torch.no_grad():
        net.mlp[0].weight.normal_(0, 0.5), net.mlp[2].weight.normal_(0, 0.5)
    context = torch.tensor([[3, 1, 4, 1]])
    tokens = torch.tensor([[[5, 9, 2, 6]]])
    rewards = net.guide(tokens, (context, mask_of(4, width=4)))[0, 0]
    states = net.body(torch.tensor([[3, 1, 4, 1, 10, 5, 9, 2, 6]]))[0, 4:]  # from the start token on
    for t, a in enumerate([5, 9, 2, 6]):
        logit = states[t] @ net.body.wte.weight[a]
        expected = bound(net.mlp(torch.cat((states[t + 1], logit[None]))))[0]
        assert rewards[t].item() == pytest.approx(expected.item(), abs=1e-5)
    assert net.mlp[0].in_features == 17 and TokenReward(tiny(), 10, width=16).mlp[0].in_features == 16
