"""diffva-ray: healthy twins, attribution maps and honest numbers for chest X-rays, at scale.

Rooms, in the order in which data flows: ``data`` (films), ``model`` (the diffusers folder), ``train``,
``counterfactual`` (twins and maps), ``generate`` (plan and shards), ``metrics``, ``evaluate`` (tables, report);
``ray_*`` spread them over a cluster. ARCHITECTURE.md has one line per module.
"""

__version__ = "0.1.0"
