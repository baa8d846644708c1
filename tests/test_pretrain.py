"""pretrain.py: documents out of files, what is held out, bits per byte against loops on paper, a run that is
stopped or killed, and the folder that it leaves."""
import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import fork, forks

import data
import pretrain
import weights
from model import Config, Transformer
from support import documents
from support.lock import release, take
from support.log import Log
from support.ngram import compressed, ngram_bits

SMALL = ("--n_layer 1 --n_embd 8 --n_head 2 --context 16 --batch_size 2 --vocab_size 270 --steps 6 --every 2 "
         "--threads 1 --device cpu --held_out 0.2 --cache_dir cache").split()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder with twenty documents in in/a.txt."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    with open("in/a.txt", "w", encoding="utf-8") as f:
        f.write("\n\n".join(f"Story {i}. " + f"été {i} " * 400 for i in range(20)))


def go(*words, out="m"):
    return pretrain.main(["--data", "in", "--out", out, *SMALL, *words])


def refused(capsys, *words):
    """The one line that it ends with."""
    with pytest.raises(SystemExit) as leave:
        pretrain.main([str(x) for x in words])
    line = capsys.readouterr().err
    assert leave.value.code == 2 and line.count("\n") == 1 and line.startswith("pretrain.py: ")
    return line


def same(a, b):
    """Whether two folders hold the same weights, to the bit."""
    one, two = [open(f"{x}/model.safetensors", "rb").read() for x in (a, b)]
    return one == two


# -------------------------------------------------------------------------------------------------- documents


def texts_of(names, fields=None):
    rows, keys = documents.documents_of(names, fields, "cache")
    return [row["text"] for row in rows], keys


def test_a_text_file_is_cut_at_blank_lines_into_documents_of_some_length():
    with open("b.txt", "w") as f:
        f.write("\n\nshort\n\nstill the same\n" + "x" * 2000 + "\nand on\n\n\nsecond\r\nline\n")
    found, _ = texts_of(["b.txt"])
    assert found == ["short\n\nstill the same\n" + "x" * 2000 + "\nand on", "second\r\nline"]


def test_folders_files_and_fields_become_documents_in_order(tmp_path):
    os.makedirs("in/deep")
    with open("in/deep/r.jsonl", "w") as f:
        f.write('{"document": "one", "summary": "1", "id": 3}\n{"document": "two", "summary": "2"}\n')
    with open("in/none.bin", "wb") as f:
        f.write(b"\0\1")  # no text by its name
    found, keys = texts_of(["in"])
    assert len(found) == 22 and found[20:] == ["one", "two"] and keys.shape == (22, 32)
    assert texts_of(["in/deep"], ["document", "summary"])[0] == ["one\n1", "two\n2"]
    assert list(documents.sources_of(["in/deep", "in/a.txt"])) == ["in/deep/r.jsonl", "in/a.txt"]


def test_hub_data_sets_are_documents_too(monkeypatch):
    import datasets

    table = datasets.Dataset.from_list([{"text": "one", "label": 0}, {"text": "two", "label": 1}])
    monkeypatch.setattr(datasets, "load_dataset", lambda id, config, split: table)
    assert texts_of(["hub:a/b:c"])[0] == ["one", "two"]


@pytest.mark.parametrize("name, content, says", [
    ("x.txt", b"", "x.txt: expected text, got an empty file"),
    ("x.txt", b" \n\n", "x.txt: expected text, got an empty file"),
    ("x.txt", b"fine\n\xff\xfe\n", "x.txt:2: expected UTF-8 text, got byte 0xff"),
    ("x.txt", b"a\0b", "x.txt:1: expected UTF-8 text, got a NUL byte"),
    ("x.txt.gz", b"not packed", "x.txt.gz: expected gzip data"),
    ("x.jsonl", b'{"id": 1}\n', "x.jsonl:1: text: expected str, got nothing"),
    ("x.jsonl", b'{"text": 1}\n', "x.jsonl:1: text: expected str, got 1"),
    ("x.csv", b"id,label\n1,2\n", "x.csv:1: text: expected a column named text or document"),
    ("x.pdf", b"%PDF", "x.pdf: expected a name that ends in .txt"),
    ("x.txt", b"only one document", "--held_out 0.02: expected at least two documents that differ"),
    ("x.jsonl", b'{"text": "a"}\n{"text": "A "}\n', "expected at least two documents that differ"),
    ("x.jsonl", b'{"text": "a"}\n{"text": "b"}\n', "--data: expected more than --context 256 tokens"),
    (None, None, "nowhere: expected a file, a folder or hub:<id>[:config], got nothing"),
    ("empty", None, "empty: expected files of text")])
def test_bad_input_is_one_line_and_nothing_is_written(name, content, says, capsys):
    if content is not None:
        with open(name, "wb") as f:
            f.write(content)
    elif name:
        os.mkdir(name)
    assert says in refused(capsys, "--data", name or "nowhere", "--out", "m", "--cache_dir", "cache")
    assert not os.path.exists("m")


def test_a_field_that_no_row_has_is_one_line(capsys):
    with open("x.jsonl", "w") as f:
        f.write('{"text": "a"}\n')
    said = refused(capsys, "--data", "x.jsonl", "--out", "m", "--field", "body", "--cache_dir", "cache")
    assert "x.jsonl:1: body: expected str, got nothing" in said


# --------------------------------------------------------------------------------------------------- held out


def read(**change):
    c = SimpleNamespace(data=["in"], field=None, cache_dir="cache", held_out=0.2, vocab_size=270, threads=1,
                        context=16)
    vars(c).update(change)
    return pretrain.read_text(c, Log())


def test_held_out_documents_are_never_trained_on_and_equal_ones_stay_together():
    with open("in/b.jsonl", "w") as f:
        f.writelines(json.dumps({"text": f"Other  {i % 10} {'été ' * 30}"}) + "\n" for i in range(30))
    tokenizer, ids, rows = read()
    sides = [{data.same_text(row["text"]) for row in rows[side]} for side in ("train", "held_out")]
    assert len(sides[0]) == 24 and len(sides[1]) == 6 and not sides[0] & sides[1]
    assert len(rows["train"]) + len(rows["held_out"]) == 50
    for side, part in rows.items():  # and what is drawn from is these texts and no other
        stream = [x for row in part for x in [*tokenizer.encode(" " + row["text"]), tokenizer.eot]]
        assert ids[side].flat.tolist() == stream


def test_a_held_out_share_too_small_for_a_document_takes_one():
    _, _, rows = read(held_out=0.0)
    assert len(rows["held_out"]) == 1 and len(rows["train"]) == 19


def test_the_tokenizer_is_learned_from_the_training_side_alone(monkeypatch):
    seen = []
    plain = data.train_bpe
    monkeypatch.setattr(data, "train_bpe", lambda texts, size: seen.extend(texts) or plain(texts, size))
    _, _, rows = read()
    assert seen == [" " + row["text"] for row in rows["train"]]


def test_windows_hang_on_seed_and_step_alone_and_targets_are_one_on():
    c, flat = SimpleNamespace(seed=3, context=8, batch_size=5), np.arange(100, 200, dtype=np.uint16)
    tokens, targets = pretrain.batch(flat, c, 7)
    assert tokens.shape == targets.shape == (5, 8) and torch.equal(targets, tokens + 1)
    assert torch.equal(tokens, pretrain.batch(flat, c, 7)[0])
    assert not torch.equal(tokens, pretrain.batch(flat, c, 8)[0])
    every = torch.cat([torch.cat(pretrain.batch(flat, c, i)).flatten() for i in range(300)])
    assert every.min() == 100 and every.max() == 199  # the first and the last token are drawn, too


# ------------------------------------------------------------------------------------------------------- bits


def test_bits_are_those_of_a_plain_loop_over_tokens():
    torch.manual_seed(0)
    model, start = Transformer(Config(vocab_size=11, n_ctx=4, n_layer=1, n_head=2, n_embd=8)), 10
    documents = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 3, 10], [5, 10, 2, 2]]
    total = 0.0
    with torch.no_grad():
        for ids in documents:
            whole = [start, *ids]
            for t in range(1, len(whole)):
                first = (t - 1) // 4 * 4  # windows of four begin anew behind the token before them
                logits = model(torch.tensor([whole[first:t]]))[0, -1] @ model.head.t()
                total -= logits.log_softmax(-1)[whole[t]].item() / math.log(2)
    assert pretrain.bits(model, documents, start) == pytest.approx(total, rel=1e-5)
    assert pretrain.bits(model, documents, start, at_once=1) == pytest.approx(total, rel=1e-5)


def test_the_divisor_is_bytes_of_the_text_and_not_characters_or_tokens(monkeypatch):
    monkeypatch.setattr(pretrain, "bits", lambda model, ids, start: 100.0 * len(ids))
    rows = [{"text": "été"}, {"text": "ab"}, {"text": "日"}]  # 5, 2 and 3 bytes
    training = SimpleNamespace(autocast=torch.no_grad, model=None)
    assert pretrain.bits_per_byte(training, [[1]] * 3, rows, 0) == 30.0
    assert pretrain.bits_per_byte(training, [[1]] * 3, rows, 0, 2) == pytest.approx(200 / 7)


