"""What generated requests cannot know of a server: which sandboxes and snapshots it has, and which templates.

Without it every request would be for a sandbox that is not there, and answered 404. Requests that are meant to be wrong stay as wrong as they
are.
"""

import json
import os
import random
import urllib.error
import urllib.request

import schemathesis
from schemathesis.core.parameters import ParameterLocation

URL, KEY, TEMPLATE, IMAGE = (os.environ[name] for name in ("STASIS_URL", "STASIS_KEY", "STASIS_TEMPLATE", "STASIS_IMAGE"))
# Of the requests that name a sandbox, so many name one that is there.
THERE = 0.7
# So many sandboxes are there at least.
SUPPLY = 2
chance = random.Random(1)


def call(method, path, body=None):
    """A request of our own; None when it is refused."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"Authorization": f"Bearer {KEY}"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or "null")
    except urllib.error.HTTPError:
        return None


def sandbox():
    """The id of a sandbox that is there, in whatever state."""
    there = [item["id"] for item in call("GET", "/v1/sandboxes?page-size=100")["items"]]
    while len(there) < SUPPLY:
        made = call("POST", "/v1/sandbox", {"template_name": TEMPLATE, "memory": 512, "timeout": 3600})
        if made is None:
            break
        there.append(made["id"])
    return chance.choice(there) if there else None


def snapshot():
    """A snapshot that is there, if there is one."""
    there = call("GET", "/v1/snapshots?page-size=100")["items"]
    return chance.choice(there) if there else None


def template():
    """The id of a template of ours that is there."""
    there = [item["id"] for item in call("GET", "/v1/templates?page-size=100")["items"] if not item["is_system"]]
    return chance.choice(there) if there else None


# What each kind of credentials cannot be without.
CREDENTIALS = {
    "basic": ("username", "password"),
    "gcp": ("gcp_service_account_json",),
    "azure": ("azure_tenant_id", "azure_client_id", "azure_client_secret"),
    "aws": ("aws_access_key_id", "aws_secret_access_key", "aws_region"),
}


def is_wrong(case, where):
    return case.meta is not None and case.meta.is_negative_at(where)


def one_spelling(body, *names):
    """Of two names for one value, which must agree, the first."""
    for name in names:
        body.pop(name, None)


@schemathesis.hook
def before_call(context, case, kwargs):
    """Just before it is sent: what was there when the request was made up may have gone since."""
    named = case.path_parameters or {}
    if not is_wrong(case, ParameterLocation.PATH) and chance.random() < THERE:
        if "id" in named:
            named["id"] = sandbox() or named["id"]
        if "snapshot" in named:
            named["snapshot"] = (snapshot() or {"id": named["snapshot"]})["id"]
        if "template" in named:
            named["template"] = template() or named["template"]
    if isinstance(case.body, dict) and not is_wrong(case, ParameterLocation.BODY):
        if case.operation.path == "/v1/sandbox":
            case.body["template_name"] = TEMPLATE
            one_spelling(case.body, "disk", "disk_mib", "memory_mib", "timeout_min")
        if case.operation.path == "/v1/template":
            case.body["uri"] = IMAGE
            if isinstance(given := case.body.get("credentials"), dict):
                kind = given["type"]
                case.body["credentials"] = {"type": kind} | dict.fromkeys(CREDENTIALS[kind], "word")
        if case.operation.path in ("/v1/snapshot/restore", "/v1/snapshot/resume"):
            case.body["snapshot_name"] = (snapshot() or {"name": case.body["snapshot_name"]})["name"]
            one_spelling(case.body, "timeout_min")
