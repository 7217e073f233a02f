# ruff: noqa: I001
# Generated from test_client_async.py by scripts/unasync.py: edit that file, then run `python scripts/unasync.py`.
"""The Python API on the fake engine. The sync twin is generated from it (scripts/unasync.py)."""

from __future__ import annotations

import contextlib
import io
import socket
import tarfile
import time
from pathlib import Path

import pytest
from client_home import DIGEST, IMAGE, add_image, paths

import posada as values
import posada as api
from posada.engine.registry import load
from posada.host.paths import Paths

__all__ = ["paths"]

pytestmark = pytest.mark.usefixtures("paths")


def names() -> list[str]:
    """All machines of the host, by name."""
    with api.connect() as host:
        return [vm.record.name for vm in host.vms.list()]


# ---------------------------------------------------------------------- life


def test_with_deletes_the_machine(paths: Paths) -> None:
    with api.run(IMAGE, engine="fake", name="one", cpus=2, memory="1GiB", labels={"a": "b"}) as vm:
        assert (vm.name, vm.state, vm.record.name) == ("one", values.State.RUNNING, "one")
        assert (vm.spec.cpus, vm.spec.memory, vm.labels["a"]) == (2, 1 << 30, "b")
        assert vm.has_agent
        assert "one" in repr(vm)
    with pytest.raises(values.NotFound):
        vm.refresh()
    assert names() == []
    assert list(paths.vms.iterdir()) == []
    assert list(paths.machines.iterdir()) == []


def test_with_deletes_the_machine_after_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError):
        with api.run(IMAGE, engine="fake"):
            raise ZeroDivisionError
    assert names() == []


def test_a_kept_machine_stays() -> None:
    with api.run(IMAGE, engine="fake", name="kept") as vm:
        assert vm.spec.ephemeral
        assert vm.keep() is vm
        assert not vm.spec.ephemeral
    assert vm.state is values.State.RUNNING
    vm.delete()


def test_close_leaves_it_running() -> None:
    vm = api.run(IMAGE, engine="fake", name="left")
    vm.close()
    assert (vm.state, vm.spec.ephemeral) == (values.State.RUNNING, False)
    vm.delete()
    vm.close()  # a machine that is gone has nothing to let go of


def test_keep_from_the_start() -> None:
    vm = api.run(IMAGE, engine="fake", name="mine", keep=True)
    assert not vm.spec.ephemeral
    vm.delete()


def test_closing_the_connection_ends_ephemeral_machines_and_no_others() -> None:
    with api.connect() as host:
        host.run(IMAGE, engine="fake", name="ephemeral")
        kept = host.run(IMAGE, engine="fake", name="ordinary", keep=True)
    assert names() == ["ordinary"]
    with api.connect() as host:
        (host.vms.get(kept.uuid)).delete()


def test_a_machine_that_was_found_is_not_deleted_by_with() -> None:
    with api.connect() as host:
        host.vms.create(IMAGE, engine="fake", name="found")
        with host.vms.get("found") as vm:
            assert vm.state is values.State.CREATED
        assert [v.record.name for v in host.vms.list()] == ["found"]
        vm.delete()


def test_create_start_stop_kill_restart_wait() -> None:
    with api.create(IMAGE, engine="fake", name="plain") as vm:
        assert vm.state is values.State.CREATED
        vm.start()
        assert (vm.exec("true")).ok
        vm.pause()
        assert vm.state is values.State.PAUSED
        with pytest.raises(values.InvalidState):
            vm.exec("true")
        vm.resume()
        vm.restart()
        assert (vm.exec("true")).ok
        vm.stop(timeout=5)
        assert vm.state is values.State.STOPPED
        vm.start()
        vm.kill()
        assert vm.wait(timeout=5) in (values.State.STOPPED, values.State.CRASHED)
    assert names() == []


def test_delete_without_force_refuses_a_machine_that_runs() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        with pytest.raises(values.InvalidState):
            vm.delete(force=False)
        assert vm.state is values.State.RUNNING


def test_list_by_labels_and_get_by_prefix() -> None:
    with api.connect() as host:
        one = host.vms.create(IMAGE, engine="fake", name="one", labels={"team": "a"})
        host.vms.create(IMAGE, engine="fake", name="two", labels={"team": "b"})
        assert [vm.record.name for vm in host.vms.list(labels={"team": "a"})] == ["one"]
        assert (host.vms.get(one.uuid[:8])).uuid == one.uuid
        with pytest.raises(values.NotFound):
            host.vms.get("three")
        for vm in host.vms.list():
            vm.delete()


