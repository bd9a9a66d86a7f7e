"""JPEG: the codec against Pillow's, the projection against the conditions of optimality."""

import io
import warnings

import deepinv as dinv
import numpy as np
import pytest
import torch
from deepinv.models import Denoiser
from PIL import Image

from deepinv_ud2m import UD2M, UnfoldedDenoiser, posterior_prox
from deepinv_ud2m.benchmark.tasks import make_physics
from deepinv_ud2m.data import photograph
from deepinv_ud2m.physics import JPEG, JPEGQualityGenerator

QUALITIES = [5, 10, 30, 75, 95]
PILLOW = {"4:2:0": 2, "4:4:4": 0}


def pillow(x, quality, subsampling="4:2:0"):
    """The image after Pillow's coder and decoder, in [0, 255], and the tables of the file."""
    pixels = (255 * x[0]).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    image = Image.fromarray(pixels.squeeze())
    image.save(file, "JPEG", quality=quality, subsampling=PILLOW[subsampling])
    with Image.open(file) as decoded:
        tables = [torch.tensor(table).reshape(8, 8) for _, table in sorted(decoded.quantization.items())]
        array = np.array(decoded)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array).permute(2, 0, 1)[None].float(), tables


@pytest.mark.parametrize("size", [(50, 40), (34, 70)])
def test_a_file_whose_sides_are_not_whole_blocks_is_sampled(size, tiny_prior):
    x = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))
    y = pillow(x, 20)[0] / 255
    physics = JPEG((1, *size), 20)
    x_hat = UD2M(UnfoldedDenoiser(tiny_prior, 1), num_steps=1)(y, physics)
    assert x_hat.shape == x.shape
    with pytest.raises(ValueError, match="does not fit the physics JPEG"):
        UD2M(UnfoldedDenoiser(tiny_prior))(y[..., 1:], physics)


# -- Pillow's codec -------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [1, 2, 49, 50, 51, 99, 100, *QUALITIES])
def test_tables_are_those_of_pillow(quality):
    x = photograph("chelsea")[..., :16, :16]
    luma, chroma, _ = JPEG((3, 16, 16), quality)._steps(x)
    _, tables = pillow(x, quality)
    assert torch.equal(luma[0, 0, :, 0].int(), tables[0].int())
    assert torch.equal(chroma[0, 0, :, 0].int(), tables[1].int())


@pytest.mark.parametrize("quality", [1, 49, 50, 98, 100, *QUALITIES])
@pytest.mark.parametrize("subsampling", [*PILLOW, "grey"])
def test_a_file_is_read_with_its_coder(quality, subsampling, tmp_path):
    x = photograph("chelsea")[..., :50, :70]
    x = x.mean(1, keepdim=True) if subsampling == "grey" else x
    pixels = (255 * x[0]).round().byte().permute(1, 2, 0).numpy()
    options = {} if subsampling == "grey" else {"subsampling": PILLOW[subsampling]}
    Image.fromarray(pixels.squeeze()).save(tmp_path / "x.jpg", quality=quality, **options)
    y, physics = JPEG.read(tmp_path / "x.jpg")
    assert physics.img_size == tuple(x.shape[1:]) and physics.quality.item() == quality
    assert subsampling in ("grey", physics.subsampling)
    with Image.open(tmp_path / "x.jpg") as decoded:
        array = np.array(decoded).reshape(50, 70, -1)
    assert torch.equal(y, torch.from_numpy(array).permute(2, 0, 1)[None] / 255)
    # The quality shows in the pixels, and another does not.
    assert physics.mismatch(y) < 0.1
    if 10 <= quality <= 75:
        assert JPEG(physics.img_size, 90, physics.subsampling).mismatch(y) > 0.15


def test_files_that_are_no_jpeg_of_that_kind_are_refused(tmp_path):
    picture = Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8))
    picture.save(tmp_path / "x.png")
    picture.save(tmp_path / "own.jpg", qtables=[list(range(1, 65))] * 2)
    picture.save(tmp_path / "half.jpg", subsampling=1)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    (tmp_path / "text.jpg").write_text("text")
    for name, message in {
        "x.png": "must be a grey or RGB JPEG, got PNG",
        "own.jpg": "tables of its own",
        "half.jpg": "subsampling of",
        "cmyk.jpg": "got JPEG, CMYK",
        "text.jpg": "not an image",
    }.items():
        with pytest.raises(ValueError, match=message):
            JPEG.read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        JPEG.read(tmp_path / "nowhere.jpg")


def test_a_file_of_another_quality_warns_when_it_is_sampled(tiny_prior):
    x = photograph("chelsea").mean(1, keepdim=True)[..., :64, :64]
    y = pillow(x, 75)[0] / 255
    model = UD2M(UnfoldedDenoiser(tiny_prior, 1), num_steps=1)
    with pytest.warns(UserWarning, match=r"not look like .* of quality \[10.0\]: JPEG.read"):
        model(y, JPEG((1, 64, 64), 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(y, JPEG((1, 64, 64), 75))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"image in \[0, 1\], got torch.uint8"):
        JPEG((1, 16, 16))(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(256, 256), (203, 155), (33, 250)])
