"""Small replicas of public data sets, with the header lines and folder names of their hosts.

The header lines are those of the files that the readers name in their docstrings; the tables of torchxrayvision
(``torchxrayvision/data``) were compared for ChestX-ray14, CheXpert, PadChest, RSNA, SIIM-ACR and VinBigData.
"""

from __future__ import annotations

import gzip
import json
import tarfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dicom_files import dicom
from PIL import Image

from diffva_ray.data.phantoms import phantom

CHEXPERT = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
SIIM_MASK = "100 2 1022 2"  # two rows of two pixels: x = 0 and 1, y = 100 and 101
COCO = "ZVP12N2"  # 4 x 3 (height x width)


@lru_cache(maxsize=64)
def pixels(seed: int, label: str = "COVID") -> np.ndarray:
    """A phantom of 64 x 64 as 8-bit values."""
    return np.round(phantom(label, seed, 1, 64).image * 255).astype(np.uint8)


def image(root: Path, *paths: str) -> None:
    """A phantom at each path, in the format of its ending; DICOM for ``.dcm``, ``.dicom`` and no ending."""
    for seed, path in enumerate(paths):
        values = pixels(seed)
        if path.endswith((".png", ".jpg", ".jpeg")):
            buffer = BytesIO()
            Image.fromarray(values).save(buffer, "PNG" if path.endswith("png") else "JPEG", quality=95)
            data = buffer.getvalue()
        else:
            header = {"PatientID": f"P{seed}", "ViewPosition": "PA", "PatientSex": "F", "PatientAge": "061Y"}
            data = dicom(values.astype(np.int64) * 16, PixelSpacing=[0.2, 0.1], **header)
        write(root, path, data)


def write(root: Path, path: str, data: bytes | str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode() if isinstance(data, str) else data
    file.write_bytes(gzip.compress(data) if path.endswith(".gz") else data)


NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,{sex},View Position,OriginalImage[Width,Height],"
    "OriginalImagePixelSpacing[x,y]{end}\n"
)
NIH_ROWS = (
    "00000001_000.png,Cardiomegaly|Effusion,0,1,058Y,M,PA,2682,2749,0.143,0.143{end}\n"
    "00000002_000.png,No Finding,0,2,81,F,AP,2500,2048,0.168,0.171{end}\n"
    "00000002_001.png,Infiltration,1,2,82,F,PA,2500,2048,0.168,0.171{end}\n"
    "00000003_000.png,Hernia,0,3,74,F,PA,2500,2048,0.168,0.171{end}\n"
)
NIH_BOXES = (
    "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
    "00000001_000.png,Cardiomegaly,225.08,547.02,86.78,79.19,,,\n"
    "00000002_001.png,Infiltrate,512,256,128,64\n"
)


def nih_kaggle(root: Path) -> None:
    write(root, "Data_Entry_2017.csv", NIH_HEADER.format(sex="Patient Gender", end=",") + NIH_ROWS.format(end=","))
    write(root, "BBox_List_2017.csv", NIH_BOXES)
    write(root, "train_val_list.txt", "00000001_000.png\n00000002_000.png\n00000002_001.png")
    write(root, "test_list.txt", "00000003_000.png\n")
    write(root, "ARXIV_V5_CHESTXRAY.pdf", "%PDF")
    names = ("00000001_000", "00000002_000", "00000002_001")
    image(root, *(f"images_00{n + 1}/images/{name}.png" for n, name in enumerate(names)))


def nih_box(root: Path) -> None:
    write(root, "Data_Entry_2017_v2020.csv", NIH_HEADER.format(sex="Patient Sex", end="") + NIH_ROWS.format(end=""))
    write(root, "BBox_List_2017.csv", NIH_BOXES)
    image(root, *(f"images/{name}.png" for name in ("00000001_000", "00000002_000", "00000002_001", "00000003_000")))


def rsna(root: Path) -> None:
    ids = ("0004cfab-14fd-4e49-80ba-63a80b6bddd6", "00436515-870c-4b36-a041-de91049b9ab4", "healthy-0", "unlabelled")
    write(root, "stage_2_train_labels.csv",
          f"patientId,x,y,width,height,Target\n{ids[0]},,,,,0\n{ids[1]},264.0,152.0,213.0,379.0,1\n"
          f"{ids[1]},562.0,152.0,256.0,453.0,1\n{ids[2]},,,,,0\n")  # fmt: skip
    write(root, "stage_2_detailed_class_info.csv",
          f"patientId,class\n{ids[0]},No Lung Opacity / Not Normal\n{ids[1]},Lung Opacity\n{ids[1]},Lung Opacity\n"
          f"{ids[2]},Normal\n")  # fmt: skip
    image(root, *(f"stage_2_train_images/{name}.dcm" for name in ids[:3]), f"stage_2_test_images/{ids[3]}.dcm")


