"""Which sites use which factor, and which sites are tied together by common factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hpr.plans.terms import Term


def owners(terms_by_site: Mapping[str, Iterable[Term]]) -> dict[str, list[str]]:
    """Factor name → the sites whose terms multiply by it, in order, each once. Routers are not counted.

    >>> owners({"a": [Term("basis")], "b": [Term("basis"), Term("own")]})
    {'basis': ['a', 'b'], 'own': ['b']}
    """
    sites: dict[str, dict[str, None]] = {}
    for site, terms in terms_by_site.items():
        for term in terms:
            for factor in term.factors:
                sites.setdefault(factor, {})[site] = None
    return {factor: list(users) for factor, users in sites.items()}


def connected(terms_by_site: Mapping[str, Iterable[Term]]) -> list[list[str]]:
    """Sets of sites that common factors tie together, directly or through other sites. Sites without terms are left out.

    Sites are in the order given, sets in the order of their first site.
    """
    leader = {site: site for site, terms in terms_by_site.items() if list(terms)}

    def root(site: str) -> str:
        while leader[site] != site:
            site = leader[site]
        return site

    for users in owners(terms_by_site).values():
        for site in users[1:]:
            leader[root(site)] = root(users[0])
    groups: dict[str, list[str]] = {}
    for site in leader:
        groups.setdefault(root(site), []).append(site)
    return list(groups.values())
