"""How many of a job's nodes train, where their number is left to SLURM: their ranks must divide the global batch."""

from __future__ import annotations

from crate_dist.config import Recipe, RecipeError


def nodes_used(recipe: Recipe) -> dict[int, int]:
    """Returns, for each number of nodes that SLURM may give, how many of them train: the most that divide.

    Raises RecipeError: of a range, no number divides. (A number alone is held against the batch by preflight.)
    """
    given, ranks, batch = recipe.cluster.node_counts, recipe.cluster.ranks_per_node, recipe.train.global_batch
    if len(given) == 1:
        return {given[0]: given[0]}
    fitting = _fitting(recipe)
    if not set(fitting) & set(given):
        near = sorted(sorted(fitting, key=lambda n: abs(n - given[-1]))[:4])
        others = f"; with {ranks} ranks on each, {', '.join(map(str, near))} would" if near else ""
        whole = f" in whole groups of {recipe.train.group}" if recipe.train.group > 1 else ""
        raise RecipeError(
            f"a global batch of {batch}{whole} divides over no number of {recipe.cluster.nodes} nodes{others}"
        )
    return {n: max(fit for fit in fitting if fit <= n) for n in given}


def dividing_nodes(recipe: Recipe) -> str:
    """Says which numbers of nodes near the one asked for divide the global batch; empty: that one does, or none."""
    given, fitting = recipe.cluster.node_counts, _fitting(recipe)
    if len(given) > 1 or given[0] in fitting or not fitting:
        return ""
    *first, last = map(str, sorted(sorted(fitting, key=lambda n: abs(n - given[0]))[:3]))
    return f"--nodes {', '.join(first)} or {last} would do" if first else f"--nodes {last} would do"


def _fitting(recipe: Recipe) -> list[int]:
    """Returns all numbers of nodes whose ranks divide the global batch, into whole groups of train.group images."""
    batch, least = recipe.train.global_batch, recipe.cluster.ranks_per_node * recipe.train.group
    return [n for n in range(1, batch // least + 1) if batch % (n * least) == 0]


def world_sizes(recipe: Recipe) -> tuple[int, int]:
    """Returns the fewest and the most ranks that the run may have."""
    used = nodes_used(recipe).values()
    return min(used) * recipe.cluster.ranks_per_node, max(used) * recipe.cluster.ranks_per_node


def said_of_nodes(recipe: Recipe) -> str:
    """Says which numbers of a range train as a whole, and what the others leave idle."""
    used = nodes_used(recipe)
    *first, last = (str(given) for given, number in used.items() if given == number)
    idle = [f"on {given}, {given - number} would stand idle" for given, number in used.items() if given > number]
    numbers = f"{', '.join(first)} and {last}" if first else last
    return "; ".join([f"{numbers} of {recipe.cluster.nodes} nodes", *idle])
