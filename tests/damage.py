"""A seeded data set of damaged images, a folder per class: what disks, copies, downloads and people do to files.

    python tests/damage.py FOLDER [COUNT] [SEED]     # about COUNT files, made from phantoms

``write_damaged`` returns the kind of every file; ``EXPECTED`` says how a record of that kind may end.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

CLASSES = ("COVID", "Lung_Opacity", "Viral Pneumonia", "Klasse Ü, 胸部 'x'")
ANY = frozenset({"ok", "bad_image", "too_small", "blank"})  # damage that may spare what a decoder looks at
OK, BAD, SMALL = frozenset({"ok"}), frozenset({"bad_image"}), frozenset({"too_small"})
UNPLANNED = frozenset({"not planned"})  # no regular file: the listing leaves it out
PNG_MARK = b"\x89PNG\r\n\x1a\n"

Draw = random.Random


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def as_jpeg(good: bytes, **options: object) -> bytes:
    return encoded(Image.open(BytesIO(good)).convert("L"), "JPEG", quality=92, **options)


def any_format(good: bytes, draw: Draw) -> tuple[str, bytes]:
    """Extension and bytes of an image in one of the formats that are read."""
    image = Image.open(BytesIO(good)).convert("L")
    return draw.choice(
        [
            (".png", good),
            (".jpg", as_jpeg(good)),
            (".jpg", as_jpeg(good, progressive=True)),
            (".bmp", encoded(image, "BMP")),
            (".tif", encoded(image, "TIFF", compression="tiff_lzw")),
            (".tif", encoded(image, "TIFF")),
        ]
    )


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, compressed: bytes, before: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return PNG_MARK + chunk(b"IHDR", header) + before + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def halves(width: int, height: int, depth: int = 8, colour: int = 0, level: int = 1) -> bytes:
    """A true, complete PNG of two greys, dark left and bright right, made without ever holding its pixels."""
    samples = {0: 1, 2: 3}[colour]
    length = (width * depth * samples + 7) // 8
    row = b"\0" + b"\x55" * (length // 2) + b"\xaa" * (length - length // 2)
    packer, rows = zlib.compressobj(level), max(1, (1 << 20) // len(row))
    parts = [packer.compress(row * min(rows, height - start)) for start in range(0, height, rows)]
    return png(width, height, depth, colour, b"".join([*parts, packer.flush()]))


def zeros_deflated(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(megabytes)), packer.flush()])


# ---- kinds of files: each a function of a good image's bytes and a generator, to an extension and bytes


def flipped(extension: str, data: bytes, draw: Draw, first: int | None = None) -> tuple[str, bytes]:
    """1 to 64 bytes with a flipped bit each: anywhere, or in the ``first`` bytes."""
    damaged = bytearray(data)
    for at in draw.sample(range(min(first or len(data), len(data))), draw.choice([1, 1, 2, 8, 64])):
        damaged[at] ^= 1 << draw.randrange(8)
    return extension, bytes(damaged)


def overwritten(good: bytes, draw: Draw, fill: Callable[[Draw, int], bytes]) -> tuple[str, bytes]:
    """A block in the middle replaced: a bad sector, an erased page of a flash card."""
    extension, data = any_format(good, draw)
    start = draw.randrange(len(data) // 3, len(data) - 1)
    length = draw.randrange(1, len(data) - start)
    return extension, data[:start] + fill(draw, length) + data[start + length :]


def resized_header(good: bytes, draw: Draw, larger: bool, checksum: bool) -> tuple[str, bytes]:
    """A PNG whose header states another size than its pixels have. With a right checksum Pillow may read it: it fills
    missing rows with zeros."""
    width, height = struct.unpack(">II", good[16:24])
    scale = draw.choice([2, 3, 100] if larger else [0.25, 0.5, 0.9])
    sizes = [(int(width * scale), height), (width, int(height * scale))]
    header = struct.pack(">II", *draw.choice(sizes)) + good[24:29]
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header)) if checksum else good[29:33]
    return ".png", good[:16] + header + crc + good[33:]


def resized_jpeg(good: bytes, draw: Draw) -> tuple[str, bytes]:
    data = bytearray(as_jpeg(good, progressive=draw.random() < 0.5))
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    data[at : at + 4] = struct.pack(">HH", *(draw.choice([0, 1, 33, 60, 66, 100, 3000]) for _ in "hw"))
    return ".jpg", bytes(data)


def filled_jpeg(good: bytes, draw: Draw) -> tuple[str, bytes]:
    """0xff may be repeated before any marker, so this decodes; whoever looks for its end must not take for ever."""
    data = as_jpeg(good)
    at = data.index(b"\xff\xda") + 100
    return ".jpg", data[:at] + b"\xff" * draw.choice([200_000, 1_000_000]) + b"\0" + data[at:]


def many_scans(good: bytes, draw: Draw) -> tuple[str, bytes]:
    data = encoded(Image.new("L", (2000, 2000), 99), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return ".jpg", data[:-2] + last * draw.randrange(5_000, 20_000) + data[-2:]


def large_tile(good: bytes, draw: Draw) -> tuple[str, bytes]:
    """A small TIFF that says its one tile is 40000 x 40000."""
    entries = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1), (322, 40_000), (323, 40_000)]
    packed = zlib.compress(bytes(64 * 64))
    entries += [(324, 8 + 2 + 12 * 10 + 4), (325, len(packed))]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return ".tif", b"II*\0" + struct.pack("<IH", 8, 10) + table + bytes(4) + packed


def with_text_bomb(good: bytes, draw: Draw) -> tuple[str, bytes]:
    image, packed = Image.open(BytesIO(good)).convert("L"), zeros_deflated(64)
    body = b"Comment\0\0" + packed
    kind, body = draw.choice([(b"zTXt", body), (b"iCCP", body), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed)])
    raw = b"".join(b"\0" + row.tobytes() for row in np.asarray(image))
    return ".png", png(*image.size, 8, 0, zlib.compress(raw), chunk(kind, body))


def not_an_image(good: bytes, draw: Draw) -> tuple[str, bytes]:
    sink = BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("image.png", good)
    texts = [
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"path,label\na.png,COVID\n",
        b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.4\n%%EOF\n",
        sink.getvalue(),
        encoded(Image.open(BytesIO(good)), "GIF"),
        encoded(Image.open(BytesIO(good)).convert("RGB"), "WEBP"),
    ]
    return draw.choice([".png", ".jpg", ".tiff", ".bmp"]), draw.choice(texts)


def damaged_dicom(good: bytes, draw: Draw) -> tuple[str, bytes]:
    syntax = draw.choice([b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99\0\0"])
    meta = b"\2\0\x10\0UI" + struct.pack("<H", len(syntax)) + syntax
    return ".dcm", bytes(128) + b"DICM" + meta + draw.randbytes(draw.randrange(600))


def truncated(good: bytes, draw: Draw) -> tuple[str, bytes]:
    extension, data = any_format(good, draw)
    return extension, data[: draw.randrange(1, len(data) - 1)]


def garbage_appended(good: bytes, draw: Draw) -> tuple[str, bytes]:
    extension, data = draw.choice([(".png", good), (".jpg", as_jpeg(good))])
    return extension, data + draw.choice([b"\n<html>", data, draw.randbytes(100) + b"x", b"\0" * 9 + b"x"])


def zero_tail(good: bytes, draw: Draw) -> tuple[str, bytes]:
    """A copy that reserved the space but did not finish."""
    extension, data = draw.choice([(".png", good), (".jpg", as_jpeg(good))])
    kept = draw.randrange(0, len(data) - 2)
    return extension, data[:kept] + bytes(len(data) - kept)


def too_small(good: bytes, draw: Draw) -> tuple[str, bytes]:
    return ".png", encoded(Image.new("L", draw.choice([(1, 1), (1, 5000), (31, 32), (4000, 2), (31, 31)]), 128))


def declared_bomb(good: bytes, draw: Draw) -> tuple[str, bytes]:
    side, depth = draw.choice([20_000, 100_000, 2**31 - 1]), draw.choice([1, 8, 16])
    return ".png", png(side, side, depth, 0, zlib.compress(b""))


def unusual_but_good(good: bytes, draw: Draw) -> tuple[str, bytes]:
    image = Image.open(BytesIO(good)).convert("L")
    deep = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = draw.randrange(1, 9)
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", "anonymous", zip=True)
    return draw.choice(
        [
            (".png", encoded(image.convert("P"))),
            (".png", encoded(image.convert("P"), transparency=0)),
            (".jpg", encoded(image.convert("RGB").convert("CMYK"), "JPEG")),
            (".png", encoded(deep)),
            (".tiff", encoded(deep, "TIFF")),
            (".png", encoded(image.convert("1"))),
            (".png", encoded(image.convert("LA"))),
            (".png", encoded(image.convert("RGBA"), pnginfo=text)),
            (".jpeg", as_jpeg(good, progressive=True, exif=exif)),
            (".png", good + bytes(512)),
            (".tif", encoded(image.convert("F"), "TIFF")),
            (".jpg", good),  # extensions are not believed
            (".png", as_jpeg(good)),
            (".PNG", encoded(image, "BMP")),
        ]
    )


KINDS: dict[str, tuple[float, frozenset[str], Callable[[bytes, Draw], tuple[str, bytes]]]] = {
    # name: share of the files, how its records may end, maker
    "bits flipped": (6, ANY, lambda good, draw: flipped(*any_format(good, draw), draw)),
    "bits flipped in the header": (6, ANY, lambda good, draw: flipped(*any_format(good, draw), draw, first=64)),
    "bits flipped in a PNG": (4, BAD, lambda good, draw: flipped(".png", good, draw)),  # it has checksums
    "block of noise": (4, ANY, lambda good, draw: overwritten(good, draw, Draw.randbytes)),
    "block of zeros": (3, ANY, lambda good, draw: overwritten(good, draw, lambda _, length: bytes(length))),
    "block of 0xff": (3, ANY, lambda good, draw: overwritten(good, draw, lambda _, length: b"\xff" * length)),
    "truncated": (10, BAD, truncated),
    "zero tail": (5, BAD, zero_tail),
    "garbage appended": (4, BAD, garbage_appended),
    "size raised": (2, ANY, lambda good, draw: resized_header(good, draw, True, True)),
    "size lowered": (2, ANY, lambda good, draw: resized_header(good, draw, False, True)),
    "size changed, checksum not": (3, BAD, lambda good, draw: resized_header(good, draw, draw.random() < 0.5, False)),
    "JPEG size changed": (4, ANY, resized_jpeg),
    "JPEG full of 0xff": (0.5, OK, filled_jpeg),
    "JPEG of many scans": (0.5, BAD, many_scans),
    "TIFF of one large tile": (0.5, BAD, large_tile),
    "declared bomb": (3, BAD, declared_bomb),
    "text bomb": (0.7, BAD, with_text_bomb),
    "not an image": (8, BAD, not_an_image),
    "damaged DICOM": (3, BAD, damaged_dicom),
    "empty": (3, BAD, lambda good, draw: (draw.choice([".png", ".jpg", ".dcm"]), b"")),
    "zeros": (3, BAD, lambda good, draw: (draw.choice([".png", ".jpg", ".dcm"]), bytes(len(good)))),
    "noise": (4, BAD, lambda good, draw: (draw.choice([".png", ".tif"]), draw.randbytes(draw.randrange(1, 3000)))),
    "noise behind a signature": (
        4,
        BAD,
        lambda good, draw: (
            ".png",
            draw.choice([PNG_MARK, b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*", b"BM"]) + draw.randbytes(800),
        ),
    ),
    "too small": (4, SMALL, too_small),
    "unusual but good": (8, OK, unusual_but_good),
}
# One of each, as they are large or slow to make. The first three fit the limit on pixels, and are decoded.
LARGE: dict[str, tuple[frozenset[str], Callable[[], bytes]]] = {
    "9000 x 9000 grey": (OK, lambda: halves(9_000, 9_000)),
    "5000 x 5000 grey 16-bit": (OK, lambda: halves(5_000, 5_000, 16)),
    "5000 x 5000 colour": (OK, lambda: halves(5_000, 5_000, 8, 2)),
    "20000 x 20000 black and white": (BAD, lambda: halves(20_000, 20_000, 1)),
    "20000 x 20000 grey": (BAD, lambda: halves(20_000, 20_000)),
}
NAMES = (
    "胸部é.png",
    "two\nlines.png",
    "a'b\"c,d;e.png",
    "-rf.png",
    " .png",
    "$(rm x) %s {0}.png",
    "\x1b[31m.png",
    "x..png",
)
EXPECTED: dict[str, frozenset[str]] = {
    **{kind: statuses for kind, (_, statuses, _) in KINDS.items()},
    **{kind: statuses for kind, (statuses, _) in LARGE.items()},
    "odd name, good": OK,
    "odd name, bad": BAD,
    "250 bytes of name": OK,
    "link to a good image": OK,
    "file of 3 GB": BAD,
    "no permission": frozenset({"error"}),
    "no permission, but readable": OK,  # to root everything is
    "dangling link": UNPLANNED,
    "loop of links": UNPLANNED,
    "link to the folder above": UNPLANNED,
    "folder": UNPLANNED,
    "pipe": UNPLANNED,
    "hidden": UNPLANNED,
}


def write_damaged(folder: Path, count: int, seed: int, good: list[bytes]) -> dict[str, str]:
    """About ``count`` files of all kinds below ``folder``, made from the PNG images ``good``; kind by relative path."""
    draw = Draw(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    kinds = {}
    for path, kind, data in (*_of_kinds(draw, count, good), *_large(), *_names(draw, good)):
        (folder / path).write_bytes(data)
        kinds[path] = kind
    return kinds | _no_plain_files(folder, good[0])


def _of_kinds(draw: Draw, count: int, good: list[bytes]) -> Iterator[tuple[str, str, bytes]]:
    total = sum(share for share, _, _ in KINDS.values())
    number = 0
    for kind, (share, _, make) in KINDS.items():
        for _ in range(max(1, round(count * share / total))):
            extension, data = make(draw.choice(good), draw)
            number += 1
            yield f"{draw.choice(CLASSES)}/{number:05d}{extension}", kind, data


def _large() -> Iterator[tuple[str, str, bytes]]:
    for number, (kind, (_, make)) in enumerate(LARGE.items()):
        yield f"{CLASSES[0]}/large-{number}.png", kind, make()


def _names(draw: Draw, good: list[bytes]) -> Iterator[tuple[str, str, bytes]]:
    for name in NAMES:
        yield f"{CLASSES[3]}/{name}", "odd name, good", draw.choice(good)
        yield f"{CLASSES[2]}/{name}", "odd name, bad", draw.choice(good)[:40]
    yield f"{CLASSES[0]}/{'n' * 246}.png", "250 bytes of name", good[0]


def _no_plain_files(folder: Path, good: bytes) -> dict[str, str]:
    """What lies in data folders beside plain files."""
    here = folder / CLASSES[0]
    (folder / "image.bin").write_bytes(good)
    (here / "link.png").symlink_to("../image.bin")
    (here / "dangling.png").symlink_to("nowhere.png")
    (here / "loop-a.png").symlink_to("loop-b.png")
    (here / "loop-b.png").symlink_to("loop-a.png")
    (here / "above").symlink_to("..", target_is_directory=True)
    (here / "folder.png").mkdir()
    (here / "._hidden.png").write_bytes(good)
    os.mkfifo(here / "pipe.png")
    with open(here / "sparse.png", "wb") as file:
        file.truncate(3 << 30)
    (here / "locked.png").write_bytes(good)
    (here / "locked.png").chmod(0)
    readable = os.access(here / "locked.png", os.R_OK)
    kinds = {
        "link.png": "link to a good image",
        "dangling.png": "dangling link",
        "loop-a.png": "loop of links",
        "loop-b.png": "loop of links",
        "above": "link to the folder above",
        "folder.png": "folder",
        "._hidden.png": "hidden",
        "pipe.png": "pipe",
        "sparse.png": "file of 3 GB",
        "locked.png": "no permission, but readable" if readable else "no permission",
    }
    return {f"{CLASSES[0]}/{name}": kind for name, kind in kinds.items()}


if __name__ == "__main__":
    from diffva_ray.data.phantoms import phantom_set
    from diffva_ray.storage.local import LocalStore

    target = Path(sys.argv[1])
    for _ in phantom_set(LocalStore(str(target / "phantoms")), 12, 64, seed=1):
        pass
    images = [file.read_bytes() for file in sorted((target / "phantoms").glob("*/images/*.png"))]
    count, seed = (int(text) for text in [*sys.argv[2:4], "1000", "0"][:2])
    found = write_damaged(target / "images", count, seed, images)
    print(f"{len(found)} files of {len(set(found.values()))} kinds in {target / 'images'}")
