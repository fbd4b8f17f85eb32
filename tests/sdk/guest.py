"""Drives a sandbox's guest through the public Python client, unmodified: commands, files, terminals, git.

Environment: LEAP0_API_KEY, LEAP0_BASE_URL; SANDBOX, the id of a sandbox that runs; SCRATCH, a directory in its guest;
PAUSES=1 when it can be paused."""

import os
import sys
import time
import typing
from importlib.metadata import version

if sys.version_info < (3, 12):
    # Client 0.8.0 needs it, and says so only by failing to import.
    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict

from leap0 import Leap0Client
from leap0.models.filesystem import FileEdit

began = time.monotonic()
client = Leap0Client()
box = client.sandboxes.get(os.environ["SANDBOX"])
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
    run = box.process.execute
    done = run(command="echo out; echo err >&2; exit 3", cwd=scratch)
    assert (done.exit_code, done.stdout, done.stderr) == (3, "out\n", "err\n"), done
    done = run(command="pwd; echo $FROM_SANDBOX", cwd=scratch)
    assert done.stdout == f"{scratch}\nyes\n", done
    if version("leap0") != "0.4.0":
        done = run(command="echo $GREETING", env={"GREETING": "hello  you"}, cwd=scratch)
        assert done.stdout == "hello you\n", done
    done = run(command="seq 300000", cwd=scratch)
    assert len(done.stdout) == 1988895, len(done.stdout)
    done = run(command="echo begun; sleep 60", timeout=1, cwd=scratch)
    assert (done.exit_code, done.stdout) == (124, "begun\n"), done
    fails(400, run, command="true", cwd="/no/such/directory")
    fails(400, run, command="")


