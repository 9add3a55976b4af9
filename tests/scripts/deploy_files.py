#!/usr/bin/env python3
"""Checks the files of runtime/server/deploy against a running server and what else is here: `deploy_files.py T5GEMMA HOST:PORT`. With
kubernetes-validate or kserve installed, manifests are held to their schemas; with systemd-analyze, so is the unit. Prints `deploy`."""

import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

import yaml

DEPLOY = pathlib.Path(__file__).resolve().parents[2] / "runtime/server/deploy"
ROOT = DEPLOY.parents[2]


def get(address, path):
    with urllib.request.urlopen(f"http://{address}{path}") as answer:
        return answer.read().decode()


def flags_of(program):
    text = subprocess.run([program, "serve", "--help"], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def check_arguments(arguments, flags):
    assert arguments[0] == "serve", arguments
    for argument in arguments[1:]:
        assert not argument.startswith("--") or argument.split("=")[0] in flags, f"t5gemma serve has no {argument}"


def check_container(container, flags, address):
    """Arguments, and probes of paths that answer on ports that are listened on."""
    check_arguments(container["args"], flags)
    values = dict(argument[2:].split("=", 1) for argument in container["args"] if "=" in argument)
    listened = {values["port"], values.get("admin-port", values["port"])}
    named = {port.get("name"): str(port["containerPort"]) for port in container["ports"]}
    assert set(named.values()) == listened, (named, listened)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        target = container[probe]["httpGet"]
        assert named.get(target["port"], str(target["port"])) in listened, target
        get(address, target["path"])
    assert "live" in container["livenessProbe"]["httpGet"]["path"]
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"] and context["capabilities"] == {"drop": ["ALL"]}
    return values


def check_kubernetes(flags, address, metrics):
    documents = {}
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            documents[document["kind"]] = document
            if importlib.util.find_spec("kubernetes_validate"):
                import kubernetes_validate

                kubernetes_validate.validate(document, "1.34", strict=True)
    assert set(documents) == {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    pod = documents["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    values = check_container(container, flags, address)
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == values["admin-port"]
    time = container["lifecycle"]["preStop"]["sleep"]["seconds"] + float(values["drain-seconds"])
    assert pod["spec"]["terminationGracePeriodSeconds"] > time
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert "--model=model=/model" in container["args"] and container["volumeMounts"][0]["mountPath"] == "/model"
    labels = pod["metadata"]["labels"]
    for selector in (documents["Deployment"]["spec"]["selector"]["matchLabels"], documents["Service"]["spec"]["selector"]):
        assert selector == labels
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    scaler = documents["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == documents["Deployment"]["metadata"]["name"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] in metrics


def check_kserve(flags, address):
    runtime = yaml.safe_load((DEPLOY / "kserve/runtime.yaml").read_text())
    service = yaml.safe_load((DEPLOY / "kserve/service.yaml").read_text())
    (container,) = runtime["spec"]["containers"]
    values = check_container(container, flags, address)
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == values["port"]
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {known["name"] for known in runtime["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    if importlib.util.find_spec("kserve"):
        import kserve

        for document, kind in ((runtime, kserve.V1alpha1ServingRuntime), (service, kserve.V1beta1InferenceService)):
            known(document, kind)


def known(document, kind, path=""):
    """That KServe's model of a kind has every field of a document."""
    import kserve
    import kubernetes.client

    fields = {name: (attribute, kind.openapi_types[attribute]) for attribute, name in kind.attribute_map.items()}
    for name, value in document.items():
        assert name in fields, f"{path}.{name}: {kind.__name__} has no such field"
        of = fields[name][1]
        of, is_list = (of[5:-1], True) if of.startswith("list[") else (of, False)
        inner = getattr(kserve, of, None) or getattr(kubernetes.client, of, None)
        if inner and hasattr(inner, "attribute_map"):
            for element in value if is_list else [value]:
                known(element, inner, f"{path}.{name}")


def check_dashboard(metrics):
    """That each series and label it asks for is there."""
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    assert len(asked) > 20
    for expression in asked:
        names = re.findall(r"\bt5gemma_\w+", expression)
        assert names and expression.count("(") == expression.count(")"), expression
        for name in names:
            assert name in metrics, f"{expression}: /metrics has no {name}"
            labels = set(re.findall(r"(\w+)[=!]~?\"", expression)) | set(re.findall(r"by \(([^)]*)\)", expression)[0].split(", ") if "by (" in expression else [])
            assert labels - {"job"} <= metrics[name], f"{expression}: {name} has the labels {metrics[name]}"
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def check_dockerfile(flags):
    """What linters of Dockerfiles ask for, as far as it is a matter of text."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    stages = [index for index, (word, _) in enumerate(steps) if word == "FROM"]
    assert len(stages) == 2
    for index in stages:
        assert re.fullmatch(r"\S+:(?!latest)\S+( AS \w+)?", steps[index][1]), steps[index]
    last = dict(steps[stages[-1] :])
    assert last["USER"] not in ("0", "root") and last["STOPSIGNAL"] == "SIGTERM" and "ADD" not in dict(steps)
    for word in ("ENTRYPOINT", "CMD"):
        assert isinstance(json.loads(last[word]), list), "expected the form that needs no shell"
    check_arguments(json.loads(last["CMD"]), flags)
    assert all("--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists" in rest for word, rest in steps if word == "RUN" and "apt-get install" in rest)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert all(target in targets for target in re.findall(r"make ([\w-]+)", text))
    version = re.search(r"FROM rust:(\d+)\.(\d+)", text)
    wanted = re.search(r'rust-version = "(\d+)\.(\d+)"', (ROOT / "Cargo.toml").read_text())
    assert [int(number) for number in version.groups()] >= [int(number) for number in wanted.groups()]


def check_unit(program, flags):
    unit = (DEPLOY / "t5gemma.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    check_arguments(command.split()[1:], flags)
    if not shutil.which("systemd-analyze"):
        return
    with tempfile.TemporaryDirectory() as folder:
        # With a program that is there.
        file = pathlib.Path(folder) / "t5gemma.service"
        file.write_text(unit.replace("/usr/local/bin/t5gemma", str(pathlib.Path(program).resolve())))
        for check in (["verify"], ["security", "--offline=true", "--threshold=20"]):
            done = subprocess.run(["systemd-analyze", *check, file], capture_output=True, text=True)
            said = [line for line in done.stderr.splitlines() if "t5gemma.service" in line]
            assert done.returncode == 0 and not said, (check, done.stdout[-500:], done.stderr)


def main():
    program, address = sys.argv[1:]
    flags = flags_of(program)
    metrics = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", get(address, "/metrics"), re.M):
        metrics.setdefault(name, set()).update(re.findall(r"(\w+)=\"", labels))
    check_kubernetes(flags, address, metrics)
    check_kserve(flags, address)
    check_dashboard(metrics)
    check_dockerfile(flags)
    check_unit(program, flags)
    print("deploy")


if __name__ == "__main__":
    main()
