"""The reader of strace's logs, on lines as strace 5 and 6 write them, and on a log of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.strace import OPTIONS, Event, read_log

CWD = "/home/here"


def seen(*lines: str) -> list[tuple[str, str]]:
    return [(event.kind, event.what) for event in read_log(lines, CWD)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('openat(AT_FDCWD</home/here>, "a", O_RDONLY|O_CLOEXEC) = 3</home/here/a>', ("read", "/home/here/a")),
        ('openat(AT_FDCWD, "a.txt", O_RDONLY) = 3</home/here/a.txt>', ("read", "/home/here/a.txt")),
        ('open("a.txt", O_RDONLY) = 3</real/place>', ("read", "/real/place")),
        ('openat(5</etc>, "../root/x", O_RDONLY) = 6</root/x>', ("read", "/root/x")),
        ('openat(5</etc>, "../root/x", O_WRONLY) = -1 EACCES (Permission denied)', ("write", "/root/x")),
        ('openat(AT_FDCWD</w>, "/x/y", O_RDONLY|O_CREAT, 0600) = 3</x/y>', ("write", "/x/y")),
        ('openat(AT_FDCWD</w>, "/tmp", O_RDWR|O_TMPFILE, 0600) = 3</tmp/#12 (deleted)>', ("write", "/tmp/#12")),
        ('openat(AT_FDCWD</w>, "/x", O_RDONLY|O_TRUNC) = 3</x>', ("write", "/x")),
        ('openat2(AT_FDCWD</w>, "q", {flags=O_RDWR, resolve=0}, 24) = 3</w/q>', ("write", "/w/q")),
        ('creat("b", 0644) = 3</home/here/b>', ("write", "/home/here/b")),
        (r'open("/a\"b\\c, O_CREAT\n\303\274", O_RDONLY) = 3</a\"b\\c\n\303\274>', ("read", '/a"b\\c\nü')),
        (r'mkdir("/a\74b\76", 0777) = 0', ("write", "/a<b>")),
        ('openat(AT_FDCWD</w>, "/dev/shm/x", O_RDWR) = 4</dev/shm/x>', ("write", "/dev/shm/x")),
        ('openat(AT_FDCWD</w>, "/proc/self/fd/4", O_RDWR) = 5</memfd:code (deleted)>', ("write", "/memfd:code")),
        ('mkdir(".cache", 0700) = -1 EROFS (Read-only file system)', ("write", "/home/here/.cache")),
        ('mkdirat(7</home/u>, ".cache", 0700) = 0', ("write", "/home/u/.cache")),
        ('unlink("/tmp/x") = 0', ("write", "/tmp/x")),
        ('unlinkat(3</tmp/d>, "x", AT_REMOVEDIR) = 0', ("write", "/tmp/d/x")),
        ('symlink("/etc/shadow", "s") = 0', ("write", "/home/here/s")),
        ('symlinkat("/etc/shadow", 3</tmp>, "s") = 0', ("write", "/tmp/s")),
        ("fchmod(3</root/x>, 0644) = 0", ("write", "/root/x")),
        ("utimensat(3</root/x>, NULL, [UTIME_NOW, UTIME_NOW], 0) = 0", ("write", "/root/x")),
        ('utimensat(3</root/x>, "", NULL, AT_EMPTY_PATH) = 0', ("write", "/root/x")),
        ('truncate("/root/x", 0) = 0', ("write", "/root/x")),
        ('execve("/bin/sh", ["sh", "-c", "cat /x"], 0x7ffd /* 3 vars */) = 0', ("read", "/bin/sh")),
        ("socket(AF_INET, SOCK_STREAM|SOCK_CLOEXEC, IPPROTO_TCP) = 3<socket:[1]>", ("socket", "AF_INET SOCK_STREAM")),
        ("socket(AF_INET6, SOCK_DGRAM, IPPROTO_IP) = -1 EAFNOSUPPORT (no)", ("socket", "AF_INET6 SOCK_DGRAM")),
        ("socket(AF_NETLINK, SOCK_RAW|SOCK_CLOEXEC, NETLINK_ROUTE) = 3", ("socket", "AF_NETLINK SOCK_RAW")),
        (
            'connect(8<socket:[1]>, {sa_family=AF_UNIX, sun_path="/run/nscd/socket"}, 110) = -1 ENOENT (No such file)',
            ("socket", "connect AF_UNIX /run/nscd/socket"),
        ),
        ('connect(8, {sa_family=AF_UNIX, sun_path=@"bus"}, 6) = 0', ("socket", "connect AF_UNIX @bus")),
        (
            'connect(9, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("10.0.0.1")}, 16) = 0',
            ("socket", "connect AF_INET 10.0.0.1:53"),
        ),
        (
            'sendto(9, "D\\241mobile\\6events", 50, MSG_NOSIGNAL, {sa_family=AF_INET6, sin6_port=htons(443), '
            'sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "2001:db8::1", &sin6_addr), sin6_scope_id=0}, 28) = 50',
            ("socket", "sendto AF_INET6 2001:db8::1:443"),
        ),
        ("io_uring_setup(8, {flags=0}) = 4<anon_inode:[io_uring]>", ("unseen", "io_uring_setup")),
        ("openat(AT_FDCWD, ", ("unseen", "openat(AT_FDCWD, ")),
    ],
)
def test_a_line_says_what_was_done(line: str, expected: tuple[str, str]) -> None:
    assert seen(f"7  {line}") == [expected]


@pytest.mark.parametrize(
    "line",
    [
        'openat(AT_FDCWD</w>, "/missing", O_RDONLY) = -1 ENOENT (No such file or directory)',
        'openat(AT_FDCWD</w>, "/dev/stdin", O_RDONLY) = 3<pipe:[99]>',
        'execve("/no/such", ["x"], 0x7ffd /* 3 vars */) = -1 ENOENT (No such file or directory)',
        'mkdir("/tmp", 0777) = -1 EEXIST (File exists)',
        'sendto(3<socket:[1]>, "x", 1, 0, NULL, 0) = 1',
        "+++ exited with 0 +++",
        "--- SIGCHLD {si_signo=SIGCHLD, si_code=CLD_EXITED} ---",
    ],
)
def test_what_did_nothing_is_nothing(line: str) -> None:
    assert seen(f"7 {line}") == []


def test_two_names_are_two_changes_and_a_hard_link_reads() -> None:
    assert seen('7 rename("a", "/b") = 0') == [("write", f"{CWD}/a"), ("write", "/b")]
    assert seen('7 renameat2(3</x>, "a", 4</y>, "b", RENAME_NOREPLACE) = 0') == [("write", "/x/a"), ("write", "/y/b")]
    assert seen('7 linkat(3</x>, "a", AT_FDCWD</w>, "b", 0) = 0') == [("read", "/x/a"), ("write", "/w/b")]


def test_calls_that_others_interrupt_are_joined() -> None:
    lines = [
        '7 openat(AT_FDCWD</w>, "one", O_RDONLY <unfinished ...>',
        '8 mkdir("two" <unfinished ...>',
        "7 <... openat resumed>) = 3</w/one>",
        "8 <... mkdir resumed>, 0777) = 0",
        "8 socket(AF_INET, SOCK_STREAM <unfinished ...>",
        '9 openat(AT_FDCWD</w>, "a <unfinished ...>", O_RDONLY) = 3</w/a \\74unfinished ...\\76>',
        "8 <... socket resumed>, IPPROTO_TCP) = -1 EPERM (Operation not permitted)",
    ]
    assert seen(*lines) == [
        ("read", "/w/one"),
        ("write", f"{CWD}/two"),
        ("read", "/w/a <unfinished ...>"),
        ("socket", "AF_INET SOCK_STREAM"),
    ]


def test_a_call_that_never_returned_was_tried() -> None:
    lines = ['7 openat(AT_FDCWD</w>, "/fifo", O_WRONLY <unfinished ...>', "7 +++ killed by SIGKILL +++"]
    assert seen(*lines) == [("write", "/fifo")]
    assert seen("7 socket(AF_INET, SOCK_STREAM, 0 <unfinished ...>") == [("socket", "AF_INET SOCK_STREAM")]


def test_relative_names_follow_the_process_and_not_its_siblings() -> None:
    lines = [
        '7 chdir("sub") = 0',
        "7 clone(child_stack=NULL, flags=CLONE_CHILD_CLEARTID|SIGCHLD) = 8",
        '8 chdir("/other") = 0',
        '8 mkdir("x", 0777) = 0',
        '7 mkdir("x", 0777) = 0',
        "7 clone3({flags=CLONE_VM|CLONE_FS|CLONE_THREAD}, 88) = 9",
        "9 fchdir(4</third>) = 0",
        '7 mkdir("y", 0777) = 0',
        "7 vfork( <unfinished ...>",
        '10 mkdir("z", 0777) = 0',
        "7 <... vfork resumed>) = 10",
    ]
    assert [what for _, what in seen(*lines)] == ["/other/x", f"{CWD}/sub/x", "/third/y", "/third/z"]


def test_a_real_log_is_read_whole(tmp_path: Path) -> None:
    code = """
