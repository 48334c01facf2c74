"""Control messages: what host and agent say to each other.

A message is a class with annotated fields; the payload is a JSON object with exactly these
fields. Whatever arrives is checked completely, so that the code behind can rely on the types
even when the guest is hostile.
"""

from __future__ import annotations

import json

from wherry_wire.frames import Frame, WireError

# Type checkers treat this name as true; importing typing would slow the agent's start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar, dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda decorated: decorated


def _integer(value: object) -> int:
    # A bool is an int to isinstance.
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError("is not an integer of 64 bits")
    return value


def _number(value: object) -> float:
    if type(value) is not float and type(value) is not int:
        raise ValueError("is not a number")
    number = float(value)
    if number - number != 0:
        raise ValueError("is not finite")
    return number


def _text(value: object) -> str:
    if type(value) is not str:
        raise ValueError("is not a string")
    value.encode()  # Lone surrogates cannot be printed or stored.
    return value


def _truth(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("is not true or false")
    return value


# Keyed by the annotation's text, as annotations are not evaluated here.
_CHECKS: dict[str, Callable[[object], object]] = {
    "int": _integer,
    "float": _number,
    "str": _text,
    "bool": _truth,
}

_TYPES: dict[int, type[Message]] = {}


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Message:
    """The base of all messages; a subclass is known to :func:`unpack` once it is defined.

    :raises WireError: a field is missing, unknown, or of the wrong type.
    """

    TYPE: ClassVar[int]
    _fields: ClassVar[dict[str, Callable[[object], object]]]

    def __init_subclass__(cls) -> None:
        if _TYPES.setdefault(cls.TYPE, cls) is not cls:
            raise TypeError(f"{cls.__name__} and {_TYPES[cls.TYPE].__name__} have one type")
        cls._fields = {name: _CHECKS[text] for name, text in cls.__annotations__.items()}

    # A field may be called self in what the other end sent, so ours is positional.
    def __init__(self, /, **values: Any) -> None:
        if values.keys() != self._fields.keys():
            wrong = ", ".join(sorted(values.keys() ^ self._fields.keys()))
            raise WireError(f"{type(self).__name__} has missing or unknown fields: {wrong[:200]}")
        for name, check in self._fields.items():
            try:
                self.__dict__[name] = check(values[name])
            except (ValueError, OverflowError) as error:
                raise WireError(f"{name} of {type(self).__name__} {error}") from error

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({fields})"


def pack(message: Message, id: int) -> bytes:
    """Return the frame of a message as it goes over the wire.

    :param id: of the request that this is, or answers.
    :raises WireError: the message is too large for a frame.
    """
    payload = json.dumps(message.__dict__, separators=(",", ":")).encode()
    return Frame(message.TYPE, id, payload).encode()


def unpack(frame: Frame) -> Message:
    """Return the message in a control frame.

    :raises WireError: the frame is not exactly one of the messages below.
    """
    kind = _TYPES.get(frame.type)
    if kind is None:
        raise WireError(f"a frame has the unknown type 0x{frame.type:02x}")
    if frame.flags:
        raise WireError(f"{kind.__name__} has the unknown flags 0x{frame.flags:02x}")
    try:
        # json would guess the encoding of bytes; it is UTF-8 (RFC 8259, 8.1).
        values = json.loads(frame.payload.decode())
    except (ValueError, RecursionError) as error:
        raise WireError(f"{kind.__name__} is not JSON: {error}") from error
    if type(values) is not dict:
        raise WireError(f"{kind.__name__} is not a JSON object")
    return kind(**values)


class Done(Message):
    """Reply: it is done, and there is nothing to say about it."""

    TYPE = 0x00


class Failure(Message):
    """Reply: it failed. With id 0, the agent ends the session."""

    TYPE = 0x01

    message: str


class Hello(Message):
    """Request, the first one: who we are, and what the agent shall look after."""

    TYPE = 0x10

    protocol: int
    data_path: str  # in the filesystem that HealthReport and Trim are about
    engine_socket: str


class HelloReply(Message):
    """Reply to :class:`Hello`: the agent is ready."""

    TYPE = 0x11

    protocol: int
    agent: str  # the zipapp that runs; its name has the hash of its contents
    boot_id: str  # /proc/sys/kernel/random/boot_id (random(4)): another one after each boot


class HealthRequest(Message):
    """Request: how is the guest?"""

    TYPE = 0x12

    engine_timeout_s: float  # 0: leave the engine alone


class HealthWatch(Message):
    """Request: say how the guest is every so often, unasked; answered by :class:`Done`.

    Replaces an earlier watch. A report that would overtake the one before is left out.
    """

    TYPE = 0x13

    interval_s: float  # 0: no more
    engine_timeout_s: float


class HealthReport(Message):
    """Reply to :class:`HealthRequest`; with id 0, what :class:`HealthWatch` asked for."""

    TYPE = 0x14

    time_s: float  # the guest's clock, since the epoch
    uptime_s: float
    load: float  # processes that ran or wanted to in the last minute (proc_loadavg(5))
    memory_total_bytes: int
    memory_available_bytes: int
    data_total_bytes: int
    data_available_bytes: int
    engine_version: str  # empty when it is not known
    engine_problem: str  # empty when the engine answered; not asked is a problem too


class ClockSet(Message):
    """Request: correct the guest's clock if it is off by more than the threshold."""

    TYPE = 0x15

    time_s: float  # the host's clock, since the epoch
    threshold_s: float


class ClockReport(Message):
    """Reply to :class:`ClockSet`."""

    TYPE = 0x16

    offset_s: float  # the guest's clock minus the host's, before it was corrected
    corrected: bool


class Trim(Message):
    """Request: tell the data disk which blocks hold nothing, as fstrim(8) does."""

    TYPE = 0x17


class TrimReport(Message):
    """Reply to :class:`Trim`."""

    TYPE = 0x18

    trimmed_bytes: int


class PowerOff(Message):
    """Request: shut the guest down in order; answered by :class:`Done` if there is time."""

    TYPE = 0x19


class ListenersRequest(Message):
    """Request: on which ports do these containers listen in the guest's own network?"""

    TYPE = 0x1A

    containers: str  # ids, separated by blanks


class ListenersReport(Message):
    """Reply to :class:`ListenersRequest`."""

    TYPE = 0x1B

    listeners: str  # lines of container, protocol, address and port, separated by blanks


class PortsHold(Message):
    """Request: have these ports of the guest in use, and no others; answered by :class:`Done`."""

    TYPE = 0x1F

    ports: str  # lines of protocol and port, separated by a blank


class DatagramsListen(Message):
    """Request: be ready for connections that carry datagrams."""

    TYPE = 0x3A


class DatagramsListening(Message):
    """Reply to :class:`DatagramsListen`."""

    TYPE = 0x3B

    socket: str  # its path; one connection for each published port


class DatagramsTo(Message):
    """Such a connection's first frame: where in the guest its datagrams go."""

    TYPE = 0x3C

    address: str  # of IPv6
    port: int


class NetworkSet(Message):
    """Request: what leads from the guest to the host; answered by :class:`Done`."""

    TYPE = 0x1C

    names_port: int  # of the host's server for names, as long as the session lasts; 0: none
    host_open: bool  # whether containers may connect to services on the host's loopback


class EngineSet(Message):
    """Request: have the engine work with these settings."""

    TYPE = 0x1D

    settings: str  # the text of daemon.json
    live: bool  # running containers can go on under them


class EngineReport(Message):
    """Reply to :class:`EngineSet`."""

    TYPE = 0x1E

    applied: bool  # false: they are refused, or containers would have to be stopped for them
    refused: str  # why, in the engine's words; empty when they are not
    note: str  # what the user should know; empty for nothing


class SyncListen(Message):
    """Request: be ready for the connections of synchronised roots."""

    TYPE = 0x20

    directory: str  # on the data disk: where the copies and what is on its way are


class SyncListening(Message):
    """Reply to :class:`SyncListen`."""

    TYPE = 0x21

    socket: str  # its path; one connection for each root


class SyncChanged(Message):
    """Unasked, with id 0: something in a root was changed, not by us.

    Said once; then not again before the root's next scan.
    """

    TYPE = 0x22

    root: str


class SyncOpen(Message):
    """Request, a root connection's first one; the rest of its protocol is `wherry_sync.wire`'s."""

    TYPE = 0x23

    root: str  # its id
    path: str  # absolute, in the guest, where containers mount it from
    single: bool  # it is a file, not a directory
    file_mode: int  # of new files, without the executable bits
    directory_mode: int
    rules: str  # what is ignored: a JSON list of pairs, see wherry_sync.ignore
    ordered: bool  # it was closed in order before, so what was remembered of it holds


class SyncOpened(Message):
    """Reply to :class:`SyncOpen`."""

    TYPE = 0x24

    boot_id: str
    packed: bool  # contents may come compressed


class SyncCopies(Message):
    """Request, before the first scan: are the copies of these roots here that were scanned?

    Not if this one is new. Then whatever is remembered of it holds no more.
    """

    TYPE = 0x39

    roots: str  # ids, separated by spaces


class SyncScan(Message):
    """Request: what is in the tree now; answered by rows and :class:`SyncScanned`."""

    TYPE = 0x25

    full: bool  # look at everything, not only where the watch saw changes


class SyncScanned(Message):
    """Reply to :class:`SyncScan`."""

    TYPE = 0x26

    present: bool
    device: int
    files_read: int
    bytes_read: int
    changes: int  # so many of the rows are changes; the rest are paths to look at again
    rescued: bool  # there is something that SyncRescued would tell


class SyncMissing(Message):
    """Request: which of these contents are not staged?"""

    TYPE = 0x27


class SyncRead(Message):
    """Request: the contents of these files."""

    TYPE = 0x28


class SyncStage(Message):
    """Request: take the contents that follow, up to :class:`SyncEnd`."""

    TYPE = 0x29


class SyncBuild(Message):
    """Request: make what the rows before it say, of the contents that follow, up to the end."""

    TYPE = 0x35


class SyncEnd(Message):
    """The end of contents."""

    TYPE = 0x2A


class SyncStageLocal(Message):
    """Request: take these contents from paths of the same tree."""

    TYPE = 0x2B


class SyncStamps(Message):
    """Request: the stamps of what is at some paths."""

    TYPE = 0x3D


class SyncSums(Message):
    """Request: the digests of a file's blocks, if it is still that file."""

    TYPE = 0x36

    path: str
    leaf: str  # in hexadecimal


class SyncReadBlocks(Message):
    """Request: these blocks of a file."""

    TYPE = 0x37

    path: str
    leaf: str


class SyncStageBlocks(Message):
    """Request: take contents of the blocks that follow, and else of a file's, up to the end."""

    TYPE = 0x38

    leaf: str
    path: str
    base: str  # what the file has to be


class SyncApply(Message):
    """Request: carry out these operations."""

    TYPE = 0x2C


class SyncFlush(Message):
    """Request: have all of it on the disk."""

    TYPE = 0x2D

    last: bool  # nothing more comes: the next opening can be an ordered one


class SyncBeginFlush(Message):
    """Request: begin to have on the disk what is in the copy now."""

    TYPE = 0x3E


class SyncFlushed(Message):
    """Request: whether what was begun is done."""

    TYPE = 0x3F


class SyncRescued(Message):
    """Request: what was saved from being overwritten?"""

    TYPE = 0x2E


class SyncReadRescued(Message):
    """Request: the contents of one such file."""

    TYPE = 0x2F

    name: str


class SyncForgetRescued(Message):
    """Request: remove one such file."""

    TYPE = 0x30

    name: str


class SyncMount(Message):
    """Request: have the copy at the root's path, for containers to mount."""

    TYPE = 0x31


class SyncYes(Message):
    """Reply: whether it was done."""

    TYPE = 0x32

    done: bool


class SyncBusy(Message):
    """Before a reply that takes long, now and then: the request is being worked on.

    ``path`` is what a scan looks at just now; empty for the root, and for all but a scan.
    """

    TYPE = 0x33

    path: str


class SyncPin(Message):
    """Request: rewrite this file in place from now on, as something has mounted it."""

    TYPE = 0x34

    path: str
