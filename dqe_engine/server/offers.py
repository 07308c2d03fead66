"""Which requests need more of an index than searching, and the one answer to those that this index does not offer: 405 `not_offered`.

RFC 9110 (10.2.1): an `Allow` without methods says that a resource allows none just now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqe_engine.index.searched import Ability

from .policies import template_of
from .problems import Problem

NEEDS: Mapping[tuple[str, str], Ability] = {
    ("GET", "/v1/items"): "list",
    ("GET", "/v1/facets"): "facets",
    ("POST", "/v1/items"): "write",
    ("PATCH", "/v1/items/{id}"): "write",
    ("DELETE", "/v1/items/{id}"): "write",
}
"""By method and template, as a request is counted. What is not here is offered by every index."""
_ALL = {"/v1/items": ("GET", "POST"), "/v1/items/{id}": ("DELETE", "GET", "PATCH"), "/v1/facets": ("GET",)}


def not_offered(lacks: Mapping[Ability, str], method: str, path: str) -> Problem | None:
    """The answer to a request that needs what the index lacks."""
    if not lacks:
        return None
    template = template_of(path)
    ability = NEEDS.get(("GET" if method == "HEAD" else method, template))
    return None if ability is None or ability not in lacks else problem_of_lack(lacks, ability, template)


def problem_of_lack(lacks: Mapping[Ability, str], ability: Ability, template: str) -> Problem:
    """`template`: of the path that was asked for; its other methods may be offered."""
    allowed = [method for method in _ALL[template] if NEEDS.get((method, template)) not in lacks]
    return Problem(405, "not_offered", f"the index of this server does not offer that: {lacks[ability]}", {"Allow": ", ".join(allowed)})


def offered(paths: Mapping[str, Mapping[str, Any]], lacks: Mapping[Ability, str]) -> dict[str, Mapping[str, Any]]:
    """The paths of an OpenAPI document with the operations that the index offers."""
    kept: dict[str, Mapping[str, Any]] = {}
    for path, operations in paths.items():
        left = {method: told for method, told in operations.items() if NEEDS.get((method.upper(), path.replace(":path", ""))) not in lacks}
        if left:
            kept[path] = left
    return kept
