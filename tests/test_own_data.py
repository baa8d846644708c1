"""Data that people bring: csv files, one file for all splits, widths and guidance that the rows decide.

EXAMPLES are the forms of docs/your_data.md, one of each.
"""
import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import train
from support.rows import csv_lines
from tasks.annotated import decide_guidance, read_edits
from tasks.edits import EditsTask
from tasks.fewshot import few_shot
from tasks.summarize import SummarizeTask, read_pairs

FIELDS = {"text": (("text", "sentence"), str), "label": (("label",), int)}
EXAMPLES = {
    "summaries.jsonl": '{"document": "It rained all day .", "summary": "rain"}\n',
    "summaries.csv": 'document,summary\n"It rained, all day.\nThen it stopped.","rain, ""mostly"""\n',
    "news.csv": "article,highlights\nIt rained all day .,rain\n",
    "shots.tsv": "sentence\tlabel\na dull film\t0\n",
    "shots.csv": "text,label\n\"dull, dull\",0\n",
    "edits.jsonl": '{"prompt": "when ?", "rejected": "at ten", "edited": "at six", "errors": [[3, 6]]}\n',
    "pairs.csv": "prompt,chosen,rejected\nwhen ?,at nine,i do not know\n",
    "dialogues.jsonl": json.dumps({"chosen": "\n\nHuman: hi\n\nAssistant: hello",
                                   "rejected": "\n\nHuman: hi\n\nAssistant: go"}) + "\n",
    "rankings.jsonl": '{"prompt": "a fruit", "candidates": ["bread", "a pear"], "scores": [0, 1]}\n',
    "rankings.csv": 'prompt,candidates,scores\na fruit,"[""bread"", ""a pear""]","[0, 1]"\n',
}


def put(path, text):
    """Text or bytes to a file, packed where its name says so."""
    content = text if isinstance(text, bytes) else text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return str(path)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def one_line(call, *args, **more):
    """The message of the UserError that a call ends in."""
    with pytest.raises(data.UserError) as error:
        call(*args, **more)
    assert str(error.value).isprintable()
    return str(error.value)


# -------------------------------------------------------------------------------------------------------- csv


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_knows_quotes_newlines_in_quotes_byte_order_marks_and_windows_line_ends(tmp_path, name):
    text = '\ufefflabel, text ,more\r\n1,"fine, he said ""yes""\r\nand left",x\r\n\r\n0,bad \u2028 day,\r\n'
    want = [{"text": 'fine, he said "yes"\r\nand left', "label": 1}, {"text": "bad \u2028 day", "label": 0}]
    assert data.read_rows(put(tmp_path / name, text), FIELDS) == want


def test_a_packed_tsv_is_read_like_a_plain_one(tmp_path):
    assert data.read_rows(put(tmp_path / "a.tsv.gz", 'text\tlabel\n"fine\t1\n'), FIELDS) == [
        {"text": '"fine', "label": 1}]


def test_a_row_of_a_csv_file_is_named_by_its_first_line(tmp_path):
    text = 'a,b\n1,"x\ny\nz"\n\n2,q\n'
    lines = enumerate(text.splitlines(keepends=True), 1)
    assert list(csv_lines("f", lines)) == [(1, ["a", "b"]), (2, ["1", "x\ny\nz"]), (6, ["2", "q"])]
    path = put(tmp_path / "a.csv", 'text,label\n"x\ny",1\n\nz,one\n')
    assert one_line(data.read_rows, path, FIELDS) == f'{path}:5: label: expected int, got "one"'


def test_a_field_may_be_longer_than_the_library_allows_by_itself(tmp_path):
    path = put(tmp_path / "a.csv", "text,label\n" + "x" * 200_000 + ",1\n")
    assert len(data.read_rows(path, FIELDS)[0]["text"]) == 200_000