def chexpert(root: Path, top: str = "CheXpert-v1.0-small/", folders: tuple[str, str] = ("train/", "valid/")) -> None:
    header = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{CHEXPERT}\n"
    train, valid = f"{top}train/", f"{top}valid/"
    write(root, "train.csv", header
          + f"{train}patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0" + "," * 13 + "\n"
          + f"{train}patient00001/study1/view2_lateral.jpg,Female,68,Lateral,,1.0" + "," * 13 + "\n"
          + f"{train}patient00002/study2/view1_frontal.jpg,Male,87,Frontal,PA,,,-1.0,1.0,,-1.0,,,,,,,1.0,\n"
          )  # fmt: skip
    write(
        root,
        "valid.csv",
        header
        + f"{valid}patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,0.0,1.0,1.0,1.0,0,0,0,0,0,0,0,0,0,0\n",
    )
    image(
        root,
        *(f"{folders[0]}patient0000{n}/study{n}/view1_frontal.jpg" for n in (1, 2)),
        f"{folders[0]}patient00001/study1/view2_lateral.jpg",
        f"{folders[1]}patient64541/study1/view1_frontal.jpg",
    )


def chexpert_small(root: Path) -> None:
    chexpert(root / "CheXpert-v1.0-small")


def chexpert_batches(root: Path) -> None:
    batch = root / "CheXpert-v1.0 batch 1 (validate & csv)"
    chexpert(batch, "CheXpert-v1.0/", ("../CheXpert-v1.0 batch 2 (train 1)/", "valid/"))
    write(root, "train_cheXbert.csv", (batch / "train.csv").read_bytes())


def radiography(root: Path) -> None:
    top = "COVID-19_Radiography_Dataset"
    write(root, f"{top}/COVID.metadata.xlsx", "PK")
    write(root, f"{top}/README.md.txt", "COVID-19 CHEST X-RAY DATABASE")
    for name in ("COVID/{}/COVID-1.png", "Lung_Opacity/{}/Lung_Opacity-1.png", "Normal/{}/Normal-1.png",
                 "Viral Pneumonia/{}/Viral Pneumonia-1.png"):  # fmt: skip
        image(root, *(f"{top}/{name.format(folder)}" for folder in ("images", "masks")))


def kermany(root: Path) -> None:
    image(root, "chest_xray/train/NORMAL/IM-0115-0001.jpeg", "chest_xray/train/NORMAL/NORMAL2-IM-0383-0001.jpeg",
          "chest_xray/train/PNEUMONIA/person1_bacteria_1.jpeg", "chest_xray/train/PNEUMONIA/person1_bacteria_2.jpeg",
          "chest_xray/val/PNEUMONIA/person1946_bacteria_4874.jpeg", "chest_xray/test/NORMAL/IM-0001-0001.jpeg",
          "chest_xray/test/PNEUMONIA/person1_virus_6.jpeg")  # fmt: skip
    image(root, "chest_xray/chest_xray/train/NORMAL/IM-0115-0001.jpeg")  # Kaggle's archive holds the set twice
    write(root, "chest_xray/__MACOSX/train/NORMAL/._IM-0115-0001.jpeg", "x")


VINDR = "50a418190bc3fb1ef1633bf9678929b3", "21a10246a5ec7af151081d0cd6d65dc9", "9a5094b2563a1ef3ff50dc5c7ff71345"
VINDR_ROWS = (
    (VINDR[0], "No finding", 14, "R11", "", "", "", ""),
    (VINDR[0], "No finding", 14, "R15", "", "", "", ""),
    (VINDR[0], "No finding", 14, "R2", "", "", "", ""),
    (VINDR[1], "Cardiomegaly", 3, "R10", 691, 1375, 1653, 1831),
    (VINDR[1], "Cardiomegaly", 3, "R8", 700, 1380, 1600, 1800),
    (VINDR[1], "Nodule/Mass", 8, "R10", 1264, 743, 1611, 1019),  # one reader of three
    (VINDR[1], "No finding", 14, "R9", "", "", "", ""),
)


