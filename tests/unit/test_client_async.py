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
from posada import aio as api
from posada.engine.registry import load
from posada.host.paths import Paths

__all__ = ["paths"]

pytestmark = pytest.mark.usefixtures("paths")


async def names() -> list[str]:
    """All machines of the host, by name."""
    async with api.connect() as host:
        return [vm.record.name for vm in await host.vms.list()]


# ---------------------------------------------------------------------- life


async def test_with_deletes_the_machine(paths: Paths) -> None:
    async with api.run(IMAGE, engine="fake", name="one", cpus=2, memory="1GiB", labels={"a": "b"}) as vm:
        assert (vm.name, vm.state, vm.record.name) == ("one", values.State.RUNNING, "one")
        assert (vm.spec.cpus, vm.spec.memory, vm.labels["a"]) == (2, 1 << 30, "b")
        assert vm.has_agent
        assert "one" in repr(vm)
    with pytest.raises(values.NotFound):
        vm.refresh()
    assert await names() == []
    assert list(paths.vms.iterdir()) == []
    assert list(paths.machines.iterdir()) == []


async def test_with_deletes_the_machine_after_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError):
        async with api.run(IMAGE, engine="fake"):
            raise ZeroDivisionError
    assert await names() == []


async def test_a_kept_machine_stays() -> None:
    async with api.run(IMAGE, engine="fake", name="kept") as vm:
        assert vm.spec.ephemeral
        assert await vm.keep() is vm
        assert not vm.spec.ephemeral
    assert vm.state is values.State.RUNNING
    await vm.delete()


async def test_close_leaves_it_running() -> None:
    vm = await api.run(IMAGE, engine="fake", name="left")
    await vm.close()
    assert (vm.state, vm.spec.ephemeral) == (values.State.RUNNING, False)
    await vm.delete()
    await vm.close()  # a machine that is gone has nothing to let go of


async def test_keep_from_the_start() -> None:
    vm = await api.run(IMAGE, engine="fake", name="mine", keep=True)
    assert not vm.spec.ephemeral
    await vm.delete()


async def test_closing_the_connection_ends_ephemeral_machines_and_no_others() -> None:
    async with api.connect() as host:
        await host.run(IMAGE, engine="fake", name="ephemeral")
        kept = await host.run(IMAGE, engine="fake", name="ordinary", keep=True)
    assert await names() == ["ordinary"]
    async with api.connect() as host:
        await (await host.vms.get(kept.uuid)).delete()


async def test_a_machine_that_was_found_is_not_deleted_by_with() -> None:
    async with api.connect() as host:
        await host.vms.create(IMAGE, engine="fake", name="found")
        async with host.vms.get("found") as vm:
            assert vm.state is values.State.CREATED
        assert [v.record.name for v in await host.vms.list()] == ["found"]
        await vm.delete()


async def test_create_start_stop_kill_restart_wait() -> None:
    async with api.create(IMAGE, engine="fake", name="plain") as vm:
        assert vm.state is values.State.CREATED
        await vm.start()
        assert (await vm.exec("true")).ok
        await vm.pause()
        assert vm.state is values.State.PAUSED
        with pytest.raises(values.InvalidState):
            await vm.exec("true")
        await vm.resume()
        await vm.restart()
        assert (await vm.exec("true")).ok
        await vm.stop(timeout=5)
        assert vm.state is values.State.STOPPED
        await vm.start()
        await vm.kill()
        assert await vm.wait(timeout=5) in (values.State.STOPPED, values.State.CRASHED)
    assert await names() == []


async def test_delete_without_force_refuses_a_machine_that_runs() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        with pytest.raises(values.InvalidState):
            await vm.delete(force=False)
        assert vm.state is values.State.RUNNING


async def test_list_by_labels_and_get_by_prefix() -> None:
    async with api.connect() as host:
        one = await host.vms.create(IMAGE, engine="fake", name="one", labels={"team": "a"})
        await host.vms.create(IMAGE, engine="fake", name="two", labels={"team": "b"})
        assert [vm.record.name for vm in await host.vms.list(labels={"team": "a"})] == ["one"]
        assert (await host.vms.get(one.uuid[:8])).uuid == one.uuid
        with pytest.raises(values.NotFound):
            await host.vms.get("three")
        for vm in await host.vms.list():
            await vm.delete()


async def test_a_launch_that_fails_leaves_nothing(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load("fake").fail, "start", values.EngineError("no power"))  # type: ignore[attr-defined]
    with pytest.raises(values.EngineError, match="no power"):
        await api.run(IMAGE, engine="fake", name="never")
    assert await names() == []
    assert list(paths.vms.iterdir()) == []


