"""glsim.model_utils.cal: the attention's crops and losses written out, files.

What it shares with the other models is in test_glsim_families.py, the released figures in tests/parity.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import LABELS
from small_models import cal as tiny
from torch import nn

from glsim.model_utils.cal import CENTER_RATE, Classifier, attended, bilinear_pooling, padded_boxes


def images(batch=2, size=64):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(size)) - 0.5


# The parts, written out.


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 4, 4), (3, 2, 4, 2, 7)], ids=str)
def test_bilinear_pooling_equals_loops_in_float64(shape):
    batch, channels, num_maps, height, width = shape
    generator = torch.Generator().manual_seed(batch)
    features = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    maps = torch.randn(batch, num_maps, height, width, generator=generator, dtype=torch.float64).relu()
    pooled = bilinear_pooling(features, maps)
    for row in range(batch):
        means = [(maps[row, m] * features[row, c]).mean().item() for m in range(num_maps) for c in range(channels)]
        roots = [math.copysign(math.sqrt(abs(mean) + 1e-6), mean) if mean else 0.0 for mean in means]
        norm = math.sqrt(sum(root**2 for root in roots)) or 1.0
        assert pooled[row].tolist() == pytest.approx([root / norm for root in roots], abs=1e-12)


def slow_attended(heat, share, size):
    """Return what the one map `heat`, resized with corners aligned, has above a share of its maximum."""
    places = (torch.linspace(0, side - 1, size, dtype=torch.float64) for side in heat.shape)
    rows, columns = (
        (1 - (place[:, None] - torch.arange(side)).abs()).clamp(min=0)
        for place, side in zip(places, heat.shape, strict=True)
    )
    pixels = rows @ heat.double() @ columns.T
    return pixels > share * pixels.max()


def slow_box(where):
    size = len(where)
    places = where.nonzero().tolist() or [[0, 0], [size - 1, size - 1]]
    padding, box = int(0.1 * size), []
    for axis in (0, 1):
        numbers = [place[axis] for place in places]
        box += [max(min(numbers) - padding, 0), min(max(numbers) + 1 + padding, size)]
    return box


def slow_crop(image, box):
    part = image[:, box[0] : box[1], box[2] : box[3]]
    return F.interpolate(part[None], image.shape[-2:], mode="bilinear", align_corners=True)[0]


def test_thresholds_and_boxes_equal_loops_over_pixels():
    heat = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0)) ** 4
    shares = torch.tensor([0.2, 0.5, 0.9, 0.0])
    where = attended(heat, shares, 31)
    assert [slow_attended(*pair, 31).tolist() for pair in zip(heat, shares, strict=True)] == where.tolist()
    assert torch.equal(attended(heat, 0.5, 31)[1], where[1])
    spots = torch.zeros(5, 31, 31, dtype=torch.bool)
    spots[0, 0, 30] = spots[1, 30, 0] = spots[2, 15, 15] = spots[3, 3, 4:20] = True  # and nothing in the last
    every = torch.cat((where, spots))
    assert padded_boxes(every).tolist() == [slow_box(one) for one in every]
    assert padded_boxes(every)[-1].tolist() == [0, 31, 0, 31]


@torch.no_grad()
def test_evaluation_is_the_mean_over_the_image_its_crops_and_the_same_mirrored():
    model, batch = tiny(), images(3)
    strongest = model.look(batch).maps.amax().item()
    nn.init.constant_(model.attention[1].bias, -0.7 * strongest)  # few places are attended to
    logits, views = model.multi_crop(batch)
    assert torch.equal(model(batch), logits)
    changed = 0
    for row, image in enumerate(batch):
        expected, seen = [], []
        for one in (image, image.flip(-1)):
            look = model.look(one[None])
            heat = look.maps[0].mean(0)
            crops = [slow_crop(one, slow_box(slow_attended(heat, share, 64))) for share in (0.3, 0.2)]
            seen += [one, *crops]
            expected += [look.logits, *(model.look(view[None]).logits for view in crops)]
        torch.testing.assert_close(views[[0, 2, 4, 1, 3, 5], row], torch.stack(seen), atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[row], torch.cat(expected).mean(0), atol=1e-4, rtol=0)
        changed += not torch.equal(seen[1], image)
    assert changed  # crops are no whole images here
    model.single_crop = True
    assert torch.equal(model(batch), model.look(batch).logits)
    assert not torch.allclose(model(batch), logits, atol=1e-3)


def smoothed(logits, labels, smoothing):
    log_p = logits.log_softmax(-1)
    rows = torch.arange(len(labels))
    return (-(1 - smoothing) * log_p[rows, labels] - smoothing * log_p.mean(-1)).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_that_of_logits_and_effects_of_three_views_and_the_distance_to_the_centres(smoothing):
    model, looks = tiny(smoothing_value=smoothing).train(), []
    nn.init.normal_(model.classifier.feature_center, std=0.02)
    centers, look = model.classifier.feature_center[LABELS].clone(), model.look

    def spy(batch):
        looks.append((batch, look(batch)))
        return looks[-1][1]

    model.look = spy
    batch = images()
    loss, logits = model(batch, LABELS)
    (first, seen), (augmented, again) = looks
    assert torch.equal(first, batch)
    assert torch.equal(logits, seen.logits)
    assert augmented.shape == (4, 3, 64, 64)
    assert not augmented.requires_grad
    expected = (seen.pooled - centers).square().sum() / 2
    for of_image, of_others in ((seen.logits, again.logits), (seen.effect, again.effect)):
        for view in (of_image, *of_others.chunk(2)):
            expected = expected + smoothed(view, LABELS, smoothing) / 3
    torch.testing.assert_close(loss, expected)
    evaluated, logits = model.eval()(batch, LABELS)
    torch.testing.assert_close(evaluated, smoothed(logits, LABELS, smoothing))


def test_centres_follow_the_mean_features_of_their_class():
    classifier, labels = Classifier(6, 4).double(), torch.tensor([2, 0, 2, 2])
    nn.init.normal_(classifier.feature_center)
    before, pooled = classifier.feature_center.clone(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    loss = classifier.center_loss(pooled, labels)
    distances = [(pooled[row] - before[label]).square().sum() for row, label in enumerate(labels)]
    torch.testing.assert_close(loss, sum(distances) / 4)
    loss.backward()
    torch.testing.assert_close(pooled.grad, 2 * (pooled - before[labels]).detach() / 4)
    expected = before.clone()
    expected[0] += CENTER_RATE * (pooled[1].detach() - before[0])
    expected[2] += CENTER_RATE * (pooled[[0, 2, 3]].detach().mean(0) - before[2])
    torch.testing.assert_close(classifier.feature_center, expected)


# Files and refusals.
