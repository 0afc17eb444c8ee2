"""Draws ``kernels_layout.png`` and ``kernels_roofline.png`` beside this file.

    python docs/kernel_pictures.py

Everything here is computed from shapes and from a data sheet; nothing is measured. ``kernels.md`` holds the lines of
``table``, which a test compares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# NVIDIA H200 Tensor Core GPU data sheet, SXM: bfloat16 without sparsity (half of its 1,979), float32, memory.
TENSOR_FLOPS, FLOAT32_FLOPS, BYTES_A_SECOND = 989e12, 67e12, 4.8e12
BALANCE = TENSOR_FLOPS / BYTES_A_SECOND
# Shapes of the table: those of an 8B Llama 3.
HEAD_DIM, NUM_KV_HEADS, GROUP, VOCAB = 128, 8, 4, 128256

BLUE, ORANGE, GREEN, GREY, RED = "#4878a8", "#d9863b", "#5b9a5b", "#c9c9c9", "#b5403b"


@dataclass(frozen=True)
class Work:
    """What a kernel does for a unit of its work: bytes of device memory, and FLOPs that it executes and that count."""

    name: str
    unit: str
    num_bytes: float
    executed: float
    useful: float
    on_tensor_cores: bool = True

    @property
    def intensity(self) -> float:
        """FLOPs executed for a byte."""
        return self.executed / self.num_bytes

    @property
    def bound(self) -> str:
        """The side of the balance on which it lies."""
        peak = TENSOR_FLOPS if self.on_tensor_cores else FLOAT32_FLOPS
        return "compute" if self.intensity > peak / BYTES_A_SECOND else "memory"


def pair_bytes(kind: str, head_dim: int = HEAD_DIM) -> float:
    """A key and a value of one kv head, with their scales."""
    return (
        2 * {"bf16": 2 * head_dim, "fp8": head_dim + 4, "int8": head_dim + 4, "int4": head_dim / 2 + 4}[kind]
    )


def attention(name: str, rows: int, kind: str = "bf16") -> Work:
    """A key and a value for a tile of so many rows: two products of ``2 D`` FLOPs for each."""
    product = 4 * HEAD_DIM
    useful = product * (rows if name.startswith("prefill") else GROUP)
    return Work(name, "key, kv head", pair_bytes(kind), product * rows, useful)


def prompt(tokens: int, cached: int, group: int = GROUP) -> Work:
    """A chunk of a prompt over what is cached, if each key and value leaves memory once; queries and results too."""
    product = 4 * HEAD_DIM * group * (tokens * cached + tokens * (tokens + 1) / 2)
    moved = pair_bytes("bf16") * (cached + tokens) + tokens * group * 4 * HEAD_DIM
    return Work(f"prefill, {tokens} tokens, each key read once", "row, kv head", moved, product, product)


def works() -> list[Work]:
    """The kernels, in the order of the table."""
    parts, rows = 8, 16
    joined = parts * rows * (HEAD_DIM + 1) * 4 + rows * HEAD_DIM * 2
    token = 2 * NUM_KV_HEADS * HEAD_DIM
    return [
        attention("decode, mma, bf16", 16),
        attention("decode, mma, fp8 or int8", 16, "int8"),
        attention("decode, mma, int4", 16, "int4"),
        attention("decode, wgmma, bf16", 64),
        attention("decode, wgmma, int4", 64, "int4"),
        attention("prefill, a tile by itself", 128),
        prompt(2048, 0),
        Work(
            "combine, 8 items",
            "tile, kv head",
            joined,
            parts * rows * HEAD_DIM * 2,
            parts * GROUP * HEAD_DIM * 2,
            False,
        ),
        Work("scatter, bf16", "token", 2 * token * 2, 0, 0, False),
        Work(
            "scatter, fp8 or int8", "token", token * 2 + token / HEAD_DIM * 132, 6 * token, 6 * token, False
        ),
        Work("block copy", "block of 16, layer", 4 * 16 * token * 2, 0, 0, False),
        Work("kept cutoff, a pass", "row of logits", 4 * VOCAB, 2 * VOCAB, 2 * VOCAB, False),
    ]


def crossing(group: int, cached: int = 8192) -> int:
    """The fewest query tokens over what is cached with which a row is bound by products."""
    return next(tokens for tokens in range(1, 10_000) if prompt(tokens, cached, group).intensity > BALANCE)


def table() -> list[str]:
    """Lines of the table in ``kernels.md``."""
    lines = []
    for work in works():
        counted = "0" if work.executed == 0 else f"{work.executed:,.0f}"
        if work.useful != work.executed:
            counted += f" ({work.useful:,.0f})"
        place = "0" if work.executed == 0 else f"{work.intensity:.3g}"
        lines.append(
            f"| {work.name} | {work.unit} | {work.num_bytes:,.0f} | {counted} | {place} | {work.bound} |"
        )
    return lines


def _box(
    ax: Any, x: float, y: float, width: float, height: float, face: str, text: str = "", **options: Any
) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor="black", linewidth=0.7))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", **{"fontsize": 9, **options})


def _zoom(ax: Any, top: Sequence[tuple[float, float]], bottom: Sequence[tuple[float, float]]) -> None:
    for (x0, y0), (x1, y1) in zip(top, bottom, strict=True):
        ax.plot([x0, x1], [y0, y1], color="black", linewidth=0.7, linestyle=":")


def _write(ax: Any, x: float, y: float, text: str, **options: Any) -> None:
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    ax.text(x, y, text, **{"fontsize": 9.5, "va": "center", "bbox": plain, **options})


def _draw_pool(ax: Any) -> None:
    _write(
        ax,
        0,
        72.5,
        "kv_pool.k (kv_pool.v is the same):  [L*N, Hkv, S, D],  here L = 2, N = 8, Hkv = 2, S = 16",
        weight="bold",
    )
    for entry in range(16):
        layer, block = divmod(entry, 8)
        color = GREY if block == 0 else ORANGE if entry == 15 else (BLUE, GREEN)[layer]
        _box(ax, 6.1 * entry, 63, 6.1, 5, color, str(entry), color="black" if block == 0 else "white")
        _write(ax, 6.1 * entry + 3.05, 61.2, str(block), ha="center", fontsize=8)
    _write(ax, 24, 69.6, "layer 0", ha="center")
    _write(ax, 73, 69.6, "layer 1", ha="center")
    _write(
        ax,
        0,
        58.8,
        "above: entry of the array = layer * N + block;  below: block id as tables have it; 0 is the dummy",
        fontsize=8.5,
    )

    _zoom(ax, [(91.5, 63), (97.6, 63)], [(0, 54), (88, 54)])
    _write(ax, 0, 55.8, "entry 15: block 7 of layer 1", weight="bold")
    for head in range(2):
        _box(
            ax,
            44 * head,
            47.5,
            44,
            6.5,
            ORANGE,
            f"kv head {head}:  [S, D], contiguous: a tile, one bulk copy",
            color="white",
        )
    _write(ax, 89, 50.7, "4 KiB each\nS=16, D=128,\nbfloat16", fontsize=8.5)


def _draw_tile(ax: Any) -> None:
    _zoom(ax, [(44, 47.5), (88, 47.5)], [(6, 42), (56, 42)])
    _write(ax, 6, 43.7, "a tile, and its scales if the pool is quantised", weight="bold")
    for offset in range(16):
        used = offset < 8
        y = 40 - 1.75 * offset
        _box(ax, 6, y, 50, 1.75, RED if 5 <= offset < 8 else ORANGE if used else "white")
        _box(ax, 62, y, 7, 1.75, RED if 5 <= offset < 8 else ORANGE if used else "white")
        _write(ax, 5.3, y + 0.85, str(offset), fontsize=7, ha="right")
    _write(ax, 31, 12, "k: D elements of a token", ha="center")
    _write(ax, 65.5, 12, "k_scale: float32", ha="center")
    _write(ax, 71, 36, "offsets 0-4: positions 32-36,\ncached before", fontsize=8.5)
    _write(
        ax,
        71,
        29.6,
        "offsets 5-7: positions 37-39,\nwritten by this step;\nslots 7 * 16 + 5 to + 7",
        fontsize=8.5,
        color=RED,
    )
    _write(ax, 71, 20, "offsets 8-15: of nobody yet;\nmay hold anything, NaN\nincluded", fontsize=8.5)


def _draw_bytes(ax: Any) -> None:
    _write(
        ax, 0, 7.8, "int4: D / 2 bytes a token, byte j has elements j (low) and j + D/2 (high)", weight="bold"
    )
    for j in range(4):
        _box(ax, 24 * j, 1.5, 12, 4.5, BLUE, f"{j} + D/2", color="white")
        _box(ax, 24 * j + 12, 1.5, 12, 4.5, ORANGE, f"{j}", color="white")
        _write(ax, 24 * j + 12, 0.2, f"byte {j}", ha="center", fontsize=8)


def draw_layout(path: Path) -> None:
    """The pool from all of it down to a byte."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(10, 7.4))
    ax.set(xlim=(0, 100), ylim=(0, 74))
    ax.axis("off")
    _draw_pool(ax)
    _draw_tile(ax)
    _draw_bytes(ax)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def _draw_roofs(ax: Any) -> None:
    import numpy as np

    x = np.geomspace(0.2, 3000, 200)
    for peak, name in (
        (TENSOR_FLOPS, "tensor cores, bf16: 989 TFLOP/s"),
        (FLOAT32_FLOPS, "float32: 67 TFLOP/s"),
    ):
        ax.plot(x, np.minimum(peak, BYTES_A_SECOND * x) / 1e12, color="black", linewidth=1)
        ax.text(2800, peak / 1e12 * 1.15, name, fontsize=8, ha="right")
    ax.text(0.75, 5.2, "4.8 TB/s", fontsize=8, rotation=42)
    ax.axvline(BALANCE, color="black", linestyle=":", linewidth=0.8)
    ax.text(BALANCE * 0.95, 1.2, f"balance: {BALANCE:.0f}", fontsize=8, ha="right")
    shown = [work for work in works() if work.executed]
    colors = [BLUE, ORANGE, GREEN, RED]
    for number, work in enumerate(shown):
        peak = TENSOR_FLOPS if work.on_tensor_cores else FLOAT32_FLOPS
        reached = min(peak, BYTES_A_SECOND * work.intensity) / 1e12
        marker, color = "os^Dv<>P*X"[number % 10], colors[number % 4]
        ax.plot(work.intensity, reached, marker, color=color, markersize=7, linestyle="none", label=work.name)
    ax.set(xscale="log", yscale="log", xlim=(0.2, 3000), ylim=(0.9, 2000))
    ax.set(xlabel="FLOP executed for a byte of device memory", ylabel="TFLOP/s at most")
    ax.legend(fontsize=7.5, loc="lower right", bbox_to_anchor=(1.0, 0.07))
    ax.set_title("Where the kernels lie on an H200\n(computed, not measured)", fontsize=10)


