"""Sources with names and weights: how they are written, which rows an epoch has, and a loss for each."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.config import TrainConfig
from dsft.config.flags import RowFlags
from dsft.config.sources import Source, read_sources
from dsft.config.values import as_yaml, build, read_yaml
from dsft.dataset.batches import GlobalBatches, Repeats
from dsft.dataset.micro_batches import MicroBatches, MicroBatchOptions
from dsft.dataset.tokens import load_dataset
from dsft.loss import TargetHead, mean_losses, source_losses, summed_loss
from dsft.model.flops import Cost
from dsft.model.tree_attention import NAME as TREE
from dsft.planning.plan import order_rows
from tests.helpers import message, write_parquet

PROPERTY = settings(deadline=None, database=None)
NEEDED = {"model": "m", "output_dir": "o"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))


# How they are written


@pytest.mark.parametrize(
    ("entries", "sources"),
    [
        (["a.parquet", "x/b*.jsonl"], [Source("", ("a.parquet", "x/b*.jsonl"))]),
        (
            ["med=a.parquet*2", "chat=b.jsonl*0.5"],
            [Source("med", ("a.parquet",), 2.0), Source("chat", ("b.jsonl",), 0.5)],
        ),
        (["x/a.jsonl.gz*.25", "b=y"], [Source("a", ("x/a.jsonl.gz",), 0.25), Source("b", ("y",))]),
        (["m=a*2", "m=b*2", "data/"], [Source("m", ("a", "b"), 2.0), Source("data", ("data/",))]),
        (["m=x/part*2*1"], [Source("m", ("x/part*2",), 1.0)]),
        (["./year=2024/a.parquet"], [Source("", ("./year=2024/a.parquet",))]),
        (["m=hf://datasets/o/n@main/*.json*1e-2"], [Source("m", ("hf://datasets/o/n@main/*.json",), 0.01)]),
    ],
    ids=str,
)
def test_entries_name_sources(entries, sources):
    assert read_sources(entries, "train_files") == sources


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (["m=a*0"], "train_files: the weight of m is 0; give one above 0, at most 1000"),
        (["m=a*1e9"], "train_files: the weight of m is 1e+09; give one above 0, at most 1000"),
        (["m="], "train_files: source m has no path; write NAME=PATH"),
        (["m=a*2", "m=b"], "train_files: the weight of m is 2 and 1; give it only one"),
        (["x/*.json*2"], "train_files: x/*.json needs a name beside other sources; write NAME=x/*.json"),
        (["x/a.csv", "y/a.csv*2"], "train_files: y/a.csv needs a name beside other sources; write NAME=y/a.csv"),
    ],
)
def test_entries_that_are_unclear_are_refused(entries, told):
    assert message(build, TrainConfig, {**NEEDED, "train_files": entries}) == told


def test_yaml_and_the_command_line_say_the_same(tmp_path):
    mapping = [{"path": "a.parquet", "name": "med", "weight": 2}, {"path": "b.jsonl", "weight": 0.5}, "c"]
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({**NEEDED, "train_files": mapping, "val_files": [{"path": "v", "name": "med"}]}))
    read = build(TrainConfig, read_yaml(TrainConfig, str(config), []))
    typed = {"train_files": "med=a.parquet*2,b.jsonl*0.5,c", "val_files": "med=v"}
    assert read == build(TrainConfig, NEEDED | typed)
    config.write_text(as_yaml(read))
    assert build(TrainConfig, read_yaml(TrainConfig, str(config), [])) == read


def test_a_wrong_mapping_is_refused():
    cases = [
        ("train_files", {"pth": "a"}, "has path, name and weight, got pth (did you mean 'path'?)"),
        ("val_files", {"name": "a"}, "needs a path, got {'name': 'a'}"),
        ("train_files", {"path": "a", "weight": "two"}, "has as weight a number above 0, at most 1000, got 'two'"),
        ("train_files", {"path": "a", "weight": True}, "has as weight a number above 0, at most 1000, got True"),
        ("train_files", {"path": "a", "name": "b c"}, "has a name of letters, digits and any of _.-, got 'b c'"),
    ]
    for flag, value, told in cases:
        found = message(build, TrainConfig, NEEDED | {"train_files": "a"} | {flag: [value]})
        assert found == f"{flag}: a source {told}"


def test_best_by_names_a_source_that_validates():
    def config(**values):
        return build(TrainConfig, NEEDED | {"train_files": "a=x,b=y"} | values)

    assert config(val_files="c=z", best_by="val/loss/c").best_by == "val/loss/c"
    assert config(val_fraction=0.1, best_by="val/loss/b").best_by == "val/loss/b"
    told = message(config, val_files="chat=z", best_by="val/loss/caht")
    assert told == ("best_by must be one of val/loss, val/loss/chat, got val/loss/caht (did you mean 'val/loss/chat'?)")
    for values in ({}, {"val_files": "z"}):
        told = message(config, best_by="val/loss/a", **values)
        assert told.startswith("best_by must be one of val/loss, got val/loss/a")
    told = message(config, val_files="c=z*2")
    assert told == "val_files has weights, of c; they are for train_files, so leave them out"


# Which rows an epoch has


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 3.2)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 99),
    st.integers(0, 5),
)
def test_the_share_of_each_source_is_exact_in_each_epoch(sources, batch_size, seed, epoch):
    sources = [(size, weight) for size, weight in sources if round(size * weight)] or [(1, 1.0)]
    sizes, weights = [size for size, _ in sources], np.array([weight for _, weight in sources])
    random = np.random.default_rng(seed)
    source = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    dialogue = random.integers(0, 5, len(source))
    times = Repeats(source, weights, dialogue, np.arange(len(source)), seed)
    batches = GlobalBatches(dialogue, np.arange(len(source)), batch_size, seed, times)
    drawn = np.concatenate(batches.epoch(epoch))
    for number, (size, weight) in enumerate(sources):
        count = np.bincount(drawn, minlength=len(source))[source == number]
        assert count.sum() == round(size * weight)
        assert set(count.tolist()) <= {int(round(size * weight) // size), int(round(size * weight) // size) + 1}
    assert all(len(batch) <= batch_size for batch in batches.epoch(epoch))


def test_a_fraction_takes_other_rows_in_other_epochs_and_keeps_dialogues_whole():
    dialogue = np.repeat(np.arange(10), 2)
    times = Repeats(np.zeros(20, np.int64), np.array([0.4]), dialogue, np.arange(20), seed=3)
    seen = [times(epoch) for epoch in range(6)]
    assert [int(one.sum()) for one in seen] == [8] * 6
    assert sum(seen[:5]).tolist() == [2] * 20  # 5 epochs of 0.4 are 2 passes
    assert all((one[::2] == one[1::2]).all() for one in seen)
    assert seen[0].tolist() == seen[5].tolist() != seen[1].tolist()


def test_weights_of_1_change_nothing_and_copies_are_shuffled_as_dialogues_of_their_own():
    dialogue, order = np.repeat(np.arange(9), 3), np.arange(27)
    plain = GlobalBatches(dialogue, order, 4, 1)
    once = GlobalBatches(dialogue, order, 4, 1, Repeats(np.zeros(27, np.int64), np.ones(1), dialogue, order, 1))
    assert [b.tolist() for b in once.epoch(2)] == [b.tolist() for b in plain.epoch(2)]
    twice = GlobalBatches(dialogue, order, 4, 1, Repeats(np.zeros(27, np.int64), np.full(1, 2.0), dialogue, order, 1))
    drawn = twice.epoch(0)
    assert np.bincount(np.concatenate(drawn)).tolist() == [2] * 27
    assert sum(set(batch.tolist()) >= {0, 1, 2} for batch in drawn) == 2  # in two batches, whole


# Files


def two_sources(folder) -> list[str]:
    """A file of prompts and responses, and one of conversations."""
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(6)]
    write_parquet(folder / "med.parquet", rows)
    turns = [[("user", f"Say {i}."), ("assistant", f"{i}, {i}.")] for i in range(4)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return [f"med={folder / 'med.parquet'}*2", f"chat={folder / 'chat.jsonl'}*0.5"]


def test_each_source_has_the_format_of_its_own_rows(tmp_path, tokenizer):
    data = load_dataset(two_sources(tmp_path), "train_files", tokenizer, RowFlags())
    assert (data.sources, data.source.tolist()) == (["med", "chat"], [0] * 6 + [1] * 4)
    assert data.counts.format == "chat: conversations in column messages"
    assert [str(one).split(",")[0] for one in data.source_statistics()] == ["med: 6 rows", "chat: 4 rows"]
    assert [str(one).split("targets")[1] for one in data.source_statistics()] == [
        ", 2 times per epoch",
        ", 0.5 times per epoch",
    ]
    assert data.place(6) == f"{tmp_path}/chat.jsonl, line 1"
    assert "Say 0." in tokenizer.decode(data[6][0])
    part = data.subset(np.array([1, 7]))
    assert part.source.tolist() == [0, 1]


def test_weights_change_the_run_but_not_the_cache(tmp_path, tokenizer):
    med, chat = two_sources(tmp_path)
    names = [[med, chat], [med.replace("*2", "*3"), chat], [med.removesuffix("*2"), chat.removesuffix("*0.5")]]
    loaded = [load_dataset(one, "train_files", tokenizer, RowFlags()) for one in names]
    assert len({data.fingerprint for data in loaded}) == 3
    assert len(list((tmp_path / "cache" / "tokens").glob("*/counts.json"))) == 1


def test_a_file_may_be_in_two_sources_and_max_rows_is_of_each(tmp_path, tokenizer):
    med, chat = two_sources(tmp_path)
    names = [med, med.replace("med=", "again=").replace("*2", "*1"), chat]
    data = load_dataset(names, "train_files", tokenizer, RowFlags(), max_rows=2)
    assert data.source.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_source_without_rows_in_an_epoch_is_refused(tmp_path, tokenizer):
    med, chat = two_sources(tmp_path)
    config = build(TrainConfig, NEEDED | {"train_files": [med, chat.replace("0.5", "0.1")]})
    data = load_dataset(config.train_files, "train_files", tokenizer, config)
    assert message(order_rows, data, config) == (
        "train_files: source chat has 4 rows, and with weight 0.1 none in an epoch; "
        "raise its weight, or leave the source out"
    )


# A loss for each


def test_the_losses_of_sources_are_those_of_their_rows(tmp_path, tiny_model, tokenizer):
    """Folded, several micro-batches, rows in both sources: against cross-entropy of each row alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rows = [{"prompt": f"What is {i % 3}?", "response": f"It is {i}.", "w": 1 + i % 2} for i in range(6)]
    one = write_parquet(tmp_path / "one.parquet", rows)
    two = write_parquet(tmp_path / "two.parquet", [*rows[2:], {"prompt": "More", "response": "of it", "w": 3}])
    names = [f"one={one}", f"two={two}"]
    data = load_dataset(names, "train_files", tokenizer, RowFlags(weight_key="w"))
    sums, weights = np.zeros(2), np.zeros(2)
    for row in range(len(data)):
        ids, mask = torch.tensor(data[row][0]).long()[None], torch.tensor(data[row][1])[1:]
        with torch.no_grad():
            lost = torch.nn.functional.cross_entropy(
                model(input_ids=ids).logits[0, :-1][mask], ids[0, 1:][mask], reduction="sum"
            )
        sums[data.source[row]] += lost.item() * data.weight[row]
        weights[data.source[row]] += mask.sum().item() * data.weight[row]
    head, longest = TargetHead(model), int(data.lengths.max())
    for fold, trees, tokens in ((True, True, longest), (True, True, 4000), (True, False, longest), (False, False, 99)):
        model.set_attn_implementation(TREE if trees else "sdpa")
        micro_batches = MicroBatches(data, MicroBatchOptions(1, tokens, fold, trees), Cost(1, 0, 0), 0)
        found = np.zeros(2)
        plan = micro_batches.plan(np.arange(len(data)))
        for part in plan.parts[0]:
            batch = micro_batches.make(part).to(torch.device("cpu"))
            total = summed_loss(model, head, batch).detach()
            of_sources = source_losses(head, batch)
            assert of_sources.sum().item() == pytest.approx(total.item(), rel=1e-6)
            found += of_sources.numpy()
        assert found == pytest.approx(sums, rel=1e-5)
        assert plan.source_weights == pytest.approx(weights)
        means = mean_losses("val/loss", data.sources, found.tolist(), plan)
        assert means == pytest.approx(
            {
                "val/loss": sums.sum() / weights.sum(),
                "val/loss/one": sums[0] / weights[0],
                "val/loss/two": sums[1] / weights[1],
            },
            rel=1e-5,
        )
