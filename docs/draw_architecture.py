"""Draw the two pictures of architecture.md, as SVG text: `python docs/draw_architecture.py` writes both into docs/.

A picture is a grid of boxes and arrows between them. The same input gives the same bytes. A test,
tests/test_architecture_page.py, checks that every file and name in a box exists, and that the committed pictures are
those of this script.
"""

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

DOCS = Path(__file__).resolve().parent
WIDTH, MARGIN, BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 800, 15, 240, 92, 25, 34
COLOURS = {"ours": ("#e8f1fb", "#2f6db0"), "file": ("#fdf3dc", "#b07d1a"), "megatron": ("#efefef", "#777777")}
"""Kind of a box -> its background and border."""
DARK = "#444444"
SANS, MONO = "Helvetica, Arial, sans-serif", "Menlo, Consolas, monospace"
STYLES = {
    "heading": (SANS, 17, "bold", "#1b1b1b"),
    "bold": (SANS, 15, "bold", "#1b1b1b"),
    "plain": (SANS, 13.5, "normal", "#1b1b1b"),
    "code": (MONO, 12.5, "normal", DARK),
}
"""Style of a line of text -> its font, size, weight and colour."""
KINDS = {"ours": "code of emo_megatron", "file": "file on disk", "megatron": "code of Megatron"}