@pytest.mark.parametrize("text, says", [
    ("text,label\nx,1\ny,1,2\n", ":3: columns: expected 2, got 3"),
    ("text,label\nx,1\ny\n", ":3: columns: expected 2, got 1"),
    ('text,label\nx,1\n"y,1\nz,1\n',
     ":3: csv: expected comma-separated fields, got a quote that is never closed"),
    ('text,label\n"x"y,1\n', ":2: csv: expected comma-separated fields, got Error: "),
    ("text,text,label\nx,y,1\n", ':1: columns: expected different names, got "text" twice'),
    ("text;label\nx;1\n",  # nothing is guessed
     ":1: text: expected a column named text or sentence, got columns text;label"),
    ("", ": expected at least one row, got nothing"),
    ("text,label\n", ": expected at least one row, got nothing"),
    ("text,label\n,1\n  ,0\n", ": expected at least one row, got 2 with an empty text"),
    (b"text,label\nx,1\ncaf\xe9,1\n", ":3: expected UTF-8 text, got byte 0xe9"),  # latin-1
    (b"text,label\nx,1\ny\0,1\n", ":3: expected UTF-8 text, got a NUL byte")])
def test_a_broken_csv_file_is_one_line_with_file_and_line(tmp_path, text, says):
    path = put(tmp_path / "a.csv", text)
    assert one_line(data.read_rows, path, FIELDS).startswith(path + says)


@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv", "a.csv.gz"])
def test_text_of_two_bytes_a_character_is_refused(tmp_path, name):
    path = put(tmp_path / name, "text,label\nx,1\n".encode("utf-16-le"))
    assert one_line(data.read_rows, path, FIELDS) == f"{path}:1: expected UTF-8 text, got a NUL byte"


def test_empty_rows_of_a_csv_file_are_left_out_counted_and_said(tmp_path):
    said, path = [], put(tmp_path / "a.csv", "text,label\nx,1\n,1\n\" \",0\n")
    assert data.read_rows(path, FIELDS, say=said.append) == [{"text": "x", "label": 1}]
    assert said == [f"{path}: 2 of 3 rows had an empty text and were left out"]


@pytest.mark.parametrize("value, got", [("[1", '"[1"'), ("x", '"x"'), ('{"a": 1}', '"{\\"a\\": 1}"')])
def test_a_list_in_a_table_is_json_or_an_error(tmp_path, value, got):
    quoted = '"' + value.replace('"', '""') + '"'
    path = put(tmp_path / "a.csv", f"c\n{quoted}\n")
    assert one_line(data.read_rows, path, {"c": (("c",), list)}) == f"{path}:2: c: expected list, got {got}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_form_that_the_documentation_shows_is_read(tmp_path, name):
    text, kind = EXAMPLES[name], name.split(".")[0]
    if kind == "shots":
        assert data.read_rows(put(tmp_path / name, text), FIELDS)[0]["label"] == 0
    elif kind in ("summaries", "news"):
        end = name.split(".")[1]
        for split in ("train", "validation", "test"):
            put(tmp_path / f"{split}.{end}", text)
        pairs = read_pairs(str(tmp_path), cache_dir=tmp_path / "cache")
        assert pairs["test"][0]["document"].startswith("It rained")
    else:
        for split in ("train", "test"):
            put(tmp_path / f"{split}.{name.split('.')[1]}", text)
        row = read_edits(str(tmp_path))["train"][0]
        assert row["form"] == {"dialogues": "pairs"}.get(kind, kind) and row["prompt"].strip()


# ----------------------------------------------------------------------------------------------------- splits


def documents(n, twice=()):
    """n rows; documents with a number in `twice` stand there a second time, written otherwise."""
    rows = [{"document": f"text {i}", "summary": f"s {i}"} for i in range(n)]
    return rows + [{"document": f" TEXT   {i}", "summary": "again"} for i in twice]


def split(rows, seed=1, splits=("train", "validation", "test"), **there):
    said = []
    found = {"train": rows} | there
    out = data.complete_splits(found, splits, seed, lambda row: row["document"], "source", said.append)
    return out, said