def test_a_launch_that_fails_leaves_nothing(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load("fake").fail, "start", values.EngineError("no power"))  # type: ignore[attr-defined]
    with pytest.raises(values.EngineError, match="no power"):
        api.run(IMAGE, engine="fake", name="never")
    assert names() == []
    assert list(paths.vms.iterdir()) == []


def test_a_spec_that_is_wrong_names_the_field() -> None:
    with pytest.raises(values.SpecError, match="memory") as caught:
        api.run(IMAGE, engine="fake", memory="12 parsecs")
    assert caught.value.field == "memory"
    with pytest.raises(values.SpecError, match="cpu_count"):
        api.run(IMAGE, engine="fake", cpu_count=2)  # type: ignore[call-arg]


def test_a_whole_spec_and_fields_that_overrule_it() -> None:
    spec = values.make_spec(image=IMAGE, engine="fake", cpus=2, memory="1GiB")
    with api.create(spec=spec, cpus=3, disk="2MiB", lifetime="10m") as vm:
        assert (vm.spec.cpus, vm.spec.memory) == (3, 1 << 30)
        assert (vm.spec.disks[0].size, vm.spec.limits.lifetime) == (2 << 20, 600.0)


def test_a_remote_host_is_refused_clearly() -> None:
    with pytest.raises(values.Unsupported, match="node1"):
        api.connect("https://node1:8443", token="secret")


def test_two_default_connections_are_one() -> None:
    with api.run(IMAGE, engine="fake") as one, api.run(IMAGE, engine="fake") as two:
        assert one._core is two._core


# ---------------------------------------------------------------------- commands


def test_exec_result() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        result = vm.exec("sh", "-c", "echo out; echo err >&2; exit 3")
        assert (result.stdout, result.stderr, result.exit_code, result.signal) == ("out\n", "err\n", 3, None)
        assert (result.ok, result.status, result.stdout_bytes) == (False, 3, b"out\n")
        assert result.duration >= 0
        assert (vm.exec("echo", "a b", "$HOME")).stdout == "a b $HOME\n"
        assert (vm.shell("kill -9 $$")).signal == 9
        assert (vm.shell("echo $A", env={"A": "x y"})).stdout == "x y\n"
        assert (vm.exec("cat", input="text")).stdout == "text"
        assert (vm.exec("cat", input=b"\xff")).stdout_bytes == b"\xff"
        assert (vm.exec("wc", "-c", stdin=io.BytesIO(bytes(1 << 20)))).stdout.strip() == str(1 << 20)


def test_check_raises_what_carries_the_result() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        assert (vm.exec("true", check=True)).ok
        with pytest.raises(values.CommandError, match="status 3") as caught:
            vm.shell("echo why >&2; exit 3", check=True)
        assert caught.value.result.exit_code == 3
        assert "why" in str(caught.value)


def test_timeout_kills_the_command(tmp_path: Path) -> None:
    with api.run(IMAGE, engine="fake") as vm:
        began = time.monotonic()
        with pytest.raises(values.Timeout):
            vm.shell(f"sleep 60; touch {tmp_path}/late", timeout=0.2)
        with pytest.raises(TimeoutError):
            vm.exec("sleep", "60", timeout=0.2)
        assert time.monotonic() - began < 10
        assert (vm.exec("true", timeout=30)).ok


def test_a_command_that_cannot_start() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        with pytest.raises(values.GuestError) as caught:
            vm.exec("/no/such/program")
        assert caught.value.errno_name == "ENOENT"


def test_misuse_of_exec_is_told_at_once() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        with pytest.raises(ValueError, match="command"):
            vm.exec()
        with pytest.raises(TypeError, match="separate strings"):
            vm.exec(["ls", "-l"])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not both"):
            vm.exec("cat", input="a", stdin=io.BytesIO(b"b"))
        with pytest.raises(ValueError, match="stream=True"):
            vm.exec("cat", stdin=True)
        with pytest.raises(ValueError, match="timeout"):
            vm.exec("cat", timeout=0)
        with pytest.raises(TypeError):
            vm.exec("cat", nonsense=1)  # type: ignore[call-arg]


def test_stream() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        with vm.shell("echo out; echo err >&2; exit 4", stream=True) as proc:
            assert proc.pid > 0
            seen = {"stdout": "", "stderr": ""}
            for event in proc:
                seen[event.stream] += event.text
            assert seen == {"stdout": "out\n", "stderr": "err\n"}
            assert (proc.wait()).exit_code == 4


