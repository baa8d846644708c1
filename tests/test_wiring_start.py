"""What a run is made of before its loop: every flag of data, nets, judge and warm starts changes what it says
and nothing else.

test_wiring_loop.py says the same of the loop, on a stub; here tasks and nets are real and small. All starts
share one cache: a flag that the key of something kept does not know would read what another one has left.
"""
import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from stubs import small_worlds
from test_damage import story
from test_train import write_edits, write_jsonl, write_pairs, write_world
from test_wiring_loop import CHANGES

import train
from support.files import digest
from support.log import Log

NETS = ("--n_layer 1 --n_embd 16 --n_head 2 --vocab_size 300 --batch_size 4 --sft_steps 2 --threads 1 "
        "--device cpu --dtype float32")
JUDGE = "--judge_steps 2 --judge_read 2 --judge_width 8 --judge_layers 1 --reward_warmup 2 --prompt_length 2"
BASE = {"prompt": f"{NETS} {JUDGE} --task prompt --world world --data shots.jsonl --shots 3",
        "embedded prompt": f"{NETS} {JUDGE} --task prompt --world_names 60 --world_cues 2 --shots 3",
        "summarize": f"{NETS} --task summarize --tokenizer byte --data summaries.jsonl",
        "embedded summaries": f"{NETS} --task summarize",
        "edits": f"{NETS} --task edits --tokenizer byte --data edits.jsonl",
        "embedded edits": f"{NETS} --task edits"}

WARM = {"policy", "start_policy", "reward"}  # both nets read the references before the loop
BORN = {"sizes"} | WARM                      # as the nets are made
READ = {"widths"} | BORN                     # from how long rows are on: positions are a size of the nets
TOLD = {"tokenizer", "sampled"} | READ       # from what a token is on


def all_of(names, changes):
    """{flag: changes} for several."""
    return dict.fromkeys(names.split(", "), changes)


CHANGES_AT_THE_START = {
    "prompt": {
        "--data more.jsonl": {"rows"}, "--split_seed 2": {"rows"}, "--shots 2": {"rows", "curve"},
        "--attribute topic": {"asked"}, "--curve_size 3": {"curve"},
        "--world other": {"world", "judge", "reward"},  # its sentences are what the reward's body has read
        "--prompt_length 3": {"widths", "judge"},  # the judge was taught with prompts as long
        "--no-whole_words": {"sampled", "sizes"},
        **all_of("--judge_steps 3, --judge_read 3, --judge_lr 0.01, --judge_layers 2, --judge_width 16, "
                 "--judge_context 5", {"judge"}),
        "--seed 2": WARM, **all_of("--reward_warmup 3, --clip 0.01, --guidance bandit, --guidance implicit",
                                   {"reward"}),
        "--foreseen": {"sizes", "reward"}, "--bound sigmoid": {"sizes"},
        "--n_layer 2": BORN | {"learns"}, "--n_embd 32": BORN, "--positions learned": BORN | {"learns"},
        "--n_head 1": {"sizes", "reward"}, "--dropout 0.5": {"sizes", "reward"},  # no weight has their shape
        "--policy mlp": BORN | {"learns"}, "--preset paper": {"sampled", "sizes"},
        **all_of("--sft_steps 5, --sft_lr 0.1, --sft_batch 3, --limit 3, --max_document 3, --max_summary 3, "
                 "--context_limit 9, --ask x, --answers 2, --document_column text, --summary_column text, "
                 "--world_names 70, --world_cues 3, --log_every 2, --eval_every 2, --noise 0.5, "
                 "--objective ppo, --export out, --cache_dir other_cache, --overwrite, --planted 0", set())},
    "embedded prompt": {
        "--world_names 70": {"world", "rows", "judge", "opens"} | TOLD - {"widths"}, "--shots 2": {"rows"},
        "--world_cues 3": {"world", "rows", "judge", "reward"}, "--seed 2": {"rows"} | WARM,
        "--attribute topic": {"rows", "asked"},
        "--whole_words": TOLD - {"widths", "policy", "start_policy"} | {"judge"},  # these come first
        **all_of("--split_seed 2, --vocab_size 280", set())},  # the world's own words
    "summarize": {
        "--data pairs.jsonl": set(),  # the same rows, from a file without the other columns
        "--split_seed 2": {"rows"} | WARM, "--seed 2": WARM,
        **all_of("--document_column text, --summary_column title, --limit 9", {"rows"} | READ),
        **all_of("--max_document 9, --max_summary 9, --context_limit 12", READ), "--ask TL": READ | {"opens"},
        "--tokenizer bpe": TOLD | {"opens"},
        **all_of("--sft_steps 3, --sft_lr 0.1, --sft_batch 3, --clip 0.01", WARM),
        "--n_layer 2": BORN | {"learns"}, "--n_embd 32": BORN, "--n_head 1": BORN, "--dropout 0.5": BORN,
        "--positions learned": BORN | {"learns"}, "--policy mlp": BORN | {"learns"},
        "--no-foreseen": {"sizes", "reward"}, "--preset paper": BORN,
        **all_of("--objective ppo, --objective mle, --curve_size 3, --shots 3, --attribute topic, "
                 "--prompt_length 3, --judge_steps 4, --world_names 70, --reward_lr 0.1, --whole_words, "
                 "--vocab_size 280, --answers 2", set())},
    "embedded summaries": {
        "--tokenizer byte": TOLD | {"opens"}, "--max_document 9": READ, "--seed 2": WARM,
        **all_of("--split_seed 2, --document_column text", set())},
    "edits": {
        "--data other.jsonl": {"rows"} | WARM, "--split_seed 2": {"rows"} | WARM, "--seed 2": WARM,
        "--damage damage.jsonl": {"rows"} | READ, "--limit 9": {"rows"} | WARM,
        **all_of("--max_document 5, --max_summary 5, --context_limit 12", READ),
        "--tokenizer bpe": TOLD | {"opens"},
        **all_of("--sft_steps 3, --sft_lr 0.1, --sft_batch 3", WARM), "--guidance implicit": {"reward"},
        "--foreseen": {"sizes", "reward"}, "--bound sigmoid": {"sizes"},
        **all_of("--guidance token, --objective reinforce, --ask x, --shots 3, --K 2, --world_cues 3",
                 set())},
    "embedded edits": {"--answers 3": {"rows"}, "--seed 2": WARM, "--guidance token": set()}}

