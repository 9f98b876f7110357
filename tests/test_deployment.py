"""Image, compose file, Kubernetes manifests and dashboard agree with each other and with the server."""

import fnmatch
import json
import re
import shlex
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from service.cli import app
from service.observability.metrics import Metrics
from service.settings import HttpSettings, Settings
from service.settings_reader import variables

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("flow-generator-matching:")}
DASHBOARD = DOCKER / "grafana" / "dashboards" / "service.json"
ADAPTER = DOCKER / "k8s" / "adapter.yaml"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
DEPLOY = ROOT / "deploy"
CONFIGURED = [*DEPLOY.iterdir(), *(path for end in ("*.y*ml", "*.sh", "*.env") for path in DOCKER.rglob(end))]
CONFIGURING = [ROOT / "Dockerfile", ROOT / "docker-compose.yml", *CONFIGURED, *PAGES]
MANIFESTS = {
    manifest["kind"]: manifest
    for path in (DOCKER / "k8s").glob("*.yaml")
    for manifest in yaml.safe_load_all(path.read_text())
    if "kind" in manifest and manifest["kind"] != "PersistentVolumeClaim"
}
KUSTOMIZATION = yaml.safe_load((DOCKER / "k8s" / "kustomization.yaml").read_text())
CLAIMS = [*yaml.safe_load_all((DOCKER / "k8s" / "storage.yaml").read_text())]
UPLOAD = MANIFESTS["Pod"]["spec"]
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENDS = {"counter": ["_total"], "histogram": ["", "_bucket", "_sum", "_count"]}
DRAIN_SECONDS = HttpSettings().drain_seconds


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


@pytest.mark.parametrize("path", CONFIGURING, ids=lambda path: path.name)
def test_every_variable_is_a_setting(path):
    known = {*variables()} | {"SERVICE_CONFIG", "SERVICE_KEY", "SERVICE_NAME"}
    assert set(re.findall(r"\bSERVICE_[A-Z0-9_]+\b", path.read_text())) <= known


@pytest.mark.parametrize(
    "path", [DASHBOARD, ADAPTER, DOCKER / "k8s" / "scaling.yaml", *PAGES], ids=lambda path: path.name
)
def test_every_metric_exists(path):
    known = {"fgm_queue_seconds"}  # the adapter's own
    for family in Metrics().registry.collect():
        ends = ENDS.get(family.type, [""])
        known |= {family.name + end for end in ends}
    assert set(re.findall(r"\bfgm_[a-z_]+", path.read_text())) <= known


def test_the_dashboard_asks_the_provisioned_source():
    provisioned = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioned / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioned / "dashboards" / "service.yml").read_text())["providers"]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert source["url"].removeprefix("http://").split(":")[0] in SERVICES
    mounted = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_proxies_suit_the_servers_times_and_port():
    settings = Settings()
    nginx, caddy = (DEPLOY / "nginx.conf").read_text(), (DEPLOY / "Caddyfile").read_text()
    (idle,) = re.findall(r"keepalive_timeout (\w+);", nginx)
    (silent,) = re.findall(r"proxy_read_timeout (\w+);", nginx)
    (caddy_idle,) = re.findall(r"\bkeepalive (\w+)$", caddy, re.MULTILINE)
    assert max(seconds(idle), seconds(caddy_idle)) < settings.http.keep_alive_seconds
    assert seconds(silent) > max(settings.http.realtime_idle_seconds, settings.engine.request_timeout_seconds)
    assert "client_max_body_size 0;" in nginx  # the server has limits of its own
    for text in (nginx, caddy):
        assert re.findall(r"127\.0\.0\.1:(\d+)", text) == [str(settings.http.port)]
    assert "127.0.0.1" in settings.http.trusted_proxies
    for name in ("Host", "X-Forwarded-For", "X-Forwarded-Proto", "Upgrade", "Connection"):
        assert f"proxy_set_header {name} $" in nginx
    # Not /metrics alone, because the server answers /metrics/ too.
    assert "location /metrics {" in nginx
    assert "respond /metrics* 404" in caddy


