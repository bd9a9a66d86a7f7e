"""The page in the browser: its jobs without a browser, and all of it in Chromium, where that is installed."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, seeded
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from deepinv_ud2m import UD2M, load_prior
from deepinv_ud2m.app.__main__ import main, parse
from deepinv_ud2m.app.jobs import Degradation, Job, degrade, job_of, read_measured, run_job, window
from deepinv_ud2m.app.restore import Stopped, interval, restore
from deepinv_ud2m.app.views import STD_MAX, as_map, as_picture, drawn_kernel, explain, pack, painted, pictures
from deepinv_ud2m.data import photograph
from deepinv_ud2m.physics import JPEG

SIZE = 48


@pytest.fixture(scope="module")
def model():
    return UD2M.from_pretrained("photos")


@pytest.fixture
def truth(tmp_path):
    to_pil_image(photograph("astronaut")[0, :, 180 : 180 + SIZE, 100 : 100 + SIZE]).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def hole(height=SIZE, width=SIZE):
    mask = torch.zeros(1, 1, height, width)
    mask[..., 10:20, 12:24] = 1
    return mask


def editor(mask):
    """What the image editor gives, painted by this mask."""
    layer = np.zeros((*mask.shape[-2:], 4), np.uint8)
    layer[..., 3] = 255 * mask[0, 0].numpy()
    return {"background": None, "layers": [layer], "composite": layer}


# Each degradation, and the PSNR in dB that the mean of two samples gains at least over what was given. It is
# up to 1.8 dB below that of the posterior mean.
DAMAGES = {
    "jpeg": (Degradation("jpeg", quality=15), -0.5),
    "blur": (Degradation("blur", gaussian=1.5), 1.0),
    "sr": (Degradation("sr", factor=2), 0.0),
    "inpaint": (Degradation("inpaint", mask=hole()), 3.0),
    "denoise": (Degradation("denoise"), 2.0),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_good_photograph_is_degraded_and_restored(model, truth, tmp_path, name):
    damage, gain = DAMAGES[name]
    told = []
    job = Job(truth, damage, is_truth=True, added=0.06, noise=0.06, count=2, seed=3)
    result = run_job(model, job, report=lambda share, text: told.append((share, text)))
    assert result.samples.shape == (2, 1, 3, SIZE, SIZE) and result.nfe == (6 if name == "jpeg" else 9)
    assert result.psnr["mean of 2"] > result.psnr["given"] + gain
    assert result.noise == (None if name == "jpeg" else 0.06)
    assert (result.low <= result.mean).all() and (result.mean <= result.high).all()
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[-1] == 1 and "of 2 samples" in told[-1][1]
    again = run_job(model, job)
    assert torch.equal(again.samples, result.samples)

    text = explain(result, "photos")
    assert "PSNR to the truth" in text and "2 draws are known" in text and "Caution" in text
    captions = [caption for _, caption in pictures(result)]
    assert captions[:3] == ["given", "mean of 2", "standard deviation"] and captions[-1] == "truth"
    left = result.residuals
    assert ("what is left of the measurement" in " ".join(captions)) is (left is not None) is (name != "jpeg")
    if left is not None and name != "inpaint":  # in a hole nothing is left
        assert left.square().mean().sqrt().item() == pytest.approx(result.residual, rel=0.02)
    pack(tmp_path / "r.zip", result, text)
    with zipfile.ZipFile(tmp_path / "r.zip") as archive:
        names = {
            "sample01.png",
            "sample02.png",
            "mean.png",
            "std.png",
            "low.png",
            "high.png",
            "y.png",
            "x.png",
        }
        assert set(archive.namelist()) == names | {"summary.md"}
        archive.extract("mean.png", tmp_path)
    assert (tmp_path / "mean.png").read_bytes()[24] == 16, "bits"


def test_a_file_is_restored_as_it_is(model, truth, tmp_path):
    Image.open(truth).save(tmp_path / "x.jpg", quality=20)
    result = run_job(model, Job(tmp_path / "x.jpg", Degradation("jpeg"), count=1))
    assert result.x is None and not result.psnr and result.noise is None and result.std is None
    assert "ask for two or more" in explain(result, "photos")
    x = photograph("astronaut")[..., 180 : 180 + SIZE, 100 : 100 + SIZE]
    noisy = x + 0.08 * torch.randn(x.shape, generator=seeded())
    to_pil_image(noisy[0].clamp(0, 1)).save(tmp_path / "noisy.png")
    result = run_job(model, Job(tmp_path / "noisy.png", Degradation("denoise"), count=2))
    assert result.noise == pytest.approx(0.08, rel=0.25) and 0.7 < result.residual < 1.7
    y, _ = read_measured(truth, Degradation("inpaint", mask=hole()))
    assert not y[..., 10:20, 12:24].any() and y[..., :10, :].any(), "a hole need not be black in the file"


@pytest.mark.slow
@pytest.mark.parametrize("is_grey", [False, True])
def test_diffpir_beside_it(model, truth, is_grey):
    if is_grey:
        Image.open(truth).convert("L").save(truth)
    job = Job(
        truth, Degradation("denoise"), is_truth=True, added=0.06, noise=0.06, count=1, with_diffpir=True
    )
    result = run_job(model, job, prior=load_prior("photos"))
    assert result.diffpir.shape == result.mean.shape == (1, 1 if is_grey else 3, SIZE, SIZE)
    assert result.psnr["DiffPIR"] > result.psnr["given"] + 1
    assert "same settings for all" in explain(result, "photos")
    assert "DiffPIR" in [caption for _, caption in pictures(result)]


def test_many_samples_have_quantiles(model):
    x = photograph("astronaut")[..., 180:196, 100:116]
    x, y, physics = degrade(x, Degradation("denoise"), 0.05)
    result = restore(model, y, physics, 19, noise=0.05)
    assert torch.equal(result.low, result.samples.min(0).values)  # of rank 1 of 19
    assert "quantiles of the samples" in explain(result, "photos")


def test_the_interval_of_few_samples_holds_as_much_as_it_says():
    """Normal samples: with 200 000 pixels the standard error is 0.0007."""
    for count in (2, 4, 8):
        generator = seeded(count)
        x, samples = (0.5 + 0.05 * torch.randn(n, 1, 1, 500, 400, generator=generator) for n in (1, count))
        low, high = interval(samples)
        share = ((x[0] >= low) & (x[0] <= high)).float().mean().item()
        assert share == pytest.approx(0.9, abs=0.004), count


def test_a_job_ends_in_time_and_keeps_what_is_complete(model, truth, monkeypatch):
    monkeypatch.setattr("deepinv_ud2m.app.restore._PIXELS_PER_PASS", 1)  # one sample in a pass
    _, y, physics = degrade(photograph("astronaut")[..., :SIZE, :SIZE], Degradation("denoise"), 0.05)

    def stop(share, text):
        if text.startswith("2 of"):
            raise Stopped("The job was stopped.")

    result = restore(model, y, physics, 4, noise=0.05, report=stop)
    assert len(result.samples) == 2 and "2 of 4 samples" in result.messages[0]
    job = Job(truth, Degradation("denoise"), max_seconds=1e-3)
    refused((lambda: run_job(model, job), "No sample is complete"))
    assert not model.unfolded.denoiser._forward_hooks


def test_large_images_are_refused_or_cropped_at_blocks_of_jpeg(model, tmp_path):
    with pytest.raises(ValueError, match=r"would have 12\.00 megapixels.*at most 0\.50.*Crop to the centre"):
        window(3000, 4000, 500_000)
    assert window(100, 200, 20_000) == (slice(None), slice(None))
    for factor in (1, 4):
        rows, columns = window(3001, 4007, 500_000, factor, crop=True)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert not (rows.start % 16 or columns.start % 16 or height % 16 or width % 16)
        assert 350_000 < height * width * factor**2 <= 500_000
        assert abs(rows.start + rows.stop - 3001) <= 32 and abs(columns.start + columns.stop - 4007) <= 32
    to_pil_image(photograph("chelsea")[0]).save(tmp_path / "x.jpg", quality=15)
    y, physics = read_measured(tmp_path / "x.jpg", Degradation("jpeg"), window(256, 256, 40_000, crop=True))
    assert y.shape[-2:] == (192, 192) and physics.img_size == (3, 192, 192)
    whole, _ = JPEG.read(tmp_path / "x.jpg")
    assert (physics.A(y) - y).abs().mean() < 0.01, "blocks of the crop are blocks of the file"
    assert torch.equal(y, whole[..., 32:224, 32:224])
    mask = hole(256, 256)
    mask[..., 100:140, 100:140] = 1
    job = Job(
        tmp_path / "x.jpg", Degradation("inpaint", mask=mask), max_pixels=4096, crop=True, noise=0.02, count=1
    )
    assert run_job(model, job).mean.shape[-2:] == (64, 64)


GIVEN = {
    "kind": "blur",
    "is_truth": True,
    "quality": 15,
    "blur": "gaussian",
    "gaussian": 1.5,
    "drawing": None,
}
GIVEN |= {"side": 15, "kernel": None, "factor": 2, "hole": None, "is_estimated": True, "level": 0.03}
GIVEN |= {"count": 3, "seed": None, "crop": False, "with_diffpir": False}


def test_what_is_set_on_the_page_is_the_job(truth):
    job = lambda **given: job_of(GIVEN | {"file": str(truth)} | given, 500_000, 60)  # noqa: E731
    assert job() == Job(
        str(truth), Degradation("blur", 1.5, quality=15), True, 0.03, None, 3, 0, max_seconds=60
    )
    assert job(is_estimated=False, seed=4).noise == 0.03
    assert torch.equal(job(kind="inpaint", hole=editor(hole())).degradation.mask, hole())
    kernel = job(blur="drawn", drawing=editor(hole(240, 240))).degradation.kernel
    assert kernel.shape == (1, 1, 15, 15) and kernel.sum().item() == pytest.approx(1)
    empty = editor(torch.zeros(1, 1, 8, 8))
    refused(
        (lambda: job(file=None), "Upload a photograph first"),
        (lambda: job(blur="file"), "Upload the kernel"),
        (lambda: job(blur="drawn"), "Nothing is painted"),
        (lambda: painted(empty), "Nothing is painted"),
        (lambda: drawn_kernel({"layers": []}, 5), "Nothing is painted"),
    )


def test_mistakes_are_told(model, truth, tmp_path):
    (tmp_path / "no.png").write_text("no image")
    Image.new("1", (51_000, 1000)).save(tmp_path / "large.png")
    run = lambda file, damage, **options: run_job(model, Job(file, damage, **options))  # noqa: E731
    refused(
        (lambda: run(tmp_path / "no.png", Degradation("denoise")), "cannot be read as an image"),
        (lambda: run(tmp_path / "nowhere.png", Degradation("denoise")), "cannot be read as an image"),
        (lambda: run(tmp_path / "large.png", Degradation("denoise"), crop=True), "has 51 megapixels"),
        (lambda: run(truth, Degradation("jpeg")), "must be a grey JPEG or one of YCbCr"),
        (lambda: run(truth, Degradation("inpaint", mask=hole(9, 9))), "mask must be an image of 48x48"),
        (lambda: run(truth, Degradation("blur", gaussian=9)), "is too large"),
        (lambda: run(truth, Degradation("denoise"), noise=0.0), "sigma_y must be positive"),
        (lambda: run(truth, Degradation("denoise"), is_truth=True, added=2.0), "noise must be in"),
    )


def test_pictures_are_bytes_and_the_scale_of_deviations_is_fixed():
    grey = torch.full((1, 1, 40, 50), 0.5)
    assert as_picture(grey).shape == (40, 50, 3) and as_picture(grey).dtype == np.uint8
    one, two = as_map(grey * STD_MAX), as_map(torch.full((1, 3, 40, 50), 2 * STD_MAX))
    assert one.shape == two.shape and one.shape[1] > 60
    assert np.array_equal(one[:, 50:], two[:, 50:]), "the bar"
    assert one[0, 0].sum() < two[0, 0].sum()


def test_options_are_of_this_computer_alone(capsys):
    args = parse([])
    assert (args.host, args.model, args.max_pixels) == ("127.0.0.1", "photos", 0.5)
    assert parse(["--host", "0.0.0.0", "--port", "80"]).host == "0.0.0.0"
    for option in ("--max-pixels", "--max-seconds"):
        with pytest.raises(SystemExit):
            parse([option, "0"])
        assert "must be positive" in capsys.readouterr().err


def test_a_wrong_model_is_told(capsys):
    assert main(["--model", "nothing"]) == 2  # or gradio is missing, which is told too
    assert "error: " in capsys.readouterr().err


@pytest.fixture
def server(tmp_path):
    """The address of a page that runs."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "deepinv_ud2m.app", "--port", str(port), "--max-pixels", "0.05"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(240):
                assert process.poll() is None
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(2)
            process.wait(60)
    assert not list((tmp_path / "temporary").glob("deepinv_ud2m_*")), "files of users are left"


