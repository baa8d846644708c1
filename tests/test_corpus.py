"""Corpora that do not fit into memory: what the cache keeps of them, when it is made, and that a task reads
the same from there as from lists."""
import gzip
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import fork, forks

import bench
import data
import train
from support import corpus, files
from support.rows import Source, find_source
from tasks.summarize import SummarizeTask

FIELDS = {"document": (("document",), str), "summary": (("summary",), str)}


def write(folder, n=12, word="rain", **other):
    """Three splits; documents of 1 to n words, the first row of each has an empty summary."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = [{"document": f"{split} {word} " * (i + 1), "summary": f"{split} été {i}" if i else " "}
                for i in range(other.get(split, n))]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(folder, cache, **change):
    own = dict(data=str(folder), limit=0, document_column=None, summary_column=None, tokenizer=None,
               vocab_size=300, max_document=None, max_summary=None, context_limit=512, curve_size=2, seed=1,
               split_seed=1, cache_dir=str(cache), threads=2, ask=None)
    return SimpleNamespace(**own | change)


def start(folder, cache, **change):
    """The task, and what was said while it read."""
    said = []
    return SummarizeTask(flags(folder, cache, **change), torch.device("cpu"), None, said.append), said


def kept(cache, kind):
    return sorted(x.name for x in cache.glob(f"{kind}-*"))


# ----------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_batch_from_disk_is_that_of_tensors_in_memory(tmp_path, tokenizer):
    """Rows, ids, widths, masks and cuts."""
    task, _ = start(write(tmp_path / "in"), tmp_path / "cache", tokenizer=tokenizer, max_document=40)
    rows = data.read_rows(tmp_path / "in" / "test.jsonl", FIELDS, say=[].append)
    assert list(task.rows["test"]) == rows and task.rows["test"][-1] == rows[-1] and len(rows) == 11
    ids = [data.encode([row[k] for row in rows], task.tokenizer, end=k == "summary") for k in FIELDS]
    contexts, references = [[row[:most] for row in rows] for rows, most in zip(ids, (40, task.width))]
    want = data.Batch(torch.arange(11), *data.pad(contexts), *data.pad(references, task.width))
    index = torch.tensor([3, 0, 9, 3])
    for name in ("index", "context", "context_mask", "reference", "reference_mask"):
        got, there = getattr(task.pick("test", index), name), getattr(want.at(index, "cpu"), name)
        assert torch.equal(got, there) and got.dtype == there.dtype


def test_neither_rows_nor_ids_are_in_memory(tmp_path):
    task, _ = start(write(tmp_path / "in"), tmp_path / "cache")
    assert isinstance(task.rows["train"], corpus.Rows) and isinstance(task.rows["train"][:2], corpus.Rows)
    for ids in (task.tensors["train"].contexts, task.tensors["train"].references):
        assert isinstance(ids.flat, np.memmap) and ids.flat.dtype == np.uint16


def test_no_more_tokens_are_kept_than_a_width_can_have(tmp_path):
    write(tmp_path / "in", n=60)
    full, _ = start(tmp_path / "in", tmp_path / "cache", tokenizer="byte", context_limit=4000)
    task, said = start(tmp_path / "in", tmp_path / "cache", tokenizer="byte", context_limit=100)
    kept = task.tensors["train"].contexts
    assert max(len(kept[i]) for i in range(len(kept))) == 100
    assert (kept.lengths == full.tensors["train"].contexts.lengths).all()  # as the text has them
    assert np.array_equal(kept[40], full.tensors["train"].contexts[40][:100])
    assert "98th percentile of train: 650, cut to --context_limit 100" in said[3]


def test_missing_splits_and_a_limit_are_those_of_plain_rows(tmp_path):
    rows = [{"document": f"text {i % 40}", "summary": f"s {i}"} for i in range(60)]
    path = tmp_path / "all.csv"
    path.write_text("document,summary\n" + "".join(f"{row['document']},{row['summary']}\n" for row in rows))
    splits, said = ("train", "validation", "test"), []
    want = data.complete_splits({"train": rows}, splits, 7, lambda row: row["document"], str(path),
                                said.append)
    for limit in (None, 4):
        now = []
        found = data.corpus_rows(str(path), splits, FIELDS, limit, 7, tmp_path / "cache", say=now.append)
        assert {name: list(x) for name, x in found.items()} == {k: x[:limit] for k, x in want.items()}
        assert now == said  # at every start


def test_encoding_in_batches_is_encoding_text_by_text():
    texts = [" the <|endoftext|> end", " naïve 日本 🙂", "", " " * 9 + "x", " \ud800 odd"]
    bpe = data.train_bpe([" the end of the naive end"] * 3, 300)
    for tok in (data.byte_tokenizer(), bpe, bpe.compact([" the"]), bpe.with_first([260, 5])):
        for threads in (1, 3):
            assert [x.tolist() for x in tok.encode_batch(texts, threads)] == [tok.encode(x) for x in texts]


def test_a_tokenizer_is_learned_from_all_text_or_from_rows_spread_over_it(tmp_path):
    task, _ = start(write(tmp_path / "in", n=41), tmp_path / "cache")
    rows = task.rows["train"]
    every = [" " + row[k] for row in rows for k in ("document", "summary")]
    assert corpus.sample_texts(rows, ["document", "summary"]) == every
    assert sum(x.bytes() for x in task.rows.values()) == os.path.getsize(rows.path)
    some = corpus.sample_texts(rows, ["summary"], rows.bytes() / 7.5)
    assert some == [" " + row["summary"] for row in list(rows)[::8]]


# ------------------------------------------------------------------------------------------- when it is made


def test_a_later_start_reads_no_text_and_encodes_none_and_says_the_same(tmp_path, monkeypatch):
    first, said = start(write(tmp_path / "in"), tmp_path / "cache")
    assert said[0] == f"{tmp_path}/in/train.jsonl: 1 of 12 rows had an empty summary and were left out"

    def never(*_, **__):
        raise AssertionError("read again")
    monkeypatch.setattr(Source, "rows", never)
    monkeypatch.setattr(data.Tokenizer, "encode_batch", never)
    monkeypatch.setattr(corpus.Rows, "__iter__", never)
    again, told = start(tmp_path / "in", tmp_path / "cache")
    assert told == said and again.fingerprint() == first.fingerprint()
    assert again.tokenizer.state() == first.tokenizer.state()
    os.rename(tmp_path / "in", tmp_path / "elsewhere")  # the same content in another place is the same corpus
    moved, told = start(tmp_path / "elsewhere", tmp_path / "cache")
    assert told == [line.replace(f"{tmp_path}/in", f"{tmp_path}/elsewhere") for line in said]


def test_what_is_kept_hangs_on_content_tokenizer_and_widths(tmp_path):
    cache = tmp_path / "cache"
    before, _ = start(write(tmp_path / "in"), cache)
    counts = lambda: (len(kept(cache, "rows")), len(kept(cache, "tokens")))
    assert counts() == (1, 1)
    start(tmp_path / "in", cache, vocab_size=290)
    assert counts() == (1, 2)
    start(tmp_path / "in", cache, max_document=20)
    assert counts() == (1, 3)
    start(tmp_path / "in", cache, limit=5)
    assert counts() == (1, 4)
    write(tmp_path / "in", word="snow")  # as many bytes
    after, _ = start(tmp_path / "in", cache)
    assert counts() == (2, 5) and "snow" in after.rows["train"][0]["document"]
    assert all(after.fingerprint()[k] != x for k, x in before.fingerprint().items())


def test_a_fingerprint_names_the_split_that_changed(tmp_path):
    before, _ = start(write(tmp_path / "in"), tmp_path / "cache", tokenizer="byte", max_summary=30)
    rows = (tmp_path / "in" / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "in" / "test.jsonl").write_text("".join(rows[::-1]))
    after, _ = start(tmp_path / "in", tmp_path / "cache", tokenizer="byte", max_summary=30)
    assert [k for k, x in after.fingerprint().items() if before.fingerprint()[k] != x] == ["test", "tokens"]


def test_the_hash_of_a_large_file_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path, memo = tmp_path / "a.jsonl", tmp_path / "memo"
    path.write_text("one")
    assert files.file_digest(path, memo) == files.file_digest(path, memo) and not memo.exists()  # small
    monkeypatch.setattr(files, "LARGE", 1)
    files.file_digest(path, memo)
    assert not memo.exists()  # changed a moment ago, and perhaps again within one tick of the clock
    os.utime(path, (1e9, 1e9))
    one = files.file_digest(path, memo)
    assert len(list(memo.iterdir())) == 1
    monkeypatch.setattr(files.hashlib, "sha256", None)  # from here on nothing can be hashed ...
    monkeypatch.setattr(files, "digest", lambda x: str(x[1:3]).rjust(16, "_"))
    with pytest.raises(TypeError):
        files.file_digest(path, tmp_path / "other")
    monkeypatch.undo()
    monkeypatch.setattr(files, "LARGE", 1)
    path.write_text("two")
    os.utime(path, (1e9 + 5, 1e9 + 5))
    assert files.file_digest(path, memo) != one


def test_a_checkpoint_does_not_grow_with_the_corpus(tmp_path):
    few = ("--task summarize --tokenizer byte --policy_steps 1 --reward_first 1 --reward_steps 1 "
           "--sft_steps 0 --candidates 4 --batch_size 2 --n_layer 1 --n_embd 8 --n_head 2 --threads 1 "
           "--curve_size 2 --device cpu").split()
    sizes = []
    for n in (40, 400):
        folder = tmp_path / f"in-{n}"
        write(folder, n=3)
        row = json.dumps({"document": "the same words " * 3, "summary": "few words"}) + "\n"
        (folder / "train.jsonl").write_text(row * n)
        train.main([*few, "--data", str(folder), "--cache_dir", str(tmp_path / "cache"),
                    "--out_dir", str(tmp_path / f"run-{n}")])
        sizes.append([os.path.getsize(tmp_path / f"run-{n}" / x) for x in ("ckpt.pt", "task.pt")])
    assert sizes[0] == pytest.approx(sizes[1], abs=500)  # 400 rows have 20,000 bytes of text


# ----------------------------------------------------------------------------------------- whole or not there


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, kind):
    def broken(*_, **__):
        raise OSError(28, "No space left on device")
    write(tmp_path / "in")
    monkeypatch.setattr(corpus, "write_meta", broken)
    if kind == "tokens":
        monkeypatch.undo()
        data.corpus_rows(str(tmp_path / "in"), ("train",), FIELDS, None, 1, tmp_path / "cache")
        before = kept(tmp_path / "cache", "rows")
        start(tmp_path / "in", tmp_path / "cache")
        monkeypatch.setattr(corpus, "write_meta", broken)
    with pytest.raises(data.UserError, match="could not be written .No space left on device"):
        start(tmp_path / "in", tmp_path / "cache", vocab_size=291, limit=3 if kind == "tokens" else 0)
    left = list((tmp_path / "cache").rglob("*.tmp")) if (tmp_path / "cache").exists() else []
    assert not left
    if kind == "tokens":
        assert set(before) <= set(kept(tmp_path / "cache", "rows"))


def test_bad_input_leaves_no_folder_behind(tmp_path):
    write(tmp_path / "in")
    (tmp_path / "in" / "test.jsonl").write_text('{"document": "x"}\n')
    with pytest.raises(data.UserError, match="test.jsonl:1: summary: expected str, got nothing"):
        start(tmp_path / "in", tmp_path / "new" / "cache")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()  # but a folder that was there stays
    for cache in ("mine", "mine/cache"):
        with pytest.raises(data.UserError):
            start(tmp_path / "in", tmp_path / cache)
        assert list((tmp_path / "mine").iterdir()) == []


@forks
def test_a_kill_in_the_middle_leaves_nothing_half_valid(tmp_path):
    write(tmp_path / "in")

    def killed():
        corpus.write_meta = lambda folder, meta: os.kill(os.getpid(), signal.SIGKILL)
        start(tmp_path / "in", tmp_path / "cache")
    process = fork.Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").glob("rows-*.tmp")
    assert (left / "rows.jsonl").exists()
    task, _ = start(tmp_path / "in", tmp_path / "cache")
    assert len(task.rows["train"]) == 11 and not left.exists()
    assert len(kept(tmp_path / "cache", "rows")) == len(kept(tmp_path / "cache", "tokens")) == 1


@forks
def test_two_starts_at_once_build_it_once(tmp_path):
    write(tmp_path / "in")
    barrier, answers = fork.Barrier(2), fork.SimpleQueue()

    def together():
        plain, built = corpus.write_meta, []
        corpus.write_meta = lambda folder, meta: built.append(folder) or plain(folder, meta)
        barrier.wait(30)
        task, _ = start(tmp_path / "in", tmp_path / "cache")
        answers.put((len(built), task.fingerprint()))
    processes = [fork.Process(target=together) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = [answers.get() for _ in processes]
    assert found[0][1] == found[1][1] and sum(n for n, _ in found) == 2  # rows once, tokens once


@pytest.mark.parametrize("kind, name", [("rows", "rows.jsonl"), ("rows", "starts.npy"), ("rows", "meta.json"),
                                        ("tokens", "train.context.ids"), ("tokens", "test.reference.npy")])
def test_a_damaged_corpus_is_one_line_that_says_what_to_do(tmp_path, kind, name):
    start(write(tmp_path / "in"), tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob(f"{kind}-*")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:len(content) // 2])
    with pytest.raises(data.UserError) as error:
        start(tmp_path / "in", tmp_path / "cache")
    says = f"{folder}: expected a kept corpus, got damaged files (delete the folder, and it is made again)"
    assert str(error.value) == says


# ----------------------------------------------------------------------------------------------- line by line


def test_files_are_read_line_by_line(tmp_path):
    """The first row is there before the last line, which is wrong, has been read."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as f:
        f.write(b'\xef\xbb\xbf{"document": "a", "summary": "b"}\n' * 1 + b'{"document": "\xff"}\n')
    rows = find_source(path).rows(FIELDS)
    assert next(rows) == {"document": "a", "summary": "b"}
    with pytest.raises(data.UserError, match="a.jsonl.gz:2: expected UTF-8 text, got byte 0xff"):
        next(rows)


def test_a_large_corpus_shows_where_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MANY", 1000)
    write(tmp_path / "in", n=1, train=2100, word="w")
    rows = [{"document": f"{i}", "summary": "s"} for i in range(2100)]
    for split in ("train", "validation", "test"):
        (tmp_path / "in" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    SummarizeTask(flags(tmp_path / "in", tmp_path / "cache", tokenizer="byte"), torch.device("cpu"),
                  lambda *x: said.append(x), lambda line: None)
    assert [x[0] for x in said] == ["read MB"] * 6 + ["ids MB"] * 6
    assert all(0 < i < n for _, i, n, _ in said)  # the last one would print a line however fast it was


def test_the_bench_case_measures_a_first_and_a_later_start(tmp_path, capsys):
    rows = bench.corpus(SimpleNamespace(folder=str(tmp_path), articles=20, threads=1))
    assert [row["variant"] for row in rows] == ["first start", "later start"]
    assert rows[0]["ids"] == rows[1]["ids"] and all(100 < row["mb"] < 1500 for row in rows)
    assert os.listdir(tmp_path) == ["articles-20"]  # the cache is gone, the articles stay
