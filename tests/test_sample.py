"""sample.py: a run's folder alone, moved away from its data and cache, writes, scores and classifies with the
run's own numbers; every flag, every wrong input, and prompts made of whole words."""
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import EDITS, JUDGE, SHORT, SMALL, write_edits, write_jsonl, write_pairs, write_world

import rollout
import sample
import train
from data import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from support.log import UserError
from tasks.prompt import PromptTask
from tasks.summarize import SummarizeTask

ROOT = Path(__file__).resolve().parent.parent
LEARNED = "--reward_lr 0.01 --reward_first 20".split()  # differ from token to token, none is at 0 yet


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A small run of each task, moved to another folder; data, world and cache are gone. tasks: those of the
    runs as they were at the end; texts: what the summaries of `finish` were; queries: the largest id that the
    judge was asked about."""
    made, moved = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("moved")
    settings = {"prompt": [*JUDGE, "--world", str(write_world(made / "data" / "world"))],
                "summarize": [*SHORT, "--data", str(write_pairs(made / "data" / "pairs"))],
                "edits": [*EDITS, "--data", str(write_edits(made / "data" / "edits"))]}
    seen, threads = SimpleNamespace(tasks={}, texts=None, largest=0), torch.get_num_threads()
    finish, decoded, ask = PromptTask.finish, SummarizeTask.decoded, PromptTask.ask

    def watched_ask(self, prompts, *more):
        seen.largest, seen.tasks["prompt"] = max(seen.largest, int(prompts.max())), self
        return ask(self, prompts, *more)

    def watched_decode(self, policy, split, *more):
        found = list(decoded(self, policy, split, *more))
        seen.tasks["summarize"] = self
        seen.texts = [text for _, text, *_ in found] if split == "test" else seen.texts  # last in `finish`
        return found
    with pytest.MonkeyPatch.context() as m:
        m.setattr(PromptTask, "ask", watched_ask)
        m.setattr(SummarizeTask, "decoded", watched_decode)
        for name, flags in settings.items():
            out = [*SMALL, *LEARNED, *flags, "--cache_dir", str(made / "cache"),
                   "--out_dir", str(made / name)]
            assert train.main([str(x) for x in out]) == 0
            shutil.copytree(made / name, moved / name)
    rows = seen.tasks["summarize"].rows  # read by index from the cache, which is about to go
    seen.documents = {split: [row["document"] for row in rows[split]] for split in rows}
    torch.set_num_threads(threads)
    shutil.rmtree(made)
    return SimpleNamespace(folder=moved, **vars(seen))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def run_of(runs, task, said=None):
    return sample.load(runs.folder / task, say=print if said is None else said.append)


def cli(capsys, *args):
    """(lines of JSON, what was said) of a call whose screen is no terminal."""
    capsys.readouterr()
    sample.main([str(x) for x in args])
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def refuses(capsys, *args):
    """The one line that a call prints which ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample.main([str(x) for x in args])
    out, err = capsys.readouterr()
    assert (stop.value.code == 2 and out == ""
            and err.startswith("sample.py: ") and err.count("\n") == 1), (out, err)
    return err[:-1]


def last_rows(runs, task):
    """The last evaluation's sequences in samples.jsonl."""
    rows = [json.loads(line) for line in (runs.folder / task / "samples.jsonl").read_text().splitlines()]
    return [r for r in rows if r["step"] == rows[-1]["step"] and "rewards" in r]


# -------------------------------------------------------------------------------------- the run's own numbers


def test_greedy_texts_of_the_test_documents_are_those_that_the_run_has_scored(runs):
    documents = runs.documents["test"]
    written = run_of(runs, "summarize").write(documents)
    assert [x["input"] for x in written] == [" ".join(d.split()) for d in documents]
    assert [x["outputs"][0]["text"] for x in written] == runs.texts and len(set(runs.texts)) >= 1
    ended = [x["outputs"][0]["ended"] for x in written]
    summary = json.loads((runs.folder / "summarize" / "summary.json").read_text())
    assert sum(ended) / len(ended) == pytest.approx(summary["ended"])
    length = sum(len(x["outputs"][0]["tokens"]) for x in written) / len(written)  # divisor: documents
    assert length == pytest.approx(summary["length"])


