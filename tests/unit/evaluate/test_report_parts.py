"""Pictures, outlines, script and files of records: what the page of a report is put together from."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffva_ray.evaluate.report.assets import HERE, IMPORT, MODULES, viewer_script
from diffva_ray.evaluate.report.catalogue import scripted, unscripted
from diffva_ray.evaluate.report.images import coloured, outline, strip


def test_colours_of_the_map_are_clear_at_zero_and_full_at_the_limit() -> None:
    picture = Image.open(io.BytesIO(coloured(np.array([[-0.2, 0.0], [0.1, 0.9]], np.float32), 0.2))).convert("RGBA")
    darker, nothing, brighter, full = list(picture.get_flattened_data())
    assert nothing[3] == 0
    assert darker[3] == full[3] == 255
    assert 100 < brighter[3] < 200
    assert darker[2] > darker[0]
    assert full[0] > full[2]


def test_a_strip_has_its_panels_side_by_side() -> None:
    small = [np.full((16, 16), level, np.float32) for level in (0.0, 0.5, 1.0)]
    picture = Image.open(io.BytesIO(strip(small)))
    assert (picture.format, picture.size) == ("PNG", (48, 16))
    assert [picture.getpixel((x, 8)) for x in (8, 24, 40)] == [0, 128, 255]
    large = Image.open(io.BytesIO(strip([np.zeros((1024, 1024), np.float32)] * 2)))
    assert (large.format, large.size) == ("WEBP", (1024, 512))


def test_outlines_are_paths() -> None:
    mask = np.zeros((16, 16), bool)
    assert outline(None) == outline(mask) == ""
    mask[4:8, 2:6] = True
    path = outline(mask)
    assert re.fullmatch(r"M[-0-9.L ]+Z", path)
    numbers = [float(n) for n in re.findall(r"[0-9.]+", path)]
    assert (min(numbers[::2]), max(numbers[::2])) == (2, 6)
    assert (min(numbers[1::2]), max(numbers[1::2])) == (4, 8)


def test_the_modules_of_the_viewer_are_joined_in_their_order() -> None:
    for n, name in enumerate(MODULES):
        wanted = set(IMPORT.findall((HERE / "viewer" / f"{name}.js").read_text()))
        assert wanted <= set(MODULES[:n]), name
    assert sorted(MODULES) == sorted(file.name.removesuffix(".js") for file in (HERE / "viewer").iterdir())
    text = viewer_script()
    assert not re.search(r"^(import|export) ", text, re.MULTILINE)
    assert "</script" not in text
    assert "innerHTML" not in text


@pytest.mark.parametrize("value", [[{"a": "</script>\u2028é"}], {"n": float("nan")}])
def test_files_of_records_are_read_back(value: Any) -> None:
    data = scripted(value)
    assert data.isascii()
    assert unscripted(data) == ({"n": None} if "n" in value else value)
