"""The life of a sandbox through the public Python client, unmodified, over HTTPS: made, used, asleep, woken by a request to its app, copied,
shown to others, deleted.

Environment: LEAP0_API_KEY, LEAP0_BASE_URL, LEAP0_SANDBOX_DOMAIN (with a port), SSL_CERT_FILE; TEMPLATE."""

import json
import os
import socket
import sys
import time
import typing
import urllib.error
import urllib.request
from importlib.metadata import version
from urllib.parse import urlsplit

if sys.version_info < (3, 12):
    # Client 0.8.0 needs it, and says so only by failing to import.
    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict

from leap0 import Leap0Client

NEW = version("leap0") != "0.4.0"
PORT = 8000
DOMAIN = os.environ["LEAP0_SANDBOX_DOMAIN"]
began = time.monotonic()

# What a wildcard in the DNS does for a real domain.
resolve = socket.getaddrinfo
zone = DOMAIN.partition(":")[0]


def local(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else host
    return resolve("127.0.0.1" if name and name.endswith(zone) else host, *args, **kwargs)


socket.getaddrinfo = local

SERVER = """
import http.server, json, os
count = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global count
        count += 1
        key = self.headers.get('leap0-authorization') or self.headers.get('authorization')
        body = json.dumps({'count': count, 'pid': os.getpid(), 'path': self.path, 'key': key}).encode()
        self.send_response(200)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(('127.0.0.1', %d), Handler).serve_forever()
""" % PORT


def step(what):
    print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)


def get(url, **headers):
    """Status and JSON of a request to an app."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def invoke(box):
    url = box.invoke_url("/hello?x=1", port=PORT)
    assert url.startswith("https://"), url
    status, answer = get(url, **{"leap0-authorization": os.environ["LEAP0_API_KEY"]})
    assert status == 200 and answer["path"] == "/hello?x=1" and answer["key"] is None, (status, answer)
    return answer


def rest(method, path, body=None):
    """A request that client 0.4.0 has no method for."""
    request = urllib.request.Request(
        f"{os.environ['LEAP0_BASE_URL']}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"authorization": f"Bearer {os.environ['LEAP0_API_KEY']}", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        text = answer.read()
        return json.loads(text) if text else None


client = Leap0Client()
size = {"memory": 512, "timeout": 3600} if NEW else {"memory_mib": 512, "timeout_min": 60}
box = client.sandboxes.create(
    template_name=os.environ["TEMPLATE"], vcpu=1, auto_pause=True, env_vars={"GREETING": "hello"}, **size
)
step(f"created {box.id}")
assert client.sandboxes.get(box.id).state == "running"

done = box.process.execute(command="echo $GREETING; hostname; cat /proc/sys/kernel/random/boot_id")
assert done.exit_code == 0 and done.stdout.startswith("hello\n"), done
hostname, boot = done.stdout.split()[1:]
box.filesystem.write_file(path="/root/server.py", content=SERVER)
assert box.filesystem.read_file(path="/root/server.py") == SERVER
listening = f"grep -q ' 0100007F:{PORT:04X} 00000000:0000 0A' /proc/net/tcp"
done = box.process.execute(
    command="setsid python3 /root/server.py > /root/server.log 2>&1 & "
    f"for i in $(seq 300); do {listening} && exit 0; sleep 0.1; done; cat /root/server.log; exit 1"
)
assert done.exit_code == 0, done
step("an app listens")

first = invoke(box)
assert first["count"] == 1, first
step("invoked over HTTPS")
paused = box.pause()
assert (paused or box).state in ("paused", "running"), paused
assert client.sandboxes.get(box.id).state == "paused"
step("paused")
# Asking for it does not wake it.
time.sleep(0.5)
assert client.sandboxes.get(box.id).state == "paused"
woken = invoke(box)
assert (woken["count"], woken["pid"]) == (2, first["pid"]), (first, woken)
assert client.sandboxes.get(box.id).state == "running"
step("woken by a request to its app")

name = f"story-{box.id[-8:]}"
if NEW:
    snapshot = box.create_snapshot(name=name)
    clone = client.snapshots.restore(snapshot_name=name, timeout=3600)
else:
    snapshot = client.snapshots.create(box, name=name)
    clone = client.snapshots.resume(snapshot_name=name, timeout_min=60)
assert snapshot.name == name and clone.id != box.id, (snapshot, clone)
step(f"restored as {clone.id}")
copied, original = invoke(clone), invoke(box)
assert (copied["count"], copied["pid"], original["count"]) == (3, first["pid"], 3), (copied, original)
done = clone.process.execute(command="hostname; cat /proc/sys/kernel/random/boot_id")
assert done.stdout.split()[0] != hostname and done.stdout.split()[1] == boot, (hostname, boot, done)
clone.filesystem.write_file(path="/root/only-here", content="x")
assert not box.filesystem.exists(path="/root/only-here")

session = clone.pty.create(session_id="story", cols=80, rows=24)
connection = clone.pty.connect(session.id)
connection.send("echo $GREETING-$((6 * 7))\n")
seen = b""
while b"hello-42" not in seen:
    seen += connection.recv()
connection.close()
clone.pty.delete(session.id)
step("typed into a terminal")

path = f"/v1/sandbox/{clone.id}/presigned-url"
if NEW:
    link = clone.create_presigned_url(port=PORT, expires_in=600)
    url, link_id = link.url, link.id
else:
    link = rest("POST", path, {"port": PORT, "expires_in": 600})
    url, link_id = link["url"], link["id"]
parts = urlsplit(url)
shared = parts._replace(netloc=f"{parts.hostname}:{DOMAIN.partition(':')[2]}").geturl()
status, answer = get(shared)
assert status == 200 and answer["count"] == 4, (status, answer)
clone.delete_presigned_url(link_id) if NEW else rest("DELETE", f"{path}/{link_id}")
status, answer = get(shared)
assert status in (401, 403, 404), (status, answer)
step("shown to others, and no longer")

clone.delete()
client.snapshots.delete(snapshot)
box.delete()
for gone in (box, clone):
    status, _ = get(gone.invoke_url("/", port=PORT), **{"leap0-authorization": os.environ["LEAP0_API_KEY"]})
    assert status in (404, 409, 410), status
step("deleted")
