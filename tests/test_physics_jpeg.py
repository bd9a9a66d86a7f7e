"""JPEG: the codec against Pillow's, the projection against the conditions of optimality."""

import io
import time
import warnings

import deepinv as dinv
import numpy as np
import pytest
import torch
from conftest import refused, seeded
from deepinv.models import Denoiser
from PIL import Image

from deepinv_ud2m import UD2M, Problem, UnfoldedDenoiser, posterior_prox
from deepinv_ud2m.data import photograph
from deepinv_ud2m.physics import JPEG, JPEGQualityGenerator
from deepinv_ud2m.physics import jpeg_codec as codec

QUALITIES = [5, 10, 30, 75, 95]
PILLOW = {"4:2:0": 2, "4:4:4": 0}


def save(x, file, quality, subsampling="4:2:0"):
    """Pillow's file of an image `[1, C, H, W]`."""
    pixels = (255 * x[0]).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=quality, subsampling=PILLOW[subsampling])


def pillow(x, quality, subsampling="4:2:0"):
    """The image after Pillow's coder and decoder, in [0, 255]."""
    file = io.BytesIO()
    save(x, file, quality, subsampling)
    with Image.open(file) as decoded:
        array = np.array(decoded)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)[None].float()


def noisy(x, std, seed=0):
    return x + std * torch.randn(x.shape, generator=seeded(seed), dtype=x.dtype)


@pytest.mark.parametrize("size", [(256, 256), (203, 155), (33, 250)])
@pytest.mark.parametrize("subsampling", [*PILLOW, "grey"])
@pytest.mark.parametrize("quality", QUALITIES)
def test_pixels_agree_with_pillow(quality, subsampling, size):
    """
    YCbCr and RGB are rounded to integers in between: up to 1.4 + 0.5. Elsewhere a coefficient was rounded the
    other way.
    """
    x = photograph("chelsea")[..., : size[0], : size[1]]
    kind, close, least, mean = {}, 2, 0.99, 0.7
    if subsampling == "grey":
        x, close, least, mean = (255 * x[:, 1:2]).round() / 255, 1, 0.97, 0.5
    else:
        kind = {"subsampling": subsampling}
    physics = JPEG(tuple(x.shape[1:]), quality, **kind)
    difference = (255 * physics.A_adjoint(physics(x)).clamp(0, 1) - pillow(x, quality, **kind)).abs()
    assert (difference <= close).float().mean() > least
    assert difference.mean() < mean


@pytest.mark.parametrize("subsampling", PILLOW)
def test_a_decoded_file_gives_the_same_box(subsampling):
    """What a real decoder rounded to 8 bits is coded again to the coefficients of the file."""
    x = photograph("chelsea")
    physics = JPEG((3, 256, 256), 10, subsampling)
    decoded = pillow(x, 10, subsampling)
    steps = physics._steps(x)
    boxes = zip(physics._centres(physics(x), steps), physics._centres(decoded / 255, steps), strict=True)
    for ours, theirs in boxes:
        assert (ours == theirs).float().mean() > 0.999


def test_decoding_is_a_projection():
    """Coding the decoded image again changes nothing, but where 8-bit samples round or saturate."""
    physics = JPEG((3, 64, 64), 20)
    y = physics(photograph("astronaut")[..., 96:160, 96:160])
    centres = physics._centres(y, physics._steps(y))
    assert torch.allclose(codec.to_image(codec.decode(centres, 2, (64, 64))) / 255, y, atol=1e-4)


