"""What Siddiqui et al. 2024 (Scientific Reports 15:962, doi 10.1038/s41598-024-81646-x) print in their tables.

FID unless said otherwise; the paper gives neither N nor an interval for tables 1-3, and not which of its two settings
made them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ByClass:
    """One class of tables 1-3."""

    counterfactuals: float  # table 1: images of the class against their healthy counterfactuals
    healthy: float  # table 1: images of the class against real healthy images
    difference: float  # table 1: printed as "relative absolute difference", which is |counterfactuals - healthy|
    quality: float  # table 2: real healthy images against the healthy counterfactuals
    ms_ssim: float  # table 3
    ssim: float


CLASSES = {
    "Lung_Opacity": ByClass(27.8, 46.9, 19.1, 60.60, 0.813, 0.780),
    "Viral Pneumonia": ByClass(37.63, 97.6, 59.97, 110.72, 0.802, 0.768),
    "COVID": ByClass(32.2, 38.2, 6.0, 45.11, 0.830, 0.798),
}
CARDIOMEGALY_REAL, CARDIOMEGALY_HEALTHY = 52.08, 17.71  # table 4
CARDIOMEGALY_IMAGES = 8060  # real ones, of CheXpert-small
NO_TEXT, NO_IMAGE_PRIOR, NEITHER = 91.57, 113.14, 113.71  # table 5
ABLATION_IMAGES = 4000
