"""Emoji as a small text-to-image data set: five openly licensed icon sets, rasterised, with captions at three levels.

Every image has a *group* caption ("an animal", shared by dozens of different images), a *concept* caption ("red apple",
shared by the styles and the skin tones of that concept) and a *style* caption ("red apple, noto style", one image).
A model conditioned on the first two therefore faces a law with many modes.

Input: the npm packages ``@iconify-json/{noto,twemoji,fluent-emoji-flat,fluent-emoji,emojione}`` (SVG bodies and names)
and ``emojibase-data`` (labels, subgroups and keywords by code point). Output: parquet and prompt lists.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

STYLES = {
    "noto": "noto",
    "twemoji": "twemoji",
    "fluent-emoji-flat": "fluent flat",
    "fluent-emoji": "fluent 3d",
    "emojione": "emojione",
}
"""npm package of ``@iconify-json`` -> the style's name in captions."""

TONES = {None: "", 1: "light skin tone", 3: "medium skin tone", 5: "dark skin tone"}
"""Skin tones kept (emojibase numbers them 1 to 5; None is the default yellow); the others are near duplicates."""

LEVELS = {"group": 0.25, "concept": 0.35, "style": 0.40}
"""Caption level -> the probability with which training and the prompt lists draw it."""

HELD_OUT = 4000
RENDER_SCALE = 4
RETRIEVAL_BLOCK = 100
DIVERSITY_PROMPTS = 64

GROUPS = {
    "a smiling face": "face-smiling face-affection",
    "a playful face": "face-tongue face-hat face-glasses",
    "a face with a hand": "face-hand",
    "a neutral face": "face-neutral-skeptical",
    "a sleepy or sick face": "face-sleepy face-unwell",
    "a worried face": "face-concerned",
    "an angry face": "face-negative",
    "a monster or costume face": "face-costume",
    "a cat or monkey face": "cat-face monkey-face",
    "a heart": "heart",
    "an emotion mark": "emotion",
    "an open hand": "hand-fingers-open",
    "a hand sign": "hand-fingers-partial",
    "a pointing finger": "hand-single-finger",
    "a fist or thumb": "hand-fingers-closed",
    "two hands": "hands",
    "a hand with a thing": "hand-prop",
    "a body part": "body-parts",
    "a person": "person hair-style",
    "a person making a gesture": "person-gesture",
    "a person at work": "person-role",
    "a fantasy character": "person-fantasy",
    "a person in motion": "person-activity",
    "a person doing sport": "person-sport",
    "a person resting": "person-resting",
    "a couple or family": "family",
    "a silhouette of people": "person-symbol",
    "an animal": "animal-mammal",
    "a bird": "animal-bird",
    "a reptile or frog": "animal-amphibian animal-reptile",
    "a sea animal": "animal-marine",
    "an insect": "animal-bug",
    "a flower": "plant-flower",
    "a plant": "plant-other",
    "a fruit": "food-fruit",
    "a vegetable": "food-vegetable",
    "a meal": "food-prepared",
    "asian food": "food-asian",
    "a sweet": "food-sweet",
    "a drink": "drink",
    "tableware": "dishware",
    "a map or landscape": "place-map place-geographic",
    "a building": "place-building place-religious",
    "a scenic place": "place-other",
    "a vehicle": "transport-ground",
    "a boat or ship": "transport-water",
    "an aircraft": "transport-air",
    "a clock": "time",
    "weather or sky": "sky-weather",
    "a festive thing": "event",
    "a medal or trophy": "award-medal",
    "sports equipment": "sport",
    "a game or toy": "game",
    "arts and crafts": "arts-crafts",
    "clothing": "clothing",
    "a sound sign": "sound music",
    "a musical instrument": "musical-instrument",
    "a phone or computer": "phone computer",
    "a camera or light": "light-video",
    "a book or paper": "book-paper",
    "money": "money currency",
    "mail": "mail",
    "a writing or office tool": "writing office",
    "a lock or key": "lock",
    "a tool or weapon": "tool",
    "science or medicine": "science medical",
    "a household thing": "household hotel other-object",
    "a traffic or warning sign": "transport-sign warning",
    "an arrow": "arrow",
    "a religious or zodiac sign": "religion zodiac",
    "a media button": "av-symbol",
    "a mathematical or gender sign": "math punctuation gender",
    "a symbol": "other-symbol",
    "a letter or number button": "keycap alphanum",
    "a coloured shape": "geometric",
    "a flag": "flag subdivision-flag",
    "a country flag": "country-flag",
}
"""Group caption -> the Unicode subgroups it stands for."""


