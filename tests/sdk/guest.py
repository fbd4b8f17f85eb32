"""Drives a sandbox's guest through the public Python client, unmodified: commands, files, terminals, git.

Environment: LEAP0_API_KEY, LEAP0_BASE_URL; SANDBOX, the id of a sandbox that runs; SCRATCH, a directory in its guest;
PAUSES=1 when it can be paused."""

import os
import sys
import time
import typing

if sys.version_info < (3, 12):
    # Client 0.8.0 needs it, and says so only by failing to import.
    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict

from leap0 import Leap0Client
from leap0.models.filesystem import FileEdit

began = time.monotonic()
client = Leap0Client()
sandbox = os.environ["SANDBOX"]
scratch = os.environ["SCRATCH"]


def step(what):
    print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)


def fails(status, call, *args, **kwargs):
    """The error of a call that must fail with this status."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        assert getattr(error, "status_code", None) == status, (status, getattr(error, "status_code", None), error)
        return str(error)
    raise AssertionError(f"{call} did not fail")


def process():
    run = client.processes.execute if hasattr(client, "processes") else client.process.execute
    done = run(sandbox, command="echo out; echo err >&2; exit 3", cwd=scratch)
    assert (done.exit_code, done.stdout, done.stderr) == (3, "out\n", "err\n"), done
    done = run(sandbox, command="pwd; echo $FROM_SANDBOX", cwd=scratch)
    assert done.stdout == f"{scratch}\nyes\n", done
    if "env" in run.__code__.co_varnames or "env" in getattr(run, "__wrapped__", run).__code__.co_varnames:
        done = run(sandbox, command="echo $GREETING", env={"GREETING": "hello  you"}, cwd=scratch)
        assert done.stdout in ("hello you\n",), done
    done = run(sandbox, command="seq 300000", cwd=scratch)
    assert len(done.stdout) == 1988895, len(done.stdout)
    done = run(sandbox, command="echo begun; sleep 60", timeout=1, cwd=scratch)
    assert (done.exit_code, done.stdout) == (124, "begun\n"), done
    fails(400, run, sandbox, command="true", cwd="/no/such/directory")
    fails(400, run, sandbox, command="")


def files():
    fs = client.filesystem
    root = f"{scratch}/files"
    fs.mkdir(sandbox, path=root)
    fails(409, fs.mkdir, sandbox, path=root)
    fs.mkdir(sandbox, path=f"{root}/a/b", recursive=True, permissions="700")
    fs.write_file(sandbox, path=f"{root}/a/hello.txt", content="hello\nwörld\n")
    assert fs.read_file(sandbox, path=f"{root}/a/hello.txt") == "hello\nwörld\n"
    assert fs.read_file(sandbox, path=f"{root}/a/hello.txt", head=1) == "hello\n"
    assert fs.read_file(sandbox, path=f"{root}/a/hello.txt", tail=1) == "wörld\n"
    assert fs.read_bytes(sandbox, path=f"{root}/a/hello.txt", offset=1, limit=4) == b"ello"
    every = bytes(range(256)) * 40000 + b"\r"
    fs.write_bytes(sandbox, path=f"{root}/bytes", content=every, permissions="0640")
    assert fs.read_bytes(sandbox, path=f"{root}/bytes") == every
    info = fs.stat(sandbox, path=f"{root}/bytes")
    assert (info.size, info.mode, info.is_dir, info.name) == (len(every), "640", False, "bytes"), info
    assert info.owner and info.group and abs(info.mtime - time.time()) < 600, info

    many = {f"{root}/new/x y.txt": every, f"{root}/new/q\"uote%": b"", f"{root}/new/back\\slash": b"\r\n--\r\n\r"}
    fs.write_files_bytes(sandbox, files=many)
    assert fs.read_files_bytes(sandbox, paths=list(many)[:1] + list(many)[2:]) == {
        name: many[name] for name in list(many)[:1] + list(many)[2:]
    }
    fs.write_files(sandbox, files={f"{root}/a/one.py": "one = 1\n", f"{root}/a/two.py": "two = 2\n"})
    assert fs.read_files(sandbox, paths=[f"{root}/a/one.py"]) == {f"{root}/a/one.py": "one = 1\n"}
    assert "missing" in fails(404, fs.read_files, sandbox, paths=[f"{root}/a/one.py", f"{root}/missing"])

    names = [item.name for item in fs.ls(sandbox, path=root).items]
    assert names == ["a", "bytes", "new"], names
    paths = [item.path for item in fs.ls(sandbox, path=root, recursive=True, exclude=["new"]).items]
    assert paths == [f"{root}/{name}" for name in ("a", "a/b", "a/hello.txt", "a/one.py", "a/two.py", "bytes")], paths
    assert fs.glob(sandbox, path=root, pattern="*.py") == [f"{root}/a/one.py", f"{root}/a/two.py"]
    assert fs.glob(sandbox, path=root, pattern="**/*.py", exclude=["two*"]) == [f"{root}/a/one.py"]
    (match,) = fs.grep(sandbox, path=root, pattern="two = ", include="*.py")
    assert (match.path, match.line, match.content) == (f"{root}/a/two.py", 1, "two = 2"), match
    tree = fs.tree(sandbox, path=root, max_depth=2, exclude=["new"])
    assert [(item.name, item.type) for item in tree.items] == [("a", "directory"), ("bytes", "file")], tree
    assert [item.name for item in tree.items[0].children] == ["b", "hello.txt", "one.py", "two.py"], tree

    edited = fs.edit_file(sandbox, path=f"{root}/a/one.py", edits=[FileEdit(find="one", replace="uno"), FileEdit(find=" = 1")])
    assert edited.replacements == 2 and "-one = 1\n+uno\n" in edited.diff, edited
    fails(400, fs.edit_file, sandbox, path=f"{root}/a/one.py", edits=[FileEdit(find="none")])
    results = fs.edit_files(sandbox, paths=[f"{root}/a/two.py", f"{root}/missing"], find="two", replace="dos")
    assert [(r.file, r.success) for r in results] == [(f"{root}/a/two.py", True), (f"{root}/missing", False)], results
    assert results[1].error

    fs.move(sandbox, src_path=f"{root}/a/two.py", dst_path=f"{root}/a/dos.py")
    fails(409, fs.move, sandbox, src_path=f"{root}/a/dos.py", dst_path=f"{root}/a/one.py")
    fs.move(sandbox, src_path=f"{root}/a/dos.py", dst_path=f"{root}/a/one.py", overwrite=True)
    assert fs.read_file(sandbox, path=f"{root}/a/one.py") == "dos = 2\n"
    fs.copy(sandbox, src_path=f"{root}/a", dst_path=f"{root}/c", recursive=True)
    fails(409, fs.copy, sandbox, src_path=f"{root}/a", dst_path=f"{root}/c", recursive=True)
    fails(400, fs.copy, sandbox, src_path=f"{root}/a", dst_path=f"{root}/d")
    assert fs.exists(sandbox, path=f"{root}/c/one.py") and not fs.exists(sandbox, path=f"{root}/d")
    fs.set_permissions(sandbox, path=f"{root}/c/one.py", mode="755", owner="root", group="root")
    assert fs.stat(sandbox, path=f"{root}/c/one.py").mode == "755"
    fails(400, fs.delete, sandbox, path=f"{root}/c")
    fs.delete(sandbox, path=f"{root}/c", recursive=True)
    fails(404, fs.delete, sandbox, path=f"{root}/c")
    fails(404, fs.stat, sandbox, path=f"{root}/c")
    fails(404, fs.read_file, sandbox, path=f"{root}/c")
    assert "is a directory" in fails(400, fs.read_file, sandbox, path=root)
    fails(404, fs.ls, sandbox, path=f"{root}/c")


def system():
    if not hasattr(client.sandboxes, "get_workdir"):
        return
    assert client.sandboxes.get_user_home_dir(sandbox).startswith("/")
    assert client.sandboxes.get_workdir(sandbox).startswith("/")


def until(connection, text, seen=b""):
    while text not in seen:
        seen += connection.recv()
    return seen


def terminals():
    pty = client.pty
    made = pty.create(sandbox, session_id="my terminal/1", cols=100, rows=30, cwd=scratch, envs={"SHOWN": "1"})
    assert (made.id, made.cols, made.rows, made.cwd, made.envs) == ("my terminal/1", 100, 30, scratch, {"SHOWN": "1"}), made
    assert made.active and not made.lazy_start and made.created_at.startswith("20"), made
    fails(409, pty.create, sandbox, session_id="my terminal/1")
    connection = pty.connect(sandbox, made.id)
    connection.send("stty size; echo $SHOWN$FROM_SANDBOX-$((6 * 7))\n")
    seen = until(connection, b"1yes-42")
    assert b"30 100" in seen, seen
    resized = pty.resize(sandbox, made.id, cols=120, rows=40)
    assert (resized.cols, resized.rows) == (120, 40), resized
    connection.send(b"kept=still; stty size\n")
    until(connection, b"40 120")
    connection.close()
    if os.environ.get("PAUSES"):
        step("pause with a terminal")
        client.sandboxes.pause(sandbox)
    # What was shown is shown again, and the shell is the same.
    connection = pty.connect(sandbox, made.id)
    connection.send("echo $kept-here\n")
    assert b"1yes-42" in until(connection, b"still-here")
    assert [session.id for session in pty.list(sandbox)] == [made.id]
    assert pty.get(sandbox, made.id).rows == 40
    connection.send("exit\n")
    try:
        while True:
            connection.recv()
    except Exception as closed:
        assert closed.rcvd.code == 1000, closed
    assert not pty.get(sandbox, made.id).active
    pty.delete(sandbox, made.id)
    fails(404, pty.get, sandbox, made.id)
    fails(404, pty.delete, sandbox, made.id)
    lazy = pty.create(sandbox, lazy_start=True)
    assert lazy.id and lazy.lazy_start and not lazy.active, lazy
    connection = pty.connect(sandbox, lazy.id)
    connection.send("echo $((1 + 1))nd\n")
    until(connection, b"2nd")
    pty.delete(sandbox, lazy.id)


def git():
    git = client.git
    there, here = f"{scratch}/there", f"{scratch}/here"
    run = client.processes.execute if hasattr(client, "processes") else client.process.execute
    made = run(sandbox, command=f"git init -q -b main {there} && cd {there} && git commit -q --allow-empty -m first "
               "&& git config receive.denyCurrentBranch ignore", cwd=scratch)
    # Without a configuration git refuses the commit of a shell; the API's own commit below has a name of its own.
    if made.exit_code:
        assert "tell me who you are" in made.stderr, made
        result = git.commit(sandbox, path=there, message="first", allow_empty=True)
        assert result.result.exit_code == 0, result
        run(sandbox, command=f"git -C {there} config receive.denyCurrentBranch ignore", cwd=scratch)
    done = git.clone(sandbox, url=f"file://{there}", path=here, branch="main", depth=5)
    assert done.exit_code == 0, done
    client.filesystem.write_file(sandbox, path=f"{here}/a b.txt", content="one\n")
    status = git.status(sandbox, path=here)
    assert "# branch.head main" in status.output and '? a b.txt' in status.output, status
    assert git.add(sandbox, path=here, files=["a b.txt"]).exit_code == 0
    assert "+one" in git.diff_staged(sandbox, path=here).output
    done = git.commit(sandbox, path=here, message="second; $(touch /tmp/x)", author="Ann", email="ann@example.com")
    assert len(done.sha) == 40 and done.result.exit_code == 0, done
    log = git.log(sandbox, path=here, max_count=1)
    assert "Ann <ann@example.com>" in log.output and "$(touch /tmp/x)" in log.output and done.sha in log.output, log
    assert "+one" in git.show(sandbox, path=here).output
    client.filesystem.write_file(sandbox, path=f"{here}/a b.txt", content="two\n")
    assert "+two" in git.diff_unstaged(sandbox, path=here, context_lines=0).output
    assert "+two" in git.diff(sandbox, path=here, target="HEAD").output
    assert git.add(sandbox, path=here, files=["."]).exit_code == 0
    assert git.reset(sandbox, path=here).exit_code == 0
    assert git.diff_staged(sandbox, path=here).output == ""
    assert git.create_branch(sandbox, path=here, name="side", checkout=True).exit_code == 0
    assert "* side" in git.branches(sandbox, path=here).output
    assert git.checkout_branch(sandbox, path=here, branch="other", create=True).exit_code == 0
    assert git.checkout_branch(sandbox, path=here, branch="main", create=True).exit_code == 0
    assert git.checkout_branch(sandbox, path=here, branch="none").exit_code != 0
    assert git.delete_branch(sandbox, path=here, name="side").exit_code == 0
    assert "origin/main" in git.branches(sandbox, path=here, branch_type="all").output
    pushed = git.push(sandbox, path=here, set_upstream=True)
    assert pushed.exit_code == 0, pushed
    assert done.sha in git.log(sandbox, path=there).output
    pulled = git.pull(sandbox, path=here, rebase=False)
    assert pulled.exit_code == 0, pulled
    again = git.clone(sandbox, url=f"file://{there}", path=f"{scratch}/at", commit_id=done.sha)
    assert again.exit_code == 0 and client.filesystem.exists(sandbox, path=f"{scratch}/at/a b.txt"), again
    failed = git.commit(sandbox, path=there, message="nothing")
    assert failed.result.exit_code != 0 and failed.sha == "" and "nothing to commit" in failed.result.output, failed
    assert git.status(sandbox, path=f"{scratch}").exit_code == 128
    for bad in ("--upload-pack=touch /tmp/x", "ext::sh -c touch% /tmp/x"):
        fails(400, git.clone, sandbox, url=bad, path=f"{scratch}/bad")
    fails(400, git.checkout_branch, sandbox, path=here, branch="--orphan")
    fails(400, git.status, sandbox, path="/no/such/directory")


for part in (system, process, files, terminals, git):
    step(part.__name__)
    part()
step("all is well")