def interpolation(size):
    """Linear interpolation along a side as a matrix: of the visible samples, and of the others."""
    visible = -(-size // 2)
    parts = [n for n in (visible, -(-size // 16) * 8 - visible) if n]
    eyes = [torch.eye(n, dtype=torch.float64)[:, None] for n in parts]
    return torch.block_diag(
        *(torch.nn.functional.interpolate(eye, scale_factor=2, mode="linear")[:, 0].T for eye in eyes)
    )


@pytest.mark.parametrize("size", [(1, 40), (2, 3), (16, 17), (33, 5), (70, 250)])
def test_upsampling_and_its_inverse_against_dense_matrices(size):
    rows, columns = (interpolation(n) for n in size)
    samples = torch.rand(2, rows.shape[1], columns.shape[1], dtype=torch.float64)
    assert torch.allclose(codec.upsample(samples, size), rows @ samples @ columns.T, atol=1e-12)
    pixels = torch.rand(2, len(rows), len(columns), dtype=torch.float64)
    expected = torch.linalg.pinv(rows) @ pixels @ torch.linalg.pinv(columns).T
    assert torch.allclose(codec.undo_upsample(pixels, size), expected, atol=1e-12)
    assert torch.allclose(codec.undo_upsample(pixels.float(), size), expected.float(), atol=1e-6)


@pytest.mark.parametrize("quality", [1, 2, 49, 50, 51, 98, 99, 100, *QUALITIES])
@pytest.mark.parametrize("subsampling", [*PILLOW, "grey"])
def test_a_file_is_read_with_its_coder(quality, subsampling, tmp_path):
    x = photograph("chelsea")[..., :50, :70]
    x = x.mean(1, keepdim=True) if subsampling == "grey" else x
    save(x, tmp_path / "x.jpg", quality, "4:4:4" if subsampling == "grey" else subsampling)
    y, physics = JPEG.read(tmp_path / "x.jpg")
    assert physics.img_size == tuple(x.shape[1:]) and physics.quality.item() == quality
    assert subsampling in ("grey", physics.subsampling)
    with Image.open(tmp_path / "x.jpg") as decoded:
        array = np.array(decoded).reshape(50, 70, -1)
    assert torch.equal(y, torch.from_numpy(array).permute(2, 0, 1)[None] / 255)
    # The quality shows in the pixels, and another does not.
    assert physics.mismatch(y) < 0.1 and physics.complaint(y) is None
    if 10 <= quality <= 75:
        assert JPEG(physics.img_size, 90, physics.subsampling).mismatch(y) > 0.15


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_files_that_are_no_jpeg_of_that_kind_are_refused(tmp_path, monkeypatch):
    picture = Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8))
    picture.save(tmp_path / "x.png")
    picture.save(tmp_path / "own.jpg", qtables=[list(range(1, 65))] * 2)
    picture.save(tmp_path / "one.jpg", qtables=[[8] * 64] * 2)
    picture.save(tmp_path / "half.jpg", subsampling=1)
    picture.save(tmp_path / "rgb.jpg", keep_rgb=True)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    (tmp_path / "text.jpg").write_text("text")
    picture.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-40])
    (tmp_path / "empty.jpg").touch()
    for name, message in {
        "x.png": "must be a grey JPEG or one of YCbCr, got PNG",
        "own.jpg": "tables of its own",
        "one.jpg": "tables of its own",
        "half.jpg": "subsampling of",
        "rgb.jpg": "got JPEG, RGB",
        "cmyk.jpg": "got JPEG, CMYK",
        "text.jpg": "cannot be read as an image",
        "cut.jpg": "cannot be read as an image",
        "empty.jpg": "cannot be read as an image",
        "": "cannot be read as an image",  # the folder
    }.items():
        with pytest.raises(ValueError, match=message):
            JPEG.read(tmp_path / name)
    for file in (None, 3, b"x.jpg"):
        with pytest.raises(ValueError, match="file must be a path"):
            JPEG.read(file)
    with pytest.raises(FileNotFoundError):
        JPEG.read(tmp_path / "nowhere.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        JPEG.read(tmp_path / "whole.jpg")


def test_damaged_files_give_images_or_clear_errors(tmp_path):
    save(photograph("chelsea")[..., :40, :56], tmp_path / "x.jpg", 50)
    whole, rng = (tmp_path / "x.jpg").read_bytes(), np.random.default_rng(0)
    read = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "x.jpg").write_bytes(damaged)
        try:
            y, physics = JPEG.read(tmp_path / "x.jpg")
            assert tuple(y.shape[1:]) == physics.img_size
            read += 1
        except ValueError as error:
            assert "x.jpg" in str(error)
    assert 10 < read < 190


@pytest.mark.slow
def test_a_photograph_of_12_megapixels(tmp_path):
    x = torch.rand(1, 3, 30, 40, generator=seeded(0))
    x = torch.nn.functional.interpolate(x, (3000, 4000), mode="bilinear")
    save(x, tmp_path / "x.jpg", 75)
    start = time.process_time()
    y, physics = JPEG.read(tmp_path / "x.jpg")
    assert time.process_time() - start < 3
    assert physics.complaint(y) is None
    z = noisy(y, 0.05)
    assert physics.violation(z, y) > 0.5
    assert physics.violation(physics.project(z, y), y) < 0.05


