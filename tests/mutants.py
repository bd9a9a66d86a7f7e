"""
Mutants: one change of one line of the package each, and the tests that must fail with it.

``python tests/mutants.py [FILE ...]`` applies one after the other to a copy of the repository, runs the tests of its
file until one fails, and prints the mutants that survive, and the score. Hours on one core; a mutant whose tests
take twenty minutes counts as killed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: Test files by file of the package.
TESTS = {
    "checkpoint.py": "checkpoint checkpoint_files hub",
    "checks.py": "errors sampler schedule bad_inputs",
    "config_file.py": "checkpoint_files checkpoint",
    "conjugate_gradients.py": "proximal problem",
    "counting.py": "sampler",
    "data/crops.py": "data recipes",
    "fingerprints.py": "checkpoint checkpoint_files priors",
    "initializers/base.py": "initializers initializers_learned unfolded",
    "initializers/learned.py": "initializers_learned",
    "initializers/linear.py": "initializers",
    "initializers/ram.py": "initializers_ram",
    "initializers/wiener.py": "initializers",
    "measurements.py": "problem problem_properties errors",
    "photographs.py": "cli",
    "physics/traits.py": "traits problem proximal problem_properties structure",
    "pictures.py": "cli",
    "problem.py": "problem problem_properties proximal errors",
    "randomness.py": "randomness sampler",
    "sampler.py": "sampler errors interop initializers_learned checkpoint channels residual",
    "schedule.py": "schedule",
    "uncertainty.py": "uncertainty",
    "unfolded.py": "unfolded errors checkpoint sampler",
    "training/adversarial.py": "adversarial training_updates trainer training_runs",
    "training/arguments.py": "trainer training_evaluation",
    "training/averages.py": "trainer training_runs training_evaluation",
    "training/checkpoints.py": "recipes training_runs trainer training_evaluation",
    "training/controller.py": "recipes training_evaluation",
    "training/distillation.py": "recipes",
    "training/evaluation.py": "training_evaluation training_runs",
    "training/history.py": "training_evaluation trainer",
    "training/losses.py": "losses",
    "training/objectives.py": "recipes",
    "training/preparation.py": "recipes bad_inputs",
    "training/prior.py": "training_prior",
    "training/randomness.py": "training_runs trainer",
    "training/sigmas.py": "schedule",
    "training/stages.py": "trainer recipes",
    "training/trainer.py": "trainer training_updates training_runs training_evaluation",
    "training/updates.py": "training_updates trainer",
}

#: What is replaced by what, by file. Each text is in its file once.
MUTANTS = {
    "checkpoint.py": [
        (
            'types = {k: torch.float32 if k.startswith("scalars.") else dtype for k in state}',
            "types = dict.fromkeys(state, dtype)",
        ),
        ('if found != expected["fingerprint"]:', "if False:"),
        ("        remove_lora(denoiser)\n", ""),
        ("denoiser.requires_grad_(False)", "pass"),
        ("setattr(network, _HOLDS, str(name_or_path))", "pass"),
        ("    if merge:\n        merge_lora(network)", "    merge_lora(network)"),
        ("    if merge:\n        merge_lora(network)\n", ""),
        ("with torch.random.fork_rng(devices=[]):", "if True:"),
        (
            "write_files(folder, {_WEIGHTS: weights, CONFIG: text.encode()})",
            "Path(folder).mkdir(parents=True,exist_ok=True); Path(folder,_WEIGHTS).write_bytes(weights); Path(folder,CONFIG).write_text(text)",
        ),
        ("{_WEIGHTS: weights, CONFIG: text.encode()}", "{CONFIG: text.encode(), _WEIGHTS: weights}"),
        ("if found != {**found, **expected}:", "if False:"),
        (
            '        result = make(unfolded, **config["sampler"])\n        unfolded.load_state(state)',
            '        unfolded.load_state(state)\n        result = make(unfolded, **config["sampler"])',
        ),
    ],
    "checks.py": [
        ("any(n != 1 for n in value.shape[1:])", "False"),
        ("value.numel() not in (1, batch_size)", "False"),
    ],
    "config_file.py": [
        ("if version > FORMAT:", "if False:"),
        ("or version < 1", ""),
        ('or "adapter"', 'or "all"'),
        (
            '{"reference_level": unfolded.pop("reference_level"), **config["initializer"]}',
            '{**config["initializer"], "reference_level": unfolded.pop("reference_level")}',
        ),
        ("if not isinstance(content[key], kind):", "if False:"),
    ],
    "conjugate_gradients.py": [
        ("d = 0 * r", "d = 1 * r"),
        ("(a is b and i == j) or", "(a is b) or"),
    ],
    "counting.py": [
        ("if threading.get_ident() == self._thread:", "if True:"),
        ("hook.remove()", "pass"),
    ],
    "data/crops.py": [
        ("self.indices, self.labels = _of(self.indices, kept), _of(self.labels, kept)", "pass"),
        ("self.weights = self.weights[kept]", "pass"),
        ("crop = crop.flip(-1) if flip else crop", "crop = crop"),
    ],
    "fingerprints.py": [
        ("if name not in trained:", "if True:"),
        ('digest.update(f"{name} {list(weight.shape)}\\n".encode())', "pass"),
    ],
    "initializers/base.py": [
        (
            "self.rmse_scale(problem.sigma_y.to(x_s.dtype), sigma)",
            "self.rmse_scale(sigma, problem.sigma_y.to(x_s.dtype))",
        ),
        (
            "return joint_level(sigma, sigma_y, self.reference_level)",
            "return joint_level(sigma, sigma_y, 0.2)",
        ),
    ],
    "initializers/learned.py": [
        ("mean.detach()", "mean"),
        (".clamp(ERROR_MIN, ERROR_MAX)", ""),
        (".clamp(ERROR_MIN, ERROR_MAX)", ".clamp(ERROR_MIN)"),
        (".clamp(ERROR_MIN, ERROR_MAX)", ".clamp(max=ERROR_MAX)"),
        ("ERROR_MIN, ERROR_MAX = 1e-3, 1.0", "ERROR_MIN, ERROR_MAX = 1e-2, 1.0"),
        ("problem.adjoint.to(x_s.dtype),", "x_s,"),
        ("sensitivity.to(x_s.dtype),", "torch.ones_like(x_s),"),
        ("(1 + sigma**2).sqrt()", "(1 + sigma**2)"),
        ("x_s - self.wiener.mean", "x_s - 0.5"),
        ("5 * sigma_y", "sigma_y"),
        ("sigma.log() / 4", "sigma.log()"),
        ("level.log() / 4", "level.log()"),
        ("[..., : x.shape[-2], : x.shape[-1]]", ""),
        ("return skip * x + out * residual", "return skip * x + residual"),
        ("weights[name] *= 0.3", "weights[name] *= 1.0"),
        ("if not problem.is_linear:", "if False:"),
        ("if x_s.shape[1] != self.channels:", "if False:"),
    ],
    "initializers/linear.py": [
        ("rho=self.std", "rho=0.5"),
        ("self.mean)", "0.5)"),
        ('"pinv" else problem.adjoint', '"pinv" else problem.A_dagger()'),
    ],
    "initializers/ram.py": [
        ("with torch.autocast(x_s.device.type, enabled=False), warnings", "with warnings"),
        ("joint.level.flatten()", "problem.sigma_y.flatten()"),
        ("(sigma**-2 + sigma_y**-2).rsqrt()", "(sigma**-2 + sigma_y**-2).rsqrt() * 2"),
        ("return x.to(x_s.dtype)", "return x"),
        ("freeze_prior(ram)", "pass"),
        ("if trainable:\n            ram.requires_grad_(True)", "pass"),
        ("return dict(prior_parameters(self)) if self.trainable else {}", "return {}"),
        ("return [self.ram]", "return []"),
        ("_scale(block, 1 / self.weight_y) for block", "_scale(block, 1 / self.weight_x) for block"),
        ("dtype.to_complex() if tensor.is_complex() else dtype", "dtype"),
    ],
    "initializers/wiener.py": [
        ("self.mean + torch.fft.irfft2(spectrum, s=x_s", "0.5 + torch.fft.irfft2(spectrum, s=x_s"),
        ("sigma[:1] if sigma.stride(0) == 0 else sigma", "sigma[:1]"),
        ("y if problem.is_per_image else y[:1]", "y[:1]"),
        ("problem.A_adjoint(impulse)", "problem.physics.A_adjoint(impulse)"),
        ("tol=self.tol", "tol=1e-5"),
        ("max_iter=self.max_iter", "max_iter=1000"),
        ('warnings.filterwarnings("ignore", "posterior_prox stopped after")', "pass"),
        ("(1 - c) * power", "power"),
    ],
    "measurements.py": [
        ("(level >= SMALLEST) & (level <= LARGEST)", "(level >= SMALLEST)"),
        ("(level >= SMALLEST) & (level <= LARGEST)", "(level <= LARGEST)"),
    ],
    "photographs.py": [
        ("return kernel / kernel.sum()", "return kernel"),
        ("(mask[:, :1] < 0.5)", "(mask[:, :1] > 0.5)"),
        ("return x[:, :1] if (x == x[:, :1]).all() else x", "return x"),
        ("dinv.physics.Blur(kernel, padding=borders)", 'dinv.physics.Blur(kernel, padding="circular")'),
    ],
    "physics/traits.py": [
        ("if batch_size == 1:\n        return False", "if False:\n        return False"),
        ("return bool(said(batch_size))", "return True"),
        ("return bool(said(batch_size))", "return False"),
        (
            "    if not _is_deepinvs(type(physics)) or type(physics) in _OF_FUNCTIONS:\n        return True",
            "    if False:\n        return True",
        ),
        (
            "_OF_FUNCTIONS = (Physics, LinearPhysics, DecomposablePhysics)",
            "_OF_FUNCTIONS = (Physics, LinearPhysics)",
        ),
        (
            "    if any(is_per_image(child, batch_size) for child in _children(physics)):\n        return True",
            "    pass",
        ),
        ("return any(t.ndim > 0 and len(t) == batch_size for t in _tensors(physics))", "return False"),
        ("return any(t.ndim > 0 and len(t) == batch_size for t in _tensors(physics))", "return True"),
        (
            'return [tensor for name, tensor in own if "noise_model" not in name]',
            "return [tensor for name, tensor in own]",
        ),
        (
            '[b for name, b in physics.named_buffers() if "noise_model" not in name]',
            "[b for name, b in physics.named_buffers()]",
        ),
        ("0 if b.is_inference() else b._version", "b._version"),
        ("return bool(said(shape))", "return True"),
        ("    if not _is_deepinvs(prox):\n        return True", "    if False:\n        return True"),
        ("    if not _is_deepinvs(operator):\n        return False", "    pass"),
        ("operator is Downsampling\n            and", "True and"),
        ('and physics.padding == "circular"', ""),
        ("f <= n and n % physics.factor == 0", "n % physics.factor == 0"),
        ("f <= n and n % physics.factor == 0", "f <= n"),
        ("            and physics.filter is not None\n", ""),
        ("kernel is not None and torch.equal(kernel, kernel[:, :1].expand_as(kernel))", "kernel is not None"),
        ("return NOISE_FLOOR", "return 0.01"),
        ("return levels[0]", "return levels[-1] * 1.1"),
    ],
    "pictures.py": [
        ("* 65535).round()", "* 65535)"),
        ("bitdepth=16", "bitdepth=8"),
    ],
    "problem.py": [
        ("(self._copies or [self.y]) * copies", "[self.y] * copies"),
        ("other._copies = _split(y, len(self._copies))", "pass"),
        ("            other._view = other._remember_adjoint()\n", "            pass\n"),
        ("self._by_copy(self._view.prox_l2,", "self._by_copy(self.physics.prox_l2,"),
        ("if not isinstance(adjoint, Tensor):", "if False:"),
    ],
    "randomness.py": [
        ("self._used == self.block", "self._used >= 1"),
        ("return noise.to(like.dtype)", "return noise"),
        ("manual_seed(int(seed))", "manual_seed(int(seed) % 2)"),
        ("if noise.shape != like.shape:", "if False:"),
    ],
    "sampler.py": [
        ("0.5 + self.sigmas[0]", "0.0 + self.sigmas[0]"),
        ("0.5 + self.sigmas[0]", "0.5 + self.sigmas[-1]"),
        (".clamp(sigmas[-1], sigmas[0])", ".clamp(max=sigmas[0])"),
        (".clamp(sigmas[-1], sigmas[0])", ".clamp(min=sigmas[-1])"),
        ("relative[0], relative[-1] = sigmas[0], sigmas[-1]", "relative[0] = sigmas[0]"),
        ("relative[0], relative[-1] = sigmas[0], sigmas[-1]", "relative[-1] = sigmas[-1]"),
        (
            "output_range: tuple[float, float] | None = (0.0, 1.0),",
            "output_range: tuple[float, float] | None = None,",
        ),
        ('return relative, {"initial": initial}', "return relative, {}"),
        ("(1 - ratio**2) ** 0.5\n        kept", "(1 - ratio) ** 0.5\n        kept"),
        ("self.eta**2 * (1 - ratio**2)", "self.eta * (1 - ratio**2)"),
        ("self.sigma_y if sigma_y is None else sigma_y", "sigma_y"),
        (
            "self.sigma_y if sigma_y is None else sigma_y",
            "self.sigma_y if self.sigma_y is not None else sigma_y",
        ),
        ("self.unfolded.check(problem, self.sigmas)", "pass"),
        ("return model.eval().to(device)", "return model.to(device)"),
    ],
    "schedule.py": [
        (
            "below = t.floor().clamp(0, self.num_timesteps - 2).long()",
            "below = t.round().clamp(0, self.num_timesteps - 2).long()",
        ),
        (".clamp(max=0.999)", ""),
        (
            "times.clamp(max=self.num_timesteps - 1)).flip(0)",
            "times.clamp(max=self.num_timesteps - 2)).flip(0)",
        ),
        ("roots**2 + 1e-9", "roots**2"),
        ("1 + uniform * (self.num_timesteps - 2)", "uniform * (self.num_timesteps - 1)"),
        ("scale = 1000 / num_timesteps", "scale = 1"),
        ("sigmas.diff() < 0", "sigmas.diff() <= 0"),
        ("(1 + 4 * sigma", "(1 + sigma"),
        ("return sigmas.clone()", "return sigmas"),
        ("(sigmas >= SMALLEST)", "(sigmas > 0)"),
        ("(sigmas.diff() < 0)", "(sigmas.diff() <= 0)"),
    ],
    "training/adversarial.py": [
        ("range(self.ratio)", "range(1)"),
        ("if frozen else D(*seen)", "if False else D(*seen)"),
        ("middle = torch.full_like(problem.adjoint, 0.5)", "middle = torch.full_like(problem.adjoint, 0.0)"),
    ],
    "training/arguments.py": [
        ("if given != defaults[name]:", "if False:"),
    ],
    "training/averages.py": [
        ("min(self.decay, (1 + n) / (10 + n))", "self.decay"),
        ("            self.restore()\n", "            pass\n"),
    ],
    "training/checkpoints.py": [
        (
            'trainer.skipped, trainer.skipped_in_a_row = state["skipped"]',
            'trainer.skipped, _ = state["skipped"]',
        ),
        ('    trainer.averaged.load(state["average"].values())\n', ""),
        ('    trainer.update.optimizer.load_state_dict(state["optimizer"])\n', ""),
        ('        trainer.adversary.load_state_dict(state["adversary"])', "        pass"),
        ('    trainer.turns.seek(state["data"])\n', ""),
        ('    trainer.history.load(*state["history"])\n', ""),
        (
            'trainer.evaluated, trainer.best = state["evaluated"], state["best"]',
            'trainer.evaluated = state["evaluated"]',
        ),
        ('    trainer.unfolded.load_state(state["trained"])\n', ""),
        ('            raise ValueError(f"its format', '            print(f"its format'),
        ("        if damaged:", "        if False:"),
        ("    if later.pressed:\n        handler(signal.SIGINT, None)", "    pass"),
        (" or isinstance(handler, _Later)", ""),
        ("identity(parts_of_sum(thing), seen)", "0"),
        ("if id(thing) in seen or not", "if not"),
        ('("_", "training", "device",', '("_", "device",'),
        (
            '        for part in folder.glob(f".{file}.*"):  # of a run that was killed while it wrote\n            part.unlink()\n',
            "",
        ),
    ],
    "training/controller.py": [
        ("c * ratio**self.kappa", "c / ratio**self.kappa"),
        ("self.low), self.high)", "self.low), 1e9)"),
        ("results[name if name in results else RATIO]", "results[RATIO]"),
    ],
    "training/distillation.py": [
        ("    seed_all([recipe.seed, *name.encode()])", "    pass"),
        ("start + torch.tensor(recipe.factors[best]).log()", "start"),
        ("relative <= 1.01 *", "relative <= 1.1 *"),
        ("torch.inf).argmin())", "torch.inf).argmax())"),
        ("betas=(recipe.betas[0], recipe.betas[1])", "betas=(0.5, 0.9)"),
    ],
    "training/evaluation.py": [
        ("        seed_all([*key, i], trainer.seeded)\n", ""),
    ],
    "training/history.py": [
        ("        self.sums = {}\n        return means", "        return means"),
    ],
    "training/losses.py": [
        ("rmse.flatten().log() + error", "rmse.flatten().log() * 2 + error"),
    ],
    "training/objectives.py": [
        ("Path(features).is_dir()", "False"),
        ("setting.controller.weights if setting.controller else 1.0", "1.0"),
        ("        try:\n            signature", "        if 0:\n            signature"),
    ],
    "training/preparation.py": [
        ("range(count)), held_out", "range(len(images))), held_out"),
        ("if isinstance(held, int) and held < len(read.labels):", "if False:"),
        ("            if self.missing is None:\n                raise\n", ""),
        ("if low < -1 or high > 2:", "if low < -1:"),
    ],
    "training/prior.py": [
        ("lr_schedule=schedule)", "lr_schedule=None)"),
        ("    average.assign()\n", ""),
        ('            average.load(state["average"])\n', ""),
        ('optimizer.load_state_dict(state["optimizer"])', "pass"),
    ],
    "training/randomness.py": [
        ("    np.random.seed(int(seeds[1]) >> 32)  # noqa: NPY002\n", ""),
        ("    random.seed(int(seeds[2]))\n", ""),
        (
            "order = np.random.default_rng([*self.key, turn]).permutation(len(self.streams))",
            "order = np.arange(len(self.streams))",
        ),
    ],
    "training/sigmas.py": [
        ("torch.rand(batch_size) < self.first", "torch.rand(batch_size) > self.first"),
    ],
    "training/stages.py": [
        ('estimate[None], "rmse": rmse', 'estimate[None], "rmse": rmse.detach()'),
        ("initial=tuple(initial)", "initial=None"),
    ],
    "training/trainer.py": [
        ("        with self.averaged(), eager:", "        with eager:"),
        (
            "                    with self.averaged():\n                        metadata",
            "                    if True:\n                        metadata",
        ),
        ("if score < self.best:", "if score > -self.best:"),
        ("                self.best = score\n", ""),
        (
            "        with self.get_autocast_context():\n            batch |=",
            "        if True:\n            batch |=",
        ),
        (
            "        with self.get_autocast_context():\n            return [loss",
            "        if True:\n            return [loss",
        ),
        ("        self.unfolded.checkpointing = self.checkpointing\n", ""),
        (
            '        with checkpoints.uninterrupted():\n            logs["loss"]',
            '        if True:\n            logs["loss"]',
        ),
        ("with checkpoints.lock(self.folder) if self.writes else nullcontext():", "with nullcontext():"),
        ("self.physics_generator, losses,", "losses,"),
        ("problem = Problem(y, physics, sigma_y=self.model.sigma_y)", "problem = Problem(y, physics)"),
        ('torch.compiler.set_stance("force_eager") if self.compile else nullcontext()', "nullcontext()"),
        ("logs[name] += value / update.batches", "logs[name] += value"),
        ("                finite = self.adversary.update.finite\n", ""),
        (
            "self.skipped_in_a_row = 0 if logs else self.skipped_in_a_row + 1",
            "self.skipped_in_a_row = self.skipped_in_a_row + (not logs)",
        ),
        ("if self.skipped_in_a_row >= self.max_skipped:", "if self.skipped_in_a_row > self.max_skipped:"),
        ("if self.resume and self.folder:", "if self.folder:"),
        (
            "            if finite:\n                update.apply()",
            "            if True:\n                update.apply()",
        ),
        ("        self.skipped += not logs\n", ""),
        (
            "if self.evaluated == self.completed:",
            "if False:",
        ),
        ("        self.history.add(logs)\n", ""),
        ("        if self.completed % self.log_interval == 0:", "        if True:"),
        ("            self.averaged.assign()\n", ""),
        (
            '        batch |= {"epoch": step, "micro_step": micro_step}',
            '        batch |= {"epoch": 0, "micro_step": micro_step}',
        ),
        (
            "        self.history.record(self.completed, values, prefix)\n",
            "        self.history.record(self.completed, values)\n",
        ),
    ],
    "training/updates.py": [
        ("self.grad_clip or math.inf", "math.inf"),
        ("        self.finite = math.isfinite(norm)\n", ""),
        ("self.finite = self.finite and all(map(math.isfinite, values))", "self.finite = True"),
        ('group["initial_lr"] * factor', 'group["initial_lr"]'),
        ("(stacked.sum() / self.batches).backward()", "stacked.sum().backward()"),
        ("        self.optimizer.zero_grad(set_to_none=True)\n", ""),
        ('"weight_decay": 0.0 if kind == "scalars" else weight_decay,', '"weight_decay": weight_decay,'),
        ("        if missing:", "        if False:"),
    ],
    "uncertainty.py": [
        ("tail, count = (1 - level) / 2, len(samples)", "tail, count = 1 - level, len(samples)"),
        ("p * (count + 1)", "p * count"),
        ("samples.std(0), samples.sort(0).values", "samples.std(0, correction=0), samples.sort(0).values"),
        ("1 - ((count + 1) * tail - 1) / count", "level"),
        ("pooled.std(0) + _ROUNDING", "pooled.std(0)"),
        ("mean - self.factor * std, mean + self.factor * std", "mean - std, mean + self.factor * std"),
        ("if len(samples) != self.num_samples:", "if False:"),
        ("mean + a * (samples - mean)", "mean + a**2 * (samples - mean)"),
        ("samples.var(0).mean(1).sqrt()", "samples.var(0).mean(1)"),
        ("share * scores.numel()", "share * (scores.numel() - 1)"),
    ],
    "unfolded.py": [
        ("if self.checkpointing and torch.is_grad_enabled():", "if False:"),
        ("if self.checkpointing and torch.is_grad_enabled():", "if self.checkpointing:"),
        (
            "delta = delta.clamp(self.prior_info.sigma_min, self.prior_info.sigma_max)",
            "delta = delta.clamp(min=self.prior_info.sigma_min)",
        ),
        (
            "delta = delta.clamp(self.prior_info.sigma_min, self.prior_info.sigma_max)",
            "delta = delta.clamp(max=self.prior_info.sigma_max)",
        ),
        ("        freeze_prior(denoiser)\n", ""),
        ("parameter.requires_grad_(True)", "pass"),
        ('or k.startswith(f"{name}.")', "or k.startswith(name)"),
        ("if initial is None else initial", "if True else initial"),
        ("min(k, len(logarithms) - 1)", "0"),
        ("DELTA_FIRST, DELTA_LAST, RHO = 4.0, 1.0, 2.0", "DELTA_FIRST, DELTA_LAST, RHO = 4.0, 1.0, 1.5"),
        ("z + delta * noise, delta", "z + delta * noise, delta * 1.01"),
        (
            "if len(given) not in (1, self.num_iterations) or not in_range",
            "if len(given) not in (1, self.num_iterations)",
        ),
        ("load_lora_state_dict(module, {key", "dict({key"),
    ],
}


def killed(folder: Path, name: str, old: str, new: str) -> bool:
    """Whether the tests of a file notice that a text of it is another."""
    file = folder / "deepinv_ud2m" / name
    text = file.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{name} has {text.count(old)} times {old!r}, not once")
    file.write_text(text.replace(old, new))
    tests = [f"tests/test_{test}.py" for test in TESTS[name].split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "capture_output": True, "timeout": 1200}
    try:
        return subprocess.run(command, check=False, **options).returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the mutants that the tests notice.")
    parser.add_argument(
        "files", nargs="*", default=sorted(MUTANTS), help="files of the package (default: all)"
    )
    files, survivors, count = parser.parse_args().files, [], 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", "runs", "docs", "__pycache__", ".venv*")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for name in files:
            for old, new in MUTANTS[name]:
                count += 1
                if not killed(folder, name, old, new):
                    survivors.append((name, old, new))
                    print(f"survived: {name}: {old!r} -> {new!r}", flush=True)
                print(f"{name}: {count - len(survivors)} of {count} killed so far", end="\r", flush=True)
            print(flush=True)
    print(f"score: {count - len(survivors)} of {count}, {1 - len(survivors) / count:.1%}")


if __name__ == "__main__":
    main()
