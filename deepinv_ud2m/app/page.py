"""How the page looks, and what its buttons do."""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from deepinv_ud2m import UD2M, load_prior
from deepinv_ud2m.app.jobs import job_of, run_job, size_of
from deepinv_ud2m.app.restore import Stopped
from deepinv_ud2m.app.views import as_picture, explain, pack, pictures
from deepinv_ud2m.data import photograph
from deepinv_ud2m.photographs import read_photograph

# Files of users are deleted when they are as old as this, in seconds; looked for as often.
_AGE = 3600

_INTRODUCTION = """
# What could this photograph have been?
A degraded photograph does not say everything about the original. This page draws several **samples**:
possible originals that fit what was measured. Details that all samples share are well supported by the
photograph. Details in which they differ are not.
"""

_KINDS = {
    "JPEG compression": "jpeg",
    "Blur": "blur",
    "Low resolution": "sr",
    "A hole": "inpaint",
    "Noise alone": "denoise",
}

_KERNELS = {"Gaussian": "gaussian", "I draw it": "drawn", "From a file": "file"}

# What the package raises for settings of no use, and torch where memory is short.
_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def _is_visible(kind: str, is_truth: bool, blur: str, is_estimated: bool) -> dict[str, bool]:
    """Only settings that matter are shown."""
    return {
        "quality": kind == "jpeg" and is_truth,
        "blur": kind == "blur",
        "gaussian": kind == "blur" and blur == "gaussian",
        "drawing": kind == "blur" and blur == "drawn",
        "side": kind == "blur" and blur == "drawn",
        "kernel": kind == "blur" and blur == "file",
        "factor": kind == "sr",
        "hole": kind == "inpaint",
        "is_estimated": kind != "jpeg",
        "level": kind != "jpeg" and (is_truth or not is_estimated),
    }


def _settings(args: argparse.Namespace) -> dict[str, gr.components.Component]:
    """The left column, by names."""
    to_paint = {"type": "numpy", "sources": (), "transforms": (), "layers": False, "visible": False}
    black, pink = (
        gr.Brush(size, [colour], color_mode="fixed") for size, colour in ((10, "#000"), (20, "#f2d"))
    )
    given = {}
    gr.Markdown("### 1. The photograph")
    given["file"] = gr.Image(type="filepath", sources=["upload"], label="Photograph", height=260)
    # The file as it is: gradio would open it, with no message for what is no image.
    given["file"].preprocess = lambda payload: None if payload is None else payload.path
    with gr.Row():
        for name in ("astronaut", "chelsea"):
            given[name] = gr.Button(name.capitalize(), size="sm")
    gr.Markdown("### 2. What happened to it")
    given["kind"] = gr.Radio([*_KINDS.items()], value="jpeg", show_label=False, container=False)
    given["is_truth"] = gr.Checkbox(
        label="Degrade it here", info="For a good photograph. The result is then compared with it."
    )
    given["quality"] = gr.Slider(5, 95, 15, step=1, label="Quality of the JPEG file", visible=False)
    given["blur"] = gr.Radio([*_KERNELS.items()], value="gaussian", label="Kernel of the blur", visible=False)
    given["gaussian"] = gr.Slider(0.4, 5, 1.5, step=0.1, label="Standard deviation in pixels", visible=False)
    given["drawing"] = gr.ImageEditor(
        np.full((240, 240, 3), 255, np.uint8),  # without it users would have to select the brush first
        brush=black,
        label="Draw the path of the camera",
        height=400,
        **to_paint,
    )
    given["side"] = gr.Slider(5, 31, 15, step=2, label="Width of the drawing, in pixels", visible=False)
    given["kernel"] = gr.File(label="Kernel: a grey picture, or .npy", visible=False, height=110)
    given["factor"] = gr.Radio([2, 4], value=2, label="Both sides were reduced by", visible=False)
    given["hole"] = gr.ImageEditor(brush=pink, label="Paint over what is missing", height=440, **to_paint)
    given["is_estimated"] = gr.Checkbox(True, label="Estimate the noise level", visible=False)
    given["level"] = gr.Slider(0.005, 0.2, 0.02, step=0.005, label="Noise level (white is 1)", visible=False)
    gr.Markdown("### 3. Samples")
    given["count"] = gr.Slider(1, 32, 4, step=1, label="Number of samples")
    with gr.Accordion("More", open=False):
        given["seed"] = gr.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed")
        given["crop"] = gr.Checkbox(
            label="Crop to the centre",
            info=f"If the result would have more than {args.max_pixels:g} megapixels.",
        )
        given["with_diffpir"] = gr.Checkbox(
            label="DiffPIR beside it", info="One estimate by another method, 100 network evaluations."
        )
    return given


