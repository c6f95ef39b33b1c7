"""Default boxes against published counts, published sizes and torchvision's generator."""

import dataclasses
import math

import pytest
import torch

from ssd_ext import priors
from ssd_ext.priors import SSD300_COCO, SSD300_PAPER, SSD300_VOC, SSD512_COCO, SSD512_VOC, PriorSpec, paper_scales

PRESETS = {name: spec for name, spec in vars(priors).items() if isinstance(spec, PriorSpec)}
SSD300 = (SSD300_VOC, SSD300_COCO, SSD300_PAPER)
SSD512 = (SSD512_VOC, SSD512_COCO)


def torchvision_priors(spec, image_size=None, feature_sizes=None):
    """The same spec through torchvision: corners in pixels."""
    anchor_utils = pytest.importorskip("torchvision.models.detection.anchor_utils")
    image_list = pytest.importorskip("torchvision.models.detection.image_list")
    generator = anchor_utils.DefaultBoxGenerator(
        [list(ratios) for ratios in spec.aspect_ratios],
        scales=list(spec.scales),
        steps=list(spec.steps) if spec.steps else None,
        clip=spec.clip,
    )
    height, width = image_size or spec.image_size
    images = image_list.ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    (boxes,) = generator(images, [torch.zeros(1, 1, *size) for size in feature_sizes or spec.feature_sizes])
    return boxes


def corners(boxes):
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)


@pytest.mark.parametrize("spec", SSD300)
def test_ssd300_counts(spec):
    assert spec.counts() == [5776, 2166, 600, 150, 36, 4]
    assert spec.per_cell() == [4, 6, 6, 6, 4, 4]
    assert spec.priors().shape == (8732, 4)
    assert spec.priors().dtype == torch.float32


@pytest.mark.parametrize("spec", SSD512)
def test_ssd512_counts(spec):
    assert spec.counts() == [16384, 6144, 1536, 384, 96, 16, 4]
    assert spec.per_cell() == [4, 6, 6, 6, 6, 4, 4]
    assert spec.priors().shape == (24564, 4)


@pytest.mark.parametrize(
    ("spec", "min_sizes"),
    [  # the released configurations, in pixels; the last is the highest level's max_size
        (SSD300_COCO, [21, 45, 99, 153, 207, 261, 315]),
        (SSD512_VOC, [35.84, 76.8, 153.6, 230.4, 307.2, 384, 460.8, 537.6]),
        (SSD512_COCO, [20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72]),
    ],
)
def test_published_sizes(spec, min_sizes):
    assert [s * spec.image_size[0] for s in spec.scales] == pytest.approx(min_sizes)


def test_formula_of_the_paper():
    assert paper_scales(6) == pytest.approx((0.2, 0.34, 0.48, 0.62, 0.76, 0.9, 1.04))
    assert SSD300_PAPER.scales == paper_scales(6)
    assert SSD300_VOC.scales == pytest.approx((0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.075))
    assert paper_scales(2, 0.5, 1.0) == (0.5, 1.0, 1.5)
    for arguments in ({"levels": 1}, {"levels": 2, "first": 0.1}):
        with pytest.raises(ValueError, match=f"two levels at least .* got {arguments['levels']}"):
            paper_scales(**arguments)


