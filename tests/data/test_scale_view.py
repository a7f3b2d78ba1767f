import pytest
import torch
import torch.nn.functional as F

from xscale_lightning.data.scale_view import ScaleView, View
from xscale_lightning.errors import UserError


def ramp(batch: int = 4, size: int = 64) -> torch.Tensor:
    """Images that hold their own row and column, in pixels."""
    steps = torch.arange(size, dtype=torch.float32) + 0.5
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij")).expand(batch, 2, size, size).contiguous()


@pytest.mark.parametrize("crop_per", ["batch", "sample"])
@pytest.mark.parametrize("sizes", [None, [32]])
def test_boxes_say_where_the_view_lies_and_gsd_its_scale(crop_per, sizes):
    torch.manual_seed(0)
    view = ScaleView(sizes=sizes)(View(ramp(), torch.full((4,), 10.0)), crop_per)
    size = 32 if sizes else 64
    top, left, height, width = view.boxes.unbind(1)
    centre = view.images[:, :, size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1].mean((2, 3))
    torch.testing.assert_close(
        centre, torch.stack([top + height / 2, left + width / 2], 1), rtol=0, atol=0.1 if sizes else 1e-3
    )
    torch.testing.assert_close(view.gsd, 10 * (height * width).sqrt() / size)
    shares = height * width / 64**2
    assert (shares > 0.23).all() and (shares < 0.77).all()  # whole pixels round the published boxes
    assert len({tuple(box) for box in view.boxes.tolist()}) == (1 if crop_per == "batch" else 4)


def test_the_published_crop_is_cut_first_and_then_resized():
    torch.manual_seed(3)
    images = torch.randn(2, 3, 64, 64)
    view = ScaleView()(View(images), "batch")
    top, left, height, width = (int(v) for v in view.boxes[0])
    cut = images[:, :, top : top + height, left : left + width]
    expected = F.interpolate(cut, (64, 64), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(view.images, expected)
    assert view.gsd is None


def test_one_of_the_sizes_is_drawn_per_batch():
    torch.manual_seed(0)
    maker = ScaleView(sizes=[16, 32])
    seen = {maker(View(ramp(1))).images.shape[-1] for _ in range(20)}
    assert seen == {16, 32} and maker.output_sizes(64, 64) == [(16, 16), (32, 32)]


def test_the_whole_image_at_half_the_size_has_twice_the_gsd():
    view = ScaleView(scale=(1, 1), ratio=(1, 1), sizes=[32])(View(ramp(), torch.ones(4)))
    torch.testing.assert_close(view.gsd, torch.full((4,), 2.0))
    torch.testing.assert_close(view.images[..., 1:-1, 1:-1], F.avg_pool2d(ramp(), 2)[..., 1:-1, 1:-1])


@pytest.mark.parametrize("scale", [(0.25, 0.75), (0.05, 0.05), (1.0, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("ratio", [(1.0, 1.0), (0.25, 2.0), (0.75, 1.3333)])
@pytest.mark.parametrize("image", [(64, 64), (32, 128)])
@pytest.mark.parametrize("sizes", [None, [32]])
def test_no_crop_is_shorter_than_the_shortest_side(scale, ratio, image, sizes):
    torch.manual_seed(0)
    maker = ScaleView(scale=scale, ratio=ratio, sizes=sizes)
    boxes = maker(View(torch.zeros(4000, 1, 1, 1).expand(4000, 1, *image))).boxes
    shortest, drawn = maker.shortest_side(*image), boxes[:, 2:].min().item()
    assert drawn >= shortest - 1e-3
    if image == (64, 64):
        assert drawn < shortest * 1.1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"scale": (0.0, 0.5)}, "scale_view.scale"),
        ({"scale": (0.5, 1.5)}, "scale_view.scale"),
        ({"scale": (0.7, 0.3)}, "scale_view.scale"),
        ({"ratio": (1.1, 1.2)}, "scale_view.ratio"),
        ({"ratio": (0.5, float("inf"))}, "scale_view.ratio"),
        ({"interpolation": "cubic"}, "scale_view.interpolation: 'cubic' is unknown"),
        ({"sizes": []}, "scale_view.sizes"),
        ({"sizes": [0]}, "scale_view.sizes"),
    ],
)
def test_ranges_are_checked(options, name):
    with pytest.raises(UserError, match=name):
        ScaleView(**options)