@dataclass(frozen=True, kw_only=True)
class Box:
    """One stage. `path` is a file of the package, empty for a file on disk or for Megatron; it defines all `names`."""

    title: str
    text: str
    path: str = ""
    names: tuple[str, ...] = ()
    kind: str = "ours"
    columns: int = 1

    @property
    def labels(self) -> list[str]:
        """All lines of text in the box."""
        return [line for line in (self.title, self.text, self.path, ", ".join(self.names)) if line]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Boxes by (row, column), and arrows between two of these places. An arrow with "both" has two heads."""

    title: str
    boxes: dict[tuple[int, int], Box]
    arrows: tuple[tuple[tuple[int, int], tuple[int, int], str], ...]


BATCH = Picture(
    title="The path of one micro-batch",
    boxes={
        (0, 0): Box(
            title="1. Samples",
            text="tokens and document boundaries",
            path="mcore/batches.py",
            names=("PoolGPTDataset", "get_batch"),
        ),
        (0, 1): Box(
            title="2. Packed sequence",
            text="boundaries become cu_seqlens",
            path="mcore/batches.py",
            names=("packed_documents",),
        ),
        (0, 2): Box(
            title="3. Scope",
            text="document id of every token",
            path="mcore/context.py",
            names=("scope_of", "PoolScope"),
        ),
        (1, 0): Box(
            title="4. Layer",
            text="passes the scope to the router",
            path="mcore/layer.py",
            names=("PoolTransformerLayer",),
        ),
        (1, 1): Box(
            title="5. Document scores",
            text="sum of probabilities per document",
            path="ops/reference_documents.py",
            names=("document_scores",),
        ),
        (1, 2): Box(
            title="6. All-reduce", text="over the ranks of one document", path="mcore/router.py", names=("PoolRouter",)
        ),
        (2, 0): Box(
            title="7. Pool sizes", text="drawn per document and layer", path="ops/sizes.py", names=("draw_pool_sizes",)
        ),
        (2, 1): Box(
            title="8. Pool",
            text="best-scored experts per document",
            path="ops/reference_documents.py",
            names=("select_pool",),
        ),
        (2, 2): Box(
            title="9. Top-k", text="K experts per token, in the pool", path="ops/reference.py", names=("pool_topk",)
        ),
        (3, 0): Box(
            title="10. Losses", text="load balance and z-loss", path="mcore/losses.py", names=("RouterLosses",)
        ),
        (3, 1): Box(
            title="11. Dispatcher",
            text="sends tokens to expert ranks",
            path="mcore/dispatcher.py",
            names=("PoolAlltoAllDispatcher",),
        ),
        (3, 2): Box(title="12. Experts", text="Megatron's own expert MLPs", kind="megatron"),
    },
    arrows=(
        *(((row, column), (row, column + 1), "") for row in range(4) for column in range(2)),
        *(((row, 2), (row + 1, 0), "") for row in range(3)),
    ),
)

CHECKPOINT = Picture(
    title="The path of one checkpoint",
    boxes={
        (0, 0): Box(title="Megatron checkpoint", text="folder of a training run", kind="file"),
        (0, 1): Box(
            title="Reader", text="weights by name and slice", path="checkpoint/reader.py", names=("MegatronCheckpoint",)
        ),
        (0, 2): Box(
            title="Runner",
            text="statistics and losses of a model",
            path="runners/megatron.py",
            names=("MegatronRunner",),
        ),
        (1, 0): Box(
            title="place", text="writes a placement (JSON)", path="experts/placement.py", names=("place", "Placement")
        ),
        (1, 1): Box(
            title="stats", text="writes statistics (safetensors)", path="experts/stats.py", names=("ExpertStatistics",)
        ),
        (1, 2): Box(
            title="select", text="writes a Selection (JSON)", path="experts/selection.py", names=("Selection",)
        ),
        (2, 0): Box(
            title="extract, compose, merge, reorder",
            text="read weights of the parent or of modules; choose the experts and the source of every weight",
            path="checkpoint/edit.py",
            names=("CheckpointEdit",),
            columns=3,
        ),
        (3, 0): Box(
            title="Writer",
            text="writes a Megatron checkpoint",
            path="checkpoint/writer.py",
            names=("write_checkpoint",),
        ),
        (3, 1): Box(
            title="export, import",
            text="one table of tensor names",
            path="hf/mapping.py",
            names=("Architecture", "tensors_of"),
        ),
        (3, 2): Box(title="Hugging Face folder", text="weights, config.json, model card", kind="file"),
    },
    arrows=(
        ((0, 0), (0, 1), ""),
        ((0, 1), (0, 2), ""),
        ((0, 2), (1, 1), ""),
        ((1, 1), (1, 0), ""),
        ((1, 1), (1, 2), ""),
        ((1, 0), (2, 0), ""),
        ((1, 2), (2, 2), ""),
        ((2, 0), (3, 0), ""),
        ((3, 0), (3, 1), "both"),
        ((3, 1), (3, 2), "both"),
    ),
)
PICTURES = {"architecture-batch.svg": BATCH, "architecture-checkpoint.svg": CHECKPOINT}


def left_top(place: tuple[int, int]) -> tuple[int, int]:
    """The upper left corner of the box at (row, column)."""
    row, column = place
    return MARGIN + column * (BOX_WIDTH + GAP_X), 52 + row * (BOX_HEIGHT + GAP_Y)


def text_svg(x: int, y: int, text: str, style: str) -> str:
    """One line of text. Attributes instead of a style sheet, which some programs do not read."""
    font, size, weight, colour = STYLES[style]
    look = f'font-family="{font}" font-size="{size}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x}" y="{y}" {look}>{escape(text)}</text>'


def box_svg(place: tuple[int, int], box: Box) -> str:
    """A rectangle with its lines of text."""
    x, y = left_top(place)
    width = box.columns * BOX_WIDTH + (box.columns - 1) * GAP_X
    fill, stroke = COLOURS[box.kind]
    lines = [f'<rect x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="6" fill="{fill}" stroke="{stroke}"/>']
    top = y + (24 if box.path else 42)
    for number, (label, style) in enumerate(zip(box.labels, ("bold", "plain", "code", "code"), strict=False)):
        lines.append(text_svg(x + 11, top + 19 * number, label, style))
    return "\n".join(lines)


def arrow_svg(start: tuple[int, int], end: tuple[int, int], heads: str) -> str:
    """An arrow between two places: straight in a row, else down from the box above, across, and down."""
    (x0, y0), (x1, y1) = left_top(start), left_top(end)
    if start[0] == end[0]:
        turn = 1 if x1 > x0 else -1
        x0, x1 = (x0 + BOX_WIDTH + 3, x1 - 3) if turn > 0 else (x0 - 3, x1 + BOX_WIDTH + 3)
        y = y0 + BOX_HEIGHT // 2
        lines = [head_svg(x1, y, turn, 0)]
        if heads == "both":
            lines.append(head_svg(x0, y, -turn, 0))
        points = f"{x0 + 6 * turn * (heads == 'both')},{y} {x1 - 6 * turn},{y}"
    else:
        x0, x1, y0, y1 = x0 + BOX_WIDTH // 2, x1 + BOX_WIDTH // 2, y0 + BOX_HEIGHT + 3, y1 - 3
        middle = (y0 + y1) // 2 - 2
        lines = [head_svg(x1, y1, 0, 1)]
        points = f"{x0},{y0} {x0},{middle} {x1},{middle} {x1},{y1 - 6}"
    return "\n".join([f'<polyline points="{points}" fill="none" stroke="{DARK}" stroke-width="1.6"/>', *lines])


def head_svg(x: int, y: int, right: int, down: int) -> str:
    """The head of an arrow that ends at (x, y) and points in the direction (right, down)."""
    back_x, back_y = x - 9 * right, y - 9 * down
    corners = f"{x},{y} {back_x + 5 * down},{back_y + 5 * right} {back_x - 5 * down},{back_y - 5 * right}"
    return f'<polygon points="{corners}" fill="{DARK}"/>'


def legend_svg(kinds: list[str]) -> str:
    """A coloured square and its meaning for every kind of box, at the right of the title."""
    lines = []
    for number, kind in enumerate(reversed(kinds)):
        x, (fill, stroke) = WIDTH - MARGIN - 150 - 190 * number, COLOURS[kind]
        lines.append(f'<rect x="{x}" y="17" width="14" height="14" rx="3" fill="{fill}" stroke="{stroke}"/>')
        lines.append(text_svg(x + 20, 29, KINDS[kind], "plain"))
    return "\n".join(lines)


def draw(picture: Picture) -> str:
    """The picture as the text of an SVG file, on white, so that it is legible on a dark page too."""
    height = left_top((max(row for row, _ in picture.boxes), 0))[1] + BOX_HEIGHT + MARGIN
    kinds = [kind for kind in COLOURS if any(box.kind == kind for box in picture.boxes.values())]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(picture.title)}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        text_svg(MARGIN, 30, picture.title, "heading"),
        legend_svg(kinds),
        *(arrow_svg(*arrow) for arrow in picture.arrows),
        *(box_svg(place, box) for place, box in picture.boxes.items()),
        "</svg>\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    for name, picture in PICTURES.items():
        (DOCS / name).write_text(draw(picture), encoding="utf-8")
