"""docs/kubernetes.yaml has the fields that Kubernetes 1.30 knows, where it knows them, with values of their types.

The schemas are the part of Kubernetes' API reference that the manifest uses. Unknown fields are refused, as by
`kubectl apply --validate=strict`.
"""

import re
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

MANIFEST = Path(__file__).parents[2] / "docs/kubernetes.yaml"
QUANTITY = {"type": "string", "pattern": r"^[0-9.]+(m|[KMGT]i?)?$"}
COUNT = {"type": "integer", "minimum": 1}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
NAMES = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(*required, **known):
    """An object with these fields only."""
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


def several(item):
    return {"type": "array", "items": item, "minItems": 1}


PROBE = fields(
    "httpGet",
    httpGet=fields("path", "port", path={"type": "string", "pattern": "^/"}, port=NAME),
    periodSeconds=COUNT,
    failureThreshold=COUNT,
)
RESOURCES = {"type": "object", "additionalProperties": QUANTITY, "propertyNames": {"pattern": "^(cpu|memory|.+/.+)$"}}
SECRET = fields("secretKeyRef", secretKeyRef=fields("name", "key", name=NAME, key={"type": "string"}))
CONTAINER = fields(
    "name",
    "image",
    name=NAME,
    image={"type": "string"},
    args=several({"type": "string"}),
    env=several(fields("name", name={"type": "string"}, value={"type": "string"}, valueFrom=SECRET)),
    ports=several(fields("containerPort", name=NAME, containerPort=COUNT)),
    startupProbe=PROBE,
    livenessProbe=PROBE,
    readinessProbe=PROBE,
    resources=fields(requests=RESOURCES, limits=RESOURCES),
    volumeMounts=several(
        fields("name", "mountPath", name=NAME, mountPath={"type": "string"}, readOnly={"type": "boolean"})
    ),
)
VOLUME = fields(
    "name",
    name=NAME,
    persistentVolumeClaim=fields("claimName", claimName=NAME, readOnly={"type": "boolean"}),
    emptyDir=fields(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
)
POD = fields("containers", containers=several(CONTAINER), volumes=several(VOLUME), terminationGracePeriodSeconds=COUNT)
SET = fields(
    "serviceName",
    "selector",
    "template",
    serviceName=NAME,
    replicas=COUNT,
    podManagementPolicy={"enum": ["OrderedReady", "Parallel"]},
    selector=fields("matchLabels", matchLabels=NAMES),
    template=fields("metadata", "spec", metadata=fields("labels", labels=NAMES), spec=POD),
)
SERVICE = fields(
    "ports",
    clusterIP={"type": "string"},
    publishNotReadyAddresses={"type": "boolean"},
    selector=NAMES,
    ports=several(fields("port", name=NAME, port=COUNT)),
)
KINDS = {("v1", "Service"): SERVICE, ("apps/v1", "StatefulSet"): SET}


def errors(document):
    spec = KINDS[document["apiVersion"], document["kind"]]
    whole = fields(
        "apiVersion", "kind", "metadata", "spec", apiVersion={}, kind={}, metadata=fields("name", name=NAME), spec=spec
    )
    return [error.message for error in jsonschema_rs.Draft202012Validator(whole).iter_errors(document)]


@pytest.fixture
def service_and_set():
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def test_fields_and_types(service_and_set):
    assert [errors(document) for document in service_and_set] == [[], []]


def test_a_misspelt_field_is_seen(service_and_set):
    service_and_set[1]["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    assert "livenesProbe" in errors(service_and_set[1])[0]


def test_parts_refer_to_each_other(service_and_set):
    service, pods = service_and_set
    spec = pods["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["selector"] == spec["selector"]["matchLabels"] == labels
    assert spec["serviceName"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["ports"][0]["containerPort"] == service["spec"]["ports"][0]["port"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == container["ports"][0]["name"]
    limits, requested = container["resources"]["limits"], container["resources"]["requests"]
    assert int(requested["memory"][:-2]) <= int(limits["memory"][:-2]) and limits["nvidia.com/gpu"] == "1"


def test_the_image_has_a_tested_version(service_and_set):
    image = service_and_set[1]["spec"]["template"]["spec"]["containers"][0]["image"]
    low, high = re.search(r'"vllm>=([\d.]+),<([\d.]+)"', (MANIFEST.parents[1] / "pyproject.toml").read_text()).groups()
    numbers = [tuple(map(int, version.split("."))) for version in (low, image.rpartition(":")[2], high)]
    assert numbers == sorted(numbers)
