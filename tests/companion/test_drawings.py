"""The explaining figures: what is drawn is what the program does, and every word can be read."""
from itertools import combinations, product

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from cion_nb.companion.drawings import (
    choose_crops,
    draw_distillation,
    draw_kinds,
    draw_range,
    group_links,
    in_few_colours,
    KINDS,
    kinds_table,
    pairs_in_range,
    pairs_pulled,
    toy_tracklets,
    view_pairs,
)
from cion_nb.core.samples import make_samples
from cion_nb.identities.levels import closure
from cion_nb.identities.linking import link_within
from cion_nb.identities.neighbours import knn
from cion_nb.training.distill import IdentityGuidedLoss
from cion_nb.training.pretrain import identity_labels

matplotlib.use("Agg")


def drawn(figure, word):
    "The artists whose id begins with a word, by the rest of their id."
    artists = figure.findobj(lambda artist: (artist.get_gid() or "").split(" ")[0] == word)
    return {tuple(a.get_gid().split(" ")[1:]): a for a in artists}


def pairs(figure, word): return {tuple(sorted(map(int, rest))) for rest in drawn(figure, word)}


# ---------------------------------------------------------------- who counts as one person

@pytest.fixture
def crops(tmp_path):
    "Tracklets of two people in two videos, one of which goes over from one to the other; and a third person."
    rows = [(video, tracklet, 10 * tracklet + k, pid)
            for video, tracklet, pids in (("a", 0, [1] * 5), ("a", 1, [2] * 5), ("b", 2, [1, 1, 1, 1, 2]),
                                          ("b", 3, [2] * 4), ("b", 4, [3] * 9))
            for k, pid in enumerate(pids)]
    paths = [f"{i}.png" for i in range(len(rows))]
    for i, (_, _, _, pid) in enumerate(rows):
        Image.new("RGB", (20, 50), (60 * pid, 5 * i, 80)).save(tmp_path / paths[i])
    video, tracklet, frame, pid = zip(*rows)
    table = make_samples(paths, video=video, tracklet=tracklet, frame=frame, true_pid=pid)
    return table.assign(visibility=1., h=100), tmp_path


def test_crops_are_of_two_people_in_two_videos_with_one_slip(crops):
    chosen = choose_crops(crops[0])
    assert len(chosen) == 12 and set(chosen.true_pid) == {1, 2} and set(chosen.video) == {"a", "b"}
    assert chosen.groupby("tracklet").true_pid.nunique().tolist() == [1, 1, 2, 1]


def test_a_world_where_nobody_comes_back_is_refused(crops):
    with pytest.raises(ValueError, match="no two people share two videos: choose a larger world"):
        choose_crops(crops[0][crops[0].video == "a"])


def test_what_is_pulled_together_is_what_pretraining_takes_as_one_person(crops):
    chosen = choose_crops(crops[0])
    table = kinds_table(chosen)
    truth = chosen.true_pid.to_numpy()
    for kind, column in KINDS.items():
        labels = identity_labels(chosen, column)
        pulled = [(labels[i] == labels[j], truth[i] == truth[j]) for i, j in combinations(range(12), 2)]
        counted = [pulled.count(case) for case in ((True, True), (True, False), (False, True))]
        assert table.loc[kind].tolist() == [len(set(labels.tolist())), *counted]


def test_lines_hold_together_exactly_what_counts_as_one_person(crops):
    chosen, root = choose_crops(crops[0]), crops[1]
    figure = draw_kinds(chosen, root)
    lines = [tuple(sorted(map(int, a.get_gid().split()[1:])))
             for a in figure.findobj(lambda a: (a.get_gid() or "").startswith("pull"))]
    assert len(drawn(figure, "view")) == 12, "the instance level has a loop at every image and no line"
    first, second = lines[:8], lines[8:]                              # 4 tracklets of 3; then 2 people
    for column, found in (("tracklet", first), ("true_pid", second)):
        component = closure(12, *np.array(found).T)
        assert (component == pd.factorize(chosen[column])[0]).all()
        assert len(found) == 12 - chosen[column].nunique(), "as few lines as can be"


