from __future__ import annotations

from matplotlib import pyplot

from lora_hf.experiments.plots import draw_frontier, pareto_frontier, series_style


def test_the_pareto_frontier_by_hand() -> None:
    costs, scores = [1, 2, 3, 2, 4], [0.5, 0.7, 0.6, 0.6, 0.9]
    assert pareto_frontier(costs, scores) == [True, True, False, False, True]
    assert pareto_frontier(costs, scores, greater_is_better=False) == [True, False, False, False, False]
    assert pareto_frontier([1, 1], [0.5, 0.5]) == [True, True], "equal points do not beat each other"


def test_the_frontier_is_drawn_in_the_order_of_the_costs() -> None:
    figure, axes = pyplot.subplots()
    (line,) = draw_frontier(axes, [(4.0, 9.0), (1.0, 5.0), (2.0, 7.0)])
    assert list(line.get_xdata()) == [1.0, 2.0, 4.0]
    assert draw_frontier(axes, [(1.0, 5.0)]) == []
    pyplot.close(figure)


def test_no_two_of_twelve_series_look_the_same() -> None:
    assert len({tuple(series_style(index).values()) for index in range(12)}) == 12