import os, socket, subprocess, threading
os.chdir("sub")
open("new ü\\n\\"name", "w").close()
os.rename("new ü\\n\\"name", "renamed")
os.symlink("/nowhere", "link")
open("../given").read()
threads = [threading.Thread(target=os.mkdir, args=(f"t{i}",)) for i in range(8)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
subprocess.run(["/bin/sh", "-c", "cd /tmp; : < given; exit 0"], cwd="..", stderr=subprocess.DEVNULL)
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
except OSError:
    pass
"""
    (tmp_path / "sub").mkdir()
    (tmp_path / "given").write_text("x")
    log = tmp_path / "log"
    command = ["strace", *OPTIONS, "-o", str(log), sys.executable, "-I", "-c", code]
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    if "PTRACE" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    events = read_log(log.read_text("utf-8", "surrogateescape").splitlines(), str(tmp_path))
    assert not [event for event in events if event.kind == "unseen"]
    mine = [e.what.removeprefix(f"{tmp_path}/") for e in events if e.kind == "write" and str(tmp_path) in e.what]
    assert sorted(mine) == sorted(
        ['sub/new ü\n"name', 'sub/new ü\n"name', "sub/renamed", "sub/link", *(f"sub/t{i}" for i in range(8))]
    )
    assert Event("read", f"{tmp_path}/given") in events
    sockets = [event.what for event in events if event.kind == "socket"]
    assert sockets == ["AF_INET SOCK_DGRAM", "connect AF_INET 127.0.0.1:9"]
