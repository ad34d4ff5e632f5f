"""The drawings of the documentation: `python docs/drawings/draw.py` writes each as an SVG beside this file.

Those that explain are here; charts.py has those that show figures, which it reads from the tables of the pages.
"""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

from lightning_qlora.quantization.codebooks import NF4_LEVELS

sys.path.insert(0, str(Path(__file__).parent))

import charts
from svg import BLUE, GREEN, INK, LINE, ORANGE, PLAIN, arrow, box, svg, text


def nf4() -> str:
    """The 16 levels of NF4 under the normal curve, with the interval of weights that each stands for."""
    normal, edge = NormalDist(), NormalDist().inv_cdf(0.9677083)  # the quantile that becomes level 1

    def x(level: float) -> float:
        return 240 + 200 * level

    def y(level: float) -> float:
        return 210 - 440 * normal.pdf(level * edge)

    borders = [-1.15, *((a + b) / 2 for a, b in pairwise(NF4_LEVELS)), 1.15]
    parts = []
    for code, ((left, right), level) in enumerate(zip(pairwise(borders), NF4_LEVELS, strict=True)):
        steps = [left + (right - left) * i / 8 for i in range(9)]
        curve = " ".join(f"{x(at):.1f},{y(at):.1f}" for at in steps)
        color = (BLUE, "#93c5fd")[code % 2]
        parts.append(f'<polygon points="{x(left):.1f},210 {curve} {x(right):.1f},210" fill="{color}"/>')
        parts.append(f'<line x1="{x(level):.1f}" y1="{y(level):.1f}" x2="{x(level):.1f}" y2="216" stroke="{INK}"/>')
        parts.append(text(round(x(level), 1), 228 if code % 2 else 240, str(code), 11))
    parts += [text(x(at), 258, f"{at:g}", 12) for at in (-1, -0.5, 0, 0.5, 1)]
    parts.append(text(240, 278, "weight / largest absolute weight of its block", 13))
    return svg(288, *parts, label="The 16 levels of NF4 and the weights that each stands for, under the normal curve")


def weight() -> str:
    """The path of a weight: 16 bits to 4."""
    parts = [
        box(8, 24, 92, PLAIN, "W", "in floats", height=66),
        arrow(100, 57, 121, 57),
        box(124, 24, 104, BLUE, "blocks of 64:", "4-bit codes,", "a scale each", height=66),
        arrow(228, 57, 249, 57),
        box(252, 24, 104, BLUE, "256 scales:", "8-bit codes,", "an fp32 scale", height=66),
        arrow(356, 57, 377, 57),
        box(380, 24, 92, BLUE, "3 frozen", "uint8", "tensors", height=66),
        text(240, 116, "4 + 8/64 + 32/(64 * 256) = 4.127 bits for a weight"),
    ]
    return svg(132, *parts, label="A weight becomes 4-bit codes, 8-bit scales and fp32 scales of the scales")


def layers() -> str:
    """Which part of a pretrained module becomes what."""
    rows = [
        ("linear layers, pretrained", "experts of a mixture too", BLUE, "4 bits, frozen", "+ an adapter that trains"),
        ("new parts: a head,", "a decoder, a projector", ORANGE, "train in full,", "kept in fp32"),
        ("embeddings, norms,", "convolutions, pretrained", PLAIN, "frozen, in", "their type"),
        ("what the module froze:", "a teacher, a tower", PLAIN, "as it is", ""),
        ("modules_to_save, and single", "rows: trainable_token_indices", ORANGE, "train", "in full"),
    ]
    parts = [text(112, 18, "in your module"), text(368, 18, "after conversion")]
    for i, (first, second, color, *becomes) in enumerate(rows):
        top = 28 + 54 * i
        parts.append(box(8, top, 216, PLAIN, first, second))
        parts.append(arrow(224, top + 23, 261, top + 23))
        parts.append(box(264, top, 208, color, *filter(None, becomes), height=46))
    return svg(
        300, *parts, label="Which part of a pretrained module becomes what: in 4 bits, trained in full, or frozen"
    )


