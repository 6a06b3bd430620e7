"""DICOM objects of a record: images as secondary captures, the attribution map as a parametric map, its regions as a
segmentation. Built with highdicom; dates and UIDs depend on the run alone."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import highdicom as hd
import numpy as np
from highdicom.pm import ParametricMap, RealWorldValueMapping
from highdicom.sc import SCImage
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from diffva_ray._version import __version__
from diffva_ray.data.images import decode_grey
from diffva_ray.export.contents import Contents
from diffva_ray.export.dicom_study import Study, run_moment, uid
from diffva_ray.export.examples import Example
from diffva_ray.export.regions import above

SERIES = {  # number and description of the series, by kind of object
    "image": (9001, "Input image at the model's resolution"),
    "counterfactual": (9002, "SYNTHETIC counterfactual"),
    "attribution": (9003, "SYNTHETIC signed attribution map"),
    "segmentation": (9004, "SYNTHETIC attribution above a threshold"),
}
BANNER = "SYNTHETIC"
SCHEME = "99DIFFVA"  # private codes, where SNOMED CT has none
ATTRIBUTION = hd.sr.CodedConcept("attribution", SCHEME, "Attribution of a generative model")
ABOVE = hd.sr.CodedConcept("above-threshold", SCHEME, "Attribution above a threshold")


@dataclass(frozen=True)
class Objects:
    """The DICOM objects of one example."""

    contents: Contents
    example: Example

    @property
    def study(self) -> Study:
        return Study(self.example.record, self.example.header, self.contents.patients, self.contents.size)

    def files(self) -> dict[str, bytes]:
        """The objects as files, by kind."""
        objects: dict[str, Any] = {}
        if self.example.image is not None:
            objects["image"] = self._capture("image", decode_grey(self.example.image))
        healthy = decode_grey(self.example.counterfactual)
        objects["counterfactual"] = self._capture(
            "counterfactual", with_banner(healthy) if self.contents.banner else healthy
        )
        # A map lies on the pixels of these images; highdicom takes patient, study and plane from the first of them.
        shown, *others = [self.study.with_plane(image) for image in objects.values()]
        objects["attribution"] = self._map(shown, others)
        objects["segmentation"] = self._segmentation(shown, others)
        return {kind: _encoded(instance) for kind, instance in objects.items()}

    def _common(self, kind: str) -> dict[str, Any]:
        """What the constructor of every object takes."""
        contents, number = self.contents, SERIES[kind][0]
        identity = (
            kind, contents.run.fingerprint, self.example.record["record_id"], self.example.record["image_sha256"],
            contents.threshold, contents.with_images, contents.patients, contents.banner, __version__,
        )  # fmt: skip
        return {
            "series_instance_uid": uid("series", *identity),
            "series_number": number,
            "sop_instance_uid": uid("instance", *identity),
            "instance_number": 1,
            "manufacturer": "diffva-ray",
            "manufacturer_model_name": "diffva-ray",
            "software_versions": __version__,
            "device_serial_number": contents.run.fingerprint,
            "series_description": SERIES[kind][1],
        }

    def _capture(self, kind: str, pixels: NDArray[np.uint8]) -> Any:
        study = self.study
        image = SCImage(
            pixels, "MONOCHROME2", 8, "PATIENT",
            study_instance_uid=study.instance_uid,
            patient_id=study.patient_id,
            pixel_spacing=study.spacing,
            patient_orientation=("L", "F"),  # replaced by what is known
            **self._common(kind),
        )  # fmt: skip
        synthetic = kind == "counterfactual"
        image.ImageType = ["DERIVED", "SECONDARY", "SYNTHETIC" if synthetic else "OTHER"]
        image.ConversionType = "WSD"
        study.describe(image)
        study.shape_pixels(image)
        if synthetic:
            image.DerivationDescription = (
                "Synthetic image, not acquired from a patient and not for clinical use: "
                f'{self.example.record["method"]}, prompt "{self.example.record["prompt"]}"'
            )
            if self.contents.banner:
                image.BurnedInAnnotation = "YES"
        else:
            image.DerivationDescription = f"Resampled to {self.contents.size} x {self.contents.size} pixels, 8 bits"
        phantoms = self.contents.run.about.get("data_kind") == "phantoms"
        return self._finished(image, kind, synthetic=synthetic or phantoms)

    def _map(self, shown: Dataset, others: list[Dataset]) -> Any:
        threshold = self._threshold()
        mapping = RealWorldValueMapping(
            "attribution", "Signed attribution in [-1, 1]", codes.UCUM.NoUnits, (-1.0, 1.0), slope=1.0, intercept=0.0,
            quantity_definition=ATTRIBUTION,
        )  # fmt: skip
        # One window for all maps of an export, so that they can be compared: four thresholds to each side of zero.
        window = hd.VOILUTTransformation(
            window_center=0.0, window_width=round(min(2.0, 8 * threshold), 6), voi_lut_function="LINEAR_EXACT"
        )
        made = ParametricMap(
            [shown], self.example.attribution,
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[window],
            content_label="ATTRIBUTION",
            content_description="Signed attribution map: image minus synthetic counterfactual",
            further_source_images=others,
            **self._common("attribution"),
        )  # fmt: skip
        return self._finished(made, "attribution")

    def _segmentation(self, shown: Dataset, others: list[Dataset]) -> Any:
        threshold = self._threshold()
        algorithm = hd.AlgorithmIdentificationSequence(
            f"diffva-ray {self.example.record['method']}",
            hd.sr.CodedConcept("diffusion", SCHEME, "Diffusion model"),
            __version__,
        )
        masks = [above(self.contents.run, self.example, threshold)]
        segments = [
            SegmentDescription(
                1,
                f"Attribution above {threshold:.4g}",
                codes.SCT.SpatialAndRelationalConcept,
                ABOVE,
                "AUTOMATIC",
                algorithm,
            )
        ]
        if self.example.truth.lesion is not None:
            masks.append(self.example.truth.lesion)
            segments.append(
                SegmentDescription(
                    2,
                    "Lesion as the data set knows it",
                    codes.SCT.MorphologicallyAbnormalStructure,
                    codes.SCT.Lesion,
                    "MANUAL",
                )
            )
        made = Segmentation(
            [shown], np.stack(masks, -1)[None].astype(np.uint8), "BINARY", segments,
            content_label="ATTRIBUTION",
            content_description=f"Regions of the attribution map above {threshold:.4g}",
            omit_empty_frames=False,
            further_source_images=others,
            **self._common("segmentation"),
        )  # fmt: skip
        return self._finished(made, "segmentation")

    def _threshold(self) -> float:
        assert self.contents.threshold is not None
        return self.contents.threshold

    def _finished(self, instance: Any, kind: str, synthetic: bool = True) -> Any:
        """Refer to the DICOM file of the image, and set what highdicom takes from the clock or at random."""
        self.study.refer_to_source(instance)
        self.study.describe_body_part(instance)
        date, time = run_moment(self.contents.run)
        for name in ("InstanceCreation", "Content", "Series"):
            setattr(instance, f"{name}Date", date)
            setattr(instance, f"{name}Time", time)
        if kind in ("image", "counterfactual"):
            instance.DateOfSecondaryCapture, instance.TimeOfSecondaryCapture = date, time
        for item in instance.get("ContributingEquipmentSequence", ()):
            item.ContributionDateTime = date + time
        organisation = uid("dimensions", instance.SOPInstanceUID)
        for item in (*instance.get("DimensionIndexSequence", ()), *instance.get("DimensionOrganizationSequence", ())):
            item.DimensionOrganizationUID = organisation
        if kind in ("attribution", "segmentation"):
            instance.ImageComments = self.study.plane_comment
        instance.SyntheticData = "YES" if synthetic else "NO"
        return instance


def with_banner(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image with BANNER burnt in along its upper edge, white on black."""
    image = Image.fromarray(pixels)
    height = max(8, image.height // 16)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(height - 1)
    draw.rectangle((0, 0, image.width, height), fill=0)
    draw.text((image.width / 2, height / 2), BANNER, fill=255, font=font, anchor="mm")
    return np.asarray(image)


def _encoded(instance: Dataset) -> bytes:
    buffer = BytesIO()
    instance.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
