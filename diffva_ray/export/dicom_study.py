"""What the DICOM objects of a record share: study, patient, geometry and the DICOM file that the image came from."""

from __future__ import annotations

import uuid
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pydicom.valuerep import DS

from diffva_ray.data.columns import is_lateral
from diffva_ray.generate.run import Run
from diffva_ray.schema import Record, digest

PATIENT = (  # elements that name or describe a patient; copied only when asked
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "PatientAge", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime", "ReferringPhysicianName", "SpecificCharacterSet",
)  # fmt: skip
REFERENCED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
CORONAL, SAGITTAL = [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]  # nominal planes of frontal and lateral X-rays
LEFT_OUT = "Patient data of headers left out; pixels not checked"


def uid(*parts: Any) -> UID:
    """The UID of ``parts``: below 2.25, from a name-based UUID (PS3.5, B.2), so equal exports have equal UIDs."""
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'diffva-ray {digest(parts)}').int}")


@dataclass(frozen=True)
class Study:
    """The study of an image: that of its DICOM file, otherwise a new one."""

    record: Record
    header: Any  # the image's DICOM file without its pixels; None for another file
    patients: bool  # copy the elements of PATIENT
    size: int  # side of the exported images

    @property
    def instance_uid(self) -> UID:
        known = self.header is not None and UID(str(self.header.get("StudyInstanceUID") or ""))
        return known if known and known.is_valid else uid("study", self.record["image_sha256"])

    @property
    def source(self) -> Any:
        """The header, if other instances can refer to it; else None."""
        if self.header is None:
            return None
        uids = [UID(str(self.header.get(name) or "")) for name in REFERENCED]
        usable = all(value.is_valid for value in uids) and "ImageStorage" in uids[2].keyword
        return self.header if usable else None

    @property
    def patient_id(self) -> str:
        """A pseudonym: the hash of the patient's id, or of the image where the patient is unknown."""
        return self.record["patient"] or f"image-{self.record['image_sha256'][:16]}"

    @property
    def spacing(self) -> tuple[float, float] | None:
        """Distance of rows and of columns in mm after the squash to a square; None: unknown."""
        try:
            values = [float(text) for text in (self.record["spacing"] or "").split("/")]
        except ValueError:
            return None
        if len(values) not in (1, 2) or min(values) <= 0:
            return None
        return values[0] * self.record["height"] / self.size, values[-1] * self.record["width"] / self.size

    def describe(self, instance: Any) -> None:
        """Add what is known about the patient to a secondary capture, from which other objects take it."""
        instance.PatientIdentityRemoved = "NO" if self.patients else "YES"
        if self.patients:
            for name in PATIENT if self.header is not None else ():
                if (value := self.header.get(name)) not in (None, ""):
                    setattr(instance, name, value)
        else:
            instance.DeidentificationMethod = LEFT_OUT
        instance.PatientOrientation = None if self.header is None else self.header.get("PatientOrientation")
        if self.header is not None and self.header.get("BurnedInAnnotation") in ("YES", "NO"):
            instance.BurnedInAnnotation = self.header.BurnedInAnnotation

    def shape_pixels(self, instance: Any) -> None:
        """Say the aspect of the pixels where no spacing does."""
        height, width = self.record["height"], self.record["width"]
        if self.spacing is None and height != width:
            instance.PixelAspectRatio = [height, width]  # rows are this much further apart than columns

    def with_plane(self, image: Any) -> Any:
        """A copy of an image with the plane that parametric maps must have: a projection has none, so it is nominal, in
        the frame of reference of the DICOM file or a new one."""
        placed = deepcopy(image)
        known = self.header is not None and UID(str(self.header.get("FrameOfReferenceUID") or ""))
        placed.FrameOfReferenceUID = known if known and known.is_valid else uid("frame", self.record["image_sha256"])
        placed.PositionReferenceIndicator = None
        placed.ImagePositionPatient = [0, 0, 0]
        placed.ImageOrientationPatient = SAGITTAL if is_lateral(self.record["view"]) else CORONAL
        nominal = self.record["height"] / self.size, self.record["width"] / self.size
        placed.PixelSpacing = [DS(value, auto_format=True) for value in self.spacing or nominal]
        placed.SliceThickness = 1
        return placed

    def describe_body_part(self, instance: Any) -> None:
        """Say what the image shows. The laterality is that of the image: a chest is no paired part of the body."""
        instance.BodyPartExamined = "CHEST"
        if (side := self.record["laterality"].upper()) in ("R", "L"):
            instance.ImageLaterality = side

    def refer_to_source(self, instance: Any) -> None:
        """Name the DICOM file of the image as a source of an object."""
        if self.source is None:
            return
        reference, series = Dataset(), Dataset()
        reference.ReferencedSOPClassUID = self.source.SOPClassUID
        reference.ReferencedSOPInstanceUID = self.source.SOPInstanceUID
        instance.SourceImageSequence = [*instance.get("SourceImageSequence", ()), reference]
        series.SeriesInstanceUID = self.source.SeriesInstanceUID
        series.ReferencedInstanceSequence = [reference]
        instance.ReferencedSeriesSequence = [*instance.get("ReferencedSeriesSequence", ()), series]

    @property
    def plane_comment(self) -> str:
        spacing = "" if self.spacing else " Pixel spacing is unknown: 1 mm stands for a pixel of the source image."
        return f"Projection: position, orientation and thickness of the plane are nominal.{spacing}"


def run_moment(run: Run) -> tuple[str, str]:
    """Date and time of the run, as DICOM writes them: objects of the same run have the same ones."""
    date, _, time = str(run.about["started"]).partition("T")
    return date.replace("-", ""), time[:8].replace(":", "")