@pytest.mark.parametrize("subsampling", PILLOW)
@pytest.mark.parametrize("quality", QUALITIES)
def test_pixels_agree_with_pillow(quality, subsampling, size):
    x = photograph("chelsea")[..., : size[0], : size[1]]
    physics = JPEG((3, *size), quality, subsampling)
    decoded, _ = pillow(x, quality, subsampling)
    difference = (255 * physics.A_adjoint(physics(x)).clamp(0, 1) - decoded).abs()
    # YCbCr and RGB are rounded to integers in between: up to 1.4 + 0.5. Elsewhere a coefficient was
    # rounded the other way.
    assert (difference <= 2).float().mean() > 0.99
    assert difference.mean() < 0.7


@pytest.mark.parametrize("quality", QUALITIES)
def test_grey_pixels_agree_with_pillow(quality):
    x = (255 * photograph("chelsea")[:, 1:2, :96, :120]).round() / 255
    physics = JPEG((1, 96, 120), quality)
    decoded, _ = pillow(x, quality)
    difference = (255 * physics.A_adjoint(physics(x)).clamp(0, 1) - decoded).abs()
    assert (difference <= 1).float().mean() > 0.97
    assert difference.mean() < 0.5


@pytest.mark.parametrize("subsampling", PILLOW)
def test_a_decoded_file_gives_the_same_box(subsampling):
    """What a real decoder rounded to 8 bits is coded again to the coefficients of the file."""
    x = photograph("chelsea")
    physics = JPEG((3, 256, 256), 10, subsampling)
    decoded, _ = pillow(x, 10, subsampling)
    steps = physics._steps(x)
    boxes = zip(physics._centres(physics(x), steps), physics._centres(decoded / 255, steps), strict=True)
    for ours, theirs in boxes:
        assert (ours == theirs).float().mean() > 0.999


def test_decoding_is_a_projection():
    """Coding the decoded image again changes nothing, but where 8-bit samples round or saturate."""
    physics = JPEG((3, 64, 64), 20)
    y = physics(photograph("astronaut")[..., 96:160, 96:160])
    steps = physics._steps(y)
    decoded = physics._decode(physics._centres(y, steps)) / 255
    assert torch.allclose(decoded, y, atol=1e-4)


# -- The box --------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", PILLOW)
@pytest.mark.parametrize("quality", QUALITIES)
def test_the_truth_is_in_the_box_and_so_is_the_projection(quality, subsampling):
    x = photograph("astronaut")
    physics = JPEG((3, 256, 256), quality, subsampling)
    y = physics(x)
    # Samples are rounded to 8 bits before: half a unit on a coefficient and a little more, of a step q.
    smallest = min(step.min().item() for step in physics._steps(x))
    assert physics.violation(x, y).item() < 3 / smallest
    z = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    projection = physics.project(z, y)
    assert physics.violation(z, y) > 0.1
    assert physics.violation(projection, y) < 1e-3
    assert torch.allclose(physics.project(projection, y), projection, atol=1e-6)


def test_cut_blocks_come_close_to_the_box():
    x = photograph("astronaut")[..., :203, :155]
    physics = JPEG((3, 203, 155), 10)
    y = physics(x)
    z = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert physics.violation(z, y) > 0.5
    assert physics.violation(physics.project(z, y), y) < 0.05


@pytest.mark.parametrize("subsampling", PILLOW)
def test_projection_is_the_nearest_point(subsampling):
    r"""KKT: z - P is L^T mu, with mu >= 0 at upper faces, <= 0 at lower ones, 0 in the interior."""
    shape = (3, 16, 16)
    physics = JPEG(shape, 20, subsampling)
    x = photograph("chelsea")[..., 100:116, 100:116]
    y = physics(x)
    z = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    steps = physics._steps(x)
    # float64 copies: the conditions are then exact to 1e-9 of an 8-bit step.
    planes = [plane.double() for plane in physics._to_planes(255 * z)]
    projected = [plane.double() for plane in physics._to_planes(255 * physics.project(z, y))]

    def coefficients(flat):
        parts = flat.reshape(3, 1, *shape[1:]).unbind(0)
        return torch.cat([c.flatten() for c in physics._encode(list(parts))])

    L = torch.autograd.functional.jacobian(coefficients, torch.cat([p.flatten() for p in planes]))
    c = L @ torch.cat([p.flatten() for p in projected])
    n = torch.cat([centre.double().flatten() for centre in physics._centres(y, steps)])
    q = torch.cat(
        [
            s.double().expand(k.shape).flatten()
            for s, k in zip(steps, physics._centres(y, steps), strict=True)
        ]
    )
    difference = torch.cat([(a - b).flatten() for a, b in zip(planes, projected, strict=True)])
    mu = torch.linalg.lstsq(L.T, difference[:, None]).solution[:, 0]
    assert (L.T @ mu - difference).abs().max() < 1e-3
    position = (c - n) / (q / 2)  # in [-1, 1]
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
    joint = posterior_prox(x, y, physics, z, sigma=0.3, rho=0.2, sigma_y=0.005)
    precision = 0.3**-2 + 0.2**-2
    mean = (x * 0.2**-2 + z * 0.3**-2) / precision
    assert torch.allclose(joint, physics.prox_l2(mean, y, 1 / (precision * 0.005**2)), atol=1e-6)