def test_the_systemd_unit_runs_the_command_with_time_to_drain():
    lines = (DEPLOY / "fgm-service.service").read_text().splitlines()
    unit = dict(line.split("=", 1) for line in lines if line and line[0] not in "#[")
    program, command, *options = unit["ExecStart"].split()
    typer.main.get_command(app).commands[command].make_context(command, [*options], resilient_parsing=True)
    config = tomllib.loads((DEPLOY / "service.toml").read_text())
    settings = Settings(**config)
    assert str(settings.http.keys_file).startswith(f"/var/lib/{unit['StateDirectory']}/")
    assert f"SERVICE_DATA=/var/lib/{unit['StateDirectory']}" in unit["Environment"].split()
    assert seconds(unit["TimeoutStopSec"]) >= DRAIN_SECONDS + 10
    guide = (ROOT / "docs" / "deploy.md").read_text()
    (option,) = (word for word in options if word.startswith("/"))
    folder, _, name = option.rpartition("/")
    assert f"--target-directory {folder} deploy/{name}" in guide
    assert f"python3 -m venv {program.removesuffix('/bin/fgm-service')}\n" in guide


def test_docker_run_starts_the_container_of_the_compose_file():
    (block,) = re.findall(
        r"^(docker run .*?[^\\])$", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL | re.MULTILINE
    )
    _, _, *words, image = shlex.split(block.replace("\\\n", ""))
    flags = {"--detach", "--read-only", "--init"}
    given: dict[str, list[str]] = {}
    rest = iter(words)
    for word in rest:
        given.setdefault(word, []).append("true" if word in flags else next(rest))
    ours = SERVICES["service"]
    assert image == ours["image"]
    assert given["--publish"] == ours["ports"]
    assert (given["--cap-drop"], given["--security-opt"]) == (ours["cap_drop"], ours["security_opt"])
    assert (given["--tmpfs"], given["--restart"]) == (ours["tmpfs"], [ours["restart"]])
    assert [f"{seconds}s" for seconds in given["--stop-timeout"]] == [ours["stop_grace_period"]]
    environment = [f"{name}={value}" for name, value in ours["environment"].items()]
    environment += [line for line in (DOCKER / "loopback.env").read_text().splitlines() if line[0] != "#"]
    assert given["--env"] == environment
    assert given["--volume"][0].split(":")[1] in {volume.split(":")[1] for volume in ours["volumes"]}
    assert ours["read_only"] is ours["init"] is True
    assert flags <= given.keys()


def test_prometheus_asks_the_servers_of_its_profile():
    (job,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for some in job["static_configs"] for target in some["targets"]}
    full = {f"{name}:8000" for name, service in OURS.items() if service["profiles"] == ["full"]}
    assert targets == full


def test_a_profile_runs_by_itself_and_cpu_is_the_default():
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text().splitlines()
    for profile in ("cpu", "gpu", "full"):
        chosen = {name: service for name, service in SERVICES.items() if profile in service["profiles"]}
        assert all(set(service.get("depends_on", ())) <= set(chosen) for service in chosen.values())
        ports = list(chain.from_iterable(service.get("ports", ()) for service in chosen.values()))
        assert len(set(ports)) == len(ports)
        assert "127.0.0.1:8000:8000" in ports


def test_nothing_is_published_beyond_the_loopback_and_every_image_is_pinned():
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert service in OURS.values() or re.search(r":v?\d+\.\d+", service["image"])


@pytest.mark.parametrize("service", OURS.values(), ids=OURS)
def test_a_container_of_ours_is_confined_and_has_time_to_drain(service):
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert seconds(service["stop_grace_period"]) > DRAIN_SECONDS