def test_a_stream_that_is_fed() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        with vm.exec("cat", stream=True, stdin=True) as proc:
            proc.write("one\n")
            for event in proc:
                assert event.text == "one\n"
                break
            proc.write(b"two\n")
            proc.close_stdin()
            result = proc.wait()
            assert (result.stdout, result.ok) == ("two\n", True)


def test_signals_and_leaving_a_stream_end_the_command() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        with vm.exec("sleep", "60", stream=True) as proc:
            proc.terminate()
            assert (proc.wait()).signal == 15
        with vm.exec("sleep", "60", stream=True) as proc:
            proc.kill()
            assert (proc.wait()).signal == 9
        began = time.monotonic()
        with vm.exec("sleep", "60", stream=True):
            pass
        assert time.monotonic() - began < 5


def test_timeout_and_check_of_a_stream() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        with vm.shell("echo first; sleep 60", stream=True, timeout=0.3) as proc:
            for event in proc:
                assert event.text == "first\n"
                break
            with pytest.raises(values.Timeout, match="was killed"):
                proc.wait()
        with vm.shell("exit 5", stream=True, check=True) as proc:
            with pytest.raises(values.CommandError):
                proc.wait()


def test_a_guest_that_dies_ends_what_waits_for_it() -> None:
    with api.run(IMAGE, engine="fake", keep=True) as vm:
        vm._owned = True
        with vm.exec("sleep", "60", stream=True) as proc:
            began = time.monotonic()
            vm.kill()
            with pytest.raises(values.GuestGone):
                proc.wait()
            assert time.monotonic() - began < 5


def test_spawn(tmp_path: Path) -> None:
    with api.run(IMAGE, engine="fake") as vm:
        pid = vm.spawn(
            "sh", "-c", f"echo $A > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/out; sleep 60", env={"A": "b"}
        )
        assert pid > 0
        vm.wait_for.command("test", "-e", f"{tmp_path}/out", timeout=10)
        assert (tmp_path / "out").read_text() == "b\n"
        with pytest.raises(ValueError, match="command"):
            vm.spawn()


def test_a_terminal() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        with vm.shell("test -t 1 && stty size", stream=True, pty=(33, 99)) as proc:
            text = ""
            for event in proc:
                text += event.text
            assert (proc.wait()).ok
        assert text.split() == ["33", "99"]


# ---------------------------------------------------------------------- files


def test_files(tmp_path: Path) -> None:
    with api.run(IMAGE, engine="fake") as vm:
        vm.files.write("/a/b.txt", "text", mode=0o600, parents=True)
        assert vm.files.read_text("/a/b.txt") == "text"
        assert vm.files.read_bytes("/a/b.txt", offset=1, length=2) == b"ex"
        info = vm.files.stat("/a/b.txt")
        assert (info.type, info.size, info.mode & 0o777) == (values.FileType.FILE, 4, 0o600)
        assert vm.files.exists("/a")
        assert not vm.files.exists("/a/c")
        vm.files.mkdir("/a/d/e", parents=True)
        assert [entry.name for entry in vm.files.list("/a")] == ["b.txt", "d"]
        vm.files.rename("/a/b.txt", "/a/d/c.txt")
        vm.files.remove("/a", recursive=True)
        assert not vm.files.exists("/a")
        with pytest.raises(values.GuestError) as caught:
            vm.files.read_text("/a")
        assert caught.value.errno_name == "ENOENT"
        vm.files.write("/big", bytes(100))
        with pytest.raises(values.GuestError, match="more than 10 bytes"):
            vm.files.read_bytes("/big", max_size=10)