@pytest.mark.parametrize("task", ["prompt", "summarize", "edits"])
def test_rewards_of_the_samples_are_those_in_samples_jsonl(runs, task):
    run, compared = run_of(runs, task), []
    for row in last_rows(runs, task):
        found = run.score(None if task == "prompt" else row["context"], [row["text"]])
        if found["tokens"][0] == row["tokens"]:  # bytes that a wild policy says may read back as others
            compared += row["rewards"]
            assert found["rewards"][0] == pytest.approx(row["rewards"], abs=6e-5)  # the file has four digits
    assert len(compared) > 8 and max(compared) - min(compared) > 0.01


def test_scores_of_siblings_are_those_in_samples_jsonl(runs):
    rows = [row for row in last_rows(runs, "summarize") if row["group"] == "0"]
    found = run_of(runs, "summarize").score(rows[0]["context"], [row["text"] for row in rows])
    assert found["reward_scores"] == pytest.approx([row["score"] for row in rows], abs=1e-3)


@pytest.mark.parametrize("name", ["summarize", "edits"])
def test_what_is_written_and_what_is_scored_is_read_once(name, runs, monkeypatch):
    run, seen = sample.load(runs.folder / name), []
    guide = run.reward.guide
    monkeypatch.setattr(run.reward, "guide", lambda *x: seen.append(x) or guide(*x))
    run.write(["some text"], n=2)
    run.score("some text", ["one", "two"])
    assert len(seen) == 2


def test_classified_test_texts_are_as_right_as_the_best_prompt(runs):
    run, rows = run_of(runs, "prompt"), runs.tasks["prompt"].rows["test"]
    found = run.classify([row["text"] for row in rows])
    right = sum(x["label"] == row["label"] for x, row in zip(found, rows)) / len(rows)
    assert right == pytest.approx(run.summary["best_prompt_accuracy"]) and 0 < right < 1
    assert [x["answer"] for x in found] == [["terrible", "great"][x["label"]] for x in found]
    assert all(x["probabilities"][x["label"]] == max(x["probabilities"])
               and x["prompt"] == run.summary["best_prompt"]
               and sum(x["probabilities"]) == pytest.approx(1, abs=1e-4) for x in found)


def test_the_best_prompt_is_kept_as_ids_and_pieces(runs):
    run = run_of(runs, "prompt")
    ids, pieces = run.summary["best_prompt_ids"], run.summary["best_prompt_pieces"]
    assert len(ids) == run.task.width and run.tokenizer.pieces(ids) == pieces
    assert "".join(pieces).strip() == run.summary["best_prompt"] and run.prompt.tolist() == ids
    # whole words: the text reads back
    assert run.score(None, [ids]) == run.score(None, [run.summary["best_prompt"]])


# ------------------------------------------------------------------------------------------------ whole words


TEXTS = ["the unbelievable actors were acting in the best of all films",
         "an actor acts; 20 scenes, best-of-all unbelief",
         "naïve café scenes were the best scenes , they said"] * 20


def test_random_prompts_of_whole_words_read_back_as_the_ids_they_were_made_of():
    tok = train_bpe(TEXTS, 400).compact(TEXTS)
    words = tok.whole_words()
    assert 10 < len(words) < tok.eot
    new = tok.with_first(words)
    prompts = torch.randint(len(words), (200, 5), generator=torch.Generator().manual_seed(0)).tolist()
    assert all(new.encode(new.decode(p)) == p for p in prompts)
    anything = torch.randint(tok.eot, (200, 5), generator=torch.Generator().manual_seed(0)).tolist()
    assert any(tok.encode(tok.decode(p)) != p for p in anything)
    assert all(new.decode([i])[0] == " " and new.decode([i])[1].isalnum() for i in range(len(words)))


@pytest.mark.parametrize("make", [
    byte_tokenizer, lambda: train_bpe(TEXTS, 400), lambda: load_tokenizer("bpe", TEXTS, 400, True)])
