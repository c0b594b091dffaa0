import gc

import numpy as np
import pytest
import torch
from matplotlib import colormaps, rc_context, rcParams, rcsetup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from formula import picture
from lightning_models import MEAN, STD
from sess_lightning.reporting.panels import Panel, curve_figure, displayed, overlay, sheet

GREEN = [0, 255, 0]


def plain(height, width, value=100):
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_displaying_undoes_the_normalisation_exactly():
    pixels = torch.randint(0, 256, (2, 3, 8, 10), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    normalised = (pixels / 255 - mean) / std
    shown = displayed(normalised, (MEAN, STD))
    assert [image.dtype for image in shown] == [np.uint8] * 2
    for image, original in zip(shown, pixels, strict=True):
        assert np.array_equal(image, original.permute(1, 2, 0).numpy())


def test_one_mean_and_std_serve_all_channels():
    pixels = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    (image,) = displayed((pixels - 0.5) / 0.25, ([0.5], [0.25]))
    assert image.tolist() == [[[0, 128, 255]]]


def test_an_unknown_normalisation_stretches_each_image_to_its_own_range():
    images = torch.stack([torch.tensor([-2.0, 0, 2]), torch.tensor([10.0, 10, 10])]).view(2, 3, 1, 1)
    first, flat = displayed(images)
    assert first.tolist() == [[[0, 128, 255]]]
    assert flat.tolist() == [[[0, 0, 0]]]


def test_a_few_outliers_do_not_make_the_rest_black():
    ramp = torch.linspace(0, 1, 1000).repeat(3, 1).view(1, 3, 10, 100)
    ramp[..., 0, 0], ramp[..., -1, -1] = -50, 900
    (image,) = displayed(ramp)
    assert image[5, 0, 0] == pytest.approx(
        255 * (0.5 - 0.02) / 0.96, abs=1
    )  # Between the percentiles 2 and 98.


def test_a_small_thing_on_an_even_ground_is_still_seen():
    images = torch.full((1, 1, 20, 20), 3.0)
    images[..., 4:6, 4:6] = 9
    assert np.unique(displayed(images)[0], return_counts=True)[1].tolist() == [3 * 396, 3 * 4]


PIXELS = torch.randint(0, 256, (2, 3, 8, 10), generator=torch.Generator().manual_seed(1)).float()


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),  # ImageNet's, of bytes.
        ([123.68, 116.779, 103.939], [1.0, 1.0, 1.0]),  # Caffe's.
        ([0.0], [255.0]),
        ([127.5], [127.5]),
    ],
)
def test_a_normalisation_of_bytes_is_undone_exactly(mean, std):
    normalised = (PIXELS - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    for image, original in zip(displayed(normalised, (mean, std)), PIXELS, strict=True):
        assert np.array_equal(image, original.permute(1, 2, 0).numpy())


def test_reflectances_are_stretched_and_three_of_their_bands_are_shown():
    mean, std = [1300.0 + band for band in range(13)], [250.0] * 13
    bands = torch.rand(1, 13, 32, 32, generator=torch.Generator().manual_seed(0)) * 3000
    normalised = (bands - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    (image,) = displayed(normalised, (mean, std), channels=(3, 2, 1))
    low, high = np.percentile(bands[0, [3, 2, 1]].numpy(), (2, 98))
    expected = ((bands[0, [3, 2, 1]] - low) / (high - low)).clamp(0, 1) * 255
    # Rounding to bytes, and of float32 to and fro through the normalisation.
    assert np.abs(image.astype(float) - expected.permute(1, 2, 0).numpy()).max() <= 0.51
    assert (image == 255).mean() < 0.03


def test_a_normalisation_that_is_not_the_images_own_does_not_make_them_white():
    (image,) = displayed(PIXELS[:1], (MEAN, STD))
    assert (image == 255).mean() < 0.05
    assert (image == 0).mean() < 0.05


def test_one_channel_may_be_chosen_and_is_shown_grey():
    images = torch.tensor([0.2, 0.4, 0.6, 0.8]).view(1, 4, 1, 1)
    assert displayed(images, ([0.0], [1.0]), channels=[2])[0].tolist() == [[[153, 153, 153]]]


@pytest.mark.parametrize("channels", [[0, 1], [0, 1, 4], [-1], []])
def test_channels_that_the_images_do_not_have_are_refused(channels):
    with pytest.raises(ValueError, match=r"must be one or three of the images' channels 0\.\.3"):
        displayed(torch.zeros(1, 4, 2, 2), channels=channels)


@pytest.mark.parametrize(
    ("channels", "expected"), [(1, [51, 51, 51]), (2, [51, 51, 51]), (4, [51, 102, 153])]
)
def test_one_channel_is_shown_grey_and_of_many_the_first_three(channels, expected):
    images = torch.tensor([0.2, 0.4, 0.6, 0.8])[:channels].view(1, channels, 1, 1)
    (image,) = displayed(images, ([0.0], [1.0]))
    assert image.tolist() == [[expected]]


def test_what_lies_beyond_black_and_white_is_cut_and_nan_is_black():
    images = torch.tensor([-3.0, torch.nan, 7.0]).view(1, 3, 1, 1)
    assert displayed(images, ([0.0], [1.0]))[0].tolist() == [[[0, 0, 255]]]


def test_half_precision_is_displayed():
    images = torch.tensor([0.0, 0.5, 1.0], dtype=torch.bfloat16).view(1, 3, 1, 1)
    assert displayed(images, ([0.0], [1.0]))[0].tolist() == [[[0, 128, 255]]]


def test_zeros_and_ones_are_drawn_in_the_colours_own_ends():
    blue, red = overlay(plain(4, 5), torch.zeros(4, 5)), overlay(plain(4, 5), torch.ones(4, 5))
    # The ends of "jet" are (0, 0, 127.5) and (127.5, 0, 0); half of each and half of the picture's 100.
    assert blue[0, 0].tolist() == [50, 50, 114]
    assert red[0, 0].tolist() == [114, 50, 50]
    assert (blue == blue[0, 0]).all()
    assert blue.shape == (4, 5, 3)
    assert blue.dtype == np.uint8


def test_an_overlay_without_strength_is_the_picture():
    image = displayed(picture(8, 8, 1)[None])[0]
    assert np.array_equal(overlay(image, torch.rand(8, 8), strength=0.0), image)


def test_an_overlay_lies_pixel_on_pixel():
    saliency = torch.zeros(4, 5)
    saliency[1, 3] = 1
    drawn = overlay(plain(4, 5), saliency)
    assert np.argwhere(drawn[..., 0] == 114).tolist() == [[1, 3]]


def a_panel(boxes=(), height=56, width=56, caption="label: cat"):
    overlays = {"base": plain(height, width, 50), "SESS": plain(height, width, 20)}
    return Panel(plain(height, width), overlays, caption=caption, boxes=boxes, label="cat", title="sample 1")


def test_a_strip_is_the_image_and_its_overlays_side_by_side():
    strip = a_panel(height=4, width=5).strip
    assert strip.shape == (4, 15, 3)
    assert [strip[0, x, 0].item() for x in (0, 4, 5, 9, 10, 14)] == [100, 100, 50, 50, 20, 20]


def test_a_sheet_has_a_row_per_sample_and_room_for_captions():
    page = sheet([a_panel(), a_panel(), a_panel()], side=112)
    assert page.shape == (26 + 3 * (112 + 6), 3 * (112 + 4) + 300, 3)
    assert page.dtype == np.uint8
    for row in range(3):
        top = 26 + row * 118
        assert [page[top + 60, x + 60, 0].item() for x in (0, 116, 232)] == [100, 50, 20]


def test_a_sheet_of_very_wide_images_stays_small_and_their_boxes_stay_in_place():
    page = sheet(
        [a_panel(height=1, width=5000), a_panel(height=10, width=1000, boxes=[(100.0, 0.0, 1000.0, 10.0)])]
    )
    assert page.shape == (26 + 2 * 230, 3 * (6 * 224 + 4) + 300, 3)
    green = (page[26 + 230 :, : 6 * 224] == (0, 255, 0)).all(-1).nonzero()
    assert [int(axis.min()) for axis in green] == [0, 134]
    assert [int(axis.max()) for axis in green] == [12, 1343]


def test_a_sheets_captions_are_written_beside_the_pictures():
    written = sheet([a_panel()], side=112)[26:138, 3 * 116 :]
    blank = sheet([a_panel(caption="")], side=112)[26:138, 3 * 116 :]
    assert (written < 128).any(2).sum() > (blank < 128).any(2).sum() > 0


@pytest.mark.parametrize(("one", "other"), ["éè", "ßø", "жд", "πσ", "łż", "×−"])
def test_letters_beyond_english_ones_are_drawn_and_not_as_boxes(one, other):
    first, second = (sheet([a_panel(caption=f"label: {letter}")], side=112) for letter in (one, other))
    assert (first != second).any()


def test_pictures_that_are_wider_than_high_keep_their_shape():
    assert sheet([a_panel(height=50, width=100)], side=100).shape == (26 + 106, 3 * 204 + 300, 3)


def test_boxes_are_drawn_green_where_they_are_on_every_picture_of_the_row():
    page = sheet([a_panel(boxes=[(14.0, 7.0, 42.0, 28.0)])], side=224)  # Four times the picture's size.
    rows, columns = np.nonzero((page == GREEN).all(2))
    for left in (0, 228, 456):
        here = (columns >= left) & (columns < left + 224)
        assert (columns[here].min() - left, columns[here].max() - left) == (56, 167)
        assert (rows[here].min() - 26, rows[here].max() - 26) == (28, 111)
    assert page[26 + 60, 100].tolist() == [100, 100, 100]  # Inside, the picture shows.
    assert page[26 + 28, 100].tolist() == GREEN


def test_boxes_without_area_are_not_drawn():
    page = sheet([a_panel(boxes=[(5.0, 5.0, 5.0, 20.0)])], side=224)
    assert not (page == GREEN).all(2).any()


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
def test_every_value_is_blended_with_every_shade_as_floats_would_be(strength):
    values = torch.linspace(0, 1, 256)[:, None].expand(256, 256)
    shades = np.arange(256, dtype=np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2)
    tints = (colormaps["jet"](np.linspace(0, 1, 256))[:, None, :3] * 255).astype(np.float32)
    blended = ((1 - strength) * shades + strength * tints).round().astype(np.uint8)
    assert np.array_equal(overlay(shades, values, strength=strength), blended)


def test_a_figure_of_curves_has_a_line_per_method():
    up, down = torch.linspace(0, 1, 29), torch.linspace(1, 0, 29)
    one = curve_figure({"SESS (n=8)": torch.stack([up, down])})
    two = curve_figure({"SESS (n=8)": torch.stack([up, down]), "base (n=8)": torch.stack([down, up])})
    assert one.shape == two.shape == (396, 990, 3)
    assert one.dtype == np.uint8
    blue, orange = [31, 119, 180], [255, 127, 14]  # The first colours of matplotlib's cycle.
    assert (one == blue).all(2).any()
    assert not (one == orange).all(2).any()
    assert (two == orange).all(2).any()


def test_curves_with_gaps_are_drawn():
    assert curve_figure({"SESS": torch.full((2, 29), torch.nan)}, "after epoch 3").shape == (396, 990, 3)


def test_a_figure_of_curves_leaves_nothing_to_the_garbage_collector():
    curves = {"SESS": torch.rand(2, 29)}
    curve_figure(curves)
    gc.collect()
    curve_figure(curves)
    assert gc.isenabled()
    assert gc.collect() == 0


def drawn_whole(curves, title):
    """Curves in axes that are drawn with them, as matplotlib does by itself."""
    figure = Figure(figsize=(9, 3.6), dpi=110)
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.14, top=0.82, wspace=0.06)
    axes = figure.subplots(1, 2, sharey=True)
    for row, kind in enumerate(("Insertion (higher is better)", "Deletion (lower is better)")):
        for i, (name, curve) in enumerate(curves.items()):
            share = np.linspace(0, 100, curve.shape[1])
            axes[row].plot(share, curve[row], label=name, lw=1.2 if i else 2.4)
        axes[row].set(title=kind, xlabel="pixels changed, most salient first (%)", ylim=(0, 1), xlim=(0, 100))
        axes[row].grid(alpha=0.3)
    axes[0].set_ylabel("probability of the target")
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@pytest.mark.parametrize("name", ["base (n=8)", "a name that is as long as both axes are wide " * 5])
def test_kept_axes_give_the_figure_that_is_drawn_whole_every_time(name):
    noise, steps = torch.rand(2, 57), torch.tensor([[0, 1, 0, 1.5, -0.5], [1, 0, torch.nan, 0, 1]])
    for run, own in enumerate((steps, noise, steps)):
        curves = {"SESS (n=8)": own, name: own.flip(1)}
        assert np.array_equal(curve_figure(curves, f"epoch {run}"), drawn_whole(curves, f"epoch {run}"))


def test_the_axes_are_drawn_once_for_a_style_and_its_methods(monkeypatch):
    made, make = [], Figure.subplots

    def noting(*args, **kwargs):
        made.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(Figure, "subplots", noting)
    for runs, names in enumerate(("once", "twice"), 1):
        for _ in range(3):
            plain = curve_figure({names: torch.zeros(2, 29)})
        assert len(made) == runs
    with rc_context({"axes.facecolor": "black"}):
        assert not np.array_equal(curve_figure({"twice": torch.zeros(2, 29)}), plain)
    assert len(made) == 3
    assert np.array_equal(curve_figure({"twice": torch.zeros(2, 29)}), plain)


def test_a_style_that_asks_for_latex_is_drawn_without_it():
    curves = {"minus_base, 50 %": torch.zeros(2, 29)}
    plain = curve_figure(curves, "of_50 %")
    with rc_context({"text.usetex": True}):
        assert np.array_equal(curve_figure(curves, "of_50 %"), plain)
        assert rcParams["text.usetex"]


def test_drawing_chooses_no_backend_for_the_user():
    chosen = dict.__getitem__(rcParams, "backend")  # Read in any other way, it is decided.
    try:
        dict.__setitem__(rcParams, "backend", rcsetup._auto_backend_sentinel)
        curve_figure({"drawn by no other test": torch.zeros(2, 29)})
        found = dict.__getitem__(rcParams, "backend")
    finally:
        dict.__setitem__(rcParams, "backend", chosen)
    assert found is rcsetup._auto_backend_sentinel
