"""Small image sets in every format, all with the same five captioned pictures."""

import io
import json
import tarfile

from PIL import Image

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
CAPTIONS = ["red", "green", "blue", "yellow", "cyan"]


def png(colour=(255, 0, 0), size=(12, 8), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def noisy_png(size=(64, 64)):
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder, images=None, captions=CAPTIONS):
    folder.mkdir(parents=True, exist_ok=True)
    images = images or [png(c) for c in COLOURS]
    lines = []
    for i, (image, caption) in enumerate(zip(images, captions)):
        (folder / f"{i}.png").write_bytes(image)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_tar(path, members):
    """members: (name, bytes) or a TarInfo."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tar_members(indices=range(5)):
    return [m for i in indices for m in ((f"{i:04d}.png", png(COLOURS[i])), (f"{i:04d}.txt", CAPTIONS[i].encode()))]


def write_parquet(path, column="image", group=2, images=None, captions=CAPTIONS, structs=True):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = images or [png(c) for c in COLOURS]
    values = [{"bytes": b, "path": None} for b in images] if structs else images
    pq.write_table(pa.table({column: values, "text": list(captions)}), path, row_group_size=group)
    return path