async def test_a_spec_that_is_wrong_names_the_field() -> None:
    with pytest.raises(values.SpecError, match="memory") as caught:
        await api.run(IMAGE, engine="fake", memory="12 parsecs")
    assert caught.value.field == "memory"
    with pytest.raises(values.SpecError, match="cpu_count"):
        await api.run(IMAGE, engine="fake", cpu_count=2)  # type: ignore[call-arg]


async def test_a_whole_spec_and_fields_that_overrule_it() -> None:
    spec = values.make_spec(image=IMAGE, engine="fake", cpus=2, memory="1GiB")
    async with api.create(spec=spec, cpus=3, disk="2MiB", lifetime="10m") as vm:
        assert (vm.spec.cpus, vm.spec.memory) == (3, 1 << 30)
        assert (vm.spec.disks[0].size, vm.spec.limits.lifetime) == (2 << 20, 600.0)


async def test_a_remote_host_is_refused_clearly() -> None:
    with pytest.raises(values.Unsupported, match="node1"):
        await api.connect("https://node1:8443", token="secret")


async def test_two_default_connections_are_one() -> None:
    async with api.run(IMAGE, engine="fake") as one, api.run(IMAGE, engine="fake") as two:
        assert one._core is two._core


# ---------------------------------------------------------------------- commands


async def test_exec_result() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        result = await vm.exec("sh", "-c", "echo out; echo err >&2; exit 3")
        assert (result.stdout, result.stderr, result.exit_code, result.signal) == ("out\n", "err\n", 3, None)
        assert (result.ok, result.status, result.stdout_bytes) == (False, 3, b"out\n")
        assert result.duration >= 0
        assert (await vm.exec("echo", "a b", "$HOME")).stdout == "a b $HOME\n"
        assert (await vm.shell("kill -9 $$")).signal == 9
        assert (await vm.shell("echo $A", env={"A": "x y"})).stdout == "x y\n"
        assert (await vm.exec("cat", input="text")).stdout == "text"
        assert (await vm.exec("cat", input=b"\xff")).stdout_bytes == b"\xff"
        assert (await vm.exec("wc", "-c", stdin=io.BytesIO(bytes(1 << 20)))).stdout.strip() == str(1 << 20)


async def test_check_raises_what_carries_the_result() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        assert (await vm.exec("true", check=True)).ok
        with pytest.raises(values.CommandError, match="status 3") as caught:
            await vm.shell("echo why >&2; exit 3", check=True)
        assert caught.value.result.exit_code == 3
        assert "why" in str(caught.value)


async def test_timeout_kills_the_command(tmp_path: Path) -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        began = time.monotonic()
        with pytest.raises(values.Timeout):
            await vm.shell(f"sleep 60; touch {tmp_path}/late", timeout=0.2)
        with pytest.raises(TimeoutError):
            await vm.exec("sleep", "60", timeout=0.2)
        assert time.monotonic() - began < 10
        assert (await vm.exec("true", timeout=30)).ok


async def test_a_command_that_cannot_start() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        with pytest.raises(values.GuestError) as caught:
            await vm.exec("/no/such/program")
        assert caught.value.errno_name == "ENOENT"


async def test_misuse_of_exec_is_told_at_once() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        with pytest.raises(ValueError, match="command"):
            await vm.exec()
        with pytest.raises(TypeError, match="separate strings"):
            await vm.exec(["ls", "-l"])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not both"):
            await vm.exec("cat", input="a", stdin=io.BytesIO(b"b"))
        with pytest.raises(ValueError, match="stream=True"):
            await vm.exec("cat", stdin=True)
        with pytest.raises(ValueError, match="timeout"):
            await vm.exec("cat", timeout=0)
        with pytest.raises(TypeError):
            await vm.exec("cat", nonsense=1)  # type: ignore[call-arg]


async def test_stream() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        async with vm.shell("echo out; echo err >&2; exit 4", stream=True) as proc:
            assert proc.pid > 0
            seen = {"stdout": "", "stderr": ""}
            async for event in proc:
                seen[event.stream] += event.text
            assert seen == {"stdout": "out\n", "stderr": "err\n"}
            assert (await proc.wait()).exit_code == 4