def test_every_setting_that_people_are_told_of_reaches_the_containers():
    full = {"SERVICE_JOBS__DATABASE", "SERVICE_IMAGES__ARTIFACTS", "SERVICE_IMAGES__ARTIFACT_SECRET"}  # see deploy.md
    defaults = (DOCKER / "loopback.env").read_text()
    assert "SERVICE_HTTP__OPEN_TO_ALL=true" in defaults.splitlines()
    assert "service.env" in (ROOT / ".gitignore").read_text().splitlines()
    for service in OURS.values():
        assert service["env_file"] == [
            "docker/loopback.env",
            {"path": "service.env", "required": False},
        ]  # the last wins
        set_here = {name for name in service["environment"] if name.startswith("SERVICE_")}  # and this over both
        assert set_here == (full if service["profiles"] == ["full"] else set())


def test_what_compose_mounts_exists():
    mounts = chain.from_iterable(service.get("volumes", ()) for service in SERVICES.values())
    sources = {mount.split(":")[0] for mount in mounts}
    assert all((ROOT / source).exists() for source in sources if source.startswith("./docker/"))
    assert {source for source in sources if "/" not in source} == set(COMPOSE["volumes"])


def test_the_context_holds_what_the_dockerfile_copies():
    rules = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, rule[1:]) for rule in rules if rule.startswith("!")), source


def test_pins_are_within_what_the_project_asks_for():
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["gpu"], *extras["s3"]):
        needed = Requirement(text)
        assert needed.name in pins, f"{needed.name} has no pin; run docker/pin.sh"
        assert needed.specifier.contains(Version(pins[needed.name])), f"{text}: run docker/pin.sh"
    (torch,) = re.findall(r"^ARG TORCH=(.+)$", DOCKERFILE, re.MULTILINE)
    assert torch == pins["torch"]
    assert f"torch=={torch}" in (ROOT / "Makefile").read_text()


def test_the_image_runs_as_a_user_whose_number_the_manifests_know():
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[0]
    context = POD["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (int(user), int(group), int(group))
    assert context["runAsNonRoot"]
    assert UPLOAD["securityContext"] == context


def test_the_pod_is_confined_and_has_one_gpu():
    context = CONTAINER["securityContext"]
    assert UPLOAD["containers"][0]["securityContext"] == context
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_variables_of_other_services_are_kept_out_of_the_pods():
    assert (POD["enableServiceLinks"], UPLOAD["enableServiceLinks"]) == (False, False)


def test_the_pod_has_time_to_drain():
    hook = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][-1])
    (drain,) = (int(each["value"]) for each in CONTAINER["env"] if each["name"] == "SERVICE_HTTP__DRAIN_SECONDS")
    assert POD["terminationGracePeriodSeconds"] >= hook + drain + 10


def test_probes_ask_paths_that_answer_without_a_key():
    probes = {name: CONTAINER[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}


def test_students_are_copied_into_the_claim_that_pods_read():
    (image,) = KUSTOMIZATION["images"]
    (container,) = UPLOAD["containers"]
    assert container["image"] == f"{image['newName']}:{image['newTag']}"
    assert MANIFESTS["Pod"]["metadata"]["namespace"] == KUSTOMIZATION["namespace"]
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"] == "/models"
    assert {**mount, "readOnly": True} in CONTAINER["volumeMounts"]
    assert all(volume in POD["volumes"] for volume in UPLOAD["volumes"])
    # A claim that is new is empty: pods start without it.
    (models,) = (each["value"] for each in CONTAINER["env"] if each["name"] == "SERVICE_MODELS")
    assert json.loads(models) == []
    assert all(claim["spec"]["accessModes"] == ["ReadWriteMany"] for claim in CLAIMS)


def test_manifests_name_each_other():
    others = {"kustomization.yaml", "adapter.yaml", "upload.yaml"}
    assert set(KUSTOMIZATION["resources"]) == {path.name for path in (DOCKER / "k8s").glob("*.yaml")} - others
    (metric,) = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert MANIFESTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "fgm"
    claims = {claim["metadata"]["name"] for claim in CLAIMS}
    mounted = {v["persistentVolumeClaim"]["claimName"] for v in POD["volumes"] if "persistentVolumeClaim" in v}
    assert claims == mounted
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    ports = [each["targetPort"] for each in MANIFESTS["Service"]["spec"]["ports"]]
    assert ports == [port["name"] for port in CONTAINER["ports"]]