def test_upload_and_download(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("content")
    with api.run(IMAGE, engine="fake") as vm:
        done = vm.files.upload(source, "/copy")
        assert (done.files, done.bytes) == (1, 7)
        assert vm.files.read_text("/copy/sub/file") == "content"
        vm.files.download("/copy", tmp_path / "back")
        assert (tmp_path / "back" / "sub" / "file").read_text() == "content"
        (tmp_path / "into").mkdir()
        vm.files.download("/copy/sub/file", f"{tmp_path}/into/")
        assert (tmp_path / "into" / "file").read_text() == "content"
        vm.files.upload(str(source / "sub" / "file"), "/one")
        vm.files.download("/one", str(tmp_path / "one"))
        assert (tmp_path / "one").read_text() == "content"


def test_archives() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("dir/file")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with api.run(IMAGE, engine="fake") as vm:
        assert vm.files.write_tar("/t", [buffer.getvalue()]) == len(buffer.getvalue())
        assert vm.files.read_text("/t/dir/file") == "abc"
        back = b""
        for piece in vm.files.read_tar("/t"):
            back += piece
    with tarfile.open(fileobj=io.BytesIO(back)) as archive:
        assert "t/dir/file" in archive.getnames()


# ---------------------------------------------------------------------- branches


def test_snapshot_restore_delete() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        vm.files.write("/state", "before")
        base = vm.snapshot("base")
        assert (base.name, base.kind, base.parent) == ("base", values.SnapshotKind.FULL, None)
        assert base.pause >= 0
        assert (base.vm()).uuid == vm.uuid
        vm.files.write("/state", "after")
        child = vm.snapshot()
        assert child.parent == base.id
        assert [s.name for s in vm.snapshots] == ["base", child.name]
        vm.restore(base)
        assert vm.files.read_text("/state") == "before"
        child.restore()
        assert vm.files.read_text("/state") == "after"
        vm.restore("base")
        with pytest.raises(values.InUse, match=child.name):
            base.delete()
        base.delete(recursive=True)
        assert vm.snapshots == []


def test_fork() -> None:
    with api.run(IMAGE, engine="fake", name="source") as vm, contextlib.ExitStack() as stack:
        vm.files.write("/run/memory", "shared")
        kids = vm.fork(3, names=["a", "b", "c"])
        for kid in kids:
            stack.enter_context(kid)
        assert [kid.name for kid in kids] == ["a", "b", "c"]
        assert [kid.files.read_text("/run/memory") for kid in kids] == ["shared"] * 3
        assert all(kid.spec.ephemeral and kid.record.parent == vm.uuid for kid in kids)
        (grandchild,) = kids[0].fork()
        grandchild.delete()
        assert vm.state is values.State.RUNNING
    assert names() == []


def test_fork_with_the_same_identity(paths: Paths) -> None:
    add_image(paths, "mute:1", "1" * 64, agent=False)
    with api.run("mute:1", engine="fake") as vm:
        with pytest.raises(values.Unsupported, match="would share one identity"):
            vm.fork()
        assert names() == [vm.name]
        for kid in vm.fork(2, same_identity=True):
            with kid:
                assert kid.refresh().state is values.State.RUNNING
    with api.run(IMAGE, engine="fake") as vm:
        with (vm.fork(same_identity=True))[0] as kid:
            assert (kid.exec("true")).ok, "nobody stopped the guest's processes"
    assert names() == []


def test_fork_of_a_snapshot_and_clone() -> None:
    with api.run(IMAGE, engine="fake", name="source") as vm:
        vm.files.write("/x", "1")
        base = vm.snapshot("base")
        vm.files.write("/x", "2")
        (kid,) = base.fork(names=["kid"])
        assert kid.files.read_text("/x") == "1"
        kid.delete()
        with base.clone("copy") as copy:
            assert copy.state is values.State.CREATED
            copy.start()
            assert copy.files.read_text("/x") == "1"
    assert names() == []


def test_a_fork_that_fails_in_part_hands_over_the_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load("fake").fail, "child bad", values.EngineError("stillborn"))  # type: ignore[attr-defined]
    with api.run(IMAGE, engine="fake") as vm:
        with pytest.raises(values.ForkError, match="1 of 3 forks of .* failed: child 1: stillborn") as caught:
            vm.fork(3, names=["good", "bad", "fine"])
        assert [kid.name for kid in caught.value.vms] == ["good", "fine"]
        assert list(caught.value.failures) == [1]
        for kid in caught.value.vms:
            with kid:
                assert (kid.exec("true")).ok
    assert names() == []


# ---------------------------------------------------------------------- changes, and looking at it


def test_resize_rename_disks_ports() -> None:
    with api.create(IMAGE, engine="fake", name="old", ports=[80]) as vm:
        vm.rename("new")
        assert vm.name == "new"
        vm.resize(cpus=2, memory="1GiB", disk=("root", "4MiB"))
        assert (vm.spec.cpus, vm.spec.memory, vm.record.disks[0].size) == (2, 1 << 30, 4 << 20)
        vm.attach_disk("data", size="1MiB")
        assert [disk.name for disk in vm.refresh().disks] == ["root", "data"]
        vm.detach_disk("data")
        assert [disk.name for disk in vm.refresh().disks] == ["root"]
        vm.start()
        port = vm.ports[80]
        assert (port.guest, port.address, port.protocol) == (80, "127.0.0.1", "tcp")
        assert port.url == f"http://127.0.0.1:{port.host}"
        added = vm.add_port(443)
        assert vm.ports[443].url == f"https://127.0.0.1:{added.host}"
        vm.remove_port(443)
        with pytest.raises(LookupError, match=r"443 is not forwarded \(forwarded: 80\)"):
            vm.ports[443]


