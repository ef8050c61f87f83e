"""Tensors in safetensors files: what TensorWriter writes is what the library reads, and any part reads back."""

import hashlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsft.checkpointing import tensor_files
from dsft.checkpointing.tensor_files import Shape, TensorReader, TensorWriter, index_text, plan_files
from tests.helpers import message, seeded_tensor

PROPERTY = settings(deadline=None, database=None, max_examples=80)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.dictionaries(NAMES, SHAPES, min_size=1, max_size=8)


def write(path: Path, tensors: dict[str, torch.Tensor], pieces: int = 1) -> str:
    with TensorWriter(path, [(name, tuple(t.shape)) for name, t in tensors.items()]) as writer:
        for tensor in tensors.values():
            for piece in tensor.reshape(-1).chunk(pieces):
                writer.write(piece)
        return writer.finish()


def write_all(folder: Path, stem: str, tensors: dict[str, torch.Tensor], ranks: int = 1) -> list[Path]:
    """As the ranks of a run write them: several files with their index."""
    files = plan_files(stem, [(name, tuple(t.shape)) for name, t in tensors.items()], ranks)
    for file in files:
        write(folder / file.name, {name: tensors[name] for name, _ in file.tensors})
    if len(files) > 1:
        (folder / f"{stem}.safetensors.index.json").write_text(index_text(files))
    return [folder / file.name for file in files]


