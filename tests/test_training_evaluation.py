"""Evaluation of a distillation: the moving average, the best model, metrics, history and pictures."""

import copy
import json
import math

import pytest
import torch
from deepinv.loss.metric import PSNR, Metric
from deepinv.physics import Denoising, GaussianNoise, Inpainting, PoissonNoise
from distillation import SHAPE, equal, eval_images, full_options, images, make_trainer, two_physics, values_of
from torch.utils.data import DataLoader

from deepinv_ud2m import UD2M
from deepinv_ud2m.training import EnergyScoreLoss, warmup_cosine
from deepinv_ud2m.training.checkpoints import read_checkpoint


def test_the_average_is_what_is_evaluated_exported_and_returned(tiny_prior, tmp_path):
    seen = []
    options = {"eval_dataloader": eval_images(), "eval_interval": 3, "steps": 6}
    score = lambda s, x: (seen.append(values_of(trainer)), s.mean((0, 2, 3, 4)))[1]  # noqa: E731
    options["sample_metrics"] = {"score": score}
    trainer = make_trainer(tiny_prior, ema_decay=0.5, save_path=tmp_path, **options)
    average, step = values_of(trainer), trainer.train_step
    averages, last = [], []

    def train_step(n):
        logs = step(n)
        decay = min(0.5, (1 + n) / (10 + n))
        for of, value in zip(average, values_of(trainer), strict=True):
            of.copy_(decay * of + (1 - decay) * value)
        averages.append([of.clone() for of in average])
        last[:] = values_of(trainer)
        return logs

    trainer.train_step = train_step
    model = trainer.train()
    trainer.evaluate()
    torch.testing.assert_close(seen, [averages[2], averages[5], averages[5]])
    torch.testing.assert_close(values_of(trainer), averages[5])
    assert not equal(last, values_of(trainer))
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    torch.testing.assert_close(list(state["average"].values()), averages[5])
    assert torch.equal(state["trained"]["scalars.log_delta"], last[[*trainer.trained].index("log_delta")])
    final = UD2M.from_pretrained(tmp_path / "final", prior=copy.deepcopy(tiny_prior), merge=False)
    assert torch.equal(final.unfolded.log_delta, model.unfolded.log_delta)


class Scripted(Metric):
    """A metric of given values, one for each evaluation."""

    def __init__(self, values, lower_better=True):
        super().__init__()
        self.values, self.lower_better = iter(values), lower_better

    def forward(self, x=None, x_net=None, **kwargs):
        return torch.full((len(x),), next(self.values))


@pytest.mark.parametrize("by, best", [("samples", 2), ("smaller", 2), ("larger", 4)])
def test_the_best_model_is_the_best(tiny_prior, tmp_path, by, best):
    """Of a run in two parts: what was best before counts."""
    metric = Scripted([3.0, 1.0, 2.0, 4.0, 1.5], lower_better=by != "larger")
    options = {"metrics": [metric, PSNR()], "sample_metrics": {}}
    if by == "samples":
        second = {"second": lambda samples, x: -x.sum((1, 2, 3))}
        options = {"sample_metrics": {"first": lambda samples, x: metric(x=x), **second}}
    options |= {"eval_dataloader": eval_images(), "eval_interval": 1}
    for steps in (3, 5):
        make_trainer(tiny_prior, save_path=tmp_path / "a", ema_decay=0.9, steps=steps, **options).train()
    config = json.loads((tmp_path / "a" / "best" / "config.json").read_text())
    assert config["metadata"]["step"] == best
    make_trainer(tiny_prior, save_path=tmp_path / "b", ema_decay=0.9, steps=best).train()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a/best", "b/final")]
    assert weights[0] == weights[1], "its weights are the average of that step"


def test_metrics_of_samples_are_of_all_images_together(tiny_prior):
    """A ratio of sums is no mean of ratios; images of several sizes count by batches."""
    seen = []
    metric = lambda samples, x: (seen.append((samples.shape, x)), torch.tensor(float(len(seen))))[1]  # noqa: E731
    only = {"metrics": [], "sample_metrics": {"m": metric}}
    trainer = make_trainer(tiny_prior, eval_dataloader=eval_images(4), **only)
    assert trainer.evaluate() == {"m": 1.0}
    ((shape, x),) = seen
    assert shape == (4, 4, 1, 16, 16) and len(x.unique(dim=0)) == 4
    del seen[:]
    trainer = make_trainer(tiny_prior, physics=Denoising(GaussianNoise(0.05)), **only)
    trainer.eval_dataloader = [DataLoader([torch.rand(1, side, side) for side in (8, 16)], batch_size=1)]
    assert trainer.evaluate() == {"m": 1.5}
    assert [tuple(shape) for shape, _ in seen] == [(4, 1, 1, side, side) for side in (8, 16)]


def test_an_evaluation_that_fails_loses_no_step(tiny_prior, tmp_path):
    def fails(samples, x):
        raise torch.OutOfMemoryError("too large")

    options = full_options(tmp_path, steps=4, ckp_interval=100, sample_metrics={"m": fails})
    with pytest.raises(torch.OutOfMemoryError):
        make_trainer(tiny_prior, **options).train()
    options["sample_metrics"] = {"m": lambda samples, x: x.mean()}
    trainer = make_trainer(tiny_prior, **options)
    trainer.setup_train()
    assert (trainer.completed, trainer.evaluated) == (2, 0)
    trainer.train()
    assert [step for step, _ in trainer.history["eval: m"]] == [2, 4]
    again = make_trainer(tiny_prior, **options)
    again.evaluate = lambda: pytest.fail("it was evaluated already")
    again.train()