def files():
    fs = box.filesystem
    root = f"{scratch}/files"
    fs.mkdir(path=root)
    fails(409, fs.mkdir, path=root)
    fs.mkdir(path=f"{root}/a/b", recursive=True, permissions="700")
    fs.write_file(path=f"{root}/a/hello.txt", content="hello\nwörld\n")
    assert fs.read_file(path=f"{root}/a/hello.txt") == "hello\nwörld\n"
    assert fs.read_file(path=f"{root}/a/hello.txt", head=1) == "hello\n"
    assert fs.read_file(path=f"{root}/a/hello.txt", tail=1) == "wörld\n"
    assert fs.read_bytes(path=f"{root}/a/hello.txt", offset=1, limit=4) == b"ello"
    every = bytes(range(256)) * 40000 + b"\r"
    fs.write_bytes(path=f"{root}/bytes", content=every, permissions="0640")
    assert fs.read_bytes(path=f"{root}/bytes") == every
    info = fs.stat(path=f"{root}/bytes")
    assert (info.size, info.mode, info.is_dir, info.name) == (len(every), "640", False, "bytes"), info
    assert info.owner and info.group and abs(info.mtime - time.time()) < 600, info

    many = {f"{root}/new/x y.txt": every, f"{root}/new/q\"uote%": b"", f"{root}/new/back\\slash": b"\r\n--\r\n\r"}
    fs.write_files_bytes(files=many)
    assert fs.read_files_bytes(paths=list(many)[:1] + list(many)[2:]) == {
        name: many[name] for name in list(many)[:1] + list(many)[2:]
    }
    fs.write_files(files={f"{root}/a/one.py": "one = 1\n", f"{root}/a/two.py": "two = 2\n"})
    assert fs.read_files(paths=[f"{root}/a/one.py"]) == {f"{root}/a/one.py": "one = 1\n"}
    assert "missing" in fails(404, fs.read_files, paths=[f"{root}/a/one.py", f"{root}/missing"])

    names = [item.name for item in fs.ls(path=root).items]
    assert names == ["a", "bytes", "new"], names
    paths = [item.path for item in fs.ls(path=root, recursive=True, exclude=["new"]).items]
    assert paths == [f"{root}/{name}" for name in ("a", "a/b", "a/hello.txt", "a/one.py", "a/two.py", "bytes")], paths
    assert fs.glob(path=root, pattern="*.py") == [f"{root}/a/one.py", f"{root}/a/two.py"]
    assert fs.glob(path=root, pattern="**/*.py", exclude=["two*"]) == [f"{root}/a/one.py"]
    (match,) = fs.grep(path=root, pattern="two = ", include="*.py")
    assert (match.path, match.line, match.content) == (f"{root}/a/two.py", 1, "two = 2"), match
    tree = fs.tree(path=root, max_depth=2, exclude=["new"])
    assert [(item.name, item.type) for item in tree.items] == [("a", "directory"), ("bytes", "file")], tree
    assert [item.name for item in tree.items[0].children] == ["b", "hello.txt", "one.py", "two.py"], tree

    edited = fs.edit_file(path=f"{root}/a/one.py", edits=[FileEdit(find="one", replace="uno"), FileEdit(find=" = 1")])
    assert edited.replacements == 2 and "-one = 1\n+uno\n" in edited.diff, edited
    fails(400, fs.edit_file, path=f"{root}/a/one.py", edits=[FileEdit(find="none")])
    results = fs.edit_files(paths=[f"{root}/a/two.py", f"{root}/missing"], find="two", replace="dos")
    assert [(r.file, r.success) for r in results] == [(f"{root}/a/two.py", True), (f"{root}/missing", False)], results
    assert results[1].error

    fs.move(src_path=f"{root}/a/two.py", dst_path=f"{root}/a/dos.py")
    fails(409, fs.move, src_path=f"{root}/a/dos.py", dst_path=f"{root}/a/one.py")
    fs.move(src_path=f"{root}/a/dos.py", dst_path=f"{root}/a/one.py", overwrite=True)
    assert fs.read_file(path=f"{root}/a/one.py") == "dos = 2\n"
    fs.copy(src_path=f"{root}/a", dst_path=f"{root}/c", recursive=True)
    fails(409, fs.copy, src_path=f"{root}/a", dst_path=f"{root}/c", recursive=True)
    fails(400, fs.copy, src_path=f"{root}/a", dst_path=f"{root}/d")
    assert fs.exists(path=f"{root}/c/one.py") and not fs.exists(path=f"{root}/d")
    fs.set_permissions(path=f"{root}/c/one.py", mode="755", owner="root", group="root")
    assert fs.stat(path=f"{root}/c/one.py").mode == "755"
    fails(400, fs.delete, path=f"{root}/c")
    fs.delete(path=f"{root}/c", recursive=True)
    fails(404, fs.delete, path=f"{root}/c")
    fails(404, fs.stat, path=f"{root}/c")
    fails(404, fs.read_file, path=f"{root}/c")
    assert "is a directory" in fails(400, fs.read_file, path=root)
    fails(404, fs.ls, path=f"{root}/c")


def system():
    if not hasattr(box, "get_workdir"):
        return
    assert box.get_user_home_dir().startswith("/")
    assert box.get_workdir().startswith("/")


def until(connection, text, seen=b""):
    while text not in seen:
        seen += connection.recv()
    return seen


def end_of(connection):
    """The code that the server closes a connection with."""
    try:
        while True:
            connection.recv()
    except Exception as closed:
        return closed.rcvd and closed.rcvd.code


def terminals():
    pty = box.pty
    made = pty.create(session_id="my terminal/1", cols=100, rows=30, cwd=scratch, envs={"SHOWN": "1"})
    assert (made.id, made.cols, made.rows, made.cwd, made.envs) == ("my terminal/1", 100, 30, scratch, {"SHOWN": "1"}), made
    assert made.active and not made.lazy_start and made.created_at.startswith("20"), made
    fails(409, pty.create, session_id="my terminal/1")
    connection = pty.connect(made.id)
    connection.send("stty size; echo $SHOWN$FROM_SANDBOX-$((6 * 7))\n")
    seen = until(connection, b"1yes-42")
    assert b"30 100" in seen, seen
    resized = pty.resize(made.id, cols=120, rows=40)
    assert (resized.cols, resized.rows) == (120, 40), resized
    connection.send(b"kept=still; stty size\n")
    until(connection, b"40 120")
    connection.close()
    if os.environ.get("PAUSES"):
        step("pause with a terminal")
        watching = pty.connect(made.id)
        box.pause()
        assert end_of(watching) == 1012
    # What was shown is shown again, and the shell is the same.
    connection = pty.connect(made.id)
    connection.send("echo $kept-here\n")
    assert b"1yes-42" in until(connection, b"still-here")
    assert [session.id for session in pty.list()] == [made.id]
    assert pty.get(made.id).rows == 40
    connection.send("exit\n")
    assert end_of(connection) == 1000
    assert not pty.get(made.id).active
    pty.delete(made.id)
    fails(404, pty.get, made.id)
    fails(404, pty.delete, made.id)
    lazy = pty.create(lazy_start=True)
    assert lazy.id and lazy.lazy_start and not lazy.active, lazy
    connection = pty.connect(lazy.id)
    connection.send("echo $((1 + 1))nd\n")
    until(connection, b"2nd")
    pty.delete(lazy.id)


