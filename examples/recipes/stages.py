"""The three stages of a distillation, for the recipes of digits and of photographs."""

import shlex
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from deepinv_ud2m.physics import make_generator, make_physics
from deepinv_ud2m.physics.traits import is_linear
from deepinv_ud2m.training import (
    DistillationTrainer,
    GaussianNLLLoss,
    SamplerSigmas,
    parameter_groups,
    warmup_cosine,
)

#: Share of the training states that are at one of the sampler's own levels.
OWN_LEVELS = 0.8


def train_in_stages(model, images, shown, losses, args, lr, sigma_y):
    """
    Train the initial estimate, then samples at single levels, then samples of the whole sampler.

    Each stage has a folder in ``args.out``. A run that was stopped goes on when it is started again.

    :param deepinv_ud2m.UD2M model: the sampler, with what is to be trained.
    :param torch.utils.data.DataLoader images: training images.
    :param torch.Tensor shown: validation images `[B, C, H, W]`.
    :param Callable losses: ``losses(device)`` gives the losses of samples.
    :param argparse.Namespace args: ``tasks``, ``updates`` of each stage, ``out``, ``fast`` and ``seed``.
    :param float lr: learning rate of the networks in the first two stages; half of it in the last.
    :param tuple[float, float] sigma_y: range of the noise of the measurements.
    :returns: metrics of the last stage on the validation images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = tuple(shown.shape[1:])
    losses = losses(device)
    of_stage = {
        "initial": {"losses": GaussianNLLLoss(), "sigmas": sigmas_of_initial(model)},
        "single": {"losses": losses, "sigmas": SamplerSigmas(model, OWN_LEVELS)},
        "end_to_end": {"losses": losses},
    }
    validation = {}
    for (stage, options), updates in zip(of_stage.items(), args.updates, strict=True):
        if not updates:
            continue
        # An initial estimate is learned for linear operators only.
        tasks = [task for task in args.tasks if stage != "initial" or is_linear(make_physics(task, shape))]
        rate = lr / 2 if stage == "end_to_end" else lr
        groups = parameter_groups(model.unfolded, lr=rate, lr_scalars=3e-3, lr_initializer=rate)
        trainer = DistillationTrainer(
            model=model,
            physics=[make_physics(task, shape, device=device) for task in tasks],
            physics_generator=[make_generator(task, shape, sigma_y, device=device) for task in tasks],
            train_dataloader=images,
            eval_dataloader=DataLoader(shown, len(shown)),
            stage=stage,
            steps=updates,
            optimizer=torch.optim.AdamW(groups, betas=(0.9, 0.99)),
            lr_schedule=warmup_cosine(updates, warmup_steps=50),
            grad_clip=1.0 if stage == "initial" else None,
            compile=args.fast,
            mixed_precision="bfloat16" if args.fast else False,
            eval_interval=-(-updates // 4),
            ckp_interval=100,
            plot_images=True,
            save_path=args.out / stage,
            settings={"tasks": tasks, "sigma_y": sigma_y, "shape": shape},
            seed=args.seed,
            device=device,
            **options,
        )
        print(f"stage {stage!r}, {updates} updates")
        model = trainer.train()
        validation = {name: of[-1][1] for name, of in trainer.history.items() if name.startswith("eval")}
    return validation


def sigmas_of_initial(model):
    """Half of the states at the first level, where y is all there is; most others at the sampler's levels."""
    others = SamplerSigmas(model, OWN_LEVELS)

    def sigmas(batch_size):
        first = torch.rand(batch_size) < 0.5
        return torch.where(first, model.sigmas[0].cpu(), others(batch_size))

    return sigmas


def save(model, args, **metadata):
    """Write the sampler to ``args.out / "model"``, with its command, arguments and scores."""
    arguments = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    command = shlex.join(["python", f"examples/recipes/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    metadata = {"command": command, "arguments": arguments, **metadata}
    model.save_pretrained(args.out / "model", metadata=metadata, dtype=torch.float16)
    print(f"written to {args.out / 'model'}: UD2M.from_pretrained({str(args.out / 'model')!r})")
