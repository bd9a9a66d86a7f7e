"""Draws ``method.svg``, the figure of the unfolded sampler, and the thumbnail of scripts without figures.

.. code-block:: bash

    python docs/figures/method.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

STATE, DRAW, PROX, NOISE, DENOISE = "#f2f2f2", "#dce6f5", "#fde9d0", "#f2f2f2", "#d9ecd9"
plt.rcParams |= {"font.size": 11, "mathtext.fontset": "cm", "svg.fonttype": "path", "svg.hashsalt": "0"}

figure, axis = plt.subplots(figsize=(10, 5.2))
axis.set(xlim=(0, 100), ylim=(0, 52))
axis.axis("off")


def box(x, y, width, height, text, color, edge="#555555"):
    """A box around (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=1"
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor=edge))
    axis.text(x, y, text, ha="center", va="center")


def arrow(start, end, text="", shift=(0, 1.8), **style):
    """An arrow with its label in the middle."""
    options = {"arrowstyle": "-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0} | style
    axis.annotate("", xy=end, xytext=start, arrowprops=options)
    if text:
        middle = ((start[0] + end[0]) / 2 + shift[0], (start[1] + end[1]) / 2 + shift[1])
        axis.text(*middle, text, ha="center", va="center", fontsize=10)


# The outer loop, for N = 3
axis.text(0, 50, "The sampler: N noise levels", fontsize=12, weight="bold", va="center")
for i, x in enumerate((6, 38, 70)):
    n = 3 - i
    box(x, 38, 9, 7, rf"$x_{{s_{n}}}$", STATE)
    box(x + 16, 38, 11, 7, r"$L(y, x_s, s)$", DRAW, edge="#28559b" if i == 1 else "#555555")
    arrow((x + 4.5, 38), (x + 10.5, 38))
    if n > 1:
        arrow((x + 21.5, 38), (x + 27.5, 38), r"$x_0$")
        axis.text(x + 24.5, 35.6, "step", ha="center", va="center", fontsize=9, color="#555555")
    arrow((x + 16, 45.5), (x + 16, 41.5), r"$y$", shift=(1.6, 0.8))
arrow((91.5, 38), (96, 38))
axis.text(97, 38, r"$\hat x$", ha="left", va="center", fontsize=13)
axis.text(6, 32, "noise", ha="center", va="center", fontsize=9, color="#555555")

# The inner loop
for end, x in ((1, 48.5), (99, 59.5)):
    axis.plot([x, end], [34.5, 27], color="#28559b", linewidth=0.8, linestyle="--")
axis.add_patch(
    FancyBboxPatch(
        (1, 1), 98, 26, boxstyle="round,pad=0,rounding_size=1", facecolor="none", edgecolor="#28559b"
    )
)
axis.text(
    3, 24.3, "The unfolded denoiser: K iterations, one network evaluation each", weight="bold", va="center"
)
box(12, 12, 16, 8, "initial\nestimate", DRAW)
box(40, 12, 18, 8, "prox of physics\n" r"$\rho_k,\ \lambda_k$", PROX)
box(63, 12, 13, 8, "noise\n" r"$+\ \delta_k\, n$", NOISE)
box(85, 12, 14, 8, "denoiser\n" r"$D(w, \delta_k)$", DENOISE)
arrow((20, 12), (31, 12), r"$x$")
arrow((49, 12), (56.5, 12), r"$z$")
arrow((69.5, 12), (78, 12), r"$w$")
arrow((40, 20.5), (40, 16), r"$y,\ x_s$", shift=(4, 1.2))
arrow((12, 20.5), (12, 16), r"$y,\ x_s$", shift=(4, 1.2))
axis.plot([85, 85, 26], [8, 3.5, 3.5], color="#333333", linewidth=1)
arrow((26, 3.5), (26, 11.5))
axis.text(56, 5.2, r"next iteration, from $x$", ha="center", va="center", fontsize=10)
arrow((92, 12), (97.5, 12))
axis.text(95.2, 14, r"$x_0$", ha="center", va="center", fontsize=10)

folder = Path(__file__).parent
figure.savefig(folder / "method.svg", bbox_inches="tight", metadata={"Date": None})

figure = plt.figure(figsize=(4, 2.8), facecolor=DRAW)
figure.text(0.5, 0.5, r"$x \sim p(x \mid y)$", ha="center", va="center", fontsize=26, color="#28559b")
figure.savefig(folder / "thumbnail.png", dpi=100)