@dataclass(frozen=True)
class Emoji:
    """What Unicode (through emojibase) says about one code point sequence."""

    code: str
    label: str
    tone: int | None
    subgroup: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One image to be: its drawing, its captions and where it belongs."""

    svg: str
    caption_group: str
    caption_concept: str
    caption_style: str
    concept: str
    style: str
    group: str
    keywords: str


# --- names -----------------------------------------------------------------------------------------------------------


def code_of(hexcode: str) -> str:
    """Code points in one spelling: lower case, without the presentation selector FE0F."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def ascii_text(text: str) -> str:
    """Lower-case ASCII: accents off, curly quotes straight or dropped."""
    text = text.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "")
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def slug(text: str) -> str:
    """The spelling of icon names: ``red apple`` -> ``red-apple``."""
    return re.sub(r"[^a-z0-9]+", "-", ascii_text(text).replace("'", "")).strip("-")


def clean_label(label: str) -> str:
    """A caption from a Unicode name: ``flag: France`` -> ``flag of france``."""
    text = ascii_text(label).replace("&", "and").replace("(", "").replace(")", "")
    head, colon, tail = text.partition(": ")
    if colon:
        tail = re.sub(r",? *\b(light|medium-light|medium|medium-dark|dark) skin tone\b,? *", "", tail).strip()
        joint = {"flag": "of", "family": "of", "keycap": "", "kiss": "of", "couple with heart": "of"}.get(head, "with")
        if tail.startswith("facing"):
            joint = ""
        tail = tail.replace(", ", " and ")
        text = f"{head} {joint} {tail}" if tail else head
    return re.sub(r"\s+", " ", text.replace(", ", " and ")).strip()


def read_unicode(folder: Path) -> dict[str, Emoji]:
    """All emoji of ``emojibase-data`` by code, skin tones included; those mixing two tones are left out."""
    data = json.loads((folder / "en" / "data.json").read_text())
    names = json.loads((folder / "meta" / "groups.json").read_text())["subgroups"]
    found = {}
    for record in data:
        for variant in [record, *record.get("skins", [])]:
            tone, subgroup = variant.get("tone"), names.get(str(variant.get("subgroup")))
            if isinstance(tone, list):
                tone = tone[0] if len(set(tone)) == 1 else -1
            if subgroup is None or subgroup == "skin-tone" or tone not in TONES:
                continue
            code = code_of(variant["hexcode"])
            found[code] = Emoji(code, variant["label"], tone, subgroup, tuple(record.get("tags", ())))
    return found


def read_package(folder: Path) -> dict:
    """``icons.json`` of an iconify package."""
    return json.loads((folder / "icons.json").read_text())


def codes_by_name(packages: Path) -> dict[str, dict[str, str]]:
    """For each package, icon name -> code. Two of the packages ship no table, so theirs is derived by name."""
    icons = packages / "@iconify-json"
    tables: dict[str, dict[str, str]] = {}
    for package in ("noto", "twemoji", "fluent-emoji-flat"):
        chars = json.loads((icons / package / "chars.json").read_text())
        tables[package] = {name: code_of(code) for code, name in chars.items()}
    tables["fluent-emoji"] = tables["fluent-emoji-flat"]

    by_name: dict[str, str] = {}
    for package in ("twemoji", "noto"):
        table, aliases = tables[package], read_package(icons / package).get("aliases", {})
        by_name |= {
            alias: table[a["parent"]] for alias, a in aliases.items() if set(a) == {"parent"} and a["parent"] in table
        }
        by_name |= table
    for emoji in read_unicode(packages / "emojibase-data").values():
        by_name[slug(emoji.label)] = emoji.code
    emojione = read_package(icons / "emojione")
    spellings: dict[str, list[str]] = {name: [name] for name in emojione["icons"]}
    for alias, a in emojione.get("aliases", {}).items():
        if set(a) == {"parent"} and a["parent"] in spellings:
            spellings[a["parent"]].append(alias)
    tables["emojione"] = {}
    for name, names in spellings.items():
        tries = [
            form for n in names for form in (n, n.replace("flag-for-flag-", "flag-").replace("flag-for-", "flag-"))
        ]
        match = next((by_name[form] for form in tries if form in by_name), None)
        if match is not None:
            tables["emojione"][name] = match
    return tables


# --- entries ---------------------------------------------------------------------------------------------------------


