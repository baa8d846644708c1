"""docs/recipes.md: a row of every table runs, a few steps on tiny random weights in the real folder format
and data in the layout that it names."""
import json
import os

import pytest
import torch
from test_docs import FEW, ROOT, blocks, calls
from test_roberta import BPE, random_roberta, write_folder
from test_weights import checkpoint, export, random_model

import sample
import train
import weights

PAGE = ROOT / "docs" / "recipes.md"
STANDS_IN = {"distilgpt2": "tiny", "gpt2": "tiny", "roberta-large": "judge",
             "hub:abisee/cnn_dailymail:3.0.0": "pairs"}
SIZES = ("--n_layer", "--n_embd", "--n_head", "--reward_warmup", "--sft_steps")  # the folder's, or none


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with weights, few-shot sets as RLPrompt has them, and documents."""
    monkeypatch.chdir(tmp_path)
    export(random_model(BPE, n_ctx=1024, n_layer=1, n_head=2, n_embd=16), BPE, "tiny")
    judge = random_roberta()
    judge.place = torch.nn.Embedding(514, 32)
    judge.config = type(judge.config)(**vars(judge.config) | {"places": 514})
    write_folder("judge", judge)
    sets = (("sst-2", 2, ("sentence", "sentence")), ("yelp-2", 2, ("sentence", "text")),
            ("agnews", 4, ("text", "sentence")))
    for name, classes, columns in sets:
        few, shared = columns  # of the few-shot files, of the test set one folder up
        os.makedirs(f"16-shot/{name}/16-100")
        for path, column in (("16-100/train", few), ("16-100/dev", few), ("test", shared)):
            rows = [f"the film {path[-3:]} {i} was dull\t{i % classes}" for i in range(8)]
            with open(f"16-shot/{name}/{path}.tsv", "w", encoding="utf-8") as f:
                f.write("\n".join([f"{column}\tlabel", *rows]) + "\n")
    os.makedirs("pairs")
    for name in ("train", "validation", "test"):
        with open(f"pairs/{name}.jsonl", "w", encoding="utf-8") as f:
            rows = [{"article": f"{name} the cat {i} sat", "highlights": f"cat {i}"} for i in range(9)]
            f.write("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def few_steps(words):
    """The words of a recipe with the stand-ins, and with few steps behind them."""
    task = words[words.index("--task") + 1] if "--task" in words else "prompt"
    few = FEW[task].split()
    for name in SIZES:
        if name in few:
            at = few.index(name)
            del few[at:at + 2]
    more = "--sft_steps 1" if task == "summarize" else "--judge_layers 1"
    return [STANDS_IN.get(word, word) for word in words] + few + more.split()


@pytest.mark.parametrize("n", range(len(blocks(PAGE, "bash"))))
def test_a_row_of_every_table_runs_a_few_steps(n, place):
    found = calls(blocks(PAGE, "bash")[n], place)
    assert len(found) >= 3 and all(script == "train.py" for script, *_ in found)
    words = few_steps(found[0][1:]) + "--threads 1 --cache_dir cache".split()
    assert train.main(words) == 0
    run = words[words.index("--out_dir") + 1]
    summary = json.loads((place / run / "summary.json").read_text())
    assert summary["agg"] == "avg"
    if "--policy" in words:
        body = weights.from_pretrained("tiny").state_dict()["blocks.0.fc.weight"]
        nets = checkpoint(run)["nets"]
        assert torch.equal(nets["policy"]["blocks.0.fc.weight"], body)
        assert "adapter.0.weight" in nets["policy"]
        assert len(summary["best_prompt_ids"]) == 5 and 0 <= summary["top3_accuracy"] <= 1
    else:
        used = sample.load(run, "cpu", lambda line: None)
        assert used.reward.start == used.tokenizer.encode(" TL;DR:")[-1] != used.tokenizer.eot