def test_what_is_missing_is_a_tenth_of_train_and_every_row_has_one_place():
    rows = documents(50)
    out, said = split(rows)
    assert {name: len(part) for name, part in out.items()} == {"train": 40, "validation": 5, "test": 5}
    assert sorted(str(row) for part in out.values() for row in part) == sorted(map(str, rows))
    assert said == [
        "source: validation and test: each 10 % of train by --split_seed 1 (train 40, validation 5, test 5)"]


def test_only_what_is_missing_is_cut_off_and_nothing_where_nothing_is():
    own = documents(3)
    out, said = split(documents(30), test=own)
    assert out["test"] is own and len(out["validation"]) == 3 and len(out["train"]) == 27
    assert said == ["source: validation: 10 % of train by --split_seed 1 (train 27, validation 3)"]
    whole = {"validation": own, "test": own}
    assert split(documents(30), **whole) == ({"train": documents(30)} | whole, [])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rows_of_equal_documents_are_on_one_side(seed):
    out, _ = split(documents(40, twice=range(40)), seed)
    home = [(data.same_text(row["document"]), name) for name, part in out.items() for row in part]
    assert len(home) == 80 and len(set(home)) == 40
    assert min(map(len, out.values())) >= 8


def test_a_seed_gives_the_same_split_on_every_machine_and_whatever_order_the_rows_have():
    rows = documents(20)
    names = lambda out, name: {row["document"] for row in out[name]}
    out, other, again = split(rows)[0], split(rows, 2)[0], split(rows[::-1])[0]
    assert names(out, "validation") == {"text 11", "text 18"}  # the last two by sha256 of "1 text i"
    assert names(out, "test") == {"text 17", "text 5"}  # and the two before them
    assert all(names(out, name) == names(again, name) for name in out)
    assert names(other, "test") != names(out, "test")
    assert [row for row in rows if row in out["train"]] == out["train"]  # the rows stay in the file's order


def test_a_row_more_moves_few_others():
    a, b = split(documents(200))[0], split(documents(201))[0]
    held = [{row["document"] for row in x["validation"]} for x in (a, b)]
    assert len(held[0] & held[1]) >= 18


@pytest.mark.parametrize("rows", [documents(2), documents(1) * 9, documents(2, twice=[0, 1])])
def test_a_split_that_would_leave_nothing_is_one_line(rows):
    assert one_line(split, rows) == (
        f"source: expected at least 3 rows that differ, to be split into train, validation, test, got "
        f"{len({data.same_text(r['document']) for r in rows})}")
    assert min(map(len, split(documents(3))[0].values())) == 1


def test_one_file_is_enough_for_summaries_and_for_edits(tmp_path):
    said = []
    path = put(tmp_path / "all.csv", "document,summary\n" + "".join(f"d {i},s\n" for i in range(20)))
    pairs = read_pairs(path, say=said.append, cache_dir=tmp_path / "cache")
    assert [len(rows) for rows in pairs.values()] == [16, 2, 2] and len(said) == 1
    path = put(tmp_path / "all.jsonl", jsonl({"prompt": f"p {i % 10}", "rejected": f"a {i}", "edited": "b"}
                                             for i in range(40)))
    splits = read_edits(path)
    prompts = [{row["prompt"] for row in rows} for rows in splits.values()]
    assert [len(rows) for rows in splits.values()] == [36, 4] and not prompts[0] & prompts[1]
    assert [len(rows) for rows in read_edits(path, limit=3).values()] == [3, 3]


def test_a_folder_may_lack_validation_and_may_call_it_dev(tmp_path):
    for name in ("train", "test"):
        put(tmp_path / f"{name}.jsonl", jsonl(documents(20)))
    sizes = lambda: [len(x) for x in read_pairs(str(tmp_path), cache_dir=tmp_path / "cache").values()]
    assert sizes() == [18, 2, 20]
    put(tmp_path / "dev.csv", "document,summary\nx,y\n")
    assert sizes() == [20, 1, 20]
    (tmp_path / "train.jsonl").unlink()
    assert "expected one of train.jsonl" in one_line(read_pairs, str(tmp_path))
    says = "no/where: expected a folder, a file or hub:<id>[:config], got nothing"
    assert one_line(read_pairs, "no/where") == says