async def test_a_stream_that_is_fed() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        async with vm.exec("cat", stream=True, stdin=True) as proc:
            await proc.write("one\n")
            async for event in proc:
                assert event.text == "one\n"
                break
            await proc.write(b"two\n")
            await proc.close_stdin()
            result = await proc.wait()
            assert (result.stdout, result.ok) == ("two\n", True)


async def test_signals_and_leaving_a_stream_end_the_command() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        async with vm.exec("sleep", "60", stream=True) as proc:
            await proc.terminate()
            assert (await proc.wait()).signal == 15
        async with vm.exec("sleep", "60", stream=True) as proc:
            await proc.kill()
            assert (await proc.wait()).signal == 9
        began = time.monotonic()
        async with vm.exec("sleep", "60", stream=True):
            pass
        assert time.monotonic() - began < 5


async def test_timeout_and_check_of_a_stream() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        async with vm.shell("echo first; sleep 60", stream=True, timeout=0.3) as proc:
            async for event in proc:
                assert event.text == "first\n"
                break
            with pytest.raises(values.Timeout, match="was killed"):
                await proc.wait()
        async with vm.shell("exit 5", stream=True, check=True) as proc:
            with pytest.raises(values.CommandError):
                await proc.wait()


async def test_a_guest_that_dies_ends_what_waits_for_it() -> None:
    async with api.run(IMAGE, engine="fake", keep=True) as vm:
        vm._owned = True
        async with vm.exec("sleep", "60", stream=True) as proc:
            began = time.monotonic()
            await vm.kill()
            with pytest.raises(values.GuestGone):
                await proc.wait()
            assert time.monotonic() - began < 5


async def test_spawn(tmp_path: Path) -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        pid = await vm.spawn(
            "sh", "-c", f"echo $A > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/out; sleep 60", env={"A": "b"}
        )
        assert pid > 0
        await vm.wait_for.command("test", "-e", f"{tmp_path}/out", timeout=10)
        assert (tmp_path / "out").read_text() == "b\n"
        with pytest.raises(ValueError, match="command"):
            await vm.spawn()


async def test_a_terminal() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        async with vm.shell("test -t 1 && stty size", stream=True, pty=(33, 99)) as proc:
            text = ""
            async for event in proc:
                text += event.text
            assert (await proc.wait()).ok
        assert text.split() == ["33", "99"]


# ---------------------------------------------------------------------- files


async def test_files(tmp_path: Path) -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        await vm.files.write("/a/b.txt", "text", mode=0o600, parents=True)
        assert await vm.files.read_text("/a/b.txt") == "text"
        assert await vm.files.read_bytes("/a/b.txt", offset=1, length=2) == b"ex"
        info = await vm.files.stat("/a/b.txt")
        assert (info.type, info.size, info.mode & 0o777) == (values.FileType.FILE, 4, 0o600)
        assert await vm.files.exists("/a")
        assert not await vm.files.exists("/a/c")
        await vm.files.mkdir("/a/d/e", parents=True)
        assert [entry.name for entry in await vm.files.list("/a")] == ["b.txt", "d"]
        await vm.files.rename("/a/b.txt", "/a/d/c.txt")
        await vm.files.remove("/a", recursive=True)
        assert not await vm.files.exists("/a")
        with pytest.raises(values.GuestError) as caught:
            await vm.files.read_text("/a")
        assert caught.value.errno_name == "ENOENT"
        await vm.files.write("/big", bytes(100))
        with pytest.raises(values.GuestError, match="more than 10 bytes"):
            await vm.files.read_bytes("/big", max_size=10)


