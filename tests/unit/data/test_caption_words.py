"""Captions say what the data set knows, in many words, and the same words for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffva_ray.config.captions import CaptionConfig
from diffva_ray.config.recipe import DataConfig, RecipeError, load_recipe
from diffva_ray.data.captions import Captions
from diffva_ray.data.dataset import Dataset, LabelledImage
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.encoding import encode_grey, encode_mask
from diffva_ray.data.factor_phantoms import factor_set
from diffva_ray.data.lexicon import SYNONYMS, in_words
from diffva_ray.data.mirroring import with_mirror_images
from diffva_ray.data.places import SEVERITIES, SIDES, SIZES, ZONES, place_of
from diffva_ray.data.reports import conclusion
from diffva_ray.data.shapes import Box
from diffva_ray.storage.local import LocalStore

PLAIN = {"dropout": 0, "bare": 0, "unnamed": 0, "shuffle": False, "synonyms": 0}
FULL = "{count} {severity} {size} {finding} {place} {other}, {age} {sex}, {view}"
TABLE = {"age": "63", "sex": "F", "view": "AP", "side": "left", "zone": "upper", "size": "large", "severity": "mild"}
MASS = LabelledImage("a.png", "Mass", columns=TABLE)


def captions(tmp_path: Path, *images: LabelledImage, shapes: dict | None = None, **settings: object) -> Captions:
    config = CaptionConfig(**{**PLAIN, "templates": (FULL,), **settings})
    return Captions(config, DataConfig(captions=config), LocalStore(str(tmp_path)), images, shapes or {})


def test_a_caption_says_everything_that_the_table_knows(tmp_path: Path) -> None:
    made = captions(tmp_path, MASS)
    assert made.caption(MASS, 0) == "mild large Mass in the left upper zone, 63 year old woman, AP"


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    for columns, expected in {
        (("sex", "M"),): "Mass, man",
        (("age", "unknown"), ("view", "LATERAL")): "Mass, lateral",
        (("side", "right"),): "Mass on the right",
        (("zone", "lower"),): "Mass in the lower zone",
        (("size", "20480"), ("severity", "NaN"), ("zone", "EU")): "Mass",  # columns of other meanings
        (("count", "3"), ("size", "Small")): "3 areas of small Mass",
        (): "Mass",
    }.items():
        image = LabelledImage("a.png", "Mass", columns=dict(columns))
        assert captions(tmp_path, image).caption(image, 0) == expected


def test_several_findings_are_named_together(tmp_path: Path) -> None:
    second = {**TABLE, "second": "Cardiomegaly", "second_severity": "severe"}
    image = LabelledImage("a.png", "Mass", columns=second)
    made = captions(tmp_path, image, numbers="words")
    expected = "mild large Mass in the left upper zone and severe Cardiomegaly, sixty three year old woman, AP"
    assert made.caption(image, 0) == expected
    assert captions(tmp_path, image, findings=1).caption(image, 0).startswith("mild large Mass in the left upper zone,")
    # two labels of one image are two findings
    two = [LabelledImage("b.png", label) for label in ("Edema", "Effusion")]
    assert captions(tmp_path, *two).caption(two[1], 0) == "Effusion and Edema"


def test_dropout_bare_and_unnamed(tmp_path: Path) -> None:
    assert captions(tmp_path, MASS, bare=1).caption(MASS, 0) == "Mass"
    assert captions(tmp_path, MASS, dropout=1).caption(MASS, 0) == "Mass"
    unnamed = captions(tmp_path, MASS, unnamed=1).caption(MASS, 0)
    assert unnamed == "mild large finding in the left upper zone, 63 year old woman, AP"
    normal = LabelledImage("n.png", "Normal", columns=TABLE)
    assert captions(tmp_path, normal, unnamed=1).caption(normal, 0).startswith("Normal chest scan,")
    half = captions(tmp_path, MASS, dropout=0.5)
    said = [half.caption(MASS, step) for step in range(400)]
    for word in ("mild", "large", "left", "upper", "63", "woman", "AP"):
        assert 0.4 < np.mean([word in text for text in said]) < 0.6, word


def test_a_caption_is_a_function_of_seed_and_image(tmp_path: Path) -> None:
    changing = {"dropout": 0.3, "shuffle": True, "synonyms": 0.5}
    made = captions(tmp_path, MASS, **changing)
    first = [made.caption(MASS, 7, "joint", step) for step in range(50)]
    assert first == [captions(tmp_path, MASS, **changing).caption(MASS, 7, "joint", step) for step in range(50)]
    assert len(set(first)) > 30
    assert first != [made.caption(MASS, 8, "joint", step) for step in range(50)]


def test_a_synonym_says_the_same() -> None:
    """No synonym names another side, zone, size or degree, and none of another line."""
    words = {*SIDES, *ZONES, *SIZES, *SEVERITIES}
    for term, others in SYNONYMS.items():
        for other in others:
            assert other != term
            if term != "bilateral":
                assert not words & set(other.split()), (term, other)


def test_numbers_in_words() -> None:
    assert [in_words(n) for n in (0, 13, 40, 63, 100, 105)] == [
        "zero", "thirteen", "forty", "sixty three", "one hundred", "one hundred five",
    ]  # fmt: skip


def mask(rows: slice, columns: slice) -> np.ndarray:
    made = np.zeros((100, 100), bool)
    made[rows, columns] = True
    return made


def test_a_place_is_the_patients() -> None:
    lungs = mask(slice(20, 80), slice(10, 40)) | mask(slice(20, 80), slice(60, 90))
    left = place_of(mask(slice(22, 32), slice(65, 75)), lungs)  # the image's right is the patient's left
    assert (left.side, left.zone, left.size, left.count) == ("left", "upper", "small", 1)
    right = place_of(mask(slice(62, 80), slice(10, 35)), lungs)
    assert (right.side, right.zone, right.size) == ("right", "lower", "medium")
    both = place_of(mask(slice(30, 70), slice(10, 40)) | mask(slice(30, 70), slice(60, 90)), lungs)
    assert (both.side, both.zone, both.size, both.count) == ("bilateral", "", "large", 2)
    assert place_of(mask(slice(0), slice(0)), lungs) is None
    assert place_of(mask(slice(40, 50), slice(60, 70))).side == "left"  # without a lung mask


def test_masks_and_boxes_say_where_a_lesion_is(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    grey = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    store.put("a.png", encode_grey(grey))
    store.put("mask.png", encode_mask(mask(slice(45, 55), slice(65, 75))))
    masked = LabelledImage("a.png", "Mass", lesion_mask="mask.png")
    assert captions(tmp_path, masked).caption(masked, 0) == "small Mass in the left middle zone"
    boxed = LabelledImage("a.png", "Lung_Opacity")
    boxes = {"a.png": [Box(x=5, y=55, w=20, h=15), Box(x=20, y=60, w=10, h=15, label="Lung_Opacity")]}
    for settings, number in (({}, "2"), ({"numbers": "words"}, "two")):
        made = captions(tmp_path, boxed, shapes=boxes, **settings)
        assert made.caption(boxed, 0) == f"{number} areas of medium Lung Opacity in the right lower zone"
    # neither the heart nor a lateral view has a side
    for image in (LabelledImage("a.png", "Cardiomegaly"), LabelledImage("a.png", "Mass", columns={"view": "LATERAL"})):
        said = captions(tmp_path, image, shapes={"a.png": [Box(x=5, y=55, w=20, h=15)]}).caption(image, 0)
        assert "right" not in said


@pytest.mark.parametrize("numbers", ["digits", "words"])
def test_no_caption_is_longer_than_the_longest(tmp_path: Path, numbers: str) -> None:
    list(factor_set(LocalStore(str(tmp_path)), 24, 32, seed=3, classes=("Normal", "Lung_Opacity", "Mass", "COVID")))
    config = CaptionConfig(numbers=numbers, bare=0, dropout=0.1, synonyms=0.7)
    for name in ("factors.csv", ""):
        data = open_dataset(tmp_path / name)
        made = Captions(config, DataConfig(captions=config), data.store, data.images, data.shapes)
        limit = len(made.longest(len))
        assert max(len(made.caption(image, step)) for image in data for step in range(20)) <= limit < 300


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{finding} {colour}", "data.captions.templates: no such name: {colour}; there are finding,"),
        ("{age} only", "data.captions.templates: '{age} only' lacks {finding}"),
    ],
)
def test_a_wrong_template_is_refused_in_one_line(template: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("phantom", [f"data.captions.templates=['{template}']"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PORTABLE AP)

 INDICATION:  ___ year old woman with fever

 FINDINGS:

 The heart is enlarged.  There is a left lower lobe opacity.

 IMPRESSION:

 1. Left lower lobe pneumonia, new
 since ___.
 2.  No pleural effusion.
"""