def test_counts_of_a_small_stream_are_as_on_paper():
    """Witten-Bell by dictionaries, and a sum of 1 over all next tokens."""
    train, held = [0, 1, 0, 2, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 2]

    def p(word, history):
        if history is None:
            return 1 / 3
        below = p(word, history[1:] if history else None)
        padded = [3] * len(history) + train
        after = [padded[i + len(history)] for i in range(len(train))
                 if tuple(padded[i:i + len(history)]) == history]
        if not after:
            return below
        return (after.count(word) + len(set(after)) * below) / (len(after) + len(set(after)))
    histories = [tuple(([3, 3] + held)[i:i + 2]) for i in range(len(held))]
    want = [-math.log2(p(word, h)) for word, h in zip(held, histories)]
    assert ngram_bits(np.array(train), np.array(held), 3, order=3) == pytest.approx(want)
    for h in histories:
        assert sum(p(word, h) for word in range(3)) == pytest.approx(1)


def test_compressors_count_bits_of_what_they_write_over_bytes_of_the_text():
    import gzip
    import lzma
    text = "été " * 200
    found = compressed(text)
    assert found["gzip"] == pytest.approx(8 * len(gzip.compress(text.encode(), 9)) / 1200)
    assert found["xz"] == pytest.approx(8 * len(lzma.compress(text.encode(), preset=9)) / 1200)


# ------------------------------------------------------------------------------------------------------ a run


def test_it_learns_and_leaves_a_folder_that_weights_reads(capsys):
    assert go("--steps", "60", "--every", "60", "--lr", "0.01", "--baselines") == 0
    summary = json.load(open("m/summary.json"))
    assert 0 < summary["bits_per_byte"] < 5.5 and {"gzip", "xz", "5-gram"} <= set(summary)  # 8.1 at random
    assert len(summary["samples"]) == 3 and "sample: " in capsys.readouterr().out
    model, saved = weights.from_pretrained("m"), torch.load("m/ckpt.pt", weights_only=True)
    for name, x in model.state_dict().items():
        assert torch.allclose(x, saved["model"][name], atol=1e-6), name
    tokenizer = data.load_tokenizer("m", [])
    assert tokenizer.size == model.config.vocab_size and tokenizer.decode(tokenizer.encode(" été")) == " été"


def test_a_run_that_was_stopped_saves_and_goes_on_to_the_bit(monkeypatch, capsys):
    go(out="whole")
    plain = pretrain.Training.update

    def update(self, flat):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C: the update in hand is finished and saved
        return plain(self, flat)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as leave:
        m.setattr(pretrain.Training, "update", update)
        go()
    assert leave.value.code == 130 and "goes on at the last checkpoint" in capsys.readouterr().err
    assert torch.load("m/ckpt.pt", weights_only=True)["step"] == 3 and not os.path.exists("m/summary.json")
    assert go("--resume") == 0 and same("m", "whole")  # the flag says what happens anyway
    steps = [json.loads(line)["step"] for line in open("m/metrics.jsonl")]
    assert steps == [2, 3, 4, 6]


@forks
def test_a_kill_leaves_the_last_checkpoint(monkeypatch):
    go(out="whole")

    def killed():
        plain = pretrain.Training.update
        pretrain.Training.update = lambda self, flat: os._exit(9) if self.step == 5 else plain(self, flat)
        go()
    process = fork.Process(target=killed)
    process.start()
    process.join(100)
    assert process.exitcode == 9 and torch.load("m/ckpt.pt", weights_only=True)["step"] == 4
    assert go() == 0 and same("m", "whole")
    assert go() == 0 and same("m", "whole")  # and once more there is nothing left to do


def test_another_run_s_folder_is_refused(capsys):
    go()
    full = ["--data", "in", "--out", "m", *SMALL]
    assert "of a run with --lr 0.001" in refused(capsys, *full, "--lr", 0.1)
    assert "of a run with --n_embd 8" in refused(capsys, *full, "--n_embd", 12)
    with open("in/a.txt", "a") as f:
        f.write("\n\n" + "more " * 600)
    assert "of a run with --data" in refused(capsys, *full)
    os.mkdir("mine")
    open("mine/thesis.tex", "w").close()
    assert "holds files that are no run" in refused(capsys, "--data", "in", "--out", "mine")
    held = take("m/.lock")
    assert "another process is working in it" in refused(capsys, *full)
    release(held, "m/.lock")


def test_sizes_that_do_not_fit_are_one_line(capsys):
    full = ["--data", "in", "--out", "m", *SMALL]
    assert "expected a multiple of 2 x n_head = 4" in refused(capsys, *full, "--n_embd", 10)
    assert "--vocab_size: expected int of at least 257" in refused(capsys, *full, "--vocab_size", 9)