def test_evaluation_writes_history_figures_and_the_best_model(tiny_prior, tmp_path):
    options = full_options(tmp_path, metrics=[PSNR(), PSNR()], plot_images=True)
    trainer = make_trainer(tiny_prior, **options)
    trainer.train()
    names = {"loss", "EnergyScoreLoss", "AdversarialGeneratorLoss", "gradient norm", "learning rate"}
    names |= {"D AdversarialDiscriminatorLoss", "eval: PSNR 1", "eval: PSNR 2", "eval: energy score"}
    names |= {"eval: PSNR 1/0", "eval: PSNR 1/1"}
    assert names <= set(trainer.history)
    assert [step for step, _ in trainer.history["eval: energy score"]] == [2, 4]
    total = trainer.history["EnergyScoreLoss"][0][1] + trainer.history["AdversarialGeneratorLoss"][0][1]
    assert trainer.history["loss"][0][1] == pytest.approx(total)
    stored = json.loads((tmp_path / "history.json").read_text())
    assert stored == {name: [list(p) for p in points] for name, points in trainer.history.items()}
    for name in ("curves.png", "samples_0.png", "samples_1.png"):
        assert (tmp_path / name).stat().st_size > 100
    assert UD2M.from_pretrained(tmp_path / "best", prior=copy.deepcopy(tiny_prior)).num_steps == 2


def test_curves_are_drawn_at_evaluations_and_at_the_end_only(tiny_prior, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "deepinv_ud2m.training.history.plot_curves", lambda _, history: drawn.append(len(history["loss"]))
    )
    options = {"eval_dataloader": eval_images(), "eval_interval": 2, "ckp_interval": 1, "steps": 3}
    make_trainer(tiny_prior, save_path=tmp_path, **options).train()
    assert drawn == [2, 3]


def test_learning_rates_follow_their_schedule(tiny_prior):
    trainer = make_trainer(tiny_prior, lr_schedule=warmup_cosine(4, warmup_steps=2))
    trainer.train()
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4)]
    factors = [min(1, (1 + n) / 2) * (0.01 + 0.99 * value) for n, value in enumerate(cosine)]
    rates = [rate for _, rate in trainer.history["learning rate"]]
    assert rates == pytest.approx([1e-2 * factor for factor in factors])
    last = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert last == pytest.approx({"prior": 1e-2 * factors[-1], "scalars": 1e-3 * factors[-1]})


@pytest.mark.parametrize("stage", ["single", "end_to_end"])
def test_the_noise_level_of_the_model_stands_in_in_training_and_figures_too(tiny_prior, tmp_path, stage):
    """As it does for samples: equal steps for a physics that states it and one that states none."""

    def history(noise_model, sigma_y, folder):
        torch.manual_seed(0)  # the mask
        options = {"train_dataloader": DataLoader(pairs, batch_size=3), "online_measurements": False}
        options |= {"eval_dataloader": DataLoader(pairs, batch_size=3), "eval_interval": 2, "steps": 2}
        options |= {"physics": Inpainting(SHAPE, mask=0.5, noise_model=noise_model), "plot_images": True}
        losses = EnergyScoreLoss()
        trainer = make_trainer(tiny_prior, stage=stage, losses=losses, save_path=folder, **options)
        trainer.model.sigma_y = sigma_y
        trainer.train()
        return trainer.history

    x = images(6)
    torch.manual_seed(0)
    physics = Inpainting(SHAPE, mask=0.5)
    pairs = torch.utils.data.TensorDataset(x, physics.A(x) + 0.1 * torch.randn_like(x))
    stated = history(GaussianNoise(0.1), None, tmp_path / "stated")
    of_model = history(PoissonNoise(0.1), 0.1, tmp_path / "of_model")
    assert stated.keys() == of_model.keys()
    for name, points in stated.items():
        assert of_model[name] == [(step, pytest.approx(value, rel=1e-4)) for step, value in points]
    assert (tmp_path / "of_model" / "samples_0.png").is_file()


def test_evaluation_repeats_and_leaves_training_alone(tiny_prior):
    options = {"eval_dataloader": eval_images(4), "eval_samples": 2}
    before = make_trainer(tiny_prior, **two_physics(), **options).evaluate()
    trainer = make_trainer(tiny_prior, **two_physics(), **options)
    trainer.setup_train()
    assert trainer.evaluate() == trainer.evaluate() == before
    with_evaluation = make_trainer(tiny_prior, **two_physics(), **options, eval_interval=1)
    without = make_trainer(tiny_prior, **two_physics())
    assert equal(*(list(t.train().unfolded.parameters()) for t in (with_evaluation, without)))
    with pytest.raises(ValueError, match="give the trainer an eval_dataloader"):
        without.evaluate()


def test_deepinv_test_runs_the_whole_sampler(tiny_prior):
    trainer = make_trainer(tiny_prior, metrics=PSNR())
    calls = []
    trainer.unfolded.denoiser.register_forward_hook(lambda *_: calls.append(1))
    results = trainer.test(eval_images(), compare_no_learning=False)
    assert math.isfinite(results["PSNR"])
    assert len(calls) == 4, "N x K evaluations"
    with pytest.raises(NotImplementedError, match=r"UD2M\.from_pretrained"):
        trainer.load_model("ckp_best.pth.tar")