# -- Gradients ------------------------------------------------------------------------------------


def test_gradient_of_the_coder_is_that_of_coding_without_rounding():
    weight = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = photograph("chelsea")[..., :32, :32].clone().requires_grad_()
    (JPEG((3, 32, 32), 10, "4:4:4")(x) * weight).sum().backward()
    assert torch.allclose(x.grad, weight, atol=1e-4)  # there, coding and decoding is the identity


def test_gradients_of_the_prox():
    physics = JPEG((1, 16, 16), 30).double()
    x = photograph("chelsea")[:, :1, :16, :16].double()
    y = physics(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (x + 0.1 * noise).requires_grad_()
    gamma = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, g: physics.prox_l2(z, y, g), (z, gamma), atol=1e-6)


# -- In a batch, in the sampler, in the benchmark ---------------------------------------------------


def test_a_quality_per_image():
    generator = JPEGQualityGenerator(5, 40)
    parameters = generator.step(3, seed=1)
    assert torch.equal(parameters["quality"], generator.step(3, seed=1)["quality"])
    many = generator.step(2000)["quality"]
    assert set(many.tolist()) == set(range(5, 41))
    x = torch.cat([photograph("chelsea")[..., i : i + 64, :64] for i in (0, 64, 128)])
    physics = JPEG((3, 64, 64))
    y = physics(x, **parameters)
    for i, quality in enumerate(parameters["quality"]):
        alone = JPEG((3, 64, 64), quality)
        assert torch.allclose(alone(x[i : i + 1]), y[i : i + 1], atol=1e-5)
        prox = physics.prox_l2(x.flip(-1), y, 3.0)
        assert torch.allclose(
            alone.prox_l2(x.flip(-1)[i : i + 1], y[i : i + 1], 3.0), prox[i : i + 1], atol=1e-5
        )


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
    model = UD2M(UnfoldedDenoiser(Smoother()))
    samples = model.sample(y, physics, 2, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (2, 2, *shape) and samples.isfinite().all()
    apart = [
        model.sample(y[:1], JPEG(shape, 8), 1), model.sample(y[1:], JPEG(shape, 30), 1)
    ]  # fmt: skip
    assert all(sample.shape == (1, 1, *shape) for sample in apart)
    assert dinv.metric.PSNR()(samples[0], x).min() > 15


def test_jpeg_is_a_task_without_noise():
    physics = make_physics("jpeg-10", (3, 32, 32), sigma_y=0.05)
    x = photograph("chelsea")[..., :32, :32]
    assert torch.equal(physics(x), physics(x))


def test_double_and_autocast():
    x = photograph("chelsea")[..., :32, :32]
    physics = JPEG((3, 32, 32), 10)
    y = physics(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(physics(x), y)
        assert torch.equal(physics.project(x, y), JPEG((3, 32, 32), 10).project(x, y))


# -- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": (2, 16, 16)}, "img_size must be"),
        ({"img_size": (16, 16)}, "img_size must be"),
        ({"quality": 0}, "quality must be in"),
        ({"quality": torch.tensor([10.0, 101.0])}, "quality must be in"),
        ({"quality": float("nan")}, "quality must be in"),
        ({"subsampling": "4:2:2"}, "subsampling must be one of"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        JPEG(**({"img_size": (3, 16, 16)} | arguments))


def test_bad_images():
    physics = JPEG((3, 20, 16), torch.tensor([10.0, 20.0]))
    with pytest.raises(
        ValueError, match=r"images must be of shape \[B, 3, 20, 16\].*got \[1, 3, 16, 20\]"
    ):
        physics(torch.rand(1, 3, 16, 20))
    with pytest.raises(ValueError, match="quality has 2 values, for as many images; got 3"):
        physics(torch.rand(3, 3, 20, 16))
    with pytest.raises(ValueError, match=r"images must be of shape \[B, 3, 32, 16\]"):
        physics.A_adjoint(torch.rand(1, 3, 24, 16))
    with pytest.raises(ValueError, match="quality must be in"):
        physics.update(quality=torch.tensor([200.0]))
    with pytest.raises(TypeError, match="quality must be a number or a tensor, got '10%'"):
        JPEG((3, 16, 16), "10%")
    with pytest.raises(ValueError, match="quality_min and quality_max"):
        JPEGQualityGenerator(10, 5)
    with pytest.raises(ValueError, match="name must be one of"):
        photograph("lena")
