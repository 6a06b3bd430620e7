"""Questions about one image: the pixels of ``generate`` and ``explain``, and a run that holds the answer."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from dicom_files import dicom

from diffva_ray.cli import main
from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate.records import read_records
from diffva_ray.generate.run import FingerprintDiffers, PlanError, open_run
from diffva_ray.generate.verification import verify
from diffva_ray.model.packaged import model_address
from diffva_ray.studio.workspace import Question, Workspace, safe_name

SHA = ["counterfactual_sha256", "attribution_sha256", "reconstruction_sha256"]


def diffva(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def image(images: Path) -> Path:
    return sorted((images / "COVID" / "images").iterdir())[0]


@pytest.fixture
def workspace(model: Path, tmp_path: Path) -> Workspace:
    return Workspace(str(tmp_path / "studio"), str(model), "cpu")


@pytest.fixture
def region() -> np.ndarray:
    mask = np.zeros((50, 40), bool)
    mask[10:30, 5:25] = True
    return mask


def test_the_pixels_are_those_of_explain(workspace: Workspace, image: Path, model: Path, tmp_path: Path) -> None:
    reply = workspace.ask(Question(image.name, image.read_bytes(), "COVID 19", ("generate.strength=0.7", "seed=5")))
    options = ("--strength", 0.7, "--seed", 5, "--prompt", "COVID 19", "--set", "generate.micro_batch=1")
    explained = diffva("explain", image, "--model", model, *options, "--json", "--out", tmp_path / "sheet.png")
    answer = json.loads(explained)["answers"][0]
    for name in (*SHA[:2], "ssim", "ms_ssim", "psnr", "l1", "judge_image", "judge_counterfactual"):
        assert reply.record[name] == answer[name], name


@pytest.mark.parametrize("painted", [False, True])
def test_the_command_makes_the_record_again(
    workspace: Workspace, image: Path, region: np.ndarray, painted: bool, tmp_path: Path
) -> None:
    settings = ("generate.strength=0.7", "seed=3")
    reply = workspace.ask(Question(image.name, image.read_bytes(), "", settings, region if painted else None))
    program, *arguments = shlex.split(reply.command)
    arguments[arguments.index("--out") + 1] = str(tmp_path / "again")
    diffva(*arguments)
    again = read_records(open_run(str(tmp_path / "again"))).iloc[0]
    assert program == "diffva"
    for name in ("record_id", "seed", *SHA):
        assert again[name] == reply.record[name], name


def test_only_the_painted_region_changes(workspace: Workspace, image: Path, region: np.ndarray) -> None:
    reply = workspace.ask(Question(image.name, image.read_bytes(), "", ("generate.masked.feather=0.0",), region))
    changed = np.abs(reply.images.image - reply.images.counterfactual) > 1 / 255
    size = workspace.engine.size
    rows, columns = slice(size * 10 // 50, size * 30 // 50 + 1), slice(size * 5 // 40, size * 25 // 40 + 1)
    assert changed[rows, columns].any()
    changed[rows, columns] = False
    assert not changed.any()
    assert reply.record["method"] == "masked"


def test_every_answer_is_a_run_that_is_found_again(workspace: Workspace, image: Path, model: Path) -> None:
    calls = list[tuple[int, int]]()
    question = Question(image.name, image.read_bytes(), "")
    first = workspace.ask(question, lambda done, planned: calls.append((done, planned)))
    assert calls[-1][0] == calls[-1][1] == calls[0][1] > 4
    assert [done for done, _ in calls] == sorted({done for done, _ in calls}), "more passes than planned"
    calls.clear()
    again = workspace.ask(question, lambda *call: calls.append(call)).record
    assert {key: value for key, value in again.items() if value == value} == {
        key: value for key, value in first.record.items() if value == value
    }
    assert not calls, "the same question was generated twice"
    assert list(verify(first.run)) == []
    ((about, name),) = workspace.history()
    assert about.startswith(f"{image.name}, “")
    tomorrow = Workspace(workspace.uri, str(model), "cpu")
    np.testing.assert_array_equal(tomorrow.reply(name).images.counterfactual, first.images.counterfactual)


def test_records_of_a_run_are_answers_too(images: Path, model: Path, tmp_path: Path) -> None:
    diffva("generate", "--data", images, "--model", model, "--out", tmp_path / "run", "--executor", "inline")
    run = open_run(str(tmp_path / "run"))
    workspace = Workspace(str(tmp_path / "studio"), str(model), "cpu", run=run)
    records = read_records(run)
    names = [name for _, name in workspace.history()]
    assert names == [f"record {one}" for one in records["record_id"]]
    reply = workspace.reply(names[3])
    arguments = shlex.split(reply.command)[1:]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "again")
    diffva(*arguments)
    again = read_records(open_run(str(tmp_path / "again"))).set_index("record_id")
    for name in SHA:
        assert again[name][reply.record["record_id"]] == reply.record[name]


def test_what_changes_grows_with_severity(image: Path, tmp_path: Path) -> None:
    """With the packaged model: from the healthy counterfactual to the prompt's, by prompts that a command repeats."""
    workspace, changes = Workspace(str(tmp_path / "studio"), model_address("small"), "cpu"), []
    for severity in (0, 0.3, 0.6, 1):
        prompt = workspace.graded("Effusion", severity)
        reply = workspace.ask(Question(image.name, image.read_bytes(), prompt))
        assert f"--prompt {shlex.quote(prompt)} " in reply.command
        changes.append(reply.images.counterfactual)
    distances = [float(np.abs(change - changes[0]).mean()) for change in changes]
    assert 0 < distances[1] < distances[2] < distances[3]
    healthy = workspace.ask(Question(image.name, image.read_bytes(), ""))
    np.testing.assert_array_equal(changes[0], healthy.images.counterfactual)
    for prompt in ("", workspace.prompts[0], "Mass AND Nodule :0.5"):
        assert workspace.graded(prompt, 0.5) == prompt


