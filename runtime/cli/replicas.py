"""The options of a deployment: how many engines serve a model."""

from __future__ import annotations

from typing import Annotated

from headwise.runtime.cli.options import option

Replicas = Annotated[
    int | None,
    option("n", "Serve with so many engines, each on ranks of its own; default: one, in this process.", min=1),
]
MinReplicas = Annotated[
    int | None, option("n", "Fewest engines; with --max-replicas, load decides how many there are.", min=1)
]
MaxReplicas = Annotated[int | None, option("n", "Most engines.", min=1)]