@pytest.mark.parametrize("seed", range(5))
def test_group_links_of_any_groups(seed):
    rng = np.random.default_rng(seed)
    labels, x, y = rng.integers(0, 6, 30), np.tile(np.arange(10.), 3), np.repeat([0., 3., 6.], 10)
    links = np.array(group_links(labels, x, y))
    assert (closure(30, *links.T) == pd.factorize(labels)[0]).all() and len(links) == 30 - len(set(labels.tolist()))


def test_pairs_of_the_two_ends():
    truth = [1, 1, 2, 2, 2]
    assert pairs_pulled(range(5), truth) == dict(persons=5, right=0, wrong=0, missed=4)
    assert pairs_pulled(truth, truth) == dict(persons=2, right=4, wrong=0, missed=0)
    assert pairs_pulled([0] * 5, truth) == dict(persons=1, right=4, wrong=6, missed=0)


# ---------------------------------------------------------------- range, links, closure

@pytest.mark.parametrize("half_width", [1, 3, 5, 11, 40])
def test_the_band_is_what_the_search_and_the_definition_look_at(half_width):
    units, videos, people = toy_tracklets()
    band = next(iter(drawn(draw_range(units, videos, people, half_width), "band").values())).get_array()
    i, j = np.indices((12, 12))
    near = np.abs(i - j) <= half_width
    assert ((band >= 1) == near).all() and (pairs_in_range(12, half_width) == (near & (i != j))).all()
    found = knn(units, 12 if half_width >= 11 else half_width + 1, half_width=half_width, device="cpu")
    assert near[np.arange(12)[:, None], found.index].all()
    assert set(found.index[0].tolist()) == set(range(min(12, half_width + 1))), "all of the first row's range"


def test_a_point_that_is_near_all_is_linked_to_all_in_range_and_no_other():
    figure = draw_range(np.ones((9, 2)) / 2**.5, [1] * 9, "A" * 9, half_width=2, at=4)
    assert pairs(figure, "linked") == {(2, 4), (3, 4), (4, 5), (4, 6)} and not drawn(figure, "compared")
    assert pairs(figure, "link") == {(i, j) for i, j in combinations(range(9), 2) if j - i <= 2}


@pytest.mark.parametrize("half_width, at", product([1, 3, 6], [0, 5, 11]))
def test_links_and_identities_are_those_of_the_program(half_width, at):
    units, videos, people = toy_tracklets()
    figure = draw_range(units, videos, people, half_width, at=at)
    a, b, _ = link_within(units, None, half_width, .18)
    links = set(zip(a.tolist(), b.tolist()))
    assert pairs(figure, "link") == links
    band = next(iter(drawn(figure, "band").values())).get_array()
    assert {(i, j) for i, j in np.argwhere(band == 2).tolist() if i < j} == links
    assert pairs(figure, "linked") == {pair for pair in links if at in pair}
    around = {(min(at, k), max(at, k)) for k in range(12) if 0 < abs(k - at) <= half_width}
    assert pairs(figure, "linked") | pairs(figure, "compared") == around
    of_node = {int(rest[2]): int(rest[0]) for rest in drawn(figure, "identity")}
    assert [of_node[k] for k in range(12)] == closure(12, a, b).tolist()
    colour = {rest: to_hex(a.get_facecolor()) for rest, a in drawn(figure, "identity").items()}
    assert len({(rest[0], c) for rest, c in colour.items()}) == len({rest[0] for rest in colour})


def test_the_toy_shows_a_chain_and_a_person_out_of_reach():
    units, _, people = toy_tracklets()
    identity = closure(12, *link_within(units, None, 3, .18)[:2])
    assert len(set(identity[people == "A"])) == 1 and len(set(identity[people == "B"])) == 2
    assert (np.unique(closure(12, *link_within(units, None, None, .18)[:2])) == range(4)).all()


def test_a_position_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="at=12: positions are 0 … 11"): draw_range(*toy_tracklets(), at=12)


# ---------------------------------------------------------------- pairs of views