def test_shapes_and_order_of_a_cell():
    spec = PriorSpec((100, 200), ((2, 2), (1, 1)), (0.2, 0.45, 1), ((4,), ()), clip=False)
    boxes = spec.priors(dtype=torch.float64)
    square, between, wide, tall = boxes[:4]
    assert square.tolist() == pytest.approx([0.25, 0.25, 0.2, 0.2])
    assert between.tolist() == pytest.approx([0.25, 0.25, 0.3, 0.3])  # sqrt(0.2 * 0.45)
    assert wide.tolist() == pytest.approx([0.25, 0.25, 0.4, 0.1])
    assert tall.tolist() == pytest.approx([0.25, 0.25, 0.1, 0.4])
    assert boxes[4:16:4, :2].tolist() == [[0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert boxes[16:, 2].tolist() == pytest.approx([0.45, math.sqrt(0.45)])
    pixels = spec.priors(dtype=torch.float64, pixels=True)
    assert torch.equal(pixels, boxes * torch.tensor([200, 100, 200, 100]))


@pytest.mark.parametrize("name", PRESETS)
def test_agrees_with_torchvision(name):
    spec = PRESETS[name]
    expected = torchvision_priors(spec)
    torch.testing.assert_close(corners(spec.priors(pixels=True)), expected, rtol=0, atol=2e-4)
    evenly = dataclasses.replace(spec, steps=None, clip=False)
    torch.testing.assert_close(corners(evenly.priors(pixels=True)), torchvision_priors(evenly), rtol=0, atol=2e-4)


def test_torchvisions_ssd300_is_the_coco_preset():
    detection = pytest.importorskip("torchvision.models.detection")
    model = detection.ssd300_vgg16(weights=None, weights_backbone=None)
    generator = model.anchor_generator
    assert tuple(generator.scales) == SSD300_COCO.scales
    assert tuple(map(tuple, generator.aspect_ratios)) == SSD300_COCO.aspect_ratios
    assert tuple(generator.steps) == SSD300_COCO.steps
    assert generator.clip == SSD300_COCO.clip
    assert generator.num_anchors_per_location() == SSD300_COCO.per_cell()


def test_other_image_sizes():
    assert SSD512_COCO.counts((512, 640)) == [20480, 7680, 1920, 480, 120, 24, 8]
    assert SSD300_COCO.counts((300, 300)) == SSD300_COCO.counts()
    sizes = [(64, 80), (32, 40), (16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]
    boxes = SSD512_COCO.priors((512, 640), pixels=True)
    assert torch.equal(boxes, SSD512_COCO.priors((512, 640), sizes, pixels=True))
    evenly = dataclasses.replace(SSD512_COCO, steps=None)  # torchvision's steps put a third column at x = 640
    torch.testing.assert_close(corners(boxes), torchvision_priors(evenly, (512, 640), sizes), rtol=0, atol=2e-4)
    mobile = SSD300_COCO.priors((200, 320), [(20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 3)])
    assert len(mobile) == 400 * 4 + 100 * 6 + 25 * 6 + 9 * 6 + 4 * 4 + 3 * 4


def centres(spec, k, dtype=torch.float64):
    """Rows and columns of level k, in pixels."""
    first, count = sum(spec.counts()[:k]), spec.counts()[k]
    of_level = spec.priors(pixels=True, dtype=dtype)[first : first + count]
    return of_level[:, 1].unique(), of_level[:, 0].unique()


@pytest.mark.parametrize("name", PRESETS)
def test_centres_at_the_size_of_a_preset(name):
    """Steps and cells give the same bits there."""
    spec = PRESETS[name]
    assert spec.resized() is spec
    side, first = spec.image_size[0], 0
    for k, ((rows, _), count) in enumerate(zip(spec.feature_sizes, spec.counts(), strict=True)):
        found = spec.priors(dtype=torch.float64)[first : first + count, :2]
        expected = (torch.arange(rows, dtype=torch.float64) + 0.5) * (spec.steps[k] / side if spec.steps else 1 / rows)
        assert all(torch.equal(axis.unique(), expected) for axis in found.T)
        first += count


# What VGG16 gives: of SSD300 at (480, 640) and so on.
OTHER_SIZES = [
    (SSD300_COCO, (480, 640), ((60, 80), (30, 40), (15, 20), (8, 10), (6, 8), (4, 6)), 0),
    (SSD300_COCO, (512, 512), ((64, 64), (32, 32), (16, 16), (8, 8), (6, 6), (4, 4)), 0),
    (SSD300_COCO, (512, 1024), ((64, 128), (32, 64), (16, 32), (8, 16), (6, 14), (4, 12)), 0),
    # 19 * 6 at x = 304, as at 300 x 300, and 5 * 6 at y = 608
    (SSD300_COCO, (600, 300), ((75, 38), (37, 19), (19, 10), (10, 5), (8, 3), (6, 1)), 144),
    (SSD512_COCO, (512, 1024), ((64, 128), (32, 64), (16, 32), (8, 16), (4, 8), (2, 4), (1, 3)), 0),
    (SSD512_COCO, (600, 300), ((75, 38), (37, 19), (19, 10), (10, 5), (5, 3), (3, 2), (2, 1)), 0),
    (SSD512_COCO, (516, 520), ((65, 65), (32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1)), 0),
]


@pytest.mark.parametrize(("preset", "size", "cells", "outside"), OTHER_SIZES)
def test_levels_stay_spread_at_other_sizes(preset, size, cells, outside):
    spec = preset.resized(size, cells)
    assert torch.equal(spec.priors(), preset.priors(size, cells))
    strided = 4 if preset is SSD300_COCO else 0
    for k, (step, counts) in enumerate(zip(preset.steps, cells, strict=True)):
        for found, n, side in zip(centres(spec, k), counts, size, strict=True):
            width = step if k < strided else side / n
            torch.testing.assert_close(found, (torch.arange(n, dtype=torch.float64) + 0.5) * width)
    assert (spec.priors()[:, :2] > 1).any(1).sum() == outside
    # from any size to any other, as directly
    again = spec.resized(preset.image_size, preset.feature_sizes)
    assert torch.equal(again.priors(), preset.priors())


def test_spread_may_be_given():
    cells = {"image_size": (64, 96), "feature_sizes": ((8, 12), (4, 6)), "scales": (0.2, 0.5, 0.9)}
    spec = PriorSpec(**cells, aspect_ratios=((), ()), steps=(8, 10), spread=(False, True))
    assert centres(spec, 1)[1].tolist() == pytest.approx([8, 24, 40, 56, 72, 88])
    longer = spec.resized((70, 100), ((9, 13), (5, 7)))
    assert centres(longer, 0)[0].tolist() == pytest.approx([4, 12, 20, 28, 36, 44, 52, 60, 68])
    assert centres(longer, 1)[0].tolist() == pytest.approx([7, 21, 35, 49, 63])
    # by default a level is spread if its step divides both sides
    narrow = dataclasses.replace(spec, steps=(8, 16), spread=None, image_size=(64, 97))
    assert centres(narrow.resized((70, 100), ((9, 13), (5, 7))), 1)[0].tolist() == pytest.approx([8, 24, 40, 56, 72])
    # without steps every level is
    free = dataclasses.replace(longer, steps=None)
    assert centres(free, 0)[0].tolist() == pytest.approx([70 / 9 * (i + 0.5) for i in range(9)])


def test_centres_far_outside_are_refused():
    far = (
        r"level 1 has 1x4 cells of steps\[1\]=300 pixels, so that its last centre, y=150 and x=1050, is more than a "
        "cell outside of an image of 300x500: reduce the step, or give steps=None"
    )
    sizes = {"image_size": (300, 500), "feature_sizes": ((38, 63), (1, 4))}
    with pytest.raises(ValueError, match=far):
        PriorSpec(**sizes, scales=(0.2, 0.5, 0.9), aspect_ratios=((), ()), steps=(8, 300))
    five = {"image_size": (300, 300), "feature_sizes": ((5, 1),), "scales": (0.5, 0.9), "aspect_ratios": ((),)}
    PriorSpec(**five, steps=(300 / 3.5,))  # the last of five centres is at 4.5 steps
    with pytest.raises(ValueError, match="level 0 has 5x1 cells"):
        PriorSpec(**five, steps=(300 / 3.5 + 0.01,))
    strided = dataclasses.replace(SSD300_COCO, spread=(False,) * 6)
    with pytest.raises(ValueError, match=r"level 5 has 4x4 cells of steps\[5\]=300 pixels"):
        strided.priors((512, 512), OTHER_SIZES[1][2])


def test_clip_bounds_sizes_to_the_image():
    clipped, free = SSD300_COCO.priors(), dataclasses.replace(SSD300_COCO, clip=False).priors()
    assert clipped[:, 2:].max() == 1
    assert free[:, 2:].max() == pytest.approx(0.87 * 2**0.5)
    assert torch.equal(clipped[:, :2], free[:, :2])


def test_dtype_rounds_once():
    exact = SSD300_COCO.priors(dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(SSD300_COCO.priors(dtype=dtype), exact.to(dtype))


def test_check_lists_every_level():
    SSD300_COCO.check(8732)
    SSD512_COCO.check(24564)
    with pytest.raises(
        ValueError,
        match=r"for 8730 priors, but an image of 300x300 has 38x38x4 \(5776\) \+ 19x19x6 \(2166\) \+ 10x10x6 \(600\) "
        r"\+ 5x5x6 \(150\) \+ 3x3x4 \(36\) \+ 1x1x4 \(4\) = 8732",
    ):
        SSD300_COCO.check(8730)
    with pytest.raises(ValueError, match=r"image of 300x600 has 38x75x4 \(11400\)"):
        SSD300_COCO.check(8732, (300, 600))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scales": (0.1, 0.2)}, r"scales must have 7 entries for 6 levels: got \(0.1, 0.2\)"),
        ({"aspect_ratios": ((2,),)}, r"aspect_ratios must have 6 entries for 6 levels"),
        ({"steps": (8,)}, r"steps must have 6 entries .* got \(8,\)"),
        ({"spread": (True,)}, r"spread must have 6 entries .* got \(True,\)"),
        ({"scales": (0, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)}, r"scales must be positive numbers: got \(0, "),
        ({"scales": (math.nan, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)}, r"scales must be positive numbers: got \(nan, "),
        ({"aspect_ratios": ((-2,), (2,), (2,), (2,), (2,), (2,))}, r"ratios must be positive numbers: got \(\(-2,\)"),
        ({"steps": (8, 16, 32, 64, 100, 0)}, r"steps must be positive numbers: got"),
        ({"image_size": (300, 0)}, r"image_size must be positive \(height, width\): got \[\(300, 0\)\]"),
        ({"image_size": (300,)}, r"image_size must be positive \(height, width\): got \[\(300,\)\]"),
    ],
)
def test_wrong_spec_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(SSD300_COCO, **changes)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"feature_sizes must have 6 levels: got \[\(38, 38\)\]"):
        SSD300_COCO.priors(feature_sizes=[(38, 38)])
    with pytest.raises(ValueError, match=r"feature_sizes must be positive"):
        SSD300_COCO.priors(feature_sizes=[(38, 38)] * 5 + [(0, 1)])
    with pytest.raises(ValueError, match=r"image_size must be positive"):
        SSD300_COCO.priors((0, 300))
    with pytest.raises(ValueError, match=r"without steps, an image of \(300, 400\) needs its feature_sizes"):
        dataclasses.replace(SSD300_COCO, steps=None).priors((300, 400))


def test_lists_and_tuples_of_sizes_give_equal_specs():
    cells = ((64, 64), (32, 32), (16, 16), (8, 8), (6, 6), (4, 4))
    assert SSD300_COCO.resized((512, 512), list(cells)) == SSD300_COCO.resized((512, 512), cells)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spread": (1, 0, 1, 0, 0, 0)}, r"spread must be True or False of each level: got \(1, 0"),
        ({"spread": True}, "spread must have 6 entries for 6 levels: got True"),
        ({"steps": 8}, "steps must have 6 entries for 6 levels: got 8"),
    ],
)
def test_one_value_for_all_levels_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SSD300_COCO, **changes)
