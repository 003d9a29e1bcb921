"""Every scan order against grids small enough to write down."""

import pytest
import torch

from ssmvision.ops import routes

ORDERS = {
    "row": routes.row,
    "column": routes.column,
    "serpentine": routes.serpentine,
    "window": lambda h, w: routes.window(h, w, 2),
    "window of 3": lambda h, w: routes.window(h, w, 3),
    "atrous": lambda h, w: routes.atrous(h, w, 2),
    "atrous of 3": lambda h, w: routes.atrous(h, w, 3),
}


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (4, 4), (5, 7), (14, 14), (2, 300)])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_visits_every_token_once(order, height, width):
    route = ORDERS[order](height, width)
    assert route.dtype == torch.int64
    assert route.shape == (height * width,)
    assert torch.equal(route.sort().values, torch.arange(height * width))


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (routes.row(2, 3), [0, 1, 2, 3, 4, 5]),
        (routes.column(2, 3), [0, 3, 1, 4, 2, 5]),
        (routes.serpentine(3, 3), [0, 1, 2, 5, 4, 3, 6, 7, 8]),
        (routes.window(4, 4, 2), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]),
        (routes.window(3, 3, 2), [0, 1, 3, 4, 2, 5, 6, 7, 8]),
        (routes.atrous(4, 4, 2), [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]),
        (routes.atrous(3, 3, 2), [0, 2, 6, 8, 1, 7, 3, 5, 4]),
        (routes.continuous(2, 3), [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]),
        (routes.bidirectional(3), [[0, 1, 2], [2, 1, 0]]),
        (routes.cross(2, 2), [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [3, 1, 2, 0]]),
        (routes.atrous_cross(4, 4), [[0, 2, 8, 10], [4, 12, 6, 14], [1, 3, 9, 11], [5, 13, 7, 15]]),
        (routes.atrous_cross(3, 3), [[0, 2, 6, 8], [3, 12, 5, 14], [1, 9, 7, 11], [4, 13, 10, 15]]),
        (routes.local(2, 4, ["w2", "v_flip"]), [[0, 1, 4, 5, 2, 3, 6, 7], [7, 3, 6, 2, 5, 1, 4, 0]]),
        (routes.local(2, 3, ["w2", "w2_flip", "h"]), [[0, 1, 3, 4, 2, 6, 5, 7], [7, 5, 6, 2, 4, 3, 1, 0], [*range(8)]]),
        (routes.insert(routes.local(2, 2, ["h_flip", "v"]), 2), [[4, 3, 2, 1, 0], [0, 3, 2, 1, 4]]),
        (routes.raster([2, 2, 3], [0, 1, 2]), list(range(12))),
        (routes.raster([2, 2, 3], [2, 1, 0]), [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]),
        (routes.raster([2, 2, 3], [0, 2, 1]), [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]),
        (routes.reverse(routes.column(2, 3)), [5, 2, 4, 1, 3, 0]),
        (routes.reverse(torch.tensor([[0, 1], [1, 0]])), [[1, 0], [0, 1]]),
        (routes.inverse(torch.tensor([2, 0, 1])), [1, 2, 0]),
    ],
)
def test_small_grids(found, wanted):
    assert found.tolist() == wanted


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (4, 4), (5, 7), (14, 14)])
def test_padded_routes_visit_every_token_and_all_padding_once(height, width):
    directions = ["h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip"]
    padding = sum(-(-height // k) * k * -(-width // k) * k - height * width for k in (2, 7))
    stack = routes.local(height, width, directions)
    assert torch.equal(stack.sort().values, torch.arange(height * width + padding).expand(8, -1))
    own = stack[:2, : height * width]
    assert torch.equal(own[0], routes.row(height, width))
    assert torch.equal(own[1], routes.row(height, width).flip(0))
    covered = routes.atrous_cross(height, width).flatten().sort().values
    assert torch.equal(covered, torch.arange(-(-height // 2) * -(-width // 2) * 4))


def test_windows_without_padding_are_those_of_window():
    stack = routes.local(4, 6, ["w2", "w2_flip"])
    assert torch.equal(stack[0], routes.window(4, 6, 2))
    assert torch.equal(stack[1], routes.window(4, 6, 2).flip(0))


def test_an_inserted_token_is_met_at_its_step():
    stack = routes.insert(routes.local(5, 7, ["w2", "v_flip"]), 17)
    assert (stack[:, 17] == 17).all()
    assert torch.equal(stack.sort().values, torch.arange(stack.shape[1]).expand(2, -1))


@pytest.mark.parametrize("route", [routes.window(5, 7, 2), routes.cross(5, 7)], ids=["one", "stack"])
def test_inverse(route):
    steps = torch.arange(35).expand_as(route)
    assert torch.equal(route.gather(-1, routes.inverse(route)), steps)
    assert torch.equal(routes.inverse(route).gather(-1, route), steps)


def test_serpentine_steps_to_neighbours():
    route = routes.serpentine(5, 7)
    rows, columns = route // 7, route % 7
    assert torch.equal(rows.diff().abs() + columns.diff().abs(), torch.ones(34, dtype=torch.int64))


@pytest.mark.parametrize("make", [routes.row, routes.cross, lambda h, w, device: routes.window(h, w, 2, device)])
def test_routes_are_made_on_the_asked_device(make):
    assert make(2, 3, device=torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize(
    "name",
    [
        "row",
        "column",
        "serpentine",
        "cross",
        "continuous",
        "window",
        "atrous",
        "atrous_cross",
        "local",
        "insert",
        "bidirectional",
    ],
)
def test_routes_script(name):
    arguments = {
        "window": (4, 6, 2), "atrous": (4, 6, 2), "bidirectional": (24,), "local": (5, 6, ["h_flip", "v", "w4_flip"]),
        "insert": (routes.cross(2, 3), 3),
    }.get(name, (4, 6))  # fmt: skip
    function = getattr(routes, name)
    assert torch.equal(torch.jit.script(function)(*arguments), function(*arguments))
