"""A fault of a model folder is said in one line that names it, before anything is allocated by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from toka_engine.errors import ConfigError, ModelInvalidError, ModelNotFoundError, OutOfMemoryError
from toka_engine.model.loader import Weights
from toka_engine.model.sharding import Shard

from tests.model.driving import Driver, load

MakeTiny = Callable[..., tuple[Any, Path]]


@pytest.fixture
def folder(make_tiny: MakeTiny) -> Path:
    return make_tiny()[1]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refuse(folder: Path, *words: str, kind: type[Exception] = ModelInvalidError, **settings: Any) -> None:
    with pytest.raises(kind) as caught:
        load(folder, **settings)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "nowhere", kind=ModelNotFoundError)


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuse(folder, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str | bytes) -> None:
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuse(folder, "config.json")


@pytest.mark.parametrize("names", [["MysteryForCausalLM"], [], None, "LlamaForCausalLM", [5]])
def test_an_unknown_architecture_is_named(folder: Path, names: Any) -> None:
    edit_config(folder, architectures=names)
    refuse(folder, "MysteryForCausalLM" if names == ["MysteryForCausalLM"] else "architectures")


BAD_FIELDS: list[tuple[str, Any]] = [
    *((name, value) for name in ("hidden_size", "vocab_size") for value in (0, -1, 2**63, 1.5, "64", True, [64])),
    ("num_hidden_layers", 0),
    ("num_attention_heads", None),
    ("num_key_value_heads", 3),
    ("intermediate_size", None),
    ("head_dim", 15),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", -1),
    ("attention_bias", "yes"),
    ("hidden_act", "gelu"),
    ("use_sliding_window", True),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("layer_types", 5),
    ("quantization_config", {"quant_method": "awq"}),
    ("dtype", "int4"),
    ("rope_parameters", [1]),
    ("rope_parameters", {"rope_type": "spiral"}),
    ("rope_parameters", {"rope_type": "linear"}),
    ("rope_parameters", {"rope_type": "linear", "factor": float("inf")}),
    ("rope_parameters", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
    ("rope_parameters", {"rope_type": "longrope", "short_factor": "x"}),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_bad_field_of_the_config_is_refused_by_name(folder: Path, name: str, value: Any) -> None:
    edit_config(folder, **{name: value})
    refuse(folder, *([] if name == "rope_parameters" else [name]))


def test_older_rope_fields_mean_the_same(make_tiny: MakeTiny, folder: Path, tmp_path: Path) -> None:
    ids = list(range(3, 40))
    shutil.copytree(folder, tmp_path / "older")
    edit_config(folder, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    edit_config(
        tmp_path / "older",
        rope_parameters=None,
        rope_theta=5000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    logits = []
    for each in (folder, tmp_path / "older"):
        driver = Driver(load(each))
        driver.prefill({0: ids})
        logits.append(driver.logits)
    assert torch.equal(*logits)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refuse(folder, "model.safetensors")


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_truncated_weights_are_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:size])
    refuse(folder, "model.safetensors")


def test_a_header_of_absurd_length_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])
    refuse(folder, "model.safetensors", "header")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.pop(name))
    refuse(folder, name)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(16, 64)}))
    refuse(folder, name, "[16, 64]", "[32, 64]")


def test_a_tensor_of_integers_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}))
    refuse(folder, "model.norm.weight", "int32")


NAME, SHAPE = "model.layers.0.self_attn.k_proj.weight", (32, 64)


def open_weights(folder: Path, available_bytes: int = 1 << 20, dtype: torch.dtype = torch.float32) -> Weights:
    return Weights(folder, torch.device("cpu"), dtype, available_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [Shard(0, 8, 24), Shard(1, 48, 64), Shard(0, 0, 32), Shard(1, 5, 6)])
def test_a_shard_is_the_part_of_the_tensor_and_takes_no_more_memory(
    folder: Path, shard: Shard, dtype: torch.dtype
) -> None:
    with open_weights(folder, dtype=dtype) as weights:
        found = weights.take(NAME, SHAPE, shard)
        assert torch.equal(found, weights.take(NAME, SHAPE)[shard.index])
        assert found.is_contiguous()
        assert found.untyped_storage().nbytes() == found.numel() * dtype.itemsize
        assert NAME not in weights.list_untaken()


def test_the_shards_of_a_tensor_need_only_their_own_memory(folder: Path) -> None:
    shard = Shard(0, 0, 16)
    with open_weights(folder, available_bytes=16 * 64 * 4) as weights:
        weights.take(NAME, SHAPE, shard)
        with pytest.raises(OutOfMemoryError):
            weights.take(NAME, SHAPE, shard)


def test_a_shard_of_a_misshapen_tensor_is_refused_with_the_whole_shapes(folder: Path) -> None:
    with open_weights(folder) as weights, pytest.raises(ModelInvalidError) as caught:
        weights.take(NAME, (64, 64), Shard(0, 0, 16))
    assert all(word in str(caught.value) for word in (NAME, "[32, 64]", "[64, 64]"))


def test_a_shard_reads_its_part_of_the_file_alone(tmp_path: Path) -> None:
    rows, width = 1 << 17, 8192  # 2 GiB, a hole in the file
    header = json.dumps({"big": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, 2 * rows * width]}})
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2 * rows * width)
    with open_weights(tmp_path, dtype=torch.bfloat16) as weights:
        before = psutil.Process().memory_info().rss
        assert not weights.take("big", (rows, width), Shard(0, rows - 16, rows)).any()
        assert psutil.Process().memory_info().rss - before < 64 << 20


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    refuse(folder, "link out of the model folder")


def test_the_links_of_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(index))
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    assert load(snapshot).ready.vocab_size == 256


def split(folder: Path) -> dict[str, str]:
    """Cut the weights into two shards with an index; returns the index's map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in chosen}, folder / f"part{part}.safetensors")
        weight_map.update(dict.fromkeys(chosen, f"part{part}.safetensors"))
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_weights_give_the_logits_of_whole_ones(folder: Path) -> None:
    logits = []
    for _ in range(2):
        driver = Driver(load(folder))
        driver.prefill({0: list(range(3, 30))})
        logits.append(driver.logits)
        if len(logits) == 1:
            split(folder)
    assert torch.equal(*logits)


def test_a_missing_shard_is_named(folder: Path) -> None:
    split(folder)
    (folder / "part1.safetensors").unlink()
    refuse(folder, "part1.safetensors")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hostname", "sub/part.safetensors", ".."])
def test_an_index_that_points_elsewhere_is_refused(folder: Path, name: str) -> None:
    write_index(folder, dict.fromkeys(split(folder), name))
    refuse(folder, "not a file name")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, "x"])
def test_an_index_without_files_is_refused(folder: Path, weight_map: Any) -> None:
    write_index(folder, weight_map)
    refuse(folder, "index")


def test_an_unknown_dtype_is_a_config_error(folder: Path) -> None:
    refuse(folder, "dtype", "int8", kind=ConfigError, dtype="int8")


def test_a_cache_larger_than_memory_is_refused_by_its_key(folder: Path) -> None:
    refuse(folder, "kv_cache_num_tokens", kind=OutOfMemoryError, kv_cache_num_tokens=2**40)
