"""Files of cluster/: against KubeRay's own CRDs, Ray's own launcher schema, and what docs/security.md promises."""

from __future__ import annotations

import ast
import copy
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from head import ROOT

from diffva_ray.cli import main

CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
OVERLAYS = ("train", "generate")
LAUNCHERS = ("aws", "local")
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "schemas"))


def build(overlay: str) -> list[dict[str, Any]]:
    """What ``kubectl kustomize`` makes of an overlay that is a base and JSON patches by kind."""
    document = yaml.safe_load((KUBERAY / overlay / "kustomization.yaml").read_text())
    base = KUBERAY / overlay / document["resources"][0]
    files = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    found = [yaml.safe_load((base / file).read_text()) for file in files]
    for patch in document["patches"]:
        for manifest in found:
            if manifest["kind"] == patch["target"]["kind"]:
                for operation in yaml.safe_load(patch["patch"]):
                    apply(manifest, operation)
    return found


def apply(manifest: Any, operation: dict[str, Any]) -> None:
    """``add`` or ``replace`` of RFC 6902."""
    *path, last = operation["path"].strip("/").split("/")
    for key in path:
        manifest = manifest[int(key) if isinstance(manifest, list) else key]
    assert operation["op"] in ("add", "replace")
    key = int(last) if isinstance(manifest, list) else last
    if operation["op"] == "replace":
        manifest[key]
    manifest[key] = operation["value"]


def job(overlay: str) -> dict[str, Any]:
    return next(manifest for manifest in build(overlay) if manifest["kind"] == "RayJob")


def strict(schema: Any) -> Any:
    """A CRD's OpenAPI schema as a JSON schema that knows no other keys, as ``kubectl --validate=strict``."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    open_ended = "additionalProperties" in found or found.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        found["additionalProperties"] = False
    return found


def checker(kind: str = "rayjobs") -> jsonschema.Draft7Validator:
    path = CRDS / f"ray.io_{kind}.yaml"
    if not path.exists():
        pytest.skip(f"MANIFESTS NOT VALIDATED: no {path.name} of KubeRay in {CRDS.name}/ (set KUBERAY_CRDS)")
    versions = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = strict(next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)


def test_manifests_are_what_kuberay_accepts() -> None:
    validator = checker()
    for overlay in OVERLAYS:
        manifest = job(overlay)
        assert not [f"{list(error.path)}: {error.message}" for error in validator.iter_errors(manifest)]
        wrong = copy.deepcopy(manifest)
        wrong["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "none"
        wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["numCpus"] = 0
        assert len(list(validator.iter_errors(wrong))) == 2, "the check finds no errors"


def service() -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((KUBERAY / "serve" / "rayservice.yaml").read_text())
    return manifest


def test_the_service_is_what_kuberay_accepts() -> None:
    validator = checker("rayservices")
    assert not [f"{list(error.path)}: {error.message}" for error in validator.iter_errors(service())]
    wrong = service()
    wrong["spec"]["rayClusterConfig"]["headGroupSpec"]["numCpus"] = 0
    assert len(list(validator.iter_errors(wrong))) == 1, "the check finds no errors"


def test_the_service_is_closed_and_its_application_is_ours() -> None:
    spec = service()["spec"]
    cluster = spec["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            assert {"secretRef": {"name": "diffva-serve"}} in container["envFrom"], "the token comes from a secret"
            assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    serve_schema = pytest.importorskip("ray.serve.schema", reason="SERVE CONFIG NOT VALIDATED: no ray[serve]")
    serve_schema.ServeApplicationSchema(**application)
    module, _, name = application["import_path"].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    made = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    read = {node.value for node in ast.walk(made) if isinstance(node, ast.Constant)}
    assert set(application["args"]) <= read, "an argument that the application does not read"
    policy = yaml.safe_load((KUBERAY / "serve" / "network-policy.yaml").read_text())
    assert policy["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/part-of": "diffva-ray"}
    assert all(rule.get("from") for rule in policy["spec"]["ingress"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_patches_are_applied_as_kustomize_does(overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("KUSTOMIZE NOT RUN: no kubectl here")
    made = subprocess.run(["kubectl", "kustomize", KUBERAY / overlay], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    by_kind = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(made.stdout)}
    assert by_kind == {manifest["kind"]: manifest for manifest in build(overlay)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_entry_points_are_commands_of_ours(overlay: str) -> None:
    python, script, *options = shlex.split(job(overlay)["spec"]["entrypoint"])
    assert python == "python"
    verb = Path(script).stem
    assert (ROOT / "jobs" / f"{verb}.py").exists()
    main.commands[verb].make_context(verb, options)  # raises for an unknown option


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_cluster_on_kubernetes_is_closed_and_its_head_idle(overlay: str) -> None:
    spec = job(overlay)["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for container in (container for group in groups for container in group["template"]["spec"]["containers"]):
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert not container["image"].endswith(":latest")
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert "NetworkPolicy" in {manifest["kind"] for manifest in build(overlay)}
    assert "AWS_" not in json.dumps(job(overlay)), "credentials come from the secret"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_are_what_ray_accepts(name: str) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    document = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    jsonschema.validate(document, schema)
    head = " ".join(document["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0" in head
    assert "--env RAY_AUTH_MODE=token" in document["docker"]["run_options"]
    assert "--env RAY_USAGE_STATS_ENABLED=0" in document["docker"]["run_options"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "head_node": {}, "idle_minutes": 5}, schema)


def test_no_cluster_file_opens_a_port_or_contains_a_secret() -> None:
    for path in (path for path in CLUSTER.rglob("*") if path.is_file()):
        lines = [line.split("#")[0] for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        text = "\n".join(lines)
        assert "LoadBalancer" not in text, path
        assert "0.0.0.0" not in text, path
        assert "SECRET_ACCESS_KEY" not in text, path


def test_the_slurm_script_is_shell() -> None:
    assert subprocess.run(["bash", "-n", CLUSTER / "slurm.sbatch"], timeout=10).returncode == 0