def vindr_physionet(root: Path) -> None:
    """With boxes in the replica's 64 pixels, as the host's are in pixels of the DICOM files."""
    header = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n"
    rows = "".join(
        f"{i},{rad},{name},{','.join(str(edge / 50) if edge else '' for edge in box)}\n"
        for i, name, _, rad, *box in VINDR_ROWS
    )
    write(root, "annotations/annotations_train.csv", header + rows)
    write(
        root,
        "annotations/annotations_test.csv",
        f"image_id,class_name,x_min,y_min,x_max,y_max\n{VINDR[2]},Pleural effusion,18.5,11.5,24,18\n",
    )
    readers = ((0, "R11"), (0, "R15"), (0, "R2"), (1, "R10"), (1, "R8"), (1, "R9"))
    diagnoses = "".join(f"{VINDR[n]},{reader},0,{int(reader in ('R8', 'R9'))},{1 - n}\n" for n, reader in readers)
    write(root, "annotations/image_labels_train.csv",
          f"image_id,rad_id,Aortic enlargement,Tuberculosis,No finding\n{diagnoses}")  # fmt: skip
    write(root, "annotations/image_labels_test.csv",
          f"image_id,Aortic enlargement,Other disease,No finding\n{VINDR[2]},0,1,0\n")  # fmt: skip
    image(root, f"train/{VINDR[0]}.dicom", f"train/{VINDR[1]}.dicom", f"test/{VINDR[2]}.dicom")


def vindr_png(root: Path) -> None:
    header = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n"
    write(root, "train.csv", header + "".join(",".join(map(str, row)) + "\n" for row in VINDR_ROWS))
    write(root, "train_meta.csv", f"image_id,dim0,dim1\n{VINDR[0]},2580,2332\n{VINDR[1]},3072,2540\n")
    image(root, *(f"train/{name}.png" for name in VINDR[:2]))


MIMIC = "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014", "174413ec-4ec4c1f7-34ea26b7-c5f994f8-79ef1962"


def mimic(root: Path) -> None:
    observations = ",".join(sorted(CHEXPERT.split(",")))  # MIMIC's order: alphabetical
    values = {"Lung Opacity": "1.0", "Edema": "-1.0"}
    row = ",".join(values.get(name, "") for name in observations.split(","))
    write(
        root,
        "mimic-cxr-2.0.0-metadata.csv.gz",
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
        "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning\n"
        f"{MIMIC[0]},10000032,50414267,CHEST (PA AND LAT),PA,3056,2544,21800506,213014.531,,postero-anterior,Erect\n"
        f"{MIMIC[1]},10000032,50414267,CHEST (PA AND LAT),LATERAL,3056,2544,21800506,213014.531,,lateral,Erect\n",
    )
    write(root, "mimic-cxr-2.0.0-chexpert.csv.gz", f"subject_id,study_id,{observations}\n10000032,50414267,{row}\n")
    write(
        root,
        "mimic-cxr-2.0.0-split.csv.gz",
        f"dicom_id,study_id,subject_id,split\n{MIMIC[0]},50414267,10000032,train\n{MIMIC[1]},50414267,10000032,train\n",
    )
    write(root, "ms-cxr/MS_CXR_Local_Alignment_v1.0.0.csv",
          "category_name,label_text,path,x,y,w,h,image_width,image_height,dicom_id\nPneumonia,Bibasilar opacities,"
          f"files/p10/p10000032/s50414267/{MIMIC[0]}.jpg,196,1136,532,315,2544,3056,{MIMIC[0]}\n")  # fmt: skip
    image(root, *(f"files/p10/p10000032/s50414267/{name}.jpg" for name in MIMIC))


SIIM = (
    "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819",
    "1.2.276.0.7230010.3.1.4.8323329.13666.1517875247.117800",
)


def siim(root: Path) -> None:
    write(root, "train-rle.csv", f"ImageId, EncodedPixels\n{SIIM[0]},-1\n{SIIM[1]},{SIIM_MASK}\n{SIIM[1]},1024 1\n")
    above = "1.2.276.0.7230010.3.1.2.8323329/1.2.276.0.7230010.3.1.3.8323329"
    image(root, *(f"dicom-images-train/{above}/{name}.dcm" for name in SIIM), f"dicom-images-test/{above}/1.2.3.dcm")


def chexlocalize(root: Path) -> None:
    write(root, "CheXpert/val_labels.csv", f"Path,{CHEXPERT}\n"
          "val/patient64541/study1/view1_frontal.jpg,0.0,1.0,1.0,1.0,0,0,0,0,0,0,0,0,0,0\n"
          "val/patient64542/study1/view1_frontal.jpg,1.0,0.0,0.0,0.0,0,0,0,0,0,0,0,0,0,0\n")  # fmt: skip
    image(root, *(f"CheXpert/val/patient6454{n}/study1/view1_frontal.jpg" for n in (1, 2)))
    write(root, "CheXlocalize/gt_segmentations_val.json", json.dumps({
        "patient64541_study1_view1_frontal": {
            "Airspace Opacity": {"size": [2320, 2828], "counts": "PVWX6"},  # an empty mask
            "Cardiomegaly": {"size": [4, 3], "counts": "13410"},
        },
    }))  # fmt: skip