async def test_upload_and_download(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("content")
    async with api.run(IMAGE, engine="fake") as vm:
        done = await vm.files.upload(source, "/copy")
        assert (done.files, done.bytes) == (1, 7)
        assert await vm.files.read_text("/copy/sub/file") == "content"
        await vm.files.download("/copy", tmp_path / "back")
        assert (tmp_path / "back" / "sub" / "file").read_text() == "content"
        (tmp_path / "into").mkdir()
        await vm.files.download("/copy/sub/file", f"{tmp_path}/into/")
        assert (tmp_path / "into" / "file").read_text() == "content"
        await vm.files.upload(str(source / "sub" / "file"), "/one")
        await vm.files.download("/one", str(tmp_path / "one"))
        assert (tmp_path / "one").read_text() == "content"


async def test_archives() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("dir/file")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    async with api.run(IMAGE, engine="fake") as vm:
        assert await vm.files.write_tar("/t", [buffer.getvalue()]) == len(buffer.getvalue())
        assert await vm.files.read_text("/t/dir/file") == "abc"
        back = b""
        async for piece in vm.files.read_tar("/t"):
            back += piece
    with tarfile.open(fileobj=io.BytesIO(back)) as archive:
        assert "t/dir/file" in archive.getnames()


# ---------------------------------------------------------------------- branches


async def test_snapshot_restore_delete() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        await vm.files.write("/state", "before")
        base = await vm.snapshot("base")
        assert (base.name, base.kind, base.parent) == ("base", values.SnapshotKind.FULL, None)
        assert base.pause >= 0
        assert (await base.vm()).uuid == vm.uuid
        await vm.files.write("/state", "after")
        child = await vm.snapshot()
        assert child.parent == base.id
        assert [s.name for s in vm.snapshots] == ["base", child.name]
        await vm.restore(base)
        assert await vm.files.read_text("/state") == "before"
        await child.restore()
        assert await vm.files.read_text("/state") == "after"
        await vm.restore("base")
        with pytest.raises(values.InUse, match=child.name):
            await base.delete()
        await base.delete(recursive=True)
        assert vm.snapshots == []


async def test_fork() -> None:
    async with api.run(IMAGE, engine="fake", name="source") as vm, contextlib.AsyncExitStack() as stack:
        await vm.files.write("/run/memory", "shared")
        kids = await vm.fork(3, names=["a", "b", "c"])
        for kid in kids:
            await stack.enter_async_context(kid)
        assert [kid.name for kid in kids] == ["a", "b", "c"]
        assert [await kid.files.read_text("/run/memory") for kid in kids] == ["shared"] * 3
        assert all(kid.spec.ephemeral and kid.record.parent == vm.uuid for kid in kids)
        (grandchild,) = await kids[0].fork()
        await grandchild.delete()
        assert vm.state is values.State.RUNNING
    assert await names() == []


async def test_fork_with_the_same_identity(paths: Paths) -> None:
    add_image(paths, "mute:1", "1" * 64, agent=False)
    async with api.run("mute:1", engine="fake") as vm:
        with pytest.raises(values.Unsupported, match="would share one identity"):
            await vm.fork()
        assert await names() == [vm.name]
        for kid in await vm.fork(2, same_identity=True):
            async with kid:
                assert kid.refresh().state is values.State.RUNNING
    async with api.run(IMAGE, engine="fake") as vm:
        async with (await vm.fork(same_identity=True))[0] as kid:
            assert (await kid.exec("true")).ok, "nobody stopped the guest's processes"
    assert await names() == []


async def test_fork_of_a_snapshot_and_clone() -> None:
    async with api.run(IMAGE, engine="fake", name="source") as vm:
        await vm.files.write("/x", "1")
        base = await vm.snapshot("base")
        await vm.files.write("/x", "2")
        (kid,) = await base.fork(names=["kid"])
        assert await kid.files.read_text("/x") == "1"
        await kid.delete()
        async with base.clone("copy") as copy:
            assert copy.state is values.State.CREATED
            await copy.start()
            assert await copy.files.read_text("/x") == "1"
    assert await names() == []


async def test_a_fork_that_fails_in_part_hands_over_the_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load("fake").fail, "child bad", values.EngineError("stillborn"))  # type: ignore[attr-defined]
    async with api.run(IMAGE, engine="fake") as vm:
        with pytest.raises(values.ForkError, match="1 of 3 forks of .* failed: child 1: stillborn") as caught:
            await vm.fork(3, names=["good", "bad", "fine"])
        assert [kid.name for kid in caught.value.vms] == ["good", "fine"]
        assert list(caught.value.failures) == [1]
        for kid in caught.value.vms:
            async with kid:
                assert (await kid.exec("true")).ok
    assert await names() == []


# ---------------------------------------------------------------------- changes, and looking at it


async def test_resize_rename_disks_ports() -> None:
    async with api.create(IMAGE, engine="fake", name="old", ports=[80]) as vm:
        await vm.rename("new")
        assert vm.name == "new"
        await vm.resize(cpus=2, memory="1GiB", disk=("root", "4MiB"))
        assert (vm.spec.cpus, vm.spec.memory, vm.record.disks[0].size) == (2, 1 << 30, 4 << 20)
        await vm.attach_disk("data", size="1MiB")
        assert [disk.name for disk in vm.refresh().disks] == ["root", "data"]
        await vm.detach_disk("data")
        assert [disk.name for disk in vm.refresh().disks] == ["root"]
        await vm.start()
        port = vm.ports[80]
        assert (port.guest, port.address, port.protocol) == (80, "127.0.0.1", "tcp")
        assert port.url == f"http://127.0.0.1:{port.host}"
        added = await vm.add_port(443)
        assert vm.ports[443].url == f"https://127.0.0.1:{added.host}"
        await vm.remove_port(443)
        with pytest.raises(LookupError, match=r"443 is not forwarded \(forwarded: 80\)"):
            vm.ports[443]