def test_waiting() -> None:
    with api.run(IMAGE, engine="fake") as vm:
        assert "booted" in vm.wait_for.text(r"boo\w+")
        with socket.create_server(("127.0.0.1", 0)) as server:  # the fake guest's loopback is this host's
            port = server.getsockname()[1]
            vm.wait_for.port(port, timeout=5)
        with pytest.raises(values.Timeout, match=f"port {port}"):
            vm.wait_for.port(port, timeout=0.1)
        vm.files.write("/there", "")
        vm.wait_for.file("/there", timeout=5)
        vm.wait_for.command("true", timeout=5)
        with pytest.raises(values.Timeout):
            vm.wait_for.file("/never", timeout=0.1)
        with pytest.raises(values.Timeout):
            vm.wait_for.command("false", timeout=0.1)
        with pytest.raises(values.Timeout, match="did not print"):
            vm.wait_for.text("never", timeout=0.1)


def test_console_and_logs() -> None:
    with api.run(IMAGE, engine="fake", name="talker") as vm:
        assert "talker booted" in vm.logs()
        with vm.console() as console:
            seen = b""
            console.write("typed\n")
            for data in console:
                seen += data
                if b"typed" in seen:
                    break
        assert b"talker booted" in seen
        usage = vm.usage()
        assert usage.rss > 0


def test_logs_followed_to_the_end() -> None:
    with api.run(IMAGE, engine="fake", name="talker", keep=True) as vm:
        vm._owned = True
        for piece in vm.follow_logs():
            assert b"booted" in piece
            break
        vm.kill()
        rest = b""
        for piece in vm.follow_logs():
            rest += piece
        assert b"booted" in rest


def test_logs_have_the_newlines_of_text(paths: Paths) -> None:
    with api.run(IMAGE, engine="fake") as vm:
        with paths.log(vm.uuid).open("ab") as log:
            log.write(b"one\r\ntwo\r")
            log.flush()
            assert (vm.logs()).endswith("one\ntwo\r")
            seen = b""
            for piece in vm.follow_logs():
                seen += piece
                if seen.endswith(b"one\ntwo"):
                    log.write(b"\nthree\r\n")
                    log.flush()
                if seen.endswith(b"three\n"):
                    break
            assert seen.endswith(b"one\ntwo\nthree\n")


def test_images() -> None:
    with api.connect() as host:
        (image,) = host.images.list()
        assert (image.name, image.digest, image.names, image.agent, image.size) == (
            IMAGE,
            DIGEST,
            (IMAGE,),
            True,
            1 << 20,
        )
        assert (host.images.get(DIGEST[:8])).digest == DIGEST
        with pytest.raises(values.NotFound):
            host.images.get("nothing:9")
        with host.vms.create(IMAGE, engine="fake", name="user"):
            with pytest.raises(values.InUse, match="user"):
                image.remove()
        image.remove()
        assert host.images.list() == []


def test_operations_and_events() -> None:
    with api.connect() as host:
        with host.run(IMAGE, engine="fake", name="seen") as vm:
            vm.snapshot("s")
        operations = host.operations.list()
        assert {"create", "start", "snapshot"} <= {operation.kind for operation in operations}
        done = host.operations.get(operations[0].id)
        assert (done.state, done.progress) == (values.OperationState.DONE, 1.0)
        assert (done.wait()).state is values.OperationState.DONE
        done.cancel()
        with pytest.raises(values.NotFound):
            host.operations.get("nothing")
        events = host.events.list()
        assert "vm.created" in [event.kind for event in events]
        for event in host.events.follow(after=events[0].id):
            assert event.id == events[1].id
            break


def test_doctor_capabilities_recover() -> None:
    with api.connect() as host:
        assert all(check.name for check in host.doctor())
        assert (host.capabilities("fake")).has(values.Feature.FORK)
        assert (host.recover()).problems == ()


def test_progress_is_told() -> None:
    told: list[str] = []
    with api.run(IMAGE, engine="fake", name="slow", progress=lambda fraction, message: told.append(message)):
        assert any("slow" in message for message in told)