def batch() -> str:
    """The path of a batch through one layer."""
    parts = [
        box(190, 16, 100, PLAIN, "x", dashed=True),
        arrow(290, 31, 342, 31),
        box(344, 16, 120, ORANGE, "drop(x) Aᵀ", dashed=True),
        arrow(404, 46, 404, 74),
        box(344, 76, 120, ORANGE, "s (drop(x) Aᵀ) Bᵀ"),
        arrow(404, 106, 404, 150),
        box(16, 16, 128, BLUE, "W in 4 bits"),
        arrow(80, 46, 80, 74),
        box(16, 76, 128, BLUE, "decoded into", "a reused buffer"),
        arrow(80, 122, 80, 150),
        box(16, 152, 128, PLAIN, "x Wᵀ"),
        arrow(200, 46, 130, 150),
        arrow(144, 167, 342, 167),
        text(243, 158, "added in fp32", 12),
        box(344, 152, 120, PLAIN, "sum"),
        arrow(404, 182, 404, 206),
        box(344, 208, 120, PLAIN, "rounded once,", "+ bias: y"),
        text(168, 222, "blue: frozen, 4 bits; orange: trained", 12),
        text(168, 240, "dashed: kept for the gradient", 12),
    ]
    label = "A batch: the adapter's product first, x W is added to it, the sum is rounded once, and the bias added"
    return svg(266, *parts, label=label)


def gradient() -> str:
    """The path of a gradient through one layer."""
    parts = [
        box(190, 16, 100, PLAIN, "dY"),
        arrow(200, 46, 90, 82),
        arrow(240, 46, 240, 82),
        arrow(280, 46, 392, 82),
        box(12, 84, 150, PLAIN, "dX = dY W", "+ s drop(dY B A)"),
        box(172, 84, 144, ORANGE, "dB =", "s dYᵀ (drop(x) Aᵀ)"),
        box(326, 84, 142, ORANGE, "dA =", "s (dY B)ᵀ drop(x)"),
        box(12, 164, 150, BLUE, "W is decoded again;", "it has no gradient"),
        arrow(87, 164, 87, 132),
        arrow(244, 130, 290, 162),
        arrow(397, 130, 350, 162),
        box(250, 164, 140, ORANGE, "AdamW: A, B", "and two moments"),
        text(240, 236, "The dropout mask is computed again from its seed.", 12),
    ]
    return svg(248, *parts, label="A gradient: dX for the layer before; dA and dB for the optimizer; none for W")


def rounding() -> str:
    """Numbers of bf16 near 1 as ticks: d is added to a number that was rounded before, and to one that was not."""
    left, step = 60.0, 180.0  # of the first tick, and between ticks: 1/128

    def axis_with_dots(top: float, title: str, start: float, place: float, to: int, words: str) -> str:
        ticks = "".join(
            f'<line x1="{left + step * i:g}" y1="{top - 6}" x2="{left + step * i:g}" y2="{top + 6}" stroke="{INK}"/>'
            + text(left + step * i, top + 22, number)
            for i, number in enumerate(("1", "1.0078", "1.0156"))
        )
        dots = "".join(
            f'<circle cx="{left + step * at:g}" cy="{top}" r="5" fill="{color}" stroke="{INK}"/>'
            for at, color in ((start, BLUE), (place, ORANGE))
        )
        axis = f'<line x1="40" y1="{top}" x2="440" y2="{top}" stroke="{INK}"/>'
        back = arrow(left + step * place, top - 10, left + step * to, top - 10)
        return text(40, top - 24, title, anchor="start") + axis + ticks + dots + back + text(240, top + 42, words)

    return svg(
        210,
        axis_with_dots(50, "x W^T rounded, then + d", 1, 1.2, 1, "every d below half of a step is lost"),
        axis_with_dots(
            145, "x W^T + d, then rounded", 1.4, 1.6, 2, "d arrives with the probability d / step: right on average"
        ),
        label="A small d that is added after x W^T was rounded is lost; one that is added before arrives on average",
    )


