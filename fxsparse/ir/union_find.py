"""Union-find: which things were said to be the same."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class UnionFind(Generic[T]):
    """Sets of members that were united; a member nobody united is alone."""

    def __init__(self) -> None:
        self._parent: dict[T, T] = {}

    def __contains__(self, member: T) -> bool:
        """Whether it was ever asked for or united."""
        return member in self._parent

    def root(self, member: T) -> T:
        """The member that stands for the set."""
        while self._parent.setdefault(member, member) != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member

    def unite(self, a: T, b: T) -> None:
        """From now on one set, for which the root of `a` stands."""
        self._parent[self.root(b)] = self.root(a)