def summed_by_the_loss(n_images, n_views):
    """Pairs that `IdentityGuidedLoss` itself sums: every teacher view says a class of its own, and the gradient of a
    student view of equal logits is lower at the classes that teach it."""
    every = 2 * n_images
    loss = IdentityGuidedLoss(every + 1, n_views, teacher_temp=.001)
    teacher = torch.eye(every, every + 1)
    student = torch.zeros(n_views * n_images, every + 1, requires_grad=True)
    loss.eval()(student, teacher, torch.zeros(n_images, dtype=torch.int64)).backward()
    teaches = student.grad[:, :-1] < student.grad[:, -1:] - 1e-7      # the last class is nobody's
    teaches = teaches.unflatten(0, (n_views, n_images)).unflatten(-1, (2, n_images))
    return teaches.permute(3, 2, 1, 0).numpy()


@pytest.mark.parametrize("n_images, n_views", [(2, 4), (2, 2), (3, 5), (1, 10)])
def test_pairs_of_views_are_those_of_the_loss_and_of_the_equation(n_images, n_views):
    found = view_pairs(n_images, n_views)
    assert (found == summed_by_the_loss(n_images, n_views)).all()
    by_equation = [(i, g) != (j, v) for i, g, j, v in np.ndindex(found.shape)]
    assert found.ravel().tolist() == by_equation


@pytest.fixture
def person():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (100, 40, 3), np.uint8)) for _ in range(2)]


@pytest.mark.parametrize("n_local", [1, 2, 3])
def test_squares_are_the_pairs_that_the_loss_sums(person, n_local):
    figure = draw_distillation(person, n_local)
    summed, squares = summed_by_the_loss(2, 2 + n_local), drawn(figure, "pair")
    assert len(squares) == summed.size
    colours = {(bool(summed[tuple(map(int, rest))]), rest[0] == rest[2]): set() for rest in squares}
    for rest, square in squares.items():
        colours[bool(summed[tuple(map(int, rest))]), rest[0] == rest[2]].add(to_hex(square.get_facecolor()))
    assert colours[False, True] == {"#ffffff"} and all(len(c) == 1 for c in colours.values())
    assert len(set.union(*colours.values())) == 3 == len(colours), "left out, same image, two images"
    said = [t.get_text() for t in figure.findobj(Text)]
    assert any(t.startswith(f"{summed.sum()} terms") for t in said)


def test_one_image_is_no_identity(person):
    with pytest.raises(ValueError, match="1 image: an identity is shown by two or more"): draw_distillation(person[:1])


# ---------------------------------------------------------------- words

@pytest.fixture(params=["kinds", "range", "distillation"])
def figure(request, crops, person):
    if request.param == "kinds": return draw_kinds(choose_crops(crops[0]), crops[1])
    return draw_range(*toy_tracklets(), at=4) if request.param == "range" else draw_distillation(person)


def test_words_are_large_enough_and_none_lies_on_another(figure):
    words = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    figure.canvas.draw()
    shown = [t for t in words if t.axes and t in t.axes.texts]
    assert len(shown) > 20
    for text in shown:
        raised = any(mark in text.get_text() for mark in "_^") and "$" in text.get_text()
        assert text.get_fontsize() * (.7 if raised else 1) >= 9, text.get_text()
    boxes = [t.get_window_extent() for t in shown]
    width, height = figure.canvas.get_width_height()
    for text, box in zip(shown, boxes):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text.get_text()!r} runs out of the figure"
    for (one, a), (two, b) in combinations(zip(shown, boxes), 2):
        apart = min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1
        assert apart, f"{one.get_text()!r} lies on {two.get_text()!r}"


def test_pictures_fit_a_page(figure):
    image = in_few_colours(figure)
    assert image.mode == "P" and image.width <= 1000


def test_a_picture_is_as_large_wherever_it_is_drawn(figure, monkeypatch):
    "A page of the companion sets `savefig.dpi`; what was drawn after one had other pixels."
    import matplotlib
    here = in_few_colours(figure).size
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 160)
    assert in_few_colours(figure).size == here
