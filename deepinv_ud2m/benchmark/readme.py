"""The measured figures of the README, from the files that hold them.

    python -m deepinv_ud2m.benchmark.readme

rewrites them in README.md, between their two markers; a test checks that they are up to date.
"""

from __future__ import annotations

import json
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_START, _END = "<!-- measured -->", "<!-- /measured -->"


def main() -> None:
    """Rewrite the README of this checkout."""
    readme = _PACKAGE.parent / "README.md"
    readme.write_text(updated(readme.read_text()))


def updated(text: str) -> str:
    """
    The README with its measured figures as the stored files have them.

    :param str text: the README.
    """
    before, _, rest = text.partition(_START)
    _, _, after = rest.partition(_END)
    return f"{before}{_START}\n{measured()}\n{_END}{after}"


def measured() -> str:
    """The section on what was measured."""
    card = json.loads((_PACKAGE / "weights" / "prior-mnist" / "config.json").read_text())
    profile = json.loads((_PACKAGE / "benchmark" / "results" / "overhead.json").read_text())
    return f"## Measured\n\n{_prior(card)}\n\n{_overhead(profile)}"


def _prior(card: dict) -> str:
    metrics, training = card["metrics"], card["training"]
    levels = metrics["denoising_psnr"]
    distances = metrics["frechet_distance_to_test"]
    listed = ", ".join(f"{value:.2f} for {name}" for name, value in distances.items())
    return "\n".join(
        [
            f"**The prior `mnist`**: {training['parameters']:,} parameters, trained on "
            f"{training['images']:,} images. Denoising PSNR on the {metrics['test_images']:,} "
            "test digits:",
            "",
            f"| noise level | {' | '.join(levels)} |",
            f"|---|{'---|' * len(levels)}",
            f"| PSNR (dB) | {' | '.join(f'{value:.2f}' for value in levels.values())} |",
            "",
            f"Frechet distance to the test digits (features of the shipped classifier): {listed}.",
        ]
    )


def _overhead(profile: dict) -> str:
    machine = profile["machine"]
    lines = [
        "**Overhead of the sampler** over the network evaluations it is made of: time of a call of "
        f"`sample` over that of as many evaluations of the prior, measured alternately "
        f"(`{profile['command']}`; {machine['device']}, {machine['threads']} threads, torch "
        f"{machine['torch']}; median of {profile['rows'][0]['pairs']} pairs and quartiles).",
        "",
        "| measurements x samples | NFE | overhead | quartiles |",
        "|---|---|---|---|",
    ]
    for row in profile["rows"]:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['measurements']} x {row['samples']}, {row['size']}x{row['size']} | {row['nfe']} "
            f"| {row['overhead']:.3f} | {low:.3f} to {high:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