def test_edits_that_change_nothing_fill_no_split(tmp_path):
    rows = [{"prompt": f"p {i}", "rejected": "a", "edited": "a"} for i in range(9)]
    path = put(tmp_path / "a.jsonl", jsonl([*rows, {"prompt": "q", "rejected": "a", "edited": "b"}]))
    assert "expected at least 2 rows that differ" in one_line(read_edits, path)


def test_a_split_that_the_hub_does_not_have_is_cut_off_train(monkeypatch, tmp_path):
    import datasets

    def load_dataset(id, config, split):
        if split != "train":
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].")
        return datasets.Dataset.from_list(documents(20))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [len(rows) for rows in read_pairs("hub:a/b", cache_dir=tmp_path).values()] == [16, 2, 2]


def shots(n, classes=2):
    return [{"text": f"text {i}", "label": i % classes} for i in range(n)]


def test_few_shot_sets_of_one_file_have_equal_classes_and_share_no_text():
    said, rows = [], shots(40) + [{"text": "TEXT  0", "label": 0}, {"text": "text 1", "label": 0}]
    sets = few_shot(rows, 2, 4, 1, "source", said.append)
    texts = {name: {data.same_text(row["text"]) for row in part} for name, part in sets.items()}
    assert [len(x) for x in texts.values()] == [8, 8, 24] and len(set().union(*texts.values())) == 40
    assert sum(map(len, sets.values())) == 42
    first = {data.same_text(row["text"]): row["label"] for row in reversed(rows)}  # the first label counts
    assert all(Counter(first[text] for text in texts[name]) == {0: 4, 1: 4} for name in ("train", "dev"))
    assert said == ["source: train and dev: 4 texts a class of 42 rows by --split_seed 1; test: the rest"]
    again = [few_shot(rows, 2, 4, seed, "source", said.append) for seed in (1, 2)]
    assert again[0] == sets != again[1]


def test_too_few_texts_of_a_class_for_few_shot_sets_are_one_line():
    say = [].append
    assert one_line(few_shot, shots(16), 2, 4, 1, "source", say) == (
        "source: expected at least 9 different texts a class, to draw --shots 4 for train and for dev, got 8 "
        "of class 0")
    assert "0 of class 1" in one_line(few_shot, shots(40, 1), 2, 4, 1, "source", say)
    assert few_shot(shots(16), 2, 4, 1, "source", say, test=False)["test"] == []  # a test set lies elsewhere


# ----------------------------------------------------------------------------------------------------- widths


def widths(contexts, answers, document=None, summary=None, limit=512, own="folder"):
    """(max_document, max_summary, what was said) for rows of these lengths."""
    c, said = SimpleNamespace(max_document=document, max_summary=summary, context_limit=limit, data=own), []
    data.decide_widths(c, contexts, answers, ("documents", "summaries"), said.append)
    return c.max_document, c.max_summary, said


def test_the_98th_percentile_is_the_smallest_width_that_cuts_one_row_of_fifty_at_most():
    assert data.percentile(range(1, 101)) == 98 and data.percentile(range(100, 0, -1)) == 98
    assert data.percentile(range(1, 51)) == 49 and data.percentile(range(1, 50)) == 49
    assert data.percentile([7]) == 7 and data.percentile([1] * 98 + [9, 9]) == 1


def test_widths_come_from_the_training_rows_and_are_said_once():
    assert widths([100] * 98 + [400] * 2, [10] * 98 + [60] * 2) == (
        100, 10, ["widths: documents up to 100 tokens, summaries up to 10 (98th percentile of train)"])


P98 = "98th percentile of train"


@pytest.mark.parametrize("given, want, line", [
    (dict(document=30), (30, 60), f"documents up to 30 tokens (given by hand), summaries up to 60 ({P98})"),
    (dict(summary=20), (400, 20), f"documents up to 400 tokens ({P98}), summaries up to 20 (given by hand)"),
    (dict(document=900, limit=100), (900, 50), f"documents up to 900 tokens (given by hand), "
                                               f"summaries up to 50 ({P98}: 60, cut to --context_limit 100)"),
    (dict(limit=300), (240, 60), f"documents up to 240 tokens ({P98}: 400, cut to --context_limit 300), "
                                 f"summaries up to 60 ({P98})"),
    (dict(limit=4), (2, 2), f"documents up to 2 tokens ({P98}: 400, cut to --context_limit 4), "
                            f"summaries up to 2 ({P98}: 60, cut to --context_limit 4)")])
