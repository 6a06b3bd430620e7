from diffva_ray.schema import PLAN, RECORDS, record_id, record_seed

SETTINGS = {"strength": 0.55, "scheduler": "pndm", "draw": 0}


def test_ids_and_seeds_are_frozen() -> None:
    """Ids of published runs must never change: these values are part of schema version 1."""
    assert record_id("COVID/images/1.png", "COVID", "normal chest scan", "sdedit", SETTINGS) == "cabbe66ce9b16eaec874"
    assert record_seed(0, "COVID/images/1.png", 0) == 7362128295597733144


def test_id_depends_on_every_setting() -> None:
    base = ("a.png", "COVID", "normal", "sdedit", SETTINGS)
    others = [
        ("b.png", *base[1:]),
        (base[0], "Normal", *base[2:]),
        (*base[:2], "healthy", *base[3:]),
        (*base[:3], "cycle", SETTINGS),
        (*base[:4], {**SETTINGS, "strength": 0.56}),
        (*base[:4], {**SETTINGS, "draw": 1}),
    ]
    assert len({record_id(*arguments) for arguments in [base, *others]}) == 7


def test_prompts_and_sweep_points_of_an_image_share_their_noise_and_samples_do_not() -> None:
    assert record_seed(0, "a.png", 0) != record_seed(0, "a.png", 1)
    assert record_seed(0, "a.png", 0) != record_seed(1, "a.png", 0)
    assert 0 <= record_seed(5, "a.png", 3) < 2**63


def test_records_hold_the_contract() -> None:
    contract = """record_id image_path image_sha256 label prompt method attribution_kind scheduler strength
    guidance_scale num_inference_steps seed sample model_digest counterfactual_path attribution_path lung_mask_path
    width height ssim ms_ssim ms_ssim_scales psnr l1 attribution_energy attribution_energy_lung_fraction
    counterfactual_sha256 reconstruction_sha256 attribution_sha256 reconstruction_path status error""".split()
    assert set(contract) <= set(RECORDS.names)
    assert {"record_id", "shard", "position", "image_path", "image_size", "label", "prompt"} <= set(PLAN.names)