@pytest.mark.parametrize("subsampling", PILLOW)
@pytest.mark.parametrize("quality", QUALITIES)
def test_the_truth_is_in_the_box_and_so_is_the_projection(quality, subsampling):
    x = photograph("astronaut")
    physics = JPEG((3, 256, 256), quality, subsampling)
    y = physics(x)
    # Samples are rounded to 8 bits before: half a unit on a coefficient and a little more, of a step q.
    smallest = min(step.min().item() for step in physics._steps(x))
    assert physics.violation(x, y).item() < 3 / smallest
    z = noisy(x, 0.1)
    projection = physics.project(z, y)
    assert physics.violation(z, y) > 0.1
    assert physics.violation(projection, y) < 1e-3
    assert torch.allclose(physics.project(projection, y), projection, atol=1e-6)


@pytest.mark.parametrize(
    ("subsampling", "size"), [("4:2:0", (203, 155)), ("4:4:4", (60, 96)), ("4:2:0", (7, 90))]
)
def test_cut_blocks_come_close_to_the_box(subsampling, size):
    x = photograph("astronaut")[..., : size[0], : size[1]]
    physics = JPEG((3, *size), 10, subsampling)
    y = physics(x)
    z = noisy(x, 0.1)
    projection = physics.project(z, y)
    assert physics.violation(z, y) > 0.5
    assert physics.violation(projection, y) < 0.05
    # Only the cut blocks are projected several times. It is the same as if all were.
    steps, planes = physics._steps(z), codec.to_planes(255 * z)
    for _ in range(physics.max_iter):
        planes = physics._clamp_once(planes, physics._centres(y, steps), steps)
    assert torch.allclose(codec.to_image(planes) / 255, projection, atol=2e-6)


@pytest.mark.parametrize("subsampling", PILLOW)
def test_projection_is_the_nearest_point(subsampling):
    r"""KKT: z - P is L^T mu, with mu >= 0 at upper faces, <= 0 at lower ones, 0 in the interior."""
    shape = (3, 16, 16)
    physics = JPEG(shape, 20, subsampling)
    x = photograph("chelsea")[..., 100:116, 100:116]
    y, z = physics(x), noisy(x, 0.2, seed=1)
    steps = physics._steps(x)

    def flat(parts):
        # float64 copies: the conditions are then exact to 1e-9 of an 8-bit step.
        return torch.cat([part.double().flatten() for part in parts])

    def coefficients(planes):
        return flat(codec.encode(list(planes.reshape(3, 1, *shape[1:])), physics._factor))

    planes, projected = (flat(codec.to_planes(255 * images)) for images in (z, physics.project(z, y)))
    L = torch.autograd.functional.jacobian(coefficients, planes)
    centres = physics._centres(y, steps)
    q = flat([step.expand_as(n) for step, n in zip(steps, centres, strict=True)])
    mu = torch.linalg.lstsq(L.T, (planes - projected)[:, None]).solution[:, 0]
    assert (L.T @ mu - (planes - projected)).abs().max() < 1e-3
    position = (L @ projected - flat(centres)) / (q / 2)  # in [-1, 1]
    active = mu.abs() > 1e-2
    assert 0.05 < active.double().mean() < 0.95
    assert torch.allclose(position[active], mu[active].sign(), atol=1e-3)
    assert position.abs().max() < 1 + 1e-3


def test_prox_is_the_step_towards_the_projection():
    physics = JPEG((3, 32, 32), 10)
    x = photograph("chelsea")[..., :32, :32].repeat(2, 1, 1, 1)
    y, z = physics(x), x.flip(-1)
    gamma = torch.tensor([0.5, 1e6])
    prox = physics.prox_l2(z, y, gamma)
    projection = physics.project(z, y)
    assert torch.allclose(prox[0], (z + 0.5 * projection)[0] / 1.5, atol=1e-6)
    assert torch.allclose(prox[1], projection[1], atol=1e-5)
    joint = posterior_prox(Problem(y, physics), x, z, sigma=0.3, rho=0.2)
    precision = 0.3**-2 + 0.2**-2
    mean = (x * 0.2**-2 + z * 0.3**-2) / precision
    assert torch.allclose(joint, physics.prox_l2(mean, y, 1 / (precision * 0.005**2)), atol=1e-6)


def test_gradients_of_the_coder_and_of_the_prox():
    weight, x = torch.randn(1, 3, 32, 32, generator=seeded()), photograph("chelsea")[..., :32, :32].clone()
    (JPEG((3, 32, 32), 10, "4:4:4")(x.requires_grad_()) * weight).sum().backward()
    assert torch.allclose(x.grad, weight, atol=1e-4)  # without rounding, coding and decoding is the identity
    physics, x = JPEG((1, 16, 16), 30).double(), photograph("chelsea")[:, :1, :16, :16].double()
    y, z = physics(x), noisy(x, 0.1).requires_grad_()
    gamma = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, g: physics.prox_l2(z, y, g), (z, gamma), atol=1e-6)