def _draw_prefill(ax: Any) -> None:
    import numpy as np

    tokens = np.unique(np.geomspace(1, 4096, 80).astype(int))
    for group, color in ((1, BLUE), (4, ORANGE), (8, GREEN)):
        y = [prompt(int(count), 8192, group).intensity for count in tokens]
        ax.plot(tokens, y, color=color, label=f"G = {group}: from {crossing(group)} tokens on")
    ax.axhline(BALANCE, color="black", linestyle=":", linewidth=0.8)
    ax.text(0.9, BALANCE * 1.12, f"balance: {BALANCE:.0f}", fontsize=8)
    ax.axhline(128, color=RED, linestyle="--", linewidth=0.8)
    ax.text(0.9, 128 * 0.72, "a tile of 128 rows by itself", fontsize=8, color=RED)
    ax.set(xscale="log", yscale="log", xlabel="query tokens of a row, 8192 cached", ylabel="FLOP for a byte")
    ax.legend(fontsize=8, loc="lower right")
    ax.set_title("Where prefill crosses over, each key read once\n(computed, not measured)", fontsize=10)


def draw_roofline(path: Path) -> None:
    """Kernels under the roofs, and prefill by the number of query tokens."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.2))
    _draw_roofs(left)
    _draw_prefill(right)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Writes the pictures."""
    here = Path(__file__).parent
    draw_layout(here / "kernels_layout.png")
    draw_roofline(here / "kernels_roofline.png")


if __name__ == "__main__":
    main()