async def test_waiting() -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        assert "booted" in await vm.wait_for.text(r"boo\w+")
        with socket.create_server(("127.0.0.1", 0)) as server:  # the fake guest's loopback is this host's
            port = server.getsockname()[1]
            await vm.wait_for.port(port, timeout=5)
        with pytest.raises(values.Timeout, match=f"port {port}"):
            await vm.wait_for.port(port, timeout=0.1)
        await vm.files.write("/there", "")
        await vm.wait_for.file("/there", timeout=5)
        await vm.wait_for.command("true", timeout=5)
        with pytest.raises(values.Timeout):
            await vm.wait_for.file("/never", timeout=0.1)
        with pytest.raises(values.Timeout):
            await vm.wait_for.command("false", timeout=0.1)
        with pytest.raises(values.Timeout, match="did not print"):
            await vm.wait_for.text("never", timeout=0.1)


async def test_console_and_logs() -> None:
    async with api.run(IMAGE, engine="fake", name="talker") as vm:
        assert "talker booted" in await vm.logs()
        async with vm.console() as console:
            seen = b""
            await console.write("typed\n")
            async for data in console:
                seen += data
                if b"typed" in seen:
                    break
        assert b"talker booted" in seen
        usage = await vm.usage()
        assert usage.rss > 0


async def test_logs_followed_to_the_end() -> None:
    async with api.run(IMAGE, engine="fake", name="talker", keep=True) as vm:
        vm._owned = True
        async for piece in vm.follow_logs():
            assert b"booted" in piece
            break
        await vm.kill()
        rest = b""
        async for piece in vm.follow_logs():
            rest += piece
        assert b"booted" in rest


async def test_logs_have_the_newlines_of_text(paths: Paths) -> None:
    async with api.run(IMAGE, engine="fake") as vm:
        with paths.log(vm.uuid).open("ab") as log:
            log.write(b"one\r\ntwo\r")
            log.flush()
            assert (await vm.logs()).endswith("one\ntwo\r")
            seen = b""
            async for piece in vm.follow_logs():
                seen += piece
                if seen.endswith(b"one\ntwo"):
                    log.write(b"\nthree\r\n")
                    log.flush()
                if seen.endswith(b"three\n"):
                    break
            assert seen.endswith(b"one\ntwo\nthree\n")


async def test_images() -> None:
    async with api.connect() as host:
        (image,) = await host.images.list()
        assert (image.name, image.digest, image.names, image.agent, image.size) == (
            IMAGE,
            DIGEST,
            (IMAGE,),
            True,
            1 << 20,
        )
        assert (await host.images.get(DIGEST[:8])).digest == DIGEST
        with pytest.raises(values.NotFound):
            await host.images.get("nothing:9")
        async with host.vms.create(IMAGE, engine="fake", name="user"):
            with pytest.raises(values.InUse, match="user"):
                await image.remove()
        await image.remove()
        assert await host.images.list() == []


async def test_operations_and_events() -> None:
    async with api.connect() as host:
        async with host.run(IMAGE, engine="fake", name="seen") as vm:
            await vm.snapshot("s")
        operations = await host.operations.list()
        assert {"create", "start", "snapshot"} <= {operation.kind for operation in operations}
        done = await host.operations.get(operations[0].id)
        assert (done.state, done.progress) == (values.OperationState.DONE, 1.0)
        assert (await done.wait()).state is values.OperationState.DONE
        await done.cancel()
        with pytest.raises(values.NotFound):
            await host.operations.get("nothing")
        events = await host.events.list()
        assert "vm.created" in [event.kind for event in events]
        async for event in host.events.follow(after=events[0].id):
            assert event.id == events[1].id
            break


async def test_doctor_capabilities_recover() -> None:
    async with api.connect() as host:
        assert all(check.name for check in await host.doctor())
        assert (await host.capabilities("fake")).has(values.Feature.FORK)
        assert (await host.recover()).problems == ()


async def test_progress_is_told() -> None:
    told: list[str] = []
    async with api.run(IMAGE, engine="fake", name="slow", progress=lambda fraction, message: told.append(message)):
        assert any("slow" in message for message in told)
