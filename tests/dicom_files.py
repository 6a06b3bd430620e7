"""DICOM files made for tests."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

STUDY = {  # headers of a study, with patient data
    "PatientID": "P-17",
    "PatientName": "Doe^Jane",
    "PatientBirthDate": "19600102",
    "PatientSex": "F",
    "PatientAge": "064Y",
    "AccessionNumber": "A1",
    "StudyID": "S1",
    "StudyDate": "20240102",
    "StudyTime": "101112",
    "ReferringPhysicianName": "Roe^R",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.1",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.2",
    "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.3",
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1",
    "ViewPosition": "PA",
    "ImageLaterality": "R",
    "PatientOrientation": ["L", "F"],
    "ImagerPixelSpacing": [0.2, 0.2],
}


def dicom(pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **values: Any) -> bytes:
    """A DICOM file of 16 bits; signed where the pixels are. ``syntax``: transfer syntax of the pixels in ``values``."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = syntax
    image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    image.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    image.Rows, image.Columns = pixels.shape
    image.BitsAllocated, image.BitsStored, image.HighBit, image.SamplesPerPixel = 16, 16, 15, 1
    image.PixelRepresentation = int(pixels.min() < 0)
    image.PhotometricInterpretation = "MONOCHROME2"
    image.PixelData = pixels.astype("<i2" if image.PixelRepresentation else "<u2").tobytes()
    for name, value in values.items():
        setattr(image, name, value)
    buffer = BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
