"""Which message each side may send when. One table; `docs/wire.md` prints it, and a test holds the two equal.

Each side has a state of its own and a message moves its sender along `MOVES`; `REACTIONS` are the moves that a message
causes on the other side. Both ends keep both states, so either finds an illegal message, its own or the peer's.
"""

from __future__ import annotations

import enum

from lazymem.wire.frame import FrameType, Role


class State(enum.Enum):
    IDLE = "idle"
    """Nothing was said. The client starts."""
    GREETED = "greeted"
    """HELLO was sent, WELCOME not yet: the client waits, the server has to answer."""
    OPEN = "open"
    LEAVING = "leaving"
    """This side said GOODBYE; what is open is still answered."""
    CLOSED = "closed"
    """Nothing more may be sent."""

    __hash__ = object.__hash__  # as in `Role`


class Move(enum.Enum):
    """What a message means for the states: its frame type, apart from an ERROR about the whole connection."""

    FATAL_ERROR = "ERROR with id 0"

    __hash__ = object.__hash__


MoveKey = FrameType | Move

_REQUESTS = {FrameType.FETCH, FrameType.FETCH_DIGESTS, FrameType.READ_FILE, FrameType.STORE_FILE}
_ANSWERS = {
    FrameType.PAGES,
    FrameType.PACKED,
    FrameType.DIGESTS,
    FrameType.FILE_DATA,
    FrameType.FILE_STORED,
    FrameType.CANCELLED,
    FrameType.ERROR,
}
_ANYTIME = {FrameType.PING, FrameType.PONG}


def _stay(kinds: set[FrameType], state: State) -> dict[MoveKey, State]:
    return dict.fromkeys(kinds, state)


MOVES: dict[Role, dict[State, dict[MoveKey, State]]] = {
    Role.CLIENT: {
        State.IDLE: {FrameType.HELLO: State.GREETED},
        State.GREETED: {},
        State.OPEN: {
            **_stay(_REQUESTS | _ANYTIME | {FrameType.CANCEL}, State.OPEN),
            FrameType.GOODBYE: State.LEAVING,
        },
        State.LEAVING: _stay(_ANYTIME | {FrameType.CANCEL}, State.LEAVING),
        State.CLOSED: {},
    },
    Role.SERVER: {
        State.IDLE: {Move.FATAL_ERROR: State.CLOSED},
        State.GREETED: {FrameType.WELCOME: State.OPEN, Move.FATAL_ERROR: State.CLOSED},
        State.OPEN: {
            **_stay(_ANSWERS | _ANYTIME, State.OPEN),
            FrameType.GOODBYE: State.LEAVING,
            Move.FATAL_ERROR: State.CLOSED,
        },
        State.LEAVING: {**_stay(_ANSWERS | _ANYTIME, State.LEAVING), Move.FATAL_ERROR: State.CLOSED},
        State.CLOSED: {},
    },
}

REACTIONS: dict[Role, dict[tuple[State, MoveKey], State]] = {
    Role.CLIENT: {
        (State.GREETED, FrameType.WELCOME): State.OPEN,
        **{(state, Move.FATAL_ERROR): State.CLOSED for state in State},
    },
    Role.SERVER: {(State.IDLE, FrameType.HELLO): State.GREETED},
}
"""By the side that reacts, its state, and what its peer sent."""

_CAUSES_REACTION = frozenset(move for moves in REACTIONS.values() for _, move in moves)


class ConnectionStates:
    """The states of both sides, as one of them sees them."""

    def __init__(self) -> None:
        self._state = {Role.CLIENT: State.IDLE, Role.SERVER: State.IDLE}
        self.both_open = False

    def __getitem__(self, role: Role) -> State:
        return self._state[role]

    def problem(self, sender: Role, move: MoveKey) -> str | None:
        """Why `sender` may not send this now; None if it may."""
        if move in MOVES[sender][self._state[sender]]:
            return None
        name = move.name if isinstance(move, FrameType) else move.value
        return f"{name} from a {sender.value} that is {self._state[sender].value}"

    def advance(self, sender: Role, move: MoveKey) -> None:
        """Note a message that `problem` let through."""
        self._state[sender] = MOVES[sender][self._state[sender]][move]
        if move in _CAUSES_REACTION:
            peer = sender.peer
            self._state[peer] = REACTIONS[peer].get((self._state[peer], move), self._state[peer])
        self._note()

    def close(self, role: Role) -> None:
        """`role` ended its direction of the stream, or broke the protocol."""
        self._state[role] = State.CLOSED
        self._note()

    def _note(self) -> None:
        self.both_open = self._state[Role.CLIENT] is State.OPEN and self._state[Role.SERVER] is State.OPEN
