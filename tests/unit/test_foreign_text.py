"""Labels and names of files come from other people: nothing executes them, and nothing of the run is given away."""

from __future__ import annotations

import csv
import shutil
import stat
import threading
from http.client import HTTPConnection
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.distributed import session
from diffva_ray.evaluate.report.serve import ReportServer
from diffva_ray.evaluate.tables import write_table
from diffva_ray.storage.local import LocalStore

EXPORTS = ("huggingface", "webdataset", "coco", "dicom")

LABELS = ['=HYPERLINK("http://x","y")', "+1+cmd", "@SUM(A1)", "\\input{/etc/passwd} ^ ~ & % $ # _", "a\nb | c <b> `d`"]


def test_tables_execute_no_label(tmp_path: Path) -> None:
    write_table(LocalStore(str(tmp_path)), "ssim", [{"label": label, "n": 1} for label in LABELS], "SSIM")
    cells = [row["label"] for row in csv.DictReader((tmp_path / "tables/ssim.csv").open(newline=""))]
    assert cells == [f"'{label}" if label[0] in "=+@" else label for label in LABELS]
    tex = (tmp_path / "tables/ssim.tex").read_text()
    assert r"\textbackslash input\{/etc/passwd\} \textasciicircum" in tex
    assert r"\input" not in tex
    lines = (tmp_path / "tables/ssim.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + len(LABELS), "no label breaks the table"
    assert r"a b \| c \<b\> \`d\`" in lines[6]


def test_the_terminal_obeys_no_label(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "COVID" / "images", tmp_path / "data" / "\x1b]0;title\x07COVID\x1b[31m")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "data")], color=True)
    assert result.exit_code == 0
    assert "?]0;title?COVID?[31m" in result.output
    assert not set("\x1b\x07") & set(result.output)


def test_the_served_report_follows_no_link_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "run/report/images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "run/report/images/evil.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "run/report/images/good.png").write_bytes(b"good")
    with ReportServer(LocalStore(str(tmp_path / "run"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers = []
        for name in ("evil", "good"):
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            connection.request("GET", f"/images/{name}.png")
            answers.append(connection.getresponse().status)
            connection.close()
        server.shutdown()
    assert answers == [404, 200]


def test_rays_token_is_the_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "auth_token"
    token.touch(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    session._protect_token()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_no_name_of_a_file_leaves_an_anonymised_run(images: Path, model: Path, tmp_path: Path) -> None:
    data, run, name = shutil.copytree(images, tmp_path / "data"), tmp_path / "run", "Doe^John_MRN123"
    for file in list(data.glob("*/*/*.png")):
        file.rename(file.with_name(f"{name}-{file.name}"))
    bad, later = sorted((data / "COVID/images").iterdir())[:2]
    bad.write_bytes(b"no image")
    words = ["--data", data, "--model", model, "--out", run, "--executor", "inline", "--limit", 4]
    assert diffva("generate", *words, "--set", "evaluate.max_quarantined_fraction=0.5") == 0
    sound = later.read_bytes()
    later.write_bytes(b"gone")  # so that a note of reduce names it
    assert diffva("reduce", run, "--executor", "inline") == 0
    later.write_bytes(sound)
    for folder, anonymous in (("named", []), ("anonymous", ["--anonymise-names"])):
        out = tmp_path / folder
        assert diffva("report", run, *anonymous) == 0
        assert diffva("compare", run, run, "--out", out / "comparison", *anonymous) == 0
        for kind in EXPORTS:
            more = ["--threshold", 0.1] if kind in ("coco", "dicom") else []
            more += ["--accept", "ssim > -2", "--executor", "inline"]  # the bad image is listed as rejected
            assert diffva("export", run, "--to", kind, "--out", out / kind, *more, *anonymous) == 0
        shutil.copytree(run / "report", out / "report")
        told = {file.relative_to(out).parts[0] for file in out.rglob("*") if file.is_file() and name in content(file)}
        assert told == (set() if anonymous else {"report", "comparison", *EXPORTS})


def diffva(*words: object) -> int:
    return CliRunner().invoke(main, [str(word) for word in words]).exit_code


def content(file: Path) -> str:
    return repr(pq.read_table(file).to_pylist()) if file.suffix == ".parquet" else file.read_bytes().decode("latin-1")