def test_a_report_is_told_as_far_as_it_fits(tmp_path: Path) -> None:
    (tmp_path / "s1.txt").write_text(REPORT)
    templates = ("{finding}, {report}, {view}",)
    for told in (REPORT, "s1.txt"):
        image = LabelledImage("a.png", "Mass", columns={"report": told, "view": "AP"})
        made = captions(tmp_path, image, templates=templates)
        expected = "Mass, Left lower lobe pneumonia, new since. No pleural effusion, AP"
        assert made.caption(image, 0) == expected
        config = made.config
        for longest, text in {
            len(expected) - 1: "Mass, Left lower lobe pneumonia, new since, AP",
            20: "Mass, AP",
            3: "Mass, AP",
        }.items():
            cut = Captions(
                config, made.data, made.store, [image], {}, lambda text, longest=longest: len(text) <= longest
            )
            assert cut.caption(image, 0) == text
    assert captions(tmp_path, image).caption(image, 0) == "Mass, AP"  # the template does not ask for it
    assert made.longest(len) == "Mass, AP"
    dropped = captions(tmp_path, image, templates=templates, dropout=0.5)
    assert {"pneumonia" in dropped.caption(image, n) for n in range(20)} == {True, False}


def test_an_absent_report_is_named_once_and_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = LabelledImage("a.png", "Mass", columns={"report": "s2.txt"})
    made = captions(tmp_path, image, templates=("{finding}, {report}",))
    assert [made.caption(image, n) for n in range(2)] == ["Mass", "Mass"]
    assert [record.getMessage() for record in caplog.records] == [
        "report s2.txt of a.png: no such file; its captions do without"
    ]


