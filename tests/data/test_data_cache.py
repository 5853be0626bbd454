import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

from fastdiff.data import CacheError, CacheMeta, CacheMismatchError, CacheReader, CacheWriter

META = CacheMeta("sd-tiny@abc", 32, "float32", {"steps": (8, 4)})


def _record(i):
    generator = torch.Generator().manual_seed(i)
    return {
        "latents": torch.randn(4, 8, 8, generator=generator),
        "prompt_embeds": torch.randn(5, 6, generator=generator).half(),
        "pooled_prompt_embeds": torch.randn(6, generator=generator).bfloat16(),
        "seed": torch.tensor(i),
    }


def _caption(i):
    return ["", "ein Käse", "苹果 \u2028 🍎"][i % 3] + (str(i) if i % 3 else "")


def _write(folder, count=10, shard_size=4, first=0):
    with CacheWriter(folder, META, shard_size) as writer:
        for i in range(first, count):
            writer.add(_record(i), _caption(i))
        writer.write_null({"prompt_embeds": torch.full((5, 6), 7.0)})
    return folder


def _check(reader, count=10):
    assert len(reader) == count
    for i in reversed(range(count)):
        record = reader[i]
        assert record.caption == reader.caption(i) == _caption(i)
        for name, tensor in _record(i).items():
            assert record.tensors[name].dtype == tensor.dtype
            assert torch.equal(record.tensors[name], tensor)


def test_records_come_back_bit_for_bit_in_any_order_and_after_pickling(tmp_path):
    reader = CacheReader(_write(tmp_path / "c"), teacher="sd-tiny@abc")
    _check(reader)
    _check(pickle.loads(pickle.dumps(reader)))
    assert torch.equal(reader[-1].tensors["latents"], _record(9)["latents"])
    with pytest.raises(IndexError):
        reader[10]
    assert torch.equal(reader.null["prompt_embeds"], torch.full((5, 6), 7.0))
    assert (reader.meta.teacher, reader.meta.resolution, reader.meta.dtype) == ("sd-tiny@abc", 32, "float32")
    assert reader.fields["prompt_embeds"].shape == (5, 6)
    assert reader.fields["prompt_embeds"].dtype == "float16"


def test_what_the_folder_holds(tmp_path):
    _write(tmp_path / "c")
    index = json.loads((tmp_path / "c/index.json").read_text())
    assert [(s["file"], s["count"]) for s in index["shards"]] == [
        ("shard-00000.safetensors", 4),
        ("shard-00001.safetensors", 4),
        ("shard-00002.safetensors", 2),
    ]
    assert index["count"] == 10
    expected = {"index.json", "null.safetensors", *(s["file"] for s in index["shards"])}
    assert {p.name for p in (tmp_path / "c").iterdir()} == expected


def test_a_cache_without_null(tmp_path):
    with CacheWriter(tmp_path / "c", META) as writer:
        writer.add(_record(0), "")
    reader = CacheReader(tmp_path / "c")
    assert reader.null is None
    assert reader[0].caption == ""


def test_later_changes_of_the_callers_tensors_do_not_reach_the_cache(tmp_path):
    with CacheWriter(tmp_path / "c", META) as writer:
        buffer = torch.zeros(3)
        for i in range(3):
            buffer.fill_(i)
            writer.add({"x": buffer}, "")
    assert [CacheReader(tmp_path / "c")[i].tensors["x"][0].item() for i in range(3)] == [0, 1, 2]


def test_an_interrupted_writer_is_refused_by_the_reader_and_goes_on(tmp_path):
    writer = CacheWriter(tmp_path / "c", META, 4)
    for i in range(6):
        writer.add(_record(i), _caption(i))
    with pytest.raises(CacheError, match="interrupted after 4 records: run the same `fastdiff cache` command again"):
        CacheReader(tmp_path / "c")
    resumed = CacheWriter(tmp_path / "c", META, 4)
    assert (resumed.next_position, resumed.count) == (4, 4)
    _write(tmp_path / "c", first=resumed.next_position)
    _check(CacheReader(tmp_path / "c"))


def test_an_exception_in_the_block_does_not_complete_the_cache(tmp_path):
    with pytest.raises(RuntimeError), CacheWriter(tmp_path / "c", META, 2) as writer:
        for i in range(3):
            writer.add(_record(i), "")
        raise RuntimeError
    with pytest.raises(CacheError, match="interrupted after 2"):
        CacheReader(tmp_path / "c")


def test_a_complete_cache_can_be_extended(tmp_path):
    _write(tmp_path / "c", count=6)
    _write(tmp_path / "c", count=10, first=6)
    _check(CacheReader(tmp_path / "c"))


def test_left_out_positions_are_not_asked_for_again(tmp_path):
    writer = CacheWriter(tmp_path / "c", META, 2)
    writer.add(_record(0), "", position=3)
    writer.add(_record(1), "", position=8)
    assert CacheWriter(tmp_path / "c", META, 2).next_position == 9
    with pytest.raises(CacheError, match="position 8 comes after 8"):
        writer.add(_record(1), "", position=8)


