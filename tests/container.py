"""A machine to install on: a real systemd as PID 1 of a container, over this machine's own files, which stay as they are.

A module of tests boots one machine for all of them, in well under three seconds:

    @pytest.fixture(scope="module")
    def machine():
        if reason := why_not():
            pytest.skip(reason)
        with Container() as booted:
            yield booted

    def test_a_unit_starts(machine):
        machine.write("/etc/systemd/system/some.service", UNIT)
        machine.run("systemctl", "start", "some.service")

        assert machine.show("some.service", "ActiveState") == "active"

It starts as an installation would find it: nothing of what this machine starts at boot is started in it, its only
network is a loopback of its own, its /tmp and /run are empty. Below everything lie this machine's files, read-only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid

from host import eventually

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PYTHON = "/usr/bin/python3"
BOOT_S = 60.0  # a machine that is not up by then never will be
HALT_S = 30.0  # systemd gives its services time to stop
TOOLS = ("systemd-nspawn", "nsenter", "setpriv", "unshare", "mount", "umount", "mountpoint")
#: Enablements of this machine's own daemons and timers, which would start in the container as well.
ENABLED = ("etc/systemd/system/*.wants", "etc/systemd/system/*.requires", "etc/rc?.d", "etc/init.d", "etc/fstab")
#: Of the distribution itself; nothing here needs them, and the first waits for a network that does not come.
MASKED = (
    "systemd-networkd-wait-online.service", "NetworkManager-wait-online.service", "console-getty.service",
    "getty.target", "systemd-logind.service", "e2scrub_reap.service",
)  # fmt: skip
#: IPAddressDeny= and DeviceAllow= are BPF programs, and systemd says nothing where it may not load them.
BPF = ("--capability=CAP_BPF,CAP_PERFMON,CAP_NET_ADMIN", "--system-call-filter=bpf")

_numbers = itertools.count(1)


def why_not():
    """Say why no machine can be booted here; empty where one can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    if os.geteuid() != 0:
        return "only root can boot a container"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"needs {' and '.join(missing)}"
    if not any(os.access(path, os.X_OK) for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")):
        return "needs systemd to boot"
    if not any(kind == "cgroup2" for kind, _ in _hierarchies()):
        return "needs cgroup v2 at a writable place"
    trial = "import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))"
    if subprocess.run([PYTHON, "-c", trial], capture_output=True, check=False).returncode:
        return f"needs {PYTHON} of 3.11 or newer, with venv and ensurepip"
    # In a mount namespace of its own the trial leaves nothing behind.
    overlay = 'mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w /mnt/r && mount -t overlay -o "$1" none /mnt/r'
    layers = "lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w"
    trial = ["unshare", "--mount", "--propagation", "private", "sh", "-c", overlay, "sh", layers]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    return f"no overlay can be mounted: {done.stderr.strip()}" if done.returncode else ""


def _hierarchies():
    """Where cgroups are made: [(kind, directory)] of cgroup v2 and of systemd's own hierarchy of v1."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            before, _, behind = line.partition(" - ")
            place = before.split()[4]
            kind, _, options = behind.split(maxsplit=2)
            ours = kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split()[-1].split(","))
            if ours and os.access(place, os.W_OK):
                found.append((kind, place))
    return found


class Container:
    """One machine, booted by being made; `close`, or leaving its `with`, halts it and leaves nothing of it behind.

    *mounts* are folders of this machine to see in the other, read-only: {here: there}. What tests read and write in
    the meantime lies under `root`, or goes through `path`, `write` and `put`.
    """

    def __init__(self, mounts=None):
        self.name = f"va-test-{os.getpid()}-{next(_numbers)}"
        self.mounts = dict(mounts or {})
        self.leader = 0  # the id of its systemd here, where it is up
        # Not in a place of pytest's: the name of a socket in it must fit into 107 bytes.
        self._place = pathlib.Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir="/tmp"))
        self._merged = self._place / "layers" / "root"
        self._cgroups = [os.path.join(place, self.name) for _, place in _hierarchies()]
        self._nspawn = None
        self._handle = None  # a pidfd: it stays the leader's, whatever its number is used for later
        self._background = []
        try:
            self._mount()
            self._prepare()
            self.boot()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # Files.

    @property
    def root(self):
        """Its root directory as a path of this machine, with its own /run and /tmp while it is up.

        An absolute symbolic link in it leads to this machine's files: read such a file through `run`.
        """
        return pathlib.Path(f"/proc/{self.leader}/root") if self.leader else self._merged

    def path(self, inside):
        """Where the file *inside* lies as a path of this machine."""
        return self.root / os.fspath(inside).lstrip("/")

    def write(self, inside, text, mode=0o644):
        """Write a file of root's, in folders that are made where they are missing; returns its path here."""
        target = self.path(inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.chmod(mode)
        return target

    def put(self, source, inside):
        """Copy a file, or what is in a folder, to *inside*, for root; folders that exist keep their modes."""
        source, target = pathlib.Path(source), self.path(inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not source.is_dir():
            shutil.copy(source, target)
            return
        for folder, folders, files in os.walk(source):
            into = target / os.path.relpath(folder, source)
            into.mkdir(exist_ok=True)
            for name in files + [each for each in folders if os.path.islink(os.path.join(folder, each))]:
                shutil.copy(os.path.join(folder, name), into / name, follow_symlinks=False)

    # Processes.

    def run(self, *args, check=True, input=b"", user="root", umask=0o022, env=None, timeout=60):  # noqa: A002 - as subprocess.run has it
        """Run a command inside to its end, as *user* in all of that account's groups; its output is in bytes."""
        with subprocess.Popen(
            self._inside(args, user, env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            umask=umask,
        ) as process:
            try:
                stdout, stderr = process.communicate(input, timeout)
            except BaseException:
                self.end(process, signal.SIGKILL)
                raise
        done = subprocess.CompletedProcess(args, process.returncode, stdout, stderr)
        said = (stdout + stderr).decode(errors="replace")
        assert not check or done.returncode == 0, f"{shlex.join(map(str, args))} exited {done.returncode}: {said}"
        return done

    def start(self, *args, user="root", umask=0o022, env=None):
        """Start a command in the background, where it ends with the container at the latest; `.log` is what it says."""
        log = self._place / f"process-{len(self._background)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self._inside(args, user, env), stdin=subprocess.DEVNULL, stdout=file, stderr=file, umask=umask
            )
        process.log = log
        self._background.append(process)
        return process

    def end(self, process, number=signal.SIGTERM, within=30):
        """Send a signal to what `start` started, and return its exit status."""
        # The process here is nsenter, which waits for its only child and ends as that ends.
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        found = eventually(lambda: process.poll() is not None or children.read_text().split())
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(found[0]), number)
        return process.wait(within)

    def _inside(self, args, user, env):
        """Return the command that runs *args* inside, in a clean environment and in the root directory."""
        assert self.leader, "the machine is not up"
        _, uid, gid, home = self._account(user)
        known = {"PATH": PATH, "LC_ALL": "C.UTF-8", "TERM": "dumb", "HOME": home, "USER": user, "LOGNAME": user}
        variables = [f"{name}={value}" for name, value in {**known, **(env or {})}.items()]
        become = [] if user == "root" else ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--init-groups", "--"]
        enter = ("nsenter", f"--target={self.leader}", "--all", "--root", "--wd", "--")
        return [*enter, "env", "-i", *variables, *become, *map(os.fspath, args)]

    def _account(self, name):
        """Return name, uid, gid and home of an account inside, which this machine need not have."""
        for line in self.path("/etc/passwd").read_text().splitlines():
            fields = line.split(":")
            if fields[0] == name:
                return fields[0], int(fields[2]), int(fields[3]), fields[5]
        raise AssertionError(f"no account {name} inside")

    # What systemd says.

    def show(self, unit, name):
        """Return one property of a unit, as `systemctl show` has it."""
        return self.run("systemctl", "show", "--property", name, "--value", unit).stdout.decode().strip()

    def journal(self, unit):
        """Return what the journal has on a unit, the oldest first: its own words in MESSAGE, and systemd's on it."""
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "--no-pager", "--all", "-o", "json", "-u", unit).stdout.splitlines()
        entries = [json.loads(line) for line in lines]
        for entry in entries:
            if isinstance(entry.get("MESSAGE"), list):  # bytes that are no text
                entry["MESSAGE"] = bytes(entry["MESSAGE"]).decode(errors="replace")
        return entries

    def wait(self, predicate, within=30.0):
        """Wait until *predicate* returns something true, and return that."""
        return eventually(predicate, within)

    # Power.

    def boot(self):
        """Start the machine, and return when systemd has started all that it had to."""
        assert not self.leader, "the machine is up"
        words = self._place / "notify"
        with (
            contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener,
            (self._place / "boot.log").open("wb") as log,
        ):
            words.unlink(missing_ok=True)
            listener.bind(os.fspath(words))
            self._nspawn = subprocess.Popen(
                self._boot_command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={"PATH": PATH, "NOTIFY_SOCKET": str(words), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_COLORS": "0"},
            )  # fmt: skip
            leader = self._await_ready(listener)
        self.leader = leader
        # Ready is said at the end of the first transaction; what it queued may still be under way.
        state = self.run("systemctl", "is-system-running", "--wait", check=False, timeout=BOOT_S).stdout.strip()
        if state != b"running":
            failed = self.run("systemctl", "--failed", "--plain", "--no-legend", check=False).stdout
            raise AssertionError(f"booted to {state.decode()}: {failed.decode()}{self._boot_log()}")

    def halt(self):
        """Shut the machine down in order, as an administrator would; its files stay, and it can `boot` again."""
        self._let_go()
        if self._nspawn is not None and self._nspawn.poll() is None:
            self._nspawn.terminate()  # which systemd-nspawn passes on as the signal for a shutdown
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._nspawn.wait(HALT_S)
        self.cut_power()

    def cut_power(self):
        """End all its processes at once; its files stay, and it can `boot` again."""
        self._let_go()
        if self._handle is not None:
            # systemd-nspawn's own death would not end them: the kernel ends a PID namespace with its PID 1.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            select.select([self._handle], [], [], HALT_S)
            os.close(self._handle)
            self._handle = None
        if self._nspawn is not None:
            try:
                self._nspawn.wait(HALT_S)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
            self._nspawn = None
        self.leader = 0
        self._remove_cgroups()

    def close(self):
        """Shut the machine down and remove all that there was of it; a second time is fine."""
        try:
            self.halt()
        finally:
            self._unmount()
            shutil.rmtree(self._place, ignore_errors=True)

    def _let_go(self):
        """End what runs in the background.

        A shutdown stops processes before it kills them. With its child nsenter would stop itself, for good, and a dead
        child that nobody reaps holds up the end of them all.
        """
        for process in self._background:
            self.end(process, signal.SIGKILL)

    def _boot_command(self):
        binds = [f"--bind-ro={_escaped(here)}:{_escaped(there)}" for here, there in self.mounts.items()]
        command = [
            "setpriv", "--pdeathsig=TERM",  # where the tests are killed, the machine halts
            "systemd-nspawn", "--quiet", f"--directory={self._merged}", f"--machine={self.name}", "--settings=no",
            "--register=no", "--keep-unit",  # there is no systemd here to register with
            "--link-journal=no", "--resolv-conf=off", "--timezone=off", "--console=read-only", "--private-network",
            "--notify-ready=yes", *BPF, *binds, "--boot",
            "systemd.unit=multi-user.target", "systemd.show_status=0", *(f"systemd.mask={unit}" for unit in MASKED),
        ]  # fmt: skip
        # Without a cgroup of its own, systemd-nspawn leaves some in the hierarchy's root.
        for cgroup in self._cgroups:
            os.makedirs(cgroup, exist_ok=True)
        joined = " ".join(shlex.quote(os.path.join(cgroup, "cgroup.procs")) for cgroup in self._cgroups)
        return ["sh", "-c", f'for file in {joined}; do echo $$ >"$file" || exit; done; exec "$@"', "sh", *command]

    def _await_ready(self, listener):
        """Return the leader's id when systemd says that it is ready."""
        listener.settimeout(0.1)
        leader = 0
        end = time.monotonic() + BOOT_S
        while True:
            assert self._nspawn.poll() is None, f"systemd-nspawn ended: {self._boot_log()}"
            assert time.monotonic() < end, f"not up in time: {self._boot_log()}"
            with contextlib.suppress(TimeoutError):
                words = dict(line.split("=", 1) for line in listener.recv(65536).decode().splitlines() if "=" in line)
                if "X_NSPAWN_LEADER_PID" in words:
                    leader = int(words["X_NSPAWN_LEADER_PID"])
                    self._handle = os.pidfd_open(leader)
                if leader and words.get("READY") == "1":
                    return leader

    def _boot_log(self):
        return (self._place / "boot.log").read_text(errors="replace")

    # Layers.

    def _mount(self):
        layers = self._place / "layers"
        layers.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", self.name, layers], check=True)
        for each in ("upper", "work", "root"):
            (layers / each).mkdir()
        # systemd-nspawn of 252 refuses to run over / by itself.
        options = f"lowerdir=/,upperdir={layers}/upper,workdir={layers}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, self.name, self._merged], check=True)

    def _prepare(self):
        """Make of the copy a machine that starts nothing of its own."""
        for pattern in ENABLED:
            for found in self._merged.glob(pattern):
                shutil.rmtree(found) if found.is_dir() and not found.is_symlink() else found.unlink()
        # Without a valid id this would be a first boot, which enables every unit there is.
        self.write("/etc/machine-id", f"{uuid.uuid4().hex}\n", 0o444)
        self.write("/etc/hostname", f"{self.name}\n")
        self.write("/etc/hosts", f"127.0.0.1 localhost {self.name}\n::1 localhost\n")
        # A journal in a file, so that it tells of earlier boots too; none of this machine's own.
        shutil.rmtree(self.path("/var/log/journal"), ignore_errors=True)
        self.path("/var/log/journal").mkdir()

    def _remove_cgroups(self):
        def gone(cgroup):
            for folder, _, _ in os.walk(cgroup, topdown=False):
                with contextlib.suppress(OSError):  # busy while the last processes of it end
                    os.rmdir(folder)
            return not os.path.exists(cgroup)

        for cgroup in self._cgroups:
            eventually(lambda cgroup=cgroup: gone(cgroup))

    def _unmount(self):
        """Remove the layers, and what systemd-nspawn keeps for a directory that may come back."""
        if self._merged.is_dir():
            found = self._merged.stat()
            pathlib.Path(f"/run/systemd/nspawn/locks/inode-{found.st_dev}:{found.st_ino}").unlink(missing_ok=True)
        shutil.rmtree(f"/run/systemd/nspawn/propagate/{self.name}", ignore_errors=True)
        for mounted in (self._merged, self._place / "layers"):
            if os.path.ismount(mounted):
                # Also where a test still holds a file of it open.
                subprocess.run(["umount", "--lazy", mounted], check=True)


def _escaped(path):
    """A path as systemd-nspawn's options want it."""
    return os.fspath(path).replace("\\", "\\\\").replace(":", "\\:")