@pytest.mark.slow
def test_in_a_browser(server, truth, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    asked = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server)
        upload, restore = page.locator("input[type=file]").first, page.get_by_role("button", name="Restore")
        restore.click()
        page.get_by_text("Upload a photograph first").wait_for()
        upload.set_input_files(str(truth))
        page.get_by_label("A hole").check()
        canvas = page.locator("canvas:visible").last
        canvas.wait_for()
        page.wait_for_timeout(3000)  # the canvas is ready when the photograph is drawn, which nothing tells
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 20, y)
        page.mouse.down()
        page.mouse.move(x + 20, y + 10, steps=10)
        page.mouse.up()
        page.wait_for_timeout(1000)
        page.get_by_label("Number of samples").first.fill("2")
        restore.click()
        button = page.get_by_role("button", name="Download the results")
        button.wait_for(timeout=180_000)
        with page.expect_download() as download:
            button.click()
        download.value.save_as(tmp_path / "r.zip")
        browser.close()
    packed = [*(tmp_path / "temporary").glob("deepinv_ud2m_*/tmp*/restored.zip")]
    assert not packed, "the page's copy is deleted with its other files, this one at once"
    other = urllib.request.Request(server, headers={"Host": "example.org"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(other)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["--port", str(taken.getsockname()[1])]) == 2
    with zipfile.ZipFile(tmp_path / "r.zip") as archive:
        assert {"sample01.png", "sample02.png", "mean.png", "std.png"} <= set(archive.namelist())
        given = np.asarray(Image.open(archive.extract("y.png", tmp_path)))
    assert given.shape == (SIZE, SIZE, 3) and (given == 0).all(-1).mean() > 0.02, "the hole"
    assert all(url.startswith((server, "data:", "blob:")) for url in asked), asked
    assert Path(truth).is_file()