KILLED = """
import os, signal, sys, torch
import fastdiff.data.cache_writer as module
from fastdiff.data import CacheMeta, CacheWriter
folder, at = sys.argv[1], sys.argv[2]
real_save, real_index = module.save_file, module.write_index
def save(tensors, path):
    real_save(tensors, path)
    if at == "partial" and "00001" in str(path):
        with open(path, "r+b") as file:
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)
def index(folder, content):
    if at == "index" and len(content.shards) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real_index(folder, content)
module.save_file, module.write_index = save, index
writer = CacheWriter(folder, CacheMeta("t", 32, "float32"), 2)
for i in range(5):
    writer.add({"x": torch.full((3,), float(i))}, str(i))
"""


@pytest.mark.parametrize(
    "at, left",
    [("partial", "shard-00001.safetensors.partial"), ("index", "shard-00001.safetensors")],
)
def test_kill_9_leaves_whole_shards_and_the_next_writer_goes_on(tmp_path, at, left):
    folder = tmp_path / "c"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), at], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert (folder / left).exists()
    writer = CacheWriter(folder, CacheMeta("t", 32, "float32"), 2)
    assert writer.next_position == 2
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", "shard-00000.safetensors"]
    with writer:
        for i in range(2, 5):
            writer.add({"x": torch.full((3,), float(i))}, str(i))
    reader = CacheReader(folder)
    assert [(reader[i].tensors["x"][2].item(), reader[i].caption) for i in range(5)] == [(i, str(i)) for i in range(5)]


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "null.safetensors"])
def test_cut_altered_and_missing_files_are_named(tmp_path, name):
    folder = _write(tmp_path / "c")
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=f"{name} has {len(whole) - 1} bytes.*{len(whole)}"):
        CacheReader(folder, verify=False)
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(CacheError, match=f"{name} was altered"):
        CacheReader(folder)
    path.unlink()
    with pytest.raises(CacheError, match=f"{name} is missing"):
        CacheReader(folder)


def test_a_writer_does_not_go_on_behind_a_cut_shard(tmp_path):
    path = _write(tmp_path / "c") / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"shard-00000.safetensors has"):
        CacheWriter(tmp_path / "c", META)


def test_a_broken_header_is_named_even_unverified(tmp_path):
    folder = _write(tmp_path / "c")
    path = folder / "shard-00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    reader = CacheReader(folder, verify=False)
    reader[0]
    with pytest.raises(CacheError, match=r"shard-00001.safetensors is damaged"):
        reader[5]


def test_another_teachers_cache_is_refused_with_the_remedy(tmp_path):
    folder = _write(tmp_path / "c")
    with pytest.raises(CacheMismatchError, match=r"'sd-tiny@abc', not 'sdxl'.*`fastdiff cache`"):
        CacheReader(folder, teacher="sdxl")
    with pytest.raises(CacheMismatchError, match=r"teacher: 'sd-tiny@abc', now 'sdxl'; resolution: 32, now 64"):
        CacheWriter(folder, CacheMeta("sdxl", 64, "float32", META.details))


def test_records_must_be_alike_and_finite(tmp_path):
    writer = CacheWriter(tmp_path / "c", META)
    writer.add({"x": torch.zeros(3)}, "")
    for other in ({"x": torch.zeros(4)}, {"x": torch.zeros(3).half()}, {"y": torch.zeros(3)}, {}):
        with pytest.raises(CacheError):
            writer.add(other, "")
    with pytest.raises(CacheError, match="position 1: field 'x' is not finite"):
        writer.add({"x": torch.tensor([0.0, float("nan"), 0.0])}, "")
    with pytest.raises(CacheError, match="null conditioning's 'x' is not finite"):
        writer.write_null({"x": torch.tensor([float("inf")])})
    assert writer.count == 1


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CacheError, match=r"not a cache but holds 'thesis.tex'"):
        CacheWriter(tmp_path, META)
    with pytest.raises(FileNotFoundError, match=r"no index.json"):
        CacheReader(tmp_path)
    with pytest.raises(CacheError, match="no record"), CacheWriter(tmp_path / "c", META):
        pass


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(version=99), "version 99"),
        (lambda c: c.update(count=99), "counts 99 records but its shards 10"),
        (lambda c: c.pop("fields"), "is damaged"),
        (lambda c: c["shards"][0].update(file="../x.safetensors"), "refused"),
    ],
)
def test_a_damaged_index(tmp_path, change, message):
    folder = _write(tmp_path / "c")
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(CacheError, match=message):
        CacheReader(folder)
    (folder / "index.json").write_text('{"format": "fastdiff-')
    with pytest.raises(CacheError, match=r"index.json is damaged"):
        CacheReader(folder)


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(_, path):
        path.write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("fastdiff.data.cache_writer.save_file", full)
    writer = CacheWriter(tmp_path / "c", META, 1)
    with pytest.raises(OSError, match=r"could not write .*shard-00000.safetensors: No space left"):
        writer.add(_record(0), "")
    assert list((tmp_path / "c").iterdir()) == []
