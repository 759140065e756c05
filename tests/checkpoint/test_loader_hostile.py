"""Bad checkpoints: all ranks raise the same error with file and tensor, nothing is half loaded or leaves the folder.

Tier: CPU ranks.
"""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tp_kernels.checkpoint import CheckpointError, DistributedCheckpointLoader, load_model
from tp_kernels.layers import ColumnParallelLinear, RowParallelLinear
from tp_kernels.testing.tiny_models import save_tiny_model

_NAME = "qwen3-4h1"
_INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    save_tiny_model(_NAME, folder)
    return folder / _NAME


@pytest.fixture
def folder(original, tmp_path):
    """A copy to damage."""
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def _error_of_load(group, path):
    try:
        load_model(path, group=group, progress=False)
    except CheckpointError as error:
        return str(error), error.file, error.tensor, error.ranks
    return None


def _load_on(rank_pool, path, world_size=2):
    """The error that all ranks agree on."""
    results = rank_pool(world_size).run(_error_of_load, str(path))
    assert all(result is not None for result in results), "a rank loaded a bad checkpoint"
    assert all(result == results[0] for result in results)
    message, file, tensor, _ = results[0]
    return message, file, tensor


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# What is in the files ------------------------------------------------------------------------------------------------


def test_missing_tensor(rank_pool, folder):
    _edit(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    message, _, tensor = _load_on(rank_pool, folder)
    assert tensor == "model.layers.1.mlp.up_proj.weight" and "is missing" in message and str(folder) in message


def test_unexpected_and_mis_shaped_tensors_are_all_listed(rank_pool, folder):
    def change(tensors):
        tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(41)

    _edit(folder, change)
    message, file, tensor = _load_on(rank_pool, folder, 3)
    assert (os.path.basename(file), tensor) == ("model.safetensors", "model.norm.weight")
    assert "'model.norm.weight': has shape [41], the model expects [40]" in message
    assert "'model.layers.0.mlp.extra.weight': is unexpected" in message


def test_transposed_tensor(rank_pool, folder):
    name = "model.layers.0.mlp.down_proj.weight"
    _edit(folder, lambda t: t.update({name: t[name].t().contiguous()}))
    assert "has shape [72, 40], the model expects [40, 72]" in _load_on(rank_pool, folder)[0]


def test_integer_tensor(rank_pool, folder):
    name = "model.layers.0.mlp.down_proj.weight"
    _edit(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
    assert f"tensor '{name}': is stored as I8" in _load_on(rank_pool, folder)[0]


@pytest.mark.parametrize("keep", [0, 7, 100, -4])
def test_truncated_file(rank_pool, folder, keep):
    path = folder / "model.safetensors"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    message, *_ = _load_on(rank_pool, folder)
    assert "model.safetensors" in message and "truncated" in message


def test_truncated_gguf(rank_pool, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\3\0\0\0" + b"\xff" * 16)
    assert "m.gguf" in _load_on(rank_pool, tmp_path / "m.gguf")[0]


def test_sizes_from_the_config_allocate_nothing(rank_pool, folder):
    config = json.loads((folder / "config.json").read_text())
    for change, expected in [
        ({"hidden_size": 1 << 30}, "expects"),
        ({"num_hidden_layers": 1_000_000_000, "layer_types": None}, "layers"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        assert expected in _load_on(rank_pool, folder)[0]


def test_bad_config(rank_pool, folder):
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_attention_heads": "4"}, {"head_dim": [16]}, {"rms_norm_eps": {}}, {"rope_parameters": 3}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError):
            load_model(folder)
    for content in (b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}'):
        (folder / "config.json").write_bytes(content)
        assert "config.json" in _load_on(rank_pool, folder)[0]
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(folder)


# Where the files are -------------------------------------------------------------------------------------------------


def _shard(folder, weight_map):
    """Turn the folder into one with an index."""
    if (folder / "model.safetensors").exists():
        (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = load_file(folder / "part.safetensors")
    (folder / _INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors") | weight_map}))


def test_an_honest_index_loads(folder):
    _shard(folder, {})
    load_model(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "/tmp/model.safetensors",
        "sub/part.safetensors",
        "..",
        "",
        "a\0.safetensors",
        "..\\outside.safetensors",
        "config.json",
    ],
)
def test_index_cannot_name_files_elsewhere(rank_pool, folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    _shard(folder, {"lm_head.weight": name})
    message, file, tensor = _load_on(rank_pool, folder)
    assert "plain name" in message and os.path.basename(file) == _INDEX and tensor == "lm_head.weight"


def test_index_cannot_escape_through_a_link(rank_pool, folder):
    _shard(folder, {"lm_head.weight": "link.safetensors"})
    shutil.copy(folder / "part.safetensors", folder.parent / "outside.safetensors")
    (folder / "link.safetensors").symlink_to("../outside.safetensors")
    message, *_ = _load_on(rank_pool, folder)
    assert "leads out of the folder" in message and "link.safetensors" in message


def test_a_hugging_face_cache_is_made_of_links(original, tmp_path):
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "abc", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in original.iterdir():
        shutil.copy(file, blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    load_model(snapshot)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": ["part.safetensors"]}, "no weight_map"),
        ({"weight_map": {"lm_head.weight": 7}}, "must give a file name"),
        ({"weight_map": {"lm_head.weight": "gone.safetensors"}}, "missing or a broken link"),
        ({"weight_map": {"nowhere.weight": "part.safetensors"}}, r"is not in part\.safetensors"),
        ({"weight_map": {"lm_head.weight": "pytorch_model.bin"}}, "pickle"),
    ],
)
def test_bad_index(folder, index, message):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / _INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        DistributedCheckpointLoader(folder)


def test_index_that_omits_a_stored_tensor(folder):
    _shard(folder, {})
    index = json.loads((folder / _INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (folder / _INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight': is missing.*does not list"):
        load_model(folder)


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "pytorch_model.bin.index.json"]
)
def test_pickle_is_refused_and_never_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(_Evil()))
    for path in (tmp_path, tmp_path / name)[: 1 if name.endswith("json") else 2]:
        with pytest.raises(CheckpointError, match=r"run any code.*safetensors"):
            DistributedCheckpointLoader(path)
    assert not (tmp_path / "pickle-was-run").exists()


def test_renamed_pickle_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(_Evil()) + b"\0" * 16)
    with pytest.raises(CheckpointError, match="pickle"):
        DistributedCheckpointLoader(tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.gguf").write_bytes(b"")
    (tmp_path / "a" / "y.gguf").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello there")
    for path, message in [
        ("none", "does not exist"),
        ("a", r"several GGUF files.*x\.gguf, y\.gguf"),
        (".", "has neither"),
        ("notes.txt", "not a GGUF file"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            DistributedCheckpointLoader(tmp_path / path)


# One rank alone ------------------------------------------------------------------------------------------------------


def _error_with_path_by_rank(group, paths):
    return _error_of_load(group, paths[group.rank])


def test_a_file_that_is_bad_on_one_rank_only(rank_pool, original, folder):
    os.truncate(folder / "model.safetensors", 100)
    paths = [str(original), str(folder), str(original)]
    results = rank_pool(3).run(_error_with_path_by_rank, paths)
    assert len({result[0] for result in results}) == 1
    message, _, _, ranks = results[0]
    assert message.startswith("rank 1: ") and "truncated" in message and ranks == (1,)


def test_ranks_that_see_different_checkpoints(rank_pool, original, folder):
    _edit(folder, lambda t: t.update({"model.norm.weight": torch.zeros(41)}))
    results = rank_pool(2).run(_error_with_path_by_rank, [str(original), str(folder)])
    assert results[0][0] == results[1][0] and "ranks [1] see another checkpoint" in results[0][0]


def _fail_midway(group, path, failing_rank):
    """Load into a model whose checkpoint loses its tail after the checks, on one rank's copy."""
    model = torch.nn.Sequential(
        ColumnParallelLinear(16, 12, group=group), RowParallelLinear(12, 16, group=group), torch.nn.LayerNorm(16)
    )
    loader = DistributedCheckpointLoader(path, group, progress=False)
    loader.check(model)
    if group.rank == failing_rank:
        read = loader._source.read_into

        def read_into(name, *arguments):
            if name == "1.weight":
                raise CheckpointError("truncated: it shrank", file=path, tensor=name)
            read(name, *arguments)

        loader._source.read_into = read_into
    try:
        loader.load_into(model)
    except CheckpointError as error:
        return str(error), error.ranks, all(bool(p.isnan().all()) for p in model.parameters())
    return None


def test_a_read_that_fails_midway_on_one_rank_poisons_all(rank_pool, tmp_path):
    full = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.Linear(12, 16), torch.nn.LayerNorm(16))
    save_file(full.state_dict(), tmp_path / "model.safetensors")
    results = rank_pool(3).run(_fail_midway, str(tmp_path), 2)
    for message, ranks, poisoned in results:
        assert message.startswith("rank 2: ") and "tensor '1.weight': truncated" in message
        assert ranks == (2,) and poisoned


def test_a_model_that_does_not_fit_is_left_alone(tmp_path):
    save_file({"weight": torch.zeros(3, 4), "other": torch.zeros(1)}, tmp_path / "model.safetensors")
    model = torch.nn.Linear(4, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'bias': is missing.*'other': is unexpected"):
        DistributedCheckpointLoader(tmp_path).load_into(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="meta device"):
        DistributedCheckpointLoader(tmp_path).load_into(torch.nn.Linear(4, 3, bias=False, device="meta"), strict=False)