def test_a_renumbered_tokenizer_reads_and_writes_the_same_texts(make):
    tok = make()
    new = tok.with_first([7, 3])
    back = Tokenizer.from_state(json.loads(json.dumps(new.state())))
    assert ((new.size, new.eot) == (tok.size, tok.eot)
            and new.bytes_of[:2] == [tok.bytes_of[3], tok.bytes_of[7]])
    for text in (*TEXTS[:3], "🙂 \u0003"):
        assert [new.bytes_of[i] for i in new.encode(text)] == [tok.bytes_of[i] for i in tok.encode(text)]
        assert new.decode(new.encode(text)) == text and back.encode(text) == new.encode(text)


def test_everything_that_asks_the_judge_uses_whole_words_alone(runs):
    task = runs.tasks["prompt"]
    # samples, random prompts, search and the reference
    assert 0 < runs.largest < task.n_ids < task.tokenizer.eot
    assert [" " + w for w in ("mood", "topic")] == [w for w in (" mood", " topic")
                                                    if task.tokenizer.encode(w)[0] < task.n_ids]
    run = SimpleNamespace(c=SimpleNamespace(explore=1.0, explore_from="policy"), task=task,
                          generators={"candidates": torch.Generator().manual_seed(0)})
    tokens = torch.zeros(1, 200, task.width, dtype=torch.long)
    other = rollout.explored(run, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert task.n_ids // 2 < other.max() < task.n_ids


def test_without_whole_words_every_token_is_sampled_and_the_judge_is_the_same(tmp_path, capsys):
    world = write_world(tmp_path / "world")
    said, widths = [], []
    for flag in ("--whole_words", "--no-whole_words"):
        out = [*SMALL, *JUDGE, "--world", world, "--cache_dir", tmp_path / "cache", flag,
               "--out_dir", tmp_path / flag]
        c, _ = train.parse_flags(train.Flags, [str(x) for x in out], train.__doc__)
        task = PromptTask(c, torch.device("cpu"), lambda *x: None, said.append)
        widths.append((task.n_ids, task.tokenizer.eot, c.whole_words))
    assert (widths[0][0] < widths[1][0] == widths[0][1] == widths[1][1]
            and [w for *_, w in widths] == [True, False])
    assert len(list((tmp_path / "cache").glob("judge-*.pt"))) == 1


# -------------------------------------------------------------------------------------------------- each flag


def assert_same_outputs(one, other):
    """Two lines of sample.py: the words are equal, sums over other batch sizes to rounding (the last bit of a
    product depends on how many rows it has)."""
    assert one["input"] == other["input"] and len(one["outputs"]) == len(other["outputs"])
    for x, y in zip(one["outputs"], other["outputs"]):
        assert [x[k] for k in ("text", "tokens", "ended")] == [y[k] for k in ("text", "tokens", "ended")]
        assert x["rewards"] == pytest.approx(y["rewards"], abs=1e-5)
        assert x["score"] == pytest.approx(y["score"], rel=1e-5)


def test_json_lines_of_a_file_of_texts_and_of_rows(runs, capsys):
    Path("texts.txt").write_text("home cat sat\n\ndog ran home\n", encoding="utf-8")
    write_jsonl(Path("rows.jsonl"),
                [{"article": "home cat sat"}, {"article": " "}, {"document": "dog ran home"}])
    folder = runs.folder / "summarize"
    a, err = cli(capsys, "--out_dir", folder, "--input", "texts.txt")
    b, said = cli(capsys, "--out_dir", folder, "--input", "rows.jsonl")
    assert a == b and [x["input"] for x in a] == ["home cat sat", "dog ran home"]
    assert (str(folder) in err and "finished" in err
            and "rows.jsonl: 1 of 3 rows had an empty document" in said)
    assert set(a[0]["outputs"][0]) == {"text", "tokens", "rewards", "score", "ended"}
    alone, = cli(capsys, "--out_dir", folder, "--input", "home cat sat")[0]
    assert_same_outputs(alone, a[0])


def test_rows_may_bear_the_column_name_of_the_run(runs, capsys):
    shutil.copytree(runs.folder / "summarize", "run")
    config = json.loads(Path("run", "config.json").read_text()) | {"document_column": "body"}
    Path("run", "config.json").write_text(json.dumps(config))
    Path("rows.csv").write_text('body,other\n"home cat sat",x\n')
    assert cli(capsys, "--out_dir", "run", "--input", "rows.csv")[0][0]["input"] == "home cat sat"
    write_jsonl(Path("mine.jsonl"), [{"body": "home", "candidates": ["cat"]}])
    assert cli(capsys, "--out_dir", "run", "--score", "mine.jsonl")[0][0]["tokens"] == [[" cat", "<eot>"]]


def test_prompt_runs_read_texts_and_sentences(runs, capsys):
    write_jsonl(Path("rows.jsonl"),
                [{"sentence": "the actor 3 was awful"}, {"text": "the soup was superb", "label": 1}])
    found, _ = cli(capsys, "--out_dir", runs.folder / "prompt", "--input", "rows.jsonl")
    assert [set(x) for x in found] == [{"input", "label", "answer", "probabilities", "prompt"}] * 2


def test_requests_with_passages_are_read_like_those_of_training(runs):
    run = run_of(runs, "edits")
    task = run.task
    rows = [{"prompt": "say two cats sat", "passages": "a dog ran"}, {"prompt": "say a dog ran"}]
    tokens, mask = run._context(run._rows(rows))
    plain = [task.tokenizer.encode(" say two cats sat"), task.tokenizer.encode(" say a dog ran")]
    assert tokens[1][mask[1]].tolist() == plain[1]
    both = (plain[0][-task.input_width():] + task.tokenizer.encode(" a dog ran"))[:task.input_width()]
    assert tokens[0][mask[0]].tolist() == both


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": -1}, {"top_k": -3}, {"temperature": -1.0}])
def test_numbers_that_nothing_can_be_sampled_with_are_refused_by_the_library(runs, wrong):
    with pytest.raises(UserError, match="expected n at least 1, top_k and temperature at least 0"):
        run_of(runs, "summarize").write(["home cat sat"], **wrong)


def test_sampling_flags(runs, capsys):
    edits = ["--out_dir", runs.folder / "edits", "--input", "say a dog ran"]
    outputs = lambda *flags: [x["text"] for x in cli(capsys, *edits, *flags)[0][0]["outputs"]]
    greedy = outputs()
    assert greedy == outputs() == outputs("--temperature", 0) == outputs("--top_k", 1, "--seed", 5)
    many = outputs("--num_samples", 3)
    assert len(set(many)) == 3 and (many == outputs("--num_samples", 3, "--seed", 1)
                                    != outputs("--num_samples", 3, "--seed", 2))
    assert outputs("--num_samples", 3, "--temperature", 1e-4) == greedy * 3
    cool = cli(capsys, *edits, "--max_new_tokens", 2)[0][0]["outputs"][0]
    assert len(cool["tokens"]) == 2 and not cool["ended"]


def test_results_go_to_a_file_whole(runs, capsys):
    capsys.readouterr()
    sample.main(["--out_dir", str(runs.folder / "summarize"), "--input", "home cat sat",
                 "--out", "new.jsonl"])
    out, err = capsys.readouterr()
    assert (json.loads(Path("new.jsonl").read_text())["input"] == "home cat sat"
            and "new.jsonl: 1 lines" in out and not err)
    before = Path("new.jsonl").read_bytes()
    write_jsonl(Path("bad.jsonl"), [{"document": "cat"}, {"other": "x"}])
    refuses(capsys, "--out_dir", runs.folder / "summarize", "--input", "bad.jsonl", "--out", "new.jsonl")
    assert Path("new.jsonl").read_bytes() == before


def test_own_candidates_are_scored_and_ranked(runs, capsys):
    run = run_of(runs, "summarize")
    texts = ["the cat sat", "a dog ran home", "home home"]
    own = run.score("home cat sat", texts)["reward_scores"]
    order, pairs = [sorted(own).index(x) for x in own], sum(a < b for a in own for b in own)
    write_jsonl(Path("right.jsonl"),
                [{"document": "home cat sat", "candidates": texts, "scores": order, "id": 7}])
    rows, err = cli(capsys, "--out_dir", run.folder, "--score", "right.jsonl")
    # not to the last bit: two threads may share a product out in another way the next time
    assert rows[0]["reward_scores"] == pytest.approx(own, rel=1e-5, abs=1e-7)
    assert rows[0]["id"] == 7 and len(rows[0]["rewards"]) == 3
    assert [len(x) for x in rows[0]["rewards"]] == [len(x) for x in rows[0]["tokens"]]
    assert err.splitlines()[-1] == f"rank accuracy 1.0000 of {pairs} pairs" and pairs
    worst, *_, best = sorted(texts, key=lambda x: own[texts.index(x)])
    pair = {"chosen": worst, "rejected": best}
    write_jsonl(Path("wrong.jsonl"),
                [{"prompt": "home cat sat", **pair}, {"prompt": "home cat sat", "candidates": texts}])
    rows, err = cli(capsys, "--out_dir", run.folder, "--score", "wrong.jsonl")
    assert len(rows) == 2 and err.splitlines()[-1] == "rank accuracy 0.0000 of 1 pairs"
    write_jsonl(Path("open.jsonl"), [{"document": "home", "candidates": texts}])
    assert "rank accuracy" not in cli(capsys, "--out_dir", run.folder, "--score", "open.jsonl")[1]


def test_own_prompts_are_scored_as_texts_and_as_ids(runs, capsys):
    write_jsonl(Path("prompts.jsonl"), [{"candidates": ["mood verdict", [0, 1, 2]]}])
    rows, _ = cli(capsys, "--out_dir", runs.folder / "prompt", "--score", "prompts.jsonl")
    assert rows[0]["tokens"][0] == [" mood", " verdict"] and len(rows[0]["tokens"][1]) == 3


def test_long_input_is_cut_as_in_training_and_said(runs):
    said = []
    run = run_of(runs, "summarize", said)
    most = run.task.input_width()
    assert most == max(len(run.tokenizer.encode(" " + document))
                       for documents in runs.documents.values() for document in documents)
    long = "home cat sat ran dog home cat sat ran dog"
    found = run.write([long, "home", long])
    kept = run.tokenizer.decode(run.tokenizer.encode(" " + long)[:most]).strip()
    again = run.write([kept, "home", kept])[0]["outputs"]
    for outputs in (found[2]["outputs"], again):  # of another row of a product, or of another one
        assert [(x["text"], x["tokens"]) for x in outputs] == [(x["text"], x["tokens"])
                                                               for x in found[0]["outputs"]]
        for x, y in zip(outputs, found[0]["outputs"]):
            assert x["rewards"] == pytest.approx(y["rewards"], rel=1e-5)
            assert x["score"] == pytest.approx(y["score"], rel=1e-5)
    assert said == [f"texts[0]: 1 of 1 documents are longer than {most} tokens and were cut at their end, "
                    "and 1 more inputs"]
    run.score("home", ["cat " * 30])
    assert said[1] == (f"score: 1 of 1 candidates are longer than {run.task.width} tokens "
                       "and were cut at their end")


def typed_in(monkeypatch, data):
    """stdin as a pipe with these bytes in it."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_line_of_stdin_is_a_text_or_a_row(runs, capsys, monkeypatch):
    folder, inputs = runs.folder / "summarize", []
    for data in (b"home cat sat\n\ndog ran\n",
                 b'{"document": "home cat sat"}\n{"article": "dog ran", "id": 3}\n'):
        typed_in(monkeypatch, data)
        inputs.append([x["input"] for x in cli(capsys, "--out_dir", folder, "--input", "-")[0]])
    assert inputs == [["home cat sat", "dog ran"]] * 2


@pytest.mark.parametrize("data, said", [
    (b'{"document": "cat"}\n{"other": 1}\n', "<stdin>:2: document: expected str, got nothing"),
    (b"cat\n\xff\n", "<stdin>:2: expected UTF-8 text, got byte 0xff"),
    (b"\n \n", "<stdin>: expected one text a line, got nothing")])
def test_wrong_lines_of_stdin_are_named(runs, capsys, monkeypatch, data, said):
    typed_in(monkeypatch, data)
    assert said in refuses(capsys, "--out_dir", runs.folder / "summarize", "--input", "-")


def test_lines_typed_by_hand_on_a_terminal(runs):
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "sample.py"), "--out_dir", str(runs.folder / "summarize"),
               "--device", "cpu"]
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    os.write(ours, b"home cat sat\n\x04")  # a terminal keeps them until they are read
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.wait(60) == 0
    assert b"one document a line; Ctrl-D ends" in seen and b"\x1b[30;48;2;" in seen and b"score" in seen
    assert b'{"input"' not in seen


# -------------------------------------------------------------------------------------- what a terminal shows


def test_a_terminal_shows_coloured_tokens_and_nothing_that_steers_it(runs, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    run = run_of(runs, "summarize")
    hostile = {"input": "a\x1b[2Jb",
               "outputs": [{"text": "x", "tokens": [" x\x1b[2J", "<eot>"], "rewards": [0.0, 1.3],
                            "score": 1.0, "ended": False}]}
    text = sample.shown(run, hostile)
    assert "\x1b[2J" not in text and "\\x1b[2J" in text and "not ended" in text
    low, high = [text.split("\x1b[30;48;2;")[i].split("m")[0] for i in (1, 2)]
    assert low != high
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in sample.shown(run, hostile) and "(0.00)" in sample.shown(run, hostile)
    # names of the row's own do not mislead
    row = {"document": "d", "candidates": ["x"], "scores": [2], "label": "x", "probabilities": 3,
           "outputs": None, "tokens": [[" x"]], "rewards": [[0.5]], "reward_scores": [0.5]}
    assert "score 0.5, given 2" in sample.shown(run, row)
    found = {"input": "t", "label": 1, "answer": "gr\x07eat", "probabilities": [0.25, 0.75], "prompt": "p"}
    assert sample.shown(run, found) == "gr\\x07eat (class 1 of 0.250, 0.750)  t"


# -------------------------------------------------------------------------------------------------- which run


def test_the_newest_finished_run_is_taken_and_named(runs, capsys):
    for name, ended in (("old", 100), ("new", 300), ("middle", 200)):
        shutil.copytree(runs.folder / "summarize", Path("out", name))
        os.utime(Path("out", name, "summary.json"), (ended, ended))
    shutil.copytree(runs.folder / "summarize", Path("out", "unfinished"))
    Path("out", "unfinished", "summary.json").unlink()
    assert "out/new:" in cli(capsys, "--input", "cat")[1]


def test_an_unfinished_run_says_so_and_works_from_its_checkpoint(runs, capsys):
    for task in ("summarize", "prompt"):
        shutil.copytree(runs.folder / task, task)
        Path(task, "summary.json").unlink()
    rows, said = cli(capsys, "--out_dir", "summarize", "--input", "home cat sat")
    assert "step 4, not finished, so this is its last checkpoint" in said
    assert rows == run_of(runs, "summarize").write(["home cat sat"])
    found, said = cli(capsys, "--out_dir", "prompt", "--input", "the soup was superb")
    assert "likeliest prompt stands in" in said and len(found[0]["prompt"].split()) == 3
    Path("summarize", "ckpt.pt").unlink()
    assert "summarize/ckpt.pt" in refuses(capsys, "--out_dir", "summarize", "--input", "home")


def test_a_pooled_task_without_a_judge_scores_and_says_that_it_classifies_nothing(runs, capsys, monkeypatch):
    class Words(train.Task):  # the protocol's defaults, as in docs/extend.md
        pooled = True
    monkeypatch.setitem(train.TASKS, "prompt", Words)
    run = run_of(runs, "prompt")
    assert len(run.score(None, ["the mood", "mood"])["reward_scores"]) == 2
    said = refuses(capsys, "--out_dir", str(runs.folder / "prompt"), "--input", "x")
    assert "task prompt has no judge to classify with (did you mean --score?)" in said


def test_a_run_without_a_learned_reward_says_so(runs, capsys):
    shutil.copytree(runs.folder / "summarize", "mle")
    config = json.loads(Path("mle", "config.json").read_text()) | {"objective": "mle"}
    Path("mle", "config.json").write_text(json.dumps(config))
    assert "has learned no reward (mle, token)" in cli(capsys, "--out_dir", "mle", "--input", "home")[1]


def test_wrong_and_foreign_folders_end_in_one_line(runs, capsys):
    assert "got nothing" in refuses(capsys, "--out_dir", "nowhere", "--input", "x")
    Path("file").write_text("x")
    assert "got a file" in refuses(capsys, "--out_dir", "file", "--input", "x")
    Path("foreign").mkdir()
    Path("foreign", "config.json").write_text('{"vocab_size": 5}')
    assert "foreign/ckpt.pt" in refuses(capsys, "--out_dir", "foreign", "--input", "x")
    assert "no finished run under out/" in refuses(capsys, "--input", "x")
    for name, change, why in (
            ("task", {"task": "other"}, 'task: expected one of prompt, summarize, edits, got "other"'),
            ("objective", {"objective": ["wmle"]}, "objective: expected one of reinforce, wmle, "),
            ("flags", {"agg": None}, "not those of a run of this version")):
        shutil.copytree(runs.folder / "summarize", name)
        config = json.loads(Path(name, "config.json").read_text()) | change
        Path(name, "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        assert why in refuses(capsys, "--out_dir", name, "--input", "x")
    shutil.copytree(runs.folder / "summarize", "mixed")
    shutil.copy(runs.folder / "edits" / "task.pt", "mixed")
    assert "files of different runs" in refuses(capsys, "--out_dir", "mixed", "--input", "x")
    shutil.copytree(runs.folder / "prompt", "ids")
    summary = json.loads(Path("ids", "summary.json").read_text()) | {"best_prompt_ids": [1, 10 ** 9, 2]}
    Path("ids", "summary.json").write_text(json.dumps(summary))
    assert "best_prompt_ids: expected 3 ids, got [1, 1000000000, 2]" in refuses(
        capsys, "--out_dir", "ids", "--input", "x")


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize("row, said", [
    ({}, "mine.jsonl:2: candidates: expected a list of texts (or chosen and rejected), got nothing"),
    ({"candidates": []},
     "mine.jsonl:2: candidates: expected a list of texts (or chosen and rejected), got []"),
    ({"candidates": "cat"},
     'mine.jsonl:2: candidates: expected a list of texts (or chosen and rejected), got "cat"'),
    ({"candidates": ["cat", 3]},
     "mine.jsonl:2: candidates: expected texts (or lists of ids below 264), got 3"),
    ({"candidates": ["cat", " "]},
     'mine.jsonl:2: candidates: expected texts (or lists of ids below 264), got " "'),
    ({"candidates": [[1, 264]]},
     "mine.jsonl:2: candidates: expected texts (or lists of ids below 264), got [1, 264]"),
    ({"candidates": [[True]]},
     "mine.jsonl:2: candidates: expected texts (or lists of ids below 264), got [true]"),
    ({"candidates": ["cat"], "scores": [float("nan")]}, "mine.jsonl:2: scores: expected numbers, got NaN"),
    ({"candidates": ["cat"], "scores": ["1"]}, 'mine.jsonl:2: scores: expected numbers, got "1"'),
    ({"candidates": ["cat"], "scores": [1, 2]},
     "mine.jsonl:2: scores: expected a number a candidate, 1 in all, got [1, 2]"),
    ({"candidates": ["cat"], "document": None}, "mine.jsonl:2: document: expected str, got null"),
    ({"candidates": ["cat"], "document": " "}, "mine.jsonl:2: document: expected a text, got an empty one"),
    ({"chosen": "cat", "rejected": None},
     "mine.jsonl:2: candidates: expected texts (or lists of ids below 264), got null")])
def test_rows_with_something_wrong_are_named_before_anything_is_scored(runs, capsys, row, said):
    good = {"document": "home cat sat", "candidates": ["the cat sat"]}
    write_jsonl(Path("mine.jsonl"), [good, {"document": "home"} | row])
    line = refuses(capsys, "--out_dir", runs.folder / "summarize", "--score", "mine.jsonl",
                   "--out", "new.jsonl")
    assert line == f"sample.py: {said}" and not Path("new.jsonl").exists()


def test_a_row_without_its_input_is_named(runs, capsys):
    write_jsonl(Path("mine.jsonl"), [{"candidates": ["the cat sat"]}])
    assert refuses(capsys, "--out_dir", runs.folder / "summarize", "--score", "mine.jsonl") == \
        "sample.py: mine.jsonl:1: document: expected str, got nothing"


@pytest.mark.parametrize("args, said", [
    (["--input", ""], "--input: document: expected a text, got an empty one"),
    (["--input", "docs.jsonl"], "docs.jsonl: expected a text or a file, got nothing"),
    (["--input", "."], ".: expected a text or a file, got a folder"),
    (["--input", "bad.jsonl"], "bad.jsonl:1: document: expected str, got nothing"),
    (["--input", "empty.txt"], "empty.txt: expected one text a line, got nothing"),
    (["--input", "latin.txt"], "latin.txt:1: expected UTF-8 text, got byte 0xe9"),
    (["--score", "missing.jsonl"], "missing.jsonl: expected a readable file, got No such file or directory"),
    (["--score", "empty.txt"], "empty.txt: expected at least one row, got nothing"),
    (["--score", "latin.txt"], "latin.txt:1: expected UTF-8 text, got byte 0xe9"),
    (["--input", "x", "--score", "y"], "--input and --score: expected one of them"),
    (["--input", "x", "--max_new_tokens", "11"], "--max_new_tokens 11: expected 1 to 10"),
    (["--input", "x", "--num_samples", "0"], "expected int of at least 1, got 0"),
    (["--input", "x", "--temperature", "nan"], "expected float of at least 0, got nan"),
    (["--input", "x", "--temperature", "-1"], "expected float of at least 0, got -1"),
    (["--input", "x", "--top_k", "many"], "expected int of at least 1, got many"),
    (["--input", "x", "--num_samples", "2", "--temperature", "0"],
     "--num_samples 2: greedy outputs are all alike"),
    (["--score", "bad.jsonl", "--top_k", "2"], "--top_k: --score writes nothing"),
    (["--input", "x", "--out", "no/where.jsonl"],
     "--out no/where.jsonl: expected a file in a folder that is there"),
    (["--inptu", "x"], "did you mean --input?"), ([], "nothing to do")])
def test_wrong_calls_end_in_one_line(runs, capsys, monkeypatch, args, said):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    write_jsonl(Path("bad.jsonl"), [{"text": "cat"}])
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    assert said in refuses(capsys, "--out_dir", runs.folder / "summarize", *args)


def test_each_task_refuses_what_it_cannot_do(runs, capsys):
    prompt, summarize = run_of(runs, "prompt"), run_of(runs, "summarize")
    with pytest.raises(UserError, match="writes no texts, it classifies them"):
        prompt.write(["x"])
    with pytest.raises(UserError, match="writes texts, it classifies none"):
        summarize.classify(["x"])
    with pytest.raises(UserError, match="expected a list of texts or rows"):
        summarize.write("home cat sat")
    with pytest.raises(UserError, match="expected a list of texts, got \"the cat\""):
        summarize.score("home", "the cat")
    with pytest.raises(UserError, match=r"texts\[1\]: document: expected str, got 3"):
        summarize.write(["home", 3])
    assert "--seed: task prompt classifies" in refuses(capsys, "--out_dir", prompt.folder, "--input", "x",
                                                       "--seed", 2)


def test_the_device_that_is_not_there_is_refused(runs, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert "this machine has no GPU" in refuses(capsys, "--out_dir", runs.folder / "summarize",
                                                "--input", "x", "--device", "cuda")