def svg_document(icon: dict, package: dict) -> str:
    """A whole SVG file around an iconify body."""
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", package.get("width", 16))
    height = icon.get("height", package.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def group_of(subgroup: str) -> str:
    """The group caption of a Unicode subgroup."""
    return _group_table()[subgroup]


@functools.cache
def _group_table() -> dict[str, str]:
    return {name: caption for caption, names in GROUPS.items() for name in names.split()}


def read_entries(packages: Path) -> list[Entry]:
    """All images worth drawing, one for each (emoji, style), in a fixed order."""
    unicode, tables, entries = read_unicode(packages / "emojibase-data"), codes_by_name(packages), []
    base_label = {}
    for emoji in unicode.values():
        base_label.setdefault(re.sub(r"-1f3f[b-f]", "", emoji.code), emoji.label)
    for package_name, style in STYLES.items():
        package = read_package(packages / "@iconify-json" / package_name)
        seen = set()
        for name in sorted(package["icons"]):
            icon, emoji = package["icons"][name], unicode.get(tables[package_name].get(name, ""))
            if emoji is None or emoji.code in seen:
                continue
            seen.add(emoji.code)
            label = clean_label(
                emoji.label if emoji.tone is None else base_label[re.sub(r"-1f3f[b-f]", "", emoji.code)]
            )
            concept = ", ".join(part for part in (label, TONES[emoji.tone]) if part)
            group = group_of(emoji.subgroup)
            entries.append(
                Entry(
                    svg=svg_document(icon, package),
                    caption_group=group,
                    caption_concept=label,
                    caption_style=f"{concept}, {style} style",
                    concept=concept,
                    style=style,
                    group=emoji.subgroup,
                    keywords=", ".join(emoji.keywords),
                )
            )
    return entries


# --- pictures --------------------------------------------------------------------------------------------------------


def rasterise(svg: str, resolution: int) -> bytes:
    """PNG bytes, RGB, ``resolution`` pixels square, centred on white; drawn larger and reduced with Lanczos."""
    import resvg_py
    from PIL import Image

    size = resolution * RENDER_SCALE
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)))).convert(
        "RGBA"
    )
    drawn.thumbnail((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    canvas.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    small = canvas.convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return buffer.getvalue()


def _rasterise_all(entries: list[Entry], resolution: int, workers: int) -> list[bytes]:
    draw = functools.partial(rasterise, resolution=resolution)
    if workers <= 1:
        return [draw(entry.svg) for entry in entries]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(draw, (entry.svg for entry in entries), chunksize=64))


def drop_duplicates(entries: list[Entry], images: list[bytes]) -> tuple[list[Entry], list[bytes]]:
    """Keep one of several pictures equal to the pixel (icon sets reuse a drawing under several names)."""
    first: dict[str, int] = {}
    for index, image in enumerate(images):
        first.setdefault(hashlib.sha256(image).hexdigest(), index)
    kept = sorted(first.values())
    return [entries[i] for i in kept], [images[i] for i in kept]


# --- splits and prompts ----------------------------------------------------------------------------------------------


def split_entries(entries: list[Entry], held_out: int, seed: int) -> list[str]:
    """``train``, ``test`` or ``validation`` for each entry.

    Held-out pictures are drawn at random among those whose concept caption keeps a training picture; their two halves
    are one shuffle cut in two, hence independent samples of one law.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(entries)), len(entries))
    left = Counter(entry.caption_concept for entry in entries)
    chosen = []
    for index in order:
        if len(chosen) == held_out:
            break
        if left[entries[index].caption_concept] > 1:
            left[entries[index].caption_concept] -= 1
            chosen.append(index)
    rng.shuffle(chosen)
    splits = ["train"] * len(entries)
    for rank, index in enumerate(chosen):
        splits[index] = "test" if rank < len(chosen) // 2 else "validation"
    return splits


def caption_at(entry: Entry | dict, level: str) -> str:
    """The caption of an entry (or of a row read back) at a level."""
    return entry[f"caption_{level}"] if isinstance(entry, dict) else getattr(entry, f"caption_{level}")


def draw_prompts(entries: Iterable[Entry], seed: int) -> Iterator[dict]:
    """One prompt an entry, its level drawn with the probabilities of training."""
    rng = random.Random(seed)
    for entry in entries:
        level = rng.choices(list(LEVELS), weights=list(LEVELS.values()))[0]
        yield {
            "prompt": caption_at(entry, level),
            "level": level,
            "concept": entry.concept,
            "group": entry.caption_group,
            "style": entry.style,
        }


def retrieval_blocks(prompts: list[dict], size: int = RETRIEVAL_BLOCK) -> list[dict]:
    """Concept and style prompts in blocks of ``size`` whose concepts (skin tone aside) all differ; a rest is dropped."""
    blocks: list[dict[str, dict]] = []
    for prompt in prompts:
        if prompt["level"] == "group":
            continue
        key = re.sub(r", \w+ skin tone$", "", prompt["concept"])
        block = next((b for b in blocks if len(b) < size and key not in b), None)
        if block is None:
            block = {}
            blocks.append(block)
        block[key] = prompt
    full = [block for block in blocks if len(block) == size]
    return [{"block": number, **prompt} for number, block in enumerate(full) for prompt in block.values()]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_prompts(entries: list[Entry], splits: list[str], folder: Path, seed: int) -> None:
    """The prompt lists of the benchmark: held-out halves, training captions, retrieval blocks and diversity groups."""
    folder.mkdir(parents=True, exist_ok=True)
    of_split = {
        s: [e for e, t in zip(entries, splits, strict=True) if t == s] for s in ("train", "test", "validation")
    }
    test = list(draw_prompts(of_split["test"], seed + 1))
    write_jsonl(folder / "emoji_test.jsonl", test)
    write_jsonl(folder / "emoji_validation.jsonl", draw_prompts(of_split["validation"], seed + 2))
    write_jsonl(folder / "emoji_retrieval.jsonl", retrieval_blocks(test))
    captions = {level: sorted({caption_at(e, level) for e in of_split["train"]}) for level in LEVELS}
    lines = [caption for level in LEVELS for caption in captions[level]]
    (folder / "emoji_train.txt").write_text("".join(f"{line}\n" for line in lines))
    groups = Counter(entry.caption_group for entry in of_split["train"]).most_common(DIVERSITY_PROMPTS)
    (folder / "emoji_diversity.txt").write_text("".join(f"{group}\n" for group, _ in groups))


def write_training_table(entries: list[Entry], images: list[bytes], splits: list[str], path: Path, seed: int) -> None:
    """The training split as methods read it: columns `image` and `text`, one caption an image at a drawn level."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = [(entry, image) for entry, image, split in zip(entries, images, splits, strict=True) if split == "train"]
    texts = [row["prompt"] for row in draw_prompts([entry for entry, _ in kept], seed)]
    table = pa.table({"image": pa.array([image for _, image in kept], pa.binary()), "text": texts})
    pq.write_table(table, path, compression="zstd")


# --- the whole -------------------------------------------------------------------------------------------------------


def build_emoji_dataset(
    packages: Path,
    output: Path,
    resolution: int = 32,
    seed: int = 0,
    *,
    prompts: Path | None = None,
    held_out: int = HELD_OUT,
    workers: int = 2,
) -> dict:
    """Draw the set; write ``emoji.parquet`` (everything), ``emoji_train.parquet`` (what methods train on), the prompt
    lists and ``emoji.json`` (counts and settings).

    Args:
        packages: a ``node_modules`` folder holding ``@iconify-json/*`` and ``emojibase-data``.
        output: folder to write to.
        resolution: side of the square pictures, in pixels.
        seed: of the split and of the caption levels in the prompt lists.
        prompts: folder for the prompt lists (default: ``output/prompts``).
        held_out: number of held-out pictures, cut into ``test`` and ``validation``.
        workers: processes that draw.

    Returns:
        The content of ``emoji.json``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    packages, output = Path(packages), Path(output)
    entries = read_entries(packages)
    images = _rasterise_all(entries, resolution, workers)
    drawn = len(entries)
    entries, images = drop_duplicates(entries, images)
    splits = split_entries(entries, held_out, seed)
    order = random.Random(seed + 3).sample(
        range(len(entries)), len(entries)
    )  # so that any part of a list is a fair one
    entries, images, splits = ([column[i] for i in order] for column in (entries, images, splits))

    columns = {
        name: [asdict(entry)[name] for entry in entries] for name in Entry.__dataclass_fields__ if name != "svg"
    }
    output.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": pa.array(images, pa.binary()), **columns, "split": splits})
    pq.write_table(table, output / "emoji.parquet", compression="zstd")
    write_training_table(entries, images, splits, output / "emoji_train.parquet", seed + 4)
    write_prompts(entries, splits, Path(prompts) if prompts else output / "prompts", seed)
    facts = {
        "resolution": resolution,
        "seed": seed,
        "images_drawn": drawn,
        "images_kept": len(entries),
        "splits": dict(Counter(splits)),
        "styles": dict(Counter(entry.style for entry in entries)),
        "groups": len({entry.caption_group for entry in entries}),
        "concept_captions": len({entry.caption_concept for entry in entries}),
        "style_captions": len({entry.caption_style for entry in entries}),
        "versions": {
            name: json.loads((packages / name / "package.json").read_text())["version"]
            for name in [*(f"@iconify-json/{p}" for p in STYLES), "emojibase-data"]
        },
    }
    (output / "emoji.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts
