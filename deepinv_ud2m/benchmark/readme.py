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
    results = sorted((_PACKAGE / "benchmark" / "results").glob("overhead*.json"))
    profiles = [json.loads(file.read_text()) for file in results]
    return f"## Measured\n\n{_prior(card)}\n\n{_overhead(profiles)}"


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


def _overhead(profiles: list[dict]) -> str:
    machine = profiles[0]["machine"]
    lines = [
        "**Overhead of the sampler** over the network evaluations it is made of: time of a call of "
        "`sample` over that of as many evaluations of the prior, measured alternately "
        f"(`{profiles[0]['command']}`; {machine['device']}, torch {machine['torch']}).",
        "",
        "| threads | measurements x samples | NFE | overhead, median | quartiles | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for profile in profiles:
        for row in profile["rows"]:
            low, high = row["quartiles"]
            lines.append(
                f"| {profile['machine']['threads']} | {row['measurements']} x {row['samples']}, "
                f"{row['size']}x{row['size']} | {row['nfe']} | {row['overhead']:.3f} "
                f"| {low:.3f} to {high:.3f} | {row['pairs']} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