def test_a_width_given_by_hand_wins_and_the_others_keep_within_the_context_limit(given, want, line):
    document, summary, said = widths([400] * 9, [60] * 9, **given)
    assert (document, summary) == want and said == ["widths: " + line]


def test_two_widths_given_by_hand_are_taken_and_nothing_is_said():
    assert widths([400], [60], 600, 300) == (600, 300, [])


def test_an_answer_that_leaves_no_room_for_its_input_is_one_line():
    assert one_line(widths, [4], [6], summary=512) == (
        "--context_limit 512: expected more than --max_summary 512, as it holds an input and its answer")


def test_embedded_worlds_keep_their_widths():
    assert widths([4], [6], own=None) == (256, 24, []) and widths([4], [6], 9, own=None) == (9, 24, [])


def flags(*typed):
    return train.parse_flags(train.Flags, typed, "doc")[0]


def test_threads_are_chosen_by_the_widths_that_the_data_may_ask_for():
    reason = lambda *typed: train.checked(flags("--task", "summarize", *typed), ())[1]
    assert reason().startswith("12 Gflop a step")  # 280 tokens
    assert reason("--data", "x").startswith("22 Gflop a step")  # --context_limit 512
    assert reason("--data", "x", "--max_document", "256", "--max_summary", "24") == reason()


def config(folder, **change):
    own = dict(data=str(folder), limit=0, document_column=None, summary_column=None, tokenizer="byte",
               vocab_size=300, max_document=None, max_summary=None, context_limit=512, curve_size=2, seed=1,
               split_seed=1, K=None, guidance=None, damage=None, cache_dir=str(folder / "cache"), threads=1,
               ask=None)
    return SimpleNamespace(**own | change)


def test_summaries_are_as_wide_as_training_references_and_each_text_is_encoded_once(tmp_path, monkeypatch):
    for name, n in (("train", 7), ("validation", 30), ("test", 30)):
        put(tmp_path / f"{name}.jsonl", jsonl({"document": "d" * n, "summary": "s" * i} for i in (1, n)))
    encoded = []
    encode = data.Tokenizer.encode_batch
    monkeypatch.setattr(data.Tokenizer, "encode_batch",
                        lambda tok, texts, threads: encoded.extend(texts) or encode(tok, texts, threads))
    said, c = [], config(tmp_path)
    task = SummarizeTask(c, torch.device("cpu"), None, said.append)
    assert (c.max_document, c.max_summary, task.width) == (8, 9, 9)  # " ddddddd"; " sssssss" and end-of-text
    assert len(encoded) == 12 and "widths: documents up to 8 tokens, summaries up to 9" in said[0]
    x = task.pick("train", torch.arange(2))
    assert x.reference.shape == (2, 9) and x.reference[1, 8] == task.eot
    assert task.pick("test", torch.arange(2)).context.shape == (2, 8)


def test_answers_are_as_wide_as_all_answers_of_the_training_rows(tmp_path):
    rows = [{"prompt": "p", "passages": "q" * 5, "chosen": "c" * 20, "rejected": "r"}] * 3
    put(tmp_path / "train.jsonl", jsonl(rows))
    put(tmp_path / "test.jsonl", jsonl([row | {"chosen": "c" * 90} for row in rows]))
    said, c = [], config(tmp_path)
    task = EditsTask(c, torch.device("cpu"), None, said.append)
    assert (c.max_document, c.max_summary) == (8, 22)  # " p" + " qqqqq"; " c..." and end-of-text
    assert "widths: prompts up to 8 tokens, answers up to 22 (98th percentile of train)" in said
    tokens, mask, *_ = task.pairs("train")
    assert tokens.shape == (3, 2, 22) and mask.sum(-1).tolist() == [[3, 22]] * 3


