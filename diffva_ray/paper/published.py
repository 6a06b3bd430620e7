"""Published values of Siddiqui et al. 2024 (Scientific Reports 15:962, doi 10.1038/s41598-024-81646-x).

FID unless noted otherwise. For tables 1-3 the paper gives neither N nor an interval, nor which of its two settings
was used.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ByClass:
    """One class of tables 1-3."""

    counterfactuals: float  # table 1: images of the class against their healthy counterfactuals
    healthy: float  # table 1: images of the class against real healthy images
    difference: float  # table 1: called "relative absolute difference"; equals |counterfactuals - healthy|
    quality: float  # table 2: real healthy images against the healthy counterfactuals
    ms_ssim: float  # table 3
    ssim: float  # table 3


CLASSES = {
    "Lung_Opacity": ByClass(27.8, 46.9, 19.1, 60.60, 0.813, 0.780),
    "Viral Pneumonia": ByClass(37.63, 97.6, 59.97, 110.72, 0.802, 0.768),
    "COVID": ByClass(32.2, 38.2, 6.0, 45.11, 0.830, 0.798),
}
CARDIOMEGALY_REAL, CARDIOMEGALY_HEALTHY = 52.08, 17.71  # table 4
CARDIOMEGALY_IMAGES = 8060  # real images, of CheXpert-small
NO_TEXT, NO_IMAGE_PRIOR, NEITHER = 91.57, 113.14, 113.71  # table 5
ABLATION_IMAGES = 4000