def pages() -> str:
    """Where the memory of a step is, in three moments."""
    titles = ("forward, backward", "optimizer step", "next forward")
    parts = [text(12, y, name, 13, anchor="start") for name, y in (("GPU", 64), ("host", 156))]
    for i, title in enumerate(titles):
        x = 54 + 141 * i
        parts.append(text(x + 66, 26, title))
        for y in (38, 130):
            parts.append(f'<rect x="{x}" y="{y}" width="132" height="42" rx="6" fill="none" stroke="{LINE}"/>')
        parts.append(box(x, 38, 44, BLUE, "W", height=42))
        if i == 1:
            parts += [box(x + 44, 38, 38, ORANGE, "grad", height=42), box(x + 82, 38, 50, GREEN, "m, v", height=42)]
            parts += [arrow(x + 107, 130, x + 107, 82), text(x + 98, 110, "prefetch", 13, anchor="end")]
        else:
            parts += [box(x + 44, 38, 88, PLAIN, "activations", height=42), box(x, 130, 50, GREEN, "m, v", height=42)]
    parts += [
        arrow(354, 82, 354, 128),
        text(362, 102, "evicted", 12, anchor="start"),
        text(362, 116, "when needed", 12, anchor="start"),
    ]
    parts += [text(240, 198, "The driver evicts pages only if something else needs the GPU memory.", 12)]
    return svg(
        210, *parts, label="Optimizer state is on the GPU in the optimizer step, and on the host when memory is short"
    )


