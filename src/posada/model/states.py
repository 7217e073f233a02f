"""What a machine can be in, and what may follow what.

::

                 start              pause
      created ─────────► starting ─► running ◄────────► paused
         ▲                  │          │  ▲   resume      │
         │ (never ran)      │          │  │ restore       │
         │                  ▼          ▼  │               ▼
         └───────────────  stopped ◄── stopping ◄─────────┘
                            ▲  │
                            │  └─ start
                 crashed ───┘ (the guest panicked or the engine died; disks are kept)

A vm is ``running`` once its vcpus run; *ready* (the agent answered) is a moment, not a state. ``deleting`` can follow
any state and is followed by nothing: whoever opens the state next finishes the deletion.
"""

from __future__ import annotations

import enum

from posada.errors import InvalidState


class State(str, enum.Enum):
    """The state of one vm, as stored."""

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    CRASHED = "crashed"
    DELETING = "deleting"

    def __str__(self) -> str:
        return self.value


#: The one table. A change of state that is not here is a bug and is refused.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.CREATED: frozenset({State.STARTING, State.DELETING}),
    State.STARTING: frozenset(
        {State.RUNNING, State.PAUSED, State.STOPPED, State.CRASHED, State.CREATED, State.DELETING}
    ),
    State.RUNNING: frozenset(
        {State.PAUSED, State.STOPPING, State.STOPPED, State.CRASHED, State.STARTING, State.DELETING}
    ),
    State.PAUSED: frozenset(
        {State.RUNNING, State.STOPPING, State.STOPPED, State.CRASHED, State.STARTING, State.DELETING}
    ),
    State.STOPPING: frozenset({State.STOPPED, State.RUNNING, State.CRASHED, State.DELETING}),
    State.STOPPED: frozenset({State.STARTING, State.DELETING}),
    State.CRASHED: frozenset({State.STARTING, State.STOPPED, State.DELETING}),
    State.DELETING: frozenset(),
}

#: States in which an engine process is expected to exist.
LIVE = frozenset({State.STARTING, State.RUNNING, State.PAUSED, State.STOPPING})
#: States in which the disks are at rest.
AT_REST = frozenset({State.CREATED, State.STOPPED, State.CRASHED})

#: From which states each verb is possible. Verbs that are missing are possible in every state but ``deleting``.
VERBS: dict[str, frozenset[State]] = {
    "start": AT_REST,
    "stop": frozenset({State.RUNNING, State.PAUSED}),
    "kill": LIVE,
    "pause": frozenset({State.RUNNING}),
    "resume": frozenset({State.PAUSED}),
    "restart": frozenset({State.RUNNING, State.PAUSED}),
    "exec": frozenset({State.RUNNING}),
    "copy": frozenset({State.RUNNING}),
    "console": frozenset({State.RUNNING, State.PAUSED}),
    "inspect": frozenset({State.RUNNING, State.PAUSED}),
    "debug": frozenset({State.RUNNING, State.PAUSED}),
    "fork": frozenset({State.RUNNING, State.PAUSED}),
    "snapshot": frozenset({State.RUNNING, State.PAUSED}) | AT_REST,
    "restore": frozenset({State.RUNNING, State.PAUSED}) | AT_REST,
    "clone": AT_REST,
    "attach": frozenset({State.RUNNING, State.PAUSED}) | AT_REST,
    "resize": frozenset({State.RUNNING, State.PAUSED}) | AT_REST,
}

_HINTS: dict[tuple[str, State], str] = {
    ("start", State.RUNNING): "it runs already",
    ("resume", State.RUNNING): "it runs already",
    ("resume", State.STOPPED): "start it with: posada start",
    ("resume", State.CREATED): "start it with: posada start",
    ("pause", State.PAUSED): "it is paused already",
    ("start", State.PAUSED): "resume it with: posada resume",
    ("exec", State.PAUSED): "resume it first with: posada resume",
    ("exec", State.STOPPED): "start it first with: posada start",
    ("exec", State.CREATED): "start it first with: posada start",
    ("fork", State.STOPPED): "start it first, or use: posada clone",
    ("fork", State.CREATED): "start it first, or use: posada clone",
    ("clone", State.RUNNING): "stop it first, fork it with: posada fork, or clone one of its snapshots",
}


def require(vm: str, verb: str, state: State) -> None:
    """Raise InvalidState unless ``verb`` is possible in ``state``."""
    allowed = VERBS.get(verb, frozenset(State) - {State.DELETING})
    if state not in allowed:
        wanted = [s.value for s in State if s in allowed]
        raise InvalidState(vm, verb, state.value, wanted, hint=_HINTS.get((verb, state)))


def check_transition(vm: str, old: State, new: State) -> None:
    """Raise InvalidState unless ``new`` may follow ``old``. Staying is always allowed."""
    if new != old and new not in TRANSITIONS[old]:
        raise InvalidState(vm, f"become {new}", old.value, [s.value for s in State if new in TRANSITIONS[s]])