def test_a_quality_per_image():
    parameters = JPEGQualityGenerator(5, 40).step(3, seed=1)
    x = torch.cat([photograph("chelsea")[..., i : i + 64, :64] for i in (0, 64, 128)])
    physics = JPEG((3, 64, 64))
    assert not physics.is_per_image(3)
    y = physics(x, **parameters)
    assert physics.is_per_image(3)
    prox = physics.prox_l2(x.flip(-1), y, 3.0)
    for i, quality in enumerate(parameters["quality"]):
        alone = JPEG((3, 64, 64), quality)
        assert torch.allclose(alone(x[i : i + 1]), y[i : i + 1], atol=1e-5)
        prox_alone = alone.prox_l2(x.flip(-1)[i : i + 1], y[i : i + 1], 3.0)
        assert torch.allclose(prox_alone, prox[i : i + 1], atol=1e-5)


class Smoother(Denoiser):
    """A poor prior, but one of any size and number of channels."""

    def forward(self, x, sigma):
        return dinv.physics.functional.conv2d(
            x, torch.full((1, 1, 3, 3), 1 / 9).expand(1, x.shape[1], 3, 3), padding="replicate"
        )


@pytest.mark.parametrize("shape", [(3, 48, 40), (1, 32, 32), (3, 37, 50)])
def test_the_sampler_needs_nothing_special(shape):
    x = photograph("chelsea")[:, : shape[0], 60 : 60 + shape[1], 60 : 60 + shape[2]].repeat(2, 1, 1, 1)
    physics = JPEG(shape, torch.tensor([8.0, 30.0]))
    y = physics(x)
    model = UD2M(UnfoldedDenoiser(Smoother(), 1), num_steps=2)
    samples = model.sample(y, physics, 2, generator=seeded(0))
    assert samples.shape == (2, 2, *shape) and samples.isfinite().all()
    for i, quality in enumerate((8, 30)):
        assert model.sample(y[i : i + 1], JPEG(shape, quality), 1).shape == (1, 1, *shape)
    assert dinv.metric.PSNR()(samples[0], x).min() > 15


def test_a_file_of_another_quality_warns_when_it_is_sampled():
    y = pillow(photograph("chelsea").mean(1, keepdim=True)[..., :64, :64], 75) / 255
    with pytest.warns(UserWarning, match=r"not look like .* of quality \[10.0\]: JPEG.read"):
        Problem(y, JPEG((1, 64, 64), 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Problem(y, JPEG((1, 64, 64), 75))


def test_double_and_autocast():
    x = photograph("chelsea")[..., :32, :32]
    physics = JPEG((3, 32, 32), 10)
    y, projection = physics(x), physics.project(x.flip(-1), physics(x))
    assert physics.project(x.flip(-1).double(), y.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(physics(x), y)
        assert torch.equal(physics.project(x.flip(-1), y), projection)
        assert physics.complaint(y) is None


def test_bad_arguments_and_images():
    physics, x = JPEG((3, 20, 16), torch.tensor([10.0, 20.0])), torch.rand(2, 3, 20, 16)
    refused(
        (lambda: JPEG((2, 16, 16)), "img_size must be"),
        (lambda: JPEG((16, 16)), "img_size must be"),
        (lambda: JPEG((3, 16, 16), 0), "quality must be in"),
        (lambda: JPEG((3, 16, 16), torch.tensor([10.0, 101.0])), "quality must be in"),
        (lambda: JPEG((3, 16, 16), float("nan")), "quality must be in"),
        (lambda: JPEG((3, 16, 16), "10%"), TypeError, "quality must be a number or a tensor, got '10%'"),
        (lambda: JPEG((3, 16, 16), subsampling="4:2:2"), "subsampling must be one of"),
        (lambda: JPEG((3, 16, 16), max_iter=0), "max_iter"),
        (lambda: physics(x[:1].mT), r"of shape \[B, 3, 20, 16\].*got \[1, 3, 16, 20\]"),
        (lambda: physics(x[[0, 0, 0]]), "quality has 2 values, for as many images; got 3"),
        (lambda: physics.A_adjoint(torch.rand(1, 3, 24, 16)), r"of shape \[B, 3, 32, 16\]"),
        (lambda: physics.update(quality=torch.tensor([200.0])), "quality must be in"),
        (lambda: physics(x.byte()), (TypeError, ValueError), r"image in \[0, 1\], got torch.uint8"),
    )
