"""Shortest Sokoban plans, in moves.

A set of cells is an integer: bit `row * width + column`. The edge of the board is wall, so a shift by one cell never
carries a floor cell into another row. Positions with the same boxes are searched together: a layer maps the boxes to
the set of cells where the player can stand after so many moves.
"""

from collections.abc import Callable

from dsft.envs.base import ACTIONS

Layer = dict[int, int]


def shifts(width: int) -> tuple[tuple[int, int], ...]:
    """For each of ACTIONS (left, right) such that `cells << left >> right` moves cells by that action."""
    return (0, width), (width, 0), (0, 1), (1, 0)


def reachable(player: int, free: int, width: int) -> int:
    """The free cells that the player can walk to, its own among them."""
    region, before = player, 0
    while region != before:
        before = region
        region |= (region >> width | region << width | region >> 1 | region << 1) & free
    return region


def shortest_plan(width: int, floor: int, targets: int, boxes: int, player: int, limit: int) -> list[str] | None:
    """The fewest moves that put every box on a target; None if `limit` moves do not suffice.

    Bidirectional breadth-first search: pushes from the position, pulls from every solved one. The side with the
    smaller last layer is expanded, until both last layers share a position or one side is exhausted.
    """
    if boxes == targets:
        return []
    live, within_reach = _pulled_from(targets, floor, width), _pushed_from(boxes, floor, width)
    if boxes & ~live or targets & ~within_reach or _frozen(boxes, width, floor, targets):
        return None
    useful = live & within_reach
    ends = 0
    for left, right in shifts(width):
        ends |= targets << left >> right & floor & ~targets
    forward: list[Layer] = [{boxes: player}]
    backward: list[Layer] = [{targets: ends}]
    forward_seen, backward_seen = dict(forward[0]), dict(backward[0])
    for _ in range(limit):
        if len(forward[-1]) <= len(backward[-1]):
            forward.append(_push_layer(forward[-1], forward_seen, width, floor, targets, useful))
        else:
            backward.append(_pull_layer(backward[-1], backward_seen, width, floor, useful))
        first, second = forward[-1], backward[-1]
        if not first or not second:
            return None
        met = min((both for both in first.keys() & second.keys() if first[both] & second[both]), default=None)
        if met is not None:
            place = first[met] & second[met]
            place &= -place
            return _way(_one_back, forward, met, place, width)[::-1] + _way(_one_on, backward, met, place, width)
    return None


def _pulled_from(targets: int, floor: int, width: int) -> int:
    """The cells from which a lone box can be pushed to a target."""
    cells, before = targets, 0
    # A pull needs two cells of floor in a row: one for the box, one for the player to step on.
    room = [(left, right, floor & (floor >> left << right)) for left, right in shifts(width)]
    while cells != before:
        before = cells
        for left, right, pairs in room:
            cells |= cells << left >> right & pairs
    return cells


def _pushed_from(boxes: int, floor: int, width: int) -> int:
    """The cells to which one of the boxes could be pushed if it were alone."""
    cells, before = boxes, 0
    room = [(left, right, floor << left >> right) for left, right in shifts(width)]
    while cells != before:
        before = cells
        for left, right, behind in room:
            cells |= (cells & behind) << left >> right & floor
    return cells


def _walk(boxes: int, players: int, free: int, width: int, seen: Layer, following: Layer) -> int:
    """Add the player cells one step further that were not seen before; returns the boxes next to a player."""
    beside = players >> width | players << width | players >> 1 | players << 1
    walked = beside & free & ~seen[boxes]
    if walked:
        seen[boxes] |= walked
        following[boxes] = following.get(boxes, 0) | walked
    return beside & boxes


def _push_layer(layer: Layer, seen: Layer, width: int, floor: int, targets: int, useful: int) -> Layer:
    """The positions one move after the layer's that were not seen before."""
    following: Layer = {}
    directions = shifts(width)
    for boxes, players in layer.items():
        free = floor ^ boxes
        if not _walk(boxes, players, free, width, seen, following):
            continue
        for left, right in directions:
            arrived = (players << left >> right & boxes) << left >> right & free & useful
            while arrived:
                box = arrived & -arrived
                arrived ^= box
                player = box >> left << right
                moved = boxes ^ box ^ player
                known = seen.get(moved)
                if known is None:
                    known = seen[moved] = -1 if _frozen(moved, width, floor, targets) else 0
                if not known & player:
                    seen[moved] = known | player
                    following[moved] = following.get(moved, 0) | player
    return following


def _frozen(boxes: int, width: int, floor: int, targets: int) -> bool:
    """Whether a 2x2 square of walls and boxes holds a box off target: it can never move."""
    solid = boxes | ~floor
    solid &= solid >> 1
    solid &= solid >> width
    solid |= solid << 1
    return (solid | solid << width) & boxes & ~targets != 0


def _pull_layer(layer: Layer, seen: Layer, width: int, floor: int, useful: int) -> Layer:
    """The positions one move before the layer's that were not seen before."""
    following: Layer = {}
    directions = shifts(width)
    for boxes, players in layer.items():
        free = floor ^ boxes
        if not _walk(boxes, players, free, width, seen, following):
            continue
        for left, right in directions:
            # The pulled box is where the opposite action would lead.
            pulled = players & (boxes << left >> right) & (free >> left << right) & useful
            while pulled:
                box = pulled & -pulled
                pulled ^= box
                player = box << left >> right
                moved = boxes ^ box ^ (box >> left << right)
                known = seen.get(moved, 0)
                if not known & player:
                    seen[moved] = known | player
                    following[moved] = following.get(moved, 0) | player
    return following


def _way(
    step: Callable[[Layer, int, int, int], tuple[str, int, int]],
    layers: list[Layer],
    boxes: int,
    player: int,
    width: int,
) -> list[str]:
    """The actions between a position in the last layer and one in the first, in that order."""
    plan = []
    for layer in reversed(layers[:-1]):
        action, boxes, player = step(layer, boxes, player, width)
        plan.append(action)
    return plan


def _one_back(layer: Layer, boxes: int, player: int, width: int) -> tuple[str, int, int]:
    """An action that leads from a position of the layer to the given one: the action, and that position."""
    for action, (left, right) in zip(ACTIONS, shifts(width), strict=True):
        before, ahead = player >> left << right, player << left >> right
        if layer.get(boxes, 0) & before:
            return action, boxes, before
        unpushed = boxes ^ ahead ^ player
        if boxes & ahead and layer.get(unpushed, 0) & before:
            return action, unpushed, before
    raise AssertionError("no position of the layer leads here")


def _one_on(layer: Layer, boxes: int, player: int, width: int) -> tuple[str, int, int]:
    """An action that leads from the given position to one of the layer: the action, and that position."""
    for action, (left, right) in zip(ACTIONS, shifts(width), strict=True):
        ahead = player << left >> right
        moved = boxes ^ ahead ^ (ahead << left >> right) if boxes & ahead else boxes
        if layer.get(moved, 0) & ahead:
            return action, moved, ahead
    raise AssertionError("no position of the layer follows this one")
