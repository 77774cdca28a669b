"""Waiting: the requests that wait to be computed, and whose turn it is."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TypeAlias

from headwise.runtime.engine.request import Request

_Line: TypeAlias = "OrderedDict[Request, None]"


class Waiting:
    """Requests that were preempted go first, the last preempted before the others. After them tenants take turns, and
    of each tenant the oldest request goes first. (Where there is one tenant, all go in the order they came.)

    The scheduler goes through them from the front: it takes the ``head`` out of the queue, or leaves it where it is and
    looks at the next, until :meth:`rewind` begins at the front again. Every call takes constant time, but rewind takes
    time for each request that was skipped.

    Attributes:
        num_tokens: of all requests that wait.
    """

    def __init__(self) -> None:
        self._preempted: _Line = OrderedDict()
        self._lines: OrderedDict[str, _Line] = OrderedDict()  # by tenant, whose turn is next first; none is empty
        self._counts: Counter[str] = Counter()
        self._num_tokens: dict[Request, int] = {}  # when each began to wait
        self.num_tokens = 0
        # Out of the way until rewind, each in the order they were met:
        self._skipped_preempted: list[Request] = []
        self._skipped: list[Request] = []
        self._passed_over: dict[str, _Line] = {}

    def __len__(self) -> int:
        return self._counts.total()

    def num_of(self, tenant: str) -> int:
        """How many requests of a tenant wait."""
        return self._counts[tenant]

    @property
    def head(self) -> Request | None:
        """Whose turn it is; None if there is nobody, or everybody was skipped."""
        if self._preempted:
            return next(iter(self._preempted))
        return next(iter(self._first_line()), None) if self._lines else None

    def add(self, request: Request) -> None:
        """A new request waits: behind those of its tenant."""
        self._lines.setdefault(request.tenant, OrderedDict())[request] = None
        self._count(request)

    def add_preempted(self, request: Request) -> None:
        """A request waits that has been computed before: in front of all others."""
        self._preempted[request] = None
        self._preempted.move_to_end(request, last=False)
        self._count(request)

    def remove(self, request: Request) -> None:
        """A request waits no longer, wherever it stands. Not while requests are skipped."""
        if request in self._preempted:
            del self._preempted[request]
        else:
            line = self._lines[request.tenant]
            del line[request]
            if not line:
                del self._lines[request.tenant]
        self._forget(request)

    def take(self) -> Request:
        """Removes the head; that was its tenant's turn, unless the head was preempted before."""
        preempted, request = bool(self._preempted), self._pop()
        if not preempted and request.tenant in self._lines:
            self._lines.move_to_end(request.tenant)
        self._forget(request)
        return request

    def skip(self) -> None:
        """The head keeps its place, and its tenant the turn; the next of the tenant is looked at."""
        preempted, request = bool(self._preempted), self._pop()
        if preempted:
            self._skipped_preempted.append(request)
            return
        self._skipped.append(request)
        if request.tenant not in self._lines:
            self._passed_over[request.tenant] = OrderedDict()

    def pass_over(self) -> None:
        """All of the head's tenant keep their places, and the tenant the turn; the next tenant is looked at. The head
        was never preempted."""
        tenant = next(iter(self._lines))
        self._passed_over[tenant] = self._lines.pop(tenant)

    def rewind(self) -> None:
        """Begins at the front again."""
        for request in reversed(self._skipped_preempted):
            self._preempted[request] = None
            self._preempted.move_to_end(request, last=False)
        for request in reversed(self._skipped):
            line = self._passed_over.get(request.tenant)
            if line is None:
                line = self._lines.setdefault(request.tenant, OrderedDict())
            line[request] = None
            line.move_to_end(request, last=False)
        for tenant, line in reversed(self._passed_over.items()):
            self._lines[tenant] = line
            self._lines.move_to_end(tenant, last=False)
        self._skipped_preempted, self._skipped, self._passed_over = [], [], {}

    def _first_line(self) -> _Line:
        return next(iter(self._lines.values()))

    def _pop(self) -> Request:
        """Takes the head out of where it stands."""
        if self._preempted:
            request, _ = self._preempted.popitem(last=False)
            return request
        line = self._first_line()
        request, _ = line.popitem(last=False)
        if not line:
            del self._lines[request.tenant]
        return request

    def _count(self, request: Request) -> None:
        self._counts[request.tenant] += 1
        self._num_tokens[request] = request.num_tokens
        self.num_tokens += request.num_tokens

    def _forget(self, request: Request) -> None:
        tenant = request.tenant
        self.num_tokens -= self._num_tokens.pop(request)
        self._counts[tenant] -= 1
        if not self._counts[tenant]:
            del self._counts[tenant]


def share(limit: int, others: int) -> int:
    """What one tenant may have of something limited, of which other tenants have ``others``: half of what those leave
    free, so that a tenant that comes later finds room; at least 1."""
    return max(1, (limit - others) // 2)