# --------------------------------------------------------------------------------------------------- guidance


EDIT = {"prompt": "p", "rejected": "a b", "edited": "a c"}
PAIR = {"prompt": "p", "rejected": "a b", "chosen": "x y"}
RANKING = {"prompt": "p", "candidates": ["a", "b"], "scores": [1, 0]}


@pytest.mark.parametrize("rows, guidance, says", [
    ([EDIT], "edits", "rejected and edited"), ([PAIR], "token", "chosen and rejected"),
    ([RANKING], "token", "candidates with scores"),
    ([EDIT, PAIR], "token", "rejected and edited; chosen and rejected")])
def test_the_rows_decide_the_guidance_and_it_is_said(tmp_path, rows, guidance, says):
    for name in ("train", "test"):
        put(tmp_path / f"{name}.jsonl", jsonl(rows * 2))
    c, said = SimpleNamespace(data=str(tmp_path), guidance=None), []
    decide_guidance(c, read_edits(c.data), said.append)
    assert c.guidance == guidance and said == [f"guidance: {guidance}, the default for rows of {says}"]
    c.guidance = "bandit"
    decide_guidance(c, read_edits(c.data), said.append)
    assert c.guidance == "bandit" and len(said) == 1


def test_the_embedded_edits_are_edits_and_rankings_never_are():
    c = SimpleNamespace(data=None, guidance=None)
    decide_guidance(c, {"train": [EDIT]}, None)
    assert c.guidance == "edits"
    c = SimpleNamespace(data="ranks", guidance="edits")
    says = one_line(decide_guidance, c, {"train": [RANKING | {"form": "rankings"}]}, None)
    assert says.startswith("ranks: train: --guidance edits: expected pairs with an edited answer, got ")


def test_the_share_of_changed_tokens_is_said_where_pairs_are_taken_for_edits(tmp_path):
    for name in ("train", "test"):
        put(tmp_path / f"{name}.jsonl", jsonl([PAIR | {"chosen": "a c"}] * 2))
    said = []
    task = EditsTask(config(tmp_path, guidance="edits"), torch.device("cpu"), None, said.append)
    task.pairs("train")
    # b and c of 10 tokens, end-of-text included
    assert said[-1] == "train: 20 % of the tokens of the answers were changed by the edits"


# ------------------------------------------------------------------------------------------------- whole runs

TINY = ("--device cpu --n_layer 1 --n_embd 16 --n_head 2 --sft_steps 2 --sft_batch 2 "
        "--reward_first 2 --reward_batch 2 --reward_every 1 --batch_size 2 --minibatches 1 --replay 8 "
        "--log_every 1 --eval_every 2 --tokenizer byte --task edits --data all.csv --out_dir run "
        "--cache_dir cache").split()


def test_a_run_on_one_csv_file_keeps_split_widths_and_guidance_when_it_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "all.csv", "prompt,chosen,rejected\n" + "".join(f"p {i},yes {i},no\n" for i in range(12)))
    assert train.main([*TINY, "--policy_steps", "1", "--split_seed", "3"]) == 0
    written = json.loads(Path("run/config.json").read_text())
    assert {k: written[k] for k in ("guidance", "max_document", "max_summary", "split_seed")} == {
        "guidance": "token", "max_document": 5, "max_summary": 8, "split_seed": 3}
    out = capsys.readouterr().out
    for line in ("guidance: token, the default", "all.csv: test: 10 % of train by --split_seed 3",
                 "widths: prompts up to"):
        assert out.count(line) == 1
    before = torch.load("run/ckpt.pt", weights_only=True)["data"]
    assert train.main(["--init_from", "resume", "--out_dir", "run", "--policy_steps", "2"]) == 0
    # threads included: their number is decided by the work of a step at the widths in use
    assert json.loads(Path("run/config.json").read_text()) | {"policy_steps": 1} == written
    assert torch.load("run/ckpt.pt", weights_only=True)["data"] == before
    assert "widths:" not in capsys.readouterr().out