def step() -> str:
    """The memory of a step with real and with deferred logits, in GB, as `plan` prints it (memory.md)."""
    parts = ("4-bit weights", "other weights", "adapters, optimizer, buffer", "activations")
    bars = {"real logits": (3.6, 2.102, 0.62, 7.563), "deferred logits": (3.6, 2.102, 0.62, 2.217)}
    colors, scale = (BLUE, PLAIN, ORANGE, GREEN), 440 / 14
    drawn = []
    for row, (name, sizes) in enumerate(bars.items()):
        top, x = 40 + 66 * row, 20.0
        drawn.append(text(20, top - 8, f"{name}: {sum(sizes):.1f} GB", anchor="start"))
        for size, color in zip(sizes, colors, strict=True):
            width = size * scale
            drawn.append(f'<rect x="{x:g}" y="{top}" width="{width:g}" height="30" fill="{color}" stroke="{LINE}"/>')
            x += width
    for i, (part, color) in enumerate(zip(parts, colors, strict=True)):
        x, y = 20 + 220 * (i % 2), 164 + 24 * (i // 2)
        drawn.append(f'<rect x="{x}" y="{y - 12}" width="14" height="14" fill="{color}" stroke="{LINE}"/>')
        drawn.append(text(x + 22, y, part, anchor="start"))
    return svg(205, *drawn, label="Memory of a step: 13.9 GB with real logits, 8.5 GB with deferred logits")


def logo() -> str:
    """Four bits and a flash."""
    squares = "".join(
        f'<rect x="{x}" y="{y}" width="8" height="8" rx="2" fill="#fdba74"/>' for x in (5, 27) for y in (8, 24)
    )
    ground = '<rect width="40" height="40" rx="9" fill="#4c1d95"/>'
    flash = '<path d="M22 4 L12 22 H19 L17 36 L28 17 H21 Z" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 40">{ground}{squares}{flash}</svg>\n'


def strategy() -> str:
    """Which strategy to use, as a tree."""
    parts = [
        box(110, 8, 260, PLAIN, "Does the run fit on one GPU?", "lightning-qlora plan --gpu_memory"),
        arrow(190, 54, 120, 88),
        text(120, 72, "yes", anchor="end"),
        arrow(290, 54, 360, 88),
        text(360, 72, "no", anchor="start"),
        box(16, 90, 200, PLAIN, "Do you have several GPUs?"),
        box(264, 90, 200, PLAIN, "Do you have several GPUs?"),
        arrow(64, 120, 50, 162),
        text(46, 144, "no", anchor="end"),
        arrow(152, 120, 152, 162),
        text(160, 144, "yes", anchor="start"),
        arrow(296, 120, 266, 162),
        text(268, 144, "no", anchor="end"),
        arrow(392, 120, 392, 162),
        text(400, 144, "yes", anchor="start"),
        box(8, 164, 84, BLUE, "one GPU", height=46),
        box(100, 164, 116, BLUE, "DDP", "strategy='ddp'"),
        box(224, 164, 84, ORANGE, "memory", "options"),
        box(316, 164, 156, GREEN, "FSDP2", "ModelParallelStrategy"),
    ]
    return svg(
        218, *parts, label="If the run fits on one GPU: one GPU, or DDP on several. If not: memory options, or FSDP2"
    )


# What happens, stop by stop: file, the name in it, and what it does there. docs/design.md has the sentences.
STOPS = {
    "stops_conversion": (
        ("survey/survey.py", "survey", "what each part of the module is"),
        ("selection/selection.py", "decide", "a row for each part: what happens with it, and why"),
        ("selection/apply.py", "convert_layers", "the chosen layers, one after another"),
        ("layers/qlora_linear.py", "from_linear", "the float weight out, another class for the layer"),
        ("starts/starts.py", "first_adapter", "A and B"),
        ("survey/records.py", "record", "what trained before, fingerprints of what is frozen"),
        ("selection/apply.py", "freeze", "all but adapters, and what trains in full"),
        ("checkpoints/module_state.py", "record_conversion", "the hooks for checkpoints"),
    ),
    "stops_batch": (
        ("plugin/precision.py", "optimizer_step", "Lightning's optimizer runs the closure: forward, backward"),
        ("layers/prepared_call.py", "run", "in each layer: the compute type, and a seed for dropout"),
        ("kernels/backends.py", "plan_of", "who computes how: Triton, or `eager`: C, else plain torch"),
        ("kernels/lora_linear.py", "run_plan", "one op with a gradient; it saves x and drop(x) A^T"),
        ("kernels/eager.py", "linear_into", "s xa B^T, x W^T added, the bias; or one call of C"),
        ("kernels/eager.py", "linear_backward", "W again, the mask again: dX, dA, dB"),
        ("plugin/audit.py", "before_step", "has every adapter a gradient?"),
        ("optim/optimizer_pages.py", "_begin_update", "on a GPU: its state comes back; then A and B change"),
    ),
    "stops_save": (
        ("checkpoints/module_state.py", "_before_state_dict", "layers leave out a base that is unchanged"),
        ("layers/layer_state.py", "_save_to_state_dict", "each layer writes A, B, and a base that is not left out"),
        ("checkpoints/module_state.py", "_after_state_dict", "the hook of the module that was converted"),
        (
            "checkpoints/module_state.py",
            "saved_conversion",
            "fingerprints of the base: in 4 bits, and unchanged",
        ),
        ("checkpoints/saved_conversion.py", "entry_of", "one entry: arguments, base model, fingerprints"),
        ("checkpoints/run_state.py", "torch_rng_states", "the random generators, in the plugin's state"),
        ("runs/guards.py", "check_checkpoint", "no NaN, no adapter missing"),
    ),
    "stops_load": (
        ("runs/patches.py", "convert_before_checkpoint_is_restored", "the module is converted first"),
        ("checkpoints/module_state.py", "_before_load", "the hook of the module that was converted"),
        ("checkpoints/module_state.py", "_take_arguments", "the arguments by which the adapters compute are the same"),
        ("checkpoints/module_state.py", "_check_base", "the same base, by its fingerprints"),
        (
            "layers/layer_state.py",
            "_load_from_state_dict",
            "the base, if the state has one; the adapter",
        ),
        ("checkpoints/module_state.py", "_after_load", "what has a fingerprint is not missing"),
        ("plugin/precision.py", "load_state_dict", "the random generators"),
    ),
    "stops_merge": (
        ("adapters/merge.py", "merge", "no NaN in an adapter, no layer sharded"),
        ("adapters/merge.py", "merged_weight", "W is decoded, s B A added in fp32, DoRA's scale"),
        ("kernels/rounding.py", "round_stochastically", "rounded once, so that small updates stay on average"),
        ("layers/qlora_linear.py", "become_dense", "the layer is of its class again"),
        ("survey/records.py", "record_merge", "what trained before conversion can train again"),
    ),
}


def stops(name: str) -> str:
    """Boxes from top to bottom, one for each stop."""
    parts = []
    for i, (file, place, words) in enumerate(STOPS[name]):
        parts.append(box(8, 8 + 62 * i, 464, PLAIN, f"{i + 1}. {file}: {place}", words))
        if i:
            parts.append(arrow(240, 62 * i - 8, 240, 62 * i + 6))
    title = name.removeprefix("stops_")
    return svg(62 * len(STOPS[name]) + 2, *parts, label=f"A {title}: {len(STOPS[name])} stops, each a file and a name")


SHAPES = (nf4, weight, layers, batch, gradient, rounding, pages, step, strategy, logo)
DRAWINGS = {drawing.__name__: drawing for drawing in (*SHAPES, *charts.CHARTS)}
DRAWINGS |= {name: partial(stops, name) for name in STOPS}

if __name__ == "__main__":
    for name, drawing in DRAWINGS.items():
        Path(__file__).with_name(f"{name}.svg").write_text(drawing(), encoding="utf-8")
