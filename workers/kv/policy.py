"""KV policies: which earlier tokens each layer and KV head attends to, and so which keys and values are kept.

    policy   = part (";" part)*             the first part that names a head decides
    part     = rule ["@" place ("," place)*]    without places: every head that no part before it names
    rule     = "dense" | "window:L" | "sinks:S,L"
    place    = layer | layer "-" layer | layer "." head | "*"

``dense@0-3,28-29;sinks:4,252@*`` keeps everything in six layers, and in the others the first four tokens and the last
252. Imports no torch: whoever configures an engine reads policies, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from headwise.workers.errors import InvalidValueError

DENSE_TEXT = "dense"
_SYNTAX = (
    "must be dense, window:L, sinks:S,L or parts such as dense@0-3;sinks:4,252@*, with L and S from 1 to 999999999"
)
MAX_SPAN = 1 << 20
"""The most sinks and window together: a row's block table has room for them, and queries of sinks are turned by a table
of so many positions."""
_RULE = re.compile(r"dense|window:(?P<window>\d{1,9})|sinks:(?P<sinks>\d{1,9}),(?P<last>\d{1,9})")
_PLACE = re.compile(r"\*|(?P<first>\d{1,6})(?:-(?P<last>\d{1,6})|\.(?P<head>\d{1,6}))?")


class Reach(NamedTuple):
    """Which tokens a token attends to: the first ``sinks`` ones, and the last ``window`` ones, itself among them.

    A token at a position below ``sinks + window`` attends to all before it. Any later one sees the sinks as if it were
    at position ``sinks + window - 1`` (StreamingLLM, Xiao et al., 2023, arXiv 2309.17453), and its window at the
    distances of the text.

    Attributes:
        window: None is every token, and there are no sinks then.
    """

    sinks: int = 0
    window: int | None = None

    def __str__(self) -> str:
        if self.window is None:
            return DENSE_TEXT
        return f"sinks:{self.sinks},{self.window}" if self.sinks else f"window:{self.window}"

    @property
    def span(self) -> int | None:
        """Tokens at a position below it attend to all before them; None: all tokens do."""
        return None if self.window is None else self.sinks + self.window

    def first_key(self, position: int) -> int:
        """The first token that a token at a position attends to, but for the sinks."""
        if self.window is None or position < self.sinks + self.window:
            return 0
        return position - self.window + 1

    def needed_blocks(self, num_blocks: int, block_size: int) -> list[int]:
        """Which of a sequence's first blocks whoever goes on after them needs, in order."""
        first = self.first_key(num_blocks * block_size) // block_size
        sinks = min(first, -(-self.sinks // block_size))
        return [*range(sinks), *range(first, num_blocks)]

    def most_blocks(self, block_size: int, num_tokens: int, in_flight: int) -> int:
        """The most blocks that a row of so many tokens has at a time.

        Args:
            in_flight: most tokens of the row that steps in flight compute.
        """
        whole = -(-num_tokens // block_size)
        if self.window is None:
            return whole
        sinks = -(-self.sinks // block_size)
        return min(whole, sinks + -(-(self.window + in_flight) // block_size) + 1)


DENSE = Reach()


@dataclass(frozen=True, slots=True)
class KvPolicy:
    """A policy of a model's layers and KV heads. Heads with the same reach make a *group*; each group has blocks, and
    block tables, of its own.

    Attributes:
        reaches: one for each group, all different, in the order of the first head that has it.
        groups_LK: the group of each layer's KV heads.
    """

    reaches: tuple[Reach, ...]
    groups_LK: tuple[tuple[int, ...], ...]

    @property
    def num_groups(self) -> int:
        return len(self.reaches)

    @property
    def bounded(self) -> bool:
        """Whether no head keeps everything, so that a row's memory does not grow with its text."""
        return all(reach.window is not None for reach in self.reaches)

    @property
    def plain(self) -> bool:
        """Whether every head is dense."""
        return self.reaches == (DENSE,)

    @property
    def text(self) -> str:
        """The policy as a user may write it; the same for the same policy."""
        if self.num_groups == 1:
            return str(self.reaches[0])
        places = ((reach, self._places(group)) for group, reach in enumerate(self.reaches))
        return ";".join(f"{reach}@{where}" for reach, where in places if where)

    def heads(self, kv_start: int, kv_stop: int) -> KvPolicy:
        """The same for some KV heads of every layer; the groups keep their numbers, even if they have no head here."""
        return KvPolicy(self.reaches, tuple(row[kv_start:kv_stop] for row in self.groups_LK))

    def sinks_of_layer(self, layer: int) -> Reach | None:
        """The one reach with sinks that heads of a layer have; None if none has."""
        found = {self.reaches[group] for group in self.groups_LK[layer] if self.reaches[group].sinks}
        return next(iter(found), None)

    def caps(self, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> tuple[int | None, ...]:
        """The most blocks that each group can make use of; None is no limit. Groups with a window are limited where
        others keep everything: so those get the memory."""
        if self.bounded or self.num_groups == 1:
            return (None,) * self.num_groups
        rows = [reach.most_blocks(block_size, 1 << 40, 1) if reach.window else 0 for reach in self.reaches]
        steps = -(-3 * max_num_batched_tokens // block_size)
        # Twice what all rows have at a time: the rest is for prefixes that nobody uses now.
        return tuple(2 * (max_num_seqs * row + steps) if row else None for row in rows)

    def _places(self, group: int) -> str:
        whole = [layer for layer, row in enumerate(self.groups_LK) if row and set(row) == {group}]
        runs = [[layer for _, layer in run] for _, run in groupby(enumerate(whole), lambda pair: pair[1] - pair[0])]
        named = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
        for layer, row in enumerate(self.groups_LK):
            if layer not in whole:
                named += [f"{layer}.{head}" for head, of in enumerate(row) if of == group]
        return ",".join(named)


def resolve_policy(
    text: str, num_layers: int, num_kv_heads: int, model_windows: Sequence[int | None] | None = None
) -> KvPolicy:
    """The policy of a text for a model's shapes.

    Args:
        model_windows: of each layer, how many tokens a token attends to as the model was trained; None is all. Empty if
            no layer has a window.

    Raises:
        InvalidValueError: the text is no policy, names a layer or head that the model does not have, leaves one out,
            or gives heads of one layer different sinks. The field is named kv_policy.
    """
    parts = _parse(text)
    windows = list(model_windows) if model_windows else [None] * num_layers
    reaches: dict[Reach, int] = {}
    groups: list[tuple[int, ...]] = []
    for _, places in parts:
        _check_places(text, places, num_layers, num_kv_heads)
    for layer in range(num_layers):
        row: list[int] = []
        for head in range(num_kv_heads):
            reach = _within(_first(text, parts, layer, head), windows[layer])
            row.append(reaches.setdefault(reach, len(reaches)))
        groups.append(tuple(row))
    policy = KvPolicy(tuple(reaches), tuple(groups))
    for layer, of_heads in enumerate(policy.groups_LK):
        if len({r for r in (policy.reaches[group] for group in of_heads) if r.sinks}) > 1:
            raise InvalidValueError("kv_policy", text, f"heads of layer {layer} have different sinks; one is possible")
    return policy


def check_policy(text: str) -> None:
    """
    Raises:
        InvalidValueError: no policy of any model; the field is named kv_policy.
    """
    _parse(text)


class _Place(NamedTuple):
    """Layers, first and last; of one layer, perhaps one KV head. All None is everything."""

    first: int | None
    last: int | None
    head: int | None

    def holds(self, layer: int, head: int) -> bool:
        if self.first is None or self.last is None:
            return True
        return self.first <= layer <= self.last and self.head in (None, head)


def _parse(text: str) -> list[tuple[Reach, list[_Place]]]:
    parts: list[tuple[Reach, list[_Place]]] = []
    for part in text.replace(" ", "").split(";"):
        rule, at, where = part.partition("@")
        match = _RULE.fullmatch(rule)
        places = [_PLACE.fullmatch(place) for place in where.split(",")] if at else []
        if match is None or None in places:
            raise InvalidValueError("kv_policy", text, _SYNTAX)
        window, sinks = match["window"] or match["last"], match["sinks"]
        if (window is not None and int(window) < 1) or (sinks is not None and int(sinks) < 1):
            raise InvalidValueError("kv_policy", text, _SYNTAX)
        reach = Reach(int(sinks or 0), None if window is None else int(window))
        if (reach.span or 0) > MAX_SPAN:
            raise InvalidValueError("kv_policy", text, f"sinks and window are at most {MAX_SPAN} tokens together")
        found = [_place(place) for place in places if place is not None]
        parts.append((reach, found or [_Place(None, None, None)]))
    return parts


def _place(match: re.Match[str]) -> _Place:
    first, last, head = match["first"], match["last"], match["head"]
    if first is None:
        return _Place(None, None, None)
    return _Place(int(first), int(last or first), None if head is None else int(head))


def _check_places(text: str, places: list[_Place], num_layers: int, num_kv_heads: int) -> None:
    for first, last, head in places:
        if first is None or last is None:
            continue
        if not first <= last < num_layers:
            limit = f"names layers {first} to {last}; the model has layers 0 to {num_layers - 1}"
            raise InvalidValueError("kv_policy", text, limit)
        if head is not None and head >= num_kv_heads:
            limit = f"names KV head {head} of layer {first}; the model has KV heads 0 to {num_kv_heads - 1}"
            raise InvalidValueError("kv_policy", text, limit)


def _first(text: str, parts: list[tuple[Reach, list[_Place]]], layer: int, head: int) -> Reach:
    for reach, places in parts:
        if any(place.holds(layer, head) for place in places):
            return reach
    limit = f"says nothing of KV head {head} of layer {layer}; end it with a part for all others, such as ;dense@*"
    raise InvalidValueError("kv_policy", text, limit)


def _within(reach: Reach, window: int | None) -> Reach:
    """A reach of a layer whose model was trained with a window."""
    if window is None or (reach.window is not None and reach.window <= window):
        return reach
    return Reach(reach.sinks, window)