def test_an_unfinished_answer_is_not_listed(workspace: Workspace, image: Path) -> None:
    reply = workspace.ask(Question(image.name, image.read_bytes(), ""))
    (part,) = (Path(reply.run.store.uri) / "records").iterdir()
    part.unlink()
    assert workspace.history() == []
    again = workspace.ask(Question(image.name, image.read_bytes(), ""))
    assert again.record["counterfactual_sha256"] == reply.record["counterfactual_sha256"]
    assert len(workspace.history()) == 1


def test_dicom_and_hostile_names(workspace: Workspace) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (48, 64)).astype(np.uint16)
    reply = workspace.ask(Question("../../etc/pass wd\n.dcm", dicom(pixels, ViewPosition="PA"), ""))
    assert reply.record["image_path"] == "pass_wd_.dcm"
    assert reply.record["view"] == "PA"
    assert all(Path(entry).resolve().is_relative_to(workspace.uri) for entry in (reply.run.about["data_root"],))
    assert safe_name("COVID-3.png") == "COVID-3.png"
    assert safe_name("..") != ".."
    assert safe_name("images.csv") != "images.csv"
    assert len(safe_name("x" * 400)) <= 70


def test_what_cannot_be_used_is_one_line_and_leaves_nothing(workspace: Workspace, image: Path) -> None:
    data = image.read_bytes()
    for name, content, prompt, settings, kind in (
        ("a.png", b"no image", "", (), UnusableData),
        ("a.png", data[: len(data) // 2], "", (), UnusableData),
        ("a.png", data, "far too long " * 50, (), PlanError),
        ("a.png", data, "", ("generate.strength=0.01",), PlanError),
    ):
        with pytest.raises(kind) as error:
            workspace.ask(Question(name, content, prompt, settings))
        assert len(str(error.value).splitlines()) == 1
    assert workspace.history() == []
    for name in ("../elsewhere", "record 1"):
        with pytest.raises(UnusableData, match="no such result"):
            workspace.reply(name)


def test_unknown_words_are_named(workspace: Workspace) -> None:
    (note,) = workspace.notes(["COVID 19 haze"])
    assert "haze" in note
    assert workspace.notes(workspace.prompts) == []


def test_an_answer_of_another_version_is_not_taken_for_this_one(workspace: Workspace, image: Path) -> None:
    question = Question(image.name, image.read_bytes(), "")
    path = Path(workspace.ask(question).run.store.uri) / "run.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "keys": {**about["keys"], "torch": "1.0"}}))
    with pytest.raises(FingerprintDiffers):
        workspace.ask(question)