def build(model: UD2M, args: argparse.Namespace, folder: Path) -> gr.Blocks:
    """
    The page.

    :param deepinv_ud2m.UD2M model: the sampler.
    :param argparse.Namespace args: the options of the command.
    :param pathlib.Path folder: where results are packed.
    :returns: the page, to be launched.
    """
    stop, prior = threading.Event(), load_prior(model.unfolded.prior_info.name)
    prior.to(next(model.unfolded.parameters()).device)

    # gradio finds the progress by its default
    def restore(values: dict, progress: gr.Progress = gr.Progress()) -> tuple:  # noqa: B008
        def report(share: float, text: str) -> None:
            if stop.is_set():
                raise Stopped("The job was stopped.")
            progress(share, desc=text)

        stop.clear()
        try:
            given = {name: values[one] for name, one in components.items() if one in inputs}
            result = run_job(
                model, job_of(given, int(args.max_pixels * 1e6), args.max_seconds), prior=prior, report=report
            )
            text, packed = explain(result, args.model), Path(tempfile.mkdtemp(dir=folder)) / "restored.zip"
            pack(packed, result, text)
        except _ERRORS as error:
            raise gr.Error(str(error), print_exception=False) from error
        samples = [(as_picture(one), f"sample {i + 1}") for i, one in enumerate(result.samples)]
        shown = gr.update(value=samples, visible=True), gr.update(value=pictures(result), visible=True)
        return text, *shown, gr.update(value=str(packed), visible=True)

    def forget() -> None:
        """Of the results the page has a copy by now, which is deleted with its other files."""
        for packed in folder.glob("*/restored.zip"):
            packed.unlink()

    def visibility(*values: Any) -> list:
        return [gr.update(visible=shown) for shown in _is_visible(*values).values()]

    def canvas(file: str | None, kind: str) -> np.ndarray | None:
        """The photograph, to paint a hole into."""
        try:
            if not file or kind != "inpaint":
                return None
            size_of(file)
            return as_picture(read_photograph(file))
        except _ERRORS as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="deepinv_ud2m", analytics_enabled=False, delete_cache=(_AGE, _AGE)) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=4, min_width=340):
                components = _settings(args)
                with gr.Row():
                    start, halt = gr.Button("Restore", variant="primary"), gr.Button("Stop")
                bar = gr.Markdown(min_height=70)  # next to the button, where users look
            with gr.Column(scale=7, min_width=420):
                gr.Markdown("### Result")
                text = gr.Markdown("Nothing was restored yet.")
                options = {"format": "png", "object_fit": "contain", "interactive": False, "visible": False}
                options["buttons"] = ["fullscreen"]  # the others save what is shown, 8 bits
                samples = gr.Gallery(label="Samples", preview=True, selected_index=0, height=460, **options)
                together = gr.Gallery(label="All samples together", columns=3, height="auto", **options)
                download = gr.DownloadButton("Download the results as PNG of 16 bits", visible=False)

        inputs = {one for one in components.values() if not isinstance(one, gr.Button)}
        done = start.click(restore, inputs, [text, samples, together, download], show_progress_on=bar)
        done.then(forget, show_progress="hidden")
        halt.click(stop.set, queue=False, show_progress="hidden")
        switches = [components[name] for name in ("kind", "is_truth", "blur", "is_estimated")]
        switched = [components[name] for name in _is_visible("", False, "", False)]
        for switch in switches:
            switch.change(visibility, switches, switched, show_progress="hidden")
        photo, kind = components["file"], components["kind"]
        for changed in (photo, kind):
            changed.change(canvas, [photo, kind], components["hole"], show_progress="hidden")
        for name in ("astronaut", "chelsea"):
            file = folder / f"{name}.png"
            Image.fromarray(as_picture(photograph(name))).save(file)
            both = [photo, components["is_truth"]]
            components[name].click(lambda file=str(file): (file, True), None, both, show_progress="hidden")
    return page.queue(default_concurrency_limit=1, max_size=16)