# How and where a run computes, which other tests say of: the same numbers, or none at all.
ELSEWHERE = {"out_dir": "test_life", "init_from": "test_weights", "reward_init": "test_weights",
             "device": "test_train", "dtype": "test_train", "compile": "test_rounds", "threads": "test_train",
             "micro_batch": "test_distributed", "judge": "test_roberta", "task": "test_train",
             "policy_steps": "test_train", "adam_beta2": "test_wiring_policy"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, and every start that was made in it."""
    folder = tmp_path_factory.mktemp("start")
    write_world(folder / "world"), write_world(folder / "other", n=150)
    for name, verb in (("shots", "said"), ("more", "say")):
        write_jsonl(folder / f"{name}.jsonl", [
            {"text": f"the {what} {i} was {how} , they {verb}", "label": label} for i in range(5)
            for what in ("actor", "bread") for label, how in enumerate(("awful", "superb"))])
    lines = lambda path: [json.loads(x) for x in path.read_text().splitlines()]
    pairs = [row for path in sorted(write_pairs(folder / "pairs").iterdir()) for row in lines(path)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "summaries.jsonl", [
        row | {"text": row["document"] + " now", "title": row["summary"] + " now"} for row in pairs])
    edits = [row for path in sorted(write_edits(folder / "edits").iterdir()) for row in lines(path)]
    write_jsonl(folder / "edits.jsonl", [row | {"prompt": f"say it {i:02}"} for i, row in enumerate(edits)])
    write_jsonl(folder / "other.jsonl", [row | {"prompt": f"do say {i:02}"} for i, row in enumerate(edits)])
    write_jsonl(folder / "damage.jsonl", [{"text": story(i)} for i in range(9)])
    return folder, {}


def start(typed):
    """{part: what a run has of it} before the first step of its loop."""
    with contextlib.ExitStack() as until_end, open(os.devnull, "w") as nowhere, \
            contextlib.redirect_stdout(nowhere):
        run = train.prepare([*typed.split(), "--out_dir", f"run{len(os.listdir())}"], Log(), until_end)
    task, judge, known = run.task, getattr(run.task, "judge", None), run.data
    widths = lambda x: getattr(x, "widths", None) or (x.context.shape[1], x.reference.shape[1])
    return {"world": known.get("world"),
            "rows": {k: v for k, v in known.items() if k not in ("world", "tokens", "judge")},
            "asked": judge and task.world.attributes[run.c.attribute],
            "curve": judge and len(task.sets["curve"][1]), "judge": judge and digest(judge.state()),
            "tokenizer": digest(task.tokenizer.state()), "sampled": task.n_ids, "opens": task.start,
            "widths": [task.width, *(tuple(widths(x)) for x in getattr(task, "tensors", {}).values())],
            "sizes": run.sizes(), "learns": [k for k, p in run.policy.named_parameters() if p.requires_grad],
            **{name: digest(net.state_dict()) for name, net in run.nets().items() if name in WARM}}


@pytest.mark.parametrize("name, flag", [(x, flag) for x, of in CHANGES_AT_THE_START.items() for flag in of])
def test_a_flag_changes_what_it_says_and_nothing_else(name, flag, place, monkeypatch):
    folder, made = place
    monkeypatch.chdir(folder)
    small_worlds(monkeypatch)
    if name not in made:
        made[name] = start(f"{BASE[name]} --cache_dir cache")
    typed = BASE[name].replace("--data edits.jsonl", "") if "--damage" in flag else BASE[name]
    other = start(f"{typed} --cache_dir cache {flag}")
    assert {part for part, x in made[name].items() if x != other[part]} == CHANGES_AT_THE_START[name][flag]


def test_every_flag_is_shown_to_change_what_it_says():
    """Here, in the loop, or in the file that ELSEWHERE names."""
    tables = [*CHANGES.values(), *CHANGES_AT_THE_START.values()]
    shown = set(re.findall(r"--(?:no-)?(\w+)", " ".join(flag for table in tables for flag in table)))
    known = {field.name for field in dataclasses.fields(train.Flags)}
    assert known - shown - ELSEWHERE.keys() == set() and (shown | ELSEWHERE.keys()) <= known
    for flag, page in ELSEWHERE.items():
        assert f"--{flag}" in (Path(__file__).parent / f"{page}.py").read_text(encoding="utf-8")