def git():
    git = box.git
    there, here = f"{scratch}/there", f"{scratch}/here"
    run = box.process.execute
    made = run(command=f"git init -q -b main {there} && cd {there} && git commit -q --allow-empty -m first "
               "&& git config receive.denyCurrentBranch ignore", cwd=scratch)
    # Without a configuration git refuses the commit of a shell; the API's own commit below has a name of its own.
    if made.exit_code:
        assert "tell me who you are" in made.stderr, made
        result = git.commit(path=there, message="first", allow_empty=True)
        assert result.result.exit_code == 0, result
        run(command=f"git -C {there} config receive.denyCurrentBranch ignore", cwd=scratch)
    done = git.clone(url=f"file://{there}", path=here, branch="main", depth=5)
    assert done.exit_code == 0, done
    box.filesystem.write_file(path=f"{here}/a b.txt", content="one\n")
    status = git.status(path=here)
    assert "# branch.head main" in status.output and '? a b.txt' in status.output, status
    assert git.add(path=here, files=["a b.txt"]).exit_code == 0
    assert "+one" in git.diff_staged(path=here).output
    done = git.commit(path=here, message="second; $(touch /tmp/x)", author="Ann", email="ann@example.com")
    assert len(done.sha) == 40 and done.result.exit_code == 0, done
    log = git.log(path=here, max_count=1)
    assert "Ann <ann@example.com>" in log.output and "$(touch /tmp/x)" in log.output and done.sha in log.output, log
    assert "+one" in git.show(path=here).output
    box.filesystem.write_file(path=f"{here}/a b.txt", content="two\n")
    assert "+two" in git.diff_unstaged(path=here, context_lines=0).output
    assert "+two" in git.diff(path=here, target="HEAD").output
    assert git.add(path=here, files=["."]).exit_code == 0
    assert git.reset(path=here).exit_code == 0
    assert git.diff_staged(path=here).output == ""
    assert git.create_branch(path=here, name="side", checkout=True).exit_code == 0
    assert "* side" in git.branches(path=here).output
    assert git.checkout_branch(path=here, branch="other", create=True).exit_code == 0
    assert git.checkout_branch(path=here, branch="main", create=True).exit_code == 0
    assert git.checkout_branch(path=here, branch="none").exit_code != 0
    assert git.delete_branch(path=here, name="side").exit_code == 0
    assert "origin/main" in git.branches(path=here, branch_type="all").output
    pushed = git.push(path=here, set_upstream=True)
    assert pushed.exit_code == 0, pushed
    assert done.sha in git.log(path=there).output
    pulled = git.pull(path=here, rebase=False)
    assert pulled.exit_code == 0, pulled
    again = git.clone(url=f"file://{there}", path=f"{scratch}/at", commit_id=done.sha)
    assert again.exit_code == 0 and box.filesystem.exists(path=f"{scratch}/at/a b.txt"), again
    failed = git.commit(path=f"{scratch}/at", message="nothing")
    assert failed.result.exit_code != 0 and failed.sha == "" and "nothing to commit" in failed.result.output, failed
    assert git.status(path=f"{scratch}").exit_code == 128
    for bad in ("--upload-pack=touch /tmp/x", "ext::sh -c touch% /tmp/x"):
        fails(400, git.clone, url=bad, path=f"{scratch}/bad")
    fails(400, git.checkout_branch, path=here, branch="--orphan")
    fails(400, git.status, path="/no/such/directory")


for part in (system, process, files, terminals, git):
    step(part.__name__)
    part()
step("all is well")
