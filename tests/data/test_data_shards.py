import gzip
import json
import sys
import tarfile

import pytest
from data_helpers import png, tar_members, write_tar

from fastdiff.data import TooManyRejects
from fastdiff.data.image_shards import ImageShards, expand_shards
from fastdiff.data.tar_index import ShardError, index_tar


def _info(name, kind, target="x"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("name", ["../evil.png", "/abs/evil.png", "a/../../evil.png", "..\\evil.png", "C:/evil.png"])
def test_members_that_lead_out_are_refused(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", [*tar_members(), (name, png())])
    with pytest.raises(ShardError, match="leads out of it: refused") as caught:
        ImageShards(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", [*tar_members(), _info("9.png", kind, "/etc/passwd")])
    with pytest.raises(ShardError, match=r"'9.png' is a link, device or sparse file: refused"):
        ImageShards(path)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "pt", "PKL", "feat.pth"])
def test_pickles_are_refused(tmp_path, extension):
    path = write_tar(tmp_path / "a.tar", [*tar_members(), (f"0001.{extension}", b"cos\nsystem\n")])
    with pytest.raises(ShardError, match="is a pickle"):
        ImageShards(path)


def test_every_cut_of_a_shard_is_noticed(tmp_path):
    whole = write_tar(tmp_path / "a.tar", tar_members()).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        end = max(m.offset_data + 512 * -(-m.size // 512) for m in archive.getmembers())
    for length in [*range(0, end, 256), end, end + 511]:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ShardError, match=r"cut short|not a readable"):
            index_tar(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])
    assert len(index_tar(tmp_path / "cut.tar")) == 5


def test_a_damaged_header_in_the_middle_is_an_error_not_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", tar_members())
    with tarfile.open(path) as archive:
        third = archive.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[third + 3] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=f"damaged or cut short.*byte {third} of"):
        index_tar(path)


def test_compressed_and_foreign_files(tmp_path):
    plain = write_tar(tmp_path / "a.tar", tar_members()).read_bytes()
    for name, data in (("b.tar", gzip.compress(plain)), ("c.tar", b"hello" * 1000), ("d.tar", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ShardError, match="not a readable uncompressed tar"):
            ImageShards(tmp_path / name)


def test_two_members_of_one_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*tar_members(), ("0001.txt", b"again")])
    with pytest.raises(ShardError, match=r"'0001.txt' twice"):
        ImageShards(path)


def test_keys_and_extensions_split_at_the_first_dot_as_in_webdataset(tmp_path):
    members = [("a.b/0001.seg.png", b"1"), ("a.b/0001.JPG", b"2"), ("a.b/0002.jpg", b"3")]
    index = index_tar(write_tar(tmp_path / "a.tar", [_info("a.b", tarfile.DIRTYPE), *members]))
    assert {key: set(sample) for key, sample in index.items()} == {
        "a.b/0001": {"seg.png", "jpg"},
        "a.b/0002": {"jpg"},
    }


def test_the_index_agrees_with_the_webdataset_library(tmp_path):
    wds = pytest.importorskip("webdataset")
    path = tmp_path / "w.tar"
    with wds.TarWriter(str(path)) as writer:
        for i in range(7):
            writer.write({"__key__": f"long/{'n' * 120}{i}", "png": png((i, 0, 0)), "txt": f"caption {i}"})
    expected = [(s["__key__"], s["txt"].decode()) for s in wds.WebDataset(str(path), shardshuffle=False)]
    source = ImageShards(path)
    assert [(source[i].key, source[i].caption) for i in range(7)] == [(f"w.tar/{k}", t) for k, t in expected]
    assert [source[i].image.getpixel((0, 0))[0] for i in range(7)] == list(range(7))


def test_captions_from_json_members(tmp_path):
    fields = {"text": "short", "long": "a long caption", "n": 3}
    path = write_tar(tmp_path / "a.tar", [("0.png", png()), ("0.json", json.dumps(fields).encode()), ("0.txt", b"t")])
    assert ImageShards(path).caption(0) == "t"
    assert ImageShards(path, caption_column="long").caption(0) == "a long caption"
    with pytest.raises(ShardError, match="the field 'n'"):
        ImageShards(path, caption_column="n")


def test_samples_without_image_or_caption_are_counted_and_named(tmp_path):
    members = [*tar_members(), ("7.txt", b"x"), ("8.png", png()), ("9.png", png()), ("9.txt", b"\xff\xff")]
    path = write_tar(tmp_path / "a.tar", members)
    source = ImageShards(path, max_rejected=0.5)
    assert len(source) == 5
    assert source.rejects.summary() == (
        "3 of 8 rejected: a.tar/7 (no image), a.tar/8 (no caption), a.tar/9 (no caption)"
    )
    with pytest.raises(TooManyRejects, match="3 of 8"):
        ImageShards(path)


def test_a_first_shard_without_a_usable_sample_is_an_error_at_once(tmp_path):
    write_tar(tmp_path / "s-0.tar", [("0.mp4", b"x"), ("1.mp4", b"x"), ("1.cls", b"3")])
    write_tar(tmp_path / "s-1.tar", tar_members())
    with pytest.raises(ShardError, match=r"s-0.tar, the first shard.*\.mp4 \(2\), \.cls \(1\); expected an image"):
        ImageShards(tmp_path, max_rejected=1.0)


def test_patterns(tmp_path, monkeypatch):
    for i in (8, 9, 10):
        write_tar(tmp_path / f"s-{i:03d}.tar", tar_members([0]))
    names = [f"s-{i:03d}.tar" for i in (8, 9, 10)]
    assert [p.name for p in expand_shards(f"{tmp_path}/s-{{008..010}}.tar")] == names
    assert [p.name for p in expand_shards(tmp_path)] == names
    with pytest.raises(FileNotFoundError, match=r"1 of 4 shards .* the first is .*s-011.tar"):
        expand_shards(f"{tmp_path}/s-{{008..011}}.tar")
    for remote in ("https://example.org/{0..3}.tar", "pipe:cat a.tar"):
        with pytest.raises(ValueError, match="not a local path: download"):
            expand_shards(remote)
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(ImportError, match=r"fastdiff-diffusers\[data\]"):
        expand_shards(f"{tmp_path}/s-{{008..010}}.tar")


def test_a_shard_that_shrinks_while_in_use(tmp_path):
    path = write_tar(tmp_path / "a.tar", tar_members())
    source = ImageShards(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ShardError, match="changed while it was in use"):
        source[4]