def test_a_mirror_image_shows_the_other_side(tmp_path: Path) -> None:
    """Of what the table, its caption, a report and a lesion mask say."""
    lesion = np.zeros((64, 64), np.bool_)
    lesion[20:30, 40:50] = True  # the patient's left
    (tmp_path / "lesion.png").write_bytes(encode_mask(lesion))
    (tmp_path / "s.txt").write_text("IMPRESSION: RUL mass. Left effusion.")
    dataset = Dataset(
        LocalStore(str(tmp_path)),
        [
            LabelledImage("a.png", "Mass", columns={"side": "left", "second": "Edema", "second_side": "right"}),
            LabelledImage("b.png", "Mass", lesion_mask="lesion.png", columns={"report": "s.txt"}),
            LabelledImage("c.png", "Mass", caption="Mass on the LEFT", columns={"report": "no Right-sided effusion"}),
        ],
        "test",
    )
    both = with_mirror_images(dataset)
    assert [(image.path, image.mirrored) for image in both.images[3:]] == [(f"{name}.png", True) for name in "abc"]
    made = captions(tmp_path, *both.images, templates=("{finding} {place} {other}, {report}",))
    assert [made.caption(image, 0) for image in both.images] == [
        "Mass on the left and Edema on the right", "Mass in the left middle zone, RUL mass. Left effusion",
        "Mass, no Right-sided effusion", "Mass on the right and Edema on the left",
        "Mass in the right middle zone, LUL mass. Right effusion", "Mass, no Left-sided effusion",
    ]  # fmt: skip
    assert both.images[5].caption == "Mass on the RIGHT"
    assert [side for image in both.images[:1] + both.images[3:4] for _, side in made.findings(image)] == [
        "left", "right", "right", "left",
    ]  # fmt: skip


def test_the_conclusion_of_a_report() -> None:
    assert conclusion("Normal chest. No change!") == ["Normal chest", "No change"]
    assert conclusion("FINDINGS: Heart 1.5 cm larger.\nOTHER: none") == ["Heart 1.5 cm larger"]
    assert conclusion("IMPRESSION:\n\nFINDINGS: Clear.") == ["Clear"]  # an empty section says nothing
    assert conclusion("") == conclusion(" ___ ") == []