PADCHEST_TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
PADCHEST = "20536686640136348236148679891455886468_k6ga29.png", "135803415504923515076821959678074435083_fzis7d.png"


def padchest(root: Path) -> None:
    header = (
        ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
        "MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,"
        "PixelRepresentation_DICOM,PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,"
        "WindowWidth_DICOM,Rows_DICOM,Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,"
        "ExposureTime,RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,"
        "LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS\n"
    )
    middle = "Manual review of DICOM fields,No,CR,ImagingDynamicsCompanyLtd,MONOCHROME2,0,None,None,12" + ",1" * 10
    write(root, PADCHEST_TABLE, header
          + f"0,{PADCHEST[0]},0,20140915,2053,8398,1930.0,F,POSTEROANTERIOR,PA,{middle}, sin hallazg .,Physician,"
            "\"['pulmonary fibrosis', 'unchanged', ' kyphosis']\",[],[],[],[]\n"
          + f"1,{PADCHEST[1]},0,20150914,1358,3135,1929.0,M,LATERAL,L,{middle}, cambi .,RNN_model,['normal'],"
            "[],[],[],[]\n")  # fmt: skip
    image(root, *(f"0/{name}" for name in PADCHEST))


def chestxdet(root: Path) -> None:
    triangle = [[10, 10], [50, 10], [10, 50]]
    write(root, "ChestX_Det_train.json", json.dumps([
        {"file_name": "36199.png", "syms": ["Effusion", "Effusion"], "boxes": [[10, 10, 50, 50], [1, 1, 9, 9]],
         "polygons": [triangle, [[1, 1], [9, 1], [9, 9]]]},
        {"file_name": "36200.png", "syms": [], "boxes": [], "polygons": []},
    ]))  # fmt: skip
    write(root, "ChestX_Det_test.json", json.dumps([
        {"file_name": "36204.png", "syms": ["Fracture"], "boxes": [[1, 2, 3, 4]], "polygons": [triangle]}
    ]))  # fmt: skip
    image(root, "train/36199.png", "train/36200.png", "test/36204.png")


def encoded(seed: int, kind: str = "PNG") -> bytes:
    out = BytesIO()
    Image.fromarray(pixels(seed)).save(out, kind)
    return out.getvalue()


def lesion() -> bytes:
    """A mask of a lesion of 20 x 20 pixels."""
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 10:30] = 255
    out = BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    return out.getvalue()


NAMES = ["NORMAL", "COVID 19"]


def parquet(path: Path, count: int = 4, first: int = 0, **more: list[Any]) -> None:
    """A Parquet file as ``datasets`` writes it: images, ClassLabels, a row group of two images."""
    images = [
        {"bytes": encoded(first + n, "JPEG" if n % 2 else "PNG"), "path": f"{first + n}.png"} for n in range(count)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, kind), "label": pa.array([n % 2 for n in range(count)]),
               "patient_id": [f"P{(first + n) // 2}" for n in range(count)], **more}  # fmt: skip
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=2)


def huggingface_parquet(root: Path) -> None:
    write(root, "README.md", "---\n")
    mask = {"bytes": lesion(), "path": None}
    parquet(root / "data" / "train-00000-of-00001.parquet", lesion=[None, mask, None, mask])
    parquet(root / "data" / "test-00000-of-00001.parquet", 2, 4, lesion=[None, mask])


def tar(path: Path, files: dict[str, bytes | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))


def webdataset(root: Path) -> None:
    for shard, split in enumerate(("train", "test")):
        files: dict[str, bytes | str] = {}
        for n in range(2):
            key = f"{shard}{n}"
            files[f"{key}.png"] = encoded(2 * shard + n)
            files[f"{key}.json"] = json.dumps({"finding": NAMES[n], "patient_id": f"P{shard}", "path": "gone/x.png"})
            files |= {f"{key}.lesion.png": lesion()} if n else {}
        tar(root / f"{split}-{shard:03d}.tar", files)


def imagefolder(root: Path) -> None:
    image(root, "train/Normal/a.png", "train/Edema/b.png", "val/Edema/c.png", "test/Normal/d.png", "test/Edema/e.png")
    write(root, "boxes.csv", "file,x,y,w,h\ntrain/Edema/b.png,10,20,20,20\ntest/Edema/e.png,10,20,20,20\n")


def huggingface(root: Path) -> None:
    write(root, "train/metadata.jsonl",
          '{"file_name": "a.png", "label": "COVID", "text": "a scan", "age": 61}\n'
          '{"file_name": "deep/b.png", "label": ["Edema", "Mass"], "age": null}\n')  # fmt: skip
    write(root, "test/metadata.csv", "file_name,label\nc.png,Normal\n")
    image(root, "train/a.png", "train/deep/b.png", "test/c.png")
