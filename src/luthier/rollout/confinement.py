"""What a process that runs foreign code gives up before it does: memory, time, files, network, other processes.

Limits hold on every POSIX system. On Linux the process also shuts itself off without needing any right to do so:
Landlock leaves it Python's own files to read and one folder to write, and a filter of system calls refuses new
processes, programs, sockets, signals and whatever changes another process or a file's owner. What is not prevented:
many small files may fill a disk, a fault of the kernel is a way out, and elsewhere than on Linux (x86-64 and ARM64,
kernel 6.2 or newer) foreign code can read the user's files, use the network and send signals.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path

__all__ = ["confine"]

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_LIBC.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2  # prctl
_FILE_BYTES = 16 * 2**20
_OPEN_FILES = 64
_GRACE_SECONDS = 5

_READABLE = (
    *("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime"),
    *("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"),
)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _VERSION = 444, 445, 446, 1  # landlock; the same numbers everywhere
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_REMOVE_FILE, _MAKE_FILE = 1 << 5, 1 << 8  # and no folders, whose depth could defeat whoever clears up
_EVERYTHING = (1 << 15) - 1  # of version 3, the first that guards truncation
_ON_FILES = _WRITE_FILE | _READ_FILE | _TRUNCATE
_IN_FOLDER = _ON_FILES | _READ_DIR | _REMOVE_FILE | _MAKE_FILE

_ALLOW, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
_CLONE_THREAD = 0x00010000
_EQUAL, _AT_LEAST, _HAS_BITS = 0x15, 0x35, 0x45
_X32 = 0x40000000  # the other numbers of x86-64
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_REFUSED: dict[str, tuple[int | None, int | None]] = {  # numbers on x86-64 and on ARM64
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chmod": (90, None),
    "chown": (92, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "fork": (57, None),
    "fremovexattr": (199, 16),
    "fsetxattr": (190, 7),
    "futimesat": (261, None),
    "io_uring_setup": (425, 425),
    "ioprio_set": (251, 30),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "lchown": (94, None),
    "lremovexattr": (198, 15),
    "lsetxattr": (189, 6),
    "memfd_create": (319, 279),
    "migrate_pages": (256, 238),
    "mount": (165, 40),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "removexattr": (197, 14),
    "removexattrat": (466, 466),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "semget": (64, 190),
    "setns": (308, 268),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "setsid": (112, 157),
    "setxattr": (188, 5),
    "setxattrat": (463, 463),
    "shmget": (29, 194),
    "socket": (41, 198),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "utime": (132, None),
    "utimensat": (280, 88),
    "utimes": (235, None),
    "vfork": (58, None),
}
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)  # judged by their arguments


def confine(folder: Path, *, memory_bytes: int, cpu_seconds: int) -> list[str]:
    """Shuts this process off for good, and says what is closed besides the limits: files, processes.

    folder: the one place where it may still write files. memory_bytes: of its address space. `processes` closes the
    network and signals too. Should nobody end it, it ends itself some seconds after cpu_seconds.
    """
    signal.alarm(cpu_seconds + _GRACE_SECONDS)
    _limit(memory_bytes, cpu_seconds)
    if sys.platform != "linux":
        return []
    _LIBC.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    steps = {"files": _close_files(folder), "processes": _drop_rights() and _refuse_calls()}
    return [name for name, holds in steps.items() if holds]


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform != "linux":
        limits[resource.RLIMIT_NPROC] = 0  # on Linux it would count threads too, and the filter refuses processes
    for name, limit in limits.items():
        _, most = resource.getrlimit(name)
        least = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(name, (least, least))


def _close_files(folder: Path) -> bool:
    """Landlock: read Python's own files, write in the folder, nothing else."""
    if _LIBC.syscall(_CREATE_RULESET, None, 0, _VERSION) < 3:
        return False
    rules = _LIBC.syscall(_CREATE_RULESET, struct.pack("Q", _EVERYTHING), 8, 0)
    if rules < 0:
        return False
    for place in {*_READABLE, *sys.path, sys.prefix, sys.base_prefix, sys.exec_prefix}:
        _open_up(rules, Path(place), _READ_FILE | _READ_DIR | (_WRITE_FILE if place == os.devnull else 0))
    _open_up(rules, folder, _IN_FOLDER)
    closed: bool = _LIBC.syscall(_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return closed


def _open_up(rules: int, place: Path, rights: int) -> None:
    if not place.exists() or place == Path():
        return
    inode = os.open(place, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights if place.is_dir() else rights & _ON_FILES, inode)
    _LIBC.syscall(_ADD_RULE, rules, 1, rule, 0)
    os.close(inode)


def _drop_rights() -> bool:
    """No capability is left, should it be the superuser's process."""
    header, sets = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
    dropped: bool = _LIBC.capset(header, sets) == 0
    return dropped


def _refuse_calls() -> bool:
    """A filter of system calls in the kernel's little language (classic BPF)."""
    if platform.machine() not in _MACHINES:
        return False
    program = _filter(*_MACHINES[platform.machine()])
    code = ctypes.create_string_buffer(program, len(program))
    filters = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    set_up = ctypes.create_string_buffer(filters, len(filters))
    refused: bool = _LIBC.prctl(_SET_SECCOMP, _SECCOMP_FILTER, ctypes.addressof(set_up), 0, 0) == 0
    return refused


def _filter(architecture: int, column: int) -> bytes:
    """Loads a word of the call's description, compares it, and says what becomes of the call."""
    number, machine, first_argument = 0, 4, 16
    refused = [numbers[column] for numbers in _REFUSED.values()]
    steps = [_load(machine), _if(_EQUAL, architecture, 1, 0), _say(_REFUSE), _load(number)]
    if column == 0:
        steps += [_if(_AT_LEAST, _X32, 0, 1), _say(_REFUSE)]
    for call in refused:
        steps += [] if call is None else [_if(_EQUAL, call, 0, 1), _say(_REFUSE)]
    steps += [_if(_EQUAL, _CLONE3[column], 0, 1), _say(_UNKNOWN)]  # a filter sees clone's arguments, but not clone3's
    steps += [_if(_EQUAL, _CLONE[column], 0, 4), _load(first_argument)]
    steps += [_if(_HAS_BITS, _CLONE_THREAD, 1, 0), _say(_REFUSE), _say(_ALLOW)]
    steps += [_if(_EQUAL, _PRLIMIT[column], 0, 3), _load(first_argument)]  # of which process; 0 is this one
    steps += [_if(_EQUAL, 0, 1, 0), _say(_REFUSE)]
    return b"".join([*steps, _say(_ALLOW)])


def _load(offset: int) -> bytes:
    return struct.pack("HBBI", 0x20, 0, 0, offset)


def _if(condition: int, value: int, if_true: int, if_false: int) -> bytes:
    """Skips so many steps."""
    return struct.pack("HBBI", condition, if_true, if_false, value)


def _say(verdict: int) -> bytes:
    return struct.pack("HBBI", 0x06, 0, 0, verdict)