def random(shapes: dict[str, Shape]) -> dict[str, torch.Tensor]:
    return {name: seeded_tensor(name, shape) if shape else torch.randn(()) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder that the examples of a property share."""
    return tmp_path_factory.mktemp("tensors")


@pytest.fixture
def small_files(monkeypatch):
    """Files of at most 400 bytes, 100 values."""
    monkeypatch.setattr(tensor_files, "LARGEST_FILE", 400)
    monkeypatch.setattr(tensor_files, "SMALLEST_SHARE", 40)


# Writing


@PROPERTY
@given(shapes=TENSORS, pieces=st.integers(1, 3))
def test_the_library_loads_what_was_written_bit_for_bit(place, shapes, pieces):
    tensors = random(shapes)
    path = place / "model.safetensors"
    digest = write(path, tensors, pieces)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == torch.float32
        assert loaded[name].shape == tensor.shape
        assert loaded[name].equal(tensor)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0  # values lie as the format asks
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}  # without it transformers refuses the file


def test_infinities_and_nans_keep_their_bits(tmp_path):
    bits = torch.tensor([0x7F800000, 0x7FC00001, -0x80000000, 1], dtype=torch.int32)
    write(tmp_path / "a.safetensors", {"a": bits.view(torch.float32)})
    assert load_file(tmp_path / "a.safetensors")["a"].view(torch.int32).equal(bits)


def test_what_is_no_neighbour_in_memory_is_written_in_order(tmp_path):
    write(tmp_path / "a.safetensors", {"a": torch.arange(10.0)[::2]})
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(5), torch.zeros(4, dtype=torch.float64)])
def test_other_values_than_announced_are_never_signed(tmp_path, values):
    with TensorWriter(tmp_path / "a.safetensors", [("a", (4,))]) as writer:
        writer.write(values)
        with pytest.raises(AssertionError):
            writer.finish()


def test_a_full_disk_reaches_the_caller_and_the_file_is_closed(tmp_path):
    with pytest.raises(OSError, match="No space left"), TensorWriter(Path("/dev/full"), [("a", (1,))]):
        pass


# Planning


@PROPERTY
@given(shapes=TENSORS, ranks=st.integers(1, 5), first=st.integers(0, 4), largest=st.integers(1, 2000))
def test_every_tensor_is_in_one_file_and_no_file_is_much_too_large(shapes, ranks, first, largest):
    tensors = list(shapes.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "LARGEST_FILE", largest)
        patch.setattr(tensor_files, "SMALLEST_SHARE", 40)
        files = plan_files("model", tensors, ranks, first % ranks)
    assert [tensor for file in files for tensor in file.tensors] == tensors
    for file in files:
        size = 4 * sum(math.prod(shape) for _, shape in file.tensors)
        assert size <= largest or len([shape for _, shape in file.tensors if math.prod(shape)]) == 1
    assert [file.owner for file in files] == [(first + i) % ranks for i in range(len(files))]
    count = len(files)
    if count == 1:
        assert files[0].name == "model.safetensors"
    else:
        assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads(index_text(files))
    assert index["weight_map"] == {name: file.name for file in files for name, _ in file.tensors}
    assert index["metadata"]["total_size"] == 4 * sum(math.prod(shape) for shape in shapes.values())


def test_all_ranks_write_a_like_share_of_what_is_large():
    tensors = [(str(i), (2**20,)) for i in range(256)]  # 1 GiB
    files = plan_files("model", tensors, 4)
    assert [(len(file.tensors), file.owner) for file in files] == [(64, 0), (64, 1), (64, 2), (64, 3)]


def test_what_is_small_is_one_file():
    assert [file.name for file in plan_files("optimizer", [("a", (5,)), ("b", (2**20,))], 8)] == [
        "optimizer.safetensors"
    ]


def test_no_file_is_larger_than_four_gibibytes():
    files = plan_files("model", [(str(i), (2**28,)) for i in range(9)], 1)  # 9 GiB on one rank
    assert [len(file.tensors) for file in files] == [4, 4, 1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_transformers_loads_a_model_written_in_several_files(tiny_model, tmp_path, monkeypatch, ranks):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(tensor_files, "LARGEST_FILE", 2**20)
    monkeypatch.setattr(tensor_files, "SMALLEST_SHARE", 2**10)
    expected = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights = {name: parameter.detach() for name, parameter in expected.named_parameters()}
    paths = write_all(tmp_path, "model", weights, ranks=ranks)
    assert len(paths) >= 2
    expected.config.save_pretrained(tmp_path)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, weight), (_, other) in zip(expected.named_parameters(), loaded.named_parameters(), strict=True):
        assert weight.equal(other), name


# Reading


@PROPERTY
@given(data=st.data(), shape=st.lists(st.integers(0, 7), max_size=4).map(tuple))
def test_any_range_of_any_shape_reads_back(place, data, shape):
    tensor = seeded_tensor("t", shape) if shape else torch.tensor(3.0)
    write(place / "ranges.safetensors", {"before": torch.ones(3), "t": tensor, "behind": torch.ones(2)})
    reader = TensorReader(place, "ranges")
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    read = reader.read("t", start, stop)
    assert read.dtype == torch.float32
    assert read.shape == (stop - start,)
    assert read.equal(tensor.reshape(-1)[start:stop])


@PROPERTY
@given(cuts=st.lists(st.integers(0, 105), max_size=6))
def test_the_slices_of_all_ranks_are_the_whole(place, cuts):
    tensor = seeded_tensor("whole", (5, 7, 3))
    write(place / "slices.safetensors", {"t": tensor})
    reader, places = TensorReader(place, "slices"), [0, *sorted(cuts), 105]
    parts = [reader.read("t", start, stop) for start, stop in itertools.pairwise(places)]
    assert torch.cat(parts).equal(tensor.reshape(-1))


@pytest.fixture
def shards(tmp_path, small_files) -> tuple[Path, dict[str, torch.Tensor]]:
    """Three files of two tensors each."""
    tensors = random({f"layer.{i}": (10, 5) for i in range(6)})
    assert len(write_all(tmp_path, "model", tensors)) == 3
    return tmp_path, tensors


def test_numbered_files_read_as_one(shards):
    folder, tensors = shards
    reader = TensorReader(folder, "model")
    reader.check(dict.fromkeys(tensors, (10, 5)))
    for name, tensor in tensors.items():
        assert reader.read(name, 7, 33).equal(tensor.reshape(-1)[7:33])


def test_a_missing_file_is_named(tmp_path):
    assert (
        message(TensorReader, tmp_path, "optimizer")
        == f"{tmp_path}/optimizer.safetensors is missing; choose another checkpoint"
    )


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_missing_numbered_file_is_named(shards, number):
    file = shards[0] / f"model-{number:05d}-of-00003.safetensors"
    file.unlink()
    assert message(TensorReader, shards[0], "model") == f"{file} is missing; choose another checkpoint"


@pytest.mark.parametrize("name", ["00004-of-00003", "00001-of-00004", "x", "00003-of-00003-old"])
def test_a_file_too_many_is_named(shards, name):
    stray = shards[0] / f"model-{name}.safetensors"
    save_file({"more": torch.ones(1)}, stray)
    told = message(TensorReader, shards[0], "model")
    assert told == f"{stray} does not belong to {shards[0].name}; choose another checkpoint"


def test_one_file_and_numbered_ones_are_too_many(shards):
    folder, tensors = shards
    save_file(tensors, folder / "model.safetensors")
    told = message(TensorReader, folder, "model")
    assert told.startswith(f"{folder}/model-00001-of-00003.safetensors does not belong to ")


def test_a_tensor_in_two_files_is_refused(shards):
    folder, tensors = shards
    save_file(dict(list(tensors.items())[1:3]), folder / "model-00002-of-00003.safetensors")
    told = message(TensorReader, folder, "model")
    assert told.startswith(
        f"{folder}/model-00002-of-00003.safetensors and model-00001-of-00003.safetensors both contain 'layer.1'"
    )


@pytest.mark.parametrize("damage", [lambda b: b[:-8], lambda b: b[:4], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_damaged_safetensors_are_refused_in_one_line(tmp_path, damage):
    file = tmp_path / "adapter_model.safetensors"
    write(file, random({"a": (3, 4)}))
    file.write_bytes(damage(file.read_bytes()))
    told = message(TensorReader, tmp_path, "adapter_model")
    assert told.startswith(f"{file} is damaged (")
    assert told.endswith("); choose another checkpoint")


SHAPE = {"a": (3, 4), "b": (2,)}


@pytest.mark.parametrize(
    ("stored", "parts"),
    [
        ({"a": torch.ones(4, 3), "b": torch.ones(2)}, ["expected 'a' to be F32 [3, 4], got F32 [4, 3]"]),
        ({"a": torch.ones(12), "b": torch.ones(2)}, ["expected 'a' to be F32 [3, 4], got F32 [12]"]),
        ({"a": torch.ones(3, 4).half(), "b": torch.ones(2)}, ["expected 'a' to be F32 [3, 4], got F16 [3, 4]"]),
        ({"a": torch.ones(3, 4).bfloat16(), "b": torch.ones(2)}, ["expected 'a' to be F32 [3, 4], got BF16 [3, 4]"]),
        ({"a": torch.ones(3, 4).int(), "b": torch.ones(2)}, ["expected 'a' to be F32 [3, 4], got I32 [3, 4]"]),
        ({"a": torch.ones(3, 4)}, ["does not contain 'b'"]),
        (
            {"a": torch.ones(3, 4), "b": torch.ones(2), "c": torch.ones(1)},
            ["contains 'c', which the model does not have"],
        ),
        ({}, ["does not contain 'a'"]),
    ],
)
def test_other_tensors_than_the_models_are_refused_by_file_and_name(tmp_path, stored, parts):
    save_file(stored, tmp_path / "model.safetensors")
    told = message(TensorReader(tmp_path, "model").check, SHAPE)
    assert told.startswith(f"{tmp_path}/model.safetensors")
    for part in [*parts, "another model or other LoRA flags", "; choose another checkpoint"]:
        assert part in told


def test_the_numbered_file_with_another_tensor_is_named(shards):
    folder, tensors = shards
    shapes = dict.fromkeys(tensors, (10, 5))
    told = message(TensorReader(folder, "model").check, shapes | {"layer.2": (5, 10)})
    assert told.startswith(
        f"{folder}/model-00002-of-00003.safetensors: expected 'layer.2' to be F32 [5, 10], got F32 [10, 5]"
    )
    told = message(TensorReader(folder, "model").check, shapes | {"more": (1,)})
    assert told.startswith(f"{folder}/model-*.safetensors does not contain 'more'")
    del shapes["layer.5"]
    told = message(TensorReader(folder, "model").check, shapes)
    assert told.startswith(
        f"{folder}/model-00003-of-00003.safetensors contains 'layer.5', which the model does not have"
    )


def test_a_tensor_that_is_not_there_is_refused_in_one_line(tmp_path):
    write(tmp_path / "model.safetensors", random(SHAPE))
    told = message(TensorReader(tmp_path, "model").read, "other", 0, 1)
    assert told.startswith(f"{tmp_path}/model.safetensors does not contain 'other'")
